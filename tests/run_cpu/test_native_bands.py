"""Convolutions forced to Winograd's method, in bands of rows or patches of them, against the definition."""

from typing import Any

import pytest
import torch
from cases import CASES, Arguments, Case, reference

from dsp_kernels import GroupStructure, fuse
from dsp_kernels.op.packed import PackedConv2d
from dsp_kernels.run.cpu.conv import add_conv
from dsp_kernels.run.cpu.extension import native
from dsp_kernels.tolerances import op_tolerance

WIDE = GroupStructure.build(13, 21, [(range(0, 13, 2), range(9)), (range(1, 9), range(9, 20)), ([3], [20])])
# Heights that leave one to four rows in the last band, widths around the lengths of a vector.
SIZES = [
    Case(f"{h}x{w}", WIDE, hw=(h, w), batch=3, residual=h % 2 == 1, activation="relu", seed=h)
    for h, w in ((4, 8), (5, 7), (6, 16), (7, 9), (8, 15), (9, 3), (13, 33), (2, 17), (1, 1))
]
SHAPES = [
    Case("rows of nine taps", WIDE, kernel=(3, 9), padding=(1, 4), hw=(9, 12)),
    Case("columns only", WIDE, kernel=(3, 1), padding=(1, 0), hw=(6, 5)),
    Case("dilated columns", WIDE, dilation=(1, 3), padding=(1, 3), hw=(6, 11), activation="silu"),
    Case("no padding", WIDE, padding=0, hw=(11, 10), residual=True, activation="hardswish"),
    Case("two rows of padding", WIDE, padding=(2, 1), hw=(5, 6), activation="relu6"),
]
FORMS = ("bands", "patches", "stacked")
TABLE = [case for case in CASES if case.batch] + SIZES + SHAPES


def network_of(case: Case, a: Arguments, isa: str = "", winograd: str = "where_faster") -> Any:
    network = native().Network(isa, winograd=winograd)  # type: ignore[union-attr]
    x = network.input(case.structure.in_channels)
    residual = -1 if a.residual is None else network.input(case.structure.out_channels)
    network.output(add_conv(network, case.spec, a.weights, a.bias, x, residual))
    return network


def forms(network: Any, *hw: tuple[int, int], interleave: int = 16) -> set[str]:
    """The names of the network's operations."""
    [launch] = network.launches(hw, interleave, 1, interleave)
    return {kernel.partition(" in tiles")[0] for _, kernel in launch["operations"]}


def possible(case: Case) -> bool:
    """Whether Winograd's method can compute the case."""
    spec = case.spec
    reads = any(group.in_index for group in case.structure.groups)
    return reads and spec.kernel_size[0] == 3 and spec.stride == (1, 1) and spec.dilation[0] == 1


def made(case: Case, form: str, interleave: int, isa: str) -> str:
    """The form that computes the case: bands if it cannot be the one asked for.

    Patches need vectors of a pixel's images; stacked bands, rows and taps that reach over half a vector.
    """
    spec, lanes = case.spec, {"base": 4, "avx2": 8}.get(isa, 16)
    reach = (spec.kernel_size[1] - 1) * spec.dilation[1]
    if form == "patches" and (spec.kernel_size[1], spec.dilation[1]) == (3, 1) and interleave >= lanes:
        return form
    if form == "stacked" and 2 * interleave * max(spec.output_hw(case.hw)[1], reach) <= lanes:
        return "stacked bands"
    return "bands"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.name)
def test_every_form_is_the_convolution(case: Case, form: str, isa: str) -> None:
    a = case.tensors()
    expected = reference(case, a)
    allowed = op_tolerance(torch.float32, case.reduction) * max(expected.abs().max().item(), 1.0)
    inputs = [tensor.numpy() for tensor in (a.x, a.residual) if tensor is not None]
    network = network_of(case, a, isa, form)
    for interleave, threads in ((1, 1), (1, 2), (2, 3), (4, 1), (8, 1), (16, 2)):
        y = torch.full(expected.shape, float("nan"))
        network.run(inputs, [y.numpy()], threads, interleave)
        error = (y.double() - expected).abs().max().item()
        assert error <= allowed, (interleave, threads)
    for interleave in (1, 2, 16):
        sizes = [case.hw] if a.residual is None else [case.hw, tuple(expected.shape[2:])]
        names = forms(network, *sizes, interleave=interleave)
        assert (f"conv in {made(case, form, interleave, isa)}" in names) == possible(case), names


@pytest.mark.parametrize(
    ("structure", "hw", "winograd"),
    [
        (WIDE, (30, 23), "bands"),
        (WIDE, (30, 23), "patches"),
        (WIDE, (7, 7), "stacked"),
        # Both forms cost about the same: the choice must not depend on the number of threads.
        (GroupStructure.dense(16, 4), (16, 16), "where_faster"),
        (GroupStructure.dense(4, 12), (28, 28), "where_faster"),
    ],
)
def test_one_image_is_bitwise_equal_on_any_number_of_threads(
    structure: GroupStructure, hw: tuple[int, int], winograd: str
) -> None:
    case = Case("many", structure, hw=hw, batch=1, activation="relu")
    a = case.tensors()
    network = network_of(case, a, "", winograd)
    first = torch.empty(1, structure.out_channels, *hw)
    network.run([a.x.numpy()], [first.numpy()], 1, 1)
    for threads in (2, 3, 8):
        y = torch.full(first.shape, float("nan"))
        network.run([a.x.numpy()], [y.numpy()], threads, 1)
        assert torch.equal(y, first)


def test_chosen_where_it_is_faster_and_not_when_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wide 3x3 layer saves half its products; a depthwise layer saves nothing."""
    wide, thin = GroupStructure.dense(64, 64), GroupStructure.uniform(16, 16, 16)

    def names(structure: GroupStructure, **how: str) -> set[str]:
        case = Case("", structure)
        return forms(network_of(case, case.tensors(), **how), (16, 16))

    assert "conv in patches" in names(wide)
    assert "conv" in names(thin)
    assert "conv" in names(wide, winograd="never")
    with pytest.raises(ValueError, match="winograd"):
        names(wide, winograd="sometimes")

    layer = PackedConv2d(wide, 3, padding=1).eval()
    x = torch.randn(8, 64, 16, 16)
    by_bands = fuse(layer, x, backend="cpu")(x)
    monkeypatch.setenv("DSP_KERNELS_WINOGRAD", "0")
    plain = fuse(layer, x, backend="cpu")(x)
    torch.testing.assert_close(by_bands, plain, rtol=1e-4, atol=1e-5)
    assert not torch.equal(by_bands, plain)


def test_bands_with_too_much_scratch_are_a_plain_sum() -> None:
    """A thousand columns between the taps of 200 channels: 150 MB of transformed rows."""
    case = Case(
        "far", GroupStructure.dense(200, 2), dilation=(1, 1000), padding=(1, 1000), hw=(4, 3), batch=16
    )
    a = case.tensors()
    network = network_of(case, a, "", "bands")
    y = torch.full((16, 2, 4, 3), float("nan"))
    network.run([a.x.numpy()], [y.numpy()], 1, 16)
    assert "conv in bands" not in forms(network, (4, 3))
    torch.testing.assert_close(y.double(), reference(case, a), rtol=1e-5, atol=1e-4)


def test_the_cost_of_transforms_includes_columns_between_distant_taps() -> None:
    """Taps 128 columns apart on 64 columns: most transformed columns are read by no output."""
    case = Case("far", GroupStructure.dense(64, 8), dilation=(1, 64), padding=(1, 64))
    assert "conv" in forms(network_of(case, case.tensors()), (8, 64))


@pytest.mark.parametrize("form", FORMS)
def test_each_thread_that_shares_an_image_has_its_own_scratch(form: str) -> None:
    """Four threads split an image into eight chunks; each thread reuses one scratch."""
    case = Case("many", GroupStructure.dense(64, 8), hw=(64, 64), batch=1)
    a = case.tensors()
    sizes = {}
    for threads in (1, 2, 4):
        [launch] = network_of(case, a, "", form).launches([(64, 64)], 1, threads)
        sizes[threads] = launch["bytes"]
    one = sizes[2] - sizes[1]
    assert one > 0
    assert sizes[4] - sizes[2] == 2 * one
