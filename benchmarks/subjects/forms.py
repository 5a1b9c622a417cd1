"""Other forms of a pruned network: the alternatives that a fused kernel has to beat."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from dsp_kernels.graph.network import TracedNetwork, TracedNode, trace
from dsp_kernels.op.dense import dense_weight, live_bias
from dsp_kernels.op.packed import PackedConv2d

_PASSES_CHANNELS = ("batch_norm", "activation", "max_pool", "avg_pool", "identity")


def compacted(packed: nn.Module) -> nn.Module:
    """A copy with one dense convolution per packed one, over the live channels, with zeros between groups.

    It computes what ``packed`` computes, and any engine runs it as a dense network.
    """
    model = copy.deepcopy(packed).eval()
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedConv2d):
            model.set_submodule(name, _dense(module))
    return model


def _dense(module: PackedConv2d) -> nn.Conv2d:
    window = module.kernel_size, module.stride, module.padding, module.dilation
    conv = nn.Conv2d(module.in_channels, module.out_channels, *window, bias=module.bias is not None)
    weights = [weight.detach() for weight in module.weights]
    conv.weight = nn.Parameter(dense_weight(module.structure, weights, module.kernel_size))
    if (bias := live_bias(module.structure, module.bias)) is not None:
        conv.bias = nn.Parameter(bias.detach().clone())
    return conv


def filter_pruned(dense: nn.Module, example: Tensor, macs: int) -> nn.Module:
    """``dense`` with the inner width of every block scaled by one factor, so that about ``macs`` are left.

    example: (1, channels, height, width); macs: multiply-adds of one image. This is what ordinary filter
    pruning gives: a smaller dense network. Widths tied by a residual addition are kept. Its accuracy is not
    the packed network's; it is shown for its speed at equal FLOPs.
    """
    model = copy.deepcopy(dense).eval()
    network = trace(model, example)
    pairs = inner_pairs(network)
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if _macs(network, pairs, middle) < macs else (low, middle)
    for first, between, second in pairs:
        assert isinstance(first.module, nn.Conv2d)
        assert isinstance(second.module, nn.Conv2d)
        width = _width(first.module.out_channels, high)
        _cut(first.module, rows=width)
        for node in between:
            if isinstance(node.module, nn.BatchNorm2d):
                _cut_norm(node.module, width)
        _cut(second.module, columns=width)
    return model


def inner_pairs(network: TracedNetwork) -> list[tuple[TracedNode, list[TracedNode], TracedNode]]:
    """(conv, nodes between, conv) where the second is the only reader of the first."""
    pairs = []
    for first in network.of_kind("conv"):
        between, users = [], first.users
        while len(users) == 1 and network[users[0]].kind in _PASSES_CHANNELS:
            between.append(network[users[0]])
            users = between[-1].users
        if len(users) == 1 and network[users[0]].kind == "conv":
            second = network[users[0]]
            convs = (first.module, second.module)
            if all(isinstance(conv, nn.Conv2d) and conv.groups == 1 for conv in convs):
                pairs.append((first, between, second))
    return pairs


def _width(channels: int, scale: float) -> int:
    return max(1, round(channels * scale))


def _macs(
    network: TracedNetwork, pairs: list[tuple[TracedNode, list[TracedNode], TracedNode]], scale: float
) -> float:
    cut_output = {first.name for first, _, _ in pairs}
    cut_input = {second.name for _, _, second in pairs}
    total = 0.0
    for node in network.of_kind("conv", "linear"):
        assert node.module is not None
        assert node.shape is not None
        weight = node.module.get_parameter("weight")
        pixels = node.shape[2] * node.shape[3] if node.kind == "conv" else 1
        share = 1.0
        if node.name in cut_output:
            share *= _width(weight.shape[0], scale) / weight.shape[0]
        if node.name in cut_input:
            share *= _width(weight.shape[1], scale) / weight.shape[1]
        total += weight.numel() * pixels * share
    return total


def _cut(conv: nn.Conv2d, rows: int | None = None, columns: int | None = None) -> None:
    conv.weight = nn.Parameter(conv.weight.detach()[:rows, :columns].clone())
    if conv.bias is not None:
        conv.bias = nn.Parameter(conv.bias.detach()[:rows].clone())
    conv.out_channels, conv.in_channels = conv.weight.shape[:2]


def _cut_norm(norm: nn.BatchNorm2d, width: int) -> None:
    for name, tensor in norm.state_dict().items():
        if tensor.dim() == 1:
            cut = tensor[:width].clone()
            setattr(norm, name, nn.Parameter(cut) if name in ("weight", "bias") else cut)
    norm.num_features = width
