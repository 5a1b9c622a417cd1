"""What packing keeps: which channels of every value stay, and which groups every convolution has then."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsp_kernels import GroupStructure, PackedConv2d
from dsp_kernels.graph.network import TracedNetwork, TracedNode
from dsp_pruning.flow.channels import ChannelFlow, channel_flow
from dsp_pruning.flow.kernels import dense_weight, groups_of, kernel_sums, matrix_shape
from dsp_pruning.flow.map import ChannelMap, norm_of
from dsp_pruning.flow.rules import keeps_constants
from dsp_pruning.flow.spaces import Spaces

__all__ = ["Barrier", "LayerPlan", "PackingPlan", "plan_layers", "plan_packing"]

_NORMS = ("batch_norm", "functional_norm", "instance_norm")
# A conv without a mask whose kernels vanish in more patterns than this is unstructured: one group holds it.
_MOST_PATTERNS = 16


@dataclass(frozen=True)
class LayerPlan:
    """One module with parameters, after packing. Channel numbers are those of the original network.

    in_channels, out_channels: widths before; for a linear layer, features.
    in_keep, out_keep: channels of its input and output that stay, ascending.
    structure: the groups of a convolution, numbered within in_keep and out_keep; None for other modules
        and for convolutions that are grouped already.
    bias: float64 numbers for out_keep where constants were folded into it, None where it is the module's own.
    folded: input channels that were replaced by a number in the bias.
    position_bias: [out_keep, height, width] float64 where constants were folded into a bias for every place,
        for inputs of in_size (height, width) only; None elsewhere.
    """

    path: str
    in_channels: int
    out_channels: int
    in_keep: tuple[int, ...]
    out_keep: tuple[int, ...]
    structure: GroupStructure | None
    bias: tuple[float, ...] | None = field(default=None, repr=False)
    folded: tuple[int, ...] = ()
    position_bias: Tensor | None = field(default=None, repr=False, compare=False)
    in_size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Barrier:
    """Where channels had to stay although nothing needs their values.

    node: name in the traced graph; reason: why; kept: how many channels of it and its inputs could have gone.
    """

    node: str
    reason: str
    kept: int


@dataclass(frozen=True)
class PackingPlan:
    """layers: module path -> plan; barriers: in the order in which they run."""

    layers: dict[str, LayerPlan]
    barriers: tuple[Barrier, ...]


def plan_layers(network: TracedNetwork) -> dict[str, LayerPlan]:
    """Module path -> plan, for every convolution, norm and linear layer whose channels can be followed."""
    return plan_packing(network).layers


def plan_packing(
    network: TracedNetwork, held: dict[str, str] | None = None, fixed_size: bool = False
) -> PackingPlan:
    """What stays of a traced network, and why what could have gone stays.

    held: node name -> reason, for values whose channels have to stay because something outside this graph
        reads them.
    fixed_size: whether a constant may go into a bias for every place, where zeros are padded around it.
    """
    return _Planner(network, held, fixed_size).plan()


class _Planner:
    def __init__(self, network: TracedNetwork, held: dict[str, str] | None, fixed_size: bool) -> None:
        self.network = network
        self.fixed_size = fixed_size
        self.paths = ChannelMap(network)
        self.flow: ChannelFlow = channel_flow(network, semantics="eval", paths=self.paths)
        self.runs: dict[int, list[TracedNode]] = {}
        self.borrowed = self._find_borrowed()
        held = dict(held or {})
        for node in network:
            followed = node.name in self.paths.readers or node.kind in _NORMS
            if not followed or node.name in self.paths.barriers:
                continue
            if self._is_borrowed(node):
                reason = f"the model's code also reads the parameters of {node.describe()}"
                held |= dict.fromkeys((node.inputs[0], node.name), reason)
            else:
                self.runs.setdefault(id(norm_of(node)), []).append(node)
        self._kernels: dict[str, Tensor] = {}
        self.fixed = self._fixed()
        for name, reason in held.items():
            self.fixed.setdefault(name, (name, reason))
        blocked = self._blocked()
        every = {name: torch.ones(self.paths.width[name], dtype=torch.bool) for name in self.fixed}
        self.free: dict[str, Tensor] = {}
        must = {}
        for name, state in self.flow.states.items():
            needed = (state.read & state.constant.isnan()) | blocked.get(name, torch.zeros_like(state.read))
            self.free[name] = ~needed
            must[name] = every.get(name, needed)
        shared = [[node.name for node in nodes] for nodes in self.runs.values() if len(nodes) > 1]
        self.spaces = Spaces(network, self.paths, must, shared)

    def plan(self) -> PackingPlan:
        layers = {}
        for nodes in self.runs.values():
            made = self._layer(nodes)
            layers[made.path] = made
        found: dict[str, Barrier] = {}
        for name, (cause, reason) in self.fixed.items():
            kept = int(self.free[name].sum()) + (found[cause].kept if cause in found else 0)
            found[cause] = Barrier(cause, reason, kept)
        place = {node.name: number for number, node in enumerate(self.network)}
        barriers = sorted((b for b in found.values() if b.reason), key=lambda b: place[b.node])
        return PackingPlan(layers, tuple(barriers))

    def _find_borrowed(self) -> set[str]:
        """Paths of modules whose parameters code of the model reads by itself; they stay as they are."""
        return {
            str(node.fx_node.target).rpartition(".")[0]
            for node in self.network
            if node.fx_node.op == "get_attr"
            and any(self.network[user].kind != "functional_norm" for user in node.users)
        }

    def _is_borrowed(self, node: TracedNode) -> bool:
        return (node.path or node.attributes.get("path")) in self.borrowed

    def _fixed(self) -> dict[str, tuple[str, str]]:
        """Value whose channels have to stay as they are -> node because of which, and why ("" if natural)."""
        fixed: dict[str, tuple[str, str]] = {}
        for node in self.network:
            if node.name in self.paths.barriers or node.name in self.paths.rigid:
                reason = self.paths.barriers.get(node.name) or self.paths.rigid[node.name]
                for name in (*sorted(self.paths.size_sources(node)), node.name):
                    fixed.setdefault(name, (node.name, reason))
            elif node.kind == "input":
                fixed.setdefault(node.name, (node.name, ""))
            elif node.fx_node.op == "output":
                for name in self.paths.size_sources(node):
                    fixed.setdefault(name, (node.name, ""))
        return {name: why for name, why in fixed.items() if name in self.flow.states}

    def _shared(self, node: TracedNode) -> bool:
        """Whether a module is not this node's own: it runs more than once, or code reads its parameters."""
        return self._is_borrowed(node) or len(self.runs[id(norm_of(node))]) > 1

    def _folds(self, node: TracedNode) -> bool:
        """Whether what a layer makes of constants can go into its bias."""
        folding = node.kind in ("conv", "packed_conv", "linear") and groups_of(node.module) == 1
        return folding and not self._shared(node)

    def _blocked(self) -> dict[str, Tensor]:
        """Value -> channels that hold a number which a reader needs and cannot fold into its bias."""
        blocked: dict[str, Tensor] = {}
        for node in self.network:
            if node.name not in self.paths.readers or groups_of(node.module) > 1:
                continue
            if not (self._folds(node) and (self.fixed_size or keeps_constants(node))):
                source = node.inputs[0]
                constant = self.flow[source].constant
                read = self._alive(node).any(0) & ~constant.isnan() & (constant != 0)
                blocked[source] = blocked.get(source, torch.zeros_like(read)) | read
        return blocked

    def _alive(self, node: TracedNode) -> Tensor:
        """[O, C] bool: kernels to keep. Of a masked conv the mask's rectangles, even where a weight is 0."""
        if node.name not in self._kernels:
            self._kernels[node.name] = self._find_alive(node)
        return self._kernels[node.name]

    def _find_alive(self, node: TracedNode) -> Tensor:
        alive = self.flow.kernels[node.name]
        own, source = self.flow[node.name], self.flow[node.inputs[0]]
        mask = getattr(node.module, "mask", None)
        if mask is not None and groups_of(node.module) == 1 and not self._shared(node):
            kept = mask.detach().cpu().flatten(1).ne(0).view(alive.shape)
            alive = kept & (source.constant != 0) & own.live[:, None]
        if node.kind != "linear" and self._folds(node):  # a constant output becomes a bias
            alive = alive & own.constant.isnan()[:, None]
        return alive

    def _layer(self, nodes: list[TracedNode]) -> LayerPlan:
        node = nodes[0]
        in_keep, out_keep = self.spaces.keep(node.inputs[0]), self.spaces.keep(node.name)
        structure, bias, folded = None, None, torch.zeros_like(in_keep)
        places, in_size = None, None
        if node.kind in ("conv", "packed_conv", "linear") and groups_of(node.module) == 1:
            kernels = (
                torch.stack([self._alive(run) for run in nodes]).any(0) if nodes[1:] else self._alive(node)
            )
            bias = _own_bias(node)
            if self._folds(node):
                own = self.flow[node.name].constant
                given = self.flow[node.inputs[0]].constant
                folded = ~in_keep & ~given.isnan() & (given != 0) & kernels.any(0)
                columns = folded.nonzero().flatten()
                if len(columns) and not keeps_constants(node):
                    places, in_size = _places(node, kernels, columns, given, self.network)
                elif len(columns):
                    bias = bias + (kernel_sums(node, columns) * kernels[:, columns]) @ given[columns]
                if node.kind != "linear":
                    bias = torch.where(own.isnan(), bias, own)
            if node.kind != "linear":
                structure = _structure(node, kernels, in_keep, out_keep, bias)
            if torch.equal(bias, _own_bias(node)):
                bias = None
        return LayerPlan(
            path=node.path or node.attributes["path"],
            in_channels=len(in_keep),
            out_channels=len(out_keep),
            in_keep=_numbers(in_keep),
            out_keep=_numbers(out_keep),
            structure=structure,
            bias=None if bias is None else tuple(bias[out_keep].tolist()),
            folded=_numbers(folded),
            position_bias=None if places is None else places[out_keep],
            in_size=in_size,
        )


def _places(
    node: TracedNode, kernels: Tensor, columns: Tensor, given: Tensor, network: TracedNetwork
) -> tuple[Tensor, tuple[int, int]]:
    """[O, height, width] float64 that columns of numbers give to every place; and the size of the input."""
    layer, shape = node.module, network[node.inputs[0]].shape
    assert isinstance(layer, nn.Conv2d | PackedConv2d)
    assert shape is not None
    height, width = shape[-2:]
    weight = dense_weight(layer)[:, columns.to(_device(layer))].detach().double().cpu()
    weight = weight * kernels[:, columns, None, None]
    maps = given[columns][None, :, None, None].expand(1, -1, height, width)
    padding = layer.padding if isinstance(layer.padding, str) else tuple(layer.padding)
    made = F.conv2d(maps, weight, None, layer.stride, padding, layer.dilation)
    return made[0], (height, width)


def _device(layer: nn.Module) -> torch.device:
    return next(layer.parameters()).device


def _structure(
    node: TracedNode, kernels: Tensor, in_keep: Tensor, out_keep: Tensor, bias: Tensor
) -> GroupStructure:
    """The groups of a convolution within the kept channels: filters that read the same channels are one."""
    kernels, writes = kernels[out_keep][:, in_keep], (bias[out_keep] != 0).tolist()
    rows = kernels.numpy()
    members: dict[bytes, list[int]] = {}
    for filter_number, row in enumerate(rows):
        if writes[filter_number] or row.any():  # a filter that reads nothing still writes its bias
            members.setdefault(row.tobytes(), []).append(filter_number)
    groups = [(_numbers(kernels[numbers[0]]), numbers) for numbers in members.values()]
    masked = hasattr(node.module, "mask") or isinstance(node.module, PackedConv2d)
    if not masked and len(groups) > _MOST_PATTERNS:
        groups = [(_numbers(kernels.any(0)), sorted(n for numbers in members.values() for n in numbers))]
    return GroupStructure.build(int(in_keep.sum()), int(out_keep.sum()), groups)


def _own_bias(node: TracedNode) -> Tensor:
    """[O] float64; zeros where the layer has none."""
    bias = getattr(node.module, "bias", None)
    if bias is None:
        return torch.zeros(matrix_shape(node)[0], dtype=torch.float64)
    own = bias.detach().cpu().double().clone()
    if isinstance(node.module, PackedConv2d):  # an absent channel holds 0, whatever the bias says
        own[list(node.module.structure.absent)] = 0
    return own


def _numbers(flags: Tensor) -> tuple[int, ...]:
    return tuple(flags.nonzero().flatten().tolist())
