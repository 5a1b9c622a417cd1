"""Pruned structures for networks without pruned weights.

Latency does not depend on weights, so a structure from a file or from a seeded generator is enough; the title
of each table says which it is.
"""

import copy
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dsp_kernels.errors import DSPFormatError
from dsp_pruning import PruneWrapper, pack

_RULE = re.compile(r"random:g=(\d+),rate=(0?\.\d+)")


def apply_structure(dense: nn.Module, example: Tensor, structure: str, seed: int = 0) -> nn.Module:
    """A packed copy of ``dense`` with this structure.

    example: (1, channels, height, width). structure: ``random:g=2,rate=0.8`` (filters in random groups,
    pruned by ``PruneWrapper``; rate is the share of the grouped layers' FLOPs that is removed) or an .npz
    file with ``<conv>.<g>.in_index`` and ``.out_index``.
    Raises DSPFormatError for another text or a file that does not fit, DSPPruningError for a rate out of
    reach.
    """
    model = copy.deepcopy(dense)
    if rule := _RULE.fullmatch(structure):
        pruner = PruneWrapper(model, int(rule[1]), 2, example_input=example)
        generator = torch.Generator().manual_seed(seed)
        for layer in pruner.layers:
            layer.conv.get_buffer("group").normal_(generator=generator)
        pruner.initialize(float(rule[2]))
    elif structure.endswith(".npz"):
        _read(model, Path(structure))
    else:
        raise DSPFormatError(
            f"structure {structure!r} is unknown; expected random:g=2,rate=0.8 or an .npz file"
        )
    return pack(model, example).eval()


def _read(model: nn.Module, path: Path) -> None:
    """Register the masks of a file and apply them, as in a network that was trained pruned."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: torch.from_numpy(file[name].astype(np.int64)) for name in file if name != "meta"}
    except Exception as error:  # numpy and zipfile raise many kinds for a damaged file
        raise DSPFormatError(f"{path} is not a file of structures: {error}") from error
    convs = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    masks: dict[str, Tensor] = {}
    for key, out_index in arrays.items():
        name, _, kind = key.rsplit(".", 2)
        if name not in convs:
            raise DSPFormatError(f"{path} prunes {name!r}, which {type(model).__name__} does not have")
        if kind == "out_index":
            conv = convs[name]
            mask = masks.setdefault(name, torch.zeros(conv.out_channels, conv.in_channels, 1, 1))
            in_index = arrays[key.replace(".out_index", ".in_index")]
            try:
                mask[out_index[:, None], in_index[None, :]] = 1
            except IndexError as error:
                raise DSPFormatError(f"{path}: {key} does not fit layer {name}: {error}") from error
    for name, mask in masks.items():
        convs[name].register_buffer("mask", mask)
        convs[name].weight.data.mul_(mask)
