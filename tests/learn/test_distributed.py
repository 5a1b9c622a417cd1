"""Helpers for several processes: with none, and with two real ones of a gloo group."""

from __future__ import annotations

import pytest
import torch
from distributed_helpers import finish, start, tail
from torch import nn

from dsp_kernels.errors import DSPTrainingError
from dsp_pruning import distributed


def test_alone_nothing_happens() -> None:
    value = torch.tensor([1.0, 2.0])
    with distributed.process_group() as device:
        assert device is None
        distributed.broadcast_tensors([value])
        distributed.all_reduce_mean([value])
        distributed.all_reduce_max(value)
        distributed.barrier()
        assert distributed.broadcast_object("x") == "x"
        assert (distributed.any_rank(True), distributed.any_rank(False)) == (True, False)
    assert value.tolist() == [1.0, 2.0]
    assert (distributed.rank(), distributed.world_size(), distributed.local_rank()) == (0, 1, 0)
    assert distributed.is_main()


def test_half_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(DSPTrainingError, match=r"MASTER_ADDR.*torchrun"), distributed.process_group():
        pass


def test_the_network_itself() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    assert distributed.unwrap(model) is model
    assert distributed.unwrap(torch.compile(nn.DataParallel(model))) is model


def test_two_processes() -> None:
    for status, output in finish(start("distributed_worker.py", 2)):
        assert status == 0, tail(output)
        assert output.endswith("ok\n"), tail(output)
