"""Counts and pictures of packed networks; the counts of the released ones are the published ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from dsp_kernels import GroupStructure, PackedConv2d
from dsp_kernels.errors import DSPPruningError, DSPShapeError
from dsp_pruning import read_released
from dsp_pruning.models import cifar_resnet
from dsp_pruning.report import NetworkCost, draw_structures, layer_rows, network_cost

IMAGE = torch.zeros(1, 3, 32, 32)


@pytest.mark.parametrize("name", [f"resnet{depth}_g{groups}" for depth in (20, 56) for groups in (2, 3, 4)])
def test_counts_are_those_of_the_published_table(shared: Path, name: str) -> None:
    totals = json.loads((shared / "golden" / "structures.json").read_text())[name]["totals"]
    packed = read_released(shared / "nets" / f"{name}.npz")
    dense = cifar_resnet(int(name[6:8]))
    rows = layer_rows(packed, IMAGE, dense)
    block_convs = totals["upstream_pruned_layers_only"]
    assert sum(row.macs for row in rows) == block_convs["macs_packed"]
    assert sum(row.dense_macs for row in rows) == block_convs["macs_dense"]
    whole = totals["all_convs_plus_linear"]
    assert network_cost(packed, IMAGE).macs == whole["macs_packed"]
    assert network_cost(dense, IMAGE).macs == whole["macs_dense"]


def _small() -> nn.Module:
    """No group reads channel 3, both read channel 0; filter 2 is absent."""
    structure = GroupStructure.build(4, 5, [([0, 1], [4, 0]), ([0, 2], [1, 3])])
    conv = PackedConv2d(structure, (3, 1), stride=2, padding=(1, 0), bias=True)
    return nn.Sequential(conv, nn.Flatten(), nn.Linear(5 * 4 * 3, 7))


def test_a_row_counts_channels_filters_and_macs() -> None:
    (row,) = layer_rows(_small(), torch.zeros(2, 4, 8, 6))
    assert (row.name, row.groups) == ("0", 2)
    assert (row.channels_read, row.in_channels) == (3, 4)
    assert (row.filters, row.out_channels) == (4, 5)
    assert row.macs == 8 * 3 * (4 * 3)  # kernels x kernel size x output map
    assert row.dense_macs == 20 * 3 * (4 * 3)
    assert row.kept == pytest.approx(0.4)


def test_cost_counts_every_learnable_number_and_one_image() -> None:
    model = _small()
    assert network_cost(model, torch.zeros(2, 4, 8, 6)) == NetworkCost(
        macs=8 * 3 * 12 + 60 * 7, params=8 * 3 + 5 + 60 * 7 + 7
    )


def test_counting_changes_nothing() -> None:
    model = cifar_resnet(8).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    network_cost(model, IMAGE)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_what_cannot_be_counted_or_drawn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DSPPruningError, match="PackedConv2d"):
        layer_rows(cifar_resnet(8), IMAGE)
    with pytest.raises(DSPPruningError, match="nothing to draw"):
        draw_structures(cifar_resnet(8), tmp_path / "picture.png")
    with pytest.raises(DSPShapeError, match=r"input of shape \(1, 3, 32, 32\)"):
        network_cost(_small(), IMAGE)


def test_the_picture_shows_the_kernels_of_each_group(tmp_path: Path) -> None:
    imread = pytest.importorskip("matplotlib.image").imread
    pixels = 255 * imread(draw_structures(_small(), tmp_path / "one.png"))[..., :3]
    colours = ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73), (0xEE, 0xEE, 0xEE))
    first, second, third, empty = (int((abs(pixels - c).max(-1) < 0.6).sum()) for c in colours)
    assert first == pytest.approx(second, rel=0.05)  # four kernels each
    assert third == 0  # there is no third group
    assert empty == pytest.approx(3 * first, rel=0.05)  # 12 of 20 kernels
