"""Which convolutions take part in learning and pruning, and how large they are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsp_kernels.errors import DSPPruningError, DSPShapeError, DSPTraceError
from dsp_kernels.graph.inputs import Example, as_inputs
from dsp_kernels.graph.network import TracedNetwork, TracedNode, evaluating, trace
from dsp_pruning.table import text_table

LayerPredicate = Callable[[str, nn.Conv2d], bool]

_KEEPS_CHANNELS = ("batch_norm", "identity")  # allowed between a shortcut conv and its add
_SHORTCUT_NAMES = ("downsample", "shortcut")
_LISTED = 12  # an error message names at most this many layers


@dataclass(frozen=True)
class LayerInfo:
    """One convolution that takes part.

    conv: weight [out_channels, in_channels, *kernel_size].
    input_hw, output_hw: spatial size of its input and output for one sample, at its first call.
    """

    name: str
    conv: nn.Conv2d
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    input_hw: tuple[int, int]
    output_hw: tuple[int, int]

    @property
    def kernel_macs(self) -> int:
        """Multiply-adds of one 2-D kernel (one filter on one input channel) for one sample."""
        return self.kernel_size[0] * self.kernel_size[1] * self.output_hw[0] * self.output_hw[1]

    @property
    def macs(self) -> int:
        """Multiply-adds of one sample: O * C * kh * kw * Hout * Wout."""
        return self.out_channels * self.in_channels * self.kernel_macs


@dataclass(frozen=True)
class LayerSurvey:
    """Which convolutions take part, and why the others do not; ``print`` shows a table.

    convs: all of them by name, in definition order. excluded: name -> reason.
    example: the inputs that the model ran on.
    """

    convs: Mapping[str, nn.Conv2d]
    chosen: tuple[LayerInfo, ...]
    excluded: Mapping[str, str]
    example: tuple[Tensor, ...]

    def __str__(self) -> str:
        infos = {info.name: info for info in self.chosen}
        rows = [("layer", "filters", "channels", "kernel", "input", "MACs", "takes part")]
        for name, conv in self.convs.items():
            size, macs, answer = "", "", f"no: {self.excluded.get(name)}"
            if info := infos.get(name):
                size, macs, answer = f"{info.input_hw[0]}x{info.input_hw[1]}", str(info.macs), "yes"
            kernel = f"{conv.kernel_size[0]}x{conv.kernel_size[1]}"
            rows.append((name, str(conv.out_channels), str(conv.in_channels), kernel, size, macs, answer))
        return text_table(rows)


def select_layers(
    model: nn.Module, example_input: Example | None = None, layers: LayerPredicate | None = None
) -> tuple[LayerInfo, ...]:
    """The convolutions that take part: ``survey_layers(...).chosen``, same arguments and errors."""
    return survey_layers(model, example_input, layers).chosen


def survey_layers(
    model: nn.Module, example_input: Example | None = None, layers: LayerPredicate | None = None
) -> LayerSurvey:
    """Choose convolutions, in definition order (``model.named_modules()``).

    example_input: (batch, channels, height, width), or a tuple with one tensor per input of forward();
        None uses zeros of shape (1, C, 32, 32). It is moved to the model's device and dtype and run once in
        eval mode; the model is left unchanged.
    layers: ``(name, conv) -> bool`` replaces the default choice: every ``nn.Conv2d`` except the first, 1x1
        shortcut convs, grouped and depthwise convs, and convs whose weight is computed (parametrized) or
        shared with another conv.

    Raises DSPPruningError if no layer is chosen or a chosen one is grouped or never runs, DSPShapeError if
    the model does not run on the example.
    """
    check_kind(isinstance(model, nn.Module), "model", model, "an nn.Module")
    check_kind(layers is None or callable(layers), "layers", layers, "a function (name, conv) -> bool")
    convs = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    example = inputs_like(model, example_input)
    sizes = _measure(model, convs, example)
    if layers is None:
        excluded = _excluded_by_default(model, convs, sizes, example)
        chosen = [name for name in convs if name not in excluded]
    else:
        chosen = [name for name, conv in convs.items() if layers(name, conv)]
        excluded = {name: "rejected by layers=" for name in convs if name not in chosen}
        _check_chosen(convs, chosen, sizes)
    if not chosen:
        listed = [f"{name!r} ({reason})" for name, reason in excluded.items()]
        more = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
        raise DSPPruningError(
            f"{type(model).__name__} has no layer to group or prune: {', '.join(listed[:_LISTED])}{more}. "
            "Choose layers yourself with layers=(name, conv) -> bool"
        )
    infos = []
    for name in chosen:
        conv, (input_hw, output_hw) = convs[name], sizes[name]
        kernel_size = (conv.kernel_size[0], conv.kernel_size[1])
        infos.append(
            LayerInfo(name, conv, conv.in_channels, conv.out_channels, kernel_size, input_hw, output_hw)
        )
    return LayerSurvey(convs, tuple(infos), excluded, example)


def check_kind(valid: bool, name: str, value: object, expected: str) -> None:
    """Raise DSPPruningError, which names the type of the value, unless ``valid``."""
    if not valid:
        raise DSPPruningError(f"{name} is a {type(value).__name__}; it must be {expected}")


def inputs_like(model: nn.Module, example: Example | None) -> tuple[Tensor, ...]:
    """The tensors of an example on the device of the model's first conv; None: zeros of shape (1, C, 32, 32).

    The first input, which is the image, and other floating-point inputs are cast to the conv's dtype.
    Raises DSPPruningError if the model has no ``nn.Conv2d``, DSPShapeError if ``example`` is not an example.
    """
    conv = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if conv is None:
        raise DSPPruningError(f"{type(model).__name__} has no nn.Conv2d: there is nothing to group or prune")
    inputs = as_inputs(torch.zeros(1, conv.in_channels, 32, 32) if example is None else example)
    device, dtype = conv.weight.device, conv.weight.dtype
    return tuple(
        x.detach().to(device, dtype if place == 0 or x.is_floating_point() else None)
        for place, x in enumerate(inputs)
    )


_Size = tuple[tuple[int, int], tuple[int, int]]


def _measure(
    model: nn.Module, convs: Mapping[str, nn.Conv2d], example: tuple[Tensor, ...]
) -> dict[str, _Size]:
    """Height and width of input and output, for every conv that runs on the example."""
    sizes: dict[str, _Size] = {}

    def record(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            before, after = inputs[0].shape[-2:], output.shape[-2:]
            sizes.setdefault(name, ((before[0], before[1]), (after[0], after[1])))

        return hook

    handles = [conv.register_forward_hook(record(name)) for name, conv in convs.items()]
    try:
        with evaluating(model), torch.no_grad():
            model(*(x.clone() for x in example))  # forward() may modify its input in place
    except Exception as error:  # forward() may raise anything on a shape that it does not support
        first, conv = next(iter(convs.items()))
        raise DSPShapeError(
            f"{type(model).__name__} does not run on an example input of shape "
            f"{' and '.join(str(tuple(x.shape)) for x in example)}: {error}. Its first conv {first!r} reads "
            f"{conv.in_channels} channels; pass example_input= of shape "
            f"(1, {conv.in_channels}, height, width), or a tuple of all inputs of forward()"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return sizes


def _excluded_by_default(
    model: nn.Module, convs: Mapping[str, nn.Conv2d], sizes: Mapping[str, _Size], example: tuple[Tensor, ...]
) -> dict[str, str]:
    """Name -> reason, for every conv that the default choice excludes."""
    first = next(iter(convs))
    shortcuts = _shortcuts(model, convs, example)
    owners: dict[int, list[str]] = defaultdict(list)
    for name, conv in convs.items():
        owners[id(conv._parameters.get("weight"))].append(name)
    excluded: dict[str, str] = {}
    for name, conv in convs.items():
        weight = conv._parameters.get("weight")
        if name == first:
            excluded[name] = "the first conv"
        elif conv.groups != 1:
            excluded[name] = f"groups={conv.groups}"
        elif name in shortcuts:
            excluded[name] = "a 1x1 shortcut"
        elif name not in sizes:
            excluded[name] = "does not run on the example input"
        elif weight is None:
            excluded[name] = "its weight is computed, not a parameter"
        elif len(owners[id(weight)]) > 1:
            other = next(other for other in owners[id(weight)] if other != name)
            excluded[name] = f"shares its weight with {other!r}"
    return excluded


def _shortcuts(model: nn.Module, convs: Mapping[str, nn.Conv2d], example: tuple[Tensor, ...]) -> set[str]:
    """The 1x1 convs on a shortcut; recognised by name if the model cannot be traced."""
    pointwise = {name for name, conv in convs.items() if conv.kernel_size == (1, 1)}
    try:
        network = trace(model, example)
    except DSPTraceError:
        return {name for name in pointwise if any(word in name.lower() for word in _SHORTCUT_NAMES)}
    return {
        node.path
        for node in network.of_kind("conv")
        if node.path in pointwise and _is_shortcut(network, node)
    }


def _is_shortcut(network: TracedNetwork, conv: TracedNode) -> bool:
    """Is its output, after at most a batch norm, added to a branch of convs that starts at its own input?

    This excludes the last 1x1 conv of a bottleneck, which is added to a tensor from before its input, and a
    conv that is added to its own input: there the identity is the shortcut.
    """
    node = conv
    while len(node.users) == 1:
        user = network[node.users[0]]
        if user.kind == "add":
            others = [name for name in user.inputs if name != node.name]
            return any(_passes_conv(network, name, conv.inputs[0], conv.name) for name in others)
        if user.kind not in _KEEPS_CHANNELS:
            return False
        node = user
    return False


def _passes_conv(network: TracedNetwork, name: str, source: str, without: str) -> bool:
    """Does a path from ``source`` to ``name`` contain a conv, other than through the node ``without``?"""
    seen: set[tuple[str, bool]] = set()
    pending = [(name, False)]
    while pending:
        state = pending.pop()
        current, has_conv = state
        if state in seen or current == without:
            continue
        seen.add(state)
        if current != source:
            node = network[current]
            has_conv = has_conv or node.kind in ("conv", "packed_conv")
            pending.extend((before, has_conv) for before in node.inputs)
        elif has_conv:
            return True
    return False


def _check_chosen(convs: Mapping[str, nn.Conv2d], chosen: list[str], sizes: Mapping[str, _Size]) -> None:
    for name in chosen:
        if convs[name].groups != 1:
            raise DSPPruningError(
                f"layer {name!r} has groups={convs[name].groups}; only convs with groups=1 can learn groups"
            )
        if name not in sizes:
            raise DSPPruningError(
                f"layer {name!r} does not run on the example input, so its size is unknown; exclude it"
            )
