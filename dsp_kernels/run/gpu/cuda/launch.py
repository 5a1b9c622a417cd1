"""What one launch of a CUDA kernel is told: the structs of csrc/cuda/params.h, field by field.

The library has its own list of these names, of all enums and of the kernels; ``interface`` is Python's, and
library.py compares the two when it loads the library.
"""

from collections import namedtuple
from typing import Any

import torch
from torch import Tensor

from dsp_kernels.errors import DSPBackendError
from dsp_kernels.run.gpu.cuda.blocks.step import MOST_CONVS
from dsp_kernels.run.gpu.cuda.kernels import KERNELS, LARGEST_SIDE, OUTSIDE
from dsp_kernels.run.gpu.layout import ACTIVATION_CODES

# Of the division in csrc/cuda/block_kernel.cuh.
MOST_CHUNKS, LARGEST_DIVISOR = 4095, 256
KERNEL_CODES = {name: code for code, name in enumerate(KERNELS)}
RESIDUAL_CODES = {"none": 0, "input": 1, "tensor": 2}

# One convolution; int, like the fields of all of these.
ConvSizes = namedtuple(
    "ConvSizes",
    "kernel filters tile_count rows_at runs_at taps_at gather_at stride_y stride_x pad_y pad_x activation "
    "batch in_channels height width out_channels out_height out_width",
)
# A tile of one feature map in shared memory; sizes in pixels, offset and channel_bytes in bytes.
BlockRegion = namedtuple(
    "BlockRegion",
    "offset channel_bytes rows columns height width step_y step_x shift_y shift_x slots kept by_column",
)
# One convolution of a block.
BlockConv = namedtuple("BlockConv", "tile_count tiles_at first_row stride_y stride_x activation")
# A residual block; regions, convs: tuples of these, MOST_CONVS + 1 and MOST_CONVS long.
BlockSizes = namedtuple(
    "BlockSizes",
    "filters batch in_channels out_channels tile_n turns shared_bytes conv_count residual_kind channels_at "
    "targets_at residuals_at table_size shortcut_stride_y shortcut_stride_x by_tile_n regions convs",
)


def launch_op(
    x: Tensor,
    out: Tensor,
    residual: Tensor | None,
    weights: Tensor,
    bias: Tensor,
    tables: Tensor,
    sizes: ConvSizes | BlockSizes,
) -> None:
    """Runs cuda_conv or cuda_block of torch.ops.dsp_kernels on the current stream; writes ``out``.

    Raises DSPBackendError for what the op refuses, with its reason.
    """
    op = "cuda_conv" if isinstance(sizes, ConvSizes) else "cuda_block"
    try:
        getattr(torch.ops.dsp_kernels, op)(x, out, residual, weights, bias, tables, _numbers(sizes))
    except RuntimeError as error:
        raise DSPBackendError(f"{op}: {error}; it was launched with {describe(sizes)}") from error


def _numbers(sizes: Any) -> list[int]:
    """The fields of a struct and of those in it, in order."""
    flat: list[int] = []
    for value in sizes:
        if isinstance(value, tuple):
            flat += _numbers(value)
        else:
            flat.append(value)
    return flat


def describe(sizes: Any) -> str:
    """The struct of a launch as text: the name and value of every field; enums by name.

    >>> describe(BlockConv(2, 0, 64, 1, 1, 1))
    'tile_count=2 tiles_at=0 first_row=64 stride_y=1 stride_x=1 activation=relu'
    """
    enums = {"kernel": KERNEL_CODES, "activation": ACTIVATION_CODES, "residual_kind": RESIDUAL_CODES}
    parts = []
    for name, value in sizes._asdict().items():
        if isinstance(value, tuple):
            parts += [f"\n  {name}[{i}]: {describe(each)}" for i, each in enumerate(value) if any(each)]
        else:
            parts.append(f"{name}={list(enums[name])[value] if name in enums else value}")
    return " ".join(parts)


def interface() -> str:
    """As dsp_kernels_interface of csrc/cuda/op.cpp writes it."""
    limits = {
        "kOutside": OUTSIDE >> 16,
        "kLargestSide": LARGEST_SIDE,
        "kMostConvs": MOST_CONVS,
        "kMostChunks": MOST_CHUNKS,
        "kLargestDivisor": LARGEST_DIVISOR,
    }
    names = {
        "Kernel": KERNEL_CODES,
        "Activation": ACTIVATION_CODES,
        "Residual": RESIDUAL_CODES,
        "ConvSizes": ConvSizes._fields,
        "BlockSizes": BlockSizes._fields[:-2],
        "BlockRegion": BlockRegion._fields,
        "BlockConv": BlockConv._fields,
        "limits": [f"{name}={value}" for name, value in limits.items()],
    }
    lines = [f"{title}: {' '.join(each)}" for title, each in names.items()]
    for kind in KERNELS.values():
        dtypes = ("float32",) if "fp32" in kind.name else ("float16", "bfloat16")
        lines += [
            f"{kind.name} {dtype} filters={filters} rows={kind.rows} weights={kind.order}"
            for dtype in dtypes
            for filters in kind.filters
        ]
    return "\n".join(lines) + "\n"
