"""Which convolutions take part in learning and pruning, how large they are, and how many groups they have."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dsp_kernels.errors import DSPPruningError, DSPShapeError, DSPTraceError
from dsp_kernels.graph.inputs import Example, as_inputs
from dsp_kernels.graph.network import TracedNetwork, TracedNode, evaluating, trace
from dsp_pruning.checks import check_kind, check_names, is_count
from dsp_pruning.table import text_table

LayerPredicate = Callable[[str, nn.Conv2d], bool]
GroupCount = int | Mapping[str, int] | Callable[[str, nn.Conv2d], int]

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
    excluded: dict[str, str]
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
        shared with another conv. Convs whose weight is frozen never take part.

    Raises DSPPruningError if no layer is chosen or a chosen one is grouped or never runs, DSPShapeError if
    the model does not run on the example.
    """
    check_kind(isinstance(model, nn.Module), "model", model, "an nn.Module")
    check_kind(layers is None or callable(layers), "layers", layers, "a function (name, conv) -> bool")
    convs = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    example = inputs_like(model, example_input)
    first, channels = next((name, conv.in_channels) for name, conv in convs.items())
    advice = (
        f". Its first conv {first!r} reads {channels} channels; pass example_input= of shape "
        f"(1, {channels}, height, width), or a tuple of all inputs of forward()"
    )
    shapes = run_shapes(model, convs.values(), example, advice)
    if layers is None:
        excluded = _excluded_by_default(model, convs, shapes, example)
    else:
        excluded = {name: "rejected by layers=" for name, conv in convs.items() if not layers(name, conv)}
    for name, conv in convs.items():
        weight = conv._parameters.get("weight")
        if weight is not None and not weight.requires_grad and name not in excluded:
            excluded[name] = "its weight is frozen (requires_grad=False)"
    chosen = [name for name in convs if name not in excluded]
    for name in chosen if layers is not None else ():
        if convs[name].groups != 1:
            raise DSPPruningError(
                f"layer {name!r} has groups={convs[name].groups}; only convs with groups=1 can learn groups"
            )
        if convs[name] not in shapes:
            raise DSPPruningError(
                f"layer {name!r} does not run on the example input, so its size is unknown; exclude it"
            )
    _check_any(chosen, excluded)
    infos = []
    for name in chosen:
        conv = convs[name]
        sizes = ((size[-2], size[-1]) for size in (conv.kernel_size, *shapes[conv]))
        infos.append(LayerInfo(name, conv, conv.in_channels, conv.out_channels, *sizes))
    return LayerSurvey(convs, tuple(infos), excluded, example)


def groups_of_layers(survey: LayerSurvey, n_groups: GroupCount) -> tuple[LayerSurvey, dict[str, int]]:
    """The survey without layers of fewer filters than groups, and the number of groups by layer name.

    n_groups: one number, a mapping by name or ``(name, conv) -> number``.
    """
    counts, small = {}, {}
    if isinstance(n_groups, Mapping):
        check_names("n_groups needs one number", set(n_groups), {layer.name for layer in survey.chosen})
    for layer in survey.chosen:
        if isinstance(n_groups, Mapping):
            count = n_groups[layer.name]
        else:
            count = n_groups(layer.name, layer.conv) if callable(n_groups) else n_groups
        where = "" if isinstance(n_groups, int | float) else f" for layer {layer.name!r}"
        if not is_count(count):
            raise DSPPruningError(f"n_groups is {count!r}{where}; expected an integer of at least 1")
        if count > layer.out_channels:
            small[layer.name] = f"{layer.out_channels} filters, too few for n_groups={count}"
        else:
            counts[layer.name] = count
    _check_any(counts, survey.excluded | small)
    chosen = tuple(layer for layer in survey.chosen if layer.name in counts)
    return replace(survey, chosen=chosen, excluded=survey.excluded | small), counts


def check_existing(layer: LayerInfo, name: str, shape: tuple[int, ...]) -> None:
    """Raise DSPPruningError if the conv has an attribute ``name`` that is not a tensor of this shape."""
    value = getattr(layer.conv, name, None)
    if value is not None and (not isinstance(value, Tensor) or tuple(value.shape) != shape):
        found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
        raise DSPPruningError(
            f"layer {layer.name!r} already has a {name!r} of {found}; this n_groups needs shape {shape}"
        )


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


def run_shapes(
    model: nn.Module, modules: Iterable[nn.Module], example: tuple[Tensor, ...], advice: str = ""
) -> dict[nn.Module, tuple[torch.Size, torch.Size]]:
    """Shapes of input and output at the first call of every module that runs on the example in eval mode.

    Raises DSPShapeError, which ends with the advice, if the model does not run.
    """
    shapes: dict[nn.Module, tuple[torch.Size, torch.Size]] = {}

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        shapes.setdefault(module, (inputs[0].shape, output.shape))

    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(evaluating(model))
        for module in modules:
            stack.callback(module.register_forward_hook(record).remove)
        try:
            model(*(x.clone() for x in example))  # forward() may modify its input in place
        except Exception as error:  # forward() may raise anything on a shape that it does not support
            raise DSPShapeError(
                f"{type(model).__name__} does not run on an example input of shape "
                f"{' and '.join(str(tuple(x.shape)) for x in example)}: {error}{advice}"
            ) from error
    return shapes


def _excluded_by_default(
    model: nn.Module, convs: Mapping[str, nn.Conv2d], runs: Collection[nn.Module], example: tuple[Tensor, ...]
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
        elif conv not in runs:
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
    convs_of = (node for node in network.of_kind("conv") if node.path in pointwise)
    return {node.path for node in convs_of if _is_shortcut(network, node)}


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


def _check_any(chosen: Collection[str], excluded: Mapping[str, str]) -> None:
    """Raise DSPPruningError, which lists the excluded layers, if none is chosen."""
    if chosen:
        return
    listed = [f"{name!r} ({reason})" for name, reason in excluded.items()]
    more = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
    raise DSPPruningError(
        f"no layer to group or prune: {', '.join(listed[:_LISTED])}{more}. "
        "Choose layers yourself with layers=(name, conv) -> bool"
    )
