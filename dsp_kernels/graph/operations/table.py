"""THE table of operations that a traced network may hold. A new operation is one entry.

Recogniser, flow of channels, planner and file format read it. The first entry that fits a call is its operation.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from dsp_kernels.graph.operations import channels, maps, pointwise
from dsp_kernels.graph.operations.entry import Attributes, Call, Operation, TracedNode, on_map
from dsp_kernels.graph.size_check import SizeCheck
from dsp_kernels.op.fused_conv import FusedConv2d
from dsp_kernels.op.packed import PackedConv2d

LEAF_TYPES: tuple[type[nn.Module], ...] = (PackedConv2d, FusedConv2d, SizeCheck)

CONV_SETTINGS = ("kernel_size", "stride", "padding", "dilation")
_CONV = (*CONV_SETTINGS, "in_channels", "out_channels", "groups", "bias", "padding_mode")
_TRANSPOSED = (*_CONV, "output_padding")
_BATCH_NORM = ("num_features", "eps", "momentum", "affine", "track_running_stats")
_GROUP_NORM = ("num_groups", "num_channels", "eps", "affine")
_POOL = ("kernel_size", "stride", "padding")
_MAX_POOL = (*CONV_SETTINGS, "return_indices", "ceil_mode")
_AVG_POOL = (*_POOL, "ceil_mode", "count_include_pad", "divisor_override")
_ADAPTIVE_POOLS = {
    nn.AdaptiveAvgPool2d: ("output_size",),
    nn.AdaptiveMaxPool2d: ("output_size", "return_indices"),
}
_ADD = "operator.add operator.iadd torch.add .add .add_"
_SUBTRACT = "operator.sub operator.isub torch.sub .sub .sub_"
_MULTIPLY = "operator.mul operator.imul torch.mul .mul .mul_ .__mul__"
_RESHAPE = "torch.reshape .view .reshape"
_FLATTEN = "torch.flatten .flatten"


def _everywhere(names: str) -> str:
    """Functions of torch and of torch.nn.functional and methods of these names, also in place."""
    ends = [name + end for name in names.split() for end in ("", "_")]
    return " ".join(place + name for name in ends for place in ("F.", "torch.", "."))


def _never(call: Call) -> None:
    """Of entries that only say what a file may hold."""


_SAME: dict[str, Any] = {"channels": "same"}
_POINTWISE: dict[str, Any] = {**_SAME, "constants": pointwise.applied}
_LEAKY: dict[str, Any] = {**_SAME, "constants": pointwise.leaked, "step": "leaky"}
_COMBINED: dict[str, Any] = {**_SAME, "constants": pointwise.combined, "step": "combine"}

OPERATIONS = (
    # -- layers
    Operation("packed_conv", {PackedConv2d: ()}, channels="mixed", step="conv"),
    Operation("fused_conv", {FusedConv2d: ()}, step="conv"),
    Operation("conv", {nn.Conv2d: _CONV}, attributes=channels.layer(4), channels="mixed", step="conv"),
    Operation("conv_transpose", {nn.ConvTranspose2d: _TRANSPOSED}, "", channels.layer(4), "mixed"),
    Operation(
        *("linear", {nn.Linear: ("in_features", "out_features", "bias")}, "", channels.layer(2), "mixed"),
        step="linear",
    ),
    Operation("linear", {nn.Linear: ()}, step="linear"),  # over the last axis of a map
    # -- activations: function, a name in op/activations.py
    *(
        Operation(
            "activation", {kind: ("inplace",)}, names, pointwise.named(name), **_POINTWISE, step="activation"
        )
        for name, kind, names in (
            ("relu", nn.ReLU, _everywhere("relu")),
            ("relu6", nn.ReLU6, "F.relu6"),
            ("silu", nn.SiLU, "F.silu"),
            ("hardswish", nn.Hardswish, "F.hardswish"),
        )
    ),
    # They do not map 0 to 0.
    Operation(
        *("elementwise", {nn.Sigmoid: ()}, _everywhere("sigmoid"), pointwise.named("sigmoid")),
        **_POINTWISE,
        step="activation",
    ),
    Operation(
        *("elementwise", {nn.Hardsigmoid: ("inplace",)}, "F.hardsigmoid", pointwise.named("hardsigmoid")),
        **_POINTWISE,
        step="activation",
    ),
    Operation(
        *("leaky", {nn.PReLU: ("num_parameters",)}, "", pointwise.leaky_per_channel),
        **_LEAKY,
        widths=("num_parameters",),
    ),
    Operation(
        *("leaky", {nn.LeakyReLU: ("negative_slope", "inplace"), nn.PReLU: ("num_parameters",)}),
        "F.leaky_relu F.leaky_relu_ F.prelu torch.prelu",
        pointwise.leaky,
        **_LEAKY,
    ),
    Operation(
        "identity",
        {nn.Identity: (), **dict.fromkeys((nn.Dropout, nn.Dropout2d), ("p", "inplace"))},
        ".contiguous",
        channels.same_grid,
        **_SAME,
        step="identity",
        on_grid=True,
    ),
    Operation(
        "identity",
        calls="F.dropout F.dropout2d F.alpha_dropout F.feature_alpha_dropout",
        attributes=lambda call: {} if call.argument(2, "training", True) is False else None,
        **_SAME,
        step="identity",
    ),
    Operation(
        "identity",
        calls="torchvision.ops.stochastic_depth",
        attributes=lambda call: {} if call.argument(3, "training", True) is False else None,
        **_SAME,
        step="identity",
    ),
    Operation("size_check", {SizeCheck: ("conditions",)}, **_SAME),  # for images of some sizes
    # -- arithmetic
    Operation(
        *("add", {}, f"{_ADD} .__add__ .__iadd__", pointwise.sum_of_equals),
        **{**_COMBINED, "step": "add"},
    ),
    Operation(
        "elementwise",
        {
            **dict.fromkeys((nn.Tanh, nn.Softsign, nn.LogSigmoid, nn.Tanhshrink), ()),
            **dict.fromkeys((nn.SELU, nn.Mish), ("inplace",)),
            **dict.fromkeys((nn.ELU, nn.CELU), ("alpha", "inplace")),
            **dict.fromkeys((nn.Softshrink, nn.Hardshrink), ("lambd",)),
            nn.GELU: ("approximate",),
            nn.Hardtanh: ("min_val", "max_val", "inplace"),
            nn.Softplus: ("beta", "threshold"),
            nn.Threshold: ("threshold", "value", "inplace"),
        },
        _everywhere(
            "tanh gelu elu selu celu leaky_relu mish hardtanh softplus softsign logsigmoid relu6 silu "
            "hardsigmoid hardswish hardshrink softshrink tanhshrink threshold clamp clip abs neg exp sqrt rsqrt "
            "square reciprocal pow add sub mul div true_divide clone float double half"
        )
        + " operator.add operator.sub operator.mul operator.truediv operator.pow operator.neg operator.iadd"
        + " operator.isub operator.imul operator.itruediv",
        pointwise.elementwise,
        **_POINTWISE,
    ),
    Operation("combine", {}, _ADD, pointwise.combination("add"), **_COMBINED),
    Operation("combine", {}, _SUBTRACT, pointwise.combination("subtract"), **_COMBINED),
    Operation("combine", {}, _MULTIPLY, pointwise.combination("multiply"), **_COMBINED),
    # -- norms
    Operation(
        *("batch_norm", {nn.BatchNorm2d: _BATCH_NORM}, "F.batch_norm torch.batch_norm", pointwise.batch_norm),
        **_SAME,
        constants=pointwise.normalised,
        step="batch_norm",
        widths=("num_features",),
    ),
    Operation(
        *("instance_norm", {nn.InstanceNorm2d: _BATCH_NORM}, "", pointwise.instance_norm),
        **_SAME,
        constants=pointwise.normalised_by_image,
        widths=("num_features",),
    ),
    Operation(
        *("instance_norm", {nn.GroupNorm: _GROUP_NORM}, "", pointwise.instance_norm),
        **_SAME,
        constants=pointwise.normalised_by_image,
        widths=("num_groups", "num_channels"),
    ),
    Operation(
        "norm_over_channels",
        {
            nn.GroupNorm: _GROUP_NORM,
            nn.LayerNorm: ("normalized_shape", "eps", "elementwise_affine", "bias"),
            nn.LocalResponseNorm: ("size", "alpha", "beta", "k"),
        },
        "F.group_norm F.layer_norm F.local_response_norm torch.group_norm torch.layer_norm",
        reason="normalises over several channels together",
    ),
    # -- the map of each channel
    Operation(
        *("max_pool", {nn.MaxPool2d: _MAX_POOL}, "torch.max_pool2d F.max_pool2d", maps.max_pool),
        **_SAME,
        step="pool",
    ),
    Operation(
        *("avg_pool", {nn.AvgPool2d: _AVG_POOL}, "F.avg_pool2d", maps.avg_pool),
        **_SAME,
        constants=maps.averaged,
        step="pool",
    ),
    Operation(
        *("global_avg_pool", {nn.AdaptiveAvgPool2d: ("output_size",)}, "F.adaptive_avg_pool2d"),
        maps.to_one_pixel,
        **_SAME,
        step="global_pool",
    ),
    Operation("global_avg_pool", {}, "torch.mean .mean", maps.global_mean, **_SAME, step="global_pool"),
    Operation(  # to more than one pixel
        *("adaptive_pool", _ADAPTIVE_POOLS, "F.adaptive_avg_pool2d F.adaptive_max_pool2d"),
        maps.adaptive_pool,
        **_SAME,
        step="adaptive_pool",
    ),
    Operation(
        "spatial_mean", {}, "torch.mean .mean torch.amax .amax torch.amin .amin", maps.reduction, **_SAME
    ),
    Operation(
        "pad",
        {
            nn.ConstantPad2d: ("padding", "value"),
            **dict.fromkeys(
                (nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d), ("padding",)
            ),
        },
        "F.pad",
        maps.pad,
        **_SAME,
        constants=maps.padded,
    ),
    Operation(
        "interpolate",
        {nn.Upsample: ("size", "scale_factor", "mode", "align_corners")},
        "F.interpolate",
        on_map,
        **_SAME,
    ),
    Operation(
        *("flatten", {nn.Flatten: ("start_dim", "end_dim")}, f"{_FLATTEN} {_RESHAPE}", maps.flatten),
        channels="index",
        step="flatten",
    ),
    Operation(
        *("pixel_shuffle", {nn.PixelShuffle: ("upscale_factor",)}, "torch.pixel_shuffle F.pixel_shuffle"),
        channels.pixel_shuffle,
        channels="index",
        constants=channels.equal_constants,
    ),
    Operation(
        *("pixel_unshuffle", {nn.PixelUnshuffle: ("downscale_factor",)}),
        "F.pixel_unshuffle",
        channels.pixel_unshuffle,
        channels="index",
    ),
    # -- channels joined, cut and reordered
    Operation(
        *("concat", {}, "torch.cat torch.concat torch.concatenate", channels.concat),
        channels="joined",
        constants=channels.joined,
        step="concat",
    ),
    Operation("split", {}, "torch.chunk .chunk torch.split .split", channels.split, **_SAME, step="split"),
    Operation("piece", {}, "operator.getitem", channels.part_of_split, channels="index", step="select"),
    Operation("piece", {}, "operator.getitem", channels.slice_of_channels, channels="index", step="select"),
    Operation(
        *("piece", {}, "operator.getitem torch.index_select .index_select", channels.chosen),
        channels="index",
        step="select",
    ),
    Operation(
        "channel_shuffle", {nn.ChannelShuffle: ("groups",)}, "", channels.shuffle, "index", step="select"
    ),
    Operation("split_channels", {}, _RESHAPE, channels.split_channels, **_SAME),
    Operation(
        *("swap_channels", {}, "torch.transpose .transpose torch.permute .permute", channels.swap_channels),
        channels="index",
        on_grid=True,
    ),
    Operation(*("join_channels", {}, _RESHAPE, channels.join_channels), **_SAME, step="select", on_grid=True),
    Operation(
        "same_channels",
        {},
        f"{_RESHAPE} {_FLATTEN} torch.squeeze .squeeze torch.unsqueeze .unsqueeze .expand .expand_as"
        " operator.getitem",
        maps.same_channels,
        **_SAME,
    ),
    # -- what is only known by name: barriers of packing, plain PyTorch in a fused network
    Operation(
        "opaque",
        {
            nn.Conv1d: _CONV,
            nn.BatchNorm1d: _BATCH_NORM,
            nn.LPPool2d: ("norm_type", "kernel_size", "stride", "ceil_mode"),
            nn.Unflatten: ("dim", "unflattened_size"),
            nn.AlphaDropout: ("p", "inplace"),
            nn.RReLU: ("lower", "upper", "inplace"),
            nn.Softmax2d: (),
            **dict.fromkeys((nn.GLU, nn.Softmax, nn.LogSoftmax), ("dim",)),
        },
        "torch.adaptive_avg_pool1d torch.bmm torch.channel_shuffle torch.conv1d torch.conv2d"
        " torch.conv_transpose2d torch.flip torch.ge torch.gt torch.le torch.lt torch.log_softmax torch.logsumexp"
        " torch.matmul torch.max torch.maximum torch.min torch.minimum torch.narrow torch.norm torch.roll"
        " torch.softmax torch.stack torch.std torch.sum torch.unbind torch.var torch.var_mean torch.where"
        " F.conv1d F.conv2d F.conv_transpose2d F.glu F.instance_norm F.linear F.log_softmax F.lp_pool2d"
        " F.normalize F.softmax F.softmin .bmm .detach .flip .log_softmax .matmul .max .min .narrow .roll .select"
        " .softmax .sum .t .to .type_as .unbind .unflatten .var .view_as .reshape_as",
        _never,
    ),
    # Not tensors, such as sizes.
    Operation(
        "scalar",
        {},
        "operator.floordiv operator.mod operator.eq operator.ne operator.lt operator.le operator.gt operator.ge"
        " .dim .numel .size",
        _never,
    ),
)

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
    return [
        entry
        for entry in OPERATIONS
        if any(kind in kinds and forward is kind.forward for kind in entry.modules)
    ]


def _candidates(call: Call) -> Sequence[Operation]:
    if call.module is not None:
        return operations_of(call.module)
    target: Any = call.node.target
    if str(getattr(target, "__module__", "")).startswith("torchvision."):  # which need not be installed
        target = f"torchvision.ops.{target.__name__}"
    found = BY_CALL.get(target, [])
    # A tuple of tensors is known only as the parts of a split.
    return [entry for entry in found if entry.kind == "split"] if call.output is None else found
