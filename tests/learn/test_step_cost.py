"""The cost of a step: the number of dispatched operations, and that the host waits for none of them."""

import collections

import pytest
import torch
import torch.nn.functional as F
from learning_setup import LAYERS, MODES, Setup
from nets import ToyA
from torch.utils._python_dispatch import TorchDispatchMode

from dsp_pruning.layers import select_layers
from dsp_pruning.learn.buckets import attach_layers, make_buckets
from dsp_pruning.models import cifar_resnet

# On a GPU the host waits for a value or a size in each of these.
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
def test_operations_of_a_resnet56(mode: str, most: int) -> None:
    setup = Setup(model=cifar_resnet(56), n_groups=4, second_order=mode)
    setup.step()
    with Watch() as before:
        setup.learner.initialize()
    setup.optimizer.zero_grad()
    F.cross_entropy(setup.model(setup.x), setup.y).backward()
    setup.optimizer.step()
    with Watch() as after:
        setup.learner.after_step(setup.x, setup.y)
    assert 100 < before.seen.total() + after.seen.total() <= most


@pytest.mark.parametrize("mode", MODES)
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
    assert stats.waits()  # the watcher would see it


def test_buckets_reuse_the_memory_that_a_captured_step_reads() -> None:
    model = ToyA()
    counts, optimizer = dict.fromkeys(LAYERS, 3), torch.optim.SGD(model.parameters(), lr=0.1)
    for bucket in make_buckets(attach_layers(select_layers(model), counts, optimizer, torch.Generator())):
        addresses = []
        for value in (0.0, 1.0):
            bucket.start(torch.full(bucket.shape, value), 0.5, value)
            tensors = (bucket.prob, bucket.scale, bucket.strength)
            addresses.append([tensor.data_ptr() for tensor in tensors])
        assert addresses[0] == addresses[1]
