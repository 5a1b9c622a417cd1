"""The layers of the single-op benchmarks: one of each shape in the released networks and in ResNet-50."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsp_kernels.program.steps import ConvStep

from ..subjects.networks import NetworkSource, load_network, shared_folder

_SOURCES = (
    NetworkSource("resnet20_g4"),
    NetworkSource("resnet56_g4"),
    NetworkSource("resnet50", "random:g=2,rate=0.8"),
)


@dataclass(frozen=True)
class Layer:
    """One packed convolution. shape: of the dense layer, ``64x8x8->64 3x3/1``; input_shape: of one image."""

    network: str
    shape: str
    input_shape: tuple[int, ...]
    step: ConvStep

    def example(self, batch: int, seed: int = 0) -> Tensor:
        """(batch, channels, height, width), standard normal."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, *self.input_shape, generator=generator)


def layers(sources: tuple[NetworkSource, ...] = _SOURCES) -> list[Layer]:
    """The first layer of every dense shape in each network that exists here."""
    found: dict[tuple[str, str], Layer] = {}
    for source in sources:
        if source.structure is None and not (shared_folder() / "nets" / f"{source.name}.npz").is_file():
            continue
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
