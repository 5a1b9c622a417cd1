"""float16 by halves: on CPUs with AVX512-FP16; elsewhere the same source with emulated instructions."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from types import ModuleType

import half_emulation
import numpy as np
import pytest
import torch
from cases import CASES, Arguments, Case, reference
from nets import NAMES, make
from test_native_bf16 import MORE, ODD, difference
from test_native_bf16 import run as run_in_16_bit
from test_native_layout import MODELS
from test_native_op import need
from test_native_programs import Mixed, Net
from torch import Tensor

from dsp_kernels import GroupStructure, fuse
from dsp_kernels.run.cpu.extension import native
from dsp_kernels.tolerances import HALF_TERMS, half_sums_tolerance, network_tolerance, op_tolerance


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    reason = half_emulation.why_not()
    if reason:
        pytest.skip(reason)
    return half_emulation.build(tmp_path_factory.mktemp("emulated_fp16"))


@pytest.fixture(params=["avx512_fp16", half_emulation.ISA])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    if name == half_emulation.ISA:
        module = request.getfixturevalue("emulated")
        monkeypatch.setattr("dsp_kernels.run.cpu.extension._load", lambda: (module, ""))
    need(name, monkeypatch)
    return name


def rounded(tensor: Tensor) -> Tensor:
    return tensor.half().float()


run = partial(run_in_16_bit, numbers="fp16")


def check(y: Tensor, case: Case, a: Arguments) -> None:
    """Against the definition with rounded factors, in float64: bias and residual are not rounded."""
    single = all(len(group.in_index) < 2 for group in case.structure.groups)
    # A convolution of single channels has no pairs to gain from and multiplies floats.
    exact = a if single else replace(a, x=rounded(a.x), weights=[rounded(w) for w in a.weights])
    expected = reference(case, exact)
    bound = op_tolerance(torch.float32, case.reduction) if single else half_sums_tolerance(case.reduction)
    error = (y.double() - expected).abs().max().item()
    assert error <= bound * max(expected.abs().max().item(), 1.0)


@pytest.mark.parametrize("case", [c for c in (*CASES, *MORE) if c.batch], ids=lambda case: case.name)
def test_the_op_in_float16(case: Case, isa: str) -> None:
    a = case.tensors()
    check(run(case, a, isa), case, a)


@pytest.mark.parametrize("interleave", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_every_interleaving_of_images(isa: str, stride: int, interleave: int) -> None:
    case = Case("", ODD, batch=17, hw=(9, 40), stride=stride, residual=True)
    a = case.tensors()
    for threads in (1, 3):
        check(run(case, a, isa, threads, interleave), case, a)


@pytest.mark.parametrize("filters", range(1, 10))
@pytest.mark.parametrize("images", [1, 8])
def test_every_tile(isa: str, filters: int, images: int) -> None:
    """One, a few and many runs of HALF_TERMS words; widths for every number of vectors."""
    for channels in (2, 2 * HALF_TERMS, 2 * HALF_TERMS + 1, 7 * HALF_TERMS):
        case = Case(
            "", GroupStructure.dense(channels, filters), kernel=1, padding=0, batch=images, hw=(1, 37)
        )
        a = case.tensors()
        check(run(case, a, isa), case, a)


def test_the_rounding_is_that_of_pytorch(isa: str) -> None:
    """One channel times 1 beside one of zeros gives back what the convolution read."""
    generator = torch.Generator().manual_seed(0)
    halves = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16).float()  # all from 0 to 65504
    between = (halves[:-1] + halves[1:]) / 2
    near = [torch.nextafter(between, torch.tensor(end)) for end in (0.0, torch.inf)]
    edge = torch.tensor([65519.99, 65520.0, 1e5, 3.4e38, torch.inf, 2.9e-8, 2**-25, 1e-12, 1e-42, 0.0])
    draw = torch.randn(4096, generator=generator)
    x = torch.cat([halves, between, *near, edge, draw])
    x = torch.cat([x, -x]).view(1, 1, 1, -1)
    case = Case("", GroupStructure.dense(2, 1), kernel=1, padding=0, batch=1, hw=(1, x.shape[3]), bias=False)
    both = torch.cat([x, torch.zeros_like(x)], 1)
    y = run(case, Arguments(both, [torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)], None, None), isa)
    assert torch.equal(y, rounded(x))


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00000, 0x7F800001, -1])
def test_not_a_number_stays_where_it_is(bits: int, isa: str) -> None:
    case = Case("", ODD, kernel=1, padding=0, batch=1, hw=(5, 5))
    a = case.tensors()
    a.x[0, 6, 2, 3] = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    y = run(case, a, isa)
    assert y[0, [1, 8], 2, 3].isnan().all()
    assert y.isnan().sum() == 2


def constant(channels: int, x: float, weight: float, isa: str) -> float:
    case = Case("", GroupStructure.dense(channels, 1), kernel=1, padding=0, batch=1, hw=(1, 1), bias=False)
    weights = torch.full((1, channels, 1, 1), weight)
    return run(case, Arguments(torch.full((1, channels, 1, 1), x), [weights], None, None), isa).item()


def test_sums_in_float16_are_short(isa: str) -> None:
    """A half that counts stops at 2048."""
    assert native().half_terms == HALF_TERMS  # type: ignore[union-attr]
    assert constant(8192, 1.0, 1.0, isa) == 8192


def test_the_range_of_products(isa: str) -> None:
    """A sum may leave the range of float16, a product or the sum of a run may not."""
    assert constant(16 * HALF_TERMS, 64.0, 8.0, isa) == 8192 * HALF_TERMS
    assert constant(2, 300.0, 300.0, isa) == float("inf")


def test_the_order_of_channels_changes_nothing(isa: str) -> None:
    rng = random.Random(0)
    case = Case("", GroupStructure.dense(21, 5))
    a = case.tensors()
    shuffle = rng.sample(range(21), 21)
    other = replace(case, structure=GroupStructure.build(21, 5, [(shuffle, range(5))]))
    b = replace(a, weights=[weight[:, shuffle] for weight in a.weights])
    assert torch.equal(run(other, b, isa), run(case, a, isa))


@pytest.mark.parametrize("seed", range(0, 24, 2))
def test_random_networks(seed: int, isa: str) -> None:
    """All kinds of steps; fuse() itself holds the answer against the model's."""
    model = Net(seed).eval()
    generator = torch.Generator().manual_seed(seed)
    fused = fuse(model, torch.randn(2, 3, 23, 18, generator=generator), backend="cpu", dtype=torch.float16)
    for batch, size in ((1, (23, 18)), (17, (21, 33)), (3, (32, 19))):
        x = torch.randn(batch, 3, *size, generator=generator)
        assert difference(fused, model, x) <= network_tolerance(torch.float16, 360, 10)
    assert fused(torch.empty(0, 3, 23, 18)).shape == (0, 11)


@pytest.mark.parametrize("name", NAMES)
def test_networks_with_every_construct(name: str, isa: str) -> None:
    fused = fuse(make(name), torch.randn(2, 3, 8, 8), backend="cpu", dtype=torch.float16)
    assert fused(torch.randn(3, 3, 8, 8).half()).dtype == torch.float16


@pytest.mark.parametrize("name", MODELS)
def test_views_and_products(name: str, isa: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    fused = fuse(model, torch.randn(2, 3, 12, 12), backend="cpu", dtype=torch.float16)
    x = torch.randn(17, 3, 12, 12)
    assert difference(fused, model, x) <= network_tolerance(torch.float16, 126, 5)


def test_plain_steps_between(isa: str) -> None:
    torch.manual_seed(0)
    model, x = Mixed().eval(), torch.randn(2, 3, 9, 7)
    fused = fuse(model, x, backend="cpu", dtype=torch.float16)
    assert difference(fused, model, x) <= network_tolerance(torch.float16, 126, 5)


def test_what_it_says_of_itself(isa: str) -> None:
    module = native()
    assert module is not None
    assert "float16" in module.own_products(isa)
    fused = fuse(make("residual"), torch.randn(1, 3, 8, 8), backend="cpu", dtype=torch.float16)
    assert f"cpu {isa}, float16]" in fused.explain()
    assert module.arithmetic(isa, 10, fp16=True) == 20 * module.arithmetic(isa, 1) * 8 * 3 // 24
    with pytest.raises(ValueError, match="not both"):
        module.Network(isa, bf16=True, fp16=True)


def test_elsewhere_float16_multiplies_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSP_KERNELS_ISA", "base")
    assert native().own_products("base") == ["float32"]  # type: ignore[union-attr]
    case = Case("", ODD)
    a = case.tensors()
    error = (run(case, a, "base").double() - reference(case, a)).abs().max().item()
    assert error <= op_tolerance(torch.float32, case.reduction) * max(a.x.abs().max().item(), 1.0)


def test_equal_terms_round_alike_and_are_still_allowed() -> None:
    """The worst case of sums in half: 128 equal products, each addition rounded to the same side."""
    half = np.float16
    worst = 0.0
    for constant in np.linspace(0.01, 2.0, 400).astype(half):
        part = half(0.0)
        for _ in range(HALF_TERMS):  # even and odd channels have lanes of their own
            part = half(part + constant)
        total = 2 * float(part)
        exact = 2 * HALF_TERMS * float(constant)
        worst = max(worst, abs(total - exact) / exact)
    plain = network_tolerance(torch.float16, 2 * HALF_TERMS, 1)
    assert plain < worst < network_tolerance(torch.float16, 2 * HALF_TERMS, 1, half_sums=True)
