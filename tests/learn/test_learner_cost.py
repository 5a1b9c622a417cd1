"""What a step costs: how many operations it dispatches, and that the host waits for none of them."""

from __future__ import annotations

import collections

import pytest
import torch
import torch.nn.functional as F
from learning_setup import Setup
from torch.utils._python_dispatch import TorchDispatchMode

from dsp_kernels.errors import DSPTrainingError
from dsp_pruning.models import cifar_resnet

# On a GPU each of these makes the host wait for a value or a size.
WAITING = ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal.default", "masked_select", "unique")


class Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))

    def waits(self) -> list[str]:
        return [name for name in self.seen if any(word in name for word in WAITING)]


@pytest.mark.parametrize(("mode", "most"), [("none", 600), ("exact", 1200)])
@pytest.mark.parametrize("depth", [20, 56])
def test_operations_of_a_resnet(depth: int, mode: str, most: int) -> None:
    setup = Setup(model=cifar_resnet(depth), n_groups=4, second_order=mode)
    setup.step()
    with Watch() as before:
        setup.learner.initialize()
    setup.optimizer.zero_grad()
    F.cross_entropy(setup.model(setup.x), setup.y).backward()
    setup.optimizer.step()
    with Watch() as after:
        setup.learner.after_step(setup.x, setup.y)
    assert 100 < before.seen.total() + after.seen.total() <= most


@pytest.mark.parametrize("mode", ["none", "exact", "original"])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_host_never_waits(mode: str, scaled: bool) -> None:
    setup = Setup("adam-fused", second_order=mode)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if scaled else None
    for _ in range(2):
        with Watch() as before:
            setup.learner.initialize()
        setup.optimizer.zero_grad()
        loss = F.cross_entropy(setup.model(setup.x), setup.y)
        (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is None:
            setup.optimizer.step()
        else:
            scaler.step(setup.optimizer)
        with Watch() as after:
            setup.learner.after_step(setup.x, setup.y, scaler=scaler)
        if scaler is not None:
            scaler.update()
        assert before.waits() == after.waits() == []
    with Watch() as stats:
        setup.learner.stats()
    assert stats.waits()  # so the test would see it


def test_what_a_captured_step_reads_keeps_its_memory() -> None:
    setup = Setup()
    setup.step()

    def addresses() -> list[int]:
        held = [tensor for b in setup.learner._buckets for tensor in (b.prob, b.strength, b.scale)]
        state = [value for entry in setup.learner._group_optimizer.state.values() for value in entry.values()]
        return [tensor.data_ptr() for tensor in (*held, *state, *setup.model.parameters())]

    before = addresses()
    setup.step()
    assert addresses() == before


def test_stats_sees_what_the_host_has_not_read() -> None:
    setup = Setup(second_order="none")
    setup.step()
    setup.learner._not_finite.note(torch.tensor(True))
    setup.learner._not_finite._view = None  # as if the answer were still on its way
    with pytest.raises(DSPTrainingError, match="the logit gradient is NaN or infinite at step 0"):
        setup.learner.stats()
