"""Learn groups as one process, or as one of two: argv = what to do, folder for the results.

"learn": three steps of a net without batch norm and of ToyA, rank r on the r-th half of every batch, in the
modes none and exact; then a step in which one process alone overflows, and every helper of
``dsp_pruning.distributed``. "die": rank 1 is killed in between.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from nets import ToyA
from torch import Tensor, nn

from dsp_pruning import distributed
from dsp_pruning.learn.wrapper import GroupWrapper

STEPS = 3


def without_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(12, 12, 3, padding=1),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(48, 10),
    ).double()


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(9)
    return [
        (
            torch.randn(8, 3, 12, 12, generator=generator).double(),
            torch.randint(10, (8,), generator=generator),
        )
        for _ in range(STEPS)
    ]


def mine(value: Tensor) -> Tensor:
    return value.chunk(distributed.world_size())[distributed.rank()]


def learner_of(make: Callable[[], nn.Module], mode: str) -> tuple[nn.Module, Any, GroupWrapper, nn.Module]:
    torch.manual_seed(0)
    network = make().train()
    model = nn.parallel.DistributedDataParallel(network) if distributed.is_distributed() else network
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    # Every process has another generator; rank 0's is used by all.
    generator = torch.Generator().manual_seed(distributed.rank())
    learner = GroupWrapper(
        model, optimizer, F.cross_entropy, 0.05, STEPS, 3, 0.5, second_order=mode, generator=generator
    )
    return model, optimizer, learner, network


def learn(make: Callable[[], nn.Module], mode: str) -> dict[str, Tensor]:
    model, optimizer, learner, network = learner_of(make, mode)
    for x, y in batches():
        x, y = mine(x), mine(y)
        learner.initialize()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        learner.after_step(x, y)
    return network.state_dict()


def overflow_on_one(mode: str) -> dict[str, Any]:
    """The processes train alone (no DDP), so that an infinite gradient stays with rank 1."""
    torch.manual_seed(0)
    network = without_norm().float().train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    learner = GroupWrapper(network, optimizer, F.cross_entropy, 0.05, STEPS, 3, 0.5, second_order=mode)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    x, y = torch.ones(2, 3, 12, 12), torch.zeros(2, dtype=torch.long)
    learner.initialize()
    scaler.scale(F.cross_entropy(network(x), y)).backward()
    if distributed.rank() == 1:
        network[0].weight.grad[0] = float("inf")
    scaler.step(optimizer)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    learner.after_step(x, y, False, scaler)
    after = network.state_dict()
    return {
        "held": all(torch.equal(value, after[name]) for name, value in before.items()),
        "skipped": learner.stats()["skipped_steps"],
    }


def helpers() -> dict[str, Any]:
    rank = distributed.rank()
    shared = [
        torch.full((2, 3), float(rank)),
        torch.full((4,), float(rank), dtype=torch.float64),
        torch.full((3, 2), float(rank)).T,
    ]
    distributed.broadcast_tensors(shared, source=1)
    values = [torch.arange(3.0) + rank, torch.tensor(10.0 * rank)]
    distributed.all_reduce_mean(values)
    largest = torch.tensor(float(rank))
    distributed.all_reduce_max(largest)
    distributed.barrier()
    network = nn.Linear(2, 2)
    return {
        "world": (distributed.world_size(), rank, distributed.local_rank(), distributed.is_main()),
        "broadcast from 1": shared,
        "mean": values,
        "max": largest,
        "any": (distributed.any_rank(rank == 1), distributed.any_rank(False)),
        "unwrapped": distributed.unwrap(nn.parallel.DistributedDataParallel(network)) is network,
    }


def die() -> None:
    model, optimizer, learner, _ = learner_of(without_norm, "exact")
    for number in range(1000):
        if number == 2 and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        x, y = mine(batches()[0][0]), mine(batches()[0][1])
        learner.initialize()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        learner.after_step(x, y)


def main() -> None:
    with distributed.process_group(20.0, backend="gloo") as device:
        if sys.argv[1] == "die":
            die()
            return
        found: dict[str, Any] = {}
        for mode in ("none", "exact"):
            found[f"plain/{mode}"] = learn(without_norm, mode)
            found[f"norm/{mode}"] = learn(lambda: ToyA().double(), mode)
            if distributed.is_distributed():
                found[f"overflow/{mode}"] = overflow_on_one(mode)
        name = f"{distributed.world_size()}-{distributed.rank()}.pt"
        if distributed.is_distributed():
            assert device == torch.device("cpu")
            found["helpers"] = helpers()
            # gloo's threads still have tensors to free when the processes leave the group.
            for _ in range(300):
                dist.all_reduce(torch.ones(20_000), async_op=True)
        torch.save(found, Path(sys.argv[2]) / name)
    assert not distributed.is_distributed()


if __name__ == "__main__":
    main()
