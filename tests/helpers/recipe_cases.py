"""Tiny runs of the recipes."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dsp_pruning.data import ImageData, load_digits
from dsp_pruning.recipes.training import Progress, RecipeResult

DEPTH = 8  # the smallest CIFAR ResNet
TINY: dict[str, Any] = {"depth": DEPTH, "epochs": 3, "batch_size": 16, "device": "cpu", "seed": 7}

Recipe = Callable[..., RecipeResult]


def few_digits() -> ImageData:
    """48 training, 40 validation and 40 test images of 8 x 8 pixels."""
    digits = load_digits(size=8)
    train, validation, test = (
        split[torch.arange(n)]
        for split, n in ((digits.train, 48), (digits.validation, 40), (digits.test, 40))
    )
    return replace(digits, train=train, validation=validation, test=test)


def own_data() -> ImageData:
    """For ``--data recipe_cases:own_data``: the digits above, named as a user would."""
    return replace(few_digits(), name="mine")


def own_net(width: int, classes: int = 10, norm: str = "batch") -> nn.Module:
    """For ``--model recipe_cases:own_net``: a network that no list of ours knows."""
    layers: list[nn.Module] = [nn.Conv2d(1, width, 3, padding=1)]
    for _ in range(2):
        norms = nn.BatchNorm2d(width) if norm == "batch" else nn.Identity()
        layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), norms, nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def interrupt_at(step: int) -> Progress:
    def progress(done: int, total: int, text: str) -> None:
        if done == step:
            raise KeyboardInterrupt

    return progress


def assert_same(left: RecipeResult, right: RecipeResult) -> None:
    histories = [[{**row, "seconds": 0.0} for row in result.history] for result in (left, right)]
    assert histories[0] == histories[1]
    states = left.model.state_dict(), right.model.state_dict()
    assert states[0].keys() == states[1].keys()
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []
