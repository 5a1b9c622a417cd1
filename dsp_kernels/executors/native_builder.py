"""Turns steps of a Program into the native extension's own network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from dsp_kernels.program import (
    ActivationStep,
    AddStep,
    AffineStep,
    ConvStep,
    FlattenStep,
    GlobalPoolStep,
    LinearStep,
    PoolStep,
    Step,
)

__all__ = ["NATIVE_STEPS", "build", "conv_arguments"]

NATIVE_STEPS = (
    ConvStep,
    AffineStep,
    AddStep,
    ActivationStep,
    PoolStep,
    GlobalPoolStep,
    FlattenStep,
    LinearStep,
)


def build(
    module: Any,
    isa: str,
    inputs: Sequence[str],
    channels: Sequence[int],
    steps: Sequence[Step],
    outputs: Sequence[str],
) -> Any:
    """module: the extension. inputs, outputs: values that come from and go to PyTorch. A native Network."""
    network = module.Network(isa)
    value = {name: network.input(width) for name, width in zip(inputs, channels, strict=True)}
    for step in steps:
        value[step.output] = _add(network, step, [value[name] for name in step.inputs])
    for name in outputs:
        network.output(value[name])
    return network


def conv_arguments(step: ConvStep) -> tuple[Any, ...]:
    """What the native conv takes after its input and residual."""
    spec = step.spec
    return (
        spec.structure.out_channels,
        spec.kernel_size,
        spec.stride,
        spec.padding,
        spec.dilation,
        spec.activation,
        [group.in_index for group in spec.structure.groups],
        [group.out_index for group in spec.structure.groups],
        [_array(weight) for weight in step.weights],
        None if step.bias is None else _array(step.bias),
    )


def _add(network: Any, step: Step, x: list[int]) -> int:
    made: int
    if isinstance(step, ConvStep):
        made = network.conv(x[0], x[1] if len(x) == 2 else -1, *conv_arguments(step))
    elif isinstance(step, AffineStep):
        made = network.map(x[0], -1, _array(step.scale), _array(step.shift), step.activation)
    elif isinstance(step, AddStep):
        made = network.map(x[0], x[1], None, None, step.activation)
    elif isinstance(step, ActivationStep):
        made = network.map(x[0], -1, None, None, step.activation)
    elif isinstance(step, PoolStep):
        settings = step.settings
        made = network.pool(
            x[0],
            step.kind == "avg_pool",
            settings["kernel_size"],
            settings["stride"],
            settings["padding"],
            settings.get("dilation", (1, 1)),
            settings["ceil_mode"],
            settings.get("count_include_pad", True),
            settings.get("divisor_override") or 0,
        )
    elif isinstance(step, GlobalPoolStep):
        made = network.mean(x[0])
    elif isinstance(step, FlattenStep):
        made = network.flatten(x[0])
    else:
        assert isinstance(step, LinearStep)
        bias = None if step.bias is None else _array(step.bias)
        made = network.linear(x[0], _array(step.weight), bias, step.activation)
    return made


def _array(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    array: np.ndarray[Any, np.dtype[np.float32]] = tensor.detach().contiguous().numpy()
    return array
