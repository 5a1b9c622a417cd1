"""A copy of somebody's model in which every weight is an ordinary parameter."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

__all__ = ["plain_copy"]


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
