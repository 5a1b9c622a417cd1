"""The Triton kernel as a family of GPU kernels.

On the CPU it runs in Triton's interpreter: for tests, and never chosen by "auto".
"""

import importlib.util
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import astuple
from functools import cache, lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from dsp_kernels.op.spec import ConvSpec
from dsp_kernels.run.gpu.layout import (
    ACTIVATION_CODES,
    GPU_DTYPES,
    GpuConv,
    GpuLayout,
    check_conv_operands,
    uses_tf32,
    why_not_on,
)
from dsp_kernels.run.gpu.triton.config import (
    TritonConfig,
    candidates,
    choose,
    choose_packing,
    columns_in_l2,
)
from dsp_kernels.run.gpu.triton.tables import (
    MOST_CHANNELS,
    MOST_DX,
    MOST_DY,
    TritonTables,
    reads_runs,
    tables_for,
    writes_runs,
)
from dsp_kernels.run.gpu.tune import tuning

_INT32 = 1 << 31
# For 7.5 Triton compiles the kernel without tensor cores (triton 3.8); it does not compile for older ones.
_OLDEST = (7, 5)


@cache
def _why_no_triton(on_gpu: bool) -> str:
    """Importing triton is slow, and most processes never need it."""
    try:
        found = importlib.util.find_spec("triton")
    except ImportError:  # of an import hook that hides it
        found = None
    if found is None:
        return "triton is not installed (pip install triton)"
    compiler = os.environ.get("CC", "") or shutil.which("gcc") or shutil.which("clang")
    if on_gpu and not compiler:
        return "triton compiles its launchers with a C compiler, and there is none; install gcc or set CC"
    return ""


class TritonKernels:
    """float16, bfloat16 and float32; compute capability 8.0 or newer, or Triton's interpreter.

    float32 also on 7.5, where PyTorch's convolutions have no tensor cores either.
    """

    name = "triton"

    def can_run(
        self, spec: ConvSpec, dtype: torch.dtype, device: torch.device, layout: GpuLayout
    ) -> tuple[bool, str]:
        """On such a GPU or a CPU, if triton is installed."""
        if dtype not in GPU_DTYPES:
            return False, f"dtype {dtype} is not float16, bfloat16 or float32"
        if reason := self.why_not(device):
            return False, reason
        if device.type == "cuda" and dtype != torch.float32 and (reason := why_not_on(device.index)):
            return False, reason
        if spec.structure.in_channels > MOST_CHANNELS:
            return False, f"{spec.structure.in_channels} input channels are more than {MOST_CHANNELS}"
        reach = [d * (k - 1) for d, k in zip(spec.dilation, spec.kernel_size, strict=True)]
        if reach[0] > MOST_DY or reach[1] > MOST_DX:
            return False, f"the kernel reaches {reach} pixels; at most [{MOST_DY}, {MOST_DX}] are possible"
        return True, ""

    def why_not(self, device: torch.device) -> str:
        if device.type not in ("cuda", "cpu"):
            return f"tensors are on {device}"
        on_gpu = device.type == "cuda"
        return _why_no_triton(on_gpu) or (why_not_on(device.index, _OLDEST) if on_gpu else "")

    def is_worth(
        self, spec: ConvSpec, dtype: torch.dtype, device: torch.device, layout: GpuLayout
    ) -> tuple[bool, str]:
        return (True, "") if device.type == "cuda" else (False, "on the CPU it runs in Triton's interpreter")

    def options(
        self,
        spec: ConvSpec,
        weights: Sequence[Tensor],
        bias: Tensor | None,
        layout: GpuLayout,
        shape: Sequence[int],
    ) -> dict[str, Callable[[], GpuConv]]:
        """The rule's tile sizes; all that may be faster if DSP_KERNELS_TUNE is "all"."""
        prepare = partial(TritonConv, spec, weights, bias, layout)
        made: dict[str, Callable[[], GpuConv]] = {self.name: prepare}
        if weights and tuning() == "all":
            wide = layout is GpuLayout.CHWN or reads_runs(spec)
            sizes = shape[0], spec.output_hw(shape[2:])
            _, *others = candidates(spec, weights[0].dtype, layout, wide, *sizes)
            made |= {f"{self.name} {astuple(config)}": partial(prepare, config=config) for config in others}
        return made

    def prepare(
        self, spec: ConvSpec, weights: Sequence[Tensor], bias: Tensor | None, layout: GpuLayout
    ) -> GpuConv:
        return TritonConv(spec, weights, bias, layout)


class TritonConv:
    """One convolution with its weights packed, ready to launch.

    weights[g]: (O_g, C_g, kh, kw); bias: (out_channels,) or None; all on one device and of one dtype. config:
    tile sizes of every launch, instead of those that the rule chooses.
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
        self._configs: dict[tuple[torch.dtype, tuple[int, ...]], TritonConfig] = {}
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
            self.launch(self.config or self._config_for(x, out), x, out, residual)

    def _config_for(self, x: Tensor, out: Tensor) -> TritonConfig:
        key = x.dtype, tuple(x.shape)
        if key not in self._configs:
            batch, _, height, width = self.layout.as_nchw(out).shape
            kind = self.spec, x.dtype, self.layout, self.wide_in, self.packing(x.dtype)
            self._configs[key] = choose(*kind, batch, (height, width))
        return self._configs[key]

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
                PRECISION="tf32" if uses_tf32(x.dtype) else "ieee",
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


@lru_cache(maxsize=2)
def _kernel(interpreted: bool) -> Any:
    from dsp_kernels.run.gpu.triton.kernel import conv_kernel, conv_kernel_function

    if not interpreted or os.environ.get("TRITON_INTERPRET") == "1":
        return conv_kernel
    # Interprets this kernel only, not every Triton kernel of the process.
    from triton.runtime.interpreter import InterpretedFunction

    return InterpretedFunction(conv_kernel_function)
