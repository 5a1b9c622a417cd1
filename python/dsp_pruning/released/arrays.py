"""The authors' released CIFAR networks, from plain arrays to an ordinary packed network."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dsp_kernels import GroupStructure, PackedConv2d
from dsp_kernels.errors import DSPError, DSPFormatError
from dsp_kernels.whole_file import require_file
from dsp_pruning.models.cifar import CifarResNet, cifar_resnet
from dsp_pruning.packing.twin import dense_widths

__all__ = ["build_released", "has_released_arrays", "read_released", "read_released_arrays"]

_NORM = ("weight", "bias", "running_mean", "running_var")
# What the batch norm of an absent channel holds: it then passes 0 on as 0.
_ABSENT = {"weight": 0.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}


def read_released(path: str | Path) -> CifarResNet:
    """The network in an ``.npz`` file of such arrays, in eval mode. Raises DSPFormatError for other files."""
    return build_released(*read_released_arrays(path))


def read_released_arrays(path: str | Path) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, Any]]:
    """Arrays and ``meta`` as ``build_released`` takes them.

    Raises FileNotFoundError where there is no file, DSPFormatError for another kind of file.
    """
    require_file(path)
    if not has_released_arrays(path):
        raise DSPFormatError(f"{path} is not an .npz file of a released network: it has no array 'meta'")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
            return arrays, json.loads(str(arrays.pop("meta")))
    except Exception as error:  # numpy and zipfile raise many kinds for a damaged file
        raise DSPFormatError(f"{path} is not an .npz file of a released network: {error}") from error


def has_released_arrays(path: str | Path) -> bool:
    """Whether a file is an ``.npz`` archive with a description in it."""
    try:
        with zipfile.ZipFile(path) as archive:
            return "meta.npy" in archive.namelist()
    except Exception:  # zipfile raises many kinds for a damaged file
        return False


def build_released(arrays: Mapping[str, np.ndarray[Any, Any]], meta: Mapping[str, Any]) -> CifarResNet:
    """A packed CIFAR ResNet in eval mode from the arrays of a released one.

    meta: {depth, num_classes, bn_eps, blocks: [{name, stride, groups_a, groups_b, downsample}]}.
    arrays: for every block and branch g, ``<block>.conv_a.<g>.in_index`` (C_g,), ``.weight``
    (O_g, C_g, 3, 3) and ``.bn.*`` (O_g,); ``<block>.conv_b.<g>`` likewise with ``.out_index`` (O_g,); the
    outputs of conv_a's branches, one after the other, are the channels that conv_b reads. Also
    ``<block>.downsample.{conv.weight,bn.*}``, ``stem.{conv.weight,bn.*}``, ``classifier.{weight,bias}``.

    The branches' batch norms become one per convolution, so that the result is an ordinary packed network.
    Raises DSPFormatError if an array is missing or does not fit.
    """
    if missing := {"depth", "num_classes", "bn_eps", "blocks"} - set(meta):
        raise DSPFormatError(
            f"the description of a released CIFAR network needs {', '.join(sorted(missing))}; it has "
            f"{', '.join(sorted(meta)) or 'nothing'}"
        )
    try:
        model = cifar_resnet(meta["depth"], meta["num_classes"])
        blocks = [(str(block["name"]), block) for block in meta["blocks"]]
        eps = float(meta["bn_eps"])
    except (KeyError, TypeError, ValueError, DSPError) as error:
        raise DSPFormatError(f"the description of a released network is not usable: {error!r}") from error
    expected = [
        f"{stage}.{b}" for stage in ("stage_1", "stage_2", "stage_3") for b in range(len(model.stage_1))
    ]
    if [name for name, _ in blocks] != expected:
        raise DSPFormatError(
            f"a ResNet-{meta['depth']} has the blocks {expected[0]} to {expected[-1]}; "
            f"the description lists {[name for name, _ in blocks]}"
        )
    model.dense_widths = dense_widths(model)  # type: ignore[assignment]
    read = _Reader(arrays)
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.eps = eps
    read.fill(model.conv_1_3x3.weight, "stem.conv.weight")
    read.fill_norm(model.bn_1, "stem.bn")
    for name, block in blocks:
        _fill_block(model.get_submodule(name), name, block, read, eps)
    read.fill(model.classifier.weight, "classifier.weight")
    read.fill(model.classifier.bias, "classifier.bias")
    return model.eval()


def _fill_block(block: Any, name: str, described: Mapping[str, Any], read: _Reader, eps: float) -> None:
    branches_a = read.branches(f"{name}.conv_a", described["groups_a"])
    branches_b = read.branches(f"{name}.conv_b", described["groups_b"])
    sizes = [len(branch["weight"]) for branch in branches_a]
    starts = np.cumsum([0, *sizes]).tolist()
    inner = max(starts[-1], 1)  # a block pruned away whole keeps one channel that nobody writes
    out_a = [range(start, start + size) for start, size in zip(starts, sizes, strict=False)]
    out_b = [read.index(f"{name}.conv_b.{g}.out_index") for g in range(len(branches_b))]
    planes = block.conv_b.out_channels
    block.conv_a = _packed(f"{name}.conv_a", block.conv_a, branches_a, block.conv_a.in_channels, inner, out_a)
    block.bn_a = _joined_norm(branches_a, out_a, inner, eps)
    block.conv_b = _packed(f"{name}.conv_b", block.conv_b, branches_b, inner, planes, out_b)
    block.bn_b = _joined_norm(branches_b, out_b, planes, eps)
    if bool(described["downsample"]) != (block.downsample is not None):
        raise DSPFormatError(
            f"block {name}: downsample is {described['downsample']}; "
            f"a block with stride {block.conv_a.stride[0]} here has {block.downsample is not None}"
        )
    if block.downsample is not None:
        read.fill(block.downsample[0].weight, f"{name}.downsample.conv.weight")
        read.fill_norm(block.downsample[1], f"{name}.downsample.bn")


def _packed(
    name: str,
    dense: nn.Conv2d,
    branches: Sequence[Mapping[str, Tensor]],
    in_channels: int,
    out_channels: int,
    out_index: Sequence[Sequence[int]],
) -> PackedConv2d:
    groups = [(branch["in_index"].tolist(), out) for branch, out in zip(branches, out_index, strict=True)]
    try:
        structure = GroupStructure.build(in_channels, out_channels, groups)
    except DSPError as error:
        raise DSPFormatError(f"layer {name}: {error}") from error
    conv = PackedConv2d(structure, 3, dense.stride[0], 1)
    for number, (branch, weight) in enumerate(zip(branches, conv.weights, strict=True)):
        _copy(weight, branch["weight"], f"{name}.{number}.weight")
    return conv


def _joined_norm(
    branches: Sequence[Mapping[str, Tensor]], out_index: Sequence[Sequence[int]], channels: int, eps: float
) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, eps)
    state = norm.state_dict()
    for part, absent in _ABSENT.items():
        state[part].fill_(absent)
        for branch, out in zip(branches, out_index, strict=True):
            state[part][list(out)] = branch[f"bn.{part}"]
    return norm


class _Reader:
    """The arrays as tensors; every one that is missing or of the wrong shape is an error with its name."""

    def __init__(self, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        self.arrays = arrays

    def tensor(self, name: str) -> Tensor:
        if name not in self.arrays:
            raise DSPFormatError(f"the released network has no array {name!r}")
        array = np.asarray(self.arrays[name])
        if array.dtype.kind not in "fiu":
            raise DSPFormatError(f"array {name!r} holds {array.dtype}; expected numbers")
        return torch.from_numpy(np.array(array))

    def index(self, name: str) -> list[int]:
        tensor = self.tensor(name)
        if tensor.dim() != 1 or tensor.is_floating_point():
            raise DSPFormatError(
                f"array {name!r} is {tensor.dim()}-D {tensor.dtype}; expected a list of integers"
            )
        return tensor.tolist()

    def branches(self, name: str, count: Any) -> list[dict[str, Tensor]]:
        if not isinstance(count, int) or not 0 <= count <= 4096:
            raise DSPFormatError(f"layer {name} has {count!r} branches; expected a count")
        found = []
        for number in range(count):
            prefix = f"{name}.{number}"
            self.index(f"{prefix}.in_index")
            branch = {part: self.tensor(f"{prefix}.{part}") for part in ("in_index", "weight")}
            for part in _NORM:
                branch[f"bn.{part}"] = self.tensor(f"{prefix}.bn.{part}")
                if branch[f"bn.{part}"].shape != branch["weight"].shape[:1]:
                    raise DSPFormatError(
                        f"array {prefix}.bn.{part} has shape {tuple(branch[f'bn.{part}'].shape)}; "
                        f"expected one number for each of the {len(branch['weight'])} filters"
                    )
            found.append(branch)
        return found

    def fill(self, target: Tensor, name: str) -> None:
        _copy(target, self.tensor(name), name)

    def fill_norm(self, norm: nn.BatchNorm2d, name: str) -> None:
        state = norm.state_dict()
        for part in _NORM:
            self.fill(state[part], f"{name}.{part}")


def _copy(target: Tensor, source: Tensor, name: str) -> None:
    if source.shape != target.shape:
        raise DSPFormatError(
            f"array {name!r} has shape {tuple(source.shape)}; expected {tuple(target.shape)}"
        )
    with torch.no_grad():
        target.copy_(source)
