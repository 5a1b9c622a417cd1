"""How far two correct computations of the same thing may differ. The one table; every check reads it here.

Rounding errors of a sum of K products grow like sqrt(K) (random signs), those of a chain of layers like
sqrt(depth). The factor is four standard deviations. All bounds are relative to the largest absolute output.
"""

from __future__ import annotations

import math

import torch

__all__ = ["ACCUMULATE", "network_tolerance", "op_tolerance"]

# dtype of tensors -> dtype in which a sum is accumulated.
ACCUMULATE: dict[torch.dtype, torch.dtype] = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
}
_DEVIATIONS = 4.0


def op_tolerance(dtype: torch.dtype, reduction: int) -> float:
    """For one convolution in which every output is a sum of ``reduction`` products.

    One rounding of the result to ``dtype`` and sqrt(reduction) roundings of the accumulator.
    """
    rounding = 0.0 if ACCUMULATE[dtype] == dtype else torch.finfo(dtype).eps
    return rounding + _DEVIATIONS * torch.finfo(ACCUMULATE[dtype]).eps * math.sqrt(max(reduction, 1))


def network_tolerance(dtype: torch.dtype, reduction: int, depth: int) -> float:
    """For ``depth`` layers, none of which sums more than ``reduction`` products per output.

    Each layer adds its own error, and folding rounds each weight once more.
    """
    per_layer = op_tolerance(dtype, reduction) + _DEVIATIONS * torch.finfo(dtype).eps
    return per_layer * math.sqrt(max(depth, 1))
