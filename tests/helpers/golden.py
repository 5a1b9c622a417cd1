"""The six released networks, their golden numbers, and the images that these were computed on."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

RELEASED = [f"resnet{depth}_g{groups}" for depth in (20, 56) for groups in (2, 3, 4)]
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def cifar_images(shared: Path, part: str = "test", dtype: torch.dtype = torch.float32) -> Tensor:
    """(batch, 3, 32, 32): images of the CIFAR-10 subset, normalised."""
    pixels = torch.from_numpy(np.load(shared / "data" / "cifar10_subset.npz")[f"{part}_images"]).to(dtype)
    mean, std = (torch.tensor(values, dtype=dtype).view(3, 1, 1) for values in (MEAN, STD))
    return (pixels / 255 - mean) / std


def golden_labels(shared: Path) -> Tensor:
    """The classes of the test images."""
    return torch.from_numpy(np.load(shared / "data" / "cifar10_subset.npz")["test_labels"])


def golden_logits(shared: Path, name: str) -> tuple[Tensor, int]:
    """The logits of all test images in float32, and how many of these are classified right."""
    golden = np.load(shared / "golden" / "logits.npz")
    correct = golden["correct1017"][list(golden["names"]).index(name)]
    return torch.from_numpy(golden[f"{name}_all"]), int(correct)


def golden_counts(shared: Path, name: str) -> dict[str, Any]:
    return json.loads((shared / "golden" / "structures.json").read_text())[name]["totals"]
