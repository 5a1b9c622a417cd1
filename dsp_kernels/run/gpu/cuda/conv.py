"""The CUDA C++ kernels as a family of GPU kernels: csrc/cuda launched on tensors in CHWN or NHWC."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from dsp_kernels.errors import DSPBackendError, DSPShapeError
from dsp_kernels.op.activations import ACTIVATIONS
from dsp_kernels.op.spec import ConvSpec
from dsp_kernels.run.gpu.cuda.library import has_wgmma, why_no_cuda, why_not_on
from dsp_kernels.run.gpu.cuda.tables import KERNELS, Tables, make_tables
from dsp_kernels.run.gpu.layout import BATCH_MULTIPLE, GpuLayout

__all__ = [
    "CudaConv",
    "CudaKernels",
    "Launch",
    "launch_op",
]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# csrc/cuda/conv_params.h: offsets of taps and heights are packed into 16 bits.
_LARGEST_SIDE = 16383
# Multiprocessors of an H200, which blocks should fill: a halo kernel's are larger than those of the other
# one, and the NHWC kernel has few where there is one image.
_FEW_BLOCKS = 132
# Pieces of 8 images that a block of a kernel takes, by filters per tile.
_CHUNKS = {
    ("halo", 16): 128,
    ("halo", 32): 64,
    ("halo", 64): 32,
    ("wgmma_halo", 64): 64,
    ("wgmma", 64): 16,
    ("wgmma", 128): 16,
}
# Positions of a block of the NHWC kernel; the number of the one that shares out a reduction (launch_plan.h).
_NHWC_POSITIONS, _NHWC_SLICED = 64, 7
# mma.sync reaches about five eighths of the rate of wgmma on sm_90 (published microbenchmarks; not measured
# here), so wgmma may multiply that much more zeros to fill its wider tiles.
_MMA_SHARE = 5 / 8

# (x, out, residual, weights, bias, tables, sizes); sizes: see csrc/cuda/launch_plan.h, block_plan.h
Launch = Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor, list[int]], None]


def launch_op(
    op: str,
    x: Tensor,
    out: Tensor,
    residual: Tensor | None,
    weights: Tensor,
    bias: Tensor,
    tables: Tensor,
    sizes: list[int],
) -> None:
    """Runs torch.ops.dsp_kernels.<op> on the current stream; writes ``out``.

    Raises DSPBackendError for what it refuses, with its reason.
    """
    try:
        getattr(torch.ops.dsp_kernels, op)(x, out, residual, weights, bias, tables, sizes)
    except RuntimeError as error:
        raise DSPBackendError(str(error)) from error


_launch: Launch = partial(launch_op, "cuda_conv")


class CudaKernels:
    """float16 and bfloat16 on tensor cores, float32 without them; compute capability 8.0 or newer."""

    name = "cuda"

    def can_run(
        self, spec: ConvSpec, dtype: torch.dtype, device: torch.device, layout: GpuLayout
    ) -> tuple[bool, str]:
        """Whether a GPU of that kind and the kernels are there. Asking about a CPU loads nothing."""
        if device.type != "cuda":
            return False, f"tensors are on {device}"
        if dtype not in _DTYPES:
            return False, f"dtype {dtype} is none of float16, bfloat16, float32"
        reach = max((k - 1) * d for k, d in zip(spec.kernel_size, spec.dilation, strict=True))
        if max(reach, *spec.padding) > _LARGEST_SIDE:
            return False, f"its kernel or padding reaches farther than {_LARGEST_SIDE} pixels"
        reason = why_no_cuda() or why_not_on(device.index)
        return not reason, reason

    def prepare(
        self, spec: ConvSpec, weights: Sequence[Tensor], bias: Tensor | None, layout: GpuLayout
    ) -> CudaConv:
        """weights[g]: (O_g, C_g, kh, kw), bias: (out_channels,) or None, on the device that will run them."""
        return CudaConv(spec, weights, bias, layout)


class CudaConv:
    """One convolution, its weights packed and its tables on the device.

    launch: what runs the kernel; tests give an emulation. wgmma: whether tiles of 64 filters and more are
    multiplied by it: True wherever it can be, False never, None by the rule of ``_choose``; by default what
    DSP_KERNELS_WGMMA (1, 0) says. It is for sm_90, 16-bit numbers and CHWN.
    """

    def __init__(
        self,
        spec: ConvSpec,
        weights: Sequence[Tensor],
        bias: Tensor | None,
        layout: GpuLayout,
        launch: Launch = _launch,
        wgmma: bool | None = None,
    ) -> None:
        spec.check_constants(weights, bias)
        self.spec, self.layout = spec, layout
        self._launch = launch
        self._wgmma = _asked_for_wgmma() if wgmma is None else wgmma
        self._constants = tuple(weights), bias
        self._kept: dict[tuple[torch.dtype, torch.device], dict[str, Tables]] = {}
        constants = [*weights, *([] if bias is None else [bias])]
        if constants:  # else dtype and device are known from the first input
            self._tables(constants[0].dtype, constants[0].device)
            self._constants = (), None

    def _tables(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tables]:
        key = dtype, device
        if key not in self._kept:
            if dtype not in _DTYPES:
                raise DSPShapeError(f"dtype {dtype} is none of float16, bfloat16, float32")
            weights, bias = self._constants
            self._kept[key] = {
                name: make_tables(KERNELS[name], self.spec, weights, bias, dtype, device)
                for name in self._kernels(dtype, device)
            }
        return self._kept[key]

    def _kernels(self, dtype: torch.dtype, device: torch.device) -> tuple[str, ...]:
        """What may be launched, in the order of ``_choose``."""
        if dtype == torch.float32:
            return (f"fp32_{self.layout.name.lower()}",)
        if self.layout == GpuLayout.NHWC:
            return ("nhwc",)
        spec = self.spec
        plain = (spec.stride, spec.dilation) == ((1, 1), (1, 1))
        plain = plain and spec.kernel_size == (3, 3)
        names = ("halo", "chwn") if plain else ("chwn",)
        if self._wgmma is False or not _can_use_wgmma(device):
            return names
        return ("wgmma_halo", "wgmma", *names) if plain else ("wgmma", *names)

    def __call__(self, x: Tensor, out: Tensor, residual: Tensor | None = None) -> None:
        """x, out, residual: see GpuConv. Raises DSPShapeError for tensors that do not fit each other."""
        shape = self._check(x, out, residual)
        if out.numel() == 0:
            return
        tables = self._choose(x, out)
        spec = self.spec
        sizes = [
            self._number(tables, out),
            tables.filters,
            tables.tile_count,
            tables.rows_at,
            tables.runs_at,
            tables.taps_at,
            tables.gather_at,
            *spec.stride,
            *spec.padding,
            list(ACTIVATIONS).index(spec.activation),
            *shape,
            spec.structure.out_channels,
            *spec.output_hw(shape[2:]),
        ]
        self._launch(x, out, residual, tables.weights, tables.bias, tables.table, sizes)

    def _number(self, tables: Tables, out: Tensor) -> int:
        """The kernel's number; in NHWC with four times the threads for a tile where there are few tiles."""
        positions = out.numel() // self.spec.structure.out_channels
        blocks = -(-positions // _NHWC_POSITIONS) * tables.tile_count
        few = tables.kind.name == "nhwc" and blocks < _FEW_BLOCKS
        return _NHWC_SLICED if few else tables.kind.number

    def _choose(self, x: Tensor, out: Tensor) -> Tables:
        """A halo kernel where it fills the chip, else the one of any convolution; wgmma where that pays."""
        kept = self._tables(x.dtype, x.device)
        chunks = out.numel() // self.spec.structure.out_channels // BATCH_MULTIPLE

        def fills(name: str) -> bool:
            if name not in kept:
                return False
            return chunks * kept[name].tile_count >= _FEW_BLOCKS * _CHUNKS[name, kept[name].filters]

        def pays(name: str, other: str) -> bool:
            if self._wgmma is not None:
                return self._wgmma and name in kept
            return fills(name) and _MMA_SHARE * kept[name].products <= kept[other].products

        if fills("wgmma_halo") and pays("wgmma_halo", "halo"):
            return kept["wgmma_halo"]
        if fills("halo") and not self._wgmma:
            return kept["halo"]
        if pays("wgmma", "chwn"):
            return kept["wgmma"]
        return next(tables for name, tables in kept.items() if "halo" not in name and name != "wgmma")

    def _check(self, x: Tensor, out: Tensor, residual: Tensor | None) -> tuple[int, int, int, int]:
        """(batch, in_channels, height, width) of x."""
        spec, name = self.spec, self.layout.name
        if x.dim() != 4:
            raise DSPShapeError(f"x has shape {tuple(x.shape)}; expected 4 dimensions in {name}")
        batch, channels, height, width = self.layout.as_nchw(x).shape
        if channels != spec.structure.in_channels:
            raise DSPShapeError(f"x has {channels} channels; expected {spec.structure.in_channels} in {name}")
        out_hw = spec.output_hw((height, width))
        expected = self.layout.shape((batch, spec.structure.out_channels, *out_hw))
        if (x.dtype, x.device) not in self._kept and self._constants == ((), None) and self._kept:
            known = ", ".join(f"{dtype} on {device}" for dtype, device in self._kept)
            raise DSPShapeError(f"x is {x.dtype} on {x.device}; the weights are {known}")
        for what, tensor in (("x", x), ("out", out), ("residual", residual)):
            if tensor is None:
                continue
            if what != "x" and tuple(tensor.shape) != expected:
                raise DSPShapeError(f"{what} has shape {tuple(tensor.shape)}; expected {expected} ({name})")
            if tensor.dtype != x.dtype or tensor.device != x.device:
                raise DSPShapeError(
                    f"{what} is {tensor.dtype} on {tensor.device}; x is {x.dtype} on {x.device}"
                )
            if not tensor.is_contiguous() or tensor.data_ptr() % 16:
                raise DSPShapeError(f"{what} is not contiguous in {name} from a multiple of 16 bytes on")
        if self.layout == GpuLayout.CHWN and batch % BATCH_MULTIPLE:
            raise DSPShapeError(
                f"batch {batch} is no multiple of {BATCH_MULTIPLE}; CHWN needs one, NHWC does not"
            )
        # The kernels count positions, and in CHWN pieces of 8 images, in 32 bits.
        pieces = x.numel() // BATCH_MULTIPLE if self.layout == GpuLayout.CHWN else 0
        positions = out.numel() // spec.structure.out_channels
        if max(height, width) > _LARGEST_SIDE or max(pieces, positions + 64) >= 2**31:
            raise DSPShapeError(
                f"an input of {batch} images of {channels}x{height}x{width} is too large for the CUDA kernels"
            )
        return batch, channels, height, width


def _asked_for_wgmma() -> bool | None:
    return {"0": False, "1": True}.get(os.environ.get("DSP_KERNELS_WGMMA", ""))


def _can_use_wgmma(device: torch.device) -> bool:
    return device.type == "cuda" and has_wgmma(device.index)
