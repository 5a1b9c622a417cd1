"""Which values of a Program are flattened maps: as many features as a map has numbers."""

from __future__ import annotations

from dsp_kernels.program import (
    ActivationStep,
    AdaptivePoolStep,
    AddStep,
    AffineStep,
    ConcatStep,
    FlattenStep,
    GateStep,
    GlobalPoolStep,
    LinearStep,
    MulStep,
    Program,
    SelectStep,
)

__all__ = ["flattened_maps"]

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


def flattened_maps(program: Program) -> set[str]:
    """Names of the (batch, features) values that are maps of several pixels, for this or another image.

    The example cannot tell: its map may be a single pixel where a larger image's is not. Only a global pool
    makes single pixels of every image.
    """
    pixels: set[str] = set()
    found: set[str] = set()
    for step in program.steps:
        if isinstance(step, GlobalPoolStep) or (isinstance(step, AdaptivePoolStep) and step.size == (1, 1)):
            pixels.add(step.output)
        elif isinstance(step, LinearStep):
            continue
        elif isinstance(step, _OF_ITS_INPUTS_SIZE) and pixels.issuperset(step.inputs):
            pixels.add(step.output)
        elif isinstance(step, _OF_ITS_INPUTS_SIZE):
            of_a_map = isinstance(step, FlattenStep) and len(program.shapes[step.inputs[0]]) == 4
            if of_a_map or found.intersection(step.inputs):
                found.add(step.output)
    return found
