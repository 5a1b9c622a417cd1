"""What GroupWrapper refuses: each bad input is one clear error, and leaves all as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from learning_setup import LAYERS, Setup, everything
from toy_net import ToyA

from dsp_kernels.errors import DSPPruningError, DSPShapeError, DSPTrainingError
from dsp_pruning.learn.wrapper import GroupWrapper


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_groups": 0}, "n_groups is 0"),
        ({"n_groups": 2.0}, r"n_groups is 2\.0"),
        ({"total_steps": 0}, "total_steps is 0"),
        ({"reg": -1.0}, r"reg is -1\.0"),
        ({"reg": float("nan")}, "reg is nan"),
        ({"temp": 0.0}, r"temp is 0\.0"),
        ({"group_optimizer_lr": 0.0}, "group_optimizer_lr is"),
        ({"second_order": "exakt"}, "second_order is 'exakt'; it must be one of exact, none, original"),
        ({"n_groups": 11}, r"layer 'conv2' has 10 filters, too few for n_groups=11"),
        ({"layers": lambda name, conv: False}, "no layer to group"),
        ({"layers": ["conv1"]}, r"layers is a list; it must be a function \(name, conv\) -> bool"),
        ({"reg": "x"}, "reg is 'x'"),
        ({"generator": 3}, "generator is a int; it must be a torch.Generator"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DSPPruningError, match=message):
        Setup(**settings)


def test_arguments_in_another_order_are_named() -> None:
    model = ToyA()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(DSPPruningError, match=r"model is a SGD; it must be an nn\.Module"):
        GroupWrapper(optimizer, model, F.cross_entropy, 0.1, 10, 2, 0.5)  # type: ignore[arg-type]
    with pytest.raises(DSPPruningError, match="criterion is a NoneType; it must be a function"):
        GroupWrapper(model, optimizer, None, 0.1, 10, 2, 0.5)  # type: ignore[arg-type]


def test_a_wrapper_around_an_optimizer_will_do_without_the_look_ahead() -> None:
    class Around:
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.__dict__["inner"], name)

    model = ToyA()
    around = Around(torch.optim.SGD(model.parameters(), lr=0.1))
    GroupWrapper(model, around, F.cross_entropy, 0.1, 10, 2, 0.5, second_order="none")  # type: ignore[arg-type]


def test_wrong_input_channels() -> None:
    with pytest.raises(DSPShapeError, match="'conv0' reads 3 channels"):
        Setup(example_input=torch.zeros(1, 4, 32, 32))


def test_a_failed_start_leaves_the_model_alone() -> None:
    model = ToyA()
    with pytest.raises(DSPPruningError):
        Setup(model=model, n_groups=11)
    assert not any(hasattr(module, "group") for module in model.modules())


def test_a_layer_the_optimizer_does_not_hold() -> None:
    model = ToyA()
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if n != "conv2.weight"], lr=0.1)
    with pytest.raises(DSPPruningError, match="does not hold the weight of layer 'conv2'"):
        GroupWrapper(model, optimizer, F.cross_entropy, 0.1, 10, 3, 0.5)


def test_an_optimizer_that_needs_a_closure() -> None:
    model = ToyA()
    optimizer = torch.optim.LBFGS(model.parameters())
    with pytest.raises(DSPPruningError, match="closure"):
        GroupWrapper(model, optimizer, F.cross_entropy, 0.1, 10, 3, 0.5)
    GroupWrapper(model, optimizer, F.cross_entropy, 0.1, 10, 3, 0.5, second_order="none")


@pytest.mark.parametrize("present", [torch.zeros(4, 12), torch.zeros(12), "text"])
def test_logits_of_another_shape(present: object) -> None:
    model = ToyA()
    model.conv1.group = present
    with pytest.raises(DSPPruningError, match=r"layer 'conv1' already has a 'group'.*needs shape \(3, 12\)"):
        Setup(model=model)


def test_wrong_order_of_calls() -> None:
    setup = Setup()
    with pytest.raises(DSPPruningError, match="without initialize"):
        setup.learner.after_step(setup.x, setup.y)
    setup.step()
    with pytest.raises(DSPPruningError, match="step 1 without initialize"):
        setup.learner.after_step(setup.x, setup.y)


@pytest.mark.parametrize("value", [-1, 1.5, True])
def test_steps_must_be_a_count(value: object) -> None:
    setup = Setup()
    with pytest.raises(DSPPruningError, match="steps is"):
        setup.learner.steps = value  # type: ignore[assignment]


def test_noise_must_fit() -> None:
    setup = Setup()
    noise = {name: torch.zeros_like(setup.model.get_submodule(name).group) for name in LAYERS}
    with pytest.raises(DSPPruningError, match=r"missing \['conv3'\], unknown \['conv9'\]"):
        setup.learner.initialize({"conv1": noise["conv1"], "conv2": noise["conv2"], "conv9": noise["conv3"]})
    with pytest.raises(DSPShapeError, match=r"layer 'conv1' has shape \(2, 12\); it must be \(3, 12\)"):
        setup.learner.initialize(noise | {"conv1": torch.zeros(2, 12)})


def not_finite_weight(setup: Setup) -> None:
    setup.model.conv2.weight.data[0, 0] = float("inf")


def not_finite_logits(setup: Setup) -> None:
    setup.model.conv3.group.data[0, 0] = float("nan")
    setup.learner.initialize()


def not_finite_batch(setup: Setup) -> None:
    setup.x[0, 0, 0, 0] = float("nan")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (not_finite_weight, "the weight of layer 'conv2' is NaN or infinite at step 1"),
        (not_finite_logits, "the logits of layer 'conv3' is NaN or infinite at step 1"),
        (not_finite_batch, "the loss of the look-ahead is NaN or infinite at step 1"),
    ],
)
def test_values_that_are_not_finite(spoil: Callable[[Setup], None], message: str) -> None:
    setup = Setup()
    setup.step()
    setup.forward_and_step()
    spoil(setup)
    before = everything(setup)
    with pytest.raises(DSPTrainingError, match=message):
        setup.learner.after_step(setup.x, setup.y)
    after = everything(setup)
    for key, value in before.items():  # what was infinite may have become a NaN
        assert torch.equal(value.nan_to_num(7, 7, 7), after[key].nan_to_num(7, 7, 7)), key


def test_a_nan_loss_in_mode_none_is_seen_in_the_weights() -> None:
    setup = Setup(second_order="none")
    setup.x[0] = float("nan")
    setup.forward_and_step()
    with pytest.raises(DSPTrainingError, match="layer 'conv1' is NaN or infinite at step 0"):
        setup.learner.after_step(setup.x, setup.y)
