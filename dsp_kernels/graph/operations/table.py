"""THE table of operations that a traced network may hold. A new operation is one entry.

Recogniser, flow of channels, planner and file format read it. The first entry that fits a call is its one.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from dsp_kernels.graph.operations import channels, maps, pointwise
from dsp_kernels.graph.operations.entry import Attributes, Call, Found, Modules, Operation, TracedNode
from dsp_kernels.graph.size_check import SizeCheck
from dsp_kernels.op.fused_conv import FusedConv2d
from dsp_kernels.op.packed import PackedConv2d

LEAF_TYPES: tuple[type[nn.Module], ...] = (PackedConv2d, FusedConv2d, SizeCheck)


def _names(names: str, *places: str) -> str:
    """The names in each of these places."""
    return " ".join(place + name for name in names.split() for place in places)


def _everywhere(names: str) -> str:
    """Functions of torch.nn.functional and torch and methods of these names, also in place."""
    return _names(" ".join(f"{name} {name}_" for name in names.split()), "F.", "torch.", ".")


def _eval_only(place: int) -> Callable[[Call], Found]:
    """A call whose argument ``training``, at this place, is False."""
    return lambda call: {} if call.argument(place, "training", True) is False else None


def _never(call: Call) -> None:
    """Of entries that only say what a file may hold."""


CONV_SETTINGS = ("kernel_size", "stride", "padding", "dilation")
_CONV = (*CONV_SETTINGS, "in_channels", "out_channels", "groups", "bias", "padding_mode")
_LINEAR = ("in_features", "out_features", "bias")
_BATCH_NORM = ("num_features", "eps", "momentum", "affine", "track_running_stats")
_GROUP_NORM = ("num_groups", "num_channels", "eps", "affine")
_LAYER_NORM = ("normalized_shape", "eps", "elementwise_affine", "bias")
_MAX_POOL = (*CONV_SETTINGS, "return_indices", "ceil_mode")
_AVG_POOL = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
_AVERAGE: Modules = {nn.AdaptiveAvgPool2d: ("output_size",)}
_ADAPTIVE: Modules = {**_AVERAGE, nn.AdaptiveMaxPool2d: ("output_size", "return_indices")}
_PADS = (nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d)
_SLOPES = {nn.PReLU: ("num_parameters",)}
_ADD = "operator.add operator.iadd torch.add .add .add_"
_SUBTRACT = "operator.sub operator.isub torch.sub .sub .sub_"
_MULTIPLY = "operator.mul operator.imul torch.mul .mul .mul_ .__mul__"
_RESHAPE = "torch.reshape .view .reshape"
_FLATTEN = "torch.flatten .flatten"
_RESIZE = "torch.squeeze .squeeze torch.unsqueeze .unsqueeze .expand .expand_as operator.getitem"

_layer = partial(Operation, channels="mixed")
_conv = partial(_layer, attributes=channels.layer(4), reads=("in_channels",), widths=("out_channels",))
_same = partial(Operation, channels="same")
_index = partial(Operation, channels="index")
_active = partial(_same, constants=pointwise.applied, step="activation")
_leaky = partial(_same, "leaky", constants=pointwise.leaked, step="leaky")
_combine = partial(_same, "combine", {}, constants=pointwise.combined, step="combine")
_instance = partial(_same, "instance_norm", constants=pointwise.normalised_by_image, step="norm")
_over_channels = partial(Operation, "norm_over_channels", reason="normalises over several channels together")

# fmt: off
OPERATIONS = (
    # -- layers
    _layer("packed_conv", {PackedConv2d: ()}, step="conv"),
    Operation("fused_conv", {FusedConv2d: ()}, step="conv"),
    _conv("conv", {nn.Conv2d: _CONV}, step="conv"),
    Operation("conv_function", {}, "F.conv2d torch.conv2d", channels.conv_function, step="conv_function"),
    _conv("conv_transpose", {nn.ConvTranspose2d: (*_CONV, "output_padding")}, step="conv_transpose"),
    _layer("linear", {nn.Linear: _LINEAR}, attributes=channels.layer(2), step="linear",
           reads=("in_features",), widths=("out_features",)),
    Operation("linear", {nn.Linear: _LINEAR}, step="linear"),  # over the last axis of a map

    # -- activations; those of kind "activation" map 0 to 0
    _active("activation", {nn.ReLU: ("inplace",)}, _everywhere("relu"), pointwise.named("relu")),
    _active("activation", {nn.ReLU6: ("inplace",)}, "F.relu6", pointwise.named("relu6")),
    _active("activation", {nn.SiLU: ("inplace",)}, "F.silu", pointwise.named("silu")),
    _active("activation", {nn.Hardswish: ("inplace",)}, "F.hardswish", pointwise.named("hardswish")),
    _active("elementwise", {nn.Sigmoid: ()}, _everywhere("sigmoid"), pointwise.named("sigmoid")),
    _active("elementwise", {nn.Hardsigmoid: ("inplace",)}, "F.hardsigmoid", pointwise.named("hardsigmoid")),
    _active("elementwise", {nn.GELU: ("approximate",)}, "F.gelu", pointwise.gelu),
    _active("elementwise", {nn.Tanh: ()}, _everywhere("tanh"), pointwise.named("tanh")),
    _leaky(_SLOPES, "", pointwise.leaky_per_channel, widths=("num_parameters",)),
    _leaky({nn.LeakyReLU: ("negative_slope", "inplace"), **_SLOPES},
           "F.leaky_relu F.leaky_relu_ F.prelu torch.prelu", pointwise.leaky),
    _same("identity", {nn.Identity: ()}, ".contiguous", channels.same_grid, step="identity", on_grid=True),
    _same("identity", dict.fromkeys((nn.Dropout, nn.Dropout2d), ("p", "inplace")), step="identity"),
    _same("identity", {}, _names("dropout dropout2d alpha_dropout feature_alpha_dropout", "F."),
          _eval_only(2), step="identity"),
    _same("identity", {}, "torchvision.ops.stochastic_depth", _eval_only(3), step="identity"),
    _same("size_check", {SizeCheck: ("conditions",)}, step="size_check"),  # for images of some sizes

    # -- arithmetic
    _same("add", {}, f"{_ADD} .__add__ .__iadd__", pointwise.sum_of_equals, constants=pointwise.combined,
          step="add"),
    _same("elementwise", {}, f"{_ADD} {_SUBTRACT} {_MULTIPLY} operator.truediv operator.itruediv .div .div_",
          pointwise.with_number, constants=pointwise.applied, step="scale"),
    _same("elementwise", {
        **dict.fromkeys((nn.Softsign, nn.LogSigmoid, nn.Tanhshrink), ()),
        **dict.fromkeys((nn.SELU, nn.Mish), ("inplace",)),
        **dict.fromkeys((nn.ELU, nn.CELU), ("alpha", "inplace")),
        **dict.fromkeys((nn.Softshrink, nn.Hardshrink), ("lambd",)),
        nn.Hardtanh: ("min_val", "max_val", "inplace"),
        nn.Softplus: ("beta", "threshold"),
        nn.Threshold: ("threshold", "value", "inplace"),
    }, _names("add sub mul truediv pow neg iadd isub imul itruediv", "operator.") + " " + _everywhere(
        "elu selu celu leaky_relu mish hardtanh softplus softsign logsigmoid relu6 silu"
        " hardsigmoid hardswish hardshrink softshrink tanhshrink threshold clamp clip abs neg exp sqrt rsqrt"
        " square reciprocal pow add sub mul div true_divide clone float double half"
    ), pointwise.elementwise, constants=pointwise.applied),
    _combine(_ADD, pointwise.combination("add")),
    _combine(_SUBTRACT, pointwise.combination("subtract")),
    _combine(_MULTIPLY, pointwise.combination("multiply")),

    # -- norms
    _same("batch_norm", {nn.BatchNorm2d: _BATCH_NORM}, "F.batch_norm torch.batch_norm", pointwise.batch_norm,
          constants=pointwise.normalised, step="batch_norm", widths=("num_features",)),
    _instance({nn.InstanceNorm2d: _BATCH_NORM}, "", pointwise.instance_norm, widths=("num_features",)),
    _instance({nn.GroupNorm: _GROUP_NORM}, "", pointwise.instance_norm,
              widths=("num_groups", "num_channels")),
    _over_channels({nn.GroupNorm: _GROUP_NORM}, attributes=channels.layer(4), step="norm"),
    _over_channels({
        nn.GroupNorm: _GROUP_NORM, nn.LayerNorm: _LAYER_NORM,
        nn.LocalResponseNorm: ("size", "alpha", "beta", "k"),
    }, "F.group_norm F.layer_norm F.local_response_norm torch.group_norm torch.layer_norm"),

    # -- the map of each channel
    _same("max_pool", {nn.MaxPool2d: _MAX_POOL}, "torch.max_pool2d F.max_pool2d", maps.max_pool, step="pool"),
    _same("avg_pool", {nn.AvgPool2d: _AVG_POOL}, "F.avg_pool2d", maps.avg_pool, constants=maps.averaged,
          step="pool"),
    _same("global_avg_pool", _AVERAGE, "F.adaptive_avg_pool2d", maps.to_one_pixel, step="global_pool"),
    _same("global_avg_pool", {}, "torch.mean .mean", maps.global_mean, step="global_pool"),
    _same("adaptive_pool", _ADAPTIVE, "F.adaptive_avg_pool2d F.adaptive_max_pool2d",
          maps.adaptive_pool, step="adaptive_pool"),  # to more than one pixel
    _same("spatial_mean", {}, _names("mean amax amin", "torch.", "."), maps.reduction),
    _same("pad", {nn.ConstantPad2d: ("padding", "value"), **dict.fromkeys(_PADS, ("padding",))}, "F.pad",
          maps.pad, constants=maps.padded, step="pad"),
    _same("interpolate", {nn.Upsample: ("size", "scale_factor", "mode", "align_corners")}, "F.interpolate",
          maps.interpolated, step="interpolate"),
    _index("flatten", {nn.Flatten: ("start_dim", "end_dim")}, f"{_FLATTEN} {_RESHAPE}", maps.flatten,
           step="flatten"),
    _index("unflatten", {}, _RESHAPE, maps.unflatten, constants=channels.equal_constants, step="resize"),
    _index("pixel_shuffle", {nn.PixelShuffle: ("upscale_factor",)}, "torch.pixel_shuffle F.pixel_shuffle",
           channels.pixel_shuffle, constants=channels.equal_constants, step="resize"),
    _index("pixel_unshuffle", {nn.PixelUnshuffle: ("downscale_factor",)}, "F.pixel_unshuffle",
           channels.pixel_unshuffle),

    # -- channels joined, cut and reordered
    Operation("concat", {}, "torch.cat torch.concat torch.concatenate", channels.concat, "joined",
              channels.joined, step="concat"),
    _same("split", {}, _names("chunk split", "torch.", "."), channels.split, step="split"),
    _index("piece", {}, "operator.getitem", channels.part_of_split, step="select"),
    _index("piece", {}, "operator.getitem", channels.slice_of_channels, step="select"),
    _index("piece", {}, "operator.getitem torch.index_select .index_select", channels.chosen, step="select"),
    _index("flip", {}, _names("flip", "torch.", "."), channels.flip, step="select"),
    _index("channel_shuffle", {nn.ChannelShuffle: ("groups",)}, "", channels.shuffle, step="select"),
    _same("split_channels", {}, _RESHAPE, channels.split_channels),
    _index("swap_channels", {}, _names("transpose permute", "torch.", "."), channels.swap_channels,
           on_grid=True),
    _same("join_channels", {}, _RESHAPE, channels.join_channels, step="select", on_grid=True),
    _same("same_channels", {}, f"{_RESHAPE} {_FLATTEN} {_RESIZE}", maps.same_channels),

    # -- known by name only: barriers of packing, plain PyTorch in a fused network
    Operation("opaque", {
        nn.Conv1d: _CONV, nn.BatchNorm1d: _BATCH_NORM, nn.AlphaDropout: ("p", "inplace"), nn.Softmax2d: (),
        nn.LPPool2d: ("norm_type", "kernel_size", "stride", "ceil_mode"),
        nn.Unflatten: ("dim", "unflattened_size"), nn.RReLU: ("lower", "upper", "inplace"),
        nn.Embedding: ("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type"),
        nn.MaxUnpool2d: ("kernel_size", "stride", "padding"),
        nn.Unfold: ("kernel_size", "dilation", "padding", "stride"),
        **dict.fromkeys((nn.GLU, nn.Softmax, nn.LogSoftmax), ("dim",)),
    }, " ".join((
        _names("bmm matmul max min narrow log_softmax softmax sum unbind var std roll"
               " repeat_interleave cumsum sin cos", "torch.", "."),
        _names("adaptive_avg_pool1d channel_shuffle conv1d conv_transpose2d ge gt le lt logsumexp"
               " maximum minimum norm stack var_mean where einsum linspace arange zeros ones full zeros_like"
               " ones_like full_like", "torch."),
        _names("conv1d conv_transpose2d glu instance_norm linear log_softmax lp_pool2d normalize"
               " softmax softmin unfold fold max_unpool2d max_pool2d_with_indices embedding", "F."),
        _names("detach select t to type_as unflatten view_as reshape_as repeat unfold new_zeros"
               " new_ones", "."), "operator.invert",
    )), _never),
    Operation("scripted", {}, ".forward", reason="is scripted (torch.jit), which cannot be followed"),
    Operation("scalar", {}, _names("floordiv mod eq ne lt le gt ge", "operator.") + " .dim .numel .size",
              _never),
)
# fmt: on

_INPUT, _STATE, _OUTPUT = (Operation(kind, channels="new") for kind in ("input", "state", "output"))
_SCALAR, UNKNOWN = Operation("scalar"), Operation("opaque")


def _resolve(name: str) -> Any:
    """The function of a name in ``calls``, the name of a method, or None where this torch has none."""
    place, _, own = name.partition(".")
    if place == "torchvision":
        return name
    return own if not place else getattr({"torch": torch, "F": F, "operator": operator}[place], own, None)


# Function or name of a method -> its entries.
BY_CALL: dict[Any, list[Operation]] = {}
# Name of a function -> the function; names of methods.
FUNCTIONS: dict[str, Callable[..., Any]] = {}
METHODS: set[str] = set()
for _entry in OPERATIONS:
    for _name in dict.fromkeys(_entry.calls.split()):
        _target = _resolve(_name)
        if _target is not None:
            BY_CALL.setdefault(_target, []).append(_entry)
        if _name.startswith(".") and hasattr(torch.Tensor, _target):
            METHODS.add(_target)
        elif callable(_target):
            FUNCTIONS[_name] = _target


def classify(
    node: fx.Node, module: nn.Module | None, shape: tuple[int, ...] | None, before: Mapping[str, TracedNode]
) -> tuple[Operation, Attributes]:
    """Operation and attributes of an fx node. module: that it calls; shape: of its result."""
    if node.op == "placeholder":
        return _INPUT, {}
    if node.op == "get_attr":
        return _STATE, {}
    if node.op == "output":
        return (_OUTPUT if isinstance(node.args[0], fx.Node) else UNKNOWN), {}
    call = Call(node, module, shape, before)
    on_grid = any("grid" in before[source.name].attributes for source in node.all_input_nodes)
    for entry in _candidates(call):
        attributes = entry.attributes(call) if entry.on_grid or not on_grid else None
        if attributes is not None:
            return entry, attributes
    return (_SCALAR if shape is None and module is None else UNKNOWN), {}


def operations_of(module: nn.Module) -> list[Operation]:
    """The entries that a module may be."""
    forward, kinds = type(module).forward, type(module).__mro__
    return [e for e in OPERATIONS if any(kind in kinds and forward is kind.forward for kind in e.modules)]


def _candidates(call: Call) -> Sequence[Operation]:
    if call.module is not None:
        return operations_of(call.module)
    target: Any = call.node.target
    if str(getattr(target, "__module__", "")).startswith("torchvision."):  # which need not be installed
        target = f"torchvision.ops.{target.__name__}"
    found = BY_CALL.get(target, [])
    # A tuple of tensors is known only as the parts of a split.
    return [entry for entry in found if entry.kind == "split"] if call.output is None else found
