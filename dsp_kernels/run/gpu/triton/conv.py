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
    GpuLayer,
    GpuLayout,
    uses_tf32,
    why_not_on,
)
from dsp_kernels.run.gpu.triton.config import TileRule, TritonConfig, columns_in_l2
from dsp_kernels.run.gpu.triton.tables import (
    MOST_CHANNELS,
    MOST_DX,
    MOST_DY,
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

    def can_run(self, spec: ConvSpec, dtype: torch.dtype, device: torch.device) -> tuple[bool, str]:
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

    def prepare(self, layer: GpuLayer) -> GpuConv:
        return TritonConv(layer)

    def options(self, layer: GpuLayer, shape: Sequence[int]) -> dict[str, Callable[[], GpuConv]]:
        """The rule's tile sizes; all that may be faster if DSP_KERNELS_TUNE is "all"."""
        made: dict[str, Callable[[], GpuConv]] = {self.name: partial(TritonConv, layer)}
        if tuning() == "all":
            _, *others = _rule_of(layer).candidates(shape[0], layer.spec.output_hw(shape[2:]))
            made |= {
                f"{self.name} {astuple(config)}": partial(TritonConv, layer, config) for config in others
            }
        return made


def _rule_of(layer: GpuLayer) -> TileRule:
    wide = layer.layout is GpuLayout.CHWN or reads_runs(layer.spec)
    return TileRule(layer.spec, layer.dtype, layer.layout, wide)


class TritonConv:
    """One convolution with its weights packed, ready to launch.

    config: tile sizes of every launch, instead of those that the rule chooses.
    """

    def __init__(self, layer: GpuLayer, config: TritonConfig | None = None) -> None:
        self._layer, self._config = layer, config
        self._rule = _rule_of(layer)
        self._writes_runs = layer.layout is GpuLayout.NHWC and writes_runs(layer.spec)
        self._configs: dict[tuple[int, ...], TritonConfig] = {}
        filters, bk = (config.filters, config.bk) if config else self._rule.packing
        self._tables = tables_for(layer.spec, layer.layout, filters, bk, layer.device)
        zero = torch.zeros(1, dtype=layer.dtype, device=layer.device)
        flat = [*(weight.detach().reshape(-1) for weight in layer.weights), zero]
        self._weights = torch.cat(flat)[self._tables.weight_index.long()]
        bias = torch.zeros(layer.spec.structure.out_channels + 1, device=layer.device)
        if layer.bias is not None:
            bias[:-1] = layer.bias.detach()
        self._bias = bias[self._tables.bias_index.long()]

    def __call__(self, x: Tensor, out: Tensor, residual: Tensor | None = None) -> None:
        """See ``GpuConv``. Raises DSPShapeError for tensors that do not fit."""
        batch, _, in_h, in_w = shape = self._layer.check(x, out, residual)
        if not out.numel():
            return
        spec, tables = self._layer.spec, self._tables
        out_channels, (out_h, out_w) = spec.structure.out_channels, spec.output_hw((in_h, in_w))
        if shape not in self._configs:
            self._configs[shape] = self._config or self._rule.choose(batch, (out_h, out_w))
        config, pixels = self._configs[shape], out_h * out_w
        if config.chwn:
            col_tiles = batch // config.images * -(-pixels // (config.cols // config.images))
        else:
            col_tiles = -(-batch * pixels // config.cols)
        n_tiles = len(tables.tiles)
        interpreted = x.device.type == "cpu"
        with nullcontext() if interpreted else torch.cuda.device(x.device):
            _kernel(interpreted)[(n_tiles * col_tiles,)](
                *(x, out, out if residual is None else residual, self._weights, self._bias),
                *(tables.k, tables.tiles, tables.filters),
                *(n_tiles, col_tiles),
                min(col_tiles, columns_in_l2(config, spec, x.element_size())),
                *(batch, spec.structure.in_channels, out_channels, in_h, in_w, out_h, out_w),
                *spec.stride,
                *spec.padding,
                POINTWISE=spec.kernel_size == (1, 1),
                WIDE_IN=self._rule.wide and not config.chwn,
                WIDE_OUT=self._writes_runs,
                BIG=max(x.numel(), out.numel()) >= _INT32,
                HAS_RESIDUAL=residual is not None,
                ACTIVATION=ACTIVATION_CODES[spec.activation],
                PRECISION="tf32" if uses_tf32(x.dtype) else "ieee",
                EXACT=interpreted and x.dtype == torch.bfloat16,
                **config.constants(),
                **({} if interpreted else config.options()),
            )


@lru_cache(maxsize=2)
def _kernel(interpreted: bool) -> Any:
    from dsp_kernels.run.gpu.triton.kernel import conv_kernel, conv_kernel_function

    if not interpreted or os.environ.get("TRITON_INTERPRET") == "1":
        return conv_kernel
    # Interprets this kernel only, not every Triton kernel of the process.
    from triton.runtime.interpreter import InterpretedFunction

    return InterpretedFunction(conv_kernel_function)
