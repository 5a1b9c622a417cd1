"""The CIFAR ResNets: names and shapes of the published checkpoints, initialisation, errors."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dsp_kernels.errors import DSPPruningError
from dsp_pruning.models import cifar_resnet, torchvision_resnet


@pytest.mark.shared
def test_parameter_names_and_shapes_are_those_of_the_published_code(shared: Path) -> None:
    golden = np.load(shared / "golden" / "learn_resnet20.npz")
    expected = {
        key.removeprefix("init/"): golden[key].shape for key in golden.files if key.startswith("init/")
    }
    assert {key: tuple(value.shape) for key, value in cifar_resnet(20).state_dict().items()} == expected


@pytest.mark.parametrize(("depth", "convs"), [(8, 9), (20, 21), (32, 33), (44, 45), (56, 57), (110, 111)])
def test_depth_counts_3x3_convolutions_and_the_classifier(depth: int, convs: int) -> None:
    found = [module for module in cifar_resnet(depth).modules() if isinstance(module, nn.Conv2d)]
    assert len(found) == convs
    assert sum(conv.kernel_size == (1, 1) for conv in found) == 2  # shortcuts


@pytest.mark.parametrize("size", [32, 16, 9])
def test_any_image_size_channels_and_classes(size: int) -> None:
    model = cifar_resnet(8, num_classes=7, in_channels=1).eval()
    with torch.no_grad():
        assert model(torch.randn(3, 1, size, size)).shape == (3, 7)


@pytest.mark.parametrize("depth", [0, 2, 7, 21, 1208, -4, 20.0, True, "20"])
def test_an_impossible_depth_is_refused(depth: Any) -> None:
    with pytest.raises(DSPPruningError, match=r"depth is .*6n \+ 2"):
        cifar_resnet(depth)


@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_impossible_counts_and_variants_are_refused(value: Any) -> None:
    with pytest.raises(DSPPruningError, match="num_classes"):
        cifar_resnet(20, num_classes=value)
    with pytest.raises(DSPPruningError, match="in_channels"):
        cifar_resnet(20, in_channels=value)
    with pytest.raises(DSPPruningError, match="num_classes"):
        torchvision_resnet("resnet18", num_classes=value)
    with pytest.raises(DSPPruningError, match=f"'{value}'; expected one of resnet18, resnet34"):
        torchvision_resnet(str(value))


def test_initial_weights_are_he_normal_by_fan_out_and_follow_the_generator() -> None:
    first, same, other = (
        cifar_resnet(20, generator=torch.Generator().manual_seed(seed)).state_dict() for seed in (0, 0, 4)
    )
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert not torch.equal(first["conv_1_3x3.weight"], other["conv_1_3x3.weight"])
    # 4,608 samples: the standard error of the deviation is 1 % of it; by fan-in it would be 41 % larger.
    assert float(first["stage_2.0.conv_a.weight"].std()) == pytest.approx((2 / (32 * 9)) ** 0.5, rel=0.04)
