"""A model is as it was after it was traced, and what changes its state in eval mode is refused."""

from __future__ import annotations

import os
import threading
from collections import namedtuple
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dsp_kernels
from dsp_kernels import GroupStructure, gather_grouped_conv2d
from dsp_kernels.errors import DSPFormatError, DSPShapeError, DSPTraceError, DSPVerificationError
from dsp_kernels.graph import inputs as trace_inputs
from dsp_kernels.graph.network import call_graph, trace

X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Counting(nn.Module):
    """count: what forward() does beside its two convolutions."""

    def __init__(self, count: Callable[[Any, Tensor], object]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)
        self.register_buffer("steps", torch.zeros(()))
        self.last: Tensor | None = None
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x))
        self.count(self, y)
        return self.second(y).mean((2, 3))


def assign(model: Any, y: Tensor) -> None:
    model.steps = model.steps + 1


def in_place(model: Any, y: Tensor) -> None:
    model.steps.add_(1)


def copy_in(model: Any, y: Tensor) -> None:
    model.steps.copy_(y.mean())


def assign_in_training(model: Any, y: Tensor) -> None:
    if model.training:
        model.steps = model.steps + 1


def keep(model: Any, y: Tensor) -> None:
    model.last = y


def test_threads_that_fuse_and_threads_that_run_do_not_meet() -> None:
    methods = nn.Module.__call__, nn.Module.__getattr__
    plain, models = nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), [Counting(keep).eval() for _ in range(3)]
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


def unchanged(model: Counting) -> bool:
    plain = all(type(value) is Tensor for value in model._buffers.values())
    return plain and float(model.steps) == 0 and model.last is None


@pytest.mark.parametrize("count", [assign_in_training, keep])
def test_a_traced_and_a_saved_model_stay_what_they_were(
    tmp_path: Path, count: Callable[[Any, Tensor], object]
) -> None:
    model = Counting(count).eval()
    trace(model, X)
    assert unchanged(model)
    dsp_kernels.save(model, tmp_path / "net.safetensors", X)
    assert unchanged(model)
    assert torch.equal(dsp_kernels.load(tmp_path / "net.safetensors")(X), model(X))


@pytest.mark.parametrize("count", [assign, in_place, copy_in])
def test_a_forward_that_changes_a_buffer_is_refused(count: Callable[[Any, Tensor], object]) -> None:
    model = Counting(count).eval()
    with pytest.raises(DSPTraceError, match="writes into steps in eval mode"):
        dsp_kernels.fuse(model, X)
    assert unchanged(model)


class Casting(nn.Module):
    def __init__(self, on: bool) -> None:
        super().__init__()
        self.conv, self.on = nn.Conv2d(3, 4, 3), on

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.on):
            return self.conv(x)


def test_autocast_inside_is_refused_where_it_is_on() -> None:
    with pytest.raises(DSPTraceError, match="turns autocast on by itself"):
        dsp_kernels.fuse(Casting(True).eval(), X)
    plain = Casting(False).eval()
    assert torch.allclose(dsp_kernels.fuse(plain, X)(X), plain(X), atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):  # the caller's is no block of the model's
        assert torch.allclose(dsp_kernels.fuse(plain, X)(X), plain(X), atol=1e-5)


Pair = namedtuple("Pair", ["main", "other"])


@pytest.mark.parametrize(
    "answer",
    [lambda y: {"main": y}, lambda y: (y,), lambda y: [y, y], lambda y: Pair(y, y), lambda y: Pair(y, None)],
)
def test_an_answer_that_is_no_tensor_is_refused_by_fuse(answer: Callable[[Tensor], object]) -> None:
    class Answering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> object:
            return answer(self.conv(x))

    with pytest.raises(DSPTraceError, match=r"output is one tensor, .*; use swap\(\)"):
        dsp_kernels.fuse(Answering().eval(), X)


def lazy_buffer(model: Any, y: Tensor) -> None:
    if model.lazy is None:
        model.lazy = torch.ones(1, 4, 1, 1)
    model.feats.append(y)
    model.table["y"] = y


def lazy_module(model: Any, y: Tensor) -> None:
    if model.module is None:
        model.module = nn.Conv2d(4, 4, 1)
    model.module(y)


def idempotent(model: Any, y: Tensor) -> None:
    model.steps.fill_(0)


@pytest.mark.parametrize("count", [lazy_buffer, lazy_module, idempotent])
def test_what_any_first_call_makes_is_kept_and_no_stand_in(count: Callable[[Any, Tensor], object]) -> None:
    model = Counting(count)
    model.register_buffer("lazy", None)
    model.module, model.feats, model.table = None, [], {}  # type: ignore[assignment]
    model.other = torch.jit.script(nn.Linear(2, 2))
    model.eval()
    fused = dsp_kernels.fuse(model, X)
    weight = None if model.module is None else model.module.weight.clone()  # type: ignore[union-attr]
    assert torch.allclose(fused(X), model(X), atol=1e-5)
    assert weight is None or torch.equal(model.module.weight, weight)  # type: ignore[union-attr]
    assert model.lazy is None or type(model.lazy) is Tensor
    assert all(type(part) is Tensor for part in (*model.feats, *model.table.values()))  # type: ignore[misc]


def test_constants_of_a_forward_do_not_pile_up() -> None:
    def make(model: Any, y: Tensor) -> None:
        y * torch.ones(1, 4, 1, 1)

    model = Counting(make).eval()
    trace(model, X)
    assert not [name for name in vars(model) if "constant" in name]


def part(model: Any, y: Tensor) -> None:
    model.steps[...] = y.mean()


def view(model: Any, y: Tensor) -> None:
    model.steps.data.add_(1)


def listed(model: Any, y: Tensor) -> None:
    torch._foreach_add_([model.steps], 1.0)


@pytest.mark.parametrize("count", [part, view, listed])
def test_every_way_to_write_is_undone_and_refused(count: Callable[[Any, Tensor], object]) -> None:
    model = Counting(count).eval()
    with pytest.raises(DSPTraceError, match="writes into steps"):
        trace(model, X)
    assert unchanged(model)


def test_a_count_in_training_is_no_obstacle_for_swap_and_for_graphs_of_calls() -> None:
    for count in (assign_in_training, assign, in_place):
        model = Counting(count)
        assert call_graph(model, training=True) is not None
        assert unchanged(model)


def test_a_child_forked_while_another_thread_traces_has_the_methods_of_modules() -> None:
    methods = nn.Module.__call__, nn.Module.__getattr__
    inside, forked = threading.Event(), threading.Event()

    def wait(model: Any, y: Tensor) -> None:
        if isinstance(y, torch.fx.Proxy):
            inside.set()
            assert forked.wait(30)

    tracing = threading.Thread(target=trace, args=(Counting(wait).eval(), X))
    tracing.start()
    assert inside.wait(30)
    child = os.fork()
    if child == 0:
        right = (nn.Module.__call__, nn.Module.__getattr__) == methods and _tracing_is_free()
        os._exit(0 if right else 1)
    forked.set()
    tracing.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _tracing_is_free() -> bool:
    free = trace_inputs._tracing.acquire(blocking=False)
    trace_inputs._tracing.release()
    return free


def test_a_model_that_is_saved_goes_on_in_eval_mode(tmp_path: Path) -> None:
    """Another thread may be running it: batch norm would take in that thread's images."""
    trained: list[bool] = []

    def watch(model: Any, y: Tensor) -> None:
        if model.training:
            trained.append(model is original)

    original = Counting(watch).eval()
    dsp_kernels.save(original, tmp_path / "net.safetensors", X)
    assert trained == [False]
    assert dsp_kernels.load(tmp_path / "net.safetensors").train()(X).requires_grad


def test_weights_on_meta_are_no_weights_for_an_image() -> None:
    structure = GroupStructure.build(3, 2, [([0, 2], [0]), ([1], [1])])
    weights = [torch.zeros(1, 2, 1, 1), torch.zeros(1, 1, 1, 1, device="meta")]
    with pytest.raises(DSPShapeError, match="x is on cpu, but a weight or bias is on meta"):
        gather_grouped_conv2d(X, weights, structure)
    assert gather_grouped_conv2d(X.to("meta"), [w.to("meta") for w in weights], structure).is_meta


def test_what_answers_with_nan_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    with torch.no_grad():
        model[2].weight[1, 2] = float("nan")
    with pytest.raises(
        DSPVerificationError, match=r"Sequential itself answers .* NaN .*'2\.weight' is not finite"
    ):
        dsp_kernels.fuse(model, X)


def test_a_fused_network_is_no_file(tmp_path: Path) -> None:
    fused = dsp_kernels.fuse(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), X)
    with pytest.raises(DSPFormatError, match="save the packed one"):
        dsp_kernels.save(fused, tmp_path / "net.safetensors", X)
