"""A copy of somebody's model in which every weight is an ordinary parameter."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

__all__ = ["plain_copy", "unwrapped"]


def unwrapped(model: Any) -> Any:
    """The model inside a GroupWrapper, a PruneWrapper, DataParallel, DDP or what torch.compile returns."""
    if not isinstance(model, nn.Module):
        model = getattr(model, "model", model)
    while isinstance(model, nn.Module):
        parallel = isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel)
        inner = model.module if parallel else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            break
        model = inner
    return model


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy whose computed weights (weight norm, spectral norm, ``torch.nn.utils.prune``) are numbers.

    In eval mode it gives what the model gives; training it trains the weights themselves.
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
        values = {name: getattr(module, name) for name in module.parametrizations}  # type: ignore[union-attr]
        del module.parametrizations
        module.__class__ = type(module).__bases__[0]
        for name, value in values.items():
            module.register_parameter(name, nn.Parameter(value.detach().clone()))
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)
        elif isinstance(hook, WeightNorm):
            remove_weight_norm(module, hook.name)
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(module, hook.name)
