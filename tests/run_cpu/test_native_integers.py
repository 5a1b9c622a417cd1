"""Integer networks on the native executor: bit for bit the definition in plain PyTorch."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Case, definition
from native_nets import MODELS, Net
from torch import Tensor

import dsp_kernels
from dsp_kernels import GroupStructure
from dsp_kernels.program.steps import Requantize
from dsp_kernels.run.cpu.conv import add_conv, as_array, ending
from dsp_kernels.run.cpu.extension import native

# Input channels 9, 1, 4, 0 and 6 per group: counts that fill words of four, and some that do not.
ODD = GroupStructure.build(
    12, 13, [(range(9), [1, 8]), ([2], [0, 4]), ([5, 1, 2, 0], [7, 3]), ([], [5]), (range(3, 9), [9, 10, 12])]
)
MORE = (
    *(Case(f"batch {n}", ODD, batch=n, hw=(8, 8), residual=True) for n in (1, 3, 16, 17, 40)),
    *(Case(f"width {w}", ODD, hw=(4, w), residual=True) for w in (1, 2, 15, 16, 17, 31, 33)),
    Case("stride 2 and dilation 2", ODD, stride=2, dilation=2, padding=2, hw=(13, 35), batch=3),
    Case("passes", GroupStructure.dense(190, 11), hw=(6, 5), batch=3, residual=True),
    Case("passes of a 1x1", GroupStructure.dense(1100, 9), kernel=1, padding=0, hw=(6, 5)),
    Case("a window beyond one pass", GroupStructure.dense(2, 3), kernel=25, padding=12, hw=(9, 30)),
)
LEVELS = {"u8": (0, 255), "s8": (-128, 127), "exact": (-900, 900)}
INFINITE = float("inf")


class Draw:
    """Random integers and factors, the same for equal seeds."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=self.generator).float()

    def factors(self, count: int, typical: float) -> Tensor:
        return (torch.rand(count, generator=self.generator) + 0.5) * typical


def ended(t: Tensor, r: Requantize) -> Tensor:
    t = t.clamp(r.low, r.high)
    return t if r.high == INFINITE else t.round()


def ends(kind: str, residual: float | None = None) -> Requantize:
    """Of a step without filters, for values of a kind."""
    low, high = LEVELS[kind]
    return Requantize(torch.tensor([0.37]), residual, low, high)


def run(network: Any, inputs: list[Tensor], y: int, shape: Any, threads: int, interleave: int = 0) -> Tensor:
    network.output(y)
    result = torch.full(tuple(shape), float("nan"))
    network.run([as_array(x) for x in inputs], [result.numpy()], threads, interleave)
    return result


def check_conv(case: Case, kind: str, isa: str, threads: int = 2, interleave: int = 0, out: str = "") -> None:
    draw, structure = Draw(case.seed), case.structure
    spec = replace(case.spec, activation="none")
    out = out or "u8"
    low, high = LEVELS[out] if out != "float" else (-INFINITE, INFINITE)
    taps = spec.kernel_size[0] * spec.kernel_size[1]
    weights = [
        draw.integers(-127, 127, len(g.out_index), len(g.in_index), *spec.kernel_size)
        for g in structure.groups
    ]
    x = draw.integers(*LEVELS[kind], case.batch, structure.in_channels, *case.hw)
    x = x.contiguous(memory_format=torch.channels_last) if case.channels_last else x
    longest = max((len(g.in_index) for g in structure.groups), default=1) * taps
    typical = 60 / (73 * LEVELS[kind][1] * max(longest, 1) ** 0.5)
    multiplier, bias = draw.factors(structure.out_channels, typical), draw.factors(structure.out_channels, 30)
    residual = draw.integers(0, 255, case.batch, structure.out_channels, *spec.output_hw(case.hw))
    r = Requantize(multiplier, 0.43 if case.residual else None, low, high, kind == "exact", kind == "s8")

    sums = definition(spec, x, weights, None, None).float()
    written = torch.zeros(structure.out_channels)
    for group in structure.groups:
        written[list(group.out_index)] = 1.0
    t = sums * multiplier.view(-1, 1, 1) + (bias * written).view(-1, 1, 1)
    if case.residual:
        t = t + residual * 0.43
    activation = case.activation if case.activation in ("relu", "relu6") and out == "float" else "none"
    t = {"none": t, "relu": t.relu(), "relu6": F.relu6(t)}[activation]

    network = native().Network(isa)  # type: ignore[union-attr]
    value = network.input(structure.in_channels)
    other = network.input(structure.out_channels) if case.residual else -1
    y = add_conv(network, replace(spec, activation=activation), weights, bias, value, other, r)
    inputs = [x, residual] if case.residual else [x]
    assert torch.equal(run(network, inputs, y, t.shape, threads, interleave), ended(t, r))


@pytest.mark.parametrize("kind", LEVELS)
@pytest.mark.parametrize("case", [c for c in (*CASES, *MORE) if c.batch], ids=lambda case: case.name)
def test_the_op(case: Case, kind: str, word_isa: str) -> None:
    if kind == "exact" and case.reduction > 140:
        case = replace(case, structure=GroupStructure.dense(1, 3), kernel=3)
    for threads, out in ((1, "u8"), (2, "s8"), (2, "float")):
        check_conv(case, kind, word_isa, threads, out=out)


@pytest.mark.parametrize("kind", ["u8", "s8"])
@pytest.mark.parametrize("interleave", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_every_interleaving_of_images(stride: int, interleave: int, kind: str, word_isa: str) -> None:
    case = Case("", ODD, batch=17, hw=(9, 40), stride=stride, residual=True)
    for threads in (1, 3):
        check_conv(case, kind, word_isa, threads, interleave)


MAP = (3, 5, 7, 9)  # images, channels, rows, columns


@pytest.mark.parametrize("kind", LEVELS)
def test_maps_and_products(kind: str, isa: str) -> None:
    draw, r = Draw(), replace(ends(kind, residual=0.61), multiplier=torch.tensor([0.83]))
    x, y = (draw.integers(*LEVELS[kind], *MAP) for _ in range(2))
    gate = draw.integers(*LEVELS[kind], *MAP[:2], 1, 1)
    image = torch.randn(MAP, generator=draw.generator) * 300
    k = r.multiplier
    small = replace(r, multiplier=torch.tensor([0.004]))
    cases: list[tuple[list[Tensor], Any, Tensor]] = [
        ([x, y], lambda n, a, b: n.map(a, b, None, None, "none", ending(r)), ended(x * k + y * 0.61, r)),
        ([image], lambda n, a: n.map(a, -1, None, None, "none", ending(r)), ended(image * k, r)),
        ([x, y], lambda n, a, b: n.product(a, b, "none", ending(small)), ended(x * y * small.multiplier, r)),
        (
            [x, gate],
            lambda n, a, b: n.product(a, b, "none", ending(small)),
            ended(x * gate * small.multiplier, r),
        ),
    ]
    for inputs, add, expected in cases:
        network = native().Network(isa)  # type: ignore[union-attr]
        made = add(network, *(network.input(MAP[1]) for _ in inputs))
        assert torch.equal(run(network, inputs, made, MAP, 2), expected)


@pytest.mark.parametrize("size", [(7, 9), (28, 30)])
@pytest.mark.parametrize("kind", LEVELS)
def test_averages(kind: str, size: tuple[int, int], isa: str) -> None:
    """A window's factor is the multiplier divided by its number of pixels, also where windows differ."""
    x, r = Draw().integers(*LEVELS[kind], 3, 5, *size), ends(kind)
    window: dict[str, Any] = {"kernel_size": (3, 2), "stride": (2, 2), "padding": (1, 1)}
    for count_pads, ceil_mode, divisor in ((True, False, None), (False, True, None), (True, False, 3)):
        window |= {"ceil_mode": ceil_mode, "count_include_pad": count_pads, "divisor_override": divisor}
        ones = window | {"count_include_pad": True, "divisor_override": 1}
        sums = F.avg_pool2d(x.double(), **ones)
        counts = F.avg_pool2d(torch.ones_like(x).double(), **ones)
        counts = counts if divisor is None and not count_pads else torch.tensor(float(divisor or 6)).double()
        network = native().Network(isa)  # type: ignore[union-attr]
        y = network.pool(network.input(5), kind="avg_pool", **window, requantize=ending(r))
        expected = ended(sums.float() * (r.multiplier.double() / counts).float(), r)
        assert torch.equal(run(network, [x], y, sums.shape, 2), expected)
    for rows, columns in ((1, 1), (3, 4)):
        parts = [
            [
                x[
                    :,
                    :,
                    (i * h) // rows : -(-(i + 1) * h // rows),
                    (j * w) // columns : -(-(j + 1) * w // columns),
                ]
                for j in range(columns)
            ]
            for h, w in [size]
            for i in range(rows)
        ]
        averages = [
            [
                part.double().sum((2, 3)).float() * (r.multiplier.double() / part[0, 0].numel()).float()
                for part in row
            ]
            for row in parts
        ]
        network = native().Network(isa)  # type: ignore[union-attr]
        y = network.adaptive(network.input(5), (rows, columns), ending(r))
        expected = ended(torch.stack([torch.stack(row, -1) for row in averages], -2), r)
        assert torch.equal(run(network, [x], y, expected.shape, 2), expected)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", LEVELS)
def test_linear_layers(kind: str, threads: int, isa: str) -> None:
    features = 140 if kind == "exact" else 1300
    draw, r = Draw(), ends(kind)
    x, weight = draw.integers(*LEVELS[kind], 9, features), draw.integers(-127, 127, 70, features)
    bias = draw.factors(70, 20)
    r = replace(r, multiplier=draw.factors(70, 0.02 / LEVELS[kind][1]))
    for high, activation in ((r.high, "none"), (INFINITE, "none"), (INFINITE, "relu"), (INFINITE, "relu6")):
        end = replace(r, low=-INFINITE if high == INFINITE else r.low, high=high)
        t = F.linear(x.double(), weight.double()).float() * r.multiplier + bias
        t = {"none": t, "relu": t.relu(), "relu6": F.relu6(t)}[activation]
        network = native().Network(isa)  # type: ignore[union-attr]
        y = network.linear(network.input(features), as_array(weight), as_array(bias), activation, ending(end))
        assert torch.equal(run(network, [x], y, (9, 70), threads), ended(t, end))


@pytest.mark.parametrize("name", ["dense", "excite", "shuffle", "pools", "resize", *range(4)])
def test_networks(name: str | int, word_isa: str) -> None:
    """Every kind of step between integer layers; float steps of their own kind may round differently."""
    torch.manual_seed(0)
    model = (Net(name) if isinstance(name, int) else MODELS[name]()).eval()
    images = torch.randn(20, 3, 26, 28)
    quantized = dsp_kernels.quantize(model, images)
    fused = dsp_kernels.fuse(quantized, backend="cpu")
    bound = 0.05 if quantized.program.notes else 0.0
    before = torch.get_num_threads()
    try:
        for batch, threads in ((1, 2), (5, 1), (20, 2)):
            torch.set_num_threads(threads)
            y, expected = fused(images[:batch]), quantized(images[:batch])
            assert (y - expected).abs().max() <= bound * expected.abs().max()
    finally:
        torch.set_num_threads(before)
