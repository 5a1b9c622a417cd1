"""GroupWrapper: learns, beside ordinary training, which filters of a layer share their input channels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dsp_kernels.errors import DSPPruningError
from dsp_kernels.graph.inputs import Example
from dsp_pruning import distributed
from dsp_pruning.layers import LayerPredicate, survey_layers
from dsp_pruning.learn import penalty as terms
from dsp_pruning.learn.buckets import BucketStep, attach_layers, make_buckets, stacked
from dsp_pruning.learn.logits import check_noise, gumbel_noise, logit_optimizer, step_logits
from dsp_pruning.learn.lookahead import Batch, as_batches, check_optimizer, look_ahead
from dsp_pruning.learn.settings import (
    GroupCount,
    NonFiniteFlag,
    SecondOrder,
    check_kind,
    check_learning_settings,
    groups_of_layers,
    held_back,
    named_counts,
    raise_first_not_finite,
)

__all__ = ["GroupWrapper", "SecondOrder"]


class GroupWrapper:
    """Differentiable group learning (paper, section 3.2; golden README section 4).

    model: trained by the caller's own loop; calling the wrapper calls it. On it lives only
        ``<conv>.group`` [n_groups, out_channels], the logits; one that is there already is kept.
        DistributedDataParallel is looked through.
    optimizer: of the model's weights; any in mode "none", else one of ``lookahead.OPTIMIZERS``.
    criterion: ``(model(x), y) -> scalar loss``.
    reg: strength of the penalty; it grows linearly to this over total_steps.
    n_groups: G of every layer, or a mapping from the layer's name, or ``(name, conv) -> G``.
    temp: temperature of the softmax over groups.
    group_optimizer_lr: learning rate of the logits' own Adam.
    rank: process number where there are several; only rank 0 may print.
    example_input: (batch, channels, height, width), or a tuple of all inputs of the model; without it
        1 x C x 32 x 32 is tried.
    layers: ``(name, conv) -> bool``, replaces the default choice of ``select_layers``.
        ``print(learner.layers)`` shows a table of what was chosen, and of the rest with the reason.
    second_order: how the logits see that weights follow them. "exact": look one step ahead and take the
        true mixed derivative. "original": the same with the original's formula. "none": no look-ahead, so
        no second forward and backward pass; the logits follow dR/dp at the present weights.
    generator: draws the initial logits and the Gumbel noise; None makes one from ``torch.initial_seed()``.
        With several processes all go on from the state of rank 0's.

    The look-ahead knows nothing of gradient clipping in the caller's loop.

    Raises DSPPruningError for a setting that is out of range, more groups than a layer has filters, an
    optimizer that the look-ahead cannot step, or a layer whose weight is frozen or unknown to the optimizer;
    DSPShapeError if the model does not run on the example.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        criterion: Callable[[Any, Any], Tensor],
        reg: float,
        total_steps: int,
        n_groups: GroupCount,
        temp: float,
        group_optimizer_lr: float = 1e-3,
        rank: int = 0,
        *,
        example_input: Example | None = None,
        layers: LayerPredicate | None = None,
        second_order: SecondOrder = "exact",
        generator: torch.Generator | None = None,
    ) -> None:
        check_kind(
            model=(model, nn.Module, "an nn.Module"),
            criterion=(criterion, Callable, "a function of the model's answer and y"),
            layers=(layers, (Callable, NoneType), "a function (name, conv) -> bool"),
            generator=(generator, (torch.Generator, NoneType), "a torch.Generator"),
        )
        if not hasattr(optimizer, "param_groups"):  # a wrapper around an optimizer has them too
            raise DSPPruningError(f"optimizer is a {type(optimizer).__name__}; it must be a torch optimizer")
        check_learning_settings(reg, total_steps, temp, group_optimizer_lr, second_order)
        if second_order != "none":
            check_optimizer(optimizer)
        self.model = model
        self.optimizer = optimizer
        self.criterion = criterion
        self.reg, self.total_steps, self.temp = float(reg), total_steps, float(temp)
        self.second_order: SecondOrder = second_order
        self.rank = rank
        self.generator = generator or torch.Generator().manual_seed(torch.initial_seed())
        self._network = distributed.unwrap(model)
        self.layers = survey_layers(self._network, example_input, layers)
        self._several = isinstance(example_input, list | tuple) and len(example_input) > 1
        self._share_generator()
        counts = groups_of_layers(self.layers.chosen, n_groups)
        self.n_groups = named_counts(self.layers.chosen, n_groups, counts)
        self._layers = attach_layers(self.layers.chosen, counts, optimizer, self.generator)
        distributed.broadcast_tensors([layer.logits for layer in self._layers])
        self._buckets = make_buckets(self._layers)
        self._group_optimizer = logit_optimizer([layer.logits for layer in self._layers], group_optimizer_lr)
        self._steps = 0
        self._skipped: int | Tensor = 0
        self._initialized = False
        self._stepped = False
        self._found_inf: Tensor | None = None
        self._loss: Tensor | None = None
        self._reorder = True  # until the network turns out not to run on images in channels_last
        self._not_finite = NonFiniteFlag()
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
            "skipped_steps": int(self._skipped),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned."""
        self._group_optimizer.load_state_dict(state["group_optimizer"])
        self.steps, self._skipped = state["steps"], state["skipped_steps"]
        self.generator.set_state(state["generator"])
        self._share_generator()

    @torch.no_grad()
    def initialize(self, noise: Mapping[str, Tensor] | None = None) -> None:
        """Before the forward pass: draw Gumbel noise and assign the filters of every layer to groups.

        noise: layer name -> Gumbel noise [n_groups, out_channels] for every layer, instead of drawing it;
            the same on every process.

        Raises DSPPruningError if a layer's noise is missing, DSPShapeError if its shape is wrong,
        DSPTrainingError if a step before this one was not finite.
        """
        self._require_finite()
        for layer in self._layers:
            conv = layer.info.conv
            if conv.weight is not layer.weight or conv.group is not layer.logits:
                raise DSPPruningError(
                    f"layer {layer.info.name!r} has another weight or group tensor than when it was wrapped "
                    "(load_state_dict(assign=True)?); wrap the model again, after loading"
                )
        if noise is None:
            device = self._layers[0].logits.device
            drawn = gumbel_noise([bucket.shape for bucket in self._buckets], self.generator, device)
        else:
            check_noise(noise, {layer.info.name: layer.logits.shape for layer in self._layers})
            drawn = [torch.stack([noise[layer.info.name] for layer in b.layers]) for b in self._buckets]
        ramp = (self._steps + 1) / self.total_steps
        for bucket, xi in zip(self._buckets, drawn, strict=True):
            lr = self.optimizer.param_groups[bucket.param_group]["lr"]
            bucket.start(xi, self.temp, lr * (self.reg * ramp))
        self._initialized, self._stepped, self._found_inf = True, False, None

    @torch.no_grad()
    def after_step(
        self, x: Any, y: Any, amp: bool = False, scaler: torch.amp.GradScaler | None = None
    ) -> None:
        """After ``optimizer.step()``: move the logits, shrink the weights (golden README section 4, 3-9).

        x, y: the batch of this step, on the model's device; with gradient accumulation two lists, the
            micro-batches in their order, each of which counts 1 / len(x). Where
            ``example_input`` was several inputs, x is a tuple of them.
        amp: the look-ahead's forward pass runs under autocast, in the dtype torch has set for the device.
        scaler: the one of the caller's loop. It scales the look-ahead's loss and is not updated. Where it
            held the real step back (an overflow), or the look-ahead overflows, nothing is done but counting
            the step: ``stats()["skipped_steps"]``. An overflow of one process holds back all.

        Raises DSPPruningError without ``initialize()`` before it; DSPTrainingError if the loss, a weight or a
        logit is no longer finite. Logits and weights are then left as they are. On a GPU, where the host does
        not wait for the answer, the error comes some steps later, or from ``stats()``.
        """
        if not self._initialized:
            raise DSPPruningError(
                f"after_step() of step {self._steps} without initialize() since the last one: call "
                "initialize() before the forward pass of every step"
            )
        batches = as_batches(x, y)
        self._initialized = False
        several = distributed.is_distributed()
        device = self._layers[0].logits.device
        if scaler is not None and not self._stepped and not several:
            self._skipped = self._skipped + 1
        else:
            with torch.autocast(device.type, enabled=False):
                dtype = torch.get_autocast_dtype(device.type) if amp else None
                steps = [BucketStep(bucket) for bucket in self._buckets]
                slopes, overflow = self._slopes(steps, batches, dtype, scaler)
                found = (overflow, self._found_inf)
                skip = None if scaler is None else held_back(self._stepped, found, device)
                hold = self._not_finite.hold([*slopes, *([] if self._loss is None else [self._loss])], skip)
                self._move_logits(slopes, hold)
                for step in steps:
                    step.shrink(hold)
            if skip is not None:
                self._skipped = self._skipped + skip
        self._steps += 1
        self._require_finite(self._steps - 1)

    @torch.no_grad()
    def stats(self) -> dict[str, float]:
        """Where learning stands, as plain numbers; waits for the device.

        step, skipped_steps; ramp of the last step; penalty: reg * ramp * sum of scale * R over the layers for
        hard groups; group_share_{g}: share of all filters whose group is g.

        Raises DSPTrainingError if a step so far was not finite.
        """
        if self._not_finite.wait():
            self._raise_not_finite(self._steps - 1)
        total, counts = 0.0, torch.zeros(max(layer.logits.shape[0] for layer in self._layers)).double()
        for bucket in self._buckets:
            hard = terms.hard_assignment(bucket.logits())
            energy = terms.kernel_energy(bucket.weight())
            values = terms.regulariser(hard.to(energy), energy)
            total += float((bucket.scale.flatten().to(values) * values).sum())
            counts[: hard.shape[1]] += hard.sum(dim=(0, 2)).to(counts)
        ramp = self._steps / self.total_steps
        stats = {"step": self._steps, "skipped_steps": int(self._skipped), "ramp": ramp}
        stats["penalty"] = self.reg * ramp * total
        shares = (counts / counts.sum()).tolist()
        return stats | {f"group_share_{group}": share for group, share in enumerate(shares)}

    def _share_generator(self) -> None:
        """Every process draws what rank 0 draws."""
        if distributed.is_distributed():
            self.generator.set_state(distributed.broadcast_object(self.generator.get_state()))

    def _note_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._stepped = True
        # An optimizer that checks for overflow itself (fused=True) is called all the same and told here.
        self._found_inf = getattr(optimizer, "found_inf", None)

    def _slopes(
        self,
        steps: list[BucketStep],
        batches: list[Batch],
        autocast_dtype: torch.dtype | None,
        scaler: torch.amp.GradScaler | None,
    ) -> tuple[list[Tensor], Tensor | None]:
        """Gradient [L, G, O] of each bucket's regulariser by its assignment; did the look-ahead overflow?"""
        if self.second_order == "none":
            self._loss = None
            return [step.first_slope() for step in steps], None
        starts = [step.penalised() for step in steps]
        layers = [step.bucket.layers for step in steps]
        each: dict[Tensor, Tensor] = {}
        for members, start in zip(layers, starts, strict=True):
            each.update(zip((layer.weight for layer in members), start.unbind(), strict=True))
        network = self._network, self.optimizer, self.criterion
        ahead = look_ahead(*network, each, batches, autocast_dtype, scaler, self._reorder, self._several)
        self._reorder = self._reorder and not ahead.refused
        self._loss = ahead.loss
        slopes = []
        for step, members, start in zip(steps, layers, starts, strict=True):
            after = stacked([ahead.weights[layer.weight] for layer in members])
            slopes.append(step.mixed_slope(start, after, self.second_order == "exact"))
        return slopes, ahead.overflow

    def _move_logits(self, slopes: list[Tensor], hold: Tensor) -> None:
        gradients = [
            terms.logit_gradient(bucket.assigned(), slope, self.temp)
            for bucket, slope in zip(self._buckets, slopes, strict=True)
        ]
        distributed.all_reduce_mean(gradients)
        logits = [layer.logits for bucket in self._buckets for layer in bucket.layers]
        each = [
            own
            for bucket, gradient in zip(self._buckets, gradients, strict=True)
            for own in gradient.to(bucket.layers[0].logits.dtype).unbind()
        ]
        step_logits(self._group_optimizer, logits, each, hold.float())

    def _require_finite(self, step: int | None = None) -> None:
        if self._not_finite.seen():
            self._raise_not_finite(self._steps - 1 if step is None else step)

    def _raise_not_finite(self, step: int) -> None:
        self._not_finite.clear()
        suspects: list[tuple[str, Tensor]] = []
        suspects += [(f"the weight of layer {layer.info.name!r}", layer.weight) for layer in self._layers]
        suspects += [(f"the logits of layer {layer.info.name!r}", layer.logits) for layer in self._layers]
        suspects += [] if self._loss is None else [("the loss of the look-ahead", self._loss)]
        raise_first_not_finite(suspects, step)
