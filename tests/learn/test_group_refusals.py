"""Invalid input to GroupWrapper: one clear error, and nothing changes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from learning_setup import LAYERS, Setup, everything
from nets import ToyA
from torch import Tensor

from dsp_kernels.errors import DSPPruningError, DSPShapeError, DSPTrainingError
from dsp_pruning.learn.finite import NonFiniteFlag
from dsp_pruning.learn.wrapper import GroupWrapper


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_groups": 0}, "n_groups is 0"),
        ({"n_groups": 2.0}, r"n_groups is 2\.0"),
        ({"n_groups": 15}, r"no layer to group or prune: .*'conv2' \(10 filters, too few for n_groups=15\)"),
        ({"n_groups": {"conv1": 2, "conv9": 2}}, r"missing \['conv2', 'conv3'\], unknown \['conv9'\]"),
        ({"n_groups": {"conv1": 2, "conv2": 0, "conv3": 2}}, "n_groups is 0 for layer 'conv2'"),
        ({"n_groups": lambda name, conv: "two"}, "n_groups is 'two' for layer 'conv1'"),
        ({"total_steps": 0}, "total_steps is 0"),
        ({"reg": -1.0}, r"reg is -1\.0"),
        ({"reg": float("nan")}, "reg is nan"),
        ({"reg": "x"}, "reg is 'x'"),
        ({"temp": 0.0}, r"temp is 0\.0"),
        ({"group_optimizer_lr": 0.0}, "group_optimizer_lr is"),
        ({"second_order": "exakt"}, "second_order is 'exakt'; expected one of exact, none, original"),
        ({"layers": lambda name, conv: False}, "no layer to group"),
        ({"layers": ["conv1"]}, r"layers is a list; it must be a function \(name, conv\) -> bool"),
        ({"generator": 3}, "generator is a int; it must be a torch.Generator"),
    ],
)
def test_invalid_settings_leave_the_model_unchanged(settings: dict[str, Any], message: str) -> None:
    model = ToyA()
    with pytest.raises(DSPPruningError, match=message):
        Setup(model=model, **settings)
    assert not any(hasattr(module, "group") for module in model.modules())


def test_swapped_arguments_are_named() -> None:
    model = ToyA()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for arguments, message in (
        ((optimizer, model, F.cross_entropy), r"model is a SGD; it must be an nn\.Module"),
        ((model, F.cross_entropy, optimizer), "optimizer is a function; it must be a torch optimizer"),
        ((model, optimizer, None), "criterion is a NoneType; it must be a function"),
    ):
        with pytest.raises(DSPPruningError, match=message):
            GroupWrapper(*arguments, 0.1, 10, 2, 0.5)  # type: ignore[arg-type]


def test_a_layer_that_the_optimizer_does_not_hold() -> None:
    model = ToyA()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p is not model.conv2.weight], lr=0.1)
    with pytest.raises(DSPPruningError, match="does not hold the weight of layer 'conv2'"):
        GroupWrapper(model, optimizer, F.cross_entropy, 0.1, 10, 3, 0.5)
    others = lambda name, conv: name in ("conv1", "conv3")  # noqa: E731
    GroupWrapper(model, optimizer, F.cross_entropy, 0.1, 10, 3, 0.5, layers=others)


class Subclass(torch.optim.SGD):
    pass


class Around:
    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.LBFGS(p),
        lambda p: Subclass(p, lr=0.1),
        lambda p: Around(torch.optim.SGD(p, lr=0.1)),
    ],
    ids=["closure", "subclass", "wrapper"],
)
def test_other_optimizers_work_without_look_ahead(make: Callable[[Any], Any]) -> None:
    model = ToyA()
    with pytest.raises(DSPPruningError, match=r"cannot step .*closure.*supported are SGD, Adam"):
        GroupWrapper(model, make(model.parameters()), F.cross_entropy, 0.1, 10, 3, 0.5)
    optimizer = make(model.parameters())
    learner = GroupWrapper(model, optimizer, F.cross_entropy, 0.1, 10, 3, 0.5, second_order="none")
    before = model.conv1.weight.detach().clone()
    learner.initialize()
    learner.after_step(None, None)
    assert not torch.equal(before, model.conv1.weight)


@pytest.mark.parametrize("present", [torch.zeros(4, 12), torch.zeros(12), "text"])
def test_existing_logits_of_another_shape(present: object) -> None:
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
def test_steps_must_be_a_count(value: Any) -> None:
    setup = Setup()
    with pytest.raises(DSPPruningError, match="steps is"):
        setup.learner.steps = value


def test_noise_must_fit_the_layers() -> None:
    setup = Setup()
    noise = {name: torch.zeros_like(setup.model.get_submodule(name).group) for name in LAYERS}
    with pytest.raises(DSPPruningError, match=r"missing \['conv3'\], unknown \['conv9'\]"):
        setup.learner.initialize({"conv1": noise["conv1"], "conv2": noise["conv2"], "conv9": noise["conv3"]})
    with pytest.raises(DSPShapeError, match=r"layer 'conv1' has shape \(2, 12\); it must be \(3, 12\)"):
        setup.learner.initialize(noise | {"conv1": torch.zeros(2, 12)})


def test_micro_batches_must_pair() -> None:
    setup = Setup()
    setup.forward_and_step()
    with pytest.raises(DSPPruningError, match="list of 2 micro-batches and y is a list of 1"):
        setup.learner.after_step([setup.x, setup.x], [setup.y])
    with pytest.raises(DSPPruningError, match="y is a Tensor"):
        setup.learner.after_step([setup.x], setup.y)
    setup.learner.after_step(setup.x, setup.y)  # the step can still be finished


def test_tensors_replaced_after_wrapping() -> None:
    setup = Setup()
    setup.model.load_state_dict({k: v.clone() for k, v in setup.model.state_dict().items()}, assign=True)
    with pytest.raises(DSPPruningError, match="weight or group tensor of layer 'conv1' was replaced"):
        setup.learner.initialize()


@pytest.mark.parametrize(
    ("tensor", "value", "message"),
    [
        (lambda setup: setup.model.conv2.weight.data, torch.inf, "the weight of layer 'conv2'"),
        (lambda setup: setup.model.conv3.group.data, torch.nan, "the logits of layer 'conv3'"),
        (lambda setup: setup.x, torch.nan, "the loss of the look-ahead"),
    ],
)
def test_values_that_are_not_finite(tensor: Callable[[Setup], Tensor], value: float, message: str) -> None:
    setup = Setup()
    setup.step()
    setup.forward_and_step()
    tensor(setup)[0, 0] = value
    if "logits" in message:
        setup.learner.initialize()
    before = everything(setup)
    with pytest.raises(DSPTrainingError, match=f"{message} is NaN or infinite at step 1"):
        setup.learner.after_step(setup.x, setup.y)
    after = everything(setup)
    for key, value in before.items():  # what was infinite may have become a NaN
        assert torch.equal(value.nan_to_num(7, 7, 7), after[key].nan_to_num(7, 7, 7)), key


@pytest.mark.parametrize("late", [False, True])
def test_without_look_ahead_a_nan_loss_is_found_in_the_weights(
    late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = Setup(second_order="none")
    setup.x[0] = float("nan")
    setup.forward_and_step()
    if late:  # as on a GPU, whose answer arrives some steps later
        monkeypatch.setattr(NonFiniteFlag, "seen", lambda self: False)
        setup.learner.after_step(setup.x, setup.y)
    with pytest.raises(DSPTrainingError, match="layer 'conv1' is NaN or infinite at step 0"):
        setup.learner.stats() if late else setup.learner.after_step(setup.x, setup.y)
