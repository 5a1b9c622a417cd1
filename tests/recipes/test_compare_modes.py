"""The comparison of learned groups with their rivals: equal pruned FLOPs, and it goes on where it stopped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dsp_kernels.errors import DSPTrainingError
from dsp_pruning.data import ImageData
from dsp_pruning.recipes.checkpoint import load_weights
from dsp_pruning.recipes.compare_modes import TABLE, VARIANTS, CompareConfig, compare


def test_every_variant_is_pruned_alike_and_a_stopped_comparison_goes_on(
    data: ImageData, tmp_path: Path
) -> None:
    config = CompareConfig(
        depth=8, batch_size=16, dense_epochs=1, learn_epochs=1, finetune_epochs=1, groups=2
    )

    def stop(done: int, total: int, text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(data, config, tmp_path, lambda name: stop if name == "contiguous, seed 0: learn" else None)
    started: list[int] = []
    rows = compare(data, config, tmp_path, lambda name: lambda done, total, text: started.append(done))
    assert len(started) == 4 * 3  # only the stages that were not done: two variants, learned and finetuned
    assert [row["variant"] for row in rows] == list(VARIANTS)
    assert all(60 <= row["pruned_flops"] < 64 for row in rows)
    fixed, _ = load_weights(tmp_path / "contiguous_seed0" / "finetune" / "model.pt")
    groups = fixed["stage_1.0.conv_a.group"].argmax(0).tolist()
    assert groups == [0] * 8 + [1] * 8
    table = (tmp_path / TABLE).read_text()
    assert all(f"| {variant.label} | 0 |" in table for variant in VARIANTS.values())
    with pytest.raises(DSPTrainingError, match="other settings"):
        compare(data, replace(config, prune=0.5), tmp_path)
