"""Recipes: what they leave, that they stop and go on without a trace, and what they refuse."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsp_kernels.errors import DSPError, DSPFormatError, DSPPruningError, DSPTrainingError
from dsp_pruning.data import ImageData, Split, load_digits
from dsp_pruning.recipes import checkpoint as checkpoints
from dsp_pruning.recipes.checkpoint import load_checkpoint, load_weights, restore_weights, save_weights
from dsp_pruning.recipes.finetune import FinetuneConfig, finetune, load_pruned
from dsp_pruning.recipes.learn_groups import LearnGroupsConfig, learn_groups
from dsp_pruning.recipes.pretrain import PretrainConfig, pretrain
from dsp_pruning.recipes.run import RecipeResult, depth_of
from dsp_pruning.recipes.schedules import cosine, multi_step
from dsp_pruning.recipes.training import Hook, Progress, Trainer, evaluate

DEPTH = 8  # the smallest CIFAR ResNet
TINY: dict[str, Any] = {"depth": DEPTH, "epochs": 3, "batch_size": 16, "device": "cpu", "seed": 7}

Recipe = Callable[..., RecipeResult]


@pytest.fixture(scope="module")
def data() -> ImageData:
    """Few digits at their own 8 x 8 pixels, shifted in training as the real ones are."""
    digits = load_digits(size=8)

    def few(split: Split, n: int) -> Split:
        return split[torch.arange(n)]

    return replace(
        digits, train=few(digits.train, 48), validation=few(digits.validation, 40), test=few(digits.test, 40)
    )


@pytest.fixture(scope="module")
def dense(data: ImageData) -> dict[str, Tensor]:
    return _state(pretrain(data, PretrainConfig(**TINY)).model)


@pytest.fixture(scope="module")
def grouped(data: ImageData, dense: dict[str, Tensor]) -> dict[str, Tensor]:
    return _state(learn_groups(data, dense, LearnGroupsConfig(**TINY, groups=2)).model)


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
        config_f = FinetuneConfig(**{**TINY, "groups": 2, "cycles": 1, **more})
        return finetune(data, weights, config_f, directory, **common)

    return run


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _interrupt_at(step: int) -> Progress:
    def progress(done: int, total: int, text: str) -> None:
        if done == step:
            raise KeyboardInterrupt

    return progress


def _without_seconds(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history]


def _assert_same(left: RecipeResult, right: RecipeResult) -> None:
    assert _without_seconds(left.history) == _without_seconds(right.history)
    states = left.model.state_dict(), right.model.state_dict()
    assert states[0].keys() == states[1].keys()
    different = [name for name in states[0] if not torch.equal(states[0][name], states[1][name])]
    assert different == []


@pytest.mark.parametrize("step", [1, 5], ids=["first-epoch", "second-epoch"])
def test_a_resumed_run_equals_one_that_was_never_stopped(recipe: Recipe, tmp_path: Path, step: int) -> None:
    whole = recipe(None)
    with pytest.raises(KeyboardInterrupt):
        recipe(tmp_path, progress=_interrupt_at(step))
    assert load_checkpoint(tmp_path)["epoch"] == (step - 1) // 3
    torch.manual_seed(99)  # the resumed process has another state of the global generator
    _assert_same(recipe(tmp_path, resume=True), whole)


def test_a_corrupted_last_checkpoint_falls_back_to_the_one_before(recipe: Recipe, tmp_path: Path) -> None:
    whole = recipe(tmp_path)
    last = tmp_path / checkpoints.LAST
    last.write_bytes(last.read_bytes()[:-200])
    with pytest.warns(RuntimeWarning, match=r"going on from checkpoint\.previous\.pt"):
        again = recipe(tmp_path, resume=True)
    _assert_same(again, whole)


def test_a_run_leaves_metrics_summary_and_published_weights(recipe: Recipe, tmp_path: Path) -> None:
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
    assert not [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")]


def test_resuming_with_other_settings_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    recipe(tmp_path, epochs=1)
    with pytest.raises(DSPTrainingError, match=r"has lr = .*, now it is 0\.5"):
        recipe(tmp_path, epochs=1, lr=0.5, resume=True)


def test_resuming_without_a_checkpoint_is_a_clear_error(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(DSPFormatError, match="holds no checkpoint to resume from"):
        recipe(tmp_path / "nothing", resume=True)


def test_two_unreadable_checkpoints_are_a_clear_error(tmp_path: Path) -> None:
    for name in (checkpoints.LAST, checkpoints.PREVIOUS):
        (tmp_path / name).write_bytes(b"cut")
    with pytest.raises(DSPFormatError, match=r"checkpoint\.pt is not a readable.*previous\.pt is not"):
        load_checkpoint(tmp_path)


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints.save_checkpoint(tmp_path, {"epoch": 1})

    def fail(content: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="no space"):
        checkpoints.save_checkpoint(tmp_path, {"epoch": 2})
    assert load_checkpoint(tmp_path)["epoch"] == 1
    assert [path.name for path in tmp_path.iterdir()] == [checkpoints.LAST]


def test_a_loss_that_is_not_finite_stops_the_run(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(DSPTrainingError, match=r"not finite|loss is|no longer finite"):
        recipe(tmp_path, lr=1e30)
    assert load_checkpoint(tmp_path)["epoch"] == 0


class _Spoil(Hook):
    """Trains for two epochs of three steps, then sets all weights to zero."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.steps = 0

    def after_step(self, images: Tensor, labels: Tensor) -> None:
        self.steps += 1
        if self.steps > 6:
            for parameter in self.model.parameters():
                parameter.data.zero_()

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = state["steps"]


def _spoiled_trainer(data: ImageData, directory: Path) -> Trainer:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.05),
        data,
        epochs=3,
        batch_size=16,
        schedule=lambda epoch: 1.0,
        generator=torch.Generator().manual_seed(0),
        hook=_Spoil(model),
        directory=directory,
    )


@pytest.mark.parametrize("stopped", [False, True], ids=["in-one-go", "resumed"])
def test_the_validation_split_chooses_the_epoch(data: ImageData, tmp_path: Path, stopped: bool) -> None:
    """Later epochs do worse, the last one spoils all: the first is kept, by a resumed run too."""
    trainer = _spoiled_trainer(data, tmp_path)
    if stopped:
        with pytest.raises(KeyboardInterrupt):
            trainer.run(_interrupt_at(4))
        trainer = _spoiled_trainer(data, tmp_path)
        assert trainer.resume() == 1
    reached = [row["validation_accuracy"] for row in trainer.run()]
    kept = trainer.load_best()
    assert kept == reached[0] == max(reached) > max(reached[1:])
    assert evaluate(trainer.model, data, data.validation).accuracy == kept


def test_group_learning_keeps_the_last_epoch(
    data: ImageData, dense: dict[str, Tensor], tmp_path: Path
) -> None:
    result = learn_groups(data, dense, LearnGroupsConfig(**TINY, groups=2), tmp_path)
    last = load_checkpoint(tmp_path)["model"]
    assert all(torch.equal(last[name], value) for name, value in result.model.state_dict().items())
    assert result.history[-1]["ramp"] == 1.0


def test_finetuning_keeps_pruned_kernels_at_zero(
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
        assert float(conv.weight.detach()[(conv.mask == 0).expand_as(conv.weight)].abs().max()) == 0
    assert evaluate(model, data, data.test) == result.test


def test_accuracy_before_finetuning_is_that_of_the_just_pruned_network(
    data: ImageData, grouped: dict[str, Tensor]
) -> None:
    config = FinetuneConfig(**TINY, groups=2, cycles=1)
    untrained = finetune(data, grouped, replace(config, epochs=0))
    trained = finetune(data, grouped, config)
    assert trained.extra["accuracy_before_finetuning"] == untrained.test.accuracy
    assert untrained.extra["accuracy_before_finetuning"] == untrained.test.accuracy
    assert trained.test.accuracy != untrained.test.accuracy


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
def test_a_foreign_weights_file_is_one_clear_error(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "weights.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(DSPFormatError, match=r"weights\.pt (is not a readable|holds no weights)"):
        load_weights(path)


class _Payload:
    """Pickles to a call: reading it with code execution would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_weights_file_never_runs_code(tmp_path: Path) -> None:
    torch.save(_Payload(tmp_path / "touched"), tmp_path / "weights.pt")
    with pytest.raises(DSPFormatError):
        load_weights(tmp_path / "weights.pt")
    assert not (tmp_path / "touched").exists()


def test_weights_of_another_network_are_refused_by_name(data: ImageData, dense: dict[str, Tensor]) -> None:
    with pytest.raises(DSPFormatError, match=r"other\.pt does not fit CifarResNet: stage_1\.1\.conv_a"):
        learn_groups(data, dense, LearnGroupsConfig(**{**TINY, "depth": 14}, groups=2), source="other.pt")
    narrow = {**dense, "classifier.bias": torch.zeros(7)}
    with pytest.raises(
        DSPFormatError, match=r"classifier\.bias is \(7,\) in the file and \(10,\) in the model"
    ):
        finetune(data, narrow, FinetuneConfig(**TINY, groups=2))


def test_weights_without_groups_cannot_be_pruned(data: ImageData, dense: dict[str, Tensor]) -> None:
    with pytest.raises(DSPFormatError, match=r"conv_a\.group is missing"):
        finetune(data, dense, FinetuneConfig(**TINY, groups=2), source="dense.pt")


def test_an_unpruned_file_cannot_be_packed(dense: dict[str, Tensor], tmp_path: Path) -> None:
    path = save_weights(tmp_path / "dense.pt", dense, 0.5)
    with pytest.raises(DSPFormatError, match="holds no group logits and masks"):
        load_pruned(path)
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(DSPFormatError, match="holds no CIFAR ResNet"):
        load_pruned(tmp_path / "other.pt")


def test_a_group_too_many_and_an_unreachable_rate_are_refused(
    data: ImageData, dense: dict[str, Tensor], grouped: dict[str, Tensor]
) -> None:
    with pytest.raises(DSPPruningError, match="16 filters"):
        learn_groups(data, dense, LearnGroupsConfig(**TINY, groups=17))
    with pytest.raises(DSPPruningError, match="rate"):
        finetune(data, grouped, FinetuneConfig(**TINY, groups=2, prune=1.5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": float("nan")}, "lr is nan"),
        ({"weight_decay": -1.0}, "weight_decay is -1"),
        ({"epochs": -1}, "epochs is -1"),
        ({"batch_size": 0}, "batch size 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    data: ImageData, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(DSPTrainingError, match=message):
        pretrain(data, PretrainConfig(**{**TINY, **settings}))


def test_a_device_that_is_not_here_is_a_clear_error(data: ImageData) -> None:
    with pytest.raises(DSPError, match="device 'cuda:77' cannot be used"):
        pretrain(data, PretrainConfig(**{**TINY, "device": "cuda:77"}))


def test_restoring_ignores_only_what_it_is_told_to() -> None:
    model = nn.Linear(2, 2)
    weights = {**_state(model), "extra.group": torch.zeros(1)}
    restore_weights(model, weights, "file", optional=(".group",))
    with pytest.raises(DSPFormatError, match=r"extra\.group is not in the model"):
        restore_weights(model, weights, "file")


def test_evaluation_counts_and_keeps_the_mode(data: ImageData) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(64, 10))
    model.train()
    score = evaluate(model, data, data.test)
    assert model.training
    assert model[1].training
    assert score.n == 40
    assert evaluate(model, data, data.test) == score  # dropout was off

    def always_three(images: Tensor) -> Tensor:
        return torch.eye(10)[3].expand(len(images), 10) * 100

    share = float((data.test.labels == 3).float().mean())
    score = evaluate(always_three, data, data.test)
    assert score.accuracy == pytest.approx(share)
    assert score.loss == pytest.approx((1 - share) * 100, rel=1e-6)


def test_multi_step_follows_the_published_schedule() -> None:
    factor = multi_step(164, warmup_epochs=2)
    rates = [0.1 * factor(epoch) for epoch in range(164)]
    expected = [0.025] * 2 + [0.1] * 80 + [0.01] * 41 + [0.001] * 41
    assert rates == pytest.approx(expected)


def test_cosine_starts_again_in_each_cycle() -> None:
    factor = cosine(400, cycles=5)
    assert [factor(epoch) for epoch in (0, 80, 160, 240, 320)] == [1.0] * 5
    assert factor(40) == pytest.approx(0.5)
    assert factor(79) < 0.001
    falling = [factor(epoch) for epoch in range(80)]
    assert falling == sorted(falling, reverse=True)


def test_published_defaults() -> None:
    first, second, third = PretrainConfig(), LearnGroupsConfig(), FinetuneConfig()
    assert (first.epochs, first.batch_size, first.lr, first.momentum, first.weight_decay) == (
        164,
        128,
        0.1,
        0.9,
        1e-4,
    )
    assert (second.epochs, second.lr, second.weight_decay, second.temperature, second.regularize) == (
        120,
        0.05,
        1e-3,
        0.5,
        2e-3,
    )
    assert (third.epochs, third.cycles, third.lr, third.weight_decay) == (400, 5, 0.015, 1e-3)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny convs: a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
