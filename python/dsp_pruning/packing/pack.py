"""pack(model, example_input): from a masked dense network to one of small grouped convolutions, exactly."""

import copy
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from dsp_kernels import PackedConv2d
from dsp_kernels.errors import DSPError, DSPFormatError, DSPPruningError, DSPShapeError, DSPVerificationError
from dsp_kernels.file.encode import encode_network
from dsp_kernels.graph.compare import check_finite, compare_answers, largest_difference, tensors_of
from dsp_kernels.graph.inputs import Example, as_inputs, check_device, images_like
from dsp_kernels.graph.network import TracedNetwork, captured, evaluating, keep_captured, trace
from dsp_kernels.graph.size_check import FixedSizeConv2d, SizeCheck
from dsp_kernels.tolerances import network_tolerance
from dsp_pruning.distributed import unwrap
from dsp_pruning.packing.plan import Planner
from dsp_pruning.packing.rebuild import apply
from dsp_pruning.packing.twin import planned_widths

# Rounding errors of two orders of summation are independent and about equal; a larger multiple is an error.
_ROUNDINGS = 8.0


def pack(model: nn.Module, example_input: Example, fixed_size: bool = False) -> nn.Module:
    """A copy of a pruned network without what the masks removed, with the same outputs in eval mode.

    example_input: (batch, channels, height, width) of the sizes that the network is made for; a tuple of
        tensors for a model of several inputs.
    fixed_size: whether the copy may be limited to images of the example's height and width. Constants are
        then also folded where their readers pad zeros, into a bias per output position, and images
        of other sizes raise DSPShapeError. See ``FixedSizeConv2d``.

    Every pruned convolution becomes a PackedConv2d with one group per set of channels that filters read.
    Channels that are zero or not read are removed from all modules: norms, linear layers, residual streams,
    concatenations, gates, depthwise convolutions. A pruned filter whose output is another constant in eval
    mode (a norm's shift, a bias) is removed if all its readers can take the constant into their bias, which
    needs a reader that pads no zeros (docs/guide/packing.md). ``pack`` keeps all channels around
    operations it does not support. ``packed.packing``, a PackingReport, says where and why, and which
    original channels every layer kept.

    The copy is an ordinary module in the model's own mode. It trains as the masked network does if the norms
    of pruned filters have weight and bias 0, as PruneWrapper leaves them. The model is not changed.

    A model of one input whose code needs sizes as numbers is traced for the example's height and width.
    Images of other sizes then raise DSPShapeError, and the report says so.

    Raises DSPTraceError if the model cannot be traced, DSPPruningError if a mask does not fit its weight, and
    DSPVerificationError if the copy and the masked network differ. Warns if weights are not 0 where their
    mask is.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    >>> _ = model[0].weight.data[:3].zero_(), model[0].bias.data[:3].zero_()  # three pruned filters
    >>> packed = pack(model, torch.zeros(1, 3, 8, 8))
    >>> print(packed[0].structure)
    3->5 in 1 groups (3->5)
    >>> print(packed.packing)
    3 channels removed, 0 constants folded
    """
    # GroupWrapper and PruneWrapper hold a model, which may itself be wrapped by DDP or torch.compile.
    model = unwrap(model if isinstance(model, nn.Module) else getattr(model, "model", model))
    if not isinstance(model, nn.Module):
        raise DSPShapeError(f"pack got a {type(model).__name__}; expected a module and an example input")
    inputs = as_inputs(example_input)
    _check_packable(model)
    check_device(model, inputs[0])
    # The copy has to be trainable, whatever mode the caller is in.
    with torch.autocast(inputs[0].device.type, enabled=False), torch.inference_mode(False):
        return _pack(model, inputs, fixed_size)


def _pack(model: nn.Module, inputs: tuple[Tensor, ...], fixed_size: bool) -> nn.Module:
    packed = _masked_copy(model)
    network = trace(packed, inputs)
    expected = _Answers(packed, inputs)
    graphs = {False: network.captured}
    with suppress(DSPError):  # of a model that cannot be trained or followed in training mode
        graphs[True] = captured(packed, inputs, training=True)
    held = _read_in_training(packed, network, graphs[True].graph) if True in graphs else {}
    report = Planner(network, held, fixed_size).plan()
    for node in network:  # also convolutions without a plan, whose parameters the model's own code reads
        for name in ("group", "mask"):
            if isinstance(node.module, nn.Conv2d) and hasattr(node.module, name):
                delattr(node.module, name)
    for plan in report.layers.values():
        apply(packed, plan)
    packed.packing = report  # type: ignore[assignment]
    before = getattr(model, "dense_widths", None) or {}  # of a network that was packed already
    packed.dense_widths = {**planned_widths(report.layers.values()), **before}  # type: ignore[assignment]
    if network.captured.check is not None:
        packed.register_forward_pre_hook(partial(_check_size, network.captured.check))
    expected.compare(packed, lambda: _masked_copy(model))
    if not any(isinstance(module, FixedSizeConv2d) for module in packed.modules()):
        keep_captured(packed, {mode: found for mode, found in graphs.items() if not (mode and found.sized)})
        try:
            encode_network(packed, inputs)
        except DSPFormatError as error:
            packed.packing = replace(report, unsaved=str(error))  # type: ignore[assignment]
    return packed


def _check_size(check: SizeCheck, module: nn.Module, args: tuple[Any, ...]) -> None:
    """A pre-hook that refuses images of a size for which the model was not traced."""
    for x in args[:1]:
        check(x)


def _check_packable(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise DSPShapeError(f"{name!r} has no shape yet; run the model once before it is packed")
    if isinstance(model, nn.Conv2d | PackedConv2d | nn.ConvTranspose2d | nn.Linear):
        raise DSPPruningError(
            f"pack got a single {type(model).__name__}, whose channels are all input or output; "
            "expected a network: nn.Sequential(layer) is one"
        )


def _masked_copy(model: nn.Module) -> nn.Module:
    """A copy with masks multiplied into the weights; warns where that changes a weight."""
    masked = plain_copy(model)
    for name, module in masked.named_modules():
        mask = getattr(module, "mask", None)
        if not isinstance(module, nn.Conv2d) or not isinstance(mask, Tensor):
            continue
        expected = (*module.weight.shape[:2], 1, 1)
        if tuple(mask.shape) != expected:
            raise DSPPruningError(
                f"the mask of layer {name!r} has shape {tuple(mask.shape)}; expected {expected}"
            )
        with torch.no_grad():
            grown = int((module.weight * mask.eq(0)).count_nonzero())
            module.weight.masked_fill_(mask.eq(0), 0.0)
        if grown:
            warnings.warn(
                f"layer {name!r} has {grown} weights that are not 0 where its mask is; the packed network is "
                "the masked one. Call PruneWrapper.after_step() after every optimizer step",
                stacklevel=4,
            )
    return masked


def _read_in_training(model: nn.Module, network: TracedNetwork, graph: fx.Graph) -> dict[str, str]:
    """Node -> reason, for tensors whose width auxiliary heads, which run in training mode only, rely on.

    graph: of the model in training mode.
    """
    held: dict[str, str] = {}

    def learns(node: fx.Node) -> bool:
        return node.op == "call_module" and bool(list(model.get_submodule(str(node.target)).parameters()))

    for node in graph.nodes:
        if not learns(node) or network.calls(str(node.target)):
            continue
        reason = f"{str(node.target)!r}, which runs in training only, reads its channels"
        waiting = list(node.all_input_nodes)
        while waiting:  # back to modules that also run in eval mode; functions have other node names there
            source = waiting.pop()
            calls = network.calls(str(source.target)) if source.op == "call_module" else ()
            for call in calls:
                held.setdefault(call.name, reason)
            if not calls and not learns(source):
                waiting.extend(source.all_input_nodes)
    return held


class _Answers:
    """The answers of the masked network to the example and to random images."""

    def __init__(self, masked: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.given = images_like(inputs)
        layers = [module for module in masked.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
        reduction = max((module.weight[0].numel() for module in layers), default=1)
        self.dtype = inputs[0].dtype
        self.bound = network_tolerance(self.dtype, reduction, len(layers))
        self.expected = {}
        for what, given in self.given.items():
            self.expected[what] = _answer(masked, given)
            check_finite(masked, tensors_of(self.expected[what]), what)

    def compare(self, packed: nn.Module, masked: Callable[[], nn.Module]) -> None:
        """Raise DSPVerificationError where ``packed`` answers otherwise.

        masked: makes the masked network again.
        A deep network may amplify rounding errors of a low precision beyond any bound known beforehand. The
        packed network may then be a few times as far from the float64 answer as the masked one is.
        """
        for what, given in self.given.items():
            expected, slack = self.expected[what], 0.0
            try:
                got = _answer(packed, given)
            except DSPError:
                raise
            except Exception as broken:  # code of the model that tracing does not see
                raise DSPVerificationError(
                    f"the packed network does not run on {what}, so it was not packed: "
                    f"{type(broken).__name__}: {' '.join(str(broken).split())[:300]}"
                ) from broken
            difference, scale = largest_difference(expected, got)
            if not difference <= self.bound * scale:
                again = masked()
                if largest_difference(expected, _answer(again, given))[0] > self.bound * scale:
                    raise DSPVerificationError(
                        f"the answers of the model in eval mode to {what} differ from call to call (random "
                        "numbers in forward()?), so no packed network can be compared with it"
                    )
                if self.dtype != torch.float64:
                    doubles = tuple(x.double() if x.is_floating_point() else x for x in given)
                    exact = _answer(again.double(), doubles)
                    slack = _ROUNDINGS * largest_difference(exact, expected)[0]
                    expected = exact
            differs, advice = "the packed network differs from the masked one", "; it was not packed"
            compare_answers(expected, got, self.bound, differs, what, slack=slack, advice=advice)


def _answer(model: nn.Module, given: tuple[Tensor, ...]) -> Any:
    with evaluating(model), torch.no_grad():
        return model(*(x.clone() for x in given))


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy whose computed weights (weight norm, spectral norm, ``torch.nn.utils.prune``) are plain weights.

    Its outputs in eval mode are the model's; training it trains these weights. Frozen weights stay frozen,
    and tensors computed from buffers become buffers.
    """
    values = [value for module in model.modules() for value in vars(module).values()]
    computed = [value for value in values if isinstance(value, Tensor) and not value.is_leaf]
    # deepcopy refuses non-leaf tensors; the copy recomputes them or makes them parameters.
    copied = copy.deepcopy(model, {id(value): value.detach().clone() for value in computed})
    with torch.no_grad():
        for module in copied.modules():
            _make_plain(module)
    return copied


def _make_plain(module: nn.Module) -> None:
    if isinstance(module, parametrize.ParametrizationList):
        return
    if parametrize.is_parametrized(module):
        # Not remove_parametrizations: it deletes properties of a class that the original shares.
        lists = dict(module.parametrizations.items())  # type: ignore[union-attr, operator]
        values = {name: getattr(module, name).detach().clone() for name in lists}
        del module.parametrizations
        module.__class__ = type(module).__bases__[0]
        for name, value in values.items():
            if originals := list(lists[name].parameters(recurse=False)):
                module.register_parameter(name, nn.Parameter(value, _any_trained(originals)))
            else:
                module.register_buffer(name, value)
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)
        elif isinstance(hook, WeightNorm):
            learns = _any_trained(getattr(module, hook.name + end) for end in ("_g", "_v"))
            remove_weight_norm(module, hook.name).get_parameter(hook.name).requires_grad_(learns)
        elif isinstance(hook, SpectralNorm):
            learns = _any_trained([getattr(module, f"{hook.name}_orig")])
            remove_spectral_norm(module, hook.name).get_parameter(hook.name).requires_grad_(learns)


def _any_trained(tensors: Iterable[Tensor]) -> bool:
    return any(tensor.requires_grad for tensor in tensors)
