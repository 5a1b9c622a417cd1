"""Layers of equal shape as one batch, so that a step needs a few operations instead of a few per layer.

Shapes, with L layers in a bucket: weight [L, O, C, kh, kw], energy [L, O, C], logits and prob [L, G, O].
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dsp_kernels.errors import DSPPruningError
from dsp_pruning.layers import LayerInfo, check_existing
from dsp_pruning.learn import penalty as terms
from dsp_pruning.learn.logits import attach_logits


@dataclass(frozen=True)
class LearnedLayer:
    """A layer that learns groups.

    logits: [G, O], ``<conv>.group``. scale: its weight in the penalty. param_group: index of the optimizer's
    parameter group that holds its weight.
    """

    info: LayerInfo
    weight: Tensor
    logits: nn.Parameter
    scale: float
    param_group: int


@dataclass
class Bucket:
    """Layers with the same shape, number of groups, dtype, device and optimizer group.

    scale: [L, 1, 1]. strength: [L, 1, 1], lambda * scale of the current step. prob: of the current step.
    ``start`` reuses their memory, so that a CUDA graph that reads them can be replayed.
    """

    layers: list[LearnedLayer]
    scale: Tensor
    strength: Tensor
    prob: Tensor

    @property
    def shape(self) -> torch.Size:
        """[L, G, O]."""
        return torch.Size((len(self.layers), *self.layers[0].logits.shape))

    def start(self, noise: Tensor, temperature: float, strength: float | Tensor) -> None:
        """Begin a step: draw its soft assignment. noise: [L, G, O]; strength: reg * lr * ramp."""
        logits = self.logits()
        prob = terms.assignment(logits, noise.to(logits), temperature)
        if self.prob.dtype != prob.dtype or self.prob.device != prob.device:
            self.prob = prob
            self.scale, self.strength = self.scale.to(prob), self.strength.to(prob)
        else:
            self.prob.copy_(prob)
        torch.mul(self.scale, strength, out=self.strength)

    def logits(self) -> Tensor:
        """[L, G, O], float32 or better."""
        return terms.at_least_float(stacked([layer.logits for layer in self.layers]))

    def weight(self) -> Tensor:
        """[L, O, C, kh, kw]."""
        return stacked([layer.weight for layer in self.layers])

    def regulariser(self) -> tuple[Tensor, Tensor]:
        """Sum of scale * R over the layers for the hard groups, and number of filters in each group [G]."""
        hard, energy = terms.hard_assignment(self.logits()), terms.kernel_energy(self.weight())
        values = terms.regulariser(terms.Assigned(hard.to(energy)), energy)
        return (self.scale.flatten().to(values) * values).sum(), hard.sum(dim=(0, 2))


class BucketStep:
    """The quantities of one step, from the bucket's weights at that moment.

    weight: [L, O, C, kh, kw]. energy: [L, O, C]. soft: the assignment that ``Bucket.start`` drew.
    """

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        self.weight = bucket.weight()
        self.energy = terms.kernel_energy(self.weight)
        self.soft = terms.Assigned(bucket.prob)

    def penalised(self) -> Tensor:
        """[L, O, C, kh, kw]: the weights after the soft penalty, in the memory format of the layers."""
        share = _per_kernel(self._shrinkage(self.soft, self.energy), self.weight)
        moved = torch.addcmul(self.weight, self.weight, share, value=-1.0)
        own = self.bucket.layers[0].weight
        if own.is_contiguous() or not own.is_contiguous(memory_format=torch.channels_last):
            return moved
        flat = moved.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        return flat.view(moved.shape)

    def mixed_slope(self, start: Tensor, ahead: Tensor, exact: bool) -> Tensor:
        """[L, G, O]: gradient of the regulariser by the assignment, through the weights that follow it.

        start, ahead: [L, O, C, kh, kw], the weights before and after the look-ahead.
        """
        ahead_energy = terms.kernel_energy(ahead)
        # The direction is v = ahead (1 - f) - start; only its inner products with w are needed.
        moved = terms.kernel_product(self.weight, ahead - start)
        shrunk = self._shrinkage(self.soft, ahead_energy) * terms.kernel_product(self.weight, ahead)
        second = terms.second_order_exact if exact else terms.second_order_original
        slope = second(self.soft, self.energy, moved - shrunk)
        return terms.first_order(self.soft, ahead_energy) + slope

    def shrink(self, hold: Tensor) -> None:
        """Subtract the penalty of the hard groups from the weights. hold: bool scalar, True for a no-op."""
        hard = terms.Assigned(terms.hard_assignment(self.bucket.logits()).to(self.energy.dtype))
        share = self._shrinkage(hard, self.energy).masked_fill(hold.to(self.energy.device), 0)
        weights: list[Tensor] = [layer.weight for layer in self.bucket.layers]
        torch._foreach_addcmul_(weights, weights, list(_per_kernel(share, weights[0]).unbind()), value=-1.0)

    def _shrinkage(self, p: terms.Assigned, energy: Tensor) -> Tensor:
        """[L, O, C]: the share of every kernel that the penalty takes away."""
        return terms.penalty_factor(p, energy, self.bucket.strength)


def attach_layers(
    infos: Sequence[LayerInfo], counts: Mapping[str, int], optimizer: Optimizer, generator: torch.Generator
) -> list[LearnedLayer]:
    """Attach logits to every layer, or to none if one of them cannot take part. counts: layer name -> G."""
    holders = {
        parameter: index
        for index, group in enumerate(optimizer.param_groups)
        for parameter in group["params"]
    }
    for info in infos:
        check_existing(info, "group", (counts[info.name], info.out_channels))
        weight = info.conv.weight
        if weight not in holders:
            raise DSPPruningError(
                f"the optimizer does not hold the weight of layer {info.name!r}, so its learning rate is "
                "unknown; add the weight to the optimizer or exclude the layer with layers="
            )
    attached = []
    for info in infos:
        n_groups = counts[info.name]
        logits = attach_logits(info, n_groups, generator)
        scale = terms.layer_scale(
            info.in_channels, info.out_channels, info.kernel_size, info.input_hw, n_groups
        )
        attached.append(LearnedLayer(info, info.conv.weight, logits, scale, holders[info.conv.weight]))
    return attached


def make_buckets(layers: Sequence[LearnedLayer]) -> list[Bucket]:
    """Sort layers into buckets, ordered by each bucket's first layer."""
    found: dict[tuple[object, ...], list[LearnedLayer]] = {}
    for layer in layers:
        weight = layer.weight
        key = (weight.shape, layer.logits.shape, weight.dtype, weight.device, layer.param_group)
        found.setdefault(key, []).append(layer)
    buckets = []
    for members in found.values():
        prob = torch.zeros_like(stacked([layer.logits for layer in members]))
        scale = prob.new_tensor([[[layer.scale]] for layer in members])
        buckets.append(Bucket(members, scale, torch.zeros_like(scale), prob))
    return buckets


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """[L, ...]; a copy if there is more than one."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))


def _per_kernel(values: Tensor, weight: Tensor) -> Tensor:
    """[..., O, C] -> [..., O, C, 1, 1] in the dtype of the weight."""
    return values.to(weight.dtype).view(*values.shape, 1, 1)
