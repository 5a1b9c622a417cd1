"""PruneWrapper: prune the input channels of each filter group, and filters, to a share of the MACs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any

import torch
from torch import nn

from dsp_kernels.errors import DSPPruningError, DSPTraceError
from dsp_kernels.graph.inputs import Example
from dsp_kernels.graph.network import TracedNetwork, trace
from dsp_pruning.layers import LayerPredicate, inputs_like, select_layers
from dsp_pruning.learn.settings import GroupCount, check_kind, groups_of_layers, named_counts
from dsp_pruning.prune.report import PruningReport, RoundingCost
from dsp_pruning.prune.rule import (
    LayerRule,
    Masks,
    Target,
    check_buffers,
    check_settings,
    filter_layer_indices,
    fraction,
    has_logits,
    layer_rule,
    mask_matrix,
    percent_pruned,
    register_buffers,
    summary_row,
)
from dsp_pruning.prune.search import ThresholdSearch
from dsp_pruning.prune.zeros import Undo, Zeros, clearable, read_state, zeros_of

__all__ = ["PruneWrapper"]


class PruneWrapper:
    """Group channel pruning and filter pruning of a group-learned model (arXiv 2303.09736).

    model: any ``nn.Module``. Each chosen conv gets two buffers, both in the model's state dict:
        ``group`` [G, O], the group logits (a group-learned checkpoint fills them), and
        ``mask`` [O, C, 1, 1] of 0 and 1. Both are kept where the model has them already.
    n_groups: G of every layer, or a mapping from the layer's name, or ``(name, conv) -> G``; at most the
        layer's filters.
    fp_every_nth_conv: layers whose index i has (i + 1) mod n = 0 also prune whole filters; -1 means none.
    fp_layer_indices: those layers by index, counted over the chosen layers from 0; -1 or [] means none.
        It wins over fp_every_nth_conv; one of the two has to be given.
    rank: this process's number, kept for its callers.
    example_input: (batch, channels, height, width), or a tuple of all inputs of the model; without it
        1 x C x 32 x 32 is tried.
    layers: ``(name, conv) -> bool`` chooses the layers (default: see ``select_layers``).
    prune_channels: False prunes whole filters only, the usual pruning by magnitude.
    target: what a rate is a share of: ``macs``, or ``params``, the weights.
    channel_multiple: every group keeps a multiple of so many input channels (8 suits tensor cores), of those
        that are not dead; ``report()`` says what that cost.

    Calling the wrapper calls its model. Model and wrapper can be copied and pickled at any time. BN's running
    statistics are never touched. Where the model cannot be traced, each layer is pruned by its own mask
    alone, and ``summary()`` says so.
    Raises DSPPruningError if no layer is left, G does not fit, or the filter layers make no sense.
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
    ) -> None:
        check_kind(
            model=(model, nn.Module, "an nn.Module"),
            layers=(layers, (Callable, NoneType), "a function (name, conv) -> bool"),
        )
        check_settings(target, channel_multiple, prune_channels)
        self.model = model
        self.rank = rank
        self.prune_channels = prune_channels
        self.target: Target = target
        self.channel_multiple = channel_multiple
        self.beta: float | None = None
        self.layers = select_layers(model, example_input, layers)
        counts = groups_of_layers(self.layers, n_groups)
        self.n_groups = named_counts(self.layers, n_groups, counts)
        chosen = filter_layer_indices(fp_every_nth_conv, fp_layer_indices, len(self.layers))
        self.filter_layers = tuple(self.layers[index].name for index in chosen)
        check_buffers(self.layers, counts)
        for layer, count in zip(self.layers, counts, strict=True):
            register_buffers(layer, count)
        self._example = inputs_like(model, example_input)
        self._network: TracedNetwork | None = None
        self._untraced = ""
        self._undo: Undo | None = None
        self._zeros: Zeros | None = None
        self._rounding: RoundingCost | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # The graph and the cached places are found again when they are next needed.
        return self.__dict__ | {"_network": None, "_untraced": "", "_zeros": None}

    def initialize(self, rate: float, cycle: int = 0, cycles: int = 1) -> tuple[float, float]:
        """Prune to a rate and return (FLOPs, params), each percent pruned over the chosen layers.

        rate: fraction of the chosen layers' MACs (or weights, see target), 0 <= rate < 1. The smallest beta
        that reaches it is taken: the result is the nearest that one beta for all layers can give, and never
        below the rate.
        cycle, cycles: in the cyclic schedule, cycle i of n, counted from 0, prunes to rate * (i + 1) / n.

        May be called again, for cyclic pruning: it starts from the weights and masks of that moment, and what
        is pruned stays pruned. Only while nothing has changed the weights since the last pruning, that
        pruning is undone first.
        Raises DSPPruningError for a rate that cannot be reached, with the range that can; the model is then
        left as it was.
        """
        if not (isinstance(cycle, int) and isinstance(cycles, int) and 0 <= cycle < cycles):
            raise DSPPruningError(
                f"cycle {cycle!r} of {cycles!r}: expected 0 to one below the number of cycles"
            )
        search = self._search()
        beta = search.best(fraction(rate, "the pruning rate") * (cycle + 1) / cycles)
        return self._prune(search, beta)

    def preview(self, rate: float) -> PruningReport:
        """What ``initialize(rate)`` would keep. Nothing is changed. Raises as it does."""
        search = self._search()
        return self._report(search, search.best(fraction(rate, "the pruning rate")))

    def reachable(self) -> tuple[float, float]:
        """The smallest and the largest rate within reach from here, 0..1. Nothing is changed.

        The smallest is above 0 where something is pruned or dead already.
        Raises DSPPruningError where no output depends on the input.
        """
        span = self._search().reachable()
        if span is None:
            raise DSPPruningError("no rate is within reach: the output does not depend on the input any more")
        return span

    def prune_at(self, beta: float) -> tuple[float, float]:
        """Prune at one threshold and return (FLOPs, params), each percent pruned over the chosen layers.

        beta: 0 <= beta <= 1, the share of a group's (and of a filter layer's) sum of squares that may go.
        Starts from the state before the last pruning as long as nothing has changed the weights since.
        """
        return self._prune(self._search(), fraction(beta, "the threshold beta"))

    def after_step(self) -> None:
        """Set what is pruned to zero again; to be called after every ``optimizer.step()``.

        Besides the masked kernels these are, for a filter that is gone, the conv's bias and the weight and
        bias of its BN: a constant left there would be an input of the next layer.

        Raises DSPPruningError if nothing was pruned yet and the model holds no masks from before.
        """
        masks = [layer.conv.get_buffer("mask") for layer in self.layers]
        if self.beta is None and self._zeros is None and all(bool(mask.all()) for mask in masks):
            raise DSPPruningError(
                "after_step() with nothing pruned: call initialize(rate) first, or load masked weights"
            )
        if self._zeros is None or not self._zeros.hold_for(masks):
            self._zeros = zeros_of(self.model, self.layers, self._trace())
        self._zeros.restore()

    def summary(self) -> dict[str, Any]:
        """What the masks on the model keep: plain numbers and text.

        ``layers`` holds one row per layer: filters, channels, groups, kernels and MACs, each with its kept
        count, the channels that each kept group reads, whether it prunes filters, and a note where something
        limits the pruning.
        """
        report = self.report()
        return {
            "beta": report.beta,
            "pruned_flops": report.pruned_flops,
            "pruned_params": report.pruned_params,
            "note": report.note,
            "layers": list(report.layers),
        }

    def report(self) -> PruningReport:
        """What the masks on the model keep, layer by layer; print it for a table."""
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
            if not has_logits(layer):
                notes.append("no group logits: all filters are in group 0")
            prunes_filters = layer.name in self.filter_layers
            rows.append(summary_row(layer, masks[layer.name], prunes_filters, "; ".join(notes)))
        return PruningReport(beta, flops, params, self._untraced, tuple(rows), rounding)

    def _report(self, search: ThresholdSearch, beta: float) -> PruningReport:
        masks, _ = search.masks(beta)
        return self._describe(masks, beta, self._rounding_cost(search, beta, masks))

    def _rounding_cost(self, search: ThresholdSearch, beta: float, masks: Masks) -> RoundingCost | None:
        """Compared with the smallest beta that prunes as much without rounding."""
        if search.multiple == 1:
            return None
        plain = ThresholdSearch(self.layers, search.rules, search.network, search.target)
        span = plain.reachable()
        same = plain.best(min(search.pruned(masks), span[1] if span is not None else 0.0))
        return RoundingCost(
            search.multiple,
            beta,
            same,
            search.pruned_energy(masks),
            plain.pruned_energy(plain.masks(same)[0]),
            sum(
                int((rule.columns(masks[rule.name]).sum(1) % search.multiple != 0).sum())
                for rule in search.rules
            ),
        )

    def _search(self) -> ThresholdSearch:
        rules = self._rules()
        return ThresholdSearch(self.layers, rules, self._trace(), self.target, self.channel_multiple)

    def _rules(self) -> list[LayerRule]:
        """The rule of every layer, on the state before the last pruning if that can be undone."""
        before = self._undo.before if self._undo is not None and self._undo.possible(self.model) else {}
        missing = [layer.name for layer in self.layers if not has_logits(layer)]
        if missing:
            warnings.warn(
                f"layers {', '.join(missing)} have no group logits (all are 0): all their filters are in one "
                "group. Load group-learned weights first: model.load_state_dict(state, strict=False)",
                stacklevel=4,
            )
        rules = []
        for layer in self.layers:
            weight = before.get(f"{layer.name}.weight", layer.conv.weight.detach())
            mask = before.get(f"{layer.name}.mask", layer.conv.get_buffer("mask"))
            prunes_filters = layer.name in self.filter_layers
            rules.append(layer_rule(layer, weight, mask, prunes_filters, self.prune_channels))
        return rules

    @torch.no_grad()
    def _prune(self, search: ThresholdSearch, beta: float) -> tuple[float, float]:
        masks, _ = search.masks(beta)
        self._rounding = self._rounding_cost(search, beta, masks)
        if self._undo is not None and self._undo.possible(self.model):
            self._undo.undo(self.model)
        names = [f"{layer.name}.{kind}" for layer in self.layers for kind in ("weight", "mask")]
        names += [f"{layer.name}.bias" for layer in self.layers if layer.conv.bias is not None]
        names += [f"{path}.{kind}" for path in clearable(self._trace()) for kind in ("weight", "bias")]
        before = read_state(self.model, names)
        for layer in self.layers:
            layer.conv.get_buffer("mask").copy_(masks[layer.name][:, :, None, None])
        self.beta = beta
        self.after_step()
        self._undo = Undo(before, read_state(self.model, names))
        return percent_pruned(self.layers, masks)

    def _trace(self) -> TracedNetwork | None:
        if self._network is None and not self._untraced:
            try:
                self._network = trace(self.model, inputs_like(self.model, self._example))
            except DSPTraceError as error:
                self._untraced = f"every layer is pruned by its own mask alone: {error}"
        return self._network
