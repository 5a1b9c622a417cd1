"""Code for the published modules runs; files of older versions (commit a908e13) load and resume."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from recipe_cases import TINY, few_digits, state
from safetensors.torch import load_file
from torch import nn

import dsp_kernels
import dsp_module
from dsp_pruning.models import cifar_resnet
from dsp_pruning.recipes.learn_groups import LearnGroupsConfig, learn_groups


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(8, 3, 32, 32, generator=generator), torch.randint(0, 10, (8,), generator=generator))
        for _ in range(count)
    ]


def test_star_import_gives_the_published_names() -> None:
    names: dict[str, object] = {}
    exec("from dsp_module import *", names)
    assert names["GroupWrapper"] is dsp_module.GroupWrapper
    assert names["PruneWrapper"] is dsp_module.PruneWrapper


def test_the_published_way_of_use() -> None:
    from dsp_module import GroupWrapper, PruneWrapper

    model = cifar_resnet(8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    criterion = nn.CrossEntropyLoss()
    train = batches(4)

    group_trainer = GroupWrapper(model, optimizer, criterion, 2e-3, len(train), 4, 0.5)
    for x, y in train:
        group_trainer.initialize()
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        group_trainer.after_step(x, y)
    learned = model.state_dict()
    groups = learned["stage_1.0.conv_a.group"]
    assert groups.shape == (4, 16)
    assert groups.isfinite().all()

    model = cifar_resnet(8)
    pruner = PruneWrapper(model, 4, 2)
    model.load_state_dict(learned, strict=False)
    assert torch.equal(model.stage_1[0].conv_a.group, groups)
    flops, params = pruner.initialize(0.5)
    assert 50 <= flops < 60
    assert 0 < params < 100
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    for x, y in train:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
        pruner.after_step()
    for module in model.modules():
        mask = getattr(module, "mask", None)
        if mask is not None:
            assert (module.weight[(mask == 0).expand_as(module.weight)] == 0).all()
            assert (mask == 0).any()


def test_calling_a_wrapper_calls_its_model() -> None:
    model = cifar_resnet(8).eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = batches(1)[0][0]
    expected = model(x)
    learner = dsp_module.GroupWrapper(model, optimizer, nn.CrossEntropyLoss(), 1e-3, 1, 2, 0.5)
    assert torch.equal(learner(x), expected)
    assert torch.equal(dsp_module.PruneWrapper(model, 2, -1)(x), expected)


DATA = Path(__file__).resolve().parent / "data"
ANSWERS = load_file(DATA / "answers.safetensors")


@pytest.mark.parametrize("version", [2, 3])
def test_saved_networks_give_the_same_answers(version: int) -> None:
    network = dsp_kernels.load(DATA / f"version_{version}.safetensors")
    inputs = [ANSWERS["images"], *([ANSWERS["features"]] if version == 3 else [])]
    with torch.no_grad():
        torch.testing.assert_close(network(*inputs), ANSWERS[f"version_{version}"])


def test_an_exported_program_gives_the_same_answers() -> None:
    program = torch.export.load(DATA / "packed.pt2")
    torch.testing.assert_close(program.module()(ANSWERS["images"]), ANSWERS["pt2"])


def test_an_interrupted_training_run_resumes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(DATA / "learn_groups_run", run)
    weights = state(cifar_resnet(TINY["depth"], in_channels=1))  # replaced by those of the checkpoint
    result = learn_groups(few_digits(), weights, LearnGroupsConfig(**TINY, groups=2), run, resume=True)
    expected = json.loads((DATA / "learn_groups_run" / "history.json").read_text())
    assert [row["epoch"] for row in result.history] == [1, 2, 3]
    for row, old in zip(result.history, expected, strict=True):
        for name in ("lr", "step", "train_loss", "validation_loss", "penalty"):
            assert row[name] == pytest.approx(old[name], rel=1e-3), name
