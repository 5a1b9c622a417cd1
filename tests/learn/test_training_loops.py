"""GroupWrapper in other networks and training loops than the published ones, each compared in numbers."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from learning_setup import LAYERS, MODES, Setup
from torch import Tensor, nn

from dsp_pruning.learn import penalty as terms
from dsp_pruning.learn.wrapper import GroupWrapper


class Plain(nn.Module):
    """Without batch norm: convs with bias, stride, dilation, rectangular kernels, one that is called twice.

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


def assert_same(first: Setup, second: Setup, atol: float) -> None:
    wanted = second.model.state_dict()
    for name, value in first.model.state_dict().items():
        assert float((value - wanted[name]).abs().max()) <= atol, name


@pytest.mark.parametrize("mode", ["none", "exact"])
def test_two_half_batches_equal_one_batch(mode: str) -> None:
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
    assert_same(whole, halves, 1e-11)


def test_the_penalty_of_any_conv_is_its_formula() -> None:
    setup = plain(second_order="none")
    setup.forward_and_step()
    before = {name: setup.model.get_submodule(name).weight.detach().clone() for name in PLAIN_LAYERS}
    biases = {name: setup.model.get_submodule(name).bias.detach().clone() for name in PLAIN_LAYERS}
    setup.learner.after_step(setup.x, setup.y)
    for info in setup.learner.layers.chosen:
        weight = before[info.name]
        hard = terms.hard_assignment(info.conv.group).double()
        area = info.kernel_size[0] * info.kernel_size[1]
        inputs = info.in_channels * info.input_hw[0] * info.input_hw[1] / 16384
        scale = (inputs * area) ** 0.5 * (4 / info.out_channels) ** 1.5
        factor = terms.penalty_factor(terms.Assigned(hard), terms.kernel_energy(weight), scale)
        shrink = 0.5 * 0.05 / 10 * weight * factor[..., None, None]  # reg * lr * ramp
        assert float((info.conv.weight.detach() - (weight - shrink)).abs().max()) <= 1e-14
        assert float(shrink.abs().max()) > 1e-6
        assert torch.equal(info.conv.bias, biases[info.name])
    assert [info.input_hw for info in setup.learner.layers.chosen] == [(10, 14), (10, 7), (10, 7)]


def test_layers_of_equal_shape_learn_as_they_would_alone() -> None:
    model = nn.Sequential(*(nn.Conv2d(6, 6, 3, padding=1) for _ in range(3)), nn.Flatten(), nn.LazyLinear(10))
    model(torch.zeros(1, 6, 8, 8))
    x, y = torch.randn(4, 6, 8, 8).double(), torch.randint(10, (4,))
    noise = {name: torch.randn(2, 6).double() for name in ("1", "2")}
    found = []
    for names in (("1", "2"), ("1",), ("2",)):
        twin = copy.deepcopy(model).double()
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.01)
        settings = {"layers": lambda name, conv, names=names: name in names, "second_order": "none"}
        learner = GroupWrapper(
            twin, optimizer, F.cross_entropy, 0.5, 5, 2, 0.5, example_input=x[:1], **settings
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


@pytest.mark.parametrize("mode", ["none", "exact"])
def test_channels_last_learns_the_same(mode: str) -> None:
    usual, last = plain(second_order=mode), plain(second_order=mode)
    last.model.to(memory_format=torch.channels_last)
    last.x = last.x.contiguous(memory_format=torch.channels_last)
    for _ in range(3):
        usual.step()
        last.step()
    assert last.model.twice.weight.is_contiguous(memory_format=torch.channels_last)
    assert_same(usual, last, 1e-11)


def test_float32_follows_float64() -> None:
    double, single = plain(), plain()
    single.model.float()
    single.x = single.x.float()
    for _ in range(3):
        double.step()
        single.step()
    assert_same(single, double, 2e-5)


@pytest.mark.parametrize("mode", MODES)
def test_a_network_that_is_already_pruned(mode: str) -> None:
    setup = Setup(second_order=mode)
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
