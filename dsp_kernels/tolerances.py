"""The largest allowed difference between two correct computations of the same result.

Rounding errors of a sum of K products grow like sqrt(K) (random signs), those of a chain of layers like
sqrt(depth). The factor is four standard deviations. All bounds are relative to the largest absolute output.
"""

import math

import torch

# dtype of tensors -> dtype of the accumulator.
ACCUMULATE: dict[torch.dtype, torch.dtype] = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
}
# Products that the native float16 kernels add in float16 before they are added to a float32 accumulator.
HALF_TERMS = 64
_DEVIATIONS = 4.0


def op_tolerance(dtype: torch.dtype, reduction: int) -> float:
    """For one convolution whose outputs are sums of ``reduction`` products.

    One rounding of the result to ``dtype``, and sqrt(reduction) roundings of the accumulator.
    """
    rounding = 0.0 if ACCUMULATE[dtype] == dtype else torch.finfo(dtype).eps
    return rounding + _DEVIATIONS * torch.finfo(ACCUMULATE[dtype]).eps * math.sqrt(max(reduction, 1))


def half_sums_tolerance(reduction: int) -> float:
    """As ``op_tolerance``, for float16 products that are summed HALF_TERMS at a time in float16.

    Of n terms of random signs, the i-th partial sum is about sqrt(i / n) of the whole; rounding it adds an
    error of at most eps / 2 of that, eps / sqrt(12) in the root mean square. Together: eps / 2 * sqrt(n / 6).
    A longer sum has the same relative error, because the errors of its parts are independent.
    """
    eps = torch.finfo(torch.float16).eps
    parts = _DEVIATIONS * eps / 2 * math.sqrt(min(max(reduction, 1), HALF_TERMS) / 6)
    return parts + op_tolerance(torch.float32, reduction)


def network_tolerance(dtype: torch.dtype, reduction: int, depth: int, half_sums: bool = False) -> float:
    """For ``depth`` layers whose outputs are sums of at most ``reduction`` products.

    Folding rounds each weight once more. half_sums: see ``half_sums_tolerance``.
    """
    layer = op_tolerance(dtype, reduction)
    if half_sums:
        layer = max(layer, half_sums_tolerance(reduction))
    per_layer = layer + _DEVIATIONS * torch.finfo(dtype).eps
    return per_layer * math.sqrt(max(depth, 1))
