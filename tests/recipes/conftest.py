"""Few digits, and the networks that the three recipes make of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from recipe_cases import TINY, Recipe, few_digits, state
from torch import Tensor

from dsp_pruning.data import ImageData
from dsp_pruning.recipes.finetune import FinetuneConfig, finetune
from dsp_pruning.recipes.learn_groups import LearnGroupsConfig, learn_groups
from dsp_pruning.recipes.pretrain import PretrainConfig, pretrain
from dsp_pruning.recipes.training import Progress


@pytest.fixture(scope="session")
def data() -> ImageData:
    return few_digits()


@pytest.fixture(scope="session")
def dense(data: ImageData) -> dict[str, Tensor]:
    return state(pretrain(data, PretrainConfig(**TINY)).model)


@pytest.fixture(scope="session")
def grouped(data: ImageData, dense: dict[str, Tensor]) -> dict[str, Tensor]:
    return state(learn_groups(data, dense, LearnGroupsConfig(**TINY, groups=2)).model)


@pytest.fixture(params=["pretrain", "learn-groups", "finetune"])
def recipe(request: pytest.FixtureRequest, data: ImageData) -> Recipe:
    """Each recipe as a function of (directory, resume=, progress=, **settings)."""

    def run(
        directory: Path | None, *, resume: bool = False, progress: Progress | None = None, **more: Any
    ) -> Any:
        common: dict[str, Any] = {"resume": resume, "progress": progress}
        if request.param == "pretrain":
            return pretrain(data, PretrainConfig(**{**TINY, **more}), directory, **common)
        if request.param == "learn-groups":
            weights = request.getfixturevalue("dense")
            config = LearnGroupsConfig(**{**TINY, "groups": 2, **more})
            return learn_groups(data, weights, config, directory, **common)
        weights = request.getfixturevalue("grouped")
        config_f = FinetuneConfig(**{**TINY, "groups": 2, "cycles": 2, **more})
        return finetune(data, weights, config_f, directory, **common)

    return run
