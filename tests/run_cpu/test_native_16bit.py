"""Convolutions in bfloat16 and float16 on the native executor.

float16 runs on CPUs with AVX512-FP16, elsewhere in an emulation that is compiled from the same source.
"""

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from cases import CASES, Arguments, Case, reference
from isas import FP16_ISAS, WORD_ISAS
from native_nets import MODELS, Mixed, Net
from nets import NAMES, make
from torch import Tensor, nn

from dsp_kernels import GroupStructure, PackedConv2d, fuse
from dsp_kernels.errors import DSPBackendError
from dsp_kernels.run.cpu import extension
from dsp_kernels.run.cpu.conv import add_conv
from dsp_kernels.run.cpu.extension import native
from dsp_kernels.tolerances import HALF_TERMS, half_sums_tolerance, network_tolerance, op_tolerance

# Input channels 3, 1, 4 and 0 per group: odd counts leave one channel without a partner.
ODD = GroupStructure.build(7, 9, [([0, 3, 6], [1, 8]), ([2], [0, 4]), ([5, 1, 2, 0], [7, 3]), ([], [5])])
MORE = (
    *(Case(f"batch {n}", ODD, batch=n, hw=(8, 8), residual=True, activation="relu") for n in (1, 3, 16, 17)),
    *(Case(f"width {w}", ODD, hw=(4, w)) for w in (1, 2, 15, 16, 17, 31, 33)),
    Case("stride 2 and dilation 2", ODD, stride=2, dilation=2, padding=2, hw=(13, 35), batch=3),
    Case("long reduction", GroupStructure.dense(67, 9), hw=(6, 5), batch=3),
)


@dataclass(frozen=True)
class Precision:
    """The dtype of products, on one instruction set."""

    dtype: torch.dtype
    isa: str

    def rounded(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype).float()

    def run(self, case: Case, a: Arguments, threads: int = 2, interleave: int = 0) -> Tensor:
        """The native convolution between float32 tensors."""
        network = native().Network(self.isa, str(self.dtype).removeprefix("torch."))  # type: ignore[union-attr]
        x = network.input(case.structure.in_channels)
        residual = -1 if a.residual is None else network.input(case.structure.out_channels)
        network.output(add_conv(network, case.spec, a.weights, a.bias, x, residual))
        shape = (case.batch, case.structure.out_channels, *case.spec.output_hw(case.hw))
        y = torch.full(shape, float("nan"))
        inputs = [t.numpy() for t in (a.x, a.residual) if t is not None]
        network.run(inputs, [y.numpy()], threads, interleave)
        return y

    def check(self, y: Tensor, case: Case, a: Arguments) -> None:
        """Against the definition with rounded factors, in float64: bias and residual are not rounded."""
        # A convolution whose groups have one channel has no pairs and multiplies float32.
        single = all(len(group.in_index) < 2 for group in case.structure.groups)
        if not single:
            a = replace(a, x=self.rounded(a.x), weights=[self.rounded(weight) for weight in a.weights])
        expected = reference(case, a)
        bound = op_tolerance(torch.float32, case.reduction)
        if self.dtype == torch.float16 and not single:
            bound = half_sums_tolerance(case.reduction)
        error = (y.double() - expected).abs().max().item()
        assert error <= bound * max(expected.abs().max().item(), 1.0)

    def fused(self, model: nn.Module, x: Tensor) -> nn.Module:
        return fuse(model, x, backend="cpu", dtype=self.dtype)


BF16 = [Precision(torch.bfloat16, isa) for isa in WORD_ISAS]
FP16 = [Precision(torch.float16, isa) for isa in FP16_ISAS]


@pytest.fixture
def in_16_bit(use_isa: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Selects an instruction set, whether or not the rule would multiply in 16 bit."""
    monkeypatch.setenv("DSP_KERNELS_PRODUCTS", "16bit")
    return use_isa


@pytest.fixture(params=[*BF16, *FP16], ids=lambda precision: f"{precision.dtype}-{precision.isa}"[6:])
def precision(request: pytest.FixtureRequest, in_16_bit: Callable[[str], None]) -> Precision:
    chosen: Precision = request.param
    in_16_bit(chosen.isa)
    return chosen


@pytest.fixture(params=FP16, ids=lambda precision: precision.isa)
def fp16(request: pytest.FixtureRequest, in_16_bit: Callable[[str], None]) -> Precision:
    chosen: Precision = request.param
    in_16_bit(chosen.isa)
    return chosen


@pytest.mark.parametrize("case", [c for c in (*CASES, *MORE) if c.batch], ids=lambda case: case.name)
def test_the_op(case: Case, precision: Precision) -> None:
    a = case.tensors()
    precision.check(precision.run(case, a), case, a)


@pytest.mark.parametrize("interleave", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_every_interleaving_of_images(stride: int, interleave: int, precision: Precision) -> None:
    case = Case("", ODD, batch=17, hw=(9, 40), stride=stride, residual=True)
    a = case.tensors()
    for threads in (1, 3):
        precision.check(precision.run(case, a, threads, interleave), case, a)


def copied(x: Tensor, precision: Precision) -> Tensor:
    """x as a convolution reads it: one channel times 1, beside one of zeros."""
    case = Case("", GroupStructure.dense(2, 1), kernel=1, padding=0, batch=len(x), hw=x.shape[2:], bias=False)
    both = torch.cat([x, torch.zeros_like(x)], 1)
    weight = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    return precision.run(case, Arguments(both, [weight], None, None))


def test_rounding_is_that_of_pytorch(precision: Precision) -> None:
    """Ties, their neighbours, the end of the range and both signs; for float16 all numbers and all ties."""
    generator = torch.Generator().manual_seed(0)
    special = torch.tensor([float("inf"), 3.4028235e38, 0.0, 65504.0, 65519.99, 65520.0, 1e5])
    if precision.dtype == torch.bfloat16:
        bits = torch.randint(0x3F80, 0x7F7F, (4096,), generator=generator, dtype=torch.int32) << 16
        ties = (bits + 0x8000).view(torch.float32)
    else:
        halves = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16).float()  # from 0 to 65504
        ties = (halves[:-1] + halves[1:]) / 2
        special = torch.cat([special, halves, torch.tensor([2.9e-8, 2**-25, 1e-12, 1e-42])])
    near = [torch.nextafter(ties, torch.tensor(end)) for end in (0.0, torch.inf)]
    x = torch.cat([ties, *near, special, torch.randn(4096, generator=generator)])
    x = torch.cat([x, -x]).view(1, 1, 1, -1)
    assert torch.equal(copied(x, precision), precision.rounded(x))


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00000, 0x7F800001, -1])
def test_nan_stays_in_its_pixel_and_groups(bits: int, precision: Precision) -> None:
    """Every pattern of NaN, in a channel that is read, and in one that is not, beside an odd last channel."""
    case = Case("", ODD, kernel=1, padding=0, batch=1, hw=(5, 5))
    a = case.tensors()
    nan = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    a.x[0, 6, 2, 3] = nan
    y = precision.run(case, a)
    assert y[0, [1, 8], 2, 3].isnan().all()
    assert y.isnan().sum() == 2
    a.x[0, 6] = 1.0
    a.x[0, 4] = nan
    assert not precision.run(case, a).isnan().any()


def test_the_order_of_channels_does_not_matter(precision: Precision) -> None:
    """Pairs are chosen by the sets of channels alone, so sums are bitwise equal."""
    rng = random.Random(0)
    for seed in range(8):
        sets = [rng.sample(range(21), rng.randint(1, 21)) for _ in range(1 + seed)]
        outs = [range(2 * g, 2 * g + 2) for g in range(len(sets))]
        structure = GroupStructure.build(21, 2 * len(sets), list(zip(sets, outs, strict=True)))
        case = Case("", structure, seed=seed)
        a = case.tensors()
        shuffles = [rng.sample(range(len(one)), len(one)) for one in sets]
        shuffled = [([one[i] for i in s], out) for one, s, out in zip(sets, shuffles, outs, strict=True)]
        other = replace(case, structure=GroupStructure.build(21, 2 * len(sets), shuffled))
        b = replace(a, weights=[weight[:, s] for weight, s in zip(a.weights, shuffles, strict=True)])
        y = precision.run(case, a)
        precision.check(y, case, a)
        assert torch.equal(precision.run(other, b), y)


@pytest.mark.parametrize("channels", [[0, 0, 1], [2, 2]])
def test_a_channel_that_is_read_twice(channels: list[int]) -> None:
    """A GroupStructure refuses this; the extension accepts it."""
    x, weight = torch.randn(1, 3, 4, 4), torch.randn(2, len(channels), 1, 1)
    network = native().Network("", "bfloat16")  # type: ignore[union-attr]
    window = ((1, 1), (1, 1), (0, 0), (1, 1))
    value = network.conv(
        network.input(3), -1, 2, *window, "none", [channels], [[0, 1]], [weight.numpy()], None
    )
    network.output(value)
    y = torch.empty(1, 2, 4, 4)
    network.run([x.numpy()], [y.numpy()], 1)
    read = x.bfloat16()[:, channels].double()
    expected = torch.nn.functional.conv2d(read, weight.bfloat16().double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


# -- float16 sums ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("filters", range(1, 10))
@pytest.mark.parametrize("images", [1, 8])
def test_every_tile_of_float16(filters: int, images: int, fp16: Precision) -> None:
    """One, a few and many runs of HALF_TERMS words; widths for every number of vectors."""
    for channels in (2, 2 * HALF_TERMS, 2 * HALF_TERMS + 1, 7 * HALF_TERMS):
        structure = GroupStructure.dense(channels, filters)
        case = Case("", structure, kernel=1, padding=0, batch=images, hw=(1, 37))
        a = case.tensors()
        fp16.check(fp16.run(case, a), case, a)


def constant(channels: int, x: float, weight: float, precision: Precision) -> float:
    case = Case("", GroupStructure.dense(channels, 1), kernel=1, padding=0, batch=1, hw=(1, 1), bias=False)
    weights = [torch.full((1, channels, 1, 1), weight)]
    return precision.run(case, Arguments(torch.full((1, channels, 1, 1), x), weights, None, None)).item()


def test_sums_in_float16_are_short(fp16: Precision) -> None:
    """A float16 counter stops at 2048. A product or the sum of a run may overflow, the whole sum does not."""
    assert native().half_terms == HALF_TERMS  # type: ignore[union-attr]
    assert constant(8192, 1.0, 1.0, fp16) == 8192
    assert constant(16 * HALF_TERMS, 64.0, 8.0, fp16) == 8192 * HALF_TERMS
    assert constant(2, 300.0, 300.0, fp16) == float("inf")


def test_equal_terms_that_round_alike_are_within_the_tolerance() -> None:
    """The worst case of sums in float16: 128 equal products, each addition rounded to the same side."""
    half = np.float16
    worst = 0.0
    for constant in np.linspace(0.01, 2.0, 400).astype(half):
        part = half(0.0)
        for _ in range(HALF_TERMS):  # even and odd channels have lanes of their own
            part = half(part + constant)
        exact = 2 * HALF_TERMS * float(constant)
        worst = max(worst, abs(2 * float(part) - exact) / exact)
    plain = network_tolerance(torch.float16, 2 * HALF_TERMS, 1)
    assert plain < worst < network_tolerance(torch.float16, 2 * HALF_TERMS, 1, half_sums=True)


def test_what_the_extension_says_of_float16(fp16: Precision) -> None:
    module = native()
    assert module is not None
    assert "float16" in module.own_products(fp16.isa)
    fused = fp16.fused(make("residual"), torch.randn(1, 3, 8, 8))
    assert f"cpu {fp16.isa}, float16]" in fused.explain()
    with pytest.raises(ValueError, match="known are float32, bfloat16, float16"):
        module.Network(fp16.isa, "float8")


# -- Networks --------------------------------------------------------------------------------------------


def difference(fused: nn.Module, model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        expected = model(x)
    return ((fused(x).float() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("seed", range(0, 24, 2))
def test_random_networks(seed: int, precision: Precision) -> None:
    model = Net(seed).eval()
    generator = torch.Generator().manual_seed(seed)
    fused = precision.fused(model, torch.randn(2, 3, 23, 18, generator=generator))  # compares them too
    for batch, size in ((1, (23, 18)), (17, (21, 33)), (3, (32, 19))):
        x = torch.randn(batch, 3, *size, generator=generator)
        assert difference(fused, model, x) <= network_tolerance(precision.dtype, 360, 10)
    assert fused(torch.empty(0, 3, 23, 18)).shape == (0, 11)


@pytest.mark.parametrize("name", NAMES)
def test_networks_with_every_construct(name: str, precision: Precision) -> None:
    fused = precision.fused(make(name), torch.randn(2, 3, 8, 8))  # compares them
    assert fused(torch.randn(3, 3, 8, 8)).dtype == torch.float32


@pytest.mark.parametrize("batch", [1, 3, 17])
@pytest.mark.parametrize("name", MODELS)
def test_views_and_products(name: str, batch: int, precision: Precision) -> None:
    """Pairs of channels whose planes are in different tensors."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    fused = precision.fused(model, torch.randn(2, 3, 12, 12))
    x = torch.randn(batch, 3, 12, 12)
    assert difference(fused, model, x) <= network_tolerance(precision.dtype, 126, 5)


def test_plain_pytorch_between_segments(precision: Precision) -> None:
    torch.manual_seed(0)
    model, x = Mixed().eval(), torch.randn(2, 3, 9, 7)
    fused = precision.fused(model, x)
    assert difference(fused, model, x) <= network_tolerance(precision.dtype, 126, 5)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        assert fused(x.to(dtype)).dtype == dtype


def test_a_bfloat16_model_runs_natively() -> None:
    x = torch.randn(2, 3, 9, 7).bfloat16()
    fused = fuse(Mixed().eval().bfloat16(), x)
    assert fused.backend == "cpu"
    assert fused(x).dtype == torch.bfloat16


def test_a_plain_step_first() -> None:
    """It reads the caller's float32 tensor, and its own parameters are bfloat16."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"), nn.Conv2d(3, 4, 1)).eval()
    x = torch.randn(2, 3, 6, 6)
    fused = fuse(model, x, backend="cpu", dtype=torch.bfloat16)
    assert difference(fused, model, x) <= network_tolerance(torch.bfloat16, 27, 2)


def test_a_float32_output_is_not_rounded() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(PackedConv2d(GroupStructure.dense(4, 4), 3, padding=1)).eval()
    y = fuse(model, torch.randn(1, 4, 8, 8), backend="cpu", dtype=torch.bfloat16)(torch.randn(1, 4, 8, 8))
    assert not torch.equal(y, y.bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_without_fast_products_only_weights_are_rounded(
    dtype: torch.dtype, use_isa: Callable[[str], None]
) -> None:
    """The answer is to the bit that of a float32 network with these weights."""
    use_isa("base")
    assert native().own_products("base") == ["float32"]  # type: ignore[union-attr]
    torch.manual_seed(0)
    layer = PackedConv2d(GroupStructure.dense(24, 24), 3, padding=1).eval()
    x = torch.randn(2, 24, 8, 8)
    fused = fuse(layer, x, backend="cpu", dtype=dtype)
    assert f"cpu base, {str(dtype)[6:]} weights, float32 arithmetic" in fused.explain()
    rounded = copy.deepcopy(layer).to(dtype).float()
    assert torch.equal(fused(x), fuse(rounded, x, backend="cpu")(x))
    torch.testing.assert_close(fused(x), rounded(x), rtol=1e-5, atol=1e-5)
    assert fused(x.to(dtype)).dtype == dtype


@pytest.mark.parametrize(
    ("isa", "vendor", "wanted", "expected"),
    [
        ("avx512_bf16", "AuthenticAMD", "", ", bfloat16]"),
        ("avx512_bf16", "GenuineIntel", "", ", bfloat16 weights, float32 arithmetic]"),
        ("avx512_bf16", "", "", ", bfloat16 weights, float32 arithmetic]"),
        ("avx512_bf16", "GenuineIntel", "16bit", ", bfloat16]"),
        ("avx512_bf16", "AuthenticAMD", "float32", ", bfloat16 weights, float32 arithmetic]"),
        ("emulated_amx", "GenuineIntel", "", ", bfloat16, by matrices (AMX) where they pay]"),
        ("emulated_amx", "GenuineIntel", "float32", ", bfloat16 weights, float32 arithmetic]"),
    ],
)
def test_the_rule_of_bfloat16(
    isa: str,
    vendor: str,
    wanted: str,
    expected: str,
    use_isa: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vdpbf16ps is twice as fast as float32 on AMD's CPUs, half as fast on Intel's; AMX is fast."""
    if isa not in WORD_ISAS:
        pytest.skip(f"this CPU has no {isa}")
    use_isa(isa)
    monkeypatch.setattr(extension, "cpu_fact", lambda name: vendor)
    monkeypatch.setenv("DSP_KERNELS_PRODUCTS", wanted)
    layer, x = PackedConv2d(GroupStructure.dense(4, 4), 3, padding=1), torch.randn(1, 4, 8, 8)
    assert expected in fuse(layer, x, backend="cpu", dtype=torch.bfloat16).explain()


def test_an_unknown_choice_of_products_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSP_KERNELS_PRODUCTS", "8bit")
    layer, x = PackedConv2d(GroupStructure.dense(4, 4), 3), torch.randn(1, 4, 8, 8)
    with pytest.raises(DSPBackendError, match="DSP_KERNELS_PRODUCTS is '8bit'; expected 16bit or float32"):
        fuse(layer, x, backend="cpu", dtype=torch.bfloat16)
