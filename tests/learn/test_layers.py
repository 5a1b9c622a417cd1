"""Which layers take part, in networks of several families, and what happens where none can."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toy_net import ToyA

from dsp_kernels.errors import DSPPruningError, DSPShapeError
from dsp_pruning.layers import default_example_input, select_layers
from dsp_pruning.models.cifar import cifar_resnet

IMAGE = torch.zeros(1, 3, 64, 64)


def names(model: nn.Module, example: Tensor | None = None) -> list[str]:
    return [info.name for info in select_layers(model, example)]


def test_toy_net() -> None:
    infos = select_layers(ToyA())
    assert [info.name for info in infos] == ["conv1", "conv2", "conv3"]
    assert [info.input_hw for info in infos] == [(32, 32), (16, 16), (16, 16)]
    assert [info.output_hw for info in infos] == [(16, 16), (16, 16), (8, 8)]
    assert infos[0].macs == 12 * 8 * 9 * 16 * 16
    assert (infos[1].in_channels, infos[1].out_channels, infos[1].kernel_size) == (12, 10, (1, 1))


def test_cifar_resnet_without_stem_and_shortcuts() -> None:
    model = cifar_resnet(20)
    wanted = [
        f"stage_{stage}.{block}.{conv}"
        for stage in (1, 2, 3)
        for block in range(3)
        for conv in ("conv_a", "conv_b")
    ]
    assert names(model) == wanted
    # 40.1 M: block convs of ResNet-20 at 32 x 32, the published base of pruned FLOPs.
    assert sum(info.macs for info in select_layers(model)) == 40_108_032


def test_torchvision_resnet18() -> None:
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    assert len(names(models.resnet18(), IMAGE)) == 16


def test_the_last_conv_of_a_bottleneck_is_no_shortcut() -> None:
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    found = names(models.resnet50(), IMAGE)
    assert len(found) == 48
    assert "layer1.0.conv3" in found
    assert not any("downsample" in name for name in found)


def test_depthwise_convs_are_left_out() -> None:
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    model = models.mobilenet_v2()
    found = set(names(model, IMAGE))
    convs = {name: conv for name, conv in model.named_modules() if isinstance(conv, nn.Conv2d)}
    assert found == {name for name, conv in convs.items() if conv.groups == 1} - {"features.0.0"}


def test_layers_that_only_run_in_training_are_left_out() -> None:
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    found = names(models.googlenet(weights=None, init_weights=False), IMAGE)
    assert found
    assert not any(name.startswith("aux") for name in found)


class Residual(nn.Module):
    """A stem, then a block whose shortcut has a name that says nothing.

    branch_first: order of the add; norm: BN after the shortcut's conv; narrow: the branch is one 1x1 conv.
    """

    def __init__(self, branch_first: bool = False, norm: bool = True, narrow: bool = False) -> None:
        super().__init__()
        self.branch_first = branch_first
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.side = nn.Conv2d(8, 12, 1, stride=2)
        self.side_norm = nn.BatchNorm2d(12) if norm else nn.Identity()
        kernel, padding = (1, 0) if narrow else (3, 1)
        self.main = nn.Conv2d(8, 12, kernel, stride=2, padding=padding)
        self.last = nn.Conv2d(12, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        side, main = self.side_norm(self.side(x)), F.relu(self.main(x))
        x = main + side if self.branch_first else side + main
        return x + self.last(x)


@pytest.mark.parametrize("branch_first", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_a_shortcut_is_seen_in_the_graph_not_in_its_name(branch_first: bool, norm: bool) -> None:
    # last: a 1x1 conv beside the identity is the branch itself.
    assert names(Residual(branch_first, norm)) == ["main", "last"]


def test_a_pointwise_branch_behind_an_activation_is_no_shortcut() -> None:
    assert names(Residual(narrow=True)) == ["main", "last"]


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.main = nn.Conv2d(8, 8, 1)
        self.block_shortcut = nn.Conv2d(8, 8, 1)
        self.downsample_wide = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if float(x.sum()) > 1e30:  # fx cannot follow a value
            return x
        return self.main(x) + self.block_shortcut(x) + self.downsample_wide(x)


def test_names_decide_where_fx_cannot_follow() -> None:
    """Only 1x1 convs: a 3x3 conv with such a name is no shortcut."""
    assert names(Untraceable()) == ["main", "downsample_wide"]


def test_a_predicate_replaces_the_default_choice() -> None:
    chosen = select_layers(
        cifar_resnet(8), layers=lambda name, conv: "downsample" in name or name == "conv_1_3x3"
    )
    assert [info.name for info in chosen] == [
        "conv_1_3x3",
        "stage_2.0.downsample.0",
        "stage_3.0.downsample.0",
    ]


def test_the_model_is_left_as_it_was() -> None:
    model = ToyA().train()
    model.bn1.eval()
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    select_layers(model, torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert model.training
    assert not model.bn1.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(not module._forward_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_example_follows_the_models_dtype(dtype: torch.dtype) -> None:
    model = ToyA().to(dtype)
    assert default_example_input(model).dtype == dtype
    assert names(model) == names(model, torch.zeros(1, 3, 32, 32)) == ["conv1", "conv2", "conv3"]


def test_default_example_has_the_channels_of_the_first_conv() -> None:
    assert default_example_input(cifar_resnet(8, in_channels=1)).shape == (1, 1, 32, 32)


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((1, 1, 32, 32), id="channels"),
        pytest.param((32,), id="no-image"),
        pytest.param((1, 32, 3), id="3d"),
    ],
)
def test_an_example_that_does_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(DSPShapeError, match=r"'conv0' reads 3 channels"):
        select_layers(ToyA(), torch.zeros(shape))


def test_no_conv_at_all() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(DSPPruningError, match=r"no nn\.Conv2d"):
        select_layers(model, torch.zeros(1, 1, 2, 2))
    with pytest.raises(DSPPruningError, match=r"no nn\.Conv2d"):
        default_example_input(model)


def test_every_conv_excluded_is_named_with_its_reason() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8))
    with pytest.raises(DSPPruningError, match=r"'0' \(the first conv\), '1' \(groups=8\)"):
        select_layers(model)
    with pytest.raises(DSPPruningError, match="refused by the predicate"):
        select_layers(model, layers=lambda name, conv: False)


def test_a_long_list_of_excluded_layers_is_cut() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), *(nn.Conv2d(8, 8, 1, groups=8) for _ in range(40)))
    with pytest.raises(DSPPruningError, match="and 29 more"):
        select_layers(model)


def test_a_chosen_grouped_conv_is_an_error() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, groups=2))
    with pytest.raises(DSPPruningError, match=r"'1' has groups=2"):
        select_layers(model, layers=lambda name, conv: True)


def test_a_chosen_conv_that_does_not_run_is_an_error() -> None:
    model = ToyA()
    model.unused = nn.Conv2d(3, 4, 1)
    assert "unused" not in names(model)
    with pytest.raises(DSPPruningError, match="'unused' does not run"):
        select_layers(model, layers=lambda name, conv: name == "unused")
