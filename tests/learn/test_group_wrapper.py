"""GroupWrapper: what it leaves on the model, copies, checkpoints, random numbers and statistics."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from learning_setup import LAYERS, MODES, Setup
from nets import ToyA
from torch import Tensor, nn

from dsp_pruning.learn import penalty as terms
from dsp_pruning.learn.logits import gumbel_noise
from dsp_pruning.learn.wrapper import GroupWrapper


@pytest.mark.parametrize("second_order", MODES)
def test_every_mode_learns(second_order: str) -> None:
    setup = Setup(second_order=second_order)
    before = setup.logits()
    energy = [terms.kernel_energy(setup.model.get_submodule(name).weight.detach()).sum() for name in LAYERS]
    for _ in range(5):
        setup.step()
    for name, start, norm in zip(LAYERS, before, energy, strict=True):
        conv = setup.model.get_submodule(name)
        # Adam moves a logit by about its learning rate in every step.
        assert 1e-4 < float((conv.group - start).abs().max()) <= 5.1e-3
        assert float(terms.kernel_energy(conv.weight.detach()).sum()) < float(norm)


def test_the_model_can_be_copied_at_any_moment() -> None:
    setup = Setup()
    for act in (
        lambda: None,
        setup.learner.initialize,
        lambda: F.cross_entropy(setup.learner(setup.x), setup.y).backward(),
        setup.optimizer.step,
        lambda: setup.learner.after_step(setup.x, setup.y),
    ):
        act()
        wanted = setup.model.state_dict()
        buffer = io.BytesIO()
        torch.save(wanted, buffer)
        buffer.seek(0)
        for found in (
            copy.deepcopy(setup.model).state_dict(),
            pickle.loads(pickle.dumps(setup.model)).state_dict(),
            torch.load(buffer, weights_only=True),
        ):
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[key], value) for key, value in wanted.items())
        assert {key for key in wanted if key.endswith(("group", "mask"))} == {f"{n}.group" for n in LAYERS}


def test_logits_are_parameters_that_no_optimizer_moves() -> None:
    setup = Setup()
    held = {id(p) for group in setup.optimizer.param_groups for p in group["params"]}
    for name in LAYERS:
        group = setup.model.get_submodule(name).group
        assert isinstance(group, nn.Parameter)
        assert not group.requires_grad
        assert id(group) not in held


def test_logits_on_the_model_are_kept() -> None:
    first = Setup()
    for _ in range(2):
        first.step()
    second = Setup(seed=1)
    second.model.load_state_dict(first.model.state_dict(), strict=False)
    learner = GroupWrapper(second.model, second.optimizer, F.cross_entropy, 0.05, 10, 3, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(first.logits(), second.logits(), strict=True))
    learner.steps = 2
    learner.initialize()
    assert learner.stats()["ramp"] == 0.2


def test_the_buffer_of_a_pruner_becomes_a_parameter() -> None:
    model = ToyA()
    values = torch.randn(3, 12)
    model.conv1.register_buffer("group", values)
    Setup(model=model)
    assert isinstance(model.conv1.group, nn.Parameter)
    assert "conv1.group" not in dict(model.named_buffers())
    assert torch.equal(model.conv1.group, values)


def test_resuming_from_state_dicts_gives_the_same_bits() -> None:
    whole, begun = Setup(), Setup()
    for _ in range(6):
        whole.step()
    for _ in range(3):
        begun.step()
    resumed = Setup(seed=7)
    resumed.x, resumed.y = begun.x, begun.y
    resumed.model.load_state_dict(begun.model.state_dict())
    resumed.optimizer.load_state_dict(begun.optimizer.state_dict())
    resumed.learner.load_state_dict(copy.deepcopy(begun.learner.state_dict()))
    for _ in range(3):
        resumed.step()
    wanted = whole.model.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in resumed.model.state_dict().items())
    assert resumed.learner.stats() == whole.learner.stats()


def test_a_seed_decides_everything_random_and_the_global_state_nothing() -> None:
    def run(seed: int, global_seed: int) -> list[Tensor]:
        setup = Setup(generator=torch.Generator().manual_seed(seed))
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        for _ in range(2):
            setup.step()
        assert torch.equal(torch.get_rng_state(), before)
        return setup.logits()

    assert all(torch.equal(a, b) for a, b in zip(run(1, 0), run(1, 1), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(run(1, 0), run(2, 0), strict=True))


def test_initial_logits_are_small_and_without_ties() -> None:
    for logits in Setup().logits():
        assert 0 < float(logits.abs().max()) < 0.01
        assert len(set(logits.flatten().tolist())) == logits.numel()


def test_drawn_noise_is_gumbel() -> None:
    generator = torch.Generator().manual_seed(0)
    (noise,) = gumbel_noise([torch.Size([400, 500])], generator, torch.device("cpu"))
    # Mean 0.5772 and variance pi^2 / 6; the standard errors of 200,000 draws are 0.003 and 0.01.
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.015)
    assert float(noise.var()) == pytest.approx(1.6449, abs=0.05)


def test_parameter_groups_have_their_own_learning_rate() -> None:
    def run(rate: float) -> nn.Module:
        torch.manual_seed(0)
        model = ToyA()
        rest = [p for name, p in model.named_parameters() if name != "conv2.weight"]
        optimizer = torch.optim.SGD([{"params": rest}, {"params": [model.conv2.weight], "lr": rate}], lr=0.0)
        learner = GroupWrapper(model, optimizer, F.cross_entropy, 1.0, 1, 3, 0.5)
        learner.initialize({name: torch.zeros_like(model.get_submodule(name).group) for name in LAYERS})
        learner.after_step(torch.randn(4, 3, 16, 16), torch.randint(10, (4,)))
        return model

    still, moved = run(0.0), run(0.01)
    assert torch.equal(still.conv1.weight, moved.conv1.weight)
    assert float(moved.conv2.weight.detach().norm()) < float(still.conv2.weight.detach().norm())


def test_stats_are_plain_numbers() -> None:
    setup = Setup()
    for _ in range(3):
        setup.step()
    stats = setup.learner.stats()
    assert all(type(value) in (int, float) for value in stats.values())
    assert (stats["step"], stats["skipped_steps"], stats["ramp"]) == (3, 0, 0.3)
    shares = [stats[f"group_share_{group}"] for group in range(3)]
    hard = torch.cat([logits.argmax(0) for logits in setup.logits()])
    assert shares == pytest.approx([float((hard == group).float().mean()) for group in range(3)])
    assert stats["penalty"] > 0


@pytest.mark.parametrize("how", ["mapping", "callable"])
def test_every_layer_may_have_its_own_number_of_groups(how: str) -> None:
    counts = {"conv1": 2, "conv2": 10, "conv3": 1}
    setup = Setup(n_groups=counts if how == "mapping" else lambda name, conv: counts[name])
    for _ in range(2):
        setup.step()
    assert {name: len(setup.model.get_submodule(name).group) for name in LAYERS} == counts
    assert all(torch.isfinite(logits).all() for logits in setup.logits())
    shares = [value for key, value in setup.learner.stats().items() if key.startswith("group_share")]
    assert len(shares) == 10
    assert sum(shares) == pytest.approx(1)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_model_cast_to_half_precision_before_or_after_wrapping(when: str) -> None:
    setup = Setup(model=ToyA().bfloat16()) if when == "before" else Setup()
    if when == "after":
        setup.model.bfloat16()
    setup.x = setup.x.bfloat16()
    for _ in range(2):
        setup.step()
    assert setup.model.conv1.weight.dtype == torch.bfloat16
    wanted = torch.float32 if when == "before" else torch.bfloat16
    assert all(logits.dtype == wanted and logits.isfinite().all() for logits in setup.logits())


def test_a_copied_learner_uses_its_own_optimizer() -> None:
    setup: Any = copy.deepcopy(Setup())
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    setup.learner.initialize()
    setup.optimizer.zero_grad()
    scaler.scale(F.cross_entropy(setup.learner(setup.x), setup.y)).backward()
    scaler.step(setup.optimizer)
    scaler.update()
    setup.learner.after_step(setup.x, setup.y, scaler=scaler)
    assert setup.learner.stats()["skipped_steps"] == 0


def test_a_tuple_of_inputs_is_passed_on_as_several() -> None:
    class Masked(nn.Sequential):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            y = super().forward(x)
            return y if mask is None else y * mask

    model = Masked(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.LazyLinear(2))
    x, mask, y = torch.randn(2, 3, 8, 8), torch.ones(2, 2), torch.tensor([0, 1])
    model(x)
    optimizer, criterion = torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss()
    learner = GroupWrapper(model, optimizer, criterion, 1e-3, 1, 2, 0.5, example_input=x[:1])
    learner.initialize()
    criterion(model(x, mask), y).backward()
    optimizer.step()
    learner.after_step((x, mask), y)
    assert learner.steps == 1
