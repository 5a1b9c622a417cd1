"""Turns steps of a Program into the native extension's own network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dsp_kernels.program.steps import (
    ActivationStep,
    AdaptivePoolStep,
    AddStep,
    AffineStep,
    ConcatStep,
    ConvStep,
    FlattenStep,
    GateStep,
    GlobalPoolStep,
    LinearStep,
    MulStep,
    PoolStep,
    SelectStep,
    Step,
)
from dsp_kernels.run.cpu.conv import add_conv, as_array
from dsp_kernels.run.cpu.extension import new_network

__all__ = ["NATIVE_STEPS", "build"]

NATIVE_STEPS = (
    ConvStep,
    AffineStep,
    AddStep,
    MulStep,
    ActivationStep,
    GateStep,
    ConcatStep,
    SelectStep,
    PoolStep,
    GlobalPoolStep,
    AdaptivePoolStep,
    FlattenStep,
    LinearStep,
)


def build(
    inputs: Sequence[str],
    channels: Sequence[int],
    steps: Sequence[Step],
    outputs: Sequence[str],
    dtype: torch.dtype = torch.float32,
) -> Any:
    """inputs, outputs: values that come from and go to PyTorch. A native Network.

    dtype: what convolutions multiply, float16 where the CPU does that; between the steps all is float32.
    """
    network = new_network(bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16)
    value = {name: network.input(width) for name, width in zip(inputs, channels, strict=True)}
    for step in steps:
        value[step.output] = _add(network, step, [value[name] for name in step.inputs])
    for name in outputs:
        network.output(value[name])
    return network


def _add(network: Any, step: Step, x: list[int]) -> int:
    made: int
    if isinstance(step, ConvStep):
        residual = x[1] if len(x) == 2 else -1
        made = add_conv(network, step.spec, step.weights, step.bias, x[0], residual)
    elif isinstance(step, AffineStep):
        made = network.map(x[0], -1, as_array(step.scale), as_array(step.shift), step.activation)
    elif isinstance(step, AddStep):
        made = network.map(x[0], x[1], None, None, step.activation)
    elif isinstance(step, ActivationStep):
        made = network.map(x[0], -1, None, None, step.activation)
    elif isinstance(step, GateStep):
        made = network.map(x[0], -1, None, None, step.kind)
    elif isinstance(step, MulStep):
        made = network.product(x[0], x[1], step.activation)
    elif isinstance(step, ConcatStep):
        made = network.concat(x)
    elif isinstance(step, SelectStep):
        made = network.select(x[0], step.index)
    elif isinstance(step, AdaptivePoolStep):
        made = network.adaptive(x[0], step.size)
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
        bias = None if step.bias is None else as_array(step.bias)
        made = network.linear(x[0], as_array(step.weight), bias, step.activation)
    return made
