"""Networks in all their forms, structures, floors and peaks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from dsp_benchmarks.cases import Case, build_case
from dsp_benchmarks.engines import ENGINES
from dsp_benchmarks.engines.fused import Fused
from dsp_benchmarks.kernels.test_convs import layers
from dsp_benchmarks.measure.floors import compulsory_bytes, part_floor, program_of
from dsp_benchmarks.measure.peaks import Peaks, measure_peaks
from dsp_benchmarks.measure.samples import Samples
from dsp_benchmarks.report.results import Row
from dsp_benchmarks.run import with_floors
from dsp_benchmarks.subjects.networks import FORMS, Network, NetworkSource, load_network
from dsp_benchmarks.subjects.released_form import ReleasedForm
from dsp_benchmarks.subjects.structures import apply_structure
from torch import nn

import dsp_kernels
from dsp_kernels import GroupStructure, PackedConv2d
from dsp_kernels.errors import DSPFormatError
from dsp_pruning import read_released
from dsp_pruning.data import normalise
from dsp_pruning.data.load import CIFAR10_MEAN, CIFAR10_STD
from dsp_pruning.models import cifar_resnet
from dsp_pruning.report import network_cost

EXAMPLE = torch.zeros(1, 3, 16, 16)
PEAKS = Peaks({"float32": 1e9}, 1e8)


@pytest.mark.parametrize("name", ["resnet20_g2", "resnet20_g3", "resnet20_g4", "resnet56_g4"])
def test_the_released_form_reproduces_the_authors_logits(shared: Path, name: str) -> None:
    network = ReleasedForm(read_released(shared / "nets" / f"{name}.npz"))
    with np.load(shared / "data" / "cifar10_subset.npz") as archive:
        images = torch.from_numpy(archive["test_images"][:8])
    x = normalise(images, CIFAR10_MEAN, CIFAR10_STD)
    with np.load(shared / "golden" / "logits.npz") as golden:
        expected = torch.from_numpy(golden[name][:8])
    with torch.inference_mode():
        assert float((network(x) - expected).abs().max()) <= 2e-5


def test_a_released_network_has_its_weights_in_the_dense_form_and_training_images(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSP_SHARED", str(shared))
    network = load_network(NetworkSource("resnet20_g4"))
    with np.load(shared / "data" / "cifar10_subset.npz") as archive:
        training = normalise(torch.from_numpy(archive["train_images"][:256]), CIFAR10_MEAN, CIFAR10_STD)
    assert torch.equal(network.calibration, training)
    x = network.images(300, 0)[254:]  # after the last comes the first
    assert torch.equal(x[2:], training[:44])
    with torch.inference_mode():
        assert torch.allclose(network.dense(x), network.packed(x), atol=1e-4)
    assert network.macs("dense") == pytest.approx(2.664 * network.macs("packed"), rel=1e-3)
    assert network.macs("filters") == pytest.approx(network.macs("packed"), rel=0.05)


def test_the_compacted_form_is_dense_and_equals_the_packed_one(network: Network) -> None:
    compacted = network.form("compacted")
    assert not any(isinstance(module, PackedConv2d) for module in compacted.modules())
    x = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        assert torch.allclose(compacted(x), network.packed(x), atol=1e-5)


def test_the_filter_pruned_form_has_the_packed_network_s_flops(network: Network) -> None:
    filters = network.form("filters")
    cost = network_cost(filters, network.example).macs
    assert cost == pytest.approx(network.macs("packed"), rel=0.05)
    assert cost == network.macs("filters")
    assert filters(torch.randn(2, 3, 16, 16)).shape == (2, 10)


@pytest.mark.parametrize(("groups", "rate"), [(2, 0.8), (4, 0.6)])
def test_a_random_structure_has_its_groups_and_its_rate(groups: int, rate: float) -> None:
    dense = cifar_resnet(20).eval()

    def structures(seed: int) -> list[GroupStructure]:
        packed = apply_structure(dense, EXAMPLE, f"random:g={groups},rate={rate}", seed)
        return [module.structure for module in packed.modules() if isinstance(module, PackedConv2d)]

    found = structures(1)
    # Groups with equal inputs are merged, and groups whose filters are not read are removed.
    assert max(len(structure.groups) for structure in found) == groups
    sizes = [16 * 16] * 6 + [8 * 8] * 6 + [4 * 4] * 6
    left = sum(structure.macs((3, 3), (1, size)) for structure, size in zip(found, sizes, strict=True))
    convs = [conv for name, conv in dense.named_modules() if name.endswith(("conv_a", "conv_b"))]
    total = sum(conv.weight.numel() * size for conv, size in zip(convs, sizes, strict=True))
    assert 1 - left / total == pytest.approx(rate, abs=0.01)
    assert found == structures(1) != structures(2)


def test_a_structure_from_a_file(shared: Path) -> None:
    path = shared / "structures" / "resnet18_g2_80.npz"
    network = load_network(NetworkSource("resnet18", str(path), 64))
    # It is 3.86 at 224 x 224; the classifier has a larger share at 64 x 64.
    assert network.macs("dense") / network.macs("packed") == pytest.approx(3.82, abs=0.01)
    assert "resnet18_g2_80.npz (synthetic)" in network.label


@pytest.mark.parametrize("structure", ["random:g=2", "other:g=2,rate=0.5", "none.npz"])
def test_an_unknown_structure_is_refused(structure: str) -> None:
    with pytest.raises(DSPFormatError):
        apply_structure(cifar_resnet(8), EXAMPLE, structure)


def test_a_structure_of_another_network_is_refused(tmp_path: Path) -> None:
    index = np.arange(4, dtype=np.int32)
    for name, top, words in (
        ("conv9", 0, "no attribute `conv9`"),
        ("stage_1.0.conv_a", 99, "does not fit CifarResNet"),
    ):
        arrays = {f"{name}.0.in_index": index, f"{name}.0.out_index": index + top}
        np.savez(tmp_path / "s.npz", meta="{}", **arrays)
        with pytest.raises(DSPFormatError, match=words):
            apply_structure(cifar_resnet(8), EXAMPLE, str(tmp_path / "s.npz"))


def test_a_saved_file_is_a_network(network: Network, tmp_path: Path) -> None:
    path = tmp_path / "saved.safetensors"
    dsp_kernels.save(network.packed, path)
    loaded = load_network(NetworkSource(str(path), None, 16))
    assert loaded.macs("packed") == network.macs("packed")
    assert loaded.macs("dense") == network.macs("dense")


def test_a_quantised_file_runs_as_it_is_and_its_float_network_beside_it(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random images are outside the ranges of its values, so its answer is compared with its own."""
    pytest.importorskip("dsp_kernels.quantizing")
    engine = Fused("fused:cpu:int8", torch.int8, backend="eager")  # runs without the extension
    monkeypatch.setitem(ENGINES, "fused:cpu:int8", engine)
    quantized = dsp_kernels.quantize(network.packed, 0.01 * network.images(8, 0))
    dsp_kernels.save(quantized, tmp_path / "q.safetensors")
    loaded = load_network(NetworkSource(str(tmp_path / "q.safetensors"), None, 16))
    for name, bound in (("fused:cpu:int8", 0.0), ("torch", 1e-6)):
        row, run = build_case(Case("packed", name), loaded, x := network.images(3, 0))
        assert run is not None, row.reason
        assert row.difference == pytest.approx(0, abs=bound)
        with torch.inference_mode():
            assert torch.allclose(run(x), (quantized if bound == 0 else network.packed)(x), atol=1e-5)


def test_a_saved_file_without_dense_widths_is_a_network(tmp_path: Path) -> None:
    """Its original widths are not in the file, so the dense network has the packed ones, and says so."""
    structure = GroupStructure.build(3, 6, [([0, 2], [0, 1, 4]), ([1], [2, 3])])
    conv = PackedConv2d(structure, 3, padding=1, bias=True)
    packed = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(6 * 64, 2)).eval()
    source = NetworkSource(str(tmp_path / "own.safetensors"))
    dsp_kernels.save(packed, source.name, torch.zeros(1, 3, 8, 8))
    network = load_network(source)
    assert network.image_size == 8
    assert "dense has the packed widths" in network.label
    assert network.macs("dense") == 6 * 3 * 9 * 64 + 6 * 64 * 2
    assert network.macs("packed") == (3 * 2 + 2) * 9 * 64 + 6 * 64 * 2
    row, run = build_case(Case("dense", "torch"), network, network.images(2, 0))
    assert run is not None, row.reason
    again = load_network(source)
    for a, b in zip(again.dense.parameters(), network.dense.parameters(), strict=True):
        assert torch.equal(a, b)


def test_floors_by_hand() -> None:
    convs = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.Conv2d(4, 8, 1, bias=False)
    program = program_of(nn.Sequential(convs[0], nn.ReLU(), convs[1]).eval(), torch.zeros(1, 2, 10, 10))
    macs = [4 * 2 * 9 * 100, 8 * 4 * 100]
    numbers = [(2 + 4) * 100 * 5 + 72, (4 + 8) * 100 * 5 + 32]
    for step, count, moved in zip(program.steps, macs, numbers, strict=True):
        found = part_floor(program, [step], 5, PEAKS)
        assert found == pytest.approx(max(2 * 5 * count / 1e9, 4 * moved / 1e8))
        assert compulsory_bytes(program, [step], 5, torch.float16) == 2 * moved
    # In one kernel the feature map in between does not leave the chip.
    whole = max(2 * 5 * sum(macs) / 1e9, 4 * ((2 + 8) * 100 * 5 + 72 + 32) / 1e8)
    assert part_floor(program, program.steps, 5, PEAKS) == pytest.approx(whole)
    assert PEAKS.knows(torch.float32)
    assert not PEAKS.knows(torch.bfloat16)


def test_a_row_has_the_floor_of_its_whole_network(network: Network) -> None:
    made = [Row(f"{form}/torch", 8, Samples((1.0,)), 0.0, form=form, runner="torch") for form in FORMS[2:]]
    unknown = Row("packed/openvino-bf16", 8, Samples((1.0,)), 0.0, form="packed", runner="openvino-bf16")
    packed, compacted, _, bf16 = with_floors([*made, unknown], network, PEAKS)
    program = network.program("packed")
    assert packed.floor == compacted.floor == part_floor(program, program.steps, 8, PEAKS)
    assert packed.of_floor == packed.floor
    assert packed.moved == compulsory_bytes(program, program.steps, 8, torch.float32)
    assert bf16.floor is None  # its peak is not known


def test_peaks_are_measured_and_the_best_is_kept() -> None:
    peaks = measure_peaks()
    assert 1e9 < peaks.flops["float32"] < 1e14
    assert 1e8 < peaks.bandwidth < 1e13
    assert peaks.best(PEAKS) == peaks
    faster = Peaks({"float32": 1e15}, 1e14)
    assert peaks.best(faster) == faster


def test_single_op_layers_are_one_of_each_shape() -> None:
    found = layers((NetworkSource("cifar_resnet8", "random:g=2,rate=0.6", 16),))
    shapes = [layer.shape for layer in found]
    assert len(set(shapes)) == len(shapes)
    assert "16x16x16->16 3x3/1" in shapes
    for layer in found:
        assert layer.step.spec.structure.in_channels == layer.input_shape[0] == layer.example(3).shape[1]
