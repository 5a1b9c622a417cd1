"""The six released networks: logits, classes and counts, packed, fused, swapped and saved."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden import RELEASED, cifar_images, golden_counts, golden_logits
from torch import Tensor

import dsp_kernels
from dsp_kernels.errors import DSPFormatError
from dsp_kernels.run.cpu.extension import native
from dsp_kernels.tolerances import network_tolerance
from dsp_pruning import build_released, read_released
from dsp_pruning.models import cifar_resnet
from dsp_pruning.report import layer_rows, network_cost

PUBLISHED = {  # pruned FLOPs %, pruned params %, of block convolutions
    "resnet20_g2": (61.23, 48.35),
    "resnet20_g3": (62.43, 49.15),
    "resnet20_g4": (63.57, 50.45),
    "resnet56_g2": (63.26, 56.24),
    "resnet56_g3": (64.14, 55.01),
    "resnet56_g4": (65.11, 56.30),
}


@pytest.fixture(scope="module")
def images(shared: Path) -> Tensor:
    return cifar_images(shared)


@pytest.fixture(scope="module")
def labels(shared: Path) -> Tensor:
    return torch.from_numpy(np.load(shared / "data" / "cifar10_subset.npz")["test_labels"])


@pytest.mark.parametrize("name", RELEASED)
def test_packed_and_fused_logits(shared: Path, images: Tensor, labels: Tensor, name: str) -> None:
    golden, correct = golden_logits(shared, name)
    packed = read_released(shared / "nets" / f"{name}.npz")
    fused = dsp_kernels.fuse(packed, images[:1])
    with torch.no_grad():
        assert (packed(images[:64]) - golden[:64]).abs().max() <= 1e-4
        logits = torch.cat([fused(batch) for batch in images.split(339)])
    assert (logits - golden).abs().max() <= 1e-4
    assert (logits.argmax(1) == labels).sum() == correct
    assert "plain PyTorch:" not in fused.explain()


@pytest.mark.skipif(native() is None, reason="16 bit by the native kernels")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", RELEASED)
def test_16_bit_classes(shared: Path, images: Tensor, labels: Tensor, name: str, dtype: torch.dtype) -> None:
    """As many images right as in float32, give or take two of 1,017."""
    golden, correct = golden_logits(shared, name)
    packed = read_released(shared / "nets" / f"{name}.npz")
    fused = dsp_kernels.fuse(packed, images[:1], backend="cpu", dtype=dtype)
    logits = torch.cat([fused(batch) for batch in images.split(339)])
    assert abs(int((logits.argmax(1) == labels).sum()) - correct) <= 2
    error = (logits - golden).abs().max() / logits.abs().max()
    assert error <= network_tolerance(dtype, 576, int(name[6:8]))


@pytest.mark.parametrize("name", ["resnet20_g4", "resnet56_g2"])
def test_swapped_and_saved(shared: Path, images: Tensor, tmp_path: Path, name: str) -> None:
    packed = read_released(shared / "nets" / f"{name}.npz")
    dsp_kernels.save(packed, tmp_path / "net.safetensors")
    loaded = dsp_kernels.load(tmp_path / "net.safetensors")
    swapped = dsp_kernels.swap(copy.deepcopy(packed))
    with torch.no_grad():
        expected = packed(images[:16])
        assert torch.equal(loaded(images[:16]), expected)
        assert (swapped(images[:16]) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("name", RELEASED)
def test_counts_are_the_published_ones(shared: Path, name: str) -> None:
    totals, image = golden_counts(shared, name), torch.zeros(1, 3, 32, 32)
    whole, blocks = totals["all_convs_plus_linear"], totals["upstream_pruned_layers_only"]
    packed, dense = read_released(shared / "nets" / f"{name}.npz"), cifar_resnet(int(name[6:8]))
    assert dsp_kernels.fuse(packed, image).program.macs == whole["macs_packed"]
    assert network_cost(packed, image).macs == whole["macs_packed"]
    assert network_cost(dense, image).macs == whole["macs_dense"]
    rows = layer_rows(packed, image, dense)
    assert sum(row.macs for row in rows) == blocks["macs_packed"]
    assert sum(row.dense_macs for row in rows) == blocks["macs_dense"]
    convs = [m for m in packed.modules() if isinstance(m, dsp_kernels.PackedConv2d)]
    params = sum(conv.structure.params(conv.kernel_size) for conv in convs)
    assert params == blocks["params_packed"]
    assert 100 * (1 - params / blocks["params_dense"]) == pytest.approx(PUBLISHED[name][1], abs=0.006)
    assert blocks["pruned_macs_pct"] == pytest.approx(PUBLISHED[name][0], abs=0.006)


@pytest.fixture
def arrays(shared: Path) -> dict[str, np.ndarray]:
    file = np.load(shared / "nets" / "resnet20_g4.npz")
    return {name: file[name] for name in file.files if name != "meta"}


@pytest.fixture
def meta(shared: Path) -> dict:
    return json.loads(str(np.load(shared / "nets" / "resnet20_g4.npz")["meta"]))


def test_a_block_without_branches_is_its_shortcut(arrays: dict, meta: dict, images: Tensor) -> None:
    index = next(i for i, block in enumerate(meta["blocks"]) if not block["downsample"])
    name = meta["blocks"][index]["name"]
    meta["blocks"][index] |= {"groups_a": 0, "groups_b": 0}
    without = build_released(arrays, meta)
    expected = build_released(arrays, {**meta, "blocks": [dict(block) for block in meta["blocks"]]})
    block = expected.get_submodule(name)
    block.forward = torch.relu  # type: ignore[method-assign]
    with torch.no_grad():
        assert torch.equal(without(images[:4]), expected(images[:4]))
    fused = dsp_kernels.fuse(without, images[:2])
    torch.testing.assert_close(fused(images[:4]), without(images[:4]), rtol=1e-4, atol=1e-4)


NAME = "stage_1.0.conv_a.1"
# Changes of arrays, a change of the description (``dict``: none), and the error.
DAMAGED: dict[str, tuple[dict[str, Callable[[np.ndarray], Any]], Callable[[dict], object], str]] = {
    "index out of bounds": (
        {f"{NAME}.in_index": lambda a: a + 16},
        dict,
        r"branches of 'stage_1\.0\.conv_a' do not fit together: group 1 in_index holds",
    ),
    "an output channel twice": (
        {"stage_1.0.conv_b.1.out_index": lambda a: a * 0},
        dict,
        "out_index holds channel 0 twice",
    ),
    "weight of another shape": (
        {"stage_1.0.conv_b.1.weight": lambda a: a[:, :1]},
        dict,
        r"'stage_1\.0\.conv_b\.1\.weight' has shape",
    ),
    "weight without dimensions": ({f"{NAME}.weight": lambda a: a.sum()}, dict, "is 0-D; expected"),
    "text": ({"stem.conv.weight": lambda a: np.array(["a"])}, dict, "holds <U1; expected numbers"),
    "float index": ({f"{NAME}.in_index": lambda a: a * 1.0}, dict, "expected a list of integers"),
    "short norm": ({f"{NAME}.bn.running_var": lambda a: a[:1]}, dict, r"has shape \(1,\); expected \("),
    "depth": ({}, lambda meta: meta.update(depth=21), "depth is 21"),
    "a block less": ({}, lambda meta: meta["blocks"].pop(), "the description lists"),
    "many groups": ({}, lambda meta: meta["blocks"][0].update(groups_a=10**9), "expected a count"),
    "no count": ({}, lambda meta: meta["blocks"][0].pop("groups_a"), "None branches"),
    "no blocks": ({}, lambda meta: meta.pop("blocks"), "needs blocks; it has bn_eps, "),
    "downsample": ({}, lambda meta: meta["blocks"][0].update(downsample=True), "downsample is True"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_networks_are_refused(arrays: dict, meta: dict, name: str) -> None:
    changes, change, message = DAMAGED[name]
    arrays |= {array: replaced(arrays[array]) for array, replaced in changes.items()}
    change(meta)
    with pytest.raises(DSPFormatError, match=message):
        build_released(arrays, meta)


def test_a_missing_array_is_named(arrays: dict, meta: dict) -> None:
    del arrays["stage_2.1.conv_b.0.bn.bias"]
    with pytest.raises(DSPFormatError, match=r"no array 'stage_2\.1\.conv_b\.0\.bn\.bias'"):
        build_released(arrays, meta)


def test_files_that_are_no_released_network(tmp_path: Path) -> None:
    path = tmp_path / "net.npz"
    for content in (b"", b"PK\x03\x04", b"not a zip file", np.zeros(2), np.array([{"pickled": 1}], object)):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            np.savez(path, meta=content)
        with pytest.raises(DSPFormatError, match=r"not an \.npz file of a released network"):
            read_released(path)
    with pytest.raises(FileNotFoundError):
        read_released(tmp_path / "nothing.npz")
