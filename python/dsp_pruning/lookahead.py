"""One more training step on scratch copies: where the weights would go, with nothing real touched."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dsp_pruning.checks import all_finite

__all__ = ["LookAhead", "look_ahead"]


@dataclass(frozen=True)
class LookAhead:
    """Where one more step on the same batch leads.

    loss: scalar, of the forward pass from the start weights.
    weights: for every parameter asked for, its value after the step, in its own shape and dtype.
    overflow: a scaled gradient was not finite; ``weights`` then mean nothing.
    """

    loss: Tensor
    weights: dict[Tensor, Tensor]
    overflow: bool


def look_ahead(
    model: nn.Module,
    optimizer: Optimizer,
    criterion: Callable[[Tensor, Tensor], Tensor],
    starts: Mapping[Tensor, Tensor],
    x: Tensor,
    y: Tensor,
    autocast_dtype: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> LookAhead:
    """Golden README section 4, step 5: one optimizer step on the batch (x, y) from other weights.

    starts: parameter -> the value it starts from; every other parameter starts from its own.
    autocast_dtype: runs the forward pass under autocast.
    scaler: its present scale multiplies the loss and is divided out of the gradients; it is not updated.

    The forward pass runs on copies of parameters and buffers, the step in a copy of the optimizer with its
    state and without its hooks, so weights, gradients, BN statistics, optimizer and random numbers stay as
    they were, whatever happens in between.
    """
    copies = _copy_parameters(model, optimizer, starts)
    device = next(iter(starts)).device
    random = torch.random.fork_rng(
        devices=[] if device.type == "cpu" else [device],
        device_type="cuda" if device.type == "cpu" else device.type,
    )
    # No cached casts: within an outer autocast they could be those of other weights.
    autocast = torch.autocast(device.type, autocast_dtype, autocast_dtype is not None, cache_enabled=False)
    with torch.enable_grad(), random:
        with autocast, _substituted(model, copies):
            loss = criterion(model(x), y)
        scaled = loss if scaler is None else scaler.scale(loss)
        leaves = [value for value in copies.values() if value.requires_grad]
        gradients = torch.autograd.grad(scaled, leaves, allow_unused=True)
    inverse = 1.0 if scaler is None else 1.0 / scaler.get_scale()
    for leaf, gradient in zip(leaves, gradients, strict=True):
        leaf.grad = gradient if gradient is None or scaler is None else gradient * inverse
    overflow = scaler is not None and not all_finite(gradients)
    if not overflow:
        _scratch_optimizer(optimizer, copies).step()
    return LookAhead(loss.detach(), {parameter: copies[parameter].detach() for parameter in starts}, overflow)


@contextmanager
def _substituted(model: nn.Module, copies: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """The model runs on the copies and on clones of its buffers.

    Every module is visited once and every tensor has one copy, however many names either goes by.
    """
    slots: list[dict[str, Any]] = [
        slot for module in model.modules() for slot in (module._parameters, module._buffers)
    ]
    held = [dict(slot) for slot in slots]
    buffers = {buffer: buffer.detach().clone() for buffer in model.buffers()}
    try:
        for slot in slots:
            for name, tensor in slot.items():
                if tensor is not None:
                    slot[name] = copies.get(tensor, buffers.get(tensor, tensor))
        yield
    finally:
        for slot, before in zip(slots, held, strict=True):
            slot.clear()
            slot.update(before)


def _copy_parameters(
    model: nn.Module, optimizer: Optimizer, starts: Mapping[Tensor, Tensor]
) -> dict[Tensor, Tensor]:
    """Parameter -> a leaf with its own memory: all that the model trains and all that the optimizer moves."""
    moved = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return {
        parameter: starts.get(parameter, parameter)
        .detach()
        .clone(memory_format=torch.preserve_format)
        .requires_grad_(parameter.requires_grad)
        for parameter in (*trained, *moved)
    }


def _scratch_optimizer(optimizer: Optimizer, copies: Mapping[Tensor, Tensor]) -> Optimizer:
    """The same optimizer over the copies, with copies of its state."""
    scratch = object.__new__(type(optimizer))
    # A learning-rate scheduler puts a step() that counts calls on the instance: leave that one out.
    scratch.__dict__.update({name: value for name, value in vars(optimizer).items() if name != "step"})
    # deepcopy takes what the memo names instead of copying it: every parameter becomes its copy.
    memo = {id(parameter): value for parameter, value in copies.items()}
    scratch.state, scratch.param_groups = copy.deepcopy((optimizer.state, optimizer.param_groups), memo)
    scratch._optimizer_step_pre_hooks = OrderedDict()
    scratch._optimizer_step_post_hooks = OrderedDict()
    return scratch
