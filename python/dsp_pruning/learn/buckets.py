"""Layers of one shape as a batch: what the learner computes is then a few operations for all of them.

Shapes, with L layers in a bucket: weight [L, O, C, kh, kw], energy [L, O, C], logits and prob [L, G, O].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dsp_kernels.errors import DSPPruningError
from dsp_pruning.layers import LayerInfo
from dsp_pruning.learn import penalty as terms
from dsp_pruning.learn.logits import attach_logits, check_logits

__all__ = ["Bucket", "BucketStep", "LearnedLayer", "attach_layers", "make_buckets", "stacked"]


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
        return terms.at_least_float(stacked([layer.logits for layer in self.layers]))

    def weight(self) -> Tensor:
        """[L, O, C, kh, kw], a copy where there is more than one layer."""
        return stacked([layer.weight for layer in self.layers])

    def is_channels_last(self) -> bool:
        """Whether the weights lie in that order of memory."""
        weight = self.layers[0].weight
        return weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


class BucketStep:
    """What one step computes of a bucket, from its weights of that moment.

    weight: [L, O, C, kh, kw]. energy: [L, O, C], theirs. soft: the assignment that ``Bucket.start`` drew.
    """

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        self.weight = bucket.weight()
        self.energy = terms.kernel_energy(self.weight)
        self.soft = terms.Assigned(bucket.assigned())

    def first_slope(self) -> Tensor:
        """[L, G, O]: gradient of the regulariser by the assignment, at the present weights."""
        return terms.first_order(self.soft, self.energy)

    def penalised(self) -> Tensor:
        """[L, O, C, kh, kw]: the weights after the soft penalty, every layer's in its own order of memory."""
        share = per_kernel(self._shrinkage(self.soft, self.energy), self.weight)
        moved = torch.addcmul(self.weight, self.weight, share, value=-1.0)
        if not self.bucket.is_channels_last():
            return moved
        flat = moved.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        return flat.view(moved.shape)

    def mixed_slope(self, start: Tensor, ahead: Tensor, exact: bool) -> Tensor:
        """[L, G, O]: what the logits feel of the weights that follow them (golden README section 4, 5-7).

        start, ahead: [L, O, C, kh, kw], the weights before and after the look-ahead.
        """
        ahead_energy = terms.kernel_energy(ahead)
        # v = w_look (1 - f) - w_ck, of which only the kernels' products with w are needed.
        moved = terms.kernel_product(self.weight, ahead - start)
        shrunk = self._shrinkage(self.soft, ahead_energy) * terms.kernel_product(self.weight, ahead)
        second = terms.second_order_exact if exact else terms.second_order_original
        slope = second(self.soft, self.energy, moved - shrunk)
        return terms.first_order(self.soft, ahead_energy) + slope

    def shrink(self, hold: Tensor) -> None:
        """Take the penalty of the hard groups from the real weights. hold: bool scalar, True for not now."""
        hard = terms.hard_assignment(self.bucket.logits()).to(self.energy.dtype)
        share = self._shrinkage(hard, self.energy).masked_fill(hold.to(self.energy.device), 0)
        weights: list[Tensor] = [layer.weight for layer in self.bucket.layers]
        torch._foreach_addcmul_(weights, weights, list(per_kernel(share, weights[0]).unbind()), value=-1.0)

    def _shrinkage(self, prob: Tensor | terms.Assigned, energy: Tensor) -> Tensor:
        """[L, O, C]: the share of every kernel that the penalty takes away, lambda * P / w."""
        return terms.penalty_factor(prob, energy, self.bucket.strength)


def attach_layers(
    infos: Sequence[LayerInfo], counts: Sequence[int], optimizer: Optimizer, generator: torch.Generator
) -> list[LearnedLayer]:
    """Put logits on every layer; nothing is attached where one of the layers cannot take part.

    counts: G of every layer. Raises DSPPruningError for a weight that is frozen or that the optimizer lacks,
    or other logits on a layer.
    """
    holders = {
        parameter: index
        for index, group in enumerate(optimizer.param_groups)
        for parameter in group["params"]
    }
    for info, n_groups in zip(infos, counts, strict=True):
        check_logits(info, n_groups)
        weight = info.conv.weight
        if weight not in holders:
            raise DSPPruningError(
                f"the optimizer does not hold the weight of layer {info.name!r}, so its learning rate is "
                "unknown; add the weight to the optimizer or leave the layer out by layers="
            )
        if not weight.requires_grad:
            raise DSPPruningError(
                f"the weight of layer {info.name!r} is frozen (requires_grad=False); leave the layer out "
                "by layers= or let it train"
            )
    attached = []
    for info, n_groups in zip(infos, counts, strict=True):
        kh, kw = info.kernel_size
        # For a square kernel this is the published k; 1x7 and 7x1 weigh the same.
        scale = terms.layer_scale(
            info.in_channels, info.out_channels, (kh * kw) ** 0.5, info.input_hw, n_groups
        )
        logits = attach_logits(info, n_groups, generator)
        attached.append(LearnedLayer(info, info.conv.weight, logits, scale, holders[info.conv.weight]))
    return attached


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


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """[L, ...], a copy where there is more than one."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))


def per_kernel(values: Tensor, weight: Tensor) -> Tensor:
    """[..., O, C] -> [..., O, C, 1, 1] in the dtype of the weight."""
    return values.to(weight.dtype).view(*values.shape, 1, 1)
