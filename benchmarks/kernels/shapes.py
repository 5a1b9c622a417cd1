"""The layers of the single-op benchmarks: one of each shape in the released networks and in ResNet-50."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsp_kernels.op.spec import ConvSpec
from dsp_kernels.program.steps import ConvStep

from ..subjects.networks import Network, NetworkSource, load_network, shared_folder

__all__ = ["Layer", "layers"]

_SOURCES = (
    NetworkSource("resnet20_g4"),
    NetworkSource("resnet56_g4"),
    NetworkSource("resnet50", "random:g=2,rate=0.8"),
)


@dataclass(frozen=True)
class Layer:
    """One convolution. shape: of the dense layer, ``64x8x8->64 3x3/1``; weights, bias: of the op."""

    network: str
    name: str
    shape: str
    input_shape: tuple[int, int, int]
    spec: ConvSpec
    weights: tuple[Tensor, ...]
    bias: Tensor | None

    def example(self, batch: int, seed: int = 0) -> Tensor:
        """(batch, channels, height, width), standard normal."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, *self.input_shape, generator=generator)


def layers(sources: tuple[NetworkSource, ...] = _SOURCES) -> list[Layer]:
    """The first layer of every dense shape in each network that exists here."""
    found: list[Layer] = []
    for source in sources:
        if source.structure is None and not (shared_folder() / "nets" / f"{source.name}.npz").is_file():
            continue
        seen: set[str] = set()
        for layer in _of_network(source.name, load_network(source)):
            if layer.shape not in seen:
                seen.add(layer.shape)
                found.append(layer)
    return found


def _of_network(name: str, network: Network) -> list[Layer]:
    dense, packed = network.program("dense"), network.program("packed")
    wide = {step.output: step for step in dense.steps if isinstance(step, ConvStep)}
    made = []
    for step in packed.steps:
        if not isinstance(step, ConvStep) or step.output not in wide:
            continue
        _, channels, height, width = packed.shapes[step.inputs[0]]
        structure, kernel = wide[step.output].spec.structure, step.spec.kernel_size
        shape = f"{structure.in_channels}x{height}x{width}->{structure.out_channels} "
        shape += f"{kernel[0]}x{kernel[1]}/{step.spec.stride[0]}"
        made.append(
            Layer(name, step.output, shape, (channels, height, width), step.spec, step.weights, step.bias)
        )
    return made
