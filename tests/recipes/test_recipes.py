"""Recipes: files and numbers that they leave, schedules, and the settings and weights that they refuse."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_cases import DEPTH, TINY, Recipe, state
from torch import Tensor, nn

from dsp_kernels.errors import DSPError, DSPFormatError, DSPTrainingError
from dsp_pruning import assign_groups
from dsp_pruning.data import ImageData
from dsp_pruning.models import cifar_resnet
from dsp_pruning.recipes.checkpoint import load_checkpoint, load_weights, restore_weights, save_weights
from dsp_pruning.recipes.finetune import FinetuneConfig, finetune, load_pruned
from dsp_pruning.recipes.learn_groups import LearnGroupsConfig, learn_groups
from dsp_pruning.recipes.pretrain import PretrainConfig, pretrain
from dsp_pruning.recipes.run import cosine, depth_of, multi_step
from dsp_pruning.recipes.training import evaluate


def test_a_run_leaves_metrics_a_summary_and_weights(recipe: Recipe, tmp_path: Path) -> None:
    result = recipe(tmp_path)
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3]
    assert [float(row["train_loss"]) for row in rows] == [row["train_loss"] for row in result.history]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["test"]["accuracy"] == result.test.accuracy
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    assert isinstance(content, list)
    assert content[1] == result.test.accuracy
    assert set(content[0]) == set(result.model.state_dict())
    assert not list(tmp_path.glob("*.tmp*"))


def test_a_loss_that_is_not_finite_ends_the_run(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(DSPTrainingError, match=r"not finite|loss is"):
        recipe(tmp_path, lr=1e30)
    assert load_checkpoint(tmp_path)["epoch"] == 0


def test_group_learning_keeps_the_last_epoch(
    data: ImageData, dense: dict[str, Tensor], tmp_path: Path
) -> None:
    result = learn_groups(data, dense, LearnGroupsConfig(**TINY, groups=2), tmp_path)
    last = load_checkpoint(tmp_path)["model"]
    assert all(torch.equal(last[name], value) for name, value in result.model.state_dict().items())
    assert result.history[-1]["ramp"] == 1.0


def test_groups_from_the_weights_need_no_epoch(data: ImageData, dense: dict[str, Tensor]) -> None:
    config = LearnGroupsConfig(**{**TINY, "epochs": 0}, groups=2, init="weights", prune=0.6)
    learned = state(learn_groups(data, dense, config).model)
    model = cifar_resnet(DEPTH, 10, 1)
    model.load_state_dict(dense)
    seeded = torch.Generator().manual_seed(TINY["seed"])
    assign_groups(model, 2, 0.6, example_input=data.example(), generator=seeded)
    assert learned.keys() == model.state_dict().keys()
    assert all(torch.equal(learned[name], value) for name, value in model.state_dict().items())
    finetune(data, learned, FinetuneConfig(**{**TINY, "epochs": 0}, groups=2, prune=0.6))


def test_finetuning_keeps_pruned_weights_at_zero(
    data: ImageData, grouped: dict[str, Tensor], tmp_path: Path
) -> None:
    result = finetune(data, grouped, FinetuneConfig(**TINY, groups=2, cycles=1), tmp_path)
    assert 50 <= result.extra["pruned_flops"] < 60
    model = load_pruned(tmp_path / "model.pt", (8, 8))
    masked = [m for m in model.modules() if isinstance(m, nn.Conv2d) and hasattr(m, "mask")]
    assert len(masked) == 6
    for conv in masked:
        assert isinstance(conv.mask, Tensor)
        assert 0 < float(conv.mask.mean()) < 1
        assert not conv.weight[(conv.mask == 0).expand_as(conv.weight)].any()
    assert evaluate(model, data, data.test) == result.test


def test_accuracy_before_finetuning_is_that_of_the_pruned_network(
    data: ImageData, grouped: dict[str, Tensor]
) -> None:
    config = FinetuneConfig(**TINY, groups=2, cycles=1)
    untrained, trained = finetune(data, grouped, replace(config, epochs=0)), finetune(data, grouped, config)
    for result in (untrained, trained):
        assert result.extra["accuracy_before_finetuning"] == untrained.test.accuracy
    assert trained.test.accuracy != untrained.test.accuracy


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": float("nan")}, "lr is nan"),
        ({"weight_decay": -1.0}, "weight_decay is -1"),
        ({"epochs": -1}, "epochs is -1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"precision": "float8"}, "precision is 'float8'; expected one of float32"),
    ],
)
def test_impossible_settings_are_refused(data: ImageData, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DSPError, match=message):
        pretrain(data, PretrainConfig(**{**TINY, **settings}))


def test_evaluation_counts_in_eval_mode(data: ImageData) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(64, 10)).train()
    score = evaluate(model, data, data.test)
    assert all(module.training for module in model.modules())
    assert evaluate(model, data, data.test) == score  # dropout was off

    def always_three(images: Tensor) -> Tensor:
        return torch.eye(10)[3].expand(len(images), 10) * 100

    share = float((data.test.labels == 3).float().mean())
    score = evaluate(always_three, data, data.test)
    assert (score.n, score.accuracy) == (40, pytest.approx(share))
    assert score.loss == pytest.approx((1 - share) * 100, rel=1e-6)


@pytest.mark.parametrize(
    ("config", "published"),
    [
        (
            PretrainConfig(),
            {"epochs": 164, "batch_size": 128, "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4},
        ),
        (
            LearnGroupsConfig(),
            {"epochs": 120, "lr": 0.05, "weight_decay": 1e-3, "temperature": 0.5, "regularize": 2e-3},
        ),
        (FinetuneConfig(), {"epochs": 400, "cycles": 5, "lr": 0.015, "weight_decay": 1e-3}),
    ],
)
def test_defaults_are_the_published_settings(config: object, published: dict[str, float]) -> None:
    assert {name: getattr(config, name) for name in published} == published


def test_pretraining_follows_the_published_schedule() -> None:
    factor = multi_step(164, warmup_epochs=2)
    rates = [0.1 * factor(epoch) for epoch in range(164)]
    assert rates == pytest.approx([0.025] * 2 + [0.1] * 80 + [0.01] * 41 + [0.001] * 41)


def test_the_cosine_restarts_in_each_cycle() -> None:
    factor = cosine(400, cycles=5)
    assert [factor(epoch) for epoch in (0, 80, 160, 240, 320)] == [1.0] * 5
    assert factor(40) == pytest.approx(0.5)
    assert factor(79) < 0.001
    falling = [factor(epoch) for epoch in range(80)]
    assert falling == sorted(falling, reverse=True)


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
    with pytest.raises(DSPFormatError, match="contains no group logits and masks"):
        load_pruned(tmp_path / "other.pt")


def test_only_optional_names_may_be_unexpected() -> None:
    model = nn.Linear(2, 2)
    weights = {**model.state_dict(), "extra.group": torch.zeros(1)}
    restore_weights(model, weights, "file", optional=(".group",))
    with pytest.raises(DSPFormatError, match=r"extra\.group is not in the model"):
        restore_weights(model, weights, "file")
