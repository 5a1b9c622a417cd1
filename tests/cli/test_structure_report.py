"""Counts and pictures of packed networks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dsp_kernels import GroupStructure, PackedConv2d
from dsp_kernels.errors import DSPPruningError, DSPShapeError
from dsp_pruning.models import cifar_resnet
from dsp_pruning.report import LayerRow, NetworkCost, draw_overview, draw_structures, layer_rows, network_cost

IMAGE = torch.zeros(1, 3, 32, 32)


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


def test_every_layer_has_a_row_of_its_own_in_the_overview(tmp_path: Path) -> None:
    rows = [LayerRow(f"denseblock{n}.conv", 2, 3, 8, 4, 8, 10 + n, 200) for n in range(130)]
    pixels = pytest.importorskip("matplotlib.image").imread(draw_overview(rows, tmp_path / "overview.png"))
    blue = (abs(pixels[..., :3] - np.array([0, 0x72, 0xB2]) / 255) < 0.01).all(2)
    column = blue[:, int(np.argmax(blue.sum(0) > 130)) + 3].astype(int)  # down the left end of the bars
    assert 130 <= (np.diff(column) == 1).sum() <= 131  # the legend may be one more
    with pytest.raises(DSPPruningError, match="nothing to draw"):
        draw_overview([], tmp_path / "none.png")
