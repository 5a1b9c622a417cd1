"""Plans kept between calls of the torch op, which gets plain weights each time and would pack them anew."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock

import torch
from torch import Tensor

from dsp_kernels.backends import BACKENDS, ConvPlan
from dsp_kernels.backends.cpu import CpuPlan
from dsp_kernels.conv_spec import ConvSpec
from dsp_kernels.native import chosen_isa, may_use_winograd

__all__ = ["forget", "kept", "plan_for"]

# Checking a kept plan costs far less than packing. Batch 1, 2 threads, packed anew / kept / the plan alone:
# ResNet-50 80 % layer4.0.conv2 (2.4 MB) 1583 / 512 / 407 us, the check 53 us of it; layer4.1.conv1 (0.5 MB)
# 399 / 214 / 129 us; a ResNet-56 layer (3 KB) 115 / 82 / 19 us (2 Zen 5 cores, shared with others).
_MOST_PLANS = 128
_MOST_BYTES = 64 << 20  # of weights; a plan holds them twice
_lock = Lock()
_plans: OrderedDict[tuple[object, ...], CpuPlan] = OrderedDict()


def plan_for(
    spec: ConvSpec,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    x: Tensor,
    layout: torch.memory_format,
) -> ConvPlan:
    """weights[g]: (O_g, C_g, kh, kw); bias: (out_channels,) or None; x: the input. The plan to run it.

    A kept plan is taken only if the numbers in it equal the weights and the bias bit for bit. An address or
    a version counter would not do: ``weight.data`` and numpy write without counting.
    """
    backend = BACKENDS.choose("auto", spec, x.dtype, x.device, layout)
    if backend.name != "cpu":
        return backend.prepare(spec, weights, bias)
    constants = [*weights, *([] if bias is None else [bias])]
    how = chosen_isa(), may_use_winograd(), bias is None, spec.kernel_size
    key = (*how, *(constant.data_ptr() for constant in constants))
    with _lock:
        plan = _plans.get(key)
    if plan is None or plan.spec != spec or not plan.holds(weights, bias):
        made = backend.prepare(spec, weights, bias)
        assert isinstance(made, CpuPlan)
        plan = made
    with _lock:
        _plans[key] = plan
        _plans.move_to_end(key)
        while len(_plans) > _MOST_PLANS or sum(plan.weight_bytes for plan in _plans.values()) > _MOST_BYTES:
            _plans.popitem(last=False)
    return plan


def kept() -> tuple[int, int]:
    """How many plans are kept, and the bytes of their weights."""
    with _lock:
        return len(_plans), sum(plan.weight_bytes for plan in _plans.values())


def forget() -> None:
    """Let go of all kept plans."""
    with _lock:
        _plans.clear()
