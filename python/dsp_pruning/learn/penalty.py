"""The group lasso of Dynamic Structure Pruning and its derivatives, as algebra of O x C matrices.

Shapes, here and in every function below (leading dimensions, equal on all arguments, are a batch):
    prob: [G, O], soft or hard assignment of O filters to G groups; each column sums to 1.
    p: ``Assigned(prob)``.
    weight: [O, C, kh, kw].
    energy: [O, C], sum of the squared weights of each kernel (``kernel_energy(weight)``).

With P = prob, M = energy:  n = sqrt(P^2 M) [G, C],  S_g = sum_o sqrt(P_go),  s_g = S_g^2,
    R = sum_g s_g sum_c n_gc        (paper, equation 3; derivatives: docs/notes/algorithm.md).
All functions are pure and work in float32 or float64. Every division is guarded by ``eps``, so that an
all-zero channel contributes 0.
"""

import math

import torch
from torch import Tensor

_EPS = 1e-8
_INPUT_UNIT = 16 * 32 * 32  # input elements of a layer whose scale has sqrt(input_size) = 1
_HALF = (torch.float16, torch.bfloat16)


class Assigned:
    """An assignment and its roots and squares, computed once for several formulas.

    prob, square = P^2, root = sqrt(P): [G, O]. total = S, size = s = S^2: [G, 1]; for a hard assignment s is
    the squared number of filters.
    """

    def __init__(self, prob: Tensor) -> None:
        self.prob, self.square, self.root = prob, prob.square(), prob.sqrt()
        self.total = self.root.sum(dim=-1, keepdim=True)
        self.size = self.total.square()


def assignment(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """Soft assignment [G, O] of logits and Gumbel noise [G, O]; the temperature divides the logits only."""
    return torch.softmax(logits / temperature + noise, dim=-2)


def hard_assignment(logits: Tensor) -> Tensor:
    """One-hot assignment [G, O] by the largest logit; ties go to the lowest group."""
    # argmax does not specify the order of ties, and CPU and CUDA differ.
    largest = logits == logits.amax(dim=-2, keepdim=True)
    return (largest & (largest.cumsum(dim=-2) == 1)).to(logits.dtype)


def layer_scale(
    in_channels: int,
    out_channels: int,
    kernel_size: tuple[int, int],
    input_hw: tuple[int, int],
    n_groups: int,
) -> float:
    """Weight of a layer in the penalty: sqrt(C * H * W / 16384) * sqrt(kh * kw) * (G / O)^1.5.

    For a square kernel the second root is the published k. input_hw: of one sample.
    """
    input_size = in_channels * input_hw[0] * input_hw[1] / _INPUT_UNIT
    side = (kernel_size[0] * kernel_size[1]) ** 0.5
    return math.sqrt(input_size) * side * (n_groups / out_channels) ** 1.5


def kernel_energy(weight: Tensor) -> Tensor:
    """M [O, C] of weight [O, C, kh, kw]: sum of squares of each kernel, in float32 or better."""
    return kernel_product(weight, weight)


def kernel_product(left: Tensor, right: Tensor) -> Tensor:
    """[O, C] of two tensors [O, C, kh, kw]: inner product of each kernel, in float32 or better."""
    return (at_least_float(left) * at_least_float(right)).sum(dim=(-2, -1))


def at_least_float(values: Tensor) -> Tensor:
    """Half precision as float32, because it has no room for small squares or for eps."""
    return values.float() if values.dtype in _HALF else values


def regulariser(p: Assigned, energy: Tensor) -> Tensor:
    """R, a scalar (per batch entry), without the layer scale."""
    return (p.size * _norm(p, energy)).sum(dim=(-2, -1))


def penalty_factor(p: Assigned, energy: Tensor, scale: float | Tensor = 1.0, eps: float = _EPS) -> Tensor:
    """[O, C]: scale * dR/dw = this factor * w for each kernel; scale * (P^2 diag(s))^T (1 / n)."""
    inverse = (_norm(p, energy) + eps).reciprocal()
    return _product(((scale * p.size) * p.square).mT, inverse)


def first_order(p: Assigned, energy: Tensor, eps: float = _EPS) -> Tensor:
    """F [G, O] = dR/dp at fixed weights, without the layer scale."""
    norm = _norm(p, energy)
    by_norm = p.size * p.prob * _product((norm + eps).reciprocal(), energy.mT)
    return by_norm + _size_slope(p, eps) * norm.sum(dim=-1, keepdim=True)


def second_order_exact(p: Assigned, energy: Tensor, product: Tensor, eps: float = _EPS) -> Tensor:
    """E [G, O] = d/dp <dR/dw(p, w), v> at fixed w and v.

    product: [O, C], ``kernel_product(w, v)`` of the weights and the direction.
    """
    # eps is a lower bound here, not an addend: 1 / sqrt(p) would amplify an addend.
    inverse = _norm(p, energy).clamp_min(eps).reciprocal()
    slope = _product(p.square, product) * inverse  # derivative of n along v
    by_size = p.total / p.root.clamp_min(eps) * slope.sum(dim=-1, keepdim=True)
    by_norm = 2 * _product(inverse, product.mT) - _product(slope * inverse.square(), energy.mT)
    return by_size + p.size * p.prob * by_norm


def second_order_original(p: Assigned, energy: Tensor, product: Tensor, eps: float = _EPS) -> Tensor:
    """Q [G, O]: the mixed term of the published implementation, which lacks the cross-filter terms."""
    inverse = (_norm(p, energy) + eps).reciprocal()
    along = _product(inverse, product.mT)  # sum over c, k of w v / n, [G, O]
    own = p.prob * _product(inverse, energy.mT)
    own_along = p.square * _product(inverse.square(), product.mT)
    by_norm = 2 * p.prob * along - own * own_along
    return _size_slope(p, eps) * p.square * along + p.size * by_norm


def logit_gradient(prob: Tensor, slope: Tensor, temperature: float) -> Tensor:
    """[G, O]: the gradient with respect to prob, propagated through the softmax to the logits."""
    centred = slope - (prob * slope).sum(dim=-2, keepdim=True)
    return prob * centred / temperature


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Matrix product; bmm, where possible, dispatches one operation instead of six."""
    return torch.bmm(left, right) if left.dim() == right.dim() == 3 else left @ right


def _norm(p: Assigned, energy: Tensor) -> Tensor:
    """n [G, C]: norm of each input channel within each group."""
    return _product(p.square, energy).sqrt()


def _size_slope(p: Assigned, eps: float) -> Tensor:
    """ds/dp [G, O], written so that a probability of 0 gives 0."""
    return p.root * p.size / (p.prob * p.total + eps)
