"""PruneWrapper: prunes the input channels of each filter group, and filters, to a share of the MACs."""

import math
import operator
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn

from dsp_kernels.errors import DSPPruningError, DSPTraceError
from dsp_kernels.graph.inputs import Example
from dsp_kernels.graph.network import TracedNetwork, evaluating, trace
from dsp_kernels.program.planner import plan
from dsp_kernels.times.model import LayerTimes, Price, surroundings
from dsp_pruning.checks import check, check_count, check_one_of, is_count
from dsp_pruning.distributed import unwrap
from dsp_pruning.layers import (
    GroupCount,
    LayerInfo,
    LayerPredicate,
    check_existing,
    groups_of_layers,
    inputs_like,
    survey_layers,
)
from dsp_pruning.prune.price import PriceSearch
from dsp_pruning.prune.report import PruningReport, RoundingCost, layer_row, percent_pruned
from dsp_pruning.prune.rule import LayerRule, Masks, layer_rule
from dsp_pruning.prune.search import Counted, Target, ThresholdSearch
from dsp_pruning.prune.zeros import Zeros, clearable, mask_matrix, zeros_of


class PruneWrapper:
    """Group channel pruning and filter pruning of a group-learned model (arXiv 2303.09736).

    One threshold beta, for all layers, is searched so that the pruned share of MACs reaches a rate
    (docs/notes/algorithm.md); by time, each layer has thresholds of its own. Calling the wrapper calls the
    model.

    model: any ``nn.Module``; DistributedDataParallel and torch.compile are unwrapped. Each chosen conv gets
        two buffers, both in the model's state dict: ``group`` [G, O], the group logits (filled by a
        group-learned checkpoint), and ``mask`` [O, C, 1, 1] of 0 and 1. Existing ones are kept.
    n_groups: number of groups of every layer, or a mapping by layer name, or ``(name, conv) -> number``.
    fp_every_nth_conv: layers whose index i has (i + 1) mod n = 0 also prune whole filters; -1 means none.
    fp_layer_indices: these layers by index among the chosen layers, from 0; -1 or [] means none. It overrides
        fp_every_nth_conv; one of the two is required.
    rank: index of this process; not used.
    example_input: (batch, channels, height, width), or a tuple of all inputs of the model; None uses
        (1, C, 32, 32).
    layers: ``(name, conv) -> bool`` chooses the layers; default: see ``survey_layers``.
        ``print(pruner.survey)`` shows which layers take part, and why the others do not: frozen ones, for
        example, and those with fewer filters than groups.
    prune_channels: False prunes whole filters only, by magnitude.
    target: what a rate is a share of: ``macs``, ``params`` (the weights) or ``time``, which is predicted from
        what ``dsp calibrate`` measured on this machine. By time, what loses the least energy per
        microsecond goes first, and channels that save no time stay.
    batch: of ``time``: images of a call, with torch's number of threads.
    price: of ``time``: another cost of a convolution than the predicted time, ``(spec, input_hw) -> cost``,
        for example ``dsp_kernels.times.model.macs``.
    channel_multiple: every group keeps a multiple of this many live input channels (8 suits tensor cores);
        ``report()`` shows the cost.

    Model and wrapper can be copied and pickled at any time. Batch-norm statistics never change, nor do frozen
    parameters of norms. If the model cannot be traced, each layer is pruned by its own mask alone, and
    ``summary()`` says so.

    Raises DSPPruningError for a setting out of range, or if no layer is left; DSPShapeError if the model does
    not run on the example. Pruning by time raises DSPTraceError for a model that cannot be traced, and
    FileNotFoundError or DSPFormatError without measured times.

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    >>> pruner = PruneWrapper(model, n_groups=1, fp_every_nth_conv=2)
    >>> flops, params = pruner.initialize(rate=0.5)  # then call pruner.after_step() in the training loop
    >>> 50 <= flops < 55, model[1].mask.shape
    (True, torch.Size([8, 8, 1, 1]))
    """

    def __init__(
        self,
        model: nn.Module,
        n_groups: GroupCount,
        fp_every_nth_conv: int | None = None,
        fp_layer_indices: Sequence[int] | int | None = None,
        rank: int = 0,
        *,
        example_input: Example | None = None,
        layers: LayerPredicate | None = None,
        prune_channels: bool = True,
        target: Target = "macs",
        channel_multiple: int = 1,
        batch: int = 1,
        price: Price | None = None,
    ) -> None:
        self._network = unwrap(model)
        survey = survey_layers(self._network, example_input, layers)
        check_one_of("target", target, get_args(Target))
        check_count("channel_multiple", channel_multiple)
        check_count("batch", batch)
        if price is not None and target != "time":
            raise DSPPruningError(f"a price is given, but the target is {target!r}; expected 'time'")
        if channel_multiple > 1 and target == "time":
            raise DSPPruningError("channel_multiple rounds channels, but pruning by time finds its own steps")
        if channel_multiple > 1 and not prune_channels:
            raise DSPPruningError("channel_multiple rounds pruned channels, but prune_channels is False")
        self.model = model
        self.rank = rank
        self.prune_channels = prune_channels
        self.target: Target = target
        self.channel_multiple = channel_multiple
        self.batch = batch
        self._price = price
        self.beta: float | None = None
        self.survey, counts = groups_of_layers(survey, n_groups)
        self.layers = self.survey.chosen
        self.n_groups: int | dict[str, int] = n_groups if isinstance(n_groups, int) else counts
        chosen = _filter_layers(fp_every_nth_conv, fp_layer_indices, len(self.layers))
        self.filter_layers = tuple(self.layers[index].name for index in chosen)
        for layer in self.layers:
            check_existing(layer, "group", (counts[layer.name], layer.out_channels))
            check_existing(layer, "mask", (layer.out_channels, layer.in_channels, 1, 1))
        for layer in self.layers:
            _register_buffers(layer, counts[layer.name])
        self._example = survey.example
        self._traced: TracedNetwork | None = None
        self._untraced = ""  # why it cannot be traced
        # Parameter or buffer -> its value before and after the last pruning.
        self._undo: dict[str, tuple[Tensor, Tensor]] = {}
        self._zeros: Zeros | None = None
        self._rounding: RoundingCost | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # The graph and the cached zeros are computed again when they are needed.
        return self.__dict__ | {"_traced": None, "_untraced": "", "_zeros": None}

    def initialize(self, rate: float, cycle: int = 0, cycles: int = 1) -> tuple[float, float]:
        """Prune to a rate; returns (FLOPs, params), each in percent pruned over the chosen layers.

        rate: fraction of the chosen layers' MACs (or weights, see target), 0 <= rate < 1. Uses the smallest
            beta that reaches it, so the result is never below the rate, and as close as one beta for all
            layers allows.
        cycle, cycles: cyclic pruning; cycle i of n, counted from 0, prunes to rate * (i + 1) / n.

        Repeated calls start from the current weights and masks, so what is pruned stays pruned. If nothing
        has changed the weights since the last pruning, that pruning is undone first.
        Raises DSPPruningError for a rate that cannot be reached, with the range that can; the model is then
        unchanged.
        """
        if not (isinstance(cycle, int) and isinstance(cycles, int) and 0 <= cycle < cycles):
            raise DSPPruningError(f"cycle {cycle!r} of {cycles!r}: expected a cycle from 0 to cycles - 1")
        search = self._search()
        masks, beta = search.chosen(_fraction(rate, "the pruning rate") * (cycle + 1) / cycles)
        return self._prune(masks, beta, search)

    def preview(self, rate: float) -> PruningReport:
        """The report that ``initialize(rate)`` would lead to; same errors. Changes nothing."""
        search = self._search()
        masks, beta = search.chosen(_fraction(rate, "the pruning rate"))
        return self._describe(masks, beta, self._rounding_cost(search, masks))

    def reachable(self) -> tuple[float, float]:
        """The smallest and the largest rate that can be reached, 0 to 1. Changes nothing.

        The smallest is above 0 if something is pruned or dead already.
        Raises DSPPruningError if the output does not depend on the input.
        """
        span = self._search().reachable()
        if span is None:
            raise DSPPruningError("no rate is within reach: the output does not depend on the input any more")
        return span

    def prune_at(self, beta: float) -> tuple[float, float]:
        """Prune at one threshold; returns as ``initialize``, and undoes the last pruning as it does.

        beta: 0 <= beta <= 1, the share of a group's (and of a filter layer's) sum of squared weights that may
            be pruned.
        """
        search, beta = self._one_threshold(), _fraction(beta, "the threshold beta")
        return self._prune(search.masks(beta)[0], beta, search)

    def after_step(self) -> None:
        """Set everything pruned to zero again; call it after every ``optimizer.step()``.

        This includes the conv's bias and the batch norm's weight and bias of a pruned filter: a constant left
        there would be an input of the next layer.

        Raises DSPPruningError if nothing was pruned and the model has no masks from before.
        """
        masks = [layer.conv.get_buffer("mask") for layer in self.layers]
        if self._zeros is None and all(bool(mask.all()) for mask in masks):
            raise DSPPruningError(
                "after_step() with nothing pruned: call initialize(rate) first, or load masked weights"
            )
        if self._zeros is None or not self._zeros.valid_for(masks):
            self._zeros = zeros_of(self._network, self.layers, self._trace())
        self._zeros.restore()

    def summary(self) -> dict[str, Any]:
        """What the masks on the model keep, as plain numbers and text.

        ``layers`` has one row per layer: filters, channels, groups, kernels and MACs, each with its kept
        count, the number of channels that each kept group reads, whether it prunes filters, and a note on
        what limits the pruning.
        """
        report = self.report()
        names = ("beta", "pruned_flops", "pruned_params", "note")
        return {name: getattr(report, name) for name in names} | {"layers": list(report.layers)}

    def report(self) -> PruningReport:
        """What the masks on the model keep; ``print`` shows a table."""
        masks = {layer.name: mask_matrix(layer) for layer in self.layers}
        return self._describe(masks, self.beta, self._rounding)

    def _describe(self, masks: Masks, beta: float | None, rounding: RoundingCost | None) -> PruningReport:
        flops, params = percent_pruned(self.layers, masks)
        network = self._trace()
        rows = []
        for layer in self.layers:
            notes = []
            if network is None or not network.calls(layer.name):
                notes.append("pruned by its own mask alone: channel flow does not reach it")
            if not _has_logits(layer):
                notes.append("no group logits: all filters are in group 0")
            prunes_filters = layer.name in self.filter_layers
            rows.append(layer_row(layer, masks[layer.name], prunes_filters, "; ".join(notes)))
        return PruningReport(beta, flops, params, self._untraced, tuple(rows), rounding)

    def _rounding_cost(self, search: ThresholdSearch | PriceSearch, masks: Masks) -> RoundingCost | None:
        """Compared with the smallest beta that prunes as much without rounding."""
        if isinstance(search, PriceSearch) or search.multiple == 1:
            return None
        plain = ThresholdSearch(self.layers, search.rules, search.network, search.target)
        span = plain.reachable()
        beta = plain.best(min(search.pruned(masks), span[1] if span is not None else 0.0))
        kept = [rule.columns(masks[rule.name]).sum(1) for rule in search.rules]
        return RoundingCost(
            search.multiple,
            search.pruned_energy(masks),
            plain.pruned_energy(plain.masks(beta)[0]),
            sum(int((channels % search.multiple != 0).sum()) for channels in kept),
        )

    def _search(self) -> ThresholdSearch | PriceSearch:
        """ThresholdSearch or PriceSearch on the state before the last pruning, if that can be undone."""
        search = self._one_threshold()
        if self.target != "time":
            return search
        if search.network is None:
            raise DSPTraceError(f"only a traced model is pruned by time: {self._untraced}")
        if self._price is not None:
            return PriceSearch(search, self._price)
        times = LayerTimes.load()
        with evaluating(self._network):
            program = plan(search.network).map_tensors(lambda tensor: tensor.detach().cpu().float())
        around = surroundings(program, self.batch)
        return PriceSearch(search, partial(times.layer, batch=self.batch, around=around))

    def _one_threshold(self) -> ThresholdSearch:
        before = {name: value for name, (value, _) in self._undo.items()} if self._unchanged() else {}
        missing = [layer.name for layer in self.layers if not _has_logits(layer)]
        if missing:
            warnings.warn(
                f"layers {', '.join(missing)} have no group logits (all are 0): all their filters are in one "
                "group. Load group-learned weights first: model.load_state_dict(state, strict=False)",
                stacklevel=3,
            )
        rules: list[LayerRule] = []
        for layer in self.layers:
            weight = before.get(f"{layer.name}.weight", layer.conv.weight.detach())
            mask = before.get(f"{layer.name}.mask", layer.conv.get_buffer("mask"))
            prunes_filters = layer.name in self.filter_layers
            rules.append(layer_rule(layer, weight, mask, prunes_filters, self.prune_channels))
        counted: Counted = "params" if self.target == "params" else "macs"
        return ThresholdSearch(self.layers, rules, self._trace(), counted, self.channel_multiple)

    @torch.no_grad()
    def _prune(
        self, masks: Masks, beta: float | None, search: ThresholdSearch | PriceSearch
    ) -> tuple[float, float]:
        self._rounding = self._rounding_cost(search, masks)
        if self._unchanged():
            for name, (value, _) in self._undo.items():
                self._tensor(name).copy_(value)
        names = [f"{layer.name}.{kind}" for layer in self.layers for kind in ("weight", "mask")]
        names += [f"{layer.name}.bias" for layer in self.layers if layer.conv.bias is not None]
        names += [f"{path}.{kind}" for path in clearable(self._trace()) for kind in ("weight", "bias")]
        before = {name: self._tensor(name).clone() for name in names}
        for layer in self.layers:
            layer.conv.get_buffer("mask").copy_(masks[layer.name][:, :, None, None])
        self.beta = beta
        self._zeros = zeros_of(self._network, self.layers, self._trace())
        self._zeros.restore()
        self._undo = {name: (value, self._tensor(name).clone()) for name, value in before.items()}
        return percent_pruned(self.layers, masks)

    def _tensor(self, name: str) -> Tensor:
        return operator.attrgetter(name)(self._network).detach()

    def _unchanged(self) -> bool:
        """Does the model still hold exactly what the last pruning left?"""
        return all(
            now.shape == left.shape and now.device == left.device and torch.equal(now, left)
            for now, left in ((self._tensor(name), left) for name, (_, left) in self._undo.items())
        )

    def _trace(self) -> TracedNetwork | None:
        if self._traced is None and not self._untraced:
            try:
                self._traced = trace(self._network, inputs_like(self._network, self._example))
            except DSPTraceError as error:
                self._untraced = f"every layer is pruned by its own mask alone: {error}"
        return self._traced


def _register_buffers(layer: LayerInfo, n_groups: int) -> None:
    """Put the buffers ``group`` [G, O] and ``mask`` [O, C, 1, 1] on the conv; existing values are kept."""
    conv = layer.conv
    # Logits stay in float32 or better: half precision would make ties of what was learned.
    dtype = torch.promote_types(conv.weight.dtype, torch.float32)
    group = conv.weight.new_zeros(n_groups, layer.out_channels, dtype=dtype)
    mask = conv.weight.new_ones(layer.out_channels, layer.in_channels, 1, 1)
    for kind, new in (("group", group), ("mask", mask)):
        present = getattr(conv, kind, None)
        if hasattr(conv, kind):
            delattr(conv, kind)
        conv.register_buffer(kind, (new if present is None else present).detach().clone())


def _has_logits(layer: LayerInfo) -> bool:
    """Were group logits learned or loaded? A single group needs none."""
    logits = layer.conv.get_buffer("group")
    return len(logits) == 1 or bool(logits.any())


def _fraction(value: Any, what: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    check(0 <= number <= 1, what, value, "a fraction from 0 to 1, for example 0.5")
    return number


def _filter_layers(every_nth: Any, indices: Any, n_layers: int) -> Sequence[int]:
    """Indices of the layers that prune filters; for the arguments see PruneWrapper."""
    if indices is not None:
        if isinstance(indices, int) and indices == -1:
            return ()
        try:
            chosen = sorted({operator.index(index) for index in indices})
        except TypeError:
            raise DSPPruningError(
                f"fp_layer_indices is {indices!r}; expected a list of layer indices, or -1 or [] for none"
            ) from None
        wrong = [index for index in chosen if not 0 <= index < n_layers]
        if wrong:
            raise DSPPruningError(f"fp_layer_indices holds {wrong[0]}; expected 0 to {n_layers - 1}")
        return chosen
    if every_nth is None:
        raise DSPPruningError(
            "neither fp_every_nth_conv nor fp_layer_indices is given; name the layers that prune filters, "
            "or pass fp_every_nth_conv=-1 to prune none"
        )
    valid = is_count(every_nth, least=-1) and every_nth != 0
    check(valid, "fp_every_nth_conv", every_nth, "1 or more, or -1 for no filters")
    return range(every_nth - 1, n_layers, every_nth) if every_nth > 0 else ()
