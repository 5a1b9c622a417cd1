"""What GroupWrapper leaves behind, what it refuses, and what may be done to its model at any moment."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from learning_setup import LAYERS, MODES, Setup
from torch import Tensor, nn
from toy_net import ToyA

from dsp_kernels.errors import DSPPruningError
from dsp_pruning.learn import penalty as terms
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


@pytest.mark.parametrize("moment", ["new", "initialized", "backward", "stepped", "after"])
def test_the_model_can_be_copied_at_any_moment(moment: str) -> None:
    setup = Setup()

    def check() -> None:
        model = setup.model
        wanted = model.state_dict()
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        buffer.seek(0)
        copies = [
            copy.deepcopy(model).state_dict(),
            pickle.loads(pickle.dumps(model)).state_dict(),
            torch.load(buffer, weights_only=True),
        ]
        for found in copies:
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[key], value) for key, value in wanted.items())
        assert {key for key in wanted if key.endswith("group")} == {f"{name}.group" for name in LAYERS}

    if moment == "new":
        return check()
    setup.learner.initialize()
    if moment == "initialized":
        return check()
    F.cross_entropy(setup.learner(setup.x), setup.y).backward()
    if moment == "backward":
        return check()
    setup.optimizer.step()
    if moment == "stepped":
        return check()
    setup.learner.after_step(setup.x, setup.y)
    return check()


def test_logits_are_parameters_that_training_does_not_touch() -> None:
    setup = Setup()
    held = {id(p) for group in setup.optimizer.param_groups for p in group["params"]}
    for name in LAYERS:
        group = setup.model.get_submodule(name).group
        assert isinstance(group, nn.Parameter)
        assert not group.requires_grad
        assert id(group) not in held
    assert [key for key in setup.model.state_dict() if "mask" in key] == []


def test_a_loaded_checkpoint_keeps_its_logits() -> None:
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


def test_a_pruners_buffer_becomes_a_parameter_again() -> None:
    model = ToyA()
    values = torch.randn(3, 12)
    model.conv1.register_buffer("group", values)
    setup = Setup(model=model)
    assert isinstance(model.conv1.group, nn.Parameter)
    assert "group" not in model.conv1._buffers
    assert torch.equal(setup.model.conv1.group, values)


def test_a_checkpoint_goes_on_to_the_same_weights() -> None:
    """Weights, optimizer and logits of step 0 suffice for step 1 but for Adam's memory of the logits."""
    noise = [
        {name: torch.randn(3, ToyA().get_submodule(name).out_channels) for name in LAYERS} for _ in range(2)
    ]
    setup = Setup()
    setup.forward_and_step(noise[0])
    setup.learner.after_step(setup.x, setup.y)
    stored = copy.deepcopy((setup.model.state_dict(), setup.optimizer.state_dict()))
    other = Setup(seed=5)
    other.model.load_state_dict(stored[0])
    other.optimizer.load_state_dict(stored[1])
    other.x, other.y, other.learner.steps = setup.x, setup.y, setup.learner.steps
    for each in (setup, other):
        each.forward_and_step(noise[1])
        each.learner.after_step(each.x, each.y)
    for a, b in zip(setup.logits(), other.logits(), strict=True):
        assert float((a - b).abs().max()) <= 2.1e-3  # two Adam steps at most apart
    assert torch.equal(setup.model.fc.weight, other.model.fc.weight)


def test_a_seed_decides_everything_that_is_random() -> None:
    def run(seed: int) -> list[Tensor]:
        setup = Setup(generator=torch.Generator().manual_seed(seed))
        for _ in range(2):
            setup.step()
        return setup.logits()

    assert all(torch.equal(a, b) for a, b in zip(run(1), run(1), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(run(1), run(2), strict=True))


def test_global_random_numbers_are_neither_used_nor_moved() -> None:
    def run(seed: int) -> tuple[list[Tensor], list[Tensor]]:
        setup = Setup()
        generator = torch.Generator().manual_seed(7)
        fresh = ToyA()
        optimizer = torch.optim.SGD(fresh.parameters(), lr=0.1)
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        learner = GroupWrapper(fresh, optimizer, F.cross_entropy, 0.1, 10, 3, 0.5, generator=generator)
        learner.initialize()
        assert torch.equal(torch.get_rng_state(), before)
        setup.model = fresh
        return setup.logits(), [bucket.assigned().clone() for bucket in learner._buckets]

    for first, second in zip(run(0), run(1), strict=True):
        assert len(first) == len(LAYERS)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_initial_logits_are_small_and_untied() -> None:
    setup = Setup()
    for logits in setup.logits():
        assert 0 < float(logits.abs().max()) < 0.01
        assert len(set(logits.flatten().tolist())) == logits.numel()


def test_drawn_noise_is_gumbel() -> None:
    from dsp_pruning.learn.logits import gumbel_noise

    (noise,) = gumbel_noise([torch.Size([400, 500])], torch.Generator().manual_seed(0))
    # Mean 0.5772 and variance pi^2 / 6; the standard errors of 200,000 draws are 0.003 and 0.01.
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.015)
    assert float(noise.var()) == pytest.approx(1.6449, abs=0.05)


def test_param_groups_have_their_own_learning_rate() -> None:
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


def test_a_zero_channel_does_no_harm() -> None:
    """The original turns all logits of such a layer into NaN, for good."""
    setup = Setup(second_order="original")
    with torch.no_grad():
        setup.model.conv2.weight[:, 3] = 0
        setup.model.conv3.weight.zero_()
    setup.learner.initialize()
    setup.learner.after_step(setup.x, setup.y)
    assert all(torch.isfinite(logits).all() for logits in setup.logits())
    assert (setup.model.conv2.weight[:, 3] == 0).all()


@pytest.mark.parametrize("n_groups", [1, 10])
def test_one_group_and_as_many_as_filters(n_groups: int) -> None:
    setup = Setup(n_groups=n_groups)
    for _ in range(3):
        setup.step()
    assert all(torch.isfinite(logits).all() for logits in setup.logits())


def test_half_precision_models_keep_their_dtype() -> None:
    setup = Setup(model=ToyA().bfloat16())
    setup.x = setup.x.bfloat16()
    for _ in range(2):
        setup.step()
    assert setup.model.conv1.weight.dtype == torch.bfloat16
    assert setup.model.conv1.group.dtype == torch.float32
    assert torch.isfinite(setup.model.conv1.group).all()


def test_a_model_may_be_cast_after_wrapping() -> None:
    setup = Setup()
    setup.model.bfloat16()
    setup.x = setup.x.bfloat16()
    for _ in range(2):
        setup.step()
    assert all(logits.dtype == torch.bfloat16 and logits.isfinite().all() for logits in setup.logits())


def test_goes_on_from_its_own_state_dict() -> None:
    """Three steps, then three from a checkpoint, are six steps: weights, logits, noise and counts."""
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


def test_refuses_tensors_that_were_exchanged() -> None:
    setup = Setup()
    setup.model.load_state_dict({k: v.clone() for k, v in setup.model.state_dict().items()}, assign=True)
    with pytest.raises(DSPPruningError, match="another weight or group tensor"):
        setup.learner.initialize()


def test_a_copied_learner_sees_its_own_optimizer() -> None:
    setup = copy.deepcopy(Setup())
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    setup.learner.initialize()
    setup.optimizer.zero_grad()
    scaler.scale(F.cross_entropy(setup.learner(setup.x), setup.y)).backward()
    scaler.step(setup.optimizer)
    scaler.update()
    setup.learner.after_step(setup.x, setup.y, scaler=scaler)
    assert setup.learner.stats()["skipped_steps"] == 0
