"""Networks and training loops of other kinds than the published ones, each compared in numbers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from learning_setup import LAYERS, Setup, everything
from torch import Tensor, nn
from toy_net import ToyA

from dsp_kernels.errors import DSPPruningError
from dsp_pruning.layers import survey_layers
from dsp_pruning.learn import penalty as terms
from dsp_pruning.learn.lookahead import look_ahead
from dsp_pruning.learn.wrapper import GroupWrapper


class Plain(nn.Module):
    """Without batch norm: convs with bias, stride, dilation, rectangular kernels, one that runs twice.

    x: (batch, 2, height, width) -> (batch, 10).
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.wide = nn.Conv2d(6, 8, (1, 5), padding=(0, 2), stride=(1, 2))
        self.tall = nn.Conv2d(8, 8, (5, 1), padding="same", dilation=(2, 1))
        self.twice = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.wide(torch.tanh(self.stem(x))))
        x = torch.tanh(self.twice(torch.tanh(self.tall(x))))
        x = torch.tanh(self.depthwise(torch.tanh(self.twice(x))))
        return self.fc(x.mean((2, 3)))


PLAIN_LAYERS = ("wide", "tall", "twice")


def plain(**settings: Any) -> Setup:
    torch.manual_seed(3)
    settings = {"example_input": torch.zeros(1, 2, 10, 14), "n_groups": 4, "reg": 0.5} | settings
    setup = Setup(model=Plain().double(), **settings)
    setup.x, setup.y = torch.randn(8, 2, 10, 14).double(), torch.randint(10, (8,))
    return setup


def same(first: Setup, second: Setup, atol: float) -> None:
    wanted = second.model.state_dict()
    for name, value in first.model.state_dict().items():
        assert float((value - wanted[name]).abs().max()) <= atol, name


@pytest.mark.parametrize("mode", ["none", "exact"])
def test_two_half_batches_are_one_batch(mode: str) -> None:
    whole, halves = plain(second_order=mode), plain(second_order=mode)
    for _ in range(3):
        whole.step()
        halves.learner.initialize()
        halves.optimizer.zero_grad()
        xs, ys = list(halves.x.chunk(2)), list(halves.y.chunk(2))
        for x, y in zip(xs, ys, strict=True):
            (F.cross_entropy(halves.model(x), y) / 2).backward()
        halves.optimizer.step()
        halves.learner.after_step(xs, ys)
    same(whole, halves, 1e-11)


def test_micro_batches_must_pair() -> None:
    setup = plain()
    setup.forward_and_step()
    with pytest.raises(DSPPruningError, match="list of 2 micro-batches and y is a list of 1"):
        setup.learner.after_step([setup.x, setup.x], [setup.y])
    with pytest.raises(DSPPruningError, match="y is a Tensor"):
        setup.learner.after_step([setup.x], setup.y)
    setup.learner.after_step(setup.x, setup.y)  # the step is still there to be done


def test_the_look_ahead_of_any_conv_is_the_step_that_would_come_next() -> None:
    setup = plain(optimizer="adam")
    setup.step()
    setup.forward_and_step()
    twin = copy.deepcopy(setup.model)
    optimizer = torch.optim.Adam([p for p in twin.parameters() if p.requires_grad], lr=1e-3)
    optimizer.load_state_dict(copy.deepcopy(setup.optimizer.state_dict()))
    weights = {name: setup.model.get_submodule(name).weight for name in PLAIN_LAYERS}
    starts = {weight: weight.detach().clone() for weight in weights.values()}
    ahead = look_ahead(setup.model, setup.optimizer, F.cross_entropy, starts, [(setup.x, setup.y)])
    optimizer.zero_grad()
    F.cross_entropy(twin(setup.x), setup.y).backward()
    optimizer.step()
    for name, weight in weights.items():
        assert torch.equal(ahead.weights[weight], twin.get_submodule(name).weight), name


def test_the_penalty_of_any_conv_is_its_formula() -> None:
    setup = plain(second_order="none")
    setup.forward_and_step()
    before = {name: setup.model.get_submodule(name).weight.detach().clone() for name in PLAIN_LAYERS}
    biases = {name: setup.model.get_submodule(name).bias.detach().clone() for name in PLAIN_LAYERS}
    setup.learner.after_step(setup.x, setup.y)
    for info in setup.learner.layers.chosen:
        hard = terms.hard_assignment(info.conv.group).double()
        area = info.kernel_size[0] * info.kernel_size[1]
        inputs = info.in_channels * info.input_hw[0] * info.input_hw[1] / 16384
        scale = (inputs * area) ** 0.5 * (4 / info.out_channels) ** 1.5
        shrink = 0.5 * 0.05 / 10 * terms.penalty(hard, before[info.name], scale)
        found = info.conv.weight.detach()
        assert float((found - (before[info.name] - shrink)).abs().max()) <= 1e-14
        assert float(shrink.abs().max()) > 1e-6
        assert torch.equal(info.conv.bias, biases[info.name])
    assert [info.input_hw for info in setup.learner.layers.chosen] == [(10, 14), (10, 7), (10, 7)]


def test_layers_of_one_shape_learn_as_they_would_alone() -> None:
    """Batched with a layer of its shape, a layer gets what it gets where no other one takes part."""
    model = nn.Sequential(*(nn.Conv2d(6, 6, 3, padding=1) for _ in range(3)), nn.Flatten(), nn.LazyLinear(10))
    model(torch.zeros(1, 6, 8, 8))
    x, y = torch.randn(4, 6, 8, 8).double(), torch.randint(10, (4,))
    noise = {name: torch.randn(2, 6).double() for name in ("1", "2")}
    found = []
    for names in (("1", "2"), ("1",), ("2",)):
        twin = copy.deepcopy(model).double()
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.01)
        learner = GroupWrapper(
            twin,
            optimizer,
            F.cross_entropy,
            0.5,
            5,
            2,
            0.5,
            example_input=x[:1],
            layers=lambda name, conv, names=names: name in names,
            second_order="none",
        )
        with torch.no_grad():
            for name in names:
                twin.get_submodule(name).group.copy_(noise[name] * 1e-3)
        learner.initialize({name: noise[name] for name in names})
        learner.after_step(x, y)
        found.append(twin)
    for name, alone in (("1", found[1]), ("2", found[2])):
        for part in ("weight", "group"):
            together = getattr(found[0].get_submodule(name), part)
            assert torch.allclose(together, getattr(alone.get_submodule(name), part), rtol=0, atol=1e-14)


@pytest.mark.parametrize("how", ["mapping", "callable"])
def test_every_layer_has_its_own_number_of_groups(how: str) -> None:
    counts = {"conv1": 2, "conv2": 10, "conv3": 1}
    setup = Setup(n_groups=counts if how == "mapping" else lambda name, conv: counts[name])
    for _ in range(2):
        setup.step()
    assert {name: setup.model.get_submodule(name).group.shape[0] for name in LAYERS} == counts
    shares = [value for key, value in setup.learner.stats().items() if key.startswith("group_share")]
    assert len(shares) == 10
    assert sum(shares) == pytest.approx(1)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"conv1": 2, "conv9": 2, "conv3": 2}, r"missing \['conv2'\], unknown \['conv9'\]"),
        ({"conv1": 2, "conv2": 0, "conv3": 2}, "n_groups is 0 for layer 'conv2'"),
        ({"conv1": 2, "conv2": 11, "conv3": 2}, "'conv2' has 10 filters, too few for n_groups=11"),
        (lambda name, conv: "two", "n_groups is 'two' for layer 'conv1'"),
    ],
)
def test_numbers_of_groups_that_cannot_be(counts: Any, message: str) -> None:
    with pytest.raises(DSPPruningError, match=message):
        Setup(n_groups=counts)


@pytest.mark.parametrize("mode", ["none", "exact"])
def test_channels_last_learns_the_same(mode: str) -> None:
    usual, last = plain(second_order=mode), plain(second_order=mode)
    last.model.to(memory_format=torch.channels_last)
    last.x = last.x.contiguous(memory_format=torch.channels_last)
    for _ in range(3):
        usual.step()
        last.step()
    assert last.model.twice.weight.is_contiguous(memory_format=torch.channels_last)
    same(usual, last, 1e-11)


def test_float32_follows_float64() -> None:
    double, single = plain(), plain()
    single.model.float()
    single.x = single.x.float()
    for _ in range(3):
        double.step()
        single.step()
    assert single.model.twice.group.dtype == torch.float32 or single.model.twice.group.dtype == torch.float64
    same(single, double, 2e-5)


def test_any_optimizer_without_a_look_ahead() -> None:
    class Own(torch.optim.SGD):
        pass

    model = ToyA()
    with pytest.raises(DSPPruningError, match=r"cannot step Own.*it knows SGD, Adam"):
        GroupWrapper(model, Own(model.parameters(), lr=0.1), F.cross_entropy, 0.1, 10, 3, 0.5)
    learner = GroupWrapper(
        model, Own(model.parameters(), lr=0.1), F.cross_entropy, 0.1, 10, 3, 0.5, second_order="none"
    )
    before = model.conv1.weight.detach().clone()
    learner.initialize()
    learner.after_step(None, None)
    assert not torch.equal(before, model.conv1.weight)


@pytest.mark.parametrize("mode", ["none", "exact"])
@pytest.mark.parametrize("optimizer", ["momentum", "adam-fused"])
def test_an_overflow_leaves_every_tensor_as_it_was(mode: str, optimizer: str) -> None:
    setup = Setup(optimizer, second_order=mode)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    states: list[dict[str, Tensor]] = []
    for spoil in (False, True):
        setup.learner.initialize()
        setup.optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(setup.learner(setup.x), setup.y)
        scaler.scale(loss).backward()
        if spoil:
            setup.model.conv0.weight.grad[0] = float("inf")
        scaler.step(setup.optimizer)
        before = everything(setup)
        moments = [v.clone() for s in setup.learner._group_optimizer.state.values() for v in s.values()]
        setup.learner.after_step(setup.x, setup.y, True, scaler)
        scaler.update()
        states = [before, everything(setup)]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    after = [v for s in setup.learner._group_optimizer.state.values() for v in s.values()]
    assert all(torch.equal(a, b) for a, b in zip(moments, after, strict=True))
    assert (setup.learner.stats()["skipped_steps"], setup.learner.stats()["step"]) == (1, 2)


@pytest.mark.parametrize("mode", ["none", "exact"])
def test_a_network_already_pruned_learns(mode: str) -> None:
    """Filters, input channels and a whole layer are zero; they stay so, and nothing becomes NaN."""
    setup = Setup(second_order=mode, optimizer="momentum")
    with torch.no_grad():
        for name in LAYERS:
            conv = setup.model.get_submodule(name)
            conv.weight[::2] = 0
            conv.weight[:, 1::3] = 0
        setup.model.conv2.weight.zero_()
        masks = {name: setup.model.get_submodule(name).weight != 0 for name in LAYERS}
    for _ in range(3):
        setup.learner.initialize()
        setup.optimizer.zero_grad()
        F.cross_entropy(setup.learner(setup.x), setup.y).backward()
        for name, mask in masks.items():
            setup.model.get_submodule(name).weight.grad.mul_(mask)
        setup.optimizer.step()
        setup.learner.after_step(setup.x, setup.y)
    for name, mask in masks.items():
        conv = setup.model.get_submodule(name)
        assert (conv.weight[~mask] == 0).all()
        assert conv.weight.isfinite().all()
        assert conv.group.isfinite().all()


def test_a_frozen_layer_is_refused() -> None:
    model = ToyA()
    model.conv2.weight.requires_grad_(False)
    with pytest.raises(DSPPruningError, match="'conv2' is frozen"):
        Setup(model=model)
    Setup(model=model, layers=lambda name, conv: name in ("conv1", "conv3")).step()


def test_the_table_says_what_was_chosen_and_why_not() -> None:
    model = Plain()
    model.copy = nn.Conv2d(8, 8, 3, padding=1)
    model.copy.weight = model.twice.weight
    nn.utils.parametrizations.weight_norm(model.tall)
    model.forward = lambda x: Plain.forward(model, x) + model.copy(x.mean() + torch.zeros(1, 8, 4, 4)).mean()
    survey = survey_layers(model, torch.zeros(1, 2, 10, 14))
    assert [info.name for info in survey.chosen] == ["wide"]
    assert survey.excluded == {
        "stem": "the first conv",
        "tall": "its weight is computed, not a parameter",
        "twice": "shares its weight with 'copy'",
        "depthwise": "groups=8",
        "copy": "shares its weight with 'twice'",
    }
    lines = str(survey).splitlines()
    assert len(lines) == 1 + len(survey.convs)
    assert lines[2].split() == ["wide", "8", "6", "1x5", "10x14", str(8 * 6 * 5 * 10 * 7), "yes"]
    assert lines[-1].endswith("no: shares its weight with 'twice'")


ZOO = ["squeezenet1_1", "shufflenet_v2_x0_5", "mobilenet_v3_small"]


@pytest.mark.parametrize("name", ZOO)
def test_networks_of_torchvision_learn(name: str) -> None:
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
    import learn_zoo

    for mode in ("none", "exact"):
        row = learn_zoo.learn(name, mode)
        assert 0 < row["chosen"] < row["convs"]
