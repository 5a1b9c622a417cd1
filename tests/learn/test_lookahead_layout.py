"""The look-ahead converts images to channels_last if the network supports it, and falls back silently."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from learning_setup import Setup
from torch import Tensor, nn

from dsp_pruning.learn.lookahead import LookAhead, look_ahead


def test_an_error_of_the_network_itself_is_raised() -> None:
    setup = Setup()
    setup.forward_and_step()
    with pytest.raises(RuntimeError, match=r"size|shape"):
        setup.learner.after_step(setup.x[:, :2], setup.y)
    assert setup.model.conv2.weight.is_contiguous()


class Picky(nn.Module):
    """Records the memory format of its input, and may raise its own error about it."""

    def __init__(self, refuses: bool) -> None:
        super().__init__()
        self.refuses = refuses
        self.seen: list[bool] = []
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.is_contiguous())
        if self.refuses and not self.seen[-1]:
            raise ValueError("my kernels read channels first")
        if len(x) > 8:
            raise RuntimeError("too many images")
        return self.fc(self.conv(x).relu().mean((2, 3)))


def ahead(model: Picky, x: Tensor) -> LookAhead:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    y = torch.zeros(len(x), dtype=torch.long)
    return look_ahead(
        model, optimizer, F.cross_entropy, {model.conv.weight: model.conv.weight}, [(x, y)], reorder=True
    )


@pytest.mark.parametrize("refuses", [True, False])
def test_any_error_about_the_memory_format_falls_back(refuses: bool) -> None:
    model, x = Picky(refuses), torch.randn(4, 3, 8, 8)
    found = ahead(model, x)
    assert found.refused == refuses
    assert model.seen == ([False, True] if refuses else [False])
    expected = F.cross_entropy(model(x), torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(found.loss, expected.detach())


def test_the_learner_tries_channels_last_once() -> None:
    model = Picky(refuses=True)
    setup = Setup(model=model, layers=lambda name, conv: True, example_input=torch.zeros(1, 3, 16, 16))
    seen = []
    for _ in range(3):
        setup.forward_and_step()
        model.seen.clear()
        setup.learner.after_step(setup.x, setup.y)
        seen.append(list(model.seen))
    assert seen == [[False, True], [True], [True]]


def test_an_error_has_no_context() -> None:
    """A chained error about a memory format that the caller did not choose would mislead."""
    model = Picky(refuses=True)
    with pytest.raises(RuntimeError, match="too many images") as caught:
        ahead(model, torch.randn(9, 3, 8, 8))
    assert caught.value.__context__ is None
    assert model.seen == [False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["channels-last-already", "float64"])
def test_nothing_runs_twice_in_the_same_memory_format(dtype: torch.dtype) -> None:
    model = Picky(refuses=False).to(dtype)
    x = torch.randn(9, 3, 8, 8, dtype=dtype)
    if dtype == torch.float32:
        x = x.contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="too many images"):
        ahead(model, x)
    assert len(model.seen) == 1
