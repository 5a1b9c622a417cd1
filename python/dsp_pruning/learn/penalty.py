"""The group lasso of Dynamic Structure Pruning and its derivatives, as algebra of O x C matrices.

Shapes, here and in every function below (leading dimensions, the same on every argument, are a batch):
    prob: [G, O], soft or hard assignment of O filters to G groups; each column sums to 1.
    weight: [O, C, kh, kw].
    energy: [O, C], sum of the squared weights of one kernel (``kernel_energy(weight)``).

With P = prob, M = energy:  n = sqrt(P^2 M) [G, C],  S_g = sum_o sqrt(P_go),  s_g = S_g^2,
    R = sum_g s_g sum_c n_gc        (paper, equation 3; golden README section 4, step 3).
All functions are pure and work in float32 or float64. Every division is guarded by ``eps``, so that an
all-zero channel contributes 0; the default is that of the golden files. Where several formulas take the same
assignment, ``Assigned(prob)`` in its place spares each of them its roots and squares.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "LASSO_EPS",
    "Assigned",
    "assignment",
    "at_least_float",
    "first_order",
    "hard_assignment",
    "kernel_energy",
    "kernel_product",
    "lasso",
    "layer_scale",
    "logit_gradient",
    "penalty",
    "penalty_factor",
    "regulariser",
    "second_order_exact",
    "second_order_original",
]

LASSO_EPS = 1e-8
_INPUT_UNIT = 16 * 32 * 32  # input elements of a layer whose scale has sqrt(input_size) = 1
_HALF = (torch.float16, torch.bfloat16)


class Assigned:
    """An assignment and what every formula takes of it.

    prob, square = P^2, root = sqrt(P): [G, O]. total = S, size = s = S^2: [G, 1]; where the assignment is
    hard, s is the number of filters, squared.
    """

    def __init__(self, prob: Tensor) -> None:
        self.prob, self.square, self.root = prob, prob.square(), prob.sqrt()
        self.total = self.root.sum(dim=-1, keepdim=True)
        self.size = self.total.square()


def assignment(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """Soft assignment [G, O] of logits [G, O] and Gumbel noise [G, O]; the noise is not divided by it."""
    return torch.softmax(logits / temperature + noise, dim=-2)


def hard_assignment(logits: Tensor) -> Tensor:
    """One-hot assignment [G, O] of logits [G, O] by the largest; of equal ones the lowest group wins."""
    # argmax promises no order among equals, and its choice differs between CPU and CUDA.
    largest = logits == logits.amax(dim=-2, keepdim=True)
    return (largest & (largest.cumsum(dim=-2) == 1)).to(logits.dtype)


def layer_scale(
    in_channels: int, out_channels: int, kernel_size: float, input_hw: tuple[int, int], n_groups: int
) -> float:
    """Weight of a layer in the penalty: sqrt(input_size) * k * (G / O)^1.5 (golden README section 4, step 3).

    kernel_size: k of a square kernel; the root of height times width of any other.
    input_hw: height and width of one sample's input map; input_size = C * H * W / 16384.
    """
    input_size = in_channels * input_hw[0] * input_hw[1] / _INPUT_UNIT
    return math.sqrt(input_size) * kernel_size * (n_groups / out_channels) ** 1.5


def kernel_energy(weight: Tensor) -> Tensor:
    """M [O, C] of weight [O, C, kh, kw]: sum of squares of each kernel, at least in float32."""
    return kernel_product(weight, weight)


def kernel_product(left: Tensor, right: Tensor) -> Tensor:
    """[O, C] of two tensors [O, C, kh, kw]: inner product of each kernel, at least in float32."""
    return (at_least_float(left) * at_least_float(right)).sum(dim=(-2, -1))


def at_least_float(values: Tensor) -> Tensor:
    """The values in float32 or better: half precision has no room for small squares, nor for eps."""
    return values.float() if values.dtype in _HALF else values


def lasso(prob: Tensor | Assigned, energy: Tensor) -> Tensor:
    """n [G, C]: norm of each input channel within each group."""
    return _product(_assigned(prob).square, energy).sqrt()


def regulariser(prob: Tensor | Assigned, energy: Tensor) -> Tensor:
    """R, a scalar (per batch entry), without the layer scale."""
    p = _assigned(prob)
    return (p.size * lasso(p, energy)).sum(dim=(-2, -1))


def penalty_factor(
    prob: Tensor | Assigned, energy: Tensor, scale: float | Tensor = 1.0, eps: float = LASSO_EPS
) -> Tensor:
    """[O, C]: what each kernel is multiplied with to give the penalty, scale * (P^2 diag(s))^T (1 / n)."""
    p = _assigned(prob)
    inverse = (lasso(p, energy) + eps).reciprocal()
    return _product(((scale * p.size) * p.square).mT, inverse)


def penalty(prob: Tensor | Assigned, weight: Tensor, scale: float = 1.0, eps: float = LASSO_EPS) -> Tensor:
    """P [O, C, kh, kw] = scale * dR/dw, in the weight's dtype."""
    factor = penalty_factor(prob, kernel_energy(weight), scale, eps)
    return weight * factor.to(weight.dtype)[..., None, None]


def first_order(prob: Tensor | Assigned, energy: Tensor, eps: float = LASSO_EPS) -> Tensor:
    """F [G, O] = dR/dp at fixed weights, without the layer scale (golden README section 4, step 6)."""
    p = _assigned(prob)
    norm = lasso(p, energy)
    by_norm = p.size * p.prob * _product((norm + eps).reciprocal(), energy.mT)
    return by_norm + _size_slope(p, eps) * norm.sum(dim=-1, keepdim=True)


def second_order_exact(
    prob: Tensor | Assigned, energy: Tensor, product: Tensor, eps: float = LASSO_EPS
) -> Tensor:
    """E [G, O] = d/dp <dR/dw(p, w), v> at fixed w and v (golden README section 4b).

    product: [O, C], ``kernel_product(w, v)`` of the weights and the direction.
    """
    p = _assigned(prob)
    # Here eps is a floor, not an addend: above it the term is exact, and 1 / sqrt(p) makes an addend visible.
    inverse = lasso(p, energy).clamp_min(eps).reciprocal()
    slope = _product(p.square, product) * inverse  # derivative of n along v
    by_size = p.total / p.root.clamp_min(eps) * slope.sum(dim=-1, keepdim=True)
    by_norm = 2 * _product(inverse, product.mT) - _product(slope * inverse.square(), energy.mT)
    return by_size + p.size * p.prob * by_norm


def second_order_original(
    prob: Tensor | Assigned, energy: Tensor, product: Tensor, eps: float = LASSO_EPS
) -> Tensor:
    """Q [G, O]: the mixed term as the original has it (golden README section 4, step 7), for comparison only.

    It is not the derivative: the cross-filter terms are missing. Arguments as in ``second_order_exact``.
    """
    p = _assigned(prob)
    inverse = (lasso(p, energy) + eps).reciprocal()
    along = _product(inverse, product.mT)  # sum over c, k of w v / n, [G, O]
    own = p.prob * _product(inverse, energy.mT)
    own_along = p.square * _product(inverse.square(), product.mT)
    by_norm = 2 * p.prob * along - own * own_along
    return _size_slope(p, eps) * p.square * along + p.size * by_norm


def logit_gradient(prob: Tensor, slope: Tensor, temperature: float) -> Tensor:
    """[G, O]: a gradient with respect to prob, carried through the softmax to the logits."""
    centred = slope - (prob * slope).sum(dim=-2, keepdim=True)
    return prob * centred / temperature


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Matrix product; of one batch dimension in one operation, where ``@`` dispatches six."""
    return torch.bmm(left, right) if left.dim() == right.dim() == 3 else left @ right


def _assigned(prob: Tensor | Assigned) -> Assigned:
    return prob if isinstance(prob, Assigned) else Assigned(prob)


def _size_slope(p: Assigned, eps: float) -> Tensor:
    """D [G, O] = ds/dp, written so that a probability of 0 gives 0."""
    return p.root * p.size / (p.prob * p.total + eps)
