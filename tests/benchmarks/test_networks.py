"""Networks in all their forms, structures, and floors."""

from __future__ import annotations

from pathlib import Path

import dsp_benchmarks.measure.peaks as peaks_module
import numpy as np
import pytest
import torch
from bench_rows import SMALL
from dsp_benchmarks.cases import Case, build_case, case_input
from dsp_benchmarks.kernels.shapes import layers
from dsp_benchmarks.measure.floors import floors, program_of
from dsp_benchmarks.measure.peaks import Peaks, measure_peaks
from dsp_benchmarks.subjects.networks import Network, NetworkSource, load_network
from dsp_benchmarks.subjects.released_form import ReleasedNetwork
from dsp_benchmarks.subjects.structures import apply_structure
from torch import nn

import dsp_kernels
from dsp_kernels import GroupStructure, PackedConv2d
from dsp_kernels.errors import DSPFormatError, DSPPruningError
from dsp_pruning.data import normalise
from dsp_pruning.data.load import CIFAR10_MEAN, CIFAR10_STD
from dsp_pruning.models import cifar_resnet
from dsp_pruning.released.arrays import read_released_arrays
from dsp_pruning.report import network_cost

EXAMPLE = torch.zeros(1, 3, 16, 16)
PEAKS = Peaks({"float32": 1e9}, 1e8, 0.0, 1, {})


@pytest.mark.parametrize("name", ["resnet20_g2", "resnet20_g3", "resnet20_g4", "resnet56_g4"])
def test_the_released_form_gives_the_golden_logits(shared: Path, name: str) -> None:
    network = ReleasedNetwork(*read_released_arrays(shared / "nets" / f"{name}.npz"))
    with np.load(shared / "data" / "cifar10_subset.npz") as archive:
        images = torch.from_numpy(archive["test_images"][:8])
    x = normalise(images, CIFAR10_MEAN, CIFAR10_STD)
    with np.load(shared / "golden" / "logits.npz") as golden:
        expected = torch.from_numpy(golden[name][:8])
    with torch.inference_mode():
        assert float((network(x) - expected).abs().max()) <= 2e-5


def test_compacted_is_dense_and_gives_what_packed_gives(network: Network) -> None:
    compacted = network.form("compacted")
    assert not any(isinstance(module, PackedConv2d) for module in compacted.modules())
    x = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        assert torch.allclose(compacted(x), network.packed(x), atol=1e-5)


def test_filter_pruned_has_the_packed_network_s_flops(network: Network) -> None:
    filters = network.form("filters")
    cost = network_cost(filters, network.example).macs
    assert cost == pytest.approx(network.macs("packed"), rel=0.05)
    assert cost == network.macs("filters")
    assert filters(torch.randn(2, 3, 16, 16)).shape == (2, 10)


@pytest.mark.parametrize("form", ["compacted", "filters"])
def test_a_form_first_asked_for_in_inference_mode_can_be_trained(form: str) -> None:
    """A form is kept, so whoever asks first must not decide what the others can do with it."""
    fresh = load_network(SMALL)
    with torch.inference_mode():
        made = fresh.form(form)
        fresh.program(form)
    loss = made(torch.randn(2, 3, 16, 16)).sum()
    loss.backward()
    assert all(parameter.grad is not None for parameter in made.parameters())
    assert not any(tensor.is_inference() for tensor in made.state_dict().values())
    assert not fresh.example.is_inference()


@pytest.mark.parametrize(("groups", "rate"), [(1, 0.5), (2, 0.7), (4, 0.6)])
def test_a_random_structure_has_its_groups_and_its_rate(groups: int, rate: float) -> None:
    dense = cifar_resnet(20).eval()
    packed = apply_structure(dense, EXAMPLE, f"random:g={groups},rate={rate}", seed=1)
    convs = [module for module in packed.modules() if isinstance(module, PackedConv2d)]
    assert len(convs) == 18
    # A group that reads what another reads is one with it, one whose filters nobody reads is gone.
    assert max(len(conv.structure.groups) for conv in convs) == groups
    outside = network_cost(dense, EXAMPLE).macs - sum(
        conv.weight.numel() * size * size
        for stage, size in ((dense.stage_1, 16), (dense.stage_2, 8), (dense.stage_3, 4))
        for block in stage
        for conv in (block.conv_a, block.conv_b)
    )
    total, left = network_cost(dense, EXAMPLE).macs - outside, network_cost(packed, EXAMPLE).macs - outside
    if rate >= 0.6:
        assert 1 - left / total == pytest.approx(rate, abs=0.03)
    again = apply_structure(dense, EXAMPLE, f"random:g={groups},rate={rate}", seed=1)
    other = apply_structure(dense, EXAMPLE, f"random:g={groups},rate={rate}", seed=2)
    structures = [
        [m.structure for m in net.modules() if isinstance(m, PackedConv2d)] for net in (packed, again, other)
    ]
    assert structures[0] == structures[1] != structures[2]


def test_a_structure_from_our_pruner_reaches_its_rate() -> None:
    packed = apply_structure(cifar_resnet(8).eval(), EXAMPLE, "pruner:g=2,rate=0.6")
    dense = network_cost(cifar_resnet(8), EXAMPLE).macs
    assert network_cost(packed, EXAMPLE).macs < 0.55 * dense


def test_a_structure_from_a_file(shared: Path) -> None:
    path = shared / "structures" / "resnet18_g2_80.npz"
    network = load_network(NetworkSource("resnet18", str(path), 64))
    # structures/README.md says 3.86 at 224 x 224; the classifier weighs more in 64 x 64 images.
    assert network.macs("dense") / network.macs("packed") == pytest.approx(3.82, abs=0.01)
    assert "resnet18_g2_80.npz (synthetic)" in network.label


@pytest.mark.parametrize("structure", ["random", "random:g=2", "other:g=2,rate=0.5", "none.npz"])
def test_an_unknown_structure_is_refused(structure: str) -> None:
    with pytest.raises(DSPFormatError):
        apply_structure(cifar_resnet(8), EXAMPLE, structure)


def test_a_structure_of_another_network_is_refused(tmp_path: Path) -> None:
    index = np.arange(4, dtype=np.int32)
    for name, top, words in (("conv9", 0, "does not have"), ("stage_1.0.conv_a", 99, "does not fit layer")):
        arrays = {f"{name}.0.in_index": index, f"{name}.0.out_index": index + top}
        np.savez(tmp_path / "s.npz", meta="{}", **arrays)
        with pytest.raises(DSPFormatError, match=words):
            apply_structure(cifar_resnet(8), EXAMPLE, str(tmp_path / "s.npz"))


def test_an_impossible_rate_is_refused() -> None:
    with pytest.raises(DSPPruningError, match=r"rate 0\.1"):
        apply_structure(cifar_resnet(8), EXAMPLE, "random:g=2,rate=0.1")


def test_a_saved_file_is_a_network(network: Network, tmp_path: Path) -> None:
    path = tmp_path / "saved.safetensors"
    dsp_kernels.save(network.packed, path)
    loaded = load_network(NetworkSource(str(path), None, 16))
    assert loaded.macs("packed") == network.macs("packed")
    assert loaded.macs("dense") == network.macs("dense")


def test_a_saved_file_without_an_architecture_is_a_network(tmp_path: Path) -> None:
    """Its original widths are not in the file, so the dense network has the packed ones, and says so."""
    packed = nn.Sequential(
        PackedConv2d(
            GroupStructure.build(3, 6, [([0, 2], [0, 1, 4]), ([1], [2, 3])]), 3, padding=1, bias=True
        ),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 64, 2),
    ).eval()
    dsp_kernels.save(packed, tmp_path / "own.safetensors", torch.zeros(1, 3, 8, 8))
    network = load_network(NetworkSource(str(tmp_path / "own.safetensors")))
    assert network.image_size == 8
    assert "dense has the packed widths" in network.label
    assert network.macs("dense") == 6 * 3 * 9 * 64 + 6 * 64 * 2
    assert network.macs("packed") == (3 * 2 + 2) * 9 * 64 + 6 * 64 * 2
    row, run = build_case(Case("dense", "torch"), network, case_input(network, 2, 0))
    assert run is not None, row.reason
    again = load_network(NetworkSource(str(tmp_path / "own.safetensors")))
    for a, b in zip(again.dense.parameters(), network.dense.parameters(), strict=True):
        assert torch.equal(a, b)


def _net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(4, 8, 1, bias=False)
    ).eval()


def test_floors_by_hand() -> None:
    program = program_of(_net(), torch.zeros(1, 2, 10, 10))
    macs = [4 * 2 * 9 * 100, 8 * 4 * 100]
    numbers = [(2 + 4) * 100 * 5 + 72, (4 + 8) * 100 * 5 + 32]
    found = floors(program, 5, PEAKS)
    assert found is not None
    per_conv = sum(max(2 * 5 * m / 1e9, 4 * n / 1e8) for m, n in zip(macs, numbers, strict=True))
    whole = max(2 * 5 * sum(macs) / 1e9, 4 * ((2 + 8) * 100 * 5 + 72 + 32) / 1e8)
    assert (found.per_conv, found.network) == pytest.approx((per_conv, whole))
    assert floors(program, 5, PEAKS, torch.bfloat16) is None


def test_floors_shrink_as_kernels_grow(network: Network) -> None:
    slow_launch = Peaks({"float32": 1e12}, 1e11, 1e-6, 1, {})
    found = floors(network.program("packed"), 8, slow_launch)
    dense = floors(network.program("dense"), 8, slow_launch)
    assert found is not None
    assert dense is not None
    assert found.network < found.per_block < found.per_conv
    assert found.network < dense.network


def test_peaks_are_measured_and_the_best_is_kept() -> None:
    peaks = measure_peaks()
    assert 1e9 < peaks.flops["float32"] < 1e14
    assert 1e8 < peaks.bandwidth < 1e13
    assert peaks.best(PEAKS) == peaks
    faster = Peaks({"float32": 1e15}, 1e14, 0.0, 1, {"float32": "told"})
    assert peaks.best(faster).flops == {"float32": 1e15}
    assert peaks.best(faster).how["float32"] == "told"


@pytest.mark.parametrize(("half", "expected"), [(1e9, 1e12), (4e12, 4e12)])
def test_half_precision_is_never_slower_than_float32(
    monkeypatch: pytest.MonkeyPatch, half: float, expected: float
) -> None:
    """In software it is, and a floor made of that would be one that engines beat."""
    rates = {torch.float32: 1e12, torch.bfloat16: half}
    monkeypatch.setattr(peaks_module, "_matmul_peak", lambda dtype, *_: (rates[dtype], "told"))
    monkeypatch.setattr(peaks_module, "_fma_peak", lambda threads: None)
    monkeypatch.setattr(peaks_module, "_copy_bandwidth", lambda device: 1e10)
    peaks = measure_peaks("cpu", (torch.float32, torch.bfloat16))
    assert peaks.flops == {"float32": 1e12, "bfloat16": expected}
    assert ("as float32" in peaks.how["bfloat16"]) == (half < 1e12)


def test_a_rate_that_is_far_too_low_is_not_measured_for_long() -> None:
    assert peaks_module._matmul_peak(torch.bfloat16, "cpu", known=1e30) == (0.0, "not measured")


@pytest.mark.parametrize(
    ("slow_calls", "known", "sizes"),
    [((0,), 1e12, [256, 1024, 2048]), ((0, 1, 2), 1e12, [256]), ((), 0.0, [1024, 2048])],
    ids=["one slow call", "slow", "nothing known"],
)
def test_small_products_decide_once_whether_large_ones_are_measured(
    monkeypatch: pytest.MonkeyPatch, slow_calls: tuple[int, ...], known: float, sizes: list[int]
) -> None:
    """One call that the machine held up is not a slow processor."""
    now, asked = [0.0], []

    def matmul(left: torch.Tensor, right: torch.Tensor) -> None:
        timed = len(asked) - 1  # the first call of all is a warm one
        asked.append(len(left))
        now[0] += 2 * len(left) ** 3 / (1e9 if timed in slow_calls else 1e12)

    monkeypatch.setattr(torch, "matmul", matmul)
    monkeypatch.setattr(peaks_module.time, "perf_counter", lambda: now[0])
    rate, how = peaks_module._matmul_peak(torch.bfloat16, "cpu", known)
    assert asked == [size for size in sizes for _ in range(4)]
    assert rate == pytest.approx(0.0 if sizes == [256] else 1e12)
    assert (how == "not measured") == (sizes == [256])


def test_single_op_layers_are_one_of_each_shape() -> None:
    found = layers((NetworkSource("cifar_resnet8", "random:g=2,rate=0.6", 16),))
    shapes = [layer.shape for layer in found]
    assert len(set(shapes)) == len(shapes)
    assert "16x16x16->16 3x3/1" in shapes
    for layer in found:
        assert layer.spec.structure.in_channels == layer.input_shape[0] == layer.example(3).shape[1]
