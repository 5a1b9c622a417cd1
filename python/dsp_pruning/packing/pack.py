"""pack(model, example_input): from a masked dense network to one of small grouped convolutions, exactly."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from dsp_kernels import PackedConv2d
from dsp_kernels.errors import DSPError, DSPPruningError, DSPShapeError, DSPVerificationError
from dsp_kernels.graph.compare import check_finite
from dsp_kernels.graph.inputs import Example, as_inputs, check_device
from dsp_kernels.graph.network import TracedNetwork, call_graph, evaluating, trace
from dsp_kernels.graph.size_check import SizeCheck
from dsp_kernels.tolerances import network_tolerance
from dsp_pruning.distributed import unwrap
from dsp_pruning.packing.plan import plan_packing
from dsp_pruning.packing.rebuild import rebuild, replace_module
from dsp_pruning.packing.report import PackingReport

__all__ = [
    "pack",
    "plain_copy",
]

# Roundings of two ways to sum are independent and of one size; this many sizes apart they are not.
_ROUNDINGS = 8.0


def pack(model: nn.Module, example_input: Example, fixed_size: bool = False) -> nn.Module:
    """A copy of a pruned network in which nothing that the masks removed is left.

    example_input: (batch, channels, height, width) of the sizes that the network is made for; a tuple of
    tensors for a model of several inputs.
    fixed_size: whether the copy may be right for images of the example's height and width only. Constants
    then also go where their readers pad zeros, into a bias for every place (rule 4); other sizes raise
    DSPShapeError. See ``FixedSizeConv2d``.

    Every pruned convolution becomes a PackedConv2d with one group per set of channels that filters read.
    Channels that are zero, or that nobody reads, disappear from everything that holds them: norms, linear
    layers, residual streams, concatenations, gates, depthwise convolutions. A pruned filter that leaves
    another constant in eval mode (a norm's shift, a bias) disappears where all its readers can take the
    constant into their bias, which is where they pad no zeros (rules 1 to 3 of docs/packing.md); elsewhere
    it is kept. Around an operation that packing does not know all channels are kept; ``packed.packing``, a
    PackingReport, says where and why, and which original channels every layer kept.

    The copy is an ordinary module in the model's own mode. It trains as the masked network does, with the
    same statistics, if pruned filters have norms of weight and bias 0, which is how PruneWrapper leaves
    them. The model is not changed.

    A model that torch.fx cannot follow is followed by torch.export. What its code decides by the size of the
    image then holds for the copy too: images for which the code decides otherwise raise DSPShapeError.

    Raises DSPTraceError if neither can follow the model, DSPPruningError if a mask does not fit its
    weight, and DSPVerificationError if the copy does not answer as the masked network does. Warns if weights
    are not 0 where their mask is.
    """
    # GroupWrapper and PruneWrapper hold a model, which DDP or torch.compile may have been around.
    model = unwrap(model if isinstance(model, nn.Module) else getattr(model, "model", model))
    if not isinstance(model, nn.Module):
        raise DSPShapeError(f"pack got a {type(model).__name__}; expected a module and an example input")
    inputs = as_inputs(example_input)
    _check_packable(model)
    check_device(model, inputs[0])
    # What is made here outlives the caller's modes: it has to be trainable.
    with torch.autocast(inputs[0].device.type, enabled=False), torch.inference_mode(False):
        return _pack(model, inputs, fixed_size)


def _pack(model: nn.Module, inputs: tuple[Tensor, ...], fixed_size: bool) -> nn.Module:
    masked = _masked_copy(model)
    packed = copy.deepcopy(masked)
    network = trace(packed, inputs)
    plan = plan_packing(network, _read_in_training(packed, network, inputs), fixed_size)
    for path, layer in plan.layers.items():
        replace_module(packed, path, rebuild(packed.get_submodule(path), layer))
    packed.packing = PackingReport(plan.layers, plan.barriers)  # type: ignore[assignment]
    if network.size_check is not None:
        packed.register_forward_pre_hook(_SizesFirst(network.size_check))
    _verify(masked, packed, inputs)
    return packed


class _SizesFirst:
    """A hook that refuses images for which the network's code takes another way than it was packed for."""

    def __init__(self, check: SizeCheck) -> None:
        self.check = check

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        for x in args[:1]:
            self.check(x)


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
    """A copy whose convolutions are multiplied by their masks; a warning where that changes the network.

    Raises DSPPruningError if a mask is not [O, C, 1, 1].
    """
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


def _read_in_training(model: nn.Module, network: TracedNetwork, inputs: tuple[Tensor, ...]) -> dict[str, str]:
    """Node -> reason, for values that are read by modules which run in training mode only (auxiliary heads).

    Such a module is left as it is, so its input has to keep its width.
    """
    graph = call_graph(model, training=True, example_input=inputs)
    held: dict[str, str] = {}
    for node in graph.nodes if graph is not None else ():
        path = str(node.target)
        if (
            node.op != "call_module"
            or network.calls(path)
            or not list(model.get_submodule(path).parameters())
        ):
            continue
        waiting = list(node.all_input_nodes)
        while waiting:  # back to the modules that run in eval mode too; names of functions differ
            source = waiting.pop()
            if source.op == "call_module" and network.calls(str(source.target)):
                for call in network.calls(str(source.target)):
                    held.setdefault(call.name, f"{path!r}, which runs in training only, reads its channels")
            elif source.op != "call_module" or not list(model.get_submodule(str(source.target)).parameters()):
                waiting.extend(source.all_input_nodes)
    return held


def _verify(masked: nn.Module, packed: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Compare on the example and on random images: an example of zeros would hide a wrong channel.

    A deep network may magnify the rounding of a low precision beyond any bound known beforehand. The packed
    one may then be as far from the exact answer as the masked one is itself, times a few.
    """
    generator = torch.Generator().manual_seed(0)
    noise = tuple(
        torch.randn(x.shape, generator=generator).to(x) if x.is_floating_point() else x for x in inputs
    )
    convolutions = [module for module in masked.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    reduction = max((module.weight[0].numel() for module in convolutions), default=1)
    dtype = inputs[0].dtype
    bound = network_tolerance(dtype, reduction, len(convolutions))
    with evaluating(masked), evaluating(packed), torch.no_grad():
        for what, given in (("the example input", inputs), ("random images", noise)):
            expected = _tensors(masked(*(x.clone() for x in given)))
            check_finite(masked, expected, what)
            try:
                got = _tensors(packed(*(x.clone() for x in given)))
            except DSPError:
                raise
            except Exception as broken:  # code of the model's own that no graph shows
                raise DSPVerificationError(
                    f"the packed network does not run on {what}, so it was not packed: "
                    f"{type(broken).__name__}: {' '.join(str(broken).split())[:300]}"
                ) from broken
            scale, error = _largest(expected), _largest_difference(expected, got)
            if error <= bound * scale:
                continue
            allowed = bound * scale
            if dtype != torch.float64:
                doubles = (x.double() if x.is_floating_point() else x.clone() for x in given)
                exact = _tensors(copy.deepcopy(masked).double()(*doubles))
                allowed += _ROUNDINGS * _largest_difference(exact, expected)
                error = _largest_difference(exact, got)
            if not error <= allowed:
                raise DSPVerificationError(
                    f"the packed network differs from the masked one on {what} by {error:.3g} (largest "
                    f"output {scale:.3g}, allowed {allowed:.3g}); it was not packed"
                )


def _largest(outputs: list[Tensor]) -> float:
    return max((output.abs().max().item() for output in outputs), default=0.0)


def _largest_difference(expected: list[Tensor], got: list[Tensor]) -> float:
    """The largest difference of two answers; NaN, which no bound allows, if one is not a number."""
    worst = [(a - b.to(a.dtype)).abs().max() for a, b in zip(expected, got, strict=True)]
    return torch.stack([difference.double() for difference in worst]).max().item() if worst else 0.0


def _tensors(output: Any) -> list[Tensor]:
    """All tensors of a network's answer, which may be nested."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        return [tensor for part in output.values() for tensor in _tensors(part)]
    if isinstance(output, list | tuple):
        return [tensor for part in output for tensor in _tensors(part)]
    return []


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy whose computed weights (weight norm, spectral norm, ``torch.nn.utils.prune``) are numbers.

    In eval mode it gives what the model gives; training it trains the weights themselves. What was frozen
    stays so, and what was computed from buffers is a buffer.
    """
    computed = [
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    # deepcopy refuses results of autograd; the copy computes them anew or makes numbers of them.
    copied = copy.deepcopy(model, {id(value): value.detach().clone() for value in computed})
    with torch.no_grad():
        for module in copied.modules():
            _make_plain(module)
    return copied


def _make_plain(module: nn.Module) -> None:
    if isinstance(module, parametrize.ParametrizationList):
        return
    if parametrize.is_parametrized(module):
        # Not remove_parametrizations: it takes the properties from a class that the original shares.
        ways = dict(module.parametrizations.items())  # type: ignore[union-attr, operator]
        values = {name: getattr(module, name).detach().clone() for name in ways}
        del module.parametrizations
        module.__class__ = type(module).__bases__[0]
        for name, value in values.items():
            originals = list(ways[name].parameters(recurse=False))
            if originals:
                made = nn.Parameter(value, requires_grad=_learn(originals))
                module.register_parameter(name, made)
            else:
                module.register_buffer(name, value)
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)
        elif isinstance(hook, WeightNorm):
            learns = _learn(getattr(module, hook.name + end) for end in ("_g", "_v"))
            remove_weight_norm(module, hook.name).get_parameter(hook.name).requires_grad_(learns)
        elif isinstance(hook, SpectralNorm):
            learns = _learn([getattr(module, f"{hook.name}_orig")])
            remove_spectral_norm(module, hook.name).get_parameter(hook.name).requires_grad_(learns)


def _learn(tensors: Iterable[Tensor]) -> bool:
    return any(tensor.requires_grad for tensor in tensors)
