"""Modules after packing, made from the original ones and their plans; and where their channels are stored."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from dsp_kernels import PackedConv2d
from dsp_kernels.graph.operations.table import operations_of
from dsp_kernels.graph.size_check import FixedSizeConv2d, fixed_size
from dsp_kernels.op.dense import group_weights
from dsp_kernels.program.planner import zero_padding
from dsp_pruning.flow.kernels import dense_weight
from dsp_pruning.packing.report import LayerPlan

# Of a tensor: (its name, the dimension, kept channels, original width, tensor) -> tensor.
Change = Callable[[str, int, Sequence[int], int, Tensor], Tensor]


def apply(model: nn.Module, plan: LayerPlan) -> None:
    """Give a layer or tensor of ``model`` the channels of its plan."""
    if plan.axis is None:
        replace_module(model, plan.path, rebuild(model.get_submodule(plan.path), plan))
    else:
        change_tensor(model, plan.path, partial(_narrow_tensor, plan, plan.axis))


def _narrow_tensor(plan: LayerPlan, axis: int, tensor: Tensor) -> Tensor:
    kept = _select("", axis, plan.out_keep, plan.out_channels, tensor)
    if not plan.in_channels:
        return kept
    return torch.searchsorted(torch.tensor(plan.in_keep, device=tensor.device), kept % plan.in_channels)


def change_tensor(model: nn.Module, path: str, change: Callable[[Tensor], Tensor]) -> None:
    """Replace a parameter or buffer by ``change`` of it, under all of its names."""
    owner, _, own = path.rpartition(".")
    old = getattr(model.get_submodule(owner), own)
    held = [(module, own) for module in model.modules() for own in (module._parameters, module._buffers)]
    places = [(module, name) for module, own in held for name, tensor in own.items() if tensor is old]
    replace_tensor(model.get_submodule(owner), own, change)
    made = getattr(model.get_submodule(owner), own)
    for module, name in places:
        setattr(module, name, made)
        if isinstance(module, nn.BatchNorm2d):
            module.num_features = len(made)


def rebuild(module: nn.Module, plan: LayerPlan) -> nn.Module:
    """The module with the channels of its plan; ``module`` itself, changed, where its class can stay."""
    if plan.structure is None:
        return _narrow(module, plan)
    assert isinstance(module, nn.Conv2d | PackedConv2d)
    made = _convolution(module, plan)
    if plan.position_bias is None or plan.in_size is None:
        return made
    like = next(made.parameters(), plan.position_bias)
    check = fixed_size(*plan.in_size)
    return FixedSizeConv2d(made, check, plan.position_bias.to(like)).train(made.training)


def _channel_dims(module: nn.Module, plan: LayerPlan) -> dict[str, tuple[int | None, int | None]]:
    """Tensor name -> its dimension of output channels and of input channels, or None."""
    if isinstance(module, nn.ConvTranspose2d):
        return {"weight": (None if plan.groups > 1 else 1, 0), "bias": (0, None)}
    if isinstance(module, nn.Conv2d | nn.Linear):
        return {"weight": (0, None if plan.groups > 1 else 1), "bias": (0, None)}
    return dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (0, None))


def change_channels(module: nn.Module, plan: LayerPlan, change: Change) -> None:
    """Replace the tensors of a layer or norm, along every dimension of which packing removes channels."""
    for name, (rows, columns) in _channel_dims(module, plan).items():
        if rows is not None and len(plan.out_keep) < plan.out_channels:
            replace_tensor(module, name, partial(change, name, rows, plan.out_keep, plan.out_channels))
        if columns is not None and len(plan.in_keep) < plan.in_channels:
            replace_tensor(module, name, partial(change, name, columns, plan.in_keep, plan.in_channels))


def set_widths(module: nn.Module, in_channels: int, out_channels: int) -> None:
    """Set the attributes of a layer or norm that say how wide it is; its tensors already are."""
    entry = operations_of(module)[0]
    for name in (*entry.reads, *entry.widths):
        setattr(module, name, in_channels if name in entry.reads else out_channels)
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        each = module.weight.shape[1]  # it loses whole groups
        module.groups = (out_channels if module.transposed else in_channels) // each


def replace_module(root: nn.Module, path: str, made: nn.Module) -> None:
    """Put a module in place of the one at ``path``, under all of its names."""
    old = root.get_submodule(path)
    places = [place for place, module in root.named_modules(remove_duplicate=False) if module is old]
    for place in places if made is not old else ():
        parent, _, name = place.rpartition(".")
        setattr(root.get_submodule(parent), name, made)


def replace_tensor(module: nn.Module, name: str, change: Callable[[Tensor], Tensor]) -> None:
    """Replace a parameter or buffer, if the module has it, by ``change`` of it."""
    tensor = getattr(module, name, None)
    if isinstance(tensor, nn.Parameter):
        setattr(module, name, nn.Parameter(change(tensor.detach()), tensor.requires_grad))
    elif isinstance(tensor, Tensor):
        setattr(module, name, change(tensor.detach()))


def _narrow(module: nn.Module, plan: LayerPlan) -> nn.Module:
    change_channels(module, plan, _select)
    set_widths(module, len(plan.in_keep), len(plan.out_keep))
    if plan.bias is not None:
        weight = module.get_parameter("weight")
        bias = torch.tensor(plan.bias, dtype=torch.float64).to(weight)
        module.bias = nn.Parameter(bias, weight.requires_grad)
    return module


def _select(name: str, dim: int, keep: Sequence[int], width: int, tensor: Tensor) -> Tensor:
    return tensor.index_select(dim, torch.tensor(keep, device=tensor.device))


def _convolution(conv: nn.Conv2d | PackedConv2d, plan: LayerPlan) -> nn.Conv2d | PackedConv2d:
    structure = plan.structure
    assert structure is not None
    whole = len(plan.in_keep) == plan.in_channels and len(plan.out_keep) == plan.out_channels
    if whole and plan.bias is None and structure.is_dense:
        return conv
    weight = dense_weight(conv)
    rows, columns = (torch.tensor(keep, device=weight.device) for keep in (plan.out_keep, plan.in_keep))
    bias = torch.tensor(plan.bias, dtype=torch.float64).to(weight) if plan.bias is not None else None
    if bias is None and conv.bias is not None:
        bias = conv.bias.detach()[rows]
    padding = zero_padding(conv) if isinstance(conv, nn.Conv2d) else conv.padding
    settings = conv.kernel_size, conv.stride, 0 if isinstance(padding, str) else padding, conv.dilation
    # On the meta device: no time for initial weights that are overwritten.
    made = PackedConv2d(structure, *settings, bias is not None, device="meta", dtype=weight.dtype)
    made.to_empty(device=weight.device).reset_index(weight.device)
    with torch.no_grad():
        kept = group_weights(structure, weight.index_select(0, rows).index_select(1, columns))
        for branch, values in zip(made.weights, kept, strict=True):
            branch.copy_(values)
        if made.bias is not None and bias is not None:
            made.bias.copy_(bias)
    trained = next((parameter.requires_grad for parameter in conv.parameters()), True)
    if not isinstance(padding, str):
        return made.requires_grad_(trained).train(conv.training)
    assert isinstance(conv, nn.Conv2d)  # a padding that PackedConv2d does not have: a narrower nn.Conv2d
    conv.weight = nn.Parameter(dense_weight(made).to(weight), trained)
    conv.bias = None if made.bias is None else made.bias.requires_grad_(trained)
    set_widths(conv, len(plan.in_keep), len(plan.out_keep))
    return conv
