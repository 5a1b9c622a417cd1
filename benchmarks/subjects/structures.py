"""Pruned structures for networks without pruned weights.

Latency does not depend on weights, so a structure from a file or from a seeded generator is enough; the title
of each table says which it is.
"""

import copy
import re
from pathlib import Path
from typing import Any

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
    for key in arrays:
        name, group, kind = key.rsplit(".", 2)
        if kind != "out_index":
            continue
        try:
            conv: Any = model.get_submodule(name)
            if not hasattr(conv, "mask"):
                conv.register_buffer("mask", torch.zeros(conv.out_channels, conv.in_channels, 1, 1))
            conv.mask[arrays[key][:, None], arrays[f"{name}.{group}.in_index"]] = 1
        except (AttributeError, LookupError) as error:
            raise DSPFormatError(f"{path}: {key} does not fit {type(model).__name__}: {error}") from error
    for module in model.modules():
        if hasattr(module, "mask"):
            module.weight.data.mul_(module.mask)  # type: ignore[operator,arg-type]
