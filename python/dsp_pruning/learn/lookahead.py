"""One more training step on scratch copies: where the weights would go, with nothing real touched."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from dsp_kernels.errors import DSPPruningError
from dsp_pruning import distributed

__all__ = ["OPTIMIZERS", "Batch", "LookAhead", "as_batches", "check_optimizer", "look_ahead"]

Batch = tuple[Any, Any]

# These step every parameter by itself, from nothing but its gradient and its own state. So it is enough
# to step the weights that are asked for. The tests compare each with its real step.
OPTIMIZERS: tuple[type[Optimizer], ...] = (
    optim.SGD,
    optim.Adam,
    optim.AdamW,
    optim.NAdam,
    optim.RAdam,
    optim.Adamax,
    optim.RMSprop,
    optim.Adagrad,
    optim.Adadelta,
    optim.ASGD,
    optim.Adafactor,
)
# Of these the form that steps lists of tensors gives the same bits as the loop over them; tests compare them.
_FEW_OPERATIONS = (optim.SGD, optim.Adam, optim.AdamW)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class LookAhead:
    """Where one more step on the same batch leads.

    loss: scalar, of the forward pass from the start weights; the mean over micro-batches and processes.
    weights: for every parameter asked for, its value after the step, in its own shape and dtype.
    overflow: float32 scalar, 1 where a scaled gradient was not finite; ``weights`` then mean nothing. None
        without a scaler.
    refused: the network did not run on images in another order of memory than the caller's.
    """

    loss: Tensor
    weights: dict[Tensor, Tensor]
    overflow: Tensor | None
    refused: bool


def check_optimizer(optimizer: Optimizer) -> None:
    """Raise DSPPruningError for an optimizer that the look-ahead cannot step by itself."""
    if type(optimizer) not in OPTIMIZERS:
        names = ", ".join(kind.__name__ for kind in OPTIMIZERS)
        raise DSPPruningError(
            f"the look-ahead cannot step {type(optimizer).__name__} on a copy of some weights (it may need a "
            f"closure, or all parameters at once); it knows {names}. Use second_order='none' with any other"
        )


@torch.no_grad()
def look_ahead(
    model: nn.Module,
    optimizer: Optimizer,
    criterion: Callable[[Any, Any], Tensor],
    starts: Mapping[Tensor, Tensor],
    batches: Sequence[Batch],
    autocast_dtype: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    reorder: bool = False,
    several: bool = False,
) -> LookAhead:
    """Golden README section 4, step 5: one optimizer step on the batch (x, y) from other weights.

    starts: parameter -> the value it starts from, without history; every other parameter stands
        still: it would move too, but what it becomes is not asked for.
    batches: the micro-batches of one step, each with the weight 1 / len(batches).
    several: every x is a tuple of the inputs of forward().
    autocast_dtype: runs the forward pass under autocast.
    scaler: its present scale multiplies the loss and is divided out of the gradients; it is not updated.
    reorder: images on a CPU may be laid out in channels_last, which is faster there. If the network raises
        on them, because of a ``view`` across channels and pixels, it runs on them as they are. What it raises
        on the caller's own images is the caller's.

    With several processes the gradients are averaged over them. The forward pass runs on copies of these
    parameters, without the running statistics of batch norm and on copies of all other buffers; the step
    runs in a copy of the optimizer with its state and without its hooks. So weights, gradients, statistics,
    optimizer and random numbers stay as they were, whatever happens in between. The host waits for nothing.
    """
    copies = _copies(starts)
    passes = partial(
        _passes, model, criterion, copies, autocast_dtype=autocast_dtype, scaler=scaler, several=several
    )
    laid_out = [(_channels_last(x), y) for x, y in batches] if reorder else batches
    tried = any(ours is not x for (ours, _), (x, _) in zip(laid_out, batches, strict=True))
    found = None
    if tried:
        with suppress(Exception):  # whatever a network's code raises about the order of its input
            found = passes(laid_out)
    sums, total = passes(batches) if found is None else found
    leaves = list(copies.values())
    if distributed.is_distributed():
        # A layer that took part on another process only has no gradient here.
        sums = [
            torch.zeros_like(leaf) if value is None else value
            for leaf, value in zip(leaves, sums, strict=True)
        ]
        distributed.all_reduce_mean([*(value for value in sums if value is not None), total])
    overflow = None if scaler is None else _unscale([g for g in sums if g is not None], scaler, total.device)
    for leaf, gradient in zip(leaves, sums, strict=True):
        leaf.grad = gradient
    _scratch_optimizer(optimizer, copies).step()
    return LookAhead(total, copies, overflow, tried and found is None)


def as_batches(x: Any, y: Any) -> list[Batch]:
    """One batch, or the micro-batches of two lists. Raises DSPPruningError where these do not match."""
    if not isinstance(x, list):
        return [(x, y)]
    if not isinstance(y, list) or len(x) != len(y) or not x:
        found = f"a list of {len(y)}" if isinstance(y, list) else f"a {type(y).__name__}"
        raise DSPPruningError(
            f"x is a list of {len(x)} micro-batches and y is {found}; both must be lists of the same length "
            "of at least 1"
        )
    return list(zip(x, y, strict=True))


def _channels_last(x: Any) -> Any:
    """Images on a CPU; anything else stays as it is.

    ResNet-20, batch 128, 2 threads of an AMD EPYC (AVX2), torch 2.14: both passes take 694 ms instead of 912.
    """
    if isinstance(x, Tensor) and x.dim() == 4 and x.device.type == "cpu" and x.dtype == torch.float32:
        return x.contiguous(memory_format=torch.channels_last)
    return x


def _copies(starts: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
    clones = torch._foreach_clone(list(starts.values()))
    return {parameter: clone.requires_grad_() for parameter, clone in zip(starts, clones, strict=True)}


def _passes(
    model: nn.Module,
    criterion: Callable[[Any, Any], Tensor],
    copies: Mapping[Tensor, Tensor],
    batches: Sequence[Batch],
    autocast_dtype: torch.dtype | None,
    scaler: torch.amp.GradScaler | None,
    several: bool,
) -> tuple[list[Tensor | None], Tensor]:
    """Gradient of every copy, None for one that took no part, and the loss; each summed over the batches."""
    leaves = list(copies.values())
    device = leaves[0].device
    # No cached casts: within an outer autocast they could be those of other weights.
    autocast = torch.autocast(device.type, autocast_dtype, autocast_dtype is not None, cache_enabled=False)
    total = torch.zeros((), device=device)
    sums: list[Tensor | None] = [None] * len(leaves)
    with torch.enable_grad(), _kept_random_numbers(device), _substituted(model, copies):
        for x, y in batches:
            with autocast:
                loss = criterion(model(*x) if several else model(x), y)
            loss = loss if len(batches) == 1 else loss / len(batches)
            scaled = loss if scaler is None else scaler.scale(loss)
            sums = _added(sums, torch.autograd.grad(scaled, leaves, allow_unused=True))
            total = total.to(loss.dtype) + loss.detach()
    return sums, total


def _added(sums: Sequence[Tensor | None], gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [
        new if old is None else old if new is None else old + new
        for old, new in zip(sums, gradients, strict=True)
    ]


def _unscale(gradients: list[Tensor], scaler: torch.amp.GradScaler, device: torch.device) -> Tensor:
    """Divide by the scale in place; 1 (float32 scalar) where a gradient was not finite."""
    found = torch.zeros((), device=device)
    if gradients and scaler.is_enabled():
        # get_scale() would wait for the device; scaling a one does not.
        inverse = scaler.scale(torch.ones((), device=device)).double().reciprocal().float()
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, found, inverse)
    return found


@contextmanager
def _kept_random_numbers(device: torch.device) -> Iterator[None]:
    """Dropout in here draws what it draws; outside, the sequence goes on as if it had not."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        yield  # a captured generator's state cannot be read; the graph moves it on at every replay
        return
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices=devices, device_type="cuda" if device.type == "cpu" else device.type):
        yield


@contextmanager
def _substituted(model: nn.Module, copies: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """The model runs on the copies, and what a forward pass writes to is not the real buffers.

    Every module is visited once and every tensor has one copy, however many names either goes by. A batch
    norm in training mode needs no running statistics, so it gets none and writes none.
    """
    held: list[tuple[dict[str, Any], dict[str, Any]]] = []
    clones: dict[Tensor, Tensor] = {}
    try:
        for module in model.modules():
            slots: tuple[dict[str, Any], dict[str, Any]] = (module._parameters, module._buffers)
            parameters, buffers = slots
            if any(tensor in copies for tensor in parameters.values() if tensor is not None):
                held.append((parameters, dict(parameters)))
                for name, tensor in parameters.items():
                    if tensor is not None:
                        parameters[name] = copies.get(tensor, tensor)
            if not buffers:
                continue
            held.append((buffers, dict(buffers)))
            silent = type(module) in _NORMS and module.training
            for name, tensor in buffers.items():
                if silent and name in _STATISTICS:
                    buffers[name] = None
                elif tensor is not None:
                    if tensor not in clones:
                        clones[tensor] = tensor.detach().clone()
                    buffers[name] = clones[tensor]
        yield
    finally:
        for slot, before in held:
            slot.clear()
            slot.update(before)


def _scratch_optimizer(optimizer: Optimizer, copies: Mapping[Tensor, Tensor]) -> Optimizer:
    """The same optimizer over the copies alone, with copies of their state."""
    scratch = object.__new__(type(optimizer))
    # A learning-rate scheduler puts a step() that counts calls on the instance: leave that one out.
    scratch.__dict__.update({name: value for name, value in vars(optimizer).items() if name != "step"})
    groups = [
        group | {"params": [copies[parameter] for parameter in group["params"] if parameter in copies]}
        for group in optimizer.param_groups
    ]
    few = type(optimizer) in _FEW_OPERATIONS
    scratch.param_groups = [_for_each(group) if few else group for group in groups if group["params"]]
    entries = [
        (value, name, entry)
        for parameter, value in copies.items()
        for name, entry in optimizer.state.get(parameter, {}).items()
    ]
    tensors = [entry for _, _, entry in entries if isinstance(entry, Tensor)]
    clones = iter(torch._foreach_clone(tensors) if tensors else [])
    scratch.state = defaultdict(dict)
    for value, name, entry in entries:
        scratch.state[value][name] = next(clones) if isinstance(entry, Tensor) else entry
    scratch._optimizer_step_pre_hooks = OrderedDict()
    scratch._optimizer_step_post_hooks = OrderedDict()
    return scratch


def _for_each(group: dict[str, Any]) -> dict[str, Any]:
    """The group stepped by a few operations on lists of tensors, if the user left that open."""
    settings = [
        part
        for name, setting in group.items()
        if name != "params"
        for part in (setting if isinstance(setting, tuple | list) else (setting,))
    ]
    # With rates and betas that are tensors some optimizers know no such way.
    fixed = group.get("fused") or any(isinstance(setting, Tensor) for setting in settings)
    return group if fixed or group.get("foreach", False) is not None else group | {"foreach": True}
