"""The Triton kernel as a family of GPU kernels.

On the CPU it runs in Triton's interpreter: for tests, and never chosen by "auto".
"""

import importlib.util
import os
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dsp_kernels.op.spec import ConvSpec
from dsp_kernels.run.gpu.graphs import is_capturing
from dsp_kernels.run.gpu.layout import (
    ACTIVATION_CODES,
    GPU_DTYPES,
    GpuConv,
    GpuLayout,
    check_conv_operands,
    why_not_on,
)
from dsp_kernels.run.gpu.triton.config import TritonConfig, choose, choose_packing, columns_in_l2
from dsp_kernels.run.gpu.triton.tables import (
    MOST_CHANNELS,
    MOST_DX,
    MOST_DY,
    TritonTables,
    reads_runs,
    tables_for,
    writes_runs,
)
from dsp_kernels.run.gpu.triton.tune import kept_config

_INT32 = 1 << 31


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    """Whether it is installed; importing it is slow, and most processes never need it."""
    try:
        return importlib.util.find_spec("triton") is not None
    except ImportError:  # of an import hook that hides it
        return False


class TritonKernels:
    """float16, bfloat16 and float32; compute capability 8.0 or newer, or Triton's interpreter."""

    name = "triton"

    def can_run(
        self, spec: ConvSpec, dtype: torch.dtype, device: torch.device, layout: GpuLayout
    ) -> tuple[bool, str]:
        """On such a GPU or a CPU, if triton is installed."""
        if device.type not in ("cuda", "cpu"):
            return False, f"tensors are on {device}"
        if dtype not in GPU_DTYPES:
            return False, f"dtype {dtype} is not float16, bfloat16 or float32"
        if not _has_triton():
            return False, "triton is not installed"
        if device.type == "cuda" and (reason := why_not_on(device.index)):
            return False, reason
        if spec.structure.in_channels > MOST_CHANNELS:
            return False, f"{spec.structure.in_channels} input channels are more than {MOST_CHANNELS}"
        reach = [d * (k - 1) for d, k in zip(spec.dilation, spec.kernel_size, strict=True)]
        if reach[0] > MOST_DY or reach[1] > MOST_DX:
            return False, f"the kernel reaches {reach} pixels; at most [{MOST_DY}, {MOST_DX}] are possible"
        return True, ""

    def is_worth(
        self, spec: ConvSpec, dtype: torch.dtype, device: torch.device, layout: GpuLayout
    ) -> tuple[bool, str]:
        return (True, "") if device.type == "cuda" else (False, "on the CPU it runs in Triton's interpreter")

    def prepare(
        self, spec: ConvSpec, weights: Sequence[Tensor], bias: Tensor | None, layout: GpuLayout
    ) -> GpuConv:
        return TritonConv(spec, weights, bias, layout)


class TritonConv:
    """One convolution with its weights packed, ready to launch.

    weights[g]: (O_g, C_g, kh, kw); bias: (out_channels,) or None; all on one device and of one dtype. config:
    tile sizes of every launch, instead of those that the rule or tuning chose.
    """

    def __init__(
        self,
        spec: ConvSpec,
        weights: Sequence[Tensor],
        bias: Tensor | None,
        layout: GpuLayout,
        config: TritonConfig | None = None,
    ) -> None:
        spec.check_constants(weights, bias)
        self.spec, self.layout, self.config = spec, layout, config
        constant = next(iter(weights), bias)
        self._kind = None if constant is None else (constant.dtype, constant.device)
        self._flat = [weight.detach().reshape(-1) for weight in weights]
        self._bias = None if bias is None else bias.detach().float()
        self.wide_in = layout is GpuLayout.CHWN or reads_runs(spec)
        self.wide_out = layout is GpuLayout.NHWC and writes_runs(spec)
        self._configs: dict[tuple[torch.dtype, tuple[int, ...], bool], TritonConfig] = {}
        self._packed: dict[tuple[int, int], tuple[TritonTables, Tensor, Tensor]] = {}
        if self._kind:
            self._pack(*self._kind, self.packing(self._kind[0]))

    def packing(self, dtype: torch.dtype) -> tuple[int, int]:
        if self.config is not None:
            return self.config.filters, self.config.bk
        return choose_packing(self.spec, dtype, self.wide_in)

    def __call__(self, x: Tensor, out: Tensor, residual: Tensor | None = None) -> None:
        """See ``GpuConv``. Raises DSPShapeError for tensors that do not fit."""
        dtype, device = self._kind or (x.dtype, x.device)
        check_conv_operands(self.spec, self.layout, x, out, residual, dtype, device)
        if out.numel():
            self.launch(self.config or self._config_for(x, out, residual), x, out, residual)

    def remember(self, x: Tensor, residual: Tensor | None, config: TritonConfig) -> None:
        """Use this configuration for such inputs from now on."""
        self._configs[x.dtype, tuple(x.shape), residual is not None] = config

    def _config_for(self, x: Tensor, out: Tensor, residual: Tensor | None) -> TritonConfig:
        known = self._configs.get((x.dtype, tuple(x.shape), residual is not None))
        if known is not None:
            return known
        batch, _, height, width = self.layout.as_nchw(out).shape
        packing = self.packing(x.dtype)
        config = choose(self.spec, x.dtype, self.layout, self.wide_in, packing, batch, (height, width))
        # During a capture nothing is measured, packed or remembered.
        if x.device.type == "cuda" and not is_capturing(x.device):
            config = kept_config(self, x, out, residual) or config
            self.remember(x, residual, config)
        return config

    def launch(self, config: TritonConfig, x: Tensor, out: Tensor, residual: Tensor | None) -> None:
        """One launch on the current stream of x's device, without checks."""
        batch, _, in_h, in_w = self.layout.as_nchw(x).shape
        _, out_channels, out_h, out_w = self.layout.as_nchw(out).shape
        tables, weights, bias = self._pack(x.dtype, x.device, (config.filters, config.bk))
        pixels = out_h * out_w
        if config.chwn:
            col_tiles = batch // config.images * -(-pixels // (config.cols // config.images))
        else:
            col_tiles = -(-batch * pixels // config.cols)
        n_tiles = len(tables.tiles)
        grid = (n_tiles * col_tiles,)
        interpreted = x.device.type == "cpu"
        with nullcontext() if interpreted else torch.cuda.device(x.device):
            _kernel(interpreted)[grid](
                *(x, out, out if residual is None else residual, weights, bias),
                *(tables.k, tables.tiles, tables.filters),
                *(n_tiles, col_tiles),
                min(col_tiles, columns_in_l2(config, self.spec, x.element_size())),
                *(batch, self.spec.structure.in_channels, out_channels, in_h, in_w, out_h, out_w),
                *self.spec.stride,
                *self.spec.padding,
                POINTWISE=self.spec.kernel_size == (1, 1),
                WIDE_IN=self.layout is GpuLayout.NHWC and self.wide_in,
                WIDE_OUT=self.wide_out,
                BIG=max(x.numel(), out.numel()) >= _INT32,
                HAS_RESIDUAL=residual is not None,
                ACTIVATION=ACTIVATION_CODES[self.spec.activation],
                PRECISION=_precision(x.dtype),
                EXACT=interpreted and x.dtype == torch.bfloat16,
                **config.constants(),
                **({} if interpreted else config.options()),
            )

    def _pack(
        self, dtype: torch.dtype, device: torch.device, packing: tuple[int, int]
    ) -> tuple[TritonTables, Tensor, Tensor]:
        """Tables, packed weights and packed bias of a tile size."""
        if packing not in self._packed:
            tables = tables_for(self.spec, self.layout, *packing, device)
            zero = torch.zeros(1, dtype=dtype, device=device)
            weights = torch.cat([*self._flat, zero])[tables.weight_index.long()]
            bias = torch.zeros(self.spec.structure.out_channels + 1, device=device)
            if self._bias is not None:
                bias[:-1] = self._bias
            self._packed[packing] = (tables, weights, bias[tables.bias_index.long()])
        return self._packed[packing]


def _precision(dtype: torch.dtype) -> str:
    """IEEE float32, unless torch allows tf32 in matrix products (``fp32_precision``)."""
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


@lru_cache(maxsize=2)
def _kernel(interpreted: bool) -> Any:
    from dsp_kernels.run.gpu.triton.kernel import conv_kernel, conv_kernel_function

    if not interpreted or os.environ.get("TRITON_INTERPRET") == "1":
        return conv_kernel
    # Interprets this kernel only, not every Triton kernel of the process.
    from triton.runtime.interpreter import InterpretedFunction

    return InterpretedFunction(conv_kernel_function)
