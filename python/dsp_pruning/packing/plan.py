"""What packing keeps: the channels of every tensor, and the groups of every convolution."""

from collections import Counter
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsp_kernels import GroupStructure, PackedConv2d
from dsp_kernels.graph.network import TracedNetwork
from dsp_kernels.graph.operations.entry import TracedNode
from dsp_kernels.graph.size_check import SizeCheck, needed_images
from dsp_pruning.flow.channels import channel_flow, keeps_constants
from dsp_pruning.flow.kernels import dense_weight, groups_of, kernel_sums, own_bias
from dsp_pruning.flow.map import ChannelMap, tied_and_kept
from dsp_pruning.packing.report import Barrier, LayerPlan, PackingReport

# A convolution without a mask whose zero kernels form more patterns than this is unstructured: one group.
_MOST_PATTERNS = 16


class Planner:
    """Decides what stays of every convolution, norm and linear layer of a traced network.

    held: node name -> reason, for tensors that something outside this graph reads; they keep their channels.
    fixed_size: whether a constant may go into a bias per output position where its reader pads zeros.
    """

    def __init__(self, network: TracedNetwork, held: Mapping[str, str], fixed_size: bool) -> None:
        self.network = network
        self.fixed_size = fixed_size
        self.map = ChannelMap(network)
        self.flow = channel_flow(network, channel_map=self.map)
        read = [node for node in network if node.kind == "state"]
        # Modules whose parameters the model's own code reads stay as they are.
        self.borrowed = {str(node.fx_node.target).rpartition(".")[0] for node in read}
        self.made_in_forward = set(network.captured.constants)
        held = dict(held)
        self.runs: dict[int, list[TracedNode]] = {}  # module or parameter -> the nodes that run or read it
        for node in network:
            changes = node.name in self.map.layers or (node.operation.widths and self.map.links[node.name])
            if node.module is None or not changes:
                continue
            if node.path in self.borrowed:
                reason = f"the model's code also reads the parameters of {node.describe()}"
                held |= dict.fromkeys((node.inputs[0], node.name), reason)
            else:
                self.runs.setdefault(id(node.module), []).append(node)
        for node in read:
            self.runs.setdefault(id(node.value), []).append(node)
        held |= {node.name: "" for node in read if self._stays(node)}
        self._kernels: dict[str, Tensor] = {}
        self.fixed = self._fixed(held)
        blocked = self._blocked()
        self.free: dict[str, Tensor] = {}
        needed: dict[str, Tensor] = {}
        for name, state in self.flow.states.items():
            own = (state.read & state.constant.isnan()) | blocked.get(name, torch.zeros_like(state.read))
            self.free[name] = ~own
            needed[name] = torch.ones_like(own) if name in self.fixed else own
        shared = [[node.name for node in nodes] for nodes in self.runs.values() if len(nodes) > 1]
        self.keep = tied_and_kept(self.map, needed, shared)

    def plan(self) -> PackingReport:
        plans = map(self._layer, self.runs.values())
        layers = {plan.path: plan for plan in plans if plan.axis is None or plan.changes}
        kept: Counter[str] = Counter()
        for name, (cause, _) in self.fixed.items():
            kept[cause] += int(self.free[name].sum())
        reasons = dict(self.fixed.values())
        causes = [node.name for node in self.network if reasons.get(node.name)]
        barriers = tuple(Barrier(name, reasons[name], kept[name]) for name in causes)
        conditions: dict[str, None] = {}  # of the checks of the network's own input
        for node in self.network.of_kind("size_check"):
            if isinstance(node.module, SizeCheck) and self.network[node.inputs[0]].kind == "input":
                conditions |= dict.fromkeys(node.module.conditions)
        return PackingReport(layers, barriers, needed_images(conditions) if conditions else "")

    def _stays(self, node: TracedNode) -> bool:
        """Whether a parameter that the model's code reads cannot lose channels."""
        owner = str(node.fx_node.target).rpartition(".")[0]
        users = [self.network[user] for user in node.users]
        if (owner and self.network.calls(owner)) or not users or node.fx_node.target in self.made_in_forward:
            return True
        often = sum(len(run.users) for run in self.runs[id(node.value)]) > 1
        # Channel numbers that are read in several places stay too.
        passing = ("same",) if often else ("same", "index")
        return any(user.operation.channels not in passing for user in users)

    def _fixed(self, held: Mapping[str, str]) -> dict[str, tuple[str, str]]:
        """Tensor that keeps all channels -> (node because of which, reason; "" for inputs and outputs)."""
        fixed: dict[str, tuple[str, str]] = {}
        for node in self.network:
            if node.name in self.map.fixed:
                for name in (*sorted(self.map.size_sources(node)), node.name):
                    fixed.setdefault(name, (node.name, self.map.fixed[node.name]))
            elif node.kind == "input":
                fixed.setdefault(node.name, (node.name, ""))
            elif node.fx_node.op == "output":
                for name in self.map.size_sources(node):
                    fixed.setdefault(name, (node.name, ""))
        for name, reason in held.items():
            fixed.setdefault(name, (name, reason))
        return {name: why for name, why in fixed.items() if name in self.flow.states}

    def _is_shared(self, node: TracedNode) -> bool:
        """Whether the node's module runs more than once, or the model's code reads its parameters."""
        return node.path in self.borrowed or len(self.runs[id(node.module)]) > 1

    def _folds(self, node: TracedNode) -> bool:
        """Whether a layer can take what it makes of constants into its bias."""
        return _has_matrix(node) and not self._is_shared(node)

    def _blocked(self) -> dict[str, Tensor]:
        """Tensor -> channels with a nonzero constant that a reader needs and cannot fold into its bias."""
        blocked: dict[str, Tensor] = {}
        for node in self.network:
            if node.name not in self.map.layers or groups_of(node.module) > 1:
                continue
            if not (self._folds(node) and (self.fixed_size or keeps_constants(node))):
                source = node.inputs[0]
                constant = self.flow[source].constant
                read = self._alive(node).any(0) & ~constant.isnan() & (constant != 0)
                blocked[source] = blocked.get(source, torch.zeros_like(read)) | read
        return blocked

    def _alive(self, node: TracedNode) -> Tensor:
        """[O, C] bool: kernels to keep. A masked convolution keeps whole rectangles of its mask."""
        if node.name in self._kernels:
            return self._kernels[node.name]
        alive = self.flow.kernels[node.name]
        own, source = self.flow[node.name], self.flow[node.inputs[0]]
        mask = getattr(node.module, "mask", None)
        if mask is not None and groups_of(node.module) == 1 and not self._is_shared(node):
            kept = mask.detach().cpu().flatten(1).ne(0).view(alive.shape)
            alive = kept & (source.constant != 0) & own.live[:, None]
        if node.kind != "linear" and self._folds(node):  # a constant output becomes a bias
            alive = alive & own.constant.isnan()[:, None]
        self._kernels[node.name] = alive
        return alive

    def _layer(self, nodes: list[TracedNode]) -> LayerPlan:
        """nodes: those that run the layer."""
        node = nodes[0]
        if node.kind == "state":
            return self._tensor(node)
        in_keep, out_keep = self.keep[node.inputs[0]], self.keep[node.name]
        structure, bias, folded = None, None, torch.zeros_like(in_keep)
        position_bias, in_size = None, None
        if _has_matrix(node):
            kernels = self._alive(node)
            for run in nodes[1:]:
                kernels = kernels | self._alive(run)
            bias = before = own_bias(node.module)
            if self._folds(node):
                constant, given = self.flow[node.name].constant, self.flow[node.inputs[0]].constant
                folded = ~in_keep & ~given.isnan() & (given != 0) & kernels.any(0)
                columns = folded.nonzero().flatten()
                if len(columns) and not keeps_constants(node):
                    shape = self.network[node.inputs[0]].shape
                    assert shape is not None
                    in_size = shape[-2], shape[-1]
                    position_bias = _position_bias(node, kernels, columns, given, in_size)[out_keep]
                elif len(columns):
                    bias = bias + (kernel_sums(node.module, columns) * kernels[:, columns]) @ given[columns]
                if node.kind != "linear":
                    bias = torch.where(constant.isnan(), bias, constant)
            if node.kind != "linear":
                structure = _structure(node, kernels, in_keep, out_keep, bias)
            if torch.equal(bias, before):
                bias = None
        own_biases = None if bias is None else tuple(bias[out_keep].tolist())
        constants = own_biases, _numbers(folded), position_bias, in_size
        return LayerPlan(node.path, *_kept(in_keep, out_keep), structure, *constants, groups_of(node.module))

    def _tensor(self, node: TracedNode) -> LayerPlan:
        keep, chosen_from = self.keep[node.name], torch.ones(0, dtype=torch.bool)
        for user in (self.network[name] for name in node.users):
            if user.operation.channels == "index":
                chosen_from = self.keep[user.operands[0]]
        return LayerPlan(str(node.fx_node.target), *_kept(chosen_from, keep), None, axis=node.axis)


def _has_matrix(node: TracedNode) -> bool:
    """Whether every filter has a kernel for every input channel, and a bias that can take constants."""
    mixes = node.operation.channels == "mixed" and not isinstance(node.module, nn.ConvTranspose2d)
    return mixes and groups_of(node.module) == 1


def _position_bias(
    node: TracedNode, kernels: Tensor, columns: Tensor, given: Tensor, in_size: tuple[int, int]
) -> Tensor:
    """[O, height, width] float64: what constant input channels contribute to every output position."""
    layer = node.module
    assert isinstance(layer, nn.Conv2d | PackedConv2d)
    weight = dense_weight(layer)
    weight = weight[:, columns.to(weight.device)].double().cpu() * kernels[:, columns, None, None]
    maps = given[columns][None, :, None, None].expand(1, -1, *in_size)
    padding = layer.padding if isinstance(layer.padding, str) else tuple(layer.padding)
    return F.conv2d(maps, weight, None, layer.stride, padding, layer.dilation)[0]


def _structure(
    node: TracedNode, kernels: Tensor, in_keep: Tensor, out_keep: Tensor, bias: Tensor
) -> GroupStructure:
    """Groups within the kept channels: filters that read the same channels form one."""
    kernels, writes = kernels[out_keep][:, in_keep], (bias[out_keep] != 0).tolist()
    members: dict[bytes, list[int]] = {}
    for number, row in enumerate(kernels.numpy()):
        if writes[number] or row.any():  # a filter that reads nothing still writes its bias
            members.setdefault(row.tobytes(), []).append(number)
    groups = [(_numbers(kernels[numbers[0]]), numbers) for numbers in members.values()]
    masked = hasattr(node.module, "mask") or isinstance(node.module, PackedConv2d)
    if not masked and len(groups) > _MOST_PATTERNS:
        groups = [(_numbers(kernels.any(0)), sorted(n for numbers in members.values() for n in numbers))]
    return GroupStructure.build(int(in_keep.sum()), int(out_keep.sum()), groups)


def _kept(in_keep: Tensor, out_keep: Tensor) -> tuple[int, int, tuple[int, ...], tuple[int, ...]]:
    """in_channels, out_channels, in_keep and out_keep of a LayerPlan."""
    return len(in_keep), len(out_keep), _numbers(in_keep), _numbers(out_keep)


def _numbers(flags: Tensor) -> tuple[int, ...]:
    return tuple(flags.nonzero().flatten().tolist())
