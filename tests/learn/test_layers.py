"""Which layers take part, in networks of several families, and the errors if none can."""

import copy

import pytest
import torch
import torch.nn.functional as F
from nets import ToyA
from torch import Tensor, nn

from dsp_kernels.errors import DSPPruningError, DSPShapeError
from dsp_pruning import GroupWrapper, PruneWrapper, pack
from dsp_pruning.layers import LayerPredicate, inputs_like, select_layers, survey_layers
from dsp_pruning.models.cifar import cifar_resnet


def names(model: nn.Module, example: Tensor | None = None) -> list[str]:
    return [info.name for info in select_layers(model, example)]


def test_sizes_of_a_small_network() -> None:
    infos = select_layers(ToyA())
    assert [info.name for info in infos] == ["conv1", "conv2", "conv3"]
    assert [info.input_hw for info in infos] == [(32, 32), (16, 16), (16, 16)]
    assert [info.output_hw for info in infos] == [(16, 16), (16, 16), (8, 8)]
    assert infos[0].macs == 12 * 8 * 9 * 16 * 16
    assert (infos[1].in_channels, infos[1].out_channels, infos[1].kernel_size) == (12, 10, (1, 1))


def test_cifar_resnet_without_stem_and_shortcuts() -> None:
    model = cifar_resnet(20)
    assert names(model) == [
        f"stage_{stage}.{block}.{conv}"
        for stage in (1, 2, 3)
        for block in range(3)
        for conv in ("conv_a", "conv_b")
    ]
    # 40.1 M: block convs of ResNet-20 at 32 x 32, the published base of pruned FLOPs.
    assert sum(info.macs for info in select_layers(model)) == 40_108_032


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2", "googlenet"])
def test_networks_of_torchvision(name: str) -> None:
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    model = models.get_model(name, weights=None, **({"init_weights": False} if name == "googlenet" else {}))
    convs = {key: conv for key, conv in model.named_modules() if isinstance(conv, nn.Conv2d)}
    excluded = {next(iter(convs))} | {key for key, conv in convs.items() if conv.groups > 1}
    # Shortcuts; GoogLeNet's auxiliary heads run in training only.
    excluded |= {key for key in convs if "downsample" in key or key.startswith("aux")}
    assert set(names(model, torch.zeros(1, 3, 64, 64))) == convs.keys() - excluded


class Residual(nn.Module):
    """A stem and a block whose shortcut has no telling name.

    branch_first: order of the add; norm: batch norm after the shortcut's conv; narrow: the branch is one 1x1
    conv.
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
@pytest.mark.parametrize("narrow", [False, True])
def test_a_shortcut_is_recognised_in_the_graph(branch_first: bool, norm: bool, narrow: bool) -> None:
    # ``last``, a 1x1 conv beside the identity, is a branch; so is ``main``, which an activation follows.
    assert names(Residual(branch_first, norm, narrow)) == ["main", "last"]


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.main = nn.Conv2d(8, 8, 1)
        self.block_shortcut = nn.Conv2d(8, 8, 1)
        self.downsample_wide = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if float(x.sum()) > 1e30:  # data-dependent control flow
            return x
        return self.main(x) + self.block_shortcut(x) + self.downsample_wide(x)


def test_1x1_shortcuts_are_recognised_by_name_if_the_model_cannot_be_traced() -> None:
    assert names(Untraceable()) == ["main", "downsample_wide"]


def test_a_predicate_replaces_the_default_choice() -> None:
    chosen = select_layers(
        cifar_resnet(8), layers=lambda name, conv: "downsample" in name or name == "conv_1_3x3"
    )
    wanted = ["conv_1_3x3", "stage_2.0.downsample.0", "stage_3.0.downsample.0"]
    assert [info.name for info in chosen] == wanted


def test_the_table_shows_what_was_chosen_and_why_not() -> None:
    model = nn.Sequential(*(nn.Conv2d(3 if not i else 8, 8, (1, 5), groups=1 + (i == 4)) for i in range(5)))
    model[3].weight = model[2].weight
    nn.utils.parametrizations.weight_norm(model[1])
    model.append(nn.Conv2d(8, 6, (1, 5)))
    survey = survey_layers(model, torch.zeros(1, 3, 10, 30))
    assert [info.name for info in survey.chosen] == ["5"]
    assert survey.excluded == {
        "0": "the first conv",
        "1": "its weight is computed, not a parameter",
        "2": "shares its weight with '3'",
        "3": "shares its weight with '2'",
        "4": "groups=2",
    }
    lines = str(survey).splitlines()
    assert len(lines) == 1 + len(survey.convs)
    assert lines[6].split() == ["5", "6", "8", "1x5", "10x10", str(8 * 6 * 5 * 10 * 6), "yes"]
    assert lines[4].endswith("no: shares its weight with '2'")


def test_the_model_is_left_unchanged() -> None:
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
def test_the_example_is_cast_to_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    model = ToyA().to(dtype)
    (default,) = inputs_like(model, None)
    assert (default.dtype, default.shape) == (dtype, (1, 3, 32, 32))
    assert names(model) == names(model, torch.zeros(1, 3, 32, 32)) == ["conv1", "conv2", "conv3"]


@pytest.mark.parametrize("shape", [(1, 1, 32, 32), (32,), (1, 32, 3)], ids=["channels", "1d", "3d"])
def test_an_example_that_the_model_does_not_support(shape: tuple[int, ...]) -> None:
    with pytest.raises(DSPShapeError, match=r"'conv0' reads 3 channels"):
        select_layers(ToyA(), torch.zeros(shape))


@pytest.mark.parametrize("example", [None, torch.zeros(1, 1, 2, 2)])
def test_a_model_without_convs(example: Tensor | None) -> None:
    with pytest.raises(DSPPruningError, match=r"no nn\.Conv2d"):
        select_layers(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), example)


def test_every_excluded_conv_is_named_with_its_reason() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), *(nn.Conv2d(8, 8, 1, groups=8) for _ in range(40)))
    with pytest.raises(DSPPruningError, match=r"'0' \(the first conv\), '1' \(groups=8\).* and 29 more"):
        select_layers(model)
    with pytest.raises(DSPPruningError, match=r"'0' \(rejected by layers=\)"):
        select_layers(model, layers=lambda name, conv: False)


def test_a_chosen_conv_that_is_grouped_or_does_not_run_is_an_error() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, groups=2))
    with pytest.raises(DSPPruningError, match=r"'1' has groups=2"):
        select_layers(model, layers=lambda name, conv: True)
    toy = ToyA()
    toy.unused = nn.Conv2d(3, 4, 1)
    assert "unused" not in names(toy)
    with pytest.raises(DSPPruningError, match="'unused' does not run"):
        select_layers(toy, layers=lambda name, conv: name == "unused")


class BoxHead(nn.Module):
    """16 bins and their expectation by a frozen 1x1 conv, after a frozen norm; a conv of two filters."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 1)
        self.norm = nn.BatchNorm2d(16).requires_grad_(False)
        self.dfl = nn.Conv2d(16, 1, 1, bias=False).requires_grad_(False)
        self.dfl.weight.data[:] = torch.arange(16.0).view(1, 16, 1, 1)
        self.objectness = nn.Conv2d(16, 2, 1)
        nn.init.uniform_(self.norm.bias, 0.5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.b(F.relu(self.a(x)))))
        return self.dfl(self.c(x).softmax(1)) * self.objectness(x)


@pytest.mark.parametrize("layers", [None, lambda name, conv: name != "a"])
def test_frozen_layers_and_those_with_fewer_filters_than_groups_are_left_out(layers: LayerPredicate) -> None:
    net = BoxHead()
    frozen = {name: value.clone() for name, value in net.state_dict().items() if name[:4] in ("dfl.", "norm")}
    pruner = PruneWrapper(net, 3, fp_every_nth_conv=1, layers=layers)
    for layer in pruner.layers:
        layer.conv.get_buffer("group").normal_()
    pruner.initialize(0.4)
    assert not net.b.mask.flatten(1).any(1).all()  # a filter before the frozen norm is pruned
    assert all(torch.equal(net.state_dict()[name], value) for name, value in frozen.items())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    learner = GroupWrapper(net, optimizer, F.cross_entropy, 0.1, 10, 3, 0.5, layers=layers)
    for survey in (pruner.survey, learner.layers):
        assert [layer.name for layer in survey.chosen] == ["b", "c"]
        reasons = {"dfl": "its weight is frozen (requires_grad=False)"}
        reasons |= {"objectness": "2 filters, too few for n_groups=3"}
        assert reasons.items() <= survey.excluded.items()
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(pack(net.eval(), x)(x), net(x))
