"""The Triton kernel as triton compiles it for sm_80, run by the PTX interpreter on the CPU."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from typing import Any
from unittest import mock

import torch
import triton
from cases import Case
from gpu_checks import check_conv, layer_of, solved
from ptx.interpreter import Interpreter
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dsp_kernels.run.gpu.layout import GpuLayout
from dsp_kernels.run.gpu.triton import conv as triton_conv
from dsp_kernels.run.gpu.triton.config import TritonConfig, config_of, tile_sizes
from dsp_kernels.run.gpu.triton.kernel import INTEGER_ARGUMENTS, conv_kernel_function

_TYPES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
_POINTERS = ("x_ptr", "out_ptr", "residual_ptr", "w_ptr", "bias_ptr", "k_ptr", "tile_ptr", "filter_ptr")
_FUNCTION = triton.runtime.jit.JITFunction(conv_kernel_function, do_not_specialize=list(INTEGER_ARGUMENTS))


def compiled(
    dtype: torch.dtype, constants: Mapping[str, Any], capability: int, options: Mapping[str, Any]
) -> Any:
    """The kernel for tensors of a dtype, compiled by triton for a GPU that need not be there."""
    names = _FUNCTION.arg_names
    element = _TYPES[dtype]
    types = {name: "i32" if name in INTEGER_ARGUMENTS else "constexpr" for name in names}
    types |= dict(zip(_POINTERS, [element] * 4 + ["*fp32"] + ["*i32"] * 3, strict=True))
    source = ASTSource(
        _FUNCTION,
        types,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in _POINTERS},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(options))


class _Kernel:
    """Stands for the jitted kernel: ``kernel[grid](*arguments, **constants)``."""

    def __init__(self, ptx: Interpreter) -> None:
        self._ptx = ptx

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*arguments: Any, **constants: Any) -> None:
            # EXACT is for Triton's own interpreter; the interpreter of PTX has no TF32.
            tensors = dict(zip(_POINTERS, arguments, strict=False))
            constants |= {"EXACT": False, "PRECISION": "ieee"}
            binary = compiled(arguments[0].dtype, constants, 80, {"num_warps": 4, "num_stages": 3})
            inputs = {name: t for name, t in tensors.items() if name != "out_ptr"}
            if not constants["HAS_RESIDUAL"]:
                del inputs["residual_ptr"]
            threads = 32 * binary.metadata.num_warps
            with self._ptx.checked(inputs, {"out_ptr": tensors["out_ptr"]}):
                self._ptx.launch(binary.asm["ptx"], grid[0], threads, binary.metadata.shared, arguments)

        return launch


@contextmanager
def triton_on_host() -> Iterator[Interpreter]:
    """TritonConv runs the PTX of sm_80."""
    ptx = Interpreter("sm_80")
    with mock.patch.object(triton_conv, "_kernel", return_value=_Kernel(ptx)):
        yield ptx


def triton_case(case: Case, dtype: torch.dtype, layout: GpuLayout) -> None:
    batch = 8 if layout is GpuLayout.CHWN and case.batch % 8 else case.batch
    case = replace(case, batch=batch)
    conv, _ = triton_conv.TritonConv(layer_of(case, layout, dtype)), solved(case, dtype)
    with triton_on_host() as ptx:
        check_conv(conv, case, dtype, layout)
    assert len(ptx.launches) == (batch > 0)


def shipped() -> Iterator[tuple[str, TritonConfig, torch.dtype, dict[str, bool]]]:
    """Every configuration that the rule can choose, at batch 256: (name, configuration, dtype, flags)."""
    for layout, wide in ((GpuLayout.CHWN, True), (GpuLayout.NHWC, True), (GpuLayout.NHWC, False)):
        kind = layout.name if wide else f"{layout.name} by channel"
        flags: dict[str, bool] = {"WIDE_IN": False, "WIDE_OUT": False}
        if layout is GpuLayout.NHWC:
            flags = {"WIDE_IN": wide, "WIDE_OUT": wide}
        for dtype in (torch.float16, torch.float32):
            for pointwise in (False, True) if dtype == torch.float16 else (False,):
                name = f"{kind} {'1x1' if pointwise else 'k x k'}"
                for cols, filters, bk in product(*tile_sizes(wide, dtype)):
                    config = config_of(layout, pointwise, cols, filters, bk, 256)
                    yield name, config, dtype, {**flags, "POINTWISE": pointwise}
