"""The backends of one gather-grouped convolution."""

import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from dsp_kernels.op.spec import ConvSpec
from dsp_kernels.run.cpu.conv import CpuBackend
from dsp_kernels.run.eager.conv import EagerBackend
from dsp_kernels.run.gpu.conv import GPU_KERNELS, GpuBackend
from dsp_kernels.run.gpu.graphs import is_capturing
from dsp_kernels.run.registry import Registry

ConvPlan = Callable[[Tensor, Tensor | None], Tensor]


class ConvBackend(Protocol):
    """Arranges the weights once in a plan, (x, residual) -> y, which is called many times."""

    name: str

    def can_run(
        self, spec: ConvSpec, dtype: torch.dtype, device: torch.device, layout: torch.memory_format
    ) -> tuple[bool, str]:
        """Whether it runs this convolution on tensors of this dtype, device and layout; the reason if not."""

    def prepare(self, spec: ConvSpec, weights: Sequence[Tensor], bias: Tensor | None) -> ConvPlan:
        """weights[g]: (O_g, C_g, kh, kw), bias: (out_channels,) or None -> (x, residual) -> y."""


BACKENDS = Registry[ConvBackend]("backend", *map(GpuBackend, GPU_KERNELS), CpuBackend(), EagerBackend())


# (backend, spec, storages of all constants) -> (what changes with their values, weak references that drop
# the entry when a storage is freed, before another can get its number; the plan)
_prepared: dict[Hashable, tuple[Hashable, list[weakref.ref[torch.UntypedStorage]], ConvPlan]] = {}


def plan_of(backend: ConvBackend, spec: ConvSpec, weights: Sequence[Tensor], bias: Tensor | None) -> ConvPlan:
    """``backend.prepare`` once per layer: while its constants live and PyTorch counts no change of them.

    On the CPU, where that costs little, plain PyTorch prepares at every call: writes through ``.data`` are
    not counted.
    """
    constants = [*weights, *([] if bias is None else [bias])]
    is_plain = backend.name == "eager" and (not constants or constants[0].device.type == "cpu")
    if is_plain or not constants or any(constant.is_inference() for constant in constants):
        return backend.prepare(spec, weights, bias)
    # Not the tensors: under torch.compile they may be others at every call.
    storages = [constant.untyped_storage() for constant in constants]
    key = backend.name, spec, tuple(storage._cdata for storage in storages)
    # Strides and dtype: views of one storage may begin at one address.
    state = tuple((c.data_ptr(), c._version, c.stride(), c.dtype) for c in constants)
    kept = _prepared.get(key)
    if kept is None or kept[0] != state:
        # Copies: the constants themselves would never be freed.
        copies = [constant.detach().clone() for constant in constants]
        plan = backend.prepare(spec, copies[: len(weights)], None if bias is None else copies[-1])
        references = [weakref.ref(storage, lambda _: _prepared.pop(key, None)) for storage in storages]
        kept = _prepared[key] = state, references, plan
    return kept[2]


_failed: set[tuple[str, ConvSpec]] = set()  # (backend, what it failed to run)


def first_working(
    candidates: Iterator[ConvBackend], spec: ConvSpec, weights: Sequence[Tensor], bias: Tensor | None
) -> ConvPlan:
    """The plan of the first candidate; when a call of it fails, with a warning that of the next one.

    It is not tried again for this convolution. The last one's error is raised. Memory that runs out is no
    reason for another backend.
    """
    backend = next(candidates)
    while (backend.name, spec) in _failed and (other := next(candidates, None)):
        backend = other
    plan = plan_of(backend, spec, weights, bias)

    def run(x: Tensor, residual: Tensor | None) -> Tensor:
        nonlocal backend, plan
        while True:
            try:
                return plan(x, residual)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # not compiled for this GPU, too much shared memory, ...
                other = None if is_capturing(x.device) else next(candidates, None)
                if other is None:
                    raise
                _failed.add((backend.name, spec))
                reason = f"because {backend.name} failed: {error}"
                warnings.warn(f"{other.name} takes over, {reason}", stacklevel=2)
                backend, plan = other, plan_of(other, spec, weights, bias)

    return run
