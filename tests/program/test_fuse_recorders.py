"""A fused network under tracers, compilers and dispatch modes, which record its operations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import nets
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import dsp_kernels


def test_it_can_be_traced_compiled_and_exported() -> None:
    model, x = nets.make("residual"), nets.example(seed=3)
    fused = dsp_kernels.fuse(model, nets.example())
    with torch.no_grad():
        expected = model(x)
        for recorded in (
            torch.jit.trace(fused, nets.example(), check_trace=False),
            torch.compile(fused, fullgraph=True),
            torch.export.export(fused, (nets.example(),)).module(),
        ):
            torch.testing.assert_close(recorded(x), expected, rtol=1e-4, atol=1e-5)


class _Names(TorchDispatchMode):
    """The operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.seen.append(str(func))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("name", nets.ON_A_CPU)
def test_a_dispatch_mode_sees_every_operation(name: str) -> None:
    fused, x = dsp_kernels.fuse(nets.make("residual"), nets.example(), backend=name), nets.example()
    expected = fused(x)
    with _Names() as names:
        seen = fused(x)
    assert sum("convolution" in op for op in names.seen) >= 5
    assert any("addmm" in op or "linear" in op for op in names.seen)
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(fused(x), expected)  # afterwards the backend runs again


@pytest.mark.parametrize("name", nets.ON_A_CPU)
def test_operations_of_a_fused_network_can_be_counted(name: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 5)).eval()
    fused = dsp_kernels.fuse(model, nets.example(), backend=name)
    with FlopCounterMode(display=False) as counter:
        fused(nets.example(3))
    assert counter.get_total_flops() == 3 * 2 * fused.program.macs


@pytest.mark.parametrize("name", nets.ON_A_CPU)
def test_fake_tensors_give_the_output_shape(name: str) -> None:
    fused = dsp_kernels.fuse(nets.make("residual"), nets.example(), backend=name)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        answers: list[Tensor] = [fused(torch.empty(7, 3, 8, 8)), fused(mode.from_tensor(nets.example(7)))]
    assert [type(answer).__name__ for answer in answers] == ["FakeTensor"] * 2
    assert [tuple(answer.shape) for answer in answers] == [(7, 5)] * 2


@pytest.mark.parametrize("name", nets.ON_A_CPU)
def test_one_recorder_does_not_affect_the_next(name: str) -> None:
    """What is prepared under one recorder is kept for later calls."""
    fused, x = dsp_kernels.fuse(nets.make("residual"), nets.example(), backend=name), nets.example()
    expected = fused(x)
    fresh = copy.deepcopy(fused)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fresh(torch.empty(2, 3, 8, 8))
    with _Names() as first:
        seen = fresh(x)
    with _Names() as again:
        fresh(x)
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-5)
    assert first.seen == again.seen
    assert torch.equal(fresh(x), expected)
