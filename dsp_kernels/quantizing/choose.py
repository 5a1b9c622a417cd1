"""Which steps of a Program compute in integers, and which values share one scale.

Convolutions and linear layers do, and between them the adds, products, averages and steps that only move
values whose result such a layer reads. Everything else is float, with the reason.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dsp_kernels.program import steps
from dsp_kernels.program.steps import Program, Step, TorchStep

LARGEST_WEIGHT = 127
FEWEST_LEVELS = 127  # an exact value with fewer, on each side of 0, is no better than a byte
_ACTIVATIONS = ("none", "relu", "relu6")  # that limits of the output express


@dataclass(frozen=True)
class Choice:
    """program: with the steps that ``chosen`` names. chosen: outputs of the steps that compute in integers.

    scaled: every value that they read -> the first of the values that share its scale. limits: of those
    first ones that have more levels than a byte, -limit..limit: the image, and what a global pool gives a
    linear layer. why: value -> why the step that makes it is float.
    """

    program: Program
    chosen: frozenset[str]
    scaled: Mapping[str, str]
    limits: Mapping[str, int]
    why: Mapping[str, str]


def choose(program: Program, keep: Collection[str] = ()) -> Choice:
    """keep: paths of modules that stay in float, with all that they hold."""
    images = _images(program)
    program = _separated(program, keep, images)
    why = {step.output: _obstacle(step, program, keep, images) for step in program.steps}
    while True:
        chosen, rest = _closed(program, {name for name, obstacle in why.items() if not obstacle})
        scaled = _shared_scales(program, chosen)
        limits, too_long = _limits(program, chosen, scaled, images)
        if not too_long:
            rest |= {name: obstacle for name, obstacle in why.items() if obstacle}
            return Choice(program, chosen, scaled, limits, rest)
        why |= too_long


def is_kept(path: str, keep: Collection[str]) -> bool:
    """Whether a module is one of those in ``keep`` or inside of one."""
    return any(f"{path}.".startswith(f"{name}.") for name in keep)


def _images(program: Program) -> set[str]:
    """The inputs, and what only moves their numbers."""
    images = set(program.inputs)
    for step in program.steps:
        if _moves(step) and not isinstance(step, steps.ConcatStep) and images.issuperset(step.inputs):
            images.add(step.output)
    return images


def _moves(step: Step) -> bool:
    """Whether its output holds numbers of its inputs and zeros only."""
    if isinstance(step, steps.PoolStep):
        return step.kind == "max_pool"
    if isinstance(step, steps.ResizeStep):
        return not any(step.pads) or step.value == 0
    return isinstance(step, steps.ConcatStep | steps.SelectStep | steps.FlattenStep)


def _is_layer(step: Step) -> bool:
    return isinstance(step, steps.ConvStep | steps.LinearStep)


def _separated(program: Program, keep: Collection[str], images: set[str]) -> Program:
    """Activations that integers lack, and the addition of an image, as steps of their own after a layer."""
    made, shapes = [], dict(program.shapes)
    for step in program.steps:
        before: Any = step
        if isinstance(step, steps.ConvStep | steps.LinearStep) and not is_kept(step.path, keep):
            activation = step.spec.activation if isinstance(step, steps.ConvStep) else step.activation
            adds_image = len(step.inputs) == 2 and step.inputs[1] in images
            if adds_image or activation not in _ACTIVATIONS:
                before = replace(step, output=f"{step.output}.sum")
                shapes[before.output] = shapes[step.output]
                if isinstance(step, steps.ConvStep):
                    before = replace(before, spec=step.spec.with_activation("none"))
                else:
                    before = replace(before, activation="none")
                if adds_image:
                    before = replace(before, inputs=step.inputs[:1])
                kind, added = ("add", step.inputs[1:]) if adds_image else ("activation", ())
                sources = before.output, *added
                made += [before, steps.ElementwiseStep(step.output, sources, kind, activation)]
                continue
        made.append(step)
    return replace(program, steps=tuple(made), shapes=shapes)


def _longest(step: Step) -> int:
    """Products in the longest sum of a layer."""
    if isinstance(step, steps.LinearStep):
        return step.weight.shape[1]
    assert isinstance(step, steps.ConvStep)
    return max((weight[0].numel() for weight in step.weights), default=0)


def _obstacle(step: Step, program: Program, keep: Collection[str], images: set[str]) -> str:
    """Why a step cannot compute in integers; empty if it can."""
    if isinstance(step, TorchStep):
        return "integers have no such operation"
    ranks = [len(program.shapes.get(name, ())) for name in (*step.inputs, step.output)]
    if any(rank not in (2, 4) for rank in ranks):
        return "its tensors are neither images nor feature vectors"
    if isinstance(step, steps.ConvStep | steps.LinearStep):
        if is_kept(step.path, keep):
            return "kept in float"
        if isinstance(step, steps.LinearStep) and ranks[0] != 2:
            return "a linear layer over the last axis of a map"
        if _longest(step) * LARGEST_WEIGHT * 255 >= 2**31:
            return f"sums of {_longest(step)} products may exceed 32 bits"
        return ""
    if isinstance(step, steps.ElementwiseStep):
        if step.kind == "affine":
            return "a norm or scale after no convolution"
        if step.kind == "activation":
            return "integers have no such step"
        if step.activation not in _ACTIVATIONS:
            return f"{step.activation} after it"
        return "it reads the image itself" if images & set(step.inputs) else ""
    if isinstance(step, steps.PoolStep) and step.kind == "avg_pool":
        varies = step.settings.get("ceil_mode") or not step.settings.get("count_include_pad", True)
        return "its averages are of different numbers of pixels" if varies else ""
    if isinstance(step, steps.PoolStep) and step.kind == "adaptive_avg_pool":
        one = step.settings["output_size"] == (1, 1)
        return "" if one else "its averages are of different numbers of pixels"
    if _moves(step) or isinstance(step, steps.GlobalPoolStep):
        return ""
    if isinstance(step, steps.ResizeStep):
        return "it pads with another number than 0"
    return "integers have no such step"


def _closed(program: Program, able: set[str]) -> tuple[frozenset[str], dict[str, str]]:
    """Of the steps that can, those for which integers pay; why the others do not."""
    chosen, why = set(able), dict[str, str]()
    while True:
        before = len(chosen)
        wanted: set[str] = set()
        for step in reversed(program.steps):
            if step.output in chosen and not _is_layer(step) and step.output not in wanted:
                why[step.output] = "no layer of integers reads it"
                chosen.remove(step.output)
            if step.output in chosen:
                wanted.update(step.inputs)
        for step in program.steps:
            integers = any(name in chosen and name in wanted for name in step.inputs)
            if step.output in chosen and not _is_layer(step) and not integers:
                why[step.output] = "it reads floats only"
                chosen.remove(step.output)
        if len(chosen) == before:
            return frozenset(chosen), why


def _shared_scales(program: Program, chosen: Collection[str]) -> dict[str, str]:
    """Value that a step of integers reads -> the first value of the same scale."""
    integer = [step for step in program.steps if step.output in chosen]
    first = {name: name for step in integer for name in step.inputs}

    def root(name: str) -> str:
        while first[name] != name:
            name = first[name]
        return name

    for step in integer:
        if _moves(step):
            least = root(step.inputs[0])
            for name in (*step.inputs[1:], step.output):
                first[root(name)] = least
    return {name: root(name) for name in first}


def _limits(
    program: Program, chosen: frozenset[str], scaled: Mapping[str, str], images: set[str]
) -> tuple[dict[str, int], dict[str, str]]:
    """Limits of the values with more levels than a byte; why layers cannot read them.

    With these limits every sum of products is below 2^24, so float32 sums are exact in any order.
    """
    members: dict[str, set[str]] = {}
    for name, root in scaled.items():
        members.setdefault(root, set()).add(name)
    made: dict[str, list[Step]] = {root: [] for root in members}
    readers: dict[str, list[Step]] = {root: [] for root in members}
    for step in program.steps:
        if step.output in chosen:
            for root in {scaled[name] for name in step.inputs}:
                readers[root].append(step)
            if step.output in scaled and not _moves(step):
                made[scaled[step.output]].append(step)
    limits: dict[str, int] = {}
    too_long: dict[str, str] = {}
    for root, names in members.items():
        layers = [step for step in readers[root] if _is_layer(step) and names.isdisjoint(step.inputs[1:])]
        moving = [step for step in readers[root] if _moves(step) and not isinstance(step, steps.ConcatStep)]
        is_pooled = names <= chosen and all(
            [isinstance(step, steps.GlobalPoolStep | steps.PoolStep) for step in made[root]]
            + [isinstance(step, steps.LinearStep) for step in layers]
        )
        if len(layers) + len(moving) < len(readers[root]) or not (is_pooled or names <= images):
            continue
        # A term of the sum is at most limit * LARGEST_WEIGHT.
        most = {step: (2**24 - 1) // (LARGEST_WEIGHT * max(_longest(step), 1)) for step in layers}
        limits[root] = min(32767, *most.values())
        for step in (step for step, limit in most.items() if limit < FEWEST_LEVELS):
            too_long[step.output] = f"its sum of {_longest(step)} products is too long for an exact input"
    return limits, too_long
