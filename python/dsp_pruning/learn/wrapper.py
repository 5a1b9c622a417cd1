"""GroupWrapper: learns, beside ordinary training, which filters of a layer share their input channels."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dsp_kernels.errors import DSPPruningError
from dsp_kernels.graph.inputs import Example
from dsp_pruning import distributed
from dsp_pruning.checks import check, check_count, check_kind, check_one_of
from dsp_pruning.layers import GroupCount, LayerPredicate, groups_of_layers, survey_layers
from dsp_pruning.learn import penalty as terms
from dsp_pruning.learn.assign import check_rate, write_groups
from dsp_pruning.learn.buckets import BucketStep, attach_layers, make_buckets, stacked
from dsp_pruning.learn.finite import NonFiniteFlag, overflowed, raise_first_not_finite
from dsp_pruning.learn.logits import check_noise, gumbel_noise, step_logits
from dsp_pruning.learn.lookahead import Batch, as_batches, check_optimizer, look_ahead

SecondOrder = Literal["exact", "none", "original"]
Init = Literal["random", "weights"]


class GroupWrapper:
    """Differentiable group learning (paper, section 3.2; formulas: docs/notes/algorithm.md).

    The caller keeps its own training loop: ``initialize()`` before the forward pass, ``after_step(x, y)``
    after ``optimizer.step()``. Calling the wrapper calls the model.

    model: stores only the logits, ``<conv>.group`` [n_groups, out_channels], a parameter without gradient;
        existing logits are kept. DistributedDataParallel and torch.compile are unwrapped.
    optimizer: holds the model's weights. Any in mode "none", otherwise one of ``lookahead.OPTIMIZERS``.
    criterion: ``(model(x), y) -> scalar loss``.
    reg: strength of the penalty, reached linearly over total_steps.
    n_groups: number of groups of every layer, or a mapping by layer name, or ``(name, conv) -> number``.
    temp: temperature of the softmax over groups.
    group_optimizer_lr: learning rate of the logits' own Adam.
    rank: index of this process; not used, because the process group is found by itself.
    example_input: (batch, channels, height, width), or a tuple of all inputs of the model; None uses
        (1, C, 32, 32).
    layers: ``(name, conv) -> bool`` replaces the default choice of ``survey_layers``.
        ``print(learner.layers)`` shows which layers take part, and why the others do not: frozen ones, for
        example, and those with fewer filters than groups.
    second_order: how the logits take into account that the weights follow them. "exact": look one step ahead
        and use the true mixed derivative. "original": the same with the published implementation's formula.
        "none": the derivative at the current weights, without a second forward and backward pass.
    generator: draws initial logits and Gumbel noise; None makes one from ``torch.initial_seed()``. With
        several processes all continue from the state of rank 0.
    init: logits of layers without any. "random": small. "weights": the groups of ``assign_groups`` for a
        pruning rate of ``rate``, which also replace existing logits.

    Gradient clipping of the caller's loop is not part of the look-ahead.

    Raises DSPPruningError for a setting out of range, if no layer is left, for an optimizer that the
    look-ahead does not support, or a layer whose weight is not in the optimizer; DSPShapeError if the model
    does not run on the example.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 784, 10))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> learner = GroupWrapper(model, optimizer, nn.CrossEntropyLoss(), 1e-3, 2, n_groups=4, temp=0.5)
    >>> x, y = torch.rand(2, 3, 32, 32), torch.tensor([3, 5])
    >>> for _ in range(2):
    ...     learner.initialize()
    ...     optimizer.zero_grad()
    ...     learner.criterion(learner(x), y).backward()
    ...     optimizer.step()
    ...     learner.after_step(x, y)
    >>> model[1].group.shape, learner.stats()["ramp"]
    (torch.Size([4, 8]), 1.0)
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
        init: Init = "random",
        rate: float = 0.5,
    ) -> None:
        self._network = distributed.unwrap(model)
        self.layers = survey_layers(self._network, example_input, layers)
        is_optimizer = hasattr(optimizer, "param_groups")  # also true for a wrapper around an optimizer
        check_kind(is_optimizer, "optimizer", optimizer, "a torch optimizer")
        check_kind(callable(criterion), "criterion", criterion, "a function of the model's output and y")
        is_generator = generator is None or isinstance(generator, torch.Generator)
        check_kind(is_generator, "generator", generator, "a torch.Generator")
        check_count("total_steps", total_steps)
        check(_is_finite(reg) and reg >= 0, "reg", reg, "a finite number of at least 0")
        for name, value in (("temp", temp), ("group_optimizer_lr", group_optimizer_lr)):
            check(_is_finite(value) and value > 0, name, value, "a finite number above 0")
        check_one_of("second_order", second_order, get_args(SecondOrder))
        check_one_of("init", init, get_args(Init))
        check_rate(rate)
        if second_order != "none":
            check_optimizer(optimizer)
        self.layers, counts = groups_of_layers(self.layers, n_groups)
        self.model = model
        self.optimizer = optimizer
        self.criterion = criterion
        self.reg, self.total_steps, self.temp = float(reg), total_steps, float(temp)
        self.n_groups: int | dict[str, int] = n_groups if isinstance(n_groups, int) else counts
        self.second_order: SecondOrder = second_order
        self.rank = rank
        self.generator = generator or torch.Generator().manual_seed(torch.initial_seed())
        self._share_generator()
        self._layers = attach_layers(self.layers.chosen, counts, optimizer, self.generator)
        if init == "weights":
            write_groups(self.layers.chosen, counts, rate, self.generator)
        logits = [layer.logits for layer in self._layers]
        distributed.broadcast_tensors(logits)
        self._buckets = make_buckets(self._layers)
        # Only the fused form takes a tensor that says whether to skip a step, so that the host need not wait.
        adam = torch.optim.Adam(logits, group_optimizer_lr, eps=1e-12, fused=True, capturable=True)
        self._group_optimizer = adam
        self._steps = 0
        self._skipped: int | Tensor = 0
        self._initialized = False
        self._stepped = False
        self._found_inf: Tensor | None = None
        self._loss: Tensor | None = None
        self._reorder = True  # until the network fails on images in channels_last
        self._not_finite = NonFiniteFlag()
        optimizer.register_step_post_hook(self._note_step)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.optimizer.register_step_post_hook(self._note_step)  # a copied optimizer has no hooks

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    @property
    def steps(self) -> int:
        """Number of finished steps; the ramp is (steps + 1) / total_steps. Settable, to resume."""
        return self._steps

    @steps.setter
    def steps(self, value: int) -> None:
        check_count("steps", value, least=0)
        self._steps = value

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs in addition to the model, which holds the logits."""
        return {
            "group_optimizer": self._group_optimizer.state_dict(),
            "steps": self._steps,
            "skipped_steps": int(self._skipped),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from what ``state_dict`` returned."""
        self._group_optimizer.load_state_dict(state["group_optimizer"])
        self.steps, self._skipped = state["steps"], state["skipped_steps"]
        self.generator.set_state(state["generator"])
        self._share_generator()

    @torch.no_grad()
    def initialize(self, noise: Mapping[str, Tensor] | None = None) -> None:
        """Before the forward pass: draw Gumbel noise and assign the filters of every layer to groups.

        noise: layer name -> Gumbel noise [n_groups, out_channels], used instead of drawing it; the same on
            every process.

        Raises DSPPruningError if a layer's noise is missing, DSPShapeError if its shape is wrong,
        DSPTrainingError if an earlier step was not finite.
        """
        self._require_finite()
        for layer in self._layers:
            conv = layer.info.conv
            if conv.weight is not layer.weight or conv.group is not layer.logits:
                raise DSPPruningError(
                    f"the weight or group tensor of layer {layer.info.name!r} was replaced after wrapping "
                    "(load_state_dict(assign=True)?); wrap the model again after loading"
                )
        if noise is None:
            shapes = [bucket.shape for bucket in self._buckets]
            drawn = gumbel_noise(shapes, self.generator, self._layers[0].logits.device)
        else:
            check_noise(noise, {layer.info.name: layer.logits.shape for layer in self._layers})
            drawn = [torch.stack([noise[layer.info.name] for layer in b.layers]) for b in self._buckets]
        ramp = (self._steps + 1) / self.total_steps
        for bucket, xi in zip(self._buckets, drawn, strict=True):
            lr = self.optimizer.param_groups[bucket.layers[0].param_group]["lr"]
            bucket.start(xi, self.temp, lr * (self.reg * ramp))
        self._initialized, self._stepped, self._found_inf = True, False, None

    @torch.no_grad()
    def after_step(
        self, x: Any, y: Any, amp: bool = False, scaler: torch.amp.GradScaler | None = None
    ) -> None:
        """After ``optimizer.step()``: update the logits, then shrink the weights.

        x, y: the batch of this step, on the model's device. With gradient accumulation two lists, the
            micro-batches in order, each with weight 1 / len(x). A tuple x holds several inputs of forward().
        amp: run the look-ahead's forward pass under autocast, in torch's autocast dtype of the device.
        scaler: the caller's gradient scaler. It scales the look-ahead's loss and is not updated. If it
            skipped the real step (an overflow), or the look-ahead overflows, on any process, the step is only
            counted: ``stats()["skipped_steps"]``.

        Raises DSPPruningError without ``initialize()`` before it; DSPTrainingError if the loss, a weight or a
        logit is not finite. Logits and weights are then unchanged. On a GPU, where the host does not wait,
        the error is raised some steps later, or by ``stats()``.
        """
        if not self._initialized:
            raise DSPPruningError(
                f"after_step() of step {self._steps} without initialize() since the last one: call "
                "initialize() before the forward pass of every step"
            )
        batches = as_batches(x, y)
        self._initialized = False
        if scaler is not None and not self._stepped and not distributed.is_distributed():
            self._skipped = self._skipped + 1
        else:
            device = self._layers[0].logits.device
            with torch.autocast(device.type, enabled=False):
                dtype = torch.get_autocast_dtype(device.type) if amp else None
                steps = [BucketStep(bucket) for bucket in self._buckets]
                slopes, overflow = self._slopes(steps, batches, dtype, scaler)
                skip = None
                if scaler is not None:
                    skip = overflowed(self._stepped, (overflow, self._found_inf), device)
                    self._skipped = self._skipped + skip
                hold = self._not_finite.hold([*slopes, *([] if self._loss is None else [self._loss])], skip)
                self._move_logits(slopes, hold)
                for step in steps:
                    step.shrink(hold)
        self._steps += 1
        self._require_finite()

    @torch.no_grad()
    def stats(self) -> dict[str, float]:
        """Progress as plain numbers; waits for the device.

        step, skipped_steps; ramp of the last step; penalty: reg * ramp * sum of scale * R over the layers for
        the hard groups; group_share_{g}: share of all filters that belong to group g.

        Raises DSPTrainingError if any step so far was not finite.
        """
        self._require_finite(wait=True)
        total, counts = 0.0, torch.zeros(max(layer.logits.shape[0] for layer in self._layers)).double()
        for bucket in self._buckets:
            value, filters = bucket.regulariser()
            total += float(value)
            counts[: len(filters)] += filters.to(counts)
        ramp = self._steps / self.total_steps
        shares = (counts / counts.sum()).tolist()
        return {
            "step": self._steps,
            "skipped_steps": int(self._skipped),
            "ramp": ramp,
            "penalty": self.reg * ramp * total,
        } | {f"group_share_{group}": share for group, share in enumerate(shares)}

    def _share_generator(self) -> None:
        """Every process draws what rank 0 draws."""
        state = self.generator.get_state()
        distributed.broadcast_tensors([state])
        self.generator.set_state(state)

    def _note_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._stepped = True
        # An optimizer that checks for overflow itself (fused=True) is stepped even then, and has this flag.
        self._found_inf = getattr(optimizer, "found_inf", None)

    def _slopes(
        self,
        steps: list[BucketStep],
        batches: list[Batch],
        autocast_dtype: torch.dtype | None,
        scaler: torch.amp.GradScaler | None,
    ) -> tuple[list[Tensor], Tensor | None]:
        """Gradient [L, G, O] of each bucket's regulariser by its assignment; overflow of the look-ahead."""
        if self.second_order == "none":
            self._loss = None
            return [terms.first_order(step.soft, step.energy) for step in steps], None
        starts = [step.penalised() for step in steps]
        ahead = look_ahead(
            self._network,
            self.optimizer,
            self.criterion,
            {
                layer.weight: one
                for step, start in zip(steps, starts, strict=True)
                for layer, one in zip(step.bucket.layers, start.unbind(), strict=True)
            },
            batches,
            autocast_dtype,
            scaler,
            self._reorder,
        )
        self._reorder = self._reorder and not ahead.refused
        self._loss = ahead.loss
        slopes = []
        for step, start in zip(steps, starts, strict=True):
            after = stacked([ahead.weights[layer.weight] for layer in step.bucket.layers])
            slopes.append(step.mixed_slope(start, after, self.second_order == "exact"))
        return slopes, ahead.overflow

    def _move_logits(self, slopes: list[Tensor], hold: Tensor) -> None:
        gradients = [
            terms.logit_gradient(bucket.prob, slope, self.temp)
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

    def _require_finite(self, wait: bool = False) -> None:
        if not (self._not_finite.wait() if wait else self._not_finite.seen()):
            return
        self._not_finite.clear()
        suspects = [(f"the weight of layer {layer.info.name!r}", layer.weight) for layer in self._layers]
        suspects += [(f"the logits of layer {layer.info.name!r}", layer.logits) for layer in self._layers]
        suspects += [] if self._loss is None else [("the loss of the look-ahead", self._loss)]
        raise_first_not_finite(suspects, self._steps - 1)


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except TypeError:
        return False
