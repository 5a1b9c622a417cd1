"""The released networks as their authors run them: one branch per group.

Each branch gathers its channels, convolves and normalises. The branches of a block's first convolution are
concatenated, those of its second are added into the block's identity.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Arrays = Mapping[str, "np.ndarray[Any, Any]"]


class ReleasedNetwork(nn.Module):
    """x: (batch, 3, 32, 32) -> logits: (batch, classes), in eval mode.

    arrays, meta: as ``dsp_pruning.released.arrays.read_released_arrays`` returns them.
    """

    def __init__(self, arrays: Arrays, meta: Mapping[str, Any]) -> None:
        super().__init__()
        eps = float(meta["bn_eps"])
        self.stem = _conv_norm(arrays, "stem.conv", "stem.bn", eps)
        self.blocks = nn.Sequential(*(_Block(arrays, block, eps) for block in meta["blocks"]))
        self.classifier = nn.Linear(*reversed(arrays["classifier.weight"].shape))
        _copy(self.classifier, arrays, "classifier")
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Stem, blocks, global average pool, classifier."""
        x = self.blocks(F.relu(self.stem(x)))
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class _Block(nn.Module):
    def __init__(self, arrays: Arrays, block: Mapping[str, Any], eps: float) -> None:
        super().__init__()
        name, stride = block["name"], int(block["stride"])
        self.branches_a = nn.ModuleList(
            _Branch(arrays, f"{name}.conv_a.{g}", eps, stride) for g in range(block["groups_a"])
        )
        self.branches_b = nn.ModuleList(
            _Branch(arrays, f"{name}.conv_b.{g}", eps) for g in range(block["groups_b"])
        )
        for g in range(block["groups_b"]):
            self.register_buffer(f"out_index_{g}", _index(arrays, f"{name}.conv_b.{g}.out_index"))
        self.downsample: nn.Module = nn.Identity()
        if block["downsample"]:
            self.downsample = _conv_norm(
                arrays, f"{name}.downsample.conv", f"{name}.downsample.bn", eps, stride
            )

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.cat([F.relu(branch(x)) for branch in self.branches_a], 1)
        outer = [branch(inner) for branch in self.branches_b]
        result = self.downsample(x)
        for g, branch in enumerate(outer):
            # In place: this is the last use of the identity.
            result.index_add_(1, self.get_buffer(f"out_index_{g}"), branch)
        return F.relu(result)


class _Branch(nn.Module):
    index: Tensor

    def __init__(self, arrays: Arrays, name: str, eps: float, stride: int = 1) -> None:
        super().__init__()
        self.register_buffer("index", _index(arrays, f"{name}.in_index").view(1, -1, 1, 1))
        self.conv = _conv_norm(arrays, name, f"{name}.bn", eps, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.take_along_dim(x, self.index, 1))


def _conv_norm(arrays: Arrays, conv: str, norm: str, eps: float, stride: int = 1) -> nn.Sequential:
    filters, channels, height, width = arrays[f"{conv}.weight"].shape
    window = (height, width), stride, (height // 2, width // 2)
    made = nn.Sequential(nn.Conv2d(channels, filters, *window, bias=False), nn.BatchNorm2d(filters, eps))
    _copy(made[0], arrays, conv)
    _copy(made[1], arrays, norm)
    return made


def _copy(module: nn.Module, arrays: Arrays, name: str) -> None:
    for key, tensor in module.state_dict().items():
        if key != "num_batches_tracked":
            tensor.copy_(torch.from_numpy(arrays[f"{name}.{key}"]))


def _index(arrays: Arrays, name: str) -> Tensor:
    return torch.from_numpy(arrays[name].astype(np.int64))
