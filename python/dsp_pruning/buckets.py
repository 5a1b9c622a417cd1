"""Layers of one shape as a batch: what the learner computes is then a few operations for all of them.

Shapes, with L layers in a bucket: weight [L, O, C, kh, kw], energy [L, O, C], logits and prob [L, G, O].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dsp_pruning import penalty as terms
from dsp_pruning.layers import LayerInfo
from dsp_pruning.logits import at_least_float

__all__ = ["Bucket", "LearnedLayer", "make_buckets"]


@dataclass(frozen=True)
class LearnedLayer:
    """A layer that learns groups.

    logits: [G, O], ``<conv>.group``. scale: of its penalty. param_group: the optimizer's, of its weight.
    """

    info: LayerInfo
    weight: Tensor
    logits: nn.Parameter
    scale: float
    param_group: int


@dataclass
class Bucket:
    """Layers of one shape, number of groups, dtype, device and optimizer group.

    scale: [L, 1, 1]. strength: [L, 1, 1], lambda * scale of the present step. prob: of the present step. They
    keep their memory from step to step, so that a CUDA graph that reads them can be replayed.
    """

    layers: list[LearnedLayer]
    scale: Tensor
    strength: Tensor
    prob: Tensor | None = field(default=None)

    @property
    def shape(self) -> torch.Size:
        """Of the logits: [L, G, O]."""
        return torch.Size((len(self.layers), *self.layers[0].logits.shape))

    @property
    def param_group(self) -> int:
        """Index of the optimizer's group that holds these weights."""
        return self.layers[0].param_group

    def start(self, noise: Tensor, temperature: float, strength: float | Tensor) -> None:
        """Draw the soft assignment of this step. noise: [L, G, O]; strength: reg * lr * ramp."""
        logits = self.logits()
        prob = terms.assignment(logits, noise.to(logits), temperature)
        if self.prob is None or self.prob.dtype != prob.dtype or self.prob.device != prob.device:
            self.prob = prob
            self.scale, self.strength = self.scale.to(prob), self.strength.to(prob)
        else:
            self.prob.copy_(prob)
        torch.mul(self.scale, strength, out=self.strength)

    def assigned(self) -> Tensor:
        """The soft assignment that ``start`` drew."""
        assert self.prob is not None
        return self.prob

    def logits(self) -> Tensor:
        """[L, G, O], at least float32."""
        return at_least_float(_stacked([layer.logits for layer in self.layers]))

    def weight(self) -> Tensor:
        """[L, O, C, kh, kw], a copy where there is more than one layer."""
        return _stacked([layer.weight for layer in self.layers])

    def energy(self) -> Tensor:
        """[L, O, C] of the present weights."""
        return terms.kernel_energy(self.weight())

    def shrinkage(self, prob: Tensor, energy: Tensor) -> Tensor:
        """[L, O, C]: the share of every kernel that the penalty takes away, lambda * P / w."""
        return terms.penalty_factor(prob, energy, self.strength)

    def mixed_slope(
        self, starts: Sequence[Tensor], looked: Sequence[Tensor], energy: Tensor, exact: bool
    ) -> Tensor:
        """[L, G, O]: what the logits feel of the weights that follow them (golden README section 4, 5-7).

        starts, looked: the weights of every layer before and after the look-ahead; energy: of the real ones.
        """
        prob, weight, ahead = self.assigned(), self.weight(), _stacked(looked)
        ahead_energy = terms.kernel_energy(ahead)
        # v = w_look (1 - f) - w_ck, of which only the kernels' products with w are needed.
        moved = terms.kernel_product(weight, ahead - _stacked(starts))
        product = moved - self.shrinkage(prob, ahead_energy) * terms.kernel_product(weight, ahead)
        second = terms.second_order_exact if exact else terms.second_order_original
        return terms.first_order(prob, ahead_energy) + second(prob, energy, product)

    def per_kernel(self, values: Tensor) -> list[Tensor]:
        """[L, O, C] -> for every layer [O, C, 1, 1] in the dtype of its weight."""
        return list(values.to(self.layers[0].weight.dtype)[..., None, None].unbind())


def make_buckets(layers: Sequence[LearnedLayer]) -> list[Bucket]:
    """Sort layers into buckets; the order is that of each bucket's first layer."""
    found: dict[tuple[object, ...], list[LearnedLayer]] = {}
    for layer in layers:
        weight = layer.weight
        key = (weight.shape, layer.logits.shape, weight.dtype, weight.device, layer.param_group)
        found.setdefault(key, []).append(layer)
    buckets = []
    for members in found.values():
        scales = [[[layer.scale]] for layer in members]
        scale = torch.tensor(scales, dtype=torch.float64, device=members[0].weight.device)
        buckets.append(Bucket(members, scale, torch.zeros_like(scale)))
    return buckets


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))
