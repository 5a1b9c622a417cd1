"""The widths that a packed network had before packing, and a dense network of these widths."""

import copy
from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from dsp_kernels import FusedConv2d, PackedConv2d
from dsp_kernels.errors import DSPFormatError
from dsp_kernels.file.decode import Budget, build_module
from dsp_kernels.file.encode import encode_module, is_known
from dsp_kernels.graph.operations.entry import channel_axis
from dsp_kernels.graph.operations.table import operations_of
from dsp_pruning.flow.kernels import groups_of
from dsp_pruning.packing.rebuild import change_tensor, replace_module
from dsp_pruning.packing.report import LayerPlan

Widths = Mapping[str, tuple[int, int, int]]

_MOST_PARAMETERS = 2**30  # of a twin: its widths come from a file that may be hostile


def dense_widths(model: nn.Module) -> Widths:
    """Path -> (input channels, output channels, groups) of every layer and norm."""
    widths = {}
    for path, module in model.named_modules():
        for entry in operations_of(module)[:1]:
            sizes = [getattr(module, name) for name in (*entry.reads, *entry.widths)]
            if sizes:
                widths[path] = sizes[0], sizes[-1], groups_of(module)
    return widths


def planned_widths(plans: Iterable[LayerPlan]) -> Widths:
    """The same of the layers and tensors that packing changes."""
    widths = {}
    for plan in plans:
        widths[plan.path] = plan.in_channels, plan.out_channels, plan.groups
        if plan.position_bias is not None:  # of a FixedSizeConv2d
            widths[f"{plan.path}.conv"] = widths[plan.path]
    return widths


def dense_twin(packed: nn.Module) -> nn.Module:
    """A dense network with the widths from before packing, in eval mode, to compare costs with.

    Layers that packing changed get new random weights. Without ``packed.dense_widths`` (a network that
    ``pack`` did not make), the packed convolutions become dense at their present widths.
    Raises DSPFormatError for widths that do not fit the network.
    """
    convs = [(path, module) for path, module in packed.named_modules() if isinstance(module, PackedConv2d)]
    present = {path: (conv.in_channels, conv.out_channels, 1) for path, conv in convs}
    widths: Widths = getattr(packed, "dense_widths", None) or present
    twin = copy.deepcopy(packed).eval()
    changed = []
    for path, width in widths.items():
        owner, _, name = path.rpartition(".")
        try:
            held = getattr(twin.get_submodule(owner), name)
        except AttributeError as error:
            raise DSPFormatError(f"dense_widths has a layer that is not in the network: {path!r}") from error
        if isinstance(held, Tensor):
            change_tensor(twin, path, partial(_dense_tensor, width))
        else:
            changed.append(_dense(held, path, *width))
            replace_module(twin, path, changed[-1])
    if sum(parameter.numel() for parameter in twin.parameters()) > _MOST_PARAMETERS:
        raise DSPFormatError(f"the dense network has more than {_MOST_PARAMETERS} parameters")
    like = next((p for p in packed.parameters() if p.is_floating_point()), torch.empty(0))
    for module in changed:
        if any(tensor.is_meta for tensor in module.parameters(recurse=False)):
            module.to_empty(device=like.device).to(like.dtype).reset_parameters()  # type: ignore[operator]
    return twin


def _dense(module: nn.Module, path: str, in_channels: int, out_channels: int, groups: int) -> nn.Module:
    """A layer of these widths with the other settings of ``module``, on the meta device."""
    if isinstance(module, PackedConv2d | FusedConv2d):
        like = module.spec if isinstance(module, FusedConv2d) else module
        others = like.kernel_size, like.stride, like.padding, like.dilation, groups
        return nn.Conv2d(in_channels, out_channels, *others, bias=module.bias is not None, device="meta")
    if not is_known(module):  # a FixedSizeConv2d, or what a file made of it
        bias = module.get_parameter("position_bias")
        module.position_bias = nn.Parameter(bias.new_ones(out_channels, *bias.shape[1:]))
        return module
    settings, entry = encode_module(module, path), operations_of(module)[0]
    settings |= dict.fromkeys(entry.reads, in_channels) | dict.fromkeys(entry.widths, out_channels)
    if "groups" in settings:
        settings["groups"] = groups
    return build_module(settings, path, Budget())


def _dense_tensor(width: tuple[int, int, int], tensor: Tensor) -> Tensor:
    chosen_from, channels, _ = width
    if chosen_from:
        return torch.arange(channels, device=tensor.device) % chosen_from
    shape = list(tensor.shape)
    shape[channel_axis(shape) or 0] = channels
    return tensor.new_ones(shape)
