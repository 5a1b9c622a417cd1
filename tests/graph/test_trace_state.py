"""Tracing leaves a model and other threads as they were; models that write into buffers are refused."""

import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dsp_kernels
from dsp_kernels.errors import DSPFormatError, DSPTraceError, DSPVerificationError
from dsp_kernels.graph.network import captured, trace

X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Effect = Callable[[Any, Tensor], object]


class Stateful(nn.Module):
    """effect: what forward() does besides its two convolutions."""

    def __init__(self, effect: Effect) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("lazy", None)
        self.last: Tensor | None = None
        self.module: nn.Conv2d | None = None
        self.features: list[Tensor] = []
        self.table: dict[str, Tensor] = {}
        self.script = torch.jit.script(nn.Linear(2, 2))
        self.effect = effect

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x))
        self.effect(self, y)
        return self.second(y).mean((2, 3))


def unchanged(model: Stateful) -> bool:
    plain = all(type(buffer) is Tensor for buffer in model.buffers())
    return plain and float(model.steps) == 0 and model.last is None


def assign(model: Any, y: Tensor) -> None:
    model.steps = model.steps + 1


def in_place(model: Any, y: Tensor) -> None:
    model.steps.add_(1)


def copy_in(model: Any, y: Tensor) -> None:
    model.steps.copy_(y.mean())


def part(model: Any, y: Tensor) -> None:
    model.steps[...] = y.mean()


def view(model: Any, y: Tensor) -> None:
    model.steps.data.add_(1)


def listed(model: Any, y: Tensor) -> None:
    torch._foreach_add_([model.steps], 1.0)


@pytest.mark.parametrize("effect", [assign, in_place, copy_in, part, view, listed])
def test_writing_into_a_buffer_is_undone_and_refused(effect: Effect) -> None:
    model = Stateful(effect).eval()
    with pytest.raises(DSPTraceError, match="writes into steps in eval mode"):
        trace(model, X)
    assert unchanged(model)


def assign_in_training(model: Any, y: Tensor) -> None:
    if model.training:
        model.steps = model.steps + 1


def keep(model: Any, y: Tensor) -> None:
    model.last = y


@pytest.mark.parametrize("effect", [assign_in_training, keep])
def test_a_traced_and_saved_model_is_unchanged(tmp_path: Path, effect: Effect) -> None:
    model = Stateful(effect).train()
    model.first.eval()
    trace(model, X)
    assert unchanged(model)
    assert (model.training, model.first.training, model.second.training) == (True, False, True)
    model.eval()
    dsp_kernels.save(model, tmp_path / "net.safetensors", X)
    assert unchanged(model)
    assert torch.equal(dsp_kernels.load(tmp_path / "net.safetensors")(X), model(X))


@pytest.mark.parametrize("effect", [assign_in_training, assign, in_place])
def test_counting_calls_is_no_obstacle_in_training_mode(effect: Effect) -> None:
    model = Stateful(effect)
    assert captured(model, (X,), training=True).graph.nodes
    assert unchanged(model)


def lazy_tensors(model: Any, y: Tensor) -> None:
    if model.lazy is None:
        model.lazy = torch.ones(1, 4, 1, 1)
    model.features.append(y)
    model.table["y"] = y


def lazy_module(model: Any, y: Tensor) -> None:
    if model.module is None:
        model.module = nn.Conv2d(4, 4, 1)
    model.module(y)


def idempotent(model: Any, y: Tensor) -> None:
    model.steps.fill_(0)


@pytest.mark.parametrize("effect", [lazy_tensors, lazy_module, idempotent])
def test_the_first_call_may_make_tensors_and_modules(effect: Effect) -> None:
    model = Stateful(effect).eval()
    fused = dsp_kernels.fuse(model, X)
    weight = None if model.module is None else model.module.weight.clone()
    assert torch.allclose(fused(X), model(X), atol=1e-5)
    assert model.module is None or torch.equal(model.module.weight, weight)
    assert all(type(value) is Tensor for value in (*model.buffers(), *model.features, *model.table.values()))


def test_constants_of_a_forward_do_not_accumulate() -> None:
    model = Stateful(lambda model, y: y * torch.ones(1, 4, 1, 1)).eval()
    trace(model, X)
    assert not [name for name in vars(model) if "constant" in name]


# -- other threads and processes


def test_threads_that_fuse_and_threads_that_run_do_not_interfere() -> None:
    methods = nn.Module.__call__, nn.Module.__getattr__
    plain, models = nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), [Stateful(keep).eval() for _ in range(3)]
    expected, done = plain(X), threading.Event()

    def serve() -> int:
        calls = 0
        while not done.is_set():
            assert torch.equal(plain(X), expected)
            calls += 1
        return calls

    with ThreadPoolExecutor(4) as pool:
        serving = pool.submit(serve)
        try:
            fused = list(pool.map(lambda model: [dsp_kernels.fuse(model, X) for _ in range(5)][-1], models))
        finally:
            done.set()
        assert serving.result() > 0
    assert (nn.Module.__call__, nn.Module.__getattr__) == methods
    for network, model in zip(fused, models, strict=True):
        assert torch.allclose(network(X), model(X), atol=1e-5)


def test_a_child_forked_while_another_thread_traces_can_trace() -> None:
    methods = nn.Module.__call__, nn.Module.__getattr__
    inside, forked = threading.Event(), threading.Event()

    def wait(model: Any, y: Tensor) -> None:
        if isinstance(y, torch.fx.Proxy):
            inside.set()
            assert forked.wait(30)

    tracing = threading.Thread(target=trace, args=(Stateful(wait).eval(), X))
    tracing.start()
    assert inside.wait(30)
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # ends a child that waits for a thread that it does not have
        right = (nn.Module.__call__, nn.Module.__getattr__) == methods
        trace(nn.Sequential(nn.Conv2d(3, 4, 3)), X)
        os._exit(0 if right else 1)
    forked.set()
    tracing.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_model_stays_in_eval_mode_while_it_is_saved(tmp_path: Path) -> None:
    """Another thread may be running it: batch norm would learn from that thread's images."""
    trained: list[bool] = []

    def watch(model: Any, y: Tensor) -> None:
        if model.training:
            trained.append(model is original)

    original = Stateful(watch).eval()
    dsp_kernels.save(original, tmp_path / "net.safetensors", X)
    assert trained == [False]
    assert dsp_kernels.load(tmp_path / "net.safetensors").train()(X).requires_grad


# -- models that cannot be fused or saved


class Casting(nn.Module):
    def __init__(self, on: bool) -> None:
        super().__init__()
        self.conv, self.on = nn.Conv2d(3, 4, 3), on

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.on):
            return self.conv(x)


def test_autocast_in_forward_is_refused_if_it_is_on() -> None:
    with pytest.raises(DSPTraceError, match="turns autocast on by itself"):
        dsp_kernels.fuse(Casting(True).eval(), X)
    plain = Casting(False).eval()
    assert torch.allclose(dsp_kernels.fuse(plain, X)(X), plain(X), atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):  # the caller's is not part of the model
        assert torch.allclose(dsp_kernels.fuse(plain, X)(X), plain(X), atol=1e-5)


def test_an_answer_of_nan_is_explained() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    nn.init.constant_(model[2].weight, float("nan"))
    with pytest.raises(DSPVerificationError, match=r"itself answers .* NaN .*'2\.weight' is not finite"):
        dsp_kernels.fuse(model, X)


def test_a_fused_network_cannot_be_saved(tmp_path: Path) -> None:
    fused = dsp_kernels.fuse(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), X)
    with pytest.raises(DSPFormatError, match="save the packed one"):
        dsp_kernels.save(fused, tmp_path / "net.safetensors", X)


def test_a_patch_of_nn_module_survives_a_fork_while_nothing_is_traced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trace(nn.Conv2d(3, 4, 1), X)
    monkeypatch.setattr(nn.Module, "__call__", lambda self, *args, **kwargs: self.forward(*args, **kwargs))
    patched = nn.Module.__call__
    child = os.fork()
    if child == 0:
        os._exit(0 if nn.Module.__call__ is patched else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
