"""A few digits, and the weights after each recipe."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recipe_cases import TINY, Recipe, few_digits, state
from torch import Tensor

from dsp_pruning.data import ImageData
from dsp_pruning.recipes.finetune import FinetuneConfig, finetune
from dsp_pruning.recipes.learn_groups import LearnGroupsConfig, learn_groups
from dsp_pruning.recipes.pretrain import PretrainConfig, pretrain


@pytest.fixture(scope="session")
def data() -> ImageData:
    return few_digits()


@pytest.fixture(scope="session")
def dense(data: ImageData) -> dict[str, Tensor]:
    return state(pretrain(data, PretrainConfig(**TINY)).model)


@pytest.fixture(scope="session")
def grouped(data: ImageData, dense: dict[str, Tensor]) -> dict[str, Tensor]:
    return state(learn_groups(data, dense, LearnGroupsConfig(**TINY, groups=2)).model)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEG files of 64 x 48 pixels in three classes of noisy colours."""
    image = pytest.importorskip("PIL.Image")
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for part, count in (("train", 9), ("val", 3)):
        for label, name in enumerate(("cat", "dog", "frog")):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 80, (48, 64, 3), dtype=np.uint8)
                pixels[..., label] += 150
                image.fromarray(pixels).save(root / part / name / f"{i}.jpg", quality=95)
    return root


@pytest.fixture(params=["pretrain", "learn-groups", "finetune"])
def recipe(
    request: pytest.FixtureRequest, data: ImageData, dense: dict[str, Tensor], grouped: dict[str, Tensor]
) -> Recipe:
    """Each recipe as a function of (directory, resume=, progress=, **settings)."""

    def run(
        directory: Path | None = None, *, resume: bool = False, progress: Any = None, **settings: Any
    ) -> Any:
        given = {**TINY, **settings}
        more: dict[str, Any] = {"directory": directory, "resume": resume, "progress": progress}
        if request.param == "pretrain":
            return pretrain(data, PretrainConfig(**given), **more)
        if request.param == "learn-groups":
            return learn_groups(data, dense, LearnGroupsConfig(**given, groups=2), **more)
        return finetune(data, grouped, FinetuneConfig(**{"cycles": 2, **given}, groups=2), **more)

    return run
