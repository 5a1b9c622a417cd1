"""Trajectories of group learning against an independent implementation, in float64 and mode "original"."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import cifar_images
from nets import ToyA
from torch import Tensor, nn

from dsp_pruning.learn.penalty import hard_assignment
from dsp_pruning.learn.wrapper import GroupWrapper
from dsp_pruning.models.cifar import cifar_resnet

# Two independent implementations agreed to 2e-14 and 8e-15.
WEIGHTS, LOGITS, BY_NORM = 1e-12, 1e-10, 1e-10
CLEAR_MARGIN = 1e-9  # between the two largest logits; below it rounding decides the group


class Golden:
    """One learn_*.npz with its inputs."""

    def __init__(self, shared: Path, tag: str, inputs: str | None = None) -> None:
        self.arrays = dict(np.load(shared / "golden" / f"{tag}.npz"))
        self.meta: dict[str, Any] = json.loads(str(self.arrays["meta"]))
        loaded = np.load(shared / "golden" / (inputs or self.meta["inputs"]))
        if "x" in loaded:
            self.x = torch.from_numpy(loaded["x"]).double()
        else:
            self.x = cifar_images(shared, "train", torch.float64)[loaded["train_index"]]
        self.y = torch.from_numpy(loaded["y"])

    def __getitem__(self, key: str) -> Tensor:
        return torch.from_numpy(np.asarray(self.arrays[key]))

    def under(self, prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): self[key] for key in self.arrays if key.startswith(prefix)}


def replay(golden: Golden, model: nn.Module) -> Iterator[tuple[int, GroupWrapper, torch.optim.SGD, float]]:
    """Train as the file did, with its noise; yields after every step."""
    meta = golden.meta
    model.double().load_state_dict(golden.under("init/"))
    model.train()
    settings = {name: meta[name] for name in ("momentum", "weight_decay", "nesterov")}
    optimizer = torch.optim.SGD(model.parameters(), lr=meta["lrs"][0], **settings)
    numbers = [meta[name] for name in ("reg", "total_steps", "n_groups", "temperature")]
    rate = meta["group_optimizer"]["lr"]
    learner = GroupWrapper(model, optimizer, F.cross_entropy, *numbers, rate, second_order="original")
    learner.steps = meta["first_step"]
    for layer, logits in golden.under("logits0/").items():
        model.get_submodule(layer).group.copy_(logits)
    for step in range(meta["n_steps"]):
        optimizer.param_groups[0]["lr"] = meta["lrs"][step]
        learner.initialize({layer: golden[f"step{step}/{layer}/gumbel"] for layer in meta["layers"]})
        optimizer.zero_grad()
        loss = F.cross_entropy(learner(golden.x[step]), golden.y[step])
        loss.backward()
        optimizer.step()
        learner.after_step(golden.x[step], golden.y[step])
        yield step, learner, optimizer, loss.item()


def largest_difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    return max((float((found[key] - value).abs().max()) for key, value in wanted.items()), default=0.0)


def full_and_reduced(wanted: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    reduced = {key: value for key, value in wanted.items() if key.endswith(("__norm", "__sum"))}
    return {key: value for key, value in wanted.items() if key not in reduced}, reduced


def check_step(golden: Golden, step: int, model: nn.Module, optimizer: torch.optim.SGD) -> None:
    prefix, state = f"step{step}/", model.state_dict()
    assert golden.under(f"{prefix}final/")
    final, final_reduced = full_and_reduced(golden.under(f"{prefix}final/"))
    assert largest_difference(state, final) <= WEIGHTS
    momentum, momentum_reduced = full_and_reduced(golden.under(f"{prefix}momentum/"))
    buffers = {
        name: optimizer.state[parameter]["momentum_buffer"]
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
    }
    assert largest_difference(buffers, momentum) <= WEIGHTS
    for found, wanted in ((state, final_reduced), (buffers, momentum_reduced)):
        for key, value in wanted.items():
            name, reduction = key.rsplit("__", 1)
            values = found[name].double()
            number = values.norm() if reduction == "norm" else values.sum()
            assert float(number) == pytest.approx(float(value), rel=BY_NORM, abs=BY_NORM), key
    for layer in golden.meta["layers"]:
        logits = model.get_submodule(layer).group
        assert float((logits - golden[f"{prefix}{layer}/logits_after"]).abs().max()) <= LOGITS, layer
        clear = golden[f"{prefix}{layer}/hard_margin"] > CLEAR_MARGIN
        hard = hard_assignment(logits).argmax(0)
        assert torch.equal(hard[clear], golden[f"{prefix}{layer}/hard"].long()[clear]), layer


@pytest.mark.shared
@pytest.mark.parametrize("tag", ["learn_toyA", "learn_resnet20"])
def test_every_step_equals_the_golden_trajectory(shared: Path, tag: str) -> None:
    golden = Golden(shared, tag)
    model = ToyA() if tag == "learn_toyA" else cifar_resnet(20)
    for step, learner, optimizer, loss in replay(golden, model):
        assert loss == pytest.approx(float(golden[f"step{step}/loss"]), abs=WEIGHTS)
        assert learner.stats()["ramp"] == pytest.approx(float(golden[f"step{step}/ramp"]), abs=1e-15)
        check_step(golden, step, model, optimizer)


@pytest.mark.shared
def test_momentum_is_not_shared_with_the_look_ahead(shared: Path) -> None:
    """A trajectory with that fault agrees with a correct one at step 0 only."""
    right, fault = (
        Golden(shared, "learn_toyA"),
        Golden(shared, "learn_toyA_SHARED_MOMENTUM_BUG", "learn_toyA_inputs.npz"),
    )
    model = ToyA()
    for step, *_ in replay(right, model):
        difference = largest_difference(model.state_dict(), fault.under(f"step{step}/final/"))
        if step == 0:
            assert difference <= WEIGHTS
        else:
            assert difference > 1e-3, step
