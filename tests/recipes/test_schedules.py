"""How the learning rate moves."""

from __future__ import annotations

import pytest

from dsp_pruning.recipes.schedules import cosine, multi_step


def test_multi_step_follows_the_published_schedule() -> None:
    factor = multi_step(164, warmup_epochs=2)
    rates = [0.1 * factor(epoch) for epoch in range(164)]
    expected = [0.025] * 2 + [0.1] * 80 + [0.01] * 41 + [0.001] * 41
    assert rates == pytest.approx(expected)


def test_cosine_starts_again_in_each_cycle() -> None:
    factor = cosine(400, cycles=5)
    assert [factor(epoch) for epoch in (0, 80, 160, 240, 320)] == [1.0] * 5
    assert factor(40) == pytest.approx(0.5)
    assert factor(79) < 0.001
    falling = [factor(epoch) for epoch in range(80)]
    assert falling == sorted(falling, reverse=True)
