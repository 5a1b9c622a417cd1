"""bfloat16 on the native executor: the op's cases, the rounding itself, whole networks, what is refused."""

from __future__ import annotations

import copy
import random
from dataclasses import replace

import pytest
import torch
from cases import CASES, Arguments, Case, reference
from nets import NAMES, make
from test_native_layout import MODELS
from test_native_op import ISAS, need
from test_native_programs import Mixed, Net
from torch import Tensor, nn

from dsp_kernels import GroupStructure, PackedConv2d, fuse
from dsp_kernels.run.cpu.conv import add_conv
from dsp_kernels.run.cpu.extension import native
from dsp_kernels.tolerances import network_tolerance, op_tolerance

# Input channels 3, 1, 4 and 0 per group: odd counts leave one channel without a partner.
ODD = GroupStructure.build(7, 9, [([0, 3, 6], [1, 8]), ([2], [0, 4]), ([5, 1, 2, 0], [7, 3]), ([], [5])])
MORE = (
    *(Case(f"batch {n}", ODD, batch=n, hw=(8, 8), residual=True, activation="relu") for n in (1, 3, 16, 17)),
    *(Case(f"width {w}", ODD, hw=(4, w)) for w in (1, 2, 15, 16, 17, 31, 33)),
    Case("stride 2 and dilation 2", ODD, stride=2, dilation=2, padding=2, hw=(13, 35), batch=3),
    Case("long reduction", GroupStructure.dense(67, 9), hw=(6, 5), batch=3),
)


def rounded(tensor: Tensor) -> Tensor:
    return tensor.bfloat16().float()


def run(
    case: Case, a: Arguments, isa: str, threads: int = 2, interleave: int = 0, numbers: str = "bf16"
) -> Tensor:
    """The native convolution in 16 bit between float32 tensors. numbers: bf16 or fp16."""
    network = native().Network(isa, **{numbers: True})  # type: ignore[union-attr]
    x = network.input(case.structure.in_channels)
    residual = -1 if a.residual is None else network.input(case.structure.out_channels)
    network.output(add_conv(network, case.spec, a.weights, a.bias, x, residual))
    y = torch.full((case.batch, case.structure.out_channels, *case.spec.output_hw(case.hw)), float("nan"))
    inputs = [t.numpy() for t in (a.x, a.residual) if t is not None]
    network.run(inputs, [y.numpy()], threads, interleave)
    return y


def check(y: Tensor, case: Case, a: Arguments) -> None:
    """Against the definition with rounded factors, in float64: nothing else may be rounded to bfloat16."""
    exact = replace(a, x=rounded(a.x), weights=[rounded(w) for w in a.weights])
    expected = reference(case, exact)
    error = (y.double() - expected).abs().max().item()
    assert error <= op_tolerance(torch.float32, case.reduction) * max(expected.abs().max().item(), 1.0)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", [c for c in (*CASES, *MORE) if c.batch], ids=lambda case: case.name)
def test_the_op_in_bfloat16(case: Case, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    need(isa, monkeypatch)
    a = case.tensors()
    # A convolution of single channels has no pairs to gain from and takes x as it is.
    if all(len(group.in_index) < 2 for group in case.structure.groups):
        a = replace(a, x=rounded(a.x), weights=[rounded(weight) for weight in a.weights])
    check(run(case, a, isa), case, a)


@pytest.mark.parametrize("interleave", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("isa", ISAS)
def test_every_interleaving_of_images(
    isa: str, stride: int, interleave: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    need(isa, monkeypatch)
    case = Case("", ODD, batch=17, hw=(9, 40), stride=stride, residual=True)
    a = case.tensors()
    for threads in (1, 3):
        check(run(case, a, isa, threads, interleave), case, a)


@pytest.mark.parametrize("isa", ISAS)
def test_the_rounding_is_that_of_pytorch(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One channel times 1 beside one of zeros gives back what the convolution read."""
    need(isa, monkeypatch)
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0x3F80, 0x7F7F, (64, 1, 8, 8), generator=generator, dtype=torch.int32) << 16
    ties = (bits + 0x8000).view(torch.float32)
    around = [(bits + 0x8000 + step).view(torch.float32) for step in (-1, 1)]
    special = torch.tensor([float("inf"), -float("inf"), 3.4028235e38, 0.0, -0.0, 65504.0])
    draw = torch.randn(1, 1, 8, 8, generator=generator)
    draw.view(-1)[: len(special)] = special
    x = torch.cat([ties, -ties, *around, draw])
    case = Case("", GroupStructure.dense(2, 1), kernel=1, padding=0, batch=len(x), hw=(8, 8), bias=False)
    both = torch.cat([x, torch.zeros_like(x)], 1)
    y = run(case, Arguments(both, [torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)], None, None), isa)
    assert torch.equal(y, rounded(x))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00000, 0x7F800001, -1])
def test_not_a_number_stays_where_it_is(bits: int, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pattern of NaN, in a channel that is read; and in one that is not, beside an odd last channel."""
    need(isa, monkeypatch)
    case = Case("", ODD, kernel=1, padding=0, batch=1, hw=(5, 5))
    a = case.tensors()
    nan = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    a.x[0, 6, 2, 3] = nan
    y = run(case, a, isa)
    assert y[0, [1, 8], 2, 3].isnan().all()
    assert y.isnan().sum() == 2
    a.x[0, 6] = 1.0
    a.x[0, 4] = nan  # nobody reads it
    assert not run(case, a, isa).isnan().any()


@pytest.mark.parametrize("isa", ISAS)
def test_the_order_of_channels_changes_nothing(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sets of channels alone decide which make a pair, so the sums are equal bit for bit."""
    need(isa, monkeypatch)
    rng = random.Random(0)
    for seed in range(8):
        sets = [rng.sample(range(21), rng.randint(1, 21)) for _ in range(1 + seed)]
        outs = [range(2 * g, 2 * g + 2) for g in range(len(sets))]
        case = Case(
            "", GroupStructure.build(21, 2 * len(sets), list(zip(sets, outs, strict=True))), seed=seed
        )
        a = case.tensors()
        shuffles = [rng.sample(range(len(one)), len(one)) for one in sets]
        other = GroupStructure.build(
            21,
            2 * len(sets),
            [([one[i] for i in s], out) for one, s, out in zip(sets, shuffles, outs, strict=True)],
        )
        b = replace(a, weights=[weight[:, s] for weight, s in zip(a.weights, shuffles, strict=True)])
        y = run(case, a, isa)
        check(y, case, a)
        assert torch.equal(run(replace(case, structure=other), b, isa), y)


def test_very_many_shared_channels() -> None:
    """More pairs than are worth counting."""
    rng = random.Random(0)
    groups = [(rng.sample(range(300), 150), range(g, g + 1)) for g in range(40)]
    case = Case("", GroupStructure.build(300, 40, groups), kernel=1, padding=0, hw=(3, 5))
    a = case.tensors()
    check(run(case, a, ""), case, a)


@pytest.mark.parametrize("channels", [[0, 0, 1], [2, 2]])
def test_a_channel_that_is_read_twice(channels: list[int]) -> None:
    """A GroupStructure cannot say this; the extension takes it."""
    x, weight = torch.randn(1, 3, 4, 4), torch.randn(2, len(channels), 1, 1)
    network = native().Network("", True)  # type: ignore[union-attr]
    window = ((1, 1), (1, 1), (0, 0), (1, 1))
    value = network.conv(
        network.input(3), -1, 2, *window, "none", [channels], [[0, 1]], [weight.numpy()], None
    )
    network.output(value)
    y = torch.empty(1, 2, 4, 4)
    network.run([x.numpy()], [y.numpy()], 1)
    expected = torch.nn.functional.conv2d(rounded(x)[:, channels].double(), rounded(weight).double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def difference(fused: nn.Module, model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        expected = model(x)
    return ((fused(x).float() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("seed", range(0, 24, 2))
def test_random_networks(seed: int, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All kinds of steps; fuse() itself holds the answer against the model's."""
    need(isa, monkeypatch)
    model = Net(seed).eval()
    generator = torch.Generator().manual_seed(seed)
    fused = fuse(model, torch.randn(2, 3, 23, 18, generator=generator), backend="cpu", dtype=torch.bfloat16)
    for batch, size in ((1, (23, 18)), (17, (21, 33)), (3, (32, 19))):
        x = torch.randn(batch, 3, *size, generator=generator)
        assert difference(fused, model, x) <= network_tolerance(torch.bfloat16, 360, 10)
    assert fused(torch.empty(0, 3, 23, 18)).shape == (0, 11)


@pytest.mark.parametrize("name", NAMES)
def test_networks_with_every_construct(name: str) -> None:
    model = make(name)
    fused = fuse(model, torch.randn(2, 3, 8, 8), backend="cpu", dtype=torch.bfloat16)
    assert fused(torch.randn(3, 3, 8, 8)).dtype == torch.float32


@pytest.mark.parametrize("batch", [1, 3, 17])
@pytest.mark.parametrize("name", MODELS)
def test_views_and_products(name: str, batch: int) -> None:
    """Pairs of channels whose planes lie in different values."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    fused = fuse(model, torch.randn(2, 3, 12, 12), backend="cpu", dtype=torch.bfloat16)
    x = torch.randn(batch, 3, 12, 12)
    assert difference(fused, model, x) <= network_tolerance(torch.bfloat16, 126, 5)


def test_input_and_output_keep_their_dtype() -> None:
    torch.manual_seed(0)
    model = Mixed().eval()  # plain PyTorch between native runs
    x = torch.randn(2, 3, 9, 7)
    fused = fuse(model, x, backend="cpu", dtype=torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        assert fused(x.to(dtype)).dtype == dtype
    half = fuse(Mixed().eval().bfloat16(), x.bfloat16())
    assert half.backend == "cpu"
    assert half(x.bfloat16()).dtype == torch.bfloat16


def test_a_plain_step_first() -> None:
    """It reads the caller's float32 tensor, and its own numbers are bfloat16."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"), nn.Conv2d(3, 4, 1))
    model.eval()
    x = torch.randn(2, 3, 6, 6)
    fused = fuse(model, x, backend="cpu", dtype=torch.bfloat16)
    assert difference(fused, model, x) <= network_tolerance(torch.bfloat16, 27, 2)


def test_a_float32_answer_is_not_rounded_at_the_end() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(PackedConv2d(GroupStructure.dense(4, 4), 3, padding=1)).eval()
    y = fuse(model, torch.randn(1, 4, 8, 8), backend="cpu", dtype=torch.bfloat16)(torch.randn(1, 4, 8, 8))
    assert not torch.equal(y, rounded(y))


def test_explain_says_how_products_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = fuse(make("residual"), torch.randn(1, 3, 8, 8), backend="cpu", dtype=torch.bfloat16)
    monkeypatch.setenv("DSP_KERNELS_ISA", "base")
    assert "cpu base, bfloat16 by float32 arithmetic" in fused.explain()


def test_float16_rounds_the_network_and_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the CPU multiplies no halves; test_native_fp16.py has the rest."""
    monkeypatch.setenv("DSP_KERNELS_ISA", "base")
    torch.manual_seed(0)
    layer = PackedConv2d(GroupStructure.dense(4, 4), 3, padding=1).eval()
    x = torch.randn(2, 4, 8, 8)
    fused = fuse(layer, x, backend="cpu", dtype=torch.float16)
    assert "float16 by float32 arithmetic" in fused.explain()
    torch.testing.assert_close(fused(x), copy.deepcopy(layer).half().float()(x), rtol=1e-5, atol=1e-6)
    assert fused(x.half()).dtype == torch.float16
    mixed = Mixed().eval()  # plain PyTorch between native runs
    x = torch.randn(2, 3, 9, 7)
    half = fuse(mixed, x, backend="cpu", dtype=torch.float16)
    assert difference(half, mixed, x) <= network_tolerance(torch.float16, 126, 5)
