"""GroupWrapper: learns, beside ordinary training, which filters of a layer share their input channels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dsp_kernels.errors import DSPPruningError
from dsp_pruning import penalty as terms
from dsp_pruning.checks import SecondOrder, all_finite, check_learning_settings, raise_first_not_finite
from dsp_pruning.layers import LayerInfo, LayerPredicate, select_layers
from dsp_pruning.logits import at_least_float, attach_logits, check_logits, check_noise, gumbel_noise
from dsp_pruning.lookahead import look_ahead

__all__ = ["GroupWrapper", "SecondOrder"]

_ADAM_BETAS, _ADAM_EPS = (0.9, 0.999), 1e-12


@dataclass(frozen=True)
class _Layer:
    """A layer that learns groups: its logits [G, O], penalty scale, and the optimizer group of its weight."""

    info: LayerInfo
    weight: Tensor
    logits: nn.Parameter
    scale: float
    param_group: int


class GroupWrapper:
    """Differentiable group learning (paper, section 3.2; golden README section 4).

    model: trained by the caller's own loop; calling the wrapper calls it. On it lives only
        ``<conv>.group`` [n_groups, out_channels], the logits; one that is there already is kept.
    optimizer: of the model's weights; any ``torch.optim`` one that steps without a closure.
    criterion: ``(model(x), y) -> scalar loss``.
    reg: strength of the penalty; it grows linearly to this over total_steps.
    n_groups, temp: groups per layer and temperature of their softmax.
    group_optimizer_lr: learning rate of the logits' own Adam.
    rank: process number where there are several; only rank 0 may print.
    example_input: (batch, channels, height, width); without it 1 x C x 32 x 32 is tried.
    layers: ``(name, conv) -> bool``, replaces the default choice of ``select_layers``.
    second_order: how the logits see that weights follow them. "exact": look one step ahead and take the
        true mixed derivative. "original": the same with the original's formula. "none": no look-ahead, so
        no second forward and backward pass; the logits follow dR/dp at the present weights.
    generator: draws the initial logits and the Gumbel noise; None makes one from ``torch.initial_seed()``.

    The look-ahead knows nothing of gradient clipping or accumulation in the caller's loop.

    Raises DSPPruningError for a setting that is out of range, more groups than a layer has filters, or a
    layer whose weight the optimizer does not hold; DSPShapeError if the model does not run on the example.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        criterion: Callable[[Tensor, Tensor], Tensor],
        reg: float,
        total_steps: int,
        n_groups: int,
        temp: float,
        group_optimizer_lr: float = 1e-3,
        rank: int = 0,
        *,
        example_input: Tensor | None = None,
        layers: LayerPredicate | None = None,
        second_order: SecondOrder = "exact",
        generator: torch.Generator | None = None,
    ) -> None:
        check_learning_settings(optimizer, reg, total_steps, n_groups, temp, group_optimizer_lr, second_order)
        self.model = model
        self.optimizer = optimizer
        self.criterion = criterion
        self.reg, self.total_steps, self.n_groups, self.temp = float(reg), total_steps, n_groups, float(temp)
        self.second_order: SecondOrder = second_order
        self.rank = rank
        self.generator = generator or torch.Generator().manual_seed(torch.initial_seed())
        infos = select_layers(model, example_input, layers)
        self._layers = self._attach(infos)
        self._group_optimizer = torch.optim.Adam(
            [layer.logits for layer in self._layers], group_optimizer_lr, _ADAM_BETAS, _ADAM_EPS
        )
        self._probs: list[Tensor] | None = None
        self._steps = 0
        self._skipped = 0
        self._stepped = False
        self._found_inf: Tensor | None = None
        optimizer.register_step_post_hook(self._note_step)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.optimizer.register_step_post_hook(self._note_step)  # a copied optimizer has no hooks

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        return self.model(*args, **kwargs)

    @property
    def steps(self) -> int:
        """Steps done; the ramp is (steps + 1) / total_steps. Settable, to go on from a checkpoint."""
        return self._steps

    @steps.setter
    def steps(self, value: int) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise DSPPruningError(f"steps is {value!r}; it must be a whole number of at least 0")
        self._steps = value

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beside the model, which holds the logits."""
        return {
            "group_optimizer": self._group_optimizer.state_dict(),
            "steps": self._steps,
            "skipped_steps": self._skipped,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned."""
        self._group_optimizer.load_state_dict(state["group_optimizer"])
        self.steps, self._skipped = state["steps"], state["skipped_steps"]
        self.generator.set_state(state["generator"])

    @torch.no_grad()
    def initialize(self, noise: Mapping[str, Tensor] | None = None) -> None:
        """Before the forward pass: draw Gumbel noise and assign the filters of every layer to groups.

        noise: layer name -> Gumbel noise [n_groups, out_channels] for every layer, instead of drawing it.

        Raises DSPPruningError if a layer's noise is missing, DSPShapeError if its shape is wrong.
        """
        for layer in self._layers:
            conv = layer.info.conv
            if conv.weight is not layer.weight or conv.group is not layer.logits:
                raise DSPPruningError(
                    f"layer {layer.info.name!r} has another weight or group tensor than when it was wrapped "
                    "(load_state_dict(assign=True)?); wrap the model again, after loading"
                )
        shapes = {layer.info.name: layer.logits.shape for layer in self._layers}
        if noise is None:
            drawn = gumbel_noise(list(shapes.values()), self.generator)
            noise = dict(zip(shapes, drawn, strict=True))
        check_noise(noise, shapes)
        self._probs = []
        for layer in self._layers:
            logits = at_least_float(layer.logits)
            xi = noise[layer.info.name].to(logits)
            self._probs.append(terms.assignment(logits, xi, self.temp))
        self._stepped, self._found_inf = False, None

    @torch.no_grad()
    def after_step(
        self, x: Tensor, y: Tensor, amp: bool = False, scaler: torch.amp.GradScaler | None = None
    ) -> None:
        """After ``optimizer.step()``: move the logits, shrink the weights (golden README section 4, 3-9).

        x, y: the batch of this step, on the model's device.
        amp: the look-ahead's forward pass runs under autocast, in the dtype torch has set for the device.
        scaler: the one of the caller's loop. It scales the look-ahead's loss and is not updated. Where it
            held the real step back (an overflow), or the look-ahead overflows, nothing is done but counting
            the step: ``stats()["skipped_steps"]``.

        Raises DSPPruningError without ``initialize()`` before it, DSPTrainingError if the loss, a weight or
        a logit is no longer finite; logits and weights are then left as they are.
        """
        probs, self._probs = self._probs, None
        if probs is None:
            raise DSPPruningError(
                f"after_step() of step {self._steps} without initialize() since the last one: call "
                "initialize() before the forward pass of every step"
            )
        device = self._layers[0].logits.device
        with torch.autocast(device.type, enabled=False):
            skip = scaler is not None and self._held_back()
            dtype = torch.get_autocast_dtype(device.type) if amp else None
            energies = [terms.kernel_energy(layer.weight) for layer in self._layers]
            slopes = None if skip else self._slopes(probs, energies, (x, y), dtype, scaler)
            if slopes is None:
                self._skipped += 1
            else:
                self._move_logits(probs, slopes)
                self._shrink_weights(energies)
        self._steps += 1

    @torch.no_grad()
    def stats(self) -> dict[str, float]:
        """Where learning stands, as plain numbers.

        step, skipped_steps; ramp of the last step; penalty: reg * ramp * sum of scale * R over the layers for
        hard groups; group_share_{g}: share of all filters whose group is g.
        """
        total, counts = 0.0, torch.zeros(self.n_groups, dtype=torch.float64)
        for layer in self._layers:
            hard = terms.hard_assignment(at_least_float(layer.logits))
            energy = terms.kernel_energy(layer.weight)
            total += layer.scale * float(terms.regulariser(hard.to(energy), energy))
            counts += hard.sum(dim=1).to(counts)
        ramp = self._steps / self.total_steps
        stats = {"step": self._steps, "skipped_steps": self._skipped, "ramp": ramp}
        stats["penalty"] = self.reg * ramp * total
        shares = (counts / counts.sum()).tolist()
        return stats | {f"group_share_{group}": share for group, share in enumerate(shares)}

    def _attach(self, infos: tuple[LayerInfo, ...]) -> list[_Layer]:
        """Put logits on every layer; nothing is attached where one of the layers cannot take part."""
        holders = {
            parameter: index
            for index, group in enumerate(self.optimizer.param_groups)
            for parameter in group["params"]
        }
        for info in infos:
            check_logits(info, self.n_groups)
            if info.conv.weight not in holders:
                raise DSPPruningError(
                    f"the optimizer does not hold the weight of layer {info.name!r}, so its learning rate is "
                    "unknown; add the weight to the optimizer or leave the layer out by layers="
                )
        attached = []
        for info in infos:
            kh, _ = info.kernel_size
            scale = terms.layer_scale(info.in_channels, info.out_channels, kh, info.input_hw, self.n_groups)
            logits = attach_logits(info, self.n_groups, self.generator)
            attached.append(_Layer(info, info.conv.weight, logits, scale, holders[info.conv.weight]))
        return attached

    def _note_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._stepped = True
        # An optimizer that checks for overflow itself (fused=True) is called all the same and told here.
        self._found_inf = getattr(optimizer, "found_inf", None)

    def _held_back(self) -> bool:
        """Did the scaler keep the optimizer from stepping since ``initialize()``?"""
        return not self._stepped or (self._found_inf is not None and bool(self._found_inf))

    def _strength(self, layer: _Layer) -> float:
        """Lambda of a layer in this step: reg * lr * ramp."""
        lr = float(self.optimizer.param_groups[layer.param_group]["lr"])
        return self.reg * lr * (self._steps + 1) / self.total_steps

    def _penalised(self, layer: _Layer, weight: Tensor, prob: Tensor, energy: Tensor) -> Tensor:
        """W - lambda P(prob, w)."""
        factor = terms.penalty_factor(prob, energy, layer.scale).to(weight.dtype)
        return torch.addcmul(weight, weight, factor[..., None, None], value=-self._strength(layer))

    def _slopes(
        self,
        probs: list[Tensor],
        energies: list[Tensor],
        batch: tuple[Tensor, Tensor],
        autocast_dtype: torch.dtype | None,
        scaler: torch.amp.GradScaler | None,
    ) -> list[Tensor] | None:
        """Gradient [G, O] of each layer's regulariser by its assignment; None after an overflow."""
        if self.second_order == "none":
            slopes = [terms.first_order(prob, energy) for prob, energy in zip(probs, energies, strict=True)]
            self._require_finite(slopes, None)
            return slopes
        second = terms.second_order_exact if self.second_order == "exact" else terms.second_order_original
        starts = {
            layer.weight: self._penalised(layer, layer.weight, prob, energy)
            for layer, prob, energy in zip(self._layers, probs, energies, strict=True)
        }
        ahead = look_ahead(self.model, self.optimizer, self.criterion, starts, *batch, autocast_dtype, scaler)
        if ahead.overflow:
            self._require_finite([], ahead.loss)
            return None
        slopes = []
        for layer, prob, energy in zip(self._layers, probs, energies, strict=True):
            weight = layer.weight
            looked = ahead.weights[weight]
            looked_energy = terms.kernel_energy(looked)
            direction = self._penalised(layer, looked, prob, looked_energy) - starts[weight]
            first = terms.first_order(prob, looked_energy)
            slopes.append(first + second(prob, energy, terms.kernel_product(weight, direction)))
        self._require_finite(slopes, ahead.loss)
        return slopes

    def _move_logits(self, probs: list[Tensor], slopes: list[Tensor]) -> None:
        """One Adam step of the logits; outside it they have no gradient, so nothing else can move them."""
        try:
            for layer, prob, slope in zip(self._layers, probs, slopes, strict=True):
                layer.logits.grad = terms.logit_gradient(prob, slope, self.temp).to(layer.logits.dtype)
            self._group_optimizer.step()
        finally:
            self._group_optimizer.zero_grad(set_to_none=True)

    def _shrink_weights(self, energies: list[Tensor]) -> None:
        """The penalty of the hard groups, applied to the real weights."""
        for layer, energy in zip(self._layers, energies, strict=True):
            hard = terms.hard_assignment(layer.logits).to(energy.dtype)
            weight = layer.weight
            weight.copy_(self._penalised(layer, weight, hard, energy))

    def _require_finite(self, slopes: list[Tensor], loss: Tensor | None) -> None:
        if all_finite([*slopes, loss]):
            return
        suspects = [(f"the weight of layer {layer.info.name!r}", layer.weight) for layer in self._layers]
        suspects += [(f"the logits of layer {layer.info.name!r}", layer.logits) for layer in self._layers]
        suspects += [] if loss is None else [("the loss of the look-ahead", loss)]
        suspects += [
            (f"the logit gradient of layer {layer.info.name!r}", slope)
            for layer, slope in zip(self._layers, slopes, strict=False)
        ]
        raise_first_not_finite(suspects, self._steps)
