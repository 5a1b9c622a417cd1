"""The look-ahead: one more training step on scratch copies, which leaves model and optimizer unchanged."""

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from dsp_kernels.errors import DSPPruningError
from dsp_pruning import distributed

Batch = tuple[Any, Any]

# These update each parameter from its own gradient and state alone, so it is enough to step the weights that
# are asked for. The tests compare each with its real step.
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
# Their foreach implementation gives the same bits as the loop over parameters; the tests compare them.
_EXACT_FOREACH = (optim.SGD, optim.Adam, optim.AdamW)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class LookAhead:
    """The result of one more step on the same batch.

    loss: scalar, at the start weights; the mean over micro-batches and processes.
    weights: requested parameter -> its value after the step, same shape and dtype.
    overflow: float32 scalar, 1 if a scaled gradient was not finite (``weights`` are then invalid); None
        without a scaler.
    refused: the network does not run on images in channels_last.
    """

    loss: Tensor
    weights: dict[Tensor, Tensor]
    overflow: Tensor | None
    refused: bool


def check_optimizer(optimizer: Optimizer) -> None:
    """Raise DSPPruningError for an optimizer that cannot step a copy of some of its weights."""
    if type(optimizer) not in OPTIMIZERS:
        names = ", ".join(kind.__name__ for kind in OPTIMIZERS)
        raise DSPPruningError(
            f"the look-ahead cannot step {type(optimizer).__name__} on a copy of some weights (it may need a "
            f"closure, or all parameters at once); supported are {names}. Use second_order='none' with others"
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
) -> LookAhead:
    """One optimizer step on (x, y) from other weights.

    starts: parameter -> the value it starts from, without history. All other parameters are kept fixed,
        because their new values are not needed.
    batches: the micro-batches of one step, each with weight 1 / len(batches). A tuple x holds several inputs.
    autocast_dtype: runs the forward pass under autocast.
    scaler: its scale multiplies the loss and is divided out of the gradients; it is not updated.
    reorder: convert images on a CPU to channels_last, which is faster there. If the network raises on them
        (because of a ``view`` across channels and pixels), it runs on the images as they are.

    Gradients are averaged over the processes. The forward pass runs on copies of these parameters and of all
    buffers; the step runs in a copy of the optimizer with its state and without its hooks. So weights,
    gradients, statistics, optimizer and random state do not change, whatever is raised. The host never waits.
    """
    clones = torch._foreach_clone(list(starts.values()))
    leaves = [clone.requires_grad_() for clone in clones]
    copies = dict(zip(starts, leaves, strict=True))

    def loss_of(x: Any, y: Any) -> Tensor:
        # Without the cast cache: inside an outer autocast it could hold casts of other weights.
        device_type, enabled = leaves[0].device.type, autocast_dtype is not None
        with torch.autocast(device_type, autocast_dtype, enabled, cache_enabled=False):
            return criterion(model(*x) if isinstance(x, tuple) else model(x), y)

    def passes(batches: Sequence[Batch]) -> tuple[list[Tensor | None], Tensor]:
        with torch.enable_grad(), _kept_random_state(leaves[0].device), _substituted(model, copies):
            return _summed(loss_of, batches, leaves, scaler)

    reordered = [(_channels_last(x), y) for x, y in batches] if reorder else batches
    tried = any(ours is not x for (ours, _), (x, _) in zip(reordered, batches, strict=True))
    found = None
    if tried:
        with suppress(Exception):  # user code may raise anything about the memory format of its input
            found = passes(reordered)
    gradients, loss = passes(batches) if found is None else found
    if distributed.is_distributed():
        # A layer that took part on another process only has no gradient here.
        filled = [torch.zeros_like(a) if g is None else g for a, g in zip(leaves, gradients, strict=True)]
        distributed.all_reduce_mean([*filled, loss])
        gradients = [*filled]
    overflow = None
    if scaler is not None:
        overflow = _unscale([g for g in gradients if g is not None], scaler, loss.device)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        leaf.grad = gradient
    _scratch_optimizer(optimizer, copies).step()
    return LookAhead(loss, copies, overflow, tried and found is None)


def as_batches(x: Any, y: Any) -> list[Batch]:
    """One batch, or the micro-batches of two lists. Raises DSPPruningError if the lists do not match."""
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
    """Float32 images on a CPU in channels_last; any other x unchanged.

    ResNet-20, batch 128, 2 threads of an AMD EPYC (AVX2), torch 2.14: both passes take 694 ms instead of 912.
    """
    if isinstance(x, Tensor) and x.dim() == 4 and x.device.type == "cpu" and x.dtype == torch.float32:
        return x.contiguous(memory_format=torch.channels_last)
    return x


def _summed(
    loss_of: Callable[[Any, Any], Tensor],
    batches: Sequence[Batch],
    leaves: Sequence[Tensor],
    scaler: torch.amp.GradScaler | None,
) -> tuple[list[Tensor | None], Tensor]:
    """Gradient of every leaf (None if unused) and the loss, each summed over the batches."""
    total = torch.zeros((), device=leaves[0].device)
    sums: list[Tensor | None] = [None] * len(leaves)
    for x, y in batches:
        loss = loss_of(x, y)
        loss = loss if len(batches) == 1 else loss / len(batches)
        scaled = loss if scaler is None else scaler.scale(loss)
        new = torch.autograd.grad(scaled, leaves, allow_unused=True)
        sums = [b if a is None else a if b is None else a + b for a, b in zip(sums, new, strict=True)]
        total = total.to(loss.dtype) + loss.detach()
    return sums, total


def _unscale(gradients: list[Tensor], scaler: torch.amp.GradScaler, device: torch.device) -> Tensor:
    """Divide by the scale in place; float32 scalar, 1 if a gradient was not finite."""
    found = torch.zeros((), device=device)
    if gradients and scaler.is_enabled():
        # get_scale() would wait for the device; scaling a one does not.
        inverse = scaler.scale(torch.ones((), device=device)).double().reciprocal().float()
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, found, inverse)
    return found


@contextmanager
def _kept_random_state(device: torch.device) -> Iterator[None]:
    """Restore the random state at the end, so that dropout does not change the caller's sequence."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        yield  # the state cannot be read during capture; the graph advances it at every replay
        return
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices=devices, device_type="cuda" if device.type == "cpu" else device.type):
        yield


@contextmanager
def _substituted(model: nn.Module, copies: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """The model uses these copies of its parameters, and clones of its buffers.

    A tensor with several names has one copy. Batch norms in training mode get no running statistics, because
    they would only write them.
    """
    saved: list[tuple[dict[str, Any], dict[str, Any]]] = []
    clones: dict[Tensor, Tensor] = {}
    try:
        for module in model.modules():
            parameters: dict[str, Any] = module._parameters
            buffers: dict[str, Any] = module._buffers
            if any(tensor in copies for tensor in parameters.values() if tensor is not None):
                saved.append((parameters, dict(parameters)))
                for name, tensor in parameters.items():
                    if tensor is not None:
                        parameters[name] = copies.get(tensor, tensor)
            if not buffers:
                continue
            saved.append((buffers, dict(buffers)))
            drops = _STATISTICS if type(module) in _NORMS and module.training else ()
            for name, tensor in buffers.items():
                if name in drops:
                    buffers[name] = None
                elif tensor is not None:
                    if tensor not in clones:
                        clones[tensor] = tensor.detach().clone()
                    buffers[name] = clones[tensor]
        yield
    finally:
        for tensors, before in saved:
            tensors.clear()
            tensors.update(before)


def _scratch_optimizer(optimizer: Optimizer, copies: Mapping[Tensor, Tensor]) -> Optimizer:
    """The same optimizer over the copies alone, with copies of their state."""
    scratch = object.__new__(type(optimizer))
    # Learning-rate schedulers replace step() on the instance to count calls: leave that one out.
    scratch.__dict__.update({name: value for name, value in vars(optimizer).items() if name != "step"})
    groups = [
        group | {"params": [copies[parameter] for parameter in group["params"] if parameter in copies]}
        for group in optimizer.param_groups
    ]
    foreach = type(optimizer) in _EXACT_FOREACH
    scratch.param_groups = [_with_foreach(group) if foreach else group for group in groups if group["params"]]
    entries = [
        (copy, name, entry)
        for parameter, copy in copies.items()
        for name, entry in optimizer.state.get(parameter, {}).items()
    ]
    tensors = [entry for _, _, entry in entries if isinstance(entry, Tensor)]
    clones = iter(torch._foreach_clone(tensors) if tensors else [])
    scratch.state = defaultdict(dict)
    for copy, name, entry in entries:
        scratch.state[copy][name] = next(clones) if isinstance(entry, Tensor) else entry
    scratch._optimizer_step_pre_hooks = OrderedDict()
    scratch._optimizer_step_post_hooks = OrderedDict()
    return scratch


def _with_foreach(group: dict[str, Any]) -> dict[str, Any]:
    """The parameter group with foreach=True, unless the user chose an implementation."""
    # Some optimizers do not support foreach with learning rates or betas that are tensors.
    tensors = any(isinstance(setting, Tensor) for setting in (group["lr"], *group.get("betas", ())))
    fixed = tensors or group.get("fused") or group.get("foreach", False) is not None
    return group if fixed else group | {"foreach": True}
