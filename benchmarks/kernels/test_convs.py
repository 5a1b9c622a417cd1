"""Every layer shape in every backend; run with

``python -m pytest benchmarks/kernels --benchmark-enable --benchmark-group-by=group --benchmark-autosave``
and compare two runs with ``pytest-benchmark compare``. Without --benchmark-enable each runs once, as a test.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsp_kernels.graph.compare import largest_difference
from dsp_kernels.op.dense import dense_weight
from dsp_kernels.op.reference import gather_grouped_conv2d_reference
from dsp_kernels.program.steps import ConvStep
from dsp_kernels.run.convs import BACKENDS
from dsp_kernels.tolerances import op_tolerance

from .shapes import Layer, layers

pytestmark = pytest.mark.parametrize("batch", [1, 8])
_EACH_LAYER = pytest.mark.parametrize(
    "layer", layers(), ids=lambda layer: f"{layer.network}-{layer.step.output}"
)


@_EACH_LAYER
@pytest.mark.parametrize("backend", BACKENDS.names())
def test_conv(benchmark: Any, layer: Layer, backend: str, batch: int) -> None:
    """One convolution with bias and activation, checked before it is timed."""
    benchmark.group = f"{layer.shape}, batch {batch}"
    step = layer.step
    chosen = {item.name: item for item in BACKENDS}[backend]
    able, reason = chosen.can_run(step.spec, torch.float32, torch.device("cpu"))
    if not able:
        pytest.skip(reason)
    x = layer.example(batch)
    with torch.inference_mode():
        run = chosen.prepare(step.spec, step.weights, step.bias)
        _check(step, x[:1], run(x[:1], None))
        benchmark(run, x, None)


@_EACH_LAYER
def test_floor_copy(benchmark: Any, layer: Layer, batch: int) -> None:
    """The floor of a memory-bound kernel: the input copied and the output written once."""
    benchmark.group = f"{layer.shape}, batch {batch}"
    spec, x = layer.step.spec, layer.example(batch)
    y = torch.zeros(batch, spec.structure.out_channels, *spec.output_hw(layer.input_shape[1:]))
    target = torch.empty_like(x)

    def copy() -> None:
        target.copy_(x)
        y.zero_()

    benchmark(copy)
    assert torch.equal(target, x)


@_EACH_LAYER
def test_dense_channels_last(benchmark: Any, layer: Layer, batch: int) -> None:
    """The alternative: a dense convolution over the live channels, with zeros between groups."""
    benchmark.group = f"{layer.shape}, batch {batch}"
    spec, step = layer.step.spec, layer.step
    weight = dense_weight(spec.structure, step.weights, spec.kernel_size)
    weight = weight.contiguous(memory_format=torch.channels_last)
    x = layer.example(batch).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        y = benchmark(F.conv2d, x, weight, step.bias, spec.stride, spec.padding, spec.dilation)
    assert y.shape == (batch, spec.structure.out_channels, *spec.output_hw(layer.input_shape[1:]))


def _check(step: ConvStep, x: Tensor, y: Tensor) -> None:
    spec = step.spec
    expected = gather_grouped_conv2d_reference(
        x,
        step.weights,
        spec.structure,
        step.bias,
        kernel_size=spec.kernel_size,
        stride=spec.stride,
        padding=spec.padding,
        dilation=spec.dilation,
        activation=spec.activation,
    )
    difference, scale = largest_difference(expected, y)
    reduction = spec.structure.in_channels * spec.kernel_size[0] * spec.kernel_size[1]
    assert difference <= op_tolerance(torch.float32, reduction) * scale
