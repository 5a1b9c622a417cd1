"""Tiny runs of the recipes, and what the tests ask of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dsp_pruning.data import ImageData, Split, load_digits
from dsp_pruning.recipes.run import RecipeResult
from dsp_pruning.recipes.training import Progress

__all__ = ["DEPTH", "TINY", "Recipe", "assert_same", "few_digits", "interrupt_at", "state"]

DEPTH = 8  # the smallest CIFAR ResNet
TINY: dict[str, Any] = {"depth": DEPTH, "epochs": 3, "batch_size": 16, "device": "cpu", "seed": 7}

Recipe = Callable[..., RecipeResult]


def few_digits() -> ImageData:
    """Few digits at their own 8 x 8 pixels, shifted in training as the real ones are."""
    digits = load_digits(size=8)

    def few(split: Split, n: int) -> Split:
        return split[torch.arange(n)]

    return replace(
        digits, train=few(digits.train, 48), validation=few(digits.validation, 40), test=few(digits.test, 40)
    )


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def interrupt_at(step: int) -> Progress:
    def progress(done: int, total: int, text: str) -> None:
        if done == step:
            raise KeyboardInterrupt

    return progress


def without_seconds(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history]


def assert_same(left: RecipeResult, right: RecipeResult) -> None:
    assert without_seconds(left.history) == without_seconds(right.history)
    states = left.model.state_dict(), right.model.state_dict()
    assert states[0].keys() == states[1].keys()
    different = [name for name in states[0] if not torch.equal(states[0][name], states[1][name])]
    assert different == []
