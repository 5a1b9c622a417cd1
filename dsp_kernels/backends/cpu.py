"""The op by the native CPU kernels: one convolution with its layout conversion at both ends.

Input and output are ordinary tensors, plain or channels_last or any view; the kernel reads and writes them by
their strides. A whole network fused (``dsp_kernels.fuse``) pays for the conversion once instead of per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsp_kernels.conv_spec import ConvSpec, memory_format_of
from dsp_kernels.errors import DSPShapeError
from dsp_kernels.native import chosen_isa, native, why_missing

__all__ = ["CpuBackend", "add_conv", "as_array"]


class CpuBackend:
    """Native kernels, float32, any structure. See the module's text."""

    name = "cpu"

    def can_run(self, spec: ConvSpec, dtype: torch.dtype, device: torch.device) -> tuple[bool, str]:
        """On the CPU in float32, when the extension is built."""
        if device.type != "cpu":
            return False, f"tensors are on {device}"
        if dtype != torch.float32:
            return False, f"dtype {dtype} is not float32"
        return (False, why_missing()) if native() is None else (True, "")

    def prepare(
        self, spec: ConvSpec, weights: Sequence[Tensor], bias: Tensor | None
    ) -> Callable[[Tensor, Tensor | None], Tensor]:
        """A function (x, residual) -> y; see ``ConvBackend.prepare``."""
        networks: dict[bool, Any] = {}

        def network(with_residual: bool) -> Any:
            if with_residual not in networks:
                module = native()
                assert module is not None
                made = module.Network(chosen_isa())
                x = made.input(spec.structure.in_channels)
                residual = made.input(spec.structure.out_channels) if with_residual else -1
                made.output(add_conv(made, spec, weights, bias, x, residual))
                networks[with_residual] = made
            return networks[with_residual]

        network(False)  # the weights are copied now, not at the first call

        def run(x: Tensor, residual: Tensor | None = None) -> Tensor:
            shape = (x.shape[0], spec.structure.out_channels, *spec.output_hw(x.shape[2:]))
            y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))
            if shape[0]:
                inputs = (
                    [x.detach().numpy()]
                    if residual is None
                    else [x.detach().numpy(), residual.detach().numpy()]
                )
                try:
                    network(residual is not None).run(
                        inputs, [y.numpy()], torch.get_num_threads(), _interleave(shape[0])
                    )
                except ValueError as error:
                    raise DSPShapeError(f"this convolution cannot take this input: {error}") from error
            return y

        return run


def _interleave(images: int) -> int:
    """One image at a time: interleaving several makes the conversion at both ends cost more than it saves."""
    return 1 if images >= torch.get_num_threads() else 0


def add_conv(
    network: Any, spec: ConvSpec, weights: Sequence[Tensor], bias: Tensor | None, x: int, residual: int
) -> int:
    """Adds the convolution to a native network; x, residual (-1: none) and the result are value numbers."""
    value: int = network.conv(
        x,
        residual,
        spec.structure.out_channels,
        spec.kernel_size,
        spec.stride,
        spec.padding,
        spec.dilation,
        spec.activation,
        [group.in_index for group in spec.structure.groups],
        [group.out_index for group in spec.structure.groups],
        [as_array(weight) for weight in weights],
        None if bias is None else as_array(bias),
    )
    return value


def as_array(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The tensor's memory, without a copy where it is contiguous."""
    array: np.ndarray[Any, np.dtype[np.float32]] = tensor.detach().contiguous().numpy()
    return array
