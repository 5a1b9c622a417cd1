"""One layer of each shape in the released networks and in ResNet-50, in every backend; run with

``python -m pytest benchmarks/kernels --benchmark-enable --benchmark-group-by=group --benchmark-autosave``
and compare two runs with ``pytest-benchmark compare``. Without --benchmark-enable each runs once, as a test.
"""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from dsp_kernels.graph.compare import largest_difference
from dsp_kernels.op.reference import gather_grouped_conv2d_reference
from dsp_kernels.program.steps import ConvStep
from dsp_kernels.run.convs import BACKENDS
from dsp_kernels.tolerances import op_tolerance

from ..subjects.networks import NetworkSource, load_network

_SOURCES = (
    NetworkSource("resnet20_g4"),
    NetworkSource("resnet56_g4"),
    NetworkSource("resnet50", "random:g=2,rate=0.8"),
)
_SETTINGS = ("kernel_size", "stride", "padding", "dilation", "activation")


@dataclass(frozen=True)
class Layer:
    """One packed convolution. shape: of the dense layer, ``64x8x8->64 3x3/1``; input_shape: of one image."""

    network: str
    shape: str
    input_shape: tuple[int, ...]
    step: ConvStep

    def example(self, batch: int) -> Tensor:
        """(batch, channels, height, width), standard normal."""
        return torch.randn(batch, *self.input_shape, generator=torch.Generator().manual_seed(0))


def layers(sources: tuple[NetworkSource, ...] = _SOURCES) -> list[Layer]:
    """The first layer of every dense shape in each network."""
    found: dict[tuple[str, str], Layer] = {}
    for source in sources:
        network = load_network(source)
        dense, packed = network.program("dense"), network.program("packed")
        wide = {step.output: step.spec for step in dense.steps if isinstance(step, ConvStep)}
        for step in packed.steps:
            if isinstance(step, ConvStep) and step.output in wide:
                spec, input_shape = wide[step.output], packed.shapes[step.inputs[0]][1:]
                size = "x".join(str(length) for length in (spec.structure.in_channels, *input_shape[1:]))
                kernel = "x".join(str(length) for length in spec.kernel_size)
                shape = f"{size}->{spec.structure.out_channels} {kernel}/{spec.stride[0]}"
                found.setdefault((source.name, shape), Layer(source.name, shape, input_shape, step))
    return list(found.values())


pytestmark = [
    pytest.mark.parametrize("batch", [1, 8]),
    pytest.mark.parametrize("layer", layers(), ids=lambda layer: f"{layer.network}-{layer.step.output}"),
]


@pytest.mark.parametrize("backend", BACKENDS.names())
def test_conv(benchmark: Any, layer: Layer, backend: str, batch: int) -> None:
    """One convolution with bias and activation, checked before it is timed."""
    benchmark.group = f"{layer.shape}, batch {batch}"
    step, x = layer.step, layer.example(batch)
    (chosen,) = (item for item in BACKENDS if item.name == backend)
    able, reason = chosen.can_run(step.spec, torch.float32, torch.device("cpu"), torch.contiguous_format)
    if not able:
        pytest.skip(reason)
    with torch.inference_mode():
        run = chosen.prepare(step.spec, step.weights, step.bias)
        expected = gather_grouped_conv2d_reference(
            x[:1],
            step.weights,
            step.spec.structure,
            step.bias,
            **{name: getattr(step.spec, name) for name in _SETTINGS},
        )
        difference, scale = largest_difference(expected, run(x[:1], None))
        reduction = step.spec.structure.in_channels * math.prod(step.spec.kernel_size)
        assert difference <= op_tolerance(torch.float32, reduction) * scale
        benchmark(run, x, None)
