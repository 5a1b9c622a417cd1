"""The call of the CUDA kernels' ops, which csrc/cuda registers in the order of these arguments."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dsp_kernels.errors import DSPBackendError

__all__ = ["Launch", "launch_op"]

# (x, out, residual, weights, bias, tables, sizes); sizes: see csrc/common/launch_plan.h, block_plan.h
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
