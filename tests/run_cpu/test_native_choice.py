"""Which layers run natively by default, and the op's cache of plans."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import CASES, Case, reference
from torch import Tensor

from dsp_kernels import GroupStructure, gather_grouped_conv2d
from dsp_kernels.op.fused_conv import FusedConv2d
from dsp_kernels.op.spec import ConvSpec
from dsp_kernels.op.torch_op import PLANS
from dsp_kernels.run.convs import BACKENDS
from dsp_kernels.run.cpu.conv import CpuBackend, products_per_move
from dsp_kernels.run.eager.conv import EagerBackend

LAST, PLAIN = torch.channels_last, torch.contiguous_format
THIN = GroupStructure.build(64, 64, [(range(18), range(16)), (range(20, 41), range(16, 30))])
WIDE = GroupStructure.dense(64, 64)


@pytest.fixture(autouse=True)
def _two_threads_and_no_plans() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    PLANS.clear()
    yield
    torch.set_num_threads(before)
    PLANS.clear()


def chosen(spec: ConvSpec, layout: torch.memory_format, name: str = "auto") -> str:
    return BACKENDS.choose(name, spec, torch.float32, torch.device("cpu"), layout).name


@pytest.mark.parametrize(
    ("structure", "kernel", "layout", "expected"),
    [(THIN, 1, LAST, "eager"), (THIN, 1, PLAIN, "cpu"), (WIDE, 1, LAST, "cpu"), (THIN, 3, LAST, "cpu")],
)
def test_thin_channels_last_layers_run_in_eager(
    structure: GroupStructure, kernel: int, layout: torch.memory_format, expected: str
) -> None:
    spec = ConvSpec(structure, (kernel, kernel))
    assert chosen(spec, layout) == expected
    assert chosen(spec, layout, "cpu") == "cpu"  # an explicit choice is honoured
    torch.set_num_threads(1)
    assert chosen(spec, layout) == "cpu"


def test_products_per_moved_channel_and_pixel() -> None:
    assert products_per_move(ConvSpec(WIDE, (1, 1))) == 64 * 64 / 128
    assert products_per_move(ConvSpec(THIN, (3, 3), (2, 2))) == 9 * (18 * 16 + 21 * 14) / (39 * 4 + 64)


def test_a_module_chooses_again_for_another_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    for backend in (CpuBackend, EagerBackend):

        def prepare(self: Any, *a: Any, original: Any = backend.prepare) -> Any:
            used.append(self.name)
            return original(self, *a)

        monkeypatch.setattr(backend, "prepare", prepare)
    weights = [torch.randn(len(g.out_index), len(g.in_index), 1, 1) for g in THIN.groups]
    module = FusedConv2d(ConvSpec(THIN, (1, 1)), weights)
    x = torch.randn(2, 64, 5, 5)
    for layout in (PLAIN, LAST):
        y = module(x.contiguous(memory_format=layout))
        assert y.is_contiguous(memory_format=layout)
    assert used == ["cpu", "eager"]


# -- Cached plans of the op ------------------------------------------------------------------------------


def test_the_op_caches_packed_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[int] = []
    prepare = CpuBackend.prepare
    monkeypatch.setattr(CpuBackend, "prepare", lambda *a: packed.append(1) or prepare(*a))
    weights, x = [torch.randn(64, 64, 1, 1)], torch.randn(1, 64, 4, 4)
    results = [gather_grouped_conv2d(x, weights, WIDE) for _ in range(3)]
    assert len(packed) == 1
    assert torch.equal(results[0], results[2])


def in_place(weight: Tensor) -> None:
    weight.add_(1)


def without_version_counter(weight: Tensor) -> None:
    weight.data.add_(1)


def by_numpy(weight: Tensor) -> None:
    weight.numpy()[0, 0, 0, 0] += 1


@pytest.mark.parametrize("change", [in_place, without_version_counter, by_numpy])
@pytest.mark.parametrize("which", ["weight", "bias"])
def test_changed_weights_are_packed_again(change: Callable[[Tensor], None], which: str) -> None:
    case = Case("", THIN, kernel=1, padding=0)
    a = case.tensors()
    for _ in range(2):
        y = gather_grouped_conv2d(a.x, a.weights, THIN, a.bias)
        torch.testing.assert_close(y.double(), reference(case, a), rtol=1e-5, atol=1e-5)
        assert a.bias is not None
        change(a.weights[1] if which == "weight" else a.bias[:, None, None, None])


def test_the_same_memory_in_another_structure() -> None:
    """The key has the weights' addresses, which do not imply the channels."""
    weights, x = [torch.randn(2, 2, 1, 1)], torch.randn(1, 4, 3, 3)
    for channels in ([0, 1], [2, 3], [0, 1]):
        structure = GroupStructure.build(4, 4, [(channels, channels)])
        y = gather_grouped_conv2d(x, weights, structure)
        expected = torch.nn.functional.conv2d(x[:, channels], weights[0])
        torch.testing.assert_close(y[:, channels], expected)


def test_with_and_without_residual_from_one_plan() -> None:
    case = next(case for case in CASES if case.residual and case.batch)
    a = case.tensors()
    spec = case.spec
    plan = BACKENDS.choose("cpu", spec, torch.float32, torch.device("cpu"), PLAIN).prepare(
        spec, a.weights, a.bias
    )
    without = plan(a.x, None)
    for weight in a.weights:  # the plan has its own copy
        weight.zero_()
    assert torch.equal(plan(a.x, torch.zeros_like(without)), without)


def test_cached_plans_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 64, 2, 2)
    held = [[torch.randn(64, 64, 1, 1)] for _ in range(6)]
    monkeypatch.setattr(PLANS, "limit", 4)
    for weights in held:
        gather_grouped_conv2d(x, weights, WIDE)
    assert (len(PLANS), PLANS.total_size) == (4, 4 * 64 * 64 * 4)
    monkeypatch.setattr(PLANS, "max_size", 64 * 64 * 4 * 2)
    gather_grouped_conv2d(x, held[0], WIDE)
    assert (len(PLANS), PLANS.total_size) == (2, 2 * 64 * 64 * 4)
