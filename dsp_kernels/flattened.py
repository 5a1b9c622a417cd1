"""Which values of a Program are flattened maps: as many features as a map has numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dsp_kernels.program import (
    ActivationStep,
    AdaptivePoolStep,
    AddStep,
    AffineStep,
    ConcatStep,
    FlattenStep,
    GateStep,
    GlobalPoolStep,
    MulStep,
    SelectStep,
    Step,
    TorchStep,
)

__all__ = ["Flattened", "flattened_maps"]

_OF_ITS_INPUTS_SIZE = (
    ActivationStep,
    AddStep,
    AffineStep,
    ConcatStep,
    FlattenStep,
    GateStep,
    MulStep,
    SelectStep,
)


class Flattened(NamedTuple):
    """maps: values that hold a map's planes one after the other. derived: what other steps make of them."""

    maps: set[str]
    derived: set[str]


def flattened_maps(steps: Sequence[Step], shapes: Mapping[str, tuple[int, ...]]) -> Flattened:
    """The values whose features are as many as a map's numbers, for this or another image.

    The example cannot tell: its map may be a single pixel where a larger image's is not. Only a global pool
    makes single pixels of every image, and only a linear layer has a number of features of its own.
    """
    pixels: set[str] = set()
    found = Flattened(set(), set())
    for step in steps:
        if _is_pixel(step, pixels):
            pixels.add(step.output)
        elif _is_map(step, found.maps, shapes):
            found.maps.add(step.output)
        elif _is_derived(step, found):
            found.derived.add(step.output)
    return found


def _is_pixel(step: Step, pixels: set[str]) -> bool:
    if isinstance(step, AdaptivePoolStep):
        return step.size == (1, 1)
    if isinstance(step, GlobalPoolStep):
        return True
    return isinstance(step, _OF_ITS_INPUTS_SIZE) and pixels.issuperset(step.inputs)


def _is_map(step: Step, maps: set[str], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    if isinstance(step, FlattenStep):
        return len(shapes[step.inputs[0]]) == 4
    return isinstance(step, (ActivationStep, GateStep)) and maps.issuperset(step.inputs)


def _is_derived(step: Step, found: Flattened) -> bool:
    reads = not (found.maps | found.derived).isdisjoint(step.inputs)
    return reads and isinstance(step, (*_OF_ITS_INPUTS_SIZE, TorchStep))
