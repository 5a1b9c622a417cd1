"""The released networks as their authors run them: one branch per group.

Each branch gathers its channels, convolves and normalises. The branches of a block's first convolution are
concatenated, those of its second are added into the block's identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ReleasedNetwork"]

Arrays = Mapping[str, "np.ndarray[Any, Any]"]


class ReleasedNetwork(nn.Module):
    """x: (batch, 3, 32, 32) -> logits: (batch, classes), in eval mode.

    arrays, meta: as ``dsp_pruning.released.arrays.read_released_arrays`` gives them.
    """

    def __init__(self, arrays: Arrays, meta: Mapping[str, Any]) -> None:
        super().__init__()
        eps = float(meta["bn_eps"])
        self.conv = _conv(arrays["stem.conv.weight"], 1)
        self.bn = _batch_norm(arrays, "stem.bn", eps)
        self.blocks = nn.Sequential(*(_Block(arrays, block, eps) for block in meta["blocks"]))
        self.classifier = nn.Linear(*reversed(arrays["classifier.weight"].shape))
        _fill(self.classifier, arrays, "classifier")
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Stem, blocks, global average pool, classifier."""
        x = self.blocks(F.relu(self.bn(self.conv(x))))
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class _Block(nn.Module):
    def __init__(self, arrays: Arrays, block: Mapping[str, Any], eps: float) -> None:
        super().__init__()
        name, stride = block["name"], int(block["stride"])
        self.branches_a = nn.ModuleList(
            _Branch(arrays, f"{name}.conv_a.{g}", stride, eps, relu=True) for g in range(block["groups_a"])
        )
        self.branches_b = nn.ModuleList(
            _Branch(arrays, f"{name}.conv_b.{g}", 1, eps, relu=False) for g in range(block["groups_b"])
        )
        for g in range(block["groups_b"]):
            self.register_buffer(f"out_index_{g}", _index(arrays[f"{name}.conv_b.{g}.out_index"]))
        self.downsample = nn.Identity() if not block["downsample"] else _shortcut(arrays, name, stride, eps)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.cat([branch(x) for branch in self.branches_a], 1)
        outer = [branch(inner) for branch in self.branches_b]
        result = self.downsample(x)
        for g, branch in enumerate(outer):
            # In place: this is the last use of the identity.
            result.index_add_(1, self.get_buffer(f"out_index_{g}"), branch)
        return F.relu(result)


class _Branch(nn.Module):
    index: Tensor

    def __init__(self, arrays: Arrays, name: str, stride: int, eps: float, *, relu: bool) -> None:
        super().__init__()
        self.register_buffer("index", _index(arrays[f"{name}.in_index"]).view(1, -1, 1, 1))
        self.conv = _conv(arrays[f"{name}.weight"], stride)
        self.bn = _batch_norm(arrays, f"{name}.bn", eps)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(torch.take_along_dim(x, self.index, 1)))
        return F.relu(y) if self.relu else y


def _shortcut(arrays: Arrays, name: str, stride: int, eps: float) -> nn.Sequential:
    prefix = f"{name}.downsample"
    return nn.Sequential(
        _conv(arrays[f"{prefix}.conv.weight"], stride), _batch_norm(arrays, f"{prefix}.bn", eps)
    )


def _conv(weight: np.ndarray[Any, Any], stride: int) -> nn.Conv2d:
    filters, channels, height, width = weight.shape
    padding = (height // 2, width // 2)
    conv = nn.Conv2d(channels, filters, (height, width), stride=stride, padding=padding, bias=False)
    _copy(conv.weight, weight)
    return conv


def _batch_norm(arrays: Arrays, name: str, eps: float) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(len(arrays[f"{name}.weight"]), eps=eps)
    _fill(norm, arrays, name)
    return norm


def _fill(module: nn.Module, arrays: Arrays, name: str) -> None:
    for key, tensor in module.state_dict().items():
        if key != "num_batches_tracked":
            _copy(tensor, arrays[f"{name}.{key}"])


def _copy(tensor: Tensor, array: np.ndarray[Any, Any]) -> None:
    with torch.no_grad():
        tensor.copy_(torch.from_numpy(array))


def _index(array: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(array.astype(np.int64))
