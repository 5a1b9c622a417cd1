"""Other forms of a pruned network: the alternatives that a fused kernel has to beat."""

import copy
import math
from collections import Counter

from torch import Tensor, nn

from dsp_kernels.graph.network import TracedNetwork, TracedNode, trace
from dsp_kernels.op.packed import PackedConv2d
from dsp_pruning import pack
from dsp_pruning.flow.kernels import dense_weight, own_bias

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
    conv.weight = nn.Parameter(dense_weight(module))
    if module.bias is not None:
        conv.bias = nn.Parameter(own_bias(module).to(module.bias))
    return conv


def widened(narrow: nn.Module, wide: nn.Module) -> nn.Module:
    """``wide`` with the tensors of ``narrow``, padded with zeros at the end of each axis: the same function.

    Both have the same layers; layers whose widths differ are convolutions and batch norms.
    """
    small = narrow.state_dict()
    for name, tensor in wide.state_dict().items():
        tensor.zero_()
        tensor[tuple(slice(size) for size in small[name].shape)] = small[name]
    return wide


def filter_pruned(dense: nn.Module, example: Tensor, macs: int) -> nn.Module:
    """``dense`` with the inner width of every block scaled by one factor, so that about ``macs`` are left.

    example: (1, channels, height, width); macs: multiply-adds of one image. This is what ordinary filter
    pruning gives: a smaller dense network. Widths tied by a residual addition are kept. Its accuracy is not
    the packed network's; it is shown for its speed at equal FLOPs.
    """
    model = copy.deepcopy(dense).eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            module.reset_parameters()  # a released network has zeros, which ``pack`` would remove
    network = trace(model, example)
    pairs = _inner_pairs(network)
    costs = {
        node.name: node.module.get_parameter("weight").numel() * math.prod(node.shape[2:])
        for node in network.of_kind("conv", "linear")
        if node.module is not None and node.shape is not None
    }
    cuts = Counter(node.name for first, _, second in pairs for node in (first, second))
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        left = sum(cost * middle ** cuts[name] for name, cost in costs.items())
        low, high = (middle, high) if left < macs else (low, middle)
    for first, between, _ in pairs:
        assert isinstance(first.module, nn.Conv2d)
        width = max(1, round(high * first.module.out_channels))
        norms = [node.module for node in between if isinstance(node.module, nn.BatchNorm2d)]
        for module in (first.module, *norms):
            for parameter in module.parameters():
                parameter.data[width:] = 0
    return compacted(pack(model, example))


def _inner_pairs(network: TracedNetwork) -> list[tuple[TracedNode, list[TracedNode], TracedNode]]:
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
