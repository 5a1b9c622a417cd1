"""The CIFAR ResNets: names and sizes of the golden files, clear errors, traceable by fx."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dsp_kernels.errors import DSPPruningError
from dsp_kernels.graph.network import trace
from dsp_pruning.models.cifar import cifar_resnet


@pytest.mark.shared
def test_parameter_names_and_shapes_are_those_of_the_golden_state(shared: Path) -> None:
    golden = np.load(shared / "golden" / "learn_resnet20.npz")
    wanted = {key.removeprefix("init/"): golden[key].shape for key in golden.files if key.startswith("init/")}
    found = {key: tuple(value.shape) for key, value in cifar_resnet(20).state_dict().items()}
    assert found == wanted


@pytest.mark.parametrize(("depth", "convs"), [(8, 9), (20, 21), (32, 33), (44, 45), (56, 57), (110, 111)])
def test_depth_counts_convs_and_the_classifier(depth: int, convs: int) -> None:
    """depth = convs + 1 linear, without the two 1x1 convs of the shortcuts."""
    found = [module for module in cifar_resnet(depth).modules() if isinstance(module, nn.Conv2d)]
    assert len(found) == convs
    assert sum(conv.kernel_size == (1, 1) for conv in found) == 2


@pytest.mark.parametrize("size", [32, 16, 9])
def test_any_input_size_channels_and_classes(size: int) -> None:
    model = cifar_resnet(8, num_classes=7, in_channels=1).eval()
    with torch.no_grad():
        assert model(torch.randn(3, 1, size, size)).shape == (3, 7)


@pytest.mark.parametrize("depth", [0, 2, 7, 21, 1208, -4, 20.0, True, "20"])
def test_a_depth_that_does_not_exist(depth: object) -> None:
    with pytest.raises(DSPPruningError, match=r"depth is .*6n \+ 2"):
        cifar_resnet(depth)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["num_classes", "in_channels"])
@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_a_count_below_one(name: str, value: object) -> None:
    with pytest.raises(DSPPruningError, match=name):
        cifar_resnet(20, **{name: value})  # type: ignore[arg-type]


def test_a_generator_decides_the_weights() -> None:
    first, second, other = (
        cifar_resnet(8, generator=torch.Generator().manual_seed(seed)).state_dict() for seed in (3, 3, 4)
    )
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["conv_1_3x3.weight"], other["conv_1_3x3.weight"])


def test_initial_weights_are_he_normal_by_fan_out() -> None:
    weight = cifar_resnet(20, generator=torch.Generator().manual_seed(0)).stage_2[0].conv_a.weight
    wanted = (2 / (32 * 9)) ** 0.5
    # 4,608 draws: the standard error of the deviation is 1 % of it; by fan-in it would be 41 % larger.
    assert float(weight.detach().std()) == pytest.approx(wanted, rel=0.04)


def test_every_node_of_the_trace_is_known() -> None:
    network = trace(cifar_resnet(20), torch.zeros(1, 3, 32, 32))
    assert not network.of_kind("opaque")
    assert len(network.of_kind("add")) == 9


def test_widths_may_change_in_place() -> None:
    """A packed network has narrower blocks: forward() must not know the width."""
    model = cifar_resnet(8).eval()
    block = model.stage_2[0]
    block.conv_a = nn.Conv2d(16, 5, 3, stride=2, padding=1, bias=False)
    block.bn_a = nn.BatchNorm2d(5)
    block.conv_b = nn.Conv2d(5, 32, 3, padding=1, bias=False)
    with torch.no_grad():
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
