"""Which convolutions take part in learning and pruning, and how large they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsp_kernels.errors import DSPPruningError, DSPShapeError, DSPTraceError
from dsp_kernels.graph.inputs import Example, as_inputs
from dsp_kernels.graph.network import TracedNetwork, TracedNode, evaluating, trace

__all__ = [
    "LayerInfo",
    "LayerPredicate",
    "LayerSurvey",
    "default_example_input",
    "inputs_like",
    "select_layers",
    "survey_layers",
]

LayerPredicate = Callable[[str, nn.Conv2d], bool]

# Between a conv and its shortcut's add these change no channel.
_TRANSPARENT = ("batch_norm", "identity")
_SHORTCUT_NAMES = ("downsample", "shortcut")
_LISTED = 12  # an error message names at most so many layers


@dataclass(frozen=True)
class LayerInfo:
    """One convolution that takes part.

    conv: weight [out_channels, in_channels, *kernel_size].
    input_hw, output_hw: height and width of one sample's maps, where the conv runs for the first time.
    """

    name: str
    conv: nn.Conv2d
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    input_hw: tuple[int, int]
    output_hw: tuple[int, int]

    @property
    def macs(self) -> int:
        """Multiply-adds of one sample: O * C * kh * kw * Hout * Wout."""
        kh, kw = self.kernel_size
        return self.out_channels * self.in_channels * kh * kw * self.output_hw[0] * self.output_hw[1]


@dataclass(frozen=True)
class LayerSurvey:
    """Which convolutions take part and why the others do not; ``print`` shows it as a table.

    convs: all of them by name, in definition order. excluded: name -> reason.
    """

    convs: Mapping[str, nn.Conv2d]
    chosen: tuple[LayerInfo, ...]
    excluded: Mapping[str, str]

    def __str__(self) -> str:
        infos = {info.name: info for info in self.chosen}
        rows = [("layer", "filters", "reads", "kernel", "input", "MACs", "takes part")]
        for name, conv in self.convs.items():
            height, width = conv.kernel_size
            sizes = (str(conv.out_channels), str(conv.in_channels), f"{height}x{width}")
            info = infos.get(name)
            if info is None:
                rows.append((name, *sizes, "", "", f"no: {self.excluded[name]}"))
            else:
                rows.append((name, *sizes, f"{info.input_hw[0]}x{info.input_hw[1]}", str(info.macs), "yes"))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows
        ]
        return "\n".join(line.rstrip() for line in lines)


def select_layers(
    model: nn.Module, example_input: Example | None = None, layers: LayerPredicate | None = None
) -> tuple[LayerInfo, ...]:
    """The convolutions that take part: ``survey_layers(...).chosen``, with its arguments and errors."""
    return survey_layers(model, example_input, layers).chosen


def survey_layers(
    model: nn.Module, example_input: Example | None = None, layers: LayerPredicate | None = None
) -> LayerSurvey:
    """Look at every convolution and choose, in definition order (``model.named_modules()``).

    example_input: (batch, channels, height, width); None tries 1 x C x 32 x 32; a tuple of tensors, one for
        each input of forward(). It is moved to the model's device and dtype and run once in eval mode; the
        model is left as it was.
    layers: ``(name, conv) -> bool`` replaces the default choice, which is every ``nn.Conv2d`` but the first,
        1x1 shortcut convs, grouped or depthwise convs, and convs whose weight is computed
        (a parametrisation) or belongs to another conv too.

    Raises DSPPruningError if no layer is chosen, or a chosen one is grouped or does not run; DSPShapeError
    if the model does not run on the example.
    """
    convs = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    if not convs:
        raise DSPPruningError(f"{type(model).__name__} has no nn.Conv2d: there is nothing to group or prune")
    example = inputs_like(model, example_input)
    sizes = _measure(model, convs, example)
    if layers is None:
        excluded = _excluded_by_default(model, convs, sizes, example)
        chosen = [name for name in convs if name not in excluded]
    else:
        chosen = [name for name, conv in convs.items() if layers(name, conv)]
        excluded = {name: "refused by the predicate" for name in convs if name not in chosen}
        _check_chosen(convs, chosen, sizes)
    if not chosen:
        raise DSPPruningError(
            f"{type(model).__name__} has no layer to group or prune: {_listing(excluded)}. "
            "layers=(name, conv) -> bool chooses by hand"
        )
    infos = tuple(_info(name, convs[name], *sizes[name]) for name in chosen)
    return LayerSurvey(convs, infos, excluded)


def default_example_input(model: nn.Module) -> Tensor:
    """Zeros, 1 x C x 32 x 32 with C from the first conv, in its dtype and on its device.

    Raises DSPPruningError if the model has no ``nn.Conv2d``.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            weight = module.weight
            return torch.zeros(1, module.in_channels, 32, 32, dtype=weight.dtype, device=weight.device)
    raise DSPPruningError(f"{type(model).__name__} has no nn.Conv2d: there is nothing to group or prune")


_Size = tuple[tuple[int, int], tuple[int, int]]


def inputs_like(model: nn.Module, example: Example | None) -> tuple[Tensor, ...]:
    """The inputs of an example (the default one for None) on the device of the first conv.

    The image, which is the first, and other floating inputs are in its dtype.
    Raises DSPShapeError for what is no example.
    """
    if example is None:
        return (default_example_input(model),)
    weight = next(module.weight for module in model.modules() if isinstance(module, nn.Conv2d))
    return tuple(
        x.detach().to(weight.device, weight.dtype if place == 0 or x.is_floating_point() else None)
        for place, x in enumerate(as_inputs(example))
    )


def _measure(
    model: nn.Module, convs: Mapping[str, nn.Conv2d], example: tuple[Tensor, ...]
) -> dict[str, _Size]:
    """Input and output height and width of every conv that runs on the example."""
    sizes: dict[str, _Size] = {}

    def record(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            before, after = inputs[0].shape[-2:], output.shape[-2:]
            sizes.setdefault(name, ((before[0], before[1]), (after[0], after[1])))

        return hook

    handles = [conv.register_forward_hook(record(name)) for name, conv in convs.items()]
    try:
        with evaluating(model), torch.no_grad():
            model(*(x.clone() for x in example))  # a model may write into its input
    except Exception as error:  # whatever the model's own code raises on a shape it cannot take
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
    """Name -> reason of every conv that the default choice leaves out."""
    first = next(iter(convs))
    shortcuts = _shortcuts(model, convs, example)
    owners: dict[int, list[str]] = {}
    for name, conv in convs.items():
        owners.setdefault(id(conv._parameters.get("weight")), []).append(name)
    excluded: dict[str, str] = {}
    for name, conv in convs.items():
        if name == first:
            excluded[name] = "the first conv"
        elif conv.groups != 1:
            excluded[name] = f"groups={conv.groups}"
        elif name in shortcuts:
            excluded[name] = "a 1x1 shortcut"
        elif name not in sizes:
            excluded[name] = "does not run on the example input"
        elif not isinstance(conv._parameters.get("weight"), nn.Parameter):
            excluded[name] = "its weight is computed, not a parameter"
        elif len(owners[id(conv.weight)]) > 1:
            others = [other for other in owners[id(conv.weight)] if other != name]
            excluded[name] = f"shares its weight with {others[0]!r}"
    return excluded


def _shortcuts(model: nn.Module, convs: Mapping[str, nn.Conv2d], example: tuple[Tensor, ...]) -> set[str]:
    """The 1x1 convs that stand in a shortcut; by name where the model cannot be traced."""
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
    """Is its output, through at most BN, added to a branch of convs that starts at the conv's own input?

    The last 1x1 conv of a bottleneck is not one: it is added to what comes from before its input. Nor is a
    conv whose own input it is added to: there the input itself is the shortcut.
    """
    own, source = conv.name, conv.inputs[0]
    node = conv
    while len(node.users) == 1:
        follower = network[node.users[0]]
        if follower.kind == "add":
            others = [name for name in follower.inputs if name != node.name]
            return any(_descends_through_conv(network, name, source, own) for name in others)
        if follower.kind not in _TRANSPARENT:
            return False
        node = follower
    return False


def _descends_through_conv(network: TracedNetwork, name: str, source: str, own: str) -> bool:
    """Does a path with at least one conv lead from ``source`` to ``name`` without the conv ``own``?"""
    seen: set[tuple[str, bool]] = set()
    waiting = [(name, False)]
    while waiting:
        state = waiting.pop()
        if state in seen or state[0] == own:
            continue
        seen.add(state)
        current, through_conv = state
        if current == source:
            if through_conv:
                return True
            continue
        node = network[current]
        passed = through_conv or node.kind in ("conv", "packed_conv")
        waiting.extend((before, passed) for before in node.inputs)
    return False


def _check_chosen(convs: Mapping[str, nn.Conv2d], chosen: list[str], sizes: Mapping[str, _Size]) -> None:
    for name in chosen:
        if convs[name].groups != 1:
            raise DSPPruningError(
                f"layer {name!r} has groups={convs[name].groups}; only convs with groups=1 can learn groups"
            )
        if name not in sizes:
            raise DSPPruningError(
                f"layer {name!r} does not run on the example input, so its size is unknown; leave it out"
            )


def _info(name: str, conv: nn.Conv2d, input_hw: tuple[int, int], output_hw: tuple[int, int]) -> LayerInfo:
    kh, kw = conv.kernel_size
    return LayerInfo(name, conv, conv.in_channels, conv.out_channels, (kh, kw), input_hw, output_hw)


def _listing(excluded: Mapping[str, str]) -> str:
    items = [f"{name!r} ({reason})" for name, reason in excluded.items()]
    more = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return ", ".join(items[:_LISTED]) + more
