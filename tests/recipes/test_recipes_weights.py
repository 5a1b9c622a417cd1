"""Weights on disk: which files are accepted, and errors that name what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_cases import DEPTH, TINY
from torch import Tensor, nn

from dsp_kernels.errors import DSPFormatError
from dsp_pruning.data import ImageData
from dsp_pruning.recipes.checkpoint import load_weights, restore_weights, save_weights
from dsp_pruning.recipes.finetune import FinetuneConfig, finetune, load_pruned
from dsp_pruning.recipes.learn_groups import LearnGroupsConfig, learn_groups
from dsp_pruning.recipes.run import depth_of


def test_published_checkpoints_are_accepted(
    data: ImageData, dense: dict[str, Tensor], tmp_path: Path
) -> None:
    """[state_dict, accuracy], names with and without nn.DataParallel's prefix."""
    path = tmp_path / "published.pt"
    torch.save([{f"module.{name}": value for name, value in dense.items()}, 91.5], path)
    weights, accuracy = load_weights(path)
    assert accuracy == 91.5
    assert depth_of(weights, path) == DEPTH
    result = learn_groups(data, weights, LearnGroupsConfig(**{**TINY, "epochs": 0}, groups=2), source=path)
    assert all(torch.equal(result.model.state_dict()[name], value) for name, value in dense.items())


@pytest.mark.parametrize(
    "content",
    [b"", b"text", {"a": 1}, [1, 2, 3], [{"a": "b"}, 0.5], {}],
    ids=["empty", "text", "numbers", "list", "strings", "no-tensors"],
)
def test_other_files_are_refused(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "weights.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(DSPFormatError, match=r"weights\.pt (is not a readable|contains no weights)"):
        load_weights(path)


class _Touch:
    """Its pickle creates a file when it is loaded with code execution."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_loading_weights_never_runs_code(tmp_path: Path) -> None:
    torch.save(_Touch(tmp_path / "touched"), tmp_path / "weights.pt")
    with pytest.raises(DSPFormatError):
        load_weights(tmp_path / "weights.pt")
    assert not (tmp_path / "touched").exists()


def test_weights_that_do_not_fit_are_refused(
    data: ImageData, dense: dict[str, Tensor], tmp_path: Path
) -> None:
    deeper = LearnGroupsConfig(**{**TINY, "depth": 14}, groups=2)
    with pytest.raises(DSPFormatError, match=r"other\.pt does not fit CifarResNet: stage_1\.1\.conv_a"):
        learn_groups(data, dense, deeper, source="other.pt")
    config = FinetuneConfig(**TINY, groups=2)
    narrow = {**dense, "classifier.bias": torch.zeros(7)}
    with pytest.raises(DSPFormatError, match=r"bias is \(7,\) in the file and \(10,\) in the model"):
        finetune(data, narrow, config)
    with pytest.raises(DSPFormatError, match=r"conv_a\.group is missing"):
        finetune(data, dense, config, source="dense.pt")
    with pytest.raises(DSPFormatError, match="contains no group logits and masks"):
        load_pruned(save_weights(tmp_path / "dense.pt", dense, 0.5))
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(DSPFormatError, match="contains no CIFAR ResNet"):
        load_pruned(tmp_path / "other.pt")


def test_only_optional_names_may_be_unexpected() -> None:
    model = nn.Linear(2, 2)
    weights = {**model.state_dict(), "extra.group": torch.zeros(1)}
    restore_weights(model, weights, "file", optional=(".group",))
    with pytest.raises(DSPFormatError, match=r"extra\.group is not in the model"):
        restore_weights(model, weights, "file")
