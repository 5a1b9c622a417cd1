"""One of two processes that use every helper of dsp_pruning.distributed; prints "ok" at the end."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from dsp_pruning import distributed

with distributed.process_group(30.0, backend="gloo") as device:
    assert device == torch.device("cpu")
    rank = distributed.rank()
    assert distributed.is_distributed()
    assert (distributed.world_size(), distributed.local_rank()) == (2, rank)
    assert distributed.is_main() == (rank == 0)
    assert distributed.broadcast_object({"from": rank}) == {"from": 0}
    assert distributed.broadcast_object(rank, source=1) == 1

    mixed = [torch.full((2, 3), float(rank)), torch.full((4,), float(rank), dtype=torch.float64)]
    strided = torch.full((3, 2), float(rank)).T
    distributed.broadcast_tensors([*mixed, strided], source=1)
    assert all((tensor == 1).all() for tensor in (*mixed, strided))

    values = [torch.arange(3.0) + rank, torch.tensor(10.0 * rank)]
    distributed.all_reduce_mean(values)
    assert values[0].tolist() == [0.5, 1.5, 2.5]
    assert values[1].item() == 5.0

    flag = torch.tensor(float(rank))
    distributed.all_reduce_max(flag)
    assert flag.item() == 1.0
    assert distributed.any_rank(rank == 1)
    assert not distributed.any_rank(False)
    distributed.barrier()
    inner = nn.Linear(2, 2)
    model = nn.parallel.DistributedDataParallel(inner)
    assert distributed.unwrap(model) is inner
    # Leaving while gloo's threads still have tensors to free must not end in SIGABRT.
    model(torch.ones(1, 2)).sum().backward()
    for _ in range(300):
        dist.all_reduce(torch.ones(20_000), async_op=True)
assert not distributed.is_distributed()
print("ok")
