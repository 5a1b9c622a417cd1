"""The backends of one gather-grouped convolution."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from dsp_kernels.op.spec import ConvSpec
from dsp_kernels.run.cpu.conv import CpuBackend
from dsp_kernels.run.eager.conv import EagerBackend
from dsp_kernels.run.gpu.conv import GPU_KERNELS, GpuBackend
from dsp_kernels.run.registry import Registry

ConvPlan = Callable[[Tensor, Tensor | None], Tensor]


class ConvBackend(Protocol):
    """Arranges the weights once in a plan, (x, residual) -> y, which is called many times."""

    name: str

    def can_run(
        self, spec: ConvSpec, dtype: torch.dtype, device: torch.device, layout: torch.memory_format
    ) -> tuple[bool, str]:
        """Whether it runs this convolution on tensors of this dtype, device and layout; the reason if not."""
        ...

    def prepare(self, spec: ConvSpec, weights: Sequence[Tensor], bias: Tensor | None) -> ConvPlan:
        """weights[g]: (O_g, C_g, kh, kw), bias: (out_channels,) or None -> (x, residual) -> y."""
        ...


BACKENDS: Registry[ConvBackend] = Registry(
    "backend", *map(GpuBackend, GPU_KERNELS), CpuBackend(), EagerBackend()
)


# A constant -> (backend, spec) -> (addresses and versions of all constants, the constants, their plan).
_prepared = WeakIdKeyDictionary()


def prepared(
    backend: ConvBackend, spec: ConvSpec, weights: Sequence[Tensor], bias: Tensor | None
) -> ConvPlan:
    """``backend.prepare`` once per layer: while its first constant lives and PyTorch counts no change of any.

    On the CPU, where that costs little, plain PyTorch prepares at every call: writes through ``.data`` are
    not counted.
    """
    constants = [*weights, *([] if bias is None else [bias])]
    is_plain = backend.name == "eager" and (not constants or constants[0].device.type == "cpu")
    if is_plain or not constants or any(constant.is_inference() for constant in constants):
        return backend.prepare(spec, weights, bias)
    state = [(constant.data_ptr(), constant._version) for constant in constants]
    plans = _prepared.setdefault(constants[0], {})
    key = backend.name, spec
    if key not in plans or plans[key][0] != state:
        # Not the key itself, which would then live for ever. They keep their addresses from being reused.
        held = [constant.detach() for constant in constants]
        made = backend.prepare(spec, held[: len(weights)], None if bias is None else held[-1])
        plans[key] = state, held, made
    plan: ConvPlan = plans[key][2]
    return plan
