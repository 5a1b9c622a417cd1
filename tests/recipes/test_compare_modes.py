"""``scripts/evidence/compare_modes.py``: equal pruned FLOPs, resuming, and its images."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from recipe_cases import interrupt_at

from dsp_kernels.errors import DSPTrainingError
from dsp_pruning.data import ImageData
from dsp_pruning.recipes.checkpoint import load_weights

sys.path.append(str(Path(__file__).parents[2] / "scripts" / "evidence"))
import compare_modes


def test_every_variant_is_pruned_alike_and_an_interrupted_comparison_resumes(
    data: ImageData, tmp_path: Path
) -> None:
    config = compare_modes.CompareConfig(
        depth=8, batch_size=16, dense_epochs=1, learn_epochs=1, finetune_epochs=1, groups=2
    )
    with pytest.raises(KeyboardInterrupt):
        compare_modes.compare(
            data, config, tmp_path, lambda name: interrupt_at(1 if name.startswith("contiguous") else -1)
        )
    steps: list[int] = []
    rows = compare_modes.compare(
        data, config, tmp_path, lambda name: lambda done, total, text: steps.append(done)
    )
    assert len(steps) == 4 * 3  # three steps each: two variants, learned and finetuned
    assert [row["variant"] for row in rows] == list(compare_modes.VARIANTS)
    assert all(60 <= row["pruned_flops"] < 64 for row in rows)
    fixed, _ = load_weights(tmp_path / "contiguous_seed0" / "finetune" / "model.pt")
    assert fixed["stage_1.0.conv_a.group"].argmax(0).tolist() == [0] * 8 + [1] * 8
    table = (tmp_path / compare_modes.TABLE).read_text()
    assert all(f"| {variant.label} | 0 |" in table for variant in compare_modes.VARIANTS.values())
    with pytest.raises(DSPTrainingError, match="other settings"):
        compare_modes.compare(data, replace(config, prune=0.5), tmp_path)


def test_jpeg_images_are_those_of_cifar10(shared: Path) -> None:
    """Every test cat of the lossless subset is among the JPEG ones, in its own colours."""
    cat = 3
    with np.load(shared / "data" / "cifar10_jpeg.npz") as archive:
        cats = torch.from_numpy(np.flatnonzero(archive["test_labels"] == cat))
        decoded = compare_modes.decode(archive, "test", cats)
    assert decoded.labels.tolist() == [cat] * 1000
    with np.load(shared / "data" / "cifar10_subset.npz") as archive:
        original = torch.from_numpy(archive["test_images"][archive["test_labels"] == cat])
    distance = torch.cdist(original.float().flatten(1), decoded.images.float().flatten(1)).min(1).values
    # Root mean square in grey levels: 7.7 on average; swapped colours give 28, mirrored images 48.
    assert float(distance.mean()) / 3072**0.5 < 10
