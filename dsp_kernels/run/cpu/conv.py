"""One convolution by the native CPU kernels, with its layout conversion at both ends.

Inputs and outputs are ordinary tensors of any strides, which the kernel converts as it reads and writes. A
fused network (``dsp_kernels.fuse``) pays for the conversion once instead of per layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsp_kernels.op.spec import ConvSpec, memory_format_of
from dsp_kernels.program.steps import Requantize
from dsp_kernels.run.cpu.call import NativeCall
from dsp_kernels.run.cpu.extension import native, new_network, why_missing


class CpuBackend:
    """Native kernels, float32, any structure."""

    name = "cpu"

    def can_run(
        self, spec: ConvSpec, dtype: torch.dtype, device: torch.device, layout: torch.memory_format
    ) -> tuple[bool, str]:
        """On the CPU in float32, if the extension is built."""
        if device.type != "cpu":
            return False, f"tensors are on {device}"
        if dtype != torch.float32:
            # Values between layers are float32: bfloat16 tensors would be converted at both ends of a layer.
            return False, f"dtype {dtype} is not float32; bfloat16 runs in whole networks only (fuse)"
        return (False, why_missing()) if native() is None else (True, "")

    def is_worth(
        self, spec: ConvSpec, dtype: torch.dtype, device: torch.device, layout: torch.memory_format
    ) -> tuple[bool, str]:
        """Whether it beats plain PyTorch: not for channels_last 1x1 layers with little arithmetic."""
        if layout != torch.channels_last or spec.kernel_size != (1, 1) or torch.get_num_threads() == 1:
            return True, ""
        products = products_per_move(spec)
        if products >= _PRODUCTS_PER_MOVE:
            return True, ""
        return False, (
            f"a channels_last 1x1 layer with {products:.0f} products per moved channel and pixel; "
            f"below {_PRODUCTS_PER_MOVE} the conversion costs more than it saves"
        )

    def prepare(self, spec: ConvSpec, weights: Sequence[Tensor], bias: Tensor | None) -> CpuPlan:
        return CpuPlan(spec, weights, bias)


class CpuPlan:
    """(x, residual) -> y for one convolution with its weights packed. Thread-safe."""

    def __init__(self, spec: ConvSpec, weights: Sequence[Tensor], bias: Tensor | None) -> None:
        self.spec = spec
        self.weight_bytes = sum(4 * weight.numel() for weight in weights)
        network = new_network()
        self._value = add_conv(network, spec, weights, bias, network.input(spec.structure.in_channels))
        network.output(self._value)
        self._plain = NativeCall(network, [False])
        self._with_residual: NativeCall | None = None  # made at the first call with a residual

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x: (batch, in_channels, height, width), float32; residual: like the output, or None.

        Raises DSPShapeError for an input that the convolution cannot take.
        """
        inputs = [x.detach() if x.requires_grad else x]
        if residual is not None:
            inputs.append(residual.detach())
        call = self._plain if residual is None else self._residual_call()
        # Interleaved images cost more to convert than they save where threads outnumber them.
        return call(inputs, memory_format_of(x), int(len(x) >= torch.get_num_threads()))[0]

    def holds(self, weights: Sequence[Tensor], bias: Tensor | None) -> bool:
        """Whether the plan was made from weights and bias equal to these, bit for bit."""
        arrays = [as_array(weight) for weight in weights], None if bias is None else as_array(bias)
        same: bool = self._plain.network.conv_holds(self._value, *arrays)
        return same

    def _residual_call(self) -> NativeCall:
        # Without a lock, which a fork could leave held; two threads may both make it.
        if self._with_residual is None:
            network = new_network()
            x = network.input(self.spec.structure.in_channels)
            residual = network.input(self.spec.structure.out_channels)
            network.output(network.conv_like(self._plain.network, self._value, x, residual))
            self._with_residual = NativeCall(network, [False])
        return self._with_residual


# Products per moved channel and pixel below which plain PyTorch is faster in channels_last. Measured at
# batch 4 and 8 on the layers of ResNet-50 80 % and on layers like ResNet-56's (2 Zen 5 cores, shared with
# others, best of many runs, torch 2.15). Speed relative to eager on 2 threads: 1x1 layers with 6 to 16
# products 0.61-0.77, with 25 0.88 and 1.54, with 29 and more 1.16-3.25; of the 3x3 layers only one, with
# 50, was slower (0.63). On one thread none was slower.
_PRODUCTS_PER_MOVE = 25


def products_per_move(spec: ConvSpec) -> float:
    """Multiply-adds per channel and pixel that the layout conversion at both ends of one layer moves."""
    structure = spec.structure
    taps = spec.kernel_size[0] * spec.kernel_size[1]
    moved = len(structure.read) * spec.stride[0] * spec.stride[1] + structure.out_channels
    return structure.kernels * taps / moved


def add_conv(
    network: Any,
    spec: ConvSpec,
    weights: Sequence[Tensor] | None,
    bias: Tensor | None,
    x: int,
    residual: int = -1,
    requantize: Requantize | None = None,
) -> int:
    """Add a convolution to a native network; x, residual (-1: none) and the result are value numbers.

    weights: None for a network that is planned, but never runs.
    """
    value: int = network.conv(
        x,
        residual,
        out_channels=spec.structure.out_channels,
        kernel_size=spec.kernel_size,
        stride=spec.stride,
        padding=spec.padding,
        dilation=spec.dilation,
        activation=spec.activation,
        in_index=[group.in_index for group in spec.structure.groups],
        out_index=[group.out_index for group in spec.structure.groups],
        weights=None if weights is None else [as_array(weight) for weight in weights],
        bias=None if bias is None else as_array(bias),
        requantize=ending(requantize),
    )
    return value


def ending(requantize: Requantize | None) -> tuple[Any, ...] | None:
    """The native form of how an integer step ends."""
    if requantize is None:
        return None
    r = requantize
    return as_array(r.multiplier), r.residual, r.low, r.high, r.exact, r.signed


def as_array(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The tensor's memory, without a copy where it is contiguous and float32."""
    array: np.ndarray[Any, np.dtype[np.float32]] = tensor.detach().float().contiguous().numpy()
    return array
