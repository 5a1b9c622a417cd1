"""What packing keeps: which channels of every value stay, and which groups every convolution has then.

Values that are tied channel by channel (through norms, activations, adds, pools) share one *space*; a
channel leaves a space only if every value in it can spare that channel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsp_kernels import GroupStructure, PackedConv2d
from dsp_kernels.errors import DSPTraceError
from dsp_kernels.planner import zero_padding
from dsp_kernels.trace import TracedNetwork, TracedNode
from dsp_pruning.channels import ChannelFlow, channel_flow

__all__ = ["LayerPlan", "plan_layers"]

_READERS = ("conv", "packed_conv", "linear")
_KNOWN = (
    *("input", "batch_norm", "activation", "add", "max_pool", "avg_pool", "global_avg_pool"),
    *("flatten", "identity", "scalar", "output", *_READERS),
)
# A conv without a mask whose kernels vanish in more patterns than this is unstructured: one group holds it.
_MOST_PATTERNS = 16


@dataclass(frozen=True)
class LayerPlan:
    """One module with parameters, after packing. Channel numbers are those of the original network.

    in_keep, out_keep: channels of its input and output that stay, ascending. For a linear layer, features.
    structure: the groups of a convolution, numbered within in_keep and out_keep; None for other modules
        and for grouped or otherwise padded convolutions, which stay as they are.
    """

    path: str
    in_keep: tuple[int, ...]
    out_keep: tuple[int, ...]
    structure: GroupStructure | None


def plan_layers(network: TracedNetwork) -> dict[str, LayerPlan]:
    """Module path -> plan, for every convolution, batch norm and linear layer of a traced network.

    Raises DSPTraceError, naming the node, for an operation that packing does not know and for a module with
    parameters that runs more than once.
    """
    _refuse_unknown(network)
    flow = channel_flow(network, semantics="eval")
    spaces = _Spaces(network, flow)
    plans = {}
    for node in network.of_kind("batch_norm", *_READERS):
        in_keep, out_keep = spaces.keep(node.inputs[0]), spaces.keep(node.name)
        packable = node.kind in ("conv", "packed_conv") and not _stays_whole(node.module)
        structure = _structure(node, flow, in_keep, out_keep) if packable else None
        plans[node.path] = LayerPlan(node.path, _numbers(in_keep), _numbers(out_keep), structure)
    return plans


def _refuse_unknown(network: TracedNetwork) -> None:
    seen: dict[int, str] = {}
    for node in network:
        if node.kind not in _KNOWN:
            raise DSPTraceError(
                f"packing does not know how channels pass {node.describe()}; known are convolution, batch "
                "norm, activations, add, max and average pooling, flatten, linear, dropout and identity"
            )
        if node.kind in ("batch_norm", *_READERS):
            assert node.module is not None
            if id(node.module) in seen:
                raise DSPTraceError(
                    f"{node.describe()} runs the module of node {seen[id(node.module)]!r} a second time; "
                    "packing needs one module per use"
                )
            seen[id(node.module)] = node.name


class _Spaces:
    """Values tied channel by channel, and the channels that each such space keeps."""

    def __init__(self, network: TracedNetwork, flow: ChannelFlow) -> None:
        self.network = network
        self.root: dict[str, str] = {}
        for node in network:
            if node.kind != "scalar":
                tied = [name for name in node.inputs if name in self.root]
                self.root[node.name] = node.name
                if node.kind not in _READERS:
                    for name in tied:
                        self._tie(node.name, name)
        self._kept: dict[str, Tensor] = {}
        for node in network:
            if node.kind in ("scalar", "output"):
                continue
            root = self._find(node.name)
            live = flow[node.name].live
            width = self._width(root)
            live = live.view(width, -1).any(1)  # after a flatten a channel is several features
            if self._is_fixed(node):
                live = torch.ones_like(live)
            self._kept[root] = self._kept.get(root, torch.zeros(width, dtype=torch.bool)) | live
        for kept in self._kept.values():
            if not kept.any():  # every module stays legal: one channel, which nobody needs, remains
                kept[0] = True

    def keep(self, name: str) -> Tensor:
        """[channels or features] bool of a node's value: what stays."""
        kept = self._kept[self._find(name)]
        return kept.repeat_interleave(self._width(name) // len(kept))

    def _is_fixed(self, node: TracedNode) -> bool:
        """Whether the channels of a node's value have to stay as they are."""
        if node.kind in ("input", "linear") or any(
            self.network[user].kind == "output" for user in node.users
        ):
            return True
        if any(_stays_whole(toucher.module) for toucher in (node, *(self.network[u] for u in node.users))):
            return True
        # view(-1, 512): the number of features is written into the model's own code.
        return node.kind == "flatten" and any(isinstance(a, int) and a > 1 for a in node.fx_node.args[1:])

    def _width(self, name: str) -> int:
        shape = self.network[name].shape
        assert shape is not None
        return shape[1]

    def _find(self, name: str) -> str:
        while self.root[name] != name:
            name = self.root[name]
        return name

    def _tie(self, name: str, other: str) -> None:
        """One space for both; its root is the older value, which has channels and not features."""
        new, old = self._find(name), self._find(other)
        if new == old:
            return
        order = {node.name: place for place, node in enumerate(self.network)}
        new, old = sorted((new, old), key=order.__getitem__, reverse=True)
        self.root[new] = old


def _stays_whole(module: nn.Module | None) -> bool:
    """Whether this is a convolution that a PackedConv2d cannot say, so that its channels stay."""
    return isinstance(module, nn.Conv2d) and (module.groups > 1 or isinstance(zero_padding(module), str))


def _structure(node: TracedNode, flow: ChannelFlow, in_keep: Tensor, out_keep: Tensor) -> GroupStructure:
    """The groups of a convolution within the kept channels: filters that read the same channels are one."""
    kernels = _patterns(node, flow)[out_keep][:, in_keep]
    groups: dict[tuple[int, ...], list[int]] = {}
    bias = _kept_bias(node, out_keep)
    for filter_number, row in enumerate(kernels):
        channels = _numbers(row)
        if channels or bias[filter_number]:  # a filter that reads nothing still writes its bias
            groups.setdefault(channels, []).append(filter_number)
    masked = hasattr(node.module, "mask") or isinstance(node.module, PackedConv2d)
    if not masked and len(groups) > _MOST_PATTERNS:
        union = _numbers(kernels.any(0))
        groups = {union: sorted(number for numbers in groups.values() for number in numbers)}
    return GroupStructure.build(int(in_keep.sum()), int(out_keep.sum()), list(groups.items()))


def _patterns(node: TracedNode, flow: ChannelFlow) -> Tensor:
    """[O, C] bool: kernels to keep. Of a masked conv the mask's rectangles, even where a weight is 0."""
    alive = flow.kernels[node.name]
    mask = getattr(node.module, "mask", None)
    if mask is None:
        return alive
    kept = mask.detach().cpu().flatten(1).ne(0).view(alive.shape)
    reads, needed = flow[node.inputs[0]].constant != 0, flow[node.name].live
    return kept & reads & needed[:, None]


def _kept_bias(node: TracedNode, out_keep: Tensor) -> list[bool]:
    bias = getattr(node.module, "bias", None)
    if bias is None:
        return [False] * int(out_keep.sum())
    return (bias.detach().cpu()[out_keep] != 0).tolist()


def _numbers(flags: Tensor) -> tuple[int, ...]:
    return tuple(flags.nonzero().flatten().tolist())
