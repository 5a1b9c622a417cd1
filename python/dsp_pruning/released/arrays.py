"""The authors' released CIFAR networks, from plain arrays to an ordinary packed network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dsp_kernels.errors import DSPError, DSPFormatError
from dsp_kernels.whole_file import require_file
from dsp_pruning.models.cifar import CifarResNet, cifar_resnet
from dsp_pruning.packing.twin import dense_widths
from dsp_pruning.released.archive import zip_names
from dsp_pruning.released.branches import NORM, Branch, NamedTensor, copy_into, joined_conv, joined_norm


def read_released(path: str | Path) -> CifarResNet:
    """The network in an ``.npz`` file of the arrays that ``build_released`` takes, in eval mode.

    Raises FileNotFoundError, and DSPFormatError for another kind of file.

    >>> network = read_released("resnet56_g4.npz")  # doctest: +SKIP
    """
    require_file(path)
    if "meta.npy" not in zip_names(path):
        raise DSPFormatError(f"{path} is not an .npz file of a released network: it has no array 'meta'")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
            meta = dict(json.loads(str(arrays.pop("meta"))))
    except Exception as error:  # numpy and zipfile raise many kinds for a damaged file
        raise DSPFormatError(f"{path} is not an .npz file of a released network: {error}") from error
    return build_released(arrays, meta)


def build_released(arrays: Mapping[str, np.ndarray[Any, Any]], meta: Mapping[str, Any]) -> CifarResNet:
    """A packed CIFAR ResNet in eval mode from the arrays of a released one.

    meta: {depth, num_classes, bn_eps, blocks: [{name, stride, groups_a, groups_b, downsample}]}.
    arrays: for every block and branch g, ``<block>.conv_a.<g>.in_index`` (C_g,), ``.weight``
    (O_g, C_g, 3, 3) and ``.bn.*`` (O_g,); ``<block>.conv_b.<g>`` likewise with ``.out_index`` (O_g,); the
    outputs of conv_a's branches, one after the other, are the channels that conv_b reads. Also
    ``<block>.downsample.{conv.weight,bn.*}``, ``stem.{conv.weight,bn.*}``, ``classifier.{weight,bias}``.

    The branches' batch norms become one per convolution, so that the result is an ordinary packed network.
    Raises DSPFormatError if an array is missing or does not fit.

    >>> renamed = {"conv_1_3x3": "stem.conv", "bn_1": "stem.bn", "ple.0": "ple.conv", "ple.1": "ple.bn"}
    >>> arrays = {}
    >>> for name, tensor in cifar_resnet(8).state_dict().items():
    ...     for old, new in renamed.items():
    ...         name = name.replace(old, new)
    ...     arrays[name] = tensor.numpy()
    >>> empty = {"groups_a": 0, "groups_b": 0}  # without branches, a block is its shortcut
    >>> blocks = [{"name": f"stage_{n}.0", "downsample": n > 1, **empty} for n in (1, 2, 3)]
    >>> meta = {"depth": 8, "num_classes": 10, "bn_eps": 1e-5, "blocks": blocks}
    >>> build_released(arrays, meta)(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 10])
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
    expected = [f"stage_{stage}.{block}" for stage in (1, 2, 3) for block in range(len(model.stage_1))]
    if [name for name, _ in blocks] != expected:
        raise DSPFormatError(
            f"a ResNet-{meta['depth']} has the blocks {expected[0]} to {expected[-1]}; "
            f"the description lists {[name for name, _ in blocks]}"
        )
    model.dense_widths = dense_widths(model)  # type: ignore[assignment]
    read = _Reader(arrays)
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.eps = eps
    for module, array in (("conv_1_3x3", "stem.conv"), ("bn_1", "stem.bn"), ("classifier", "classifier")):
        read.fill(model.get_submodule(module), array)
    for name, block in blocks:
        _fill_block(model.get_submodule(name), name, block, read, eps)
    return model.eval()


def _fill_block(block: Any, name: str, described: Mapping[str, Any], read: _Reader, eps: float) -> None:
    branches_a = read.branches(f"{name}.conv_a", described.get("groups_a"))
    branches_b = read.branches(f"{name}.conv_b", described.get("groups_b"))
    inner = sum(branch.filters for branch in branches_a)
    places_a = torch.arange(inner).split([branch.filters for branch in branches_a])
    places_b = [read.index(f"{name}.conv_b.{g}.out_index") for g in range(len(branches_b))]
    inner = max(inner, 1)  # a block without branches keeps one channel, which is absent
    for letter, branches, places, widths in (
        ("a", branches_a, [place.tolist() for place in places_a], (block.conv_a.in_channels, inner)),
        ("b", branches_b, places_b, (inner, block.conv_b.out_channels)),
    ):
        stride = block.get_submodule(f"conv_{letter}").stride
        conv = joined_conv(f"{name}.conv_{letter}", branches, places, widths, (3, 3), stride, 1)
        setattr(block, f"conv_{letter}", conv)
        setattr(block, f"bn_{letter}", joined_norm(branches, places, widths[1], eps, 0.1))
    downsample = described.get("downsample")
    if bool(downsample) != (block.downsample is not None):
        raise DSPFormatError(
            f"block {name}: downsample is {downsample}; "
            f"a block with stride {block.conv_a.stride[0]} here has {block.downsample is not None}"
        )
    if block.downsample is not None:
        read.fill(block.downsample[0], f"{name}.downsample.conv")
        read.fill(block.downsample[1], f"{name}.downsample.bn")


@dataclass(frozen=True)
class _Reader:
    """The arrays as tensors; an array that is missing or does not fit is an error that names it."""

    arrays: Mapping[str, np.ndarray[Any, Any]]

    def tensor(self, name: str) -> NamedTensor:
        if name not in self.arrays:
            raise DSPFormatError(f"the released network has no array {name!r}")
        array = np.asarray(self.arrays[name])
        if array.dtype.kind not in "fiu":
            raise DSPFormatError(f"array {name!r} holds {array.dtype}; expected numbers")
        dtype = np.float32 if array.dtype.kind == "f" else np.int64
        return NamedTensor(name, torch.from_numpy(np.array(array, dtype)))

    def index(self, name: str) -> list[int]:
        tensor = self.tensor(name).tensor
        if tensor.dim() != 1 or tensor.is_floating_point():
            raise DSPFormatError(
                f"array {name!r} is {tensor.dim()}-D {tensor.dtype}; expected a list of integers"
            )
        return tensor.tolist()

    def branches(self, name: str, count: Any) -> list[Branch]:
        if not isinstance(count, int) or not 0 <= count <= 4096:
            raise DSPFormatError(f"layer {name} has {count!r} branches; expected a count")
        found = []
        for number in range(count):
            prefix = f"{name}.{number}"
            weight = self.tensor(f"{prefix}.weight")
            if weight.tensor.dim() != 4:
                raise DSPFormatError(f"{weight.name!r} is {weight.tensor.dim()}-D; expected (O, C, 3, 3)")
            norm = tuple(self.tensor(f"{prefix}.bn.{part}") for part in NORM)
            found.append(Branch(tuple(self.index(f"{prefix}.in_index")), weight, norm=norm))
        return found

    def fill(self, module: nn.Module, name: str) -> None:
        for part, tensor in module.state_dict().items():
            if part != "num_batches_tracked":
                copy_into(tensor, self.tensor(f"{name}.{part}"))
