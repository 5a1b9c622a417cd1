"""Pruned structures for networks without pruned weights.

Latency does not depend on weights, so a structure from a file or from a seeded generator is enough; the title
of each table says which it is.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dsp_kernels.errors import DSPFormatError, DSPPruningError
from dsp_kernels.graph.network import trace
from dsp_pruning import pack
from dsp_pruning.layers import LayerInfo, select_layers

from .forms import inner_pairs

_RULE = re.compile(r"random:g=(\d+),rate=(0?\.\d+)")
# Of the six released networks: spread of the kept share per layer, least and largest share of removed
# filters.
_SIGMA, _GONE = 0.25, (0.22, 0.37)


def apply_structure(dense: nn.Module, example: Tensor, structure: str, seed: int = 0) -> nn.Module:
    """A packed copy of ``dense`` with this structure.

    example: (1, channels, height, width). structure: ``random:g=2,rate=0.8`` (seeded generator; rate is the
    share of the block convolutions' multiply-adds that is removed) or an .npz file with
    ``<conv>.<g>.in_index`` and ``.out_index``.
    Raises DSPFormatError for another text or a file that does not fit, DSPPruningError for a rate out of
    reach.
    """
    model = copy.deepcopy(dense)
    if rule := _RULE.fullmatch(structure):
        layers = select_layers(model, example)
        generator = torch.Generator().manual_seed(seed)
        _draw(layers, _coupled(model, example, layers), int(rule[1]), float(rule[2]), generator)
    elif structure.endswith(".npz"):
        _read(model, Path(structure))
    else:
        raise DSPFormatError(
            f"structure {structure!r} is unknown; expected random:g=2,rate=0.8 or an .npz file"
        )
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and isinstance(mask := getattr(module, "mask", None), Tensor):
                module.weight.mul_(mask)  # as in a network that was trained pruned
    return pack(model, example).eval()


def _draw(
    layers: tuple[LayerInfo, ...],
    pairs: list[tuple[int, int]],
    n_groups: int,
    rate: float,
    generator: torch.Generator,
) -> None:
    """Register masks with ``n_groups`` groups per layer that keep 1 - rate of all multiply-adds.

    pairs: (i, j) where layer j is the only reader of layer i: a channel that one does not write or the other
    does not read is removed from both.
    """
    shares = torch.exp(_SIGMA * torch.randn(len(layers), generator=generator)).tolist()
    filters = [_split_filters(layer.out_channels, n_groups, generator) for layer in layers]
    orders = [
        [torch.randperm(layer.in_channels, generator=generator) for _ in range(n_groups)] for layer in layers
    ]
    total = sum(layer.macs for layer in layers)

    def masks(scale: float) -> list[Tensor]:
        """(filters, channels) of every layer; each keeps ``scale`` times its share."""
        made = []
        for layer, share, groups, order in zip(layers, shares, filters, orders, strict=True):
            alive = sum(len(group) for group in groups)
            count = round(scale * share * layer.out_channels * layer.in_channels / alive)
            mask = torch.zeros(layer.out_channels, layer.in_channels)
            for group, permutation in zip(groups, order, strict=True):
                mask[group[:, None], permutation[: max(1, count)][None, :]] = 1
            made.append(mask)
        for writer, reader in pairs:
            made[reader] *= made[writer].amax(1)[None, :]
            made[writer] *= made[reader].amax(0)[:, None]
        return made

    def kept(scale: float) -> float:
        return sum(layer.macs * float(m.mean()) for layer, m in zip(layers, masks(scale), strict=True))

    low, high = 0.0, 4.0
    if kept(high) < (1 - rate) * total:
        raise DSPPruningError(f"rate {rate} is below the share of the removed filters alone; try 0.4 or more")
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if kept(middle) < (1 - rate) * total else (low, middle)
    for layer, mask in zip(layers, masks(high), strict=True):
        layer.conv.register_buffer("mask", mask[:, :, None, None])


def _coupled(model: nn.Module, example: Tensor, layers: tuple[LayerInfo, ...]) -> list[tuple[int, int]]:
    place = {layer.name: number for number, layer in enumerate(layers)}
    found = [(place.get(a.path), place.get(b.path)) for a, _, b in inner_pairs(trace(model, example))]
    return [(a, b) for a, b in found if a is not None and b is not None]


def _split_filters(filters: int, n_groups: int, generator: torch.Generator) -> list[Tensor]:
    """Disjoint, sorted sets of the kept filters, at least one in each."""
    least, most = _GONE
    gone = least + (most - least) * float(torch.rand((), generator=generator))
    alive = max(n_groups, round(filters * (1 - gone)))
    if alive > filters:
        raise DSPPruningError(f"{n_groups} groups do not fit a layer of {filters} filters")
    chosen = torch.randperm(filters, generator=generator)[:alive]
    weights = 0.7 + 0.6 * torch.rand(n_groups, generator=generator)
    ends = (weights.cumsum(0) / weights.sum() * (alive - n_groups)).round().long()
    ends = ends + torch.arange(1, n_groups + 1)
    return [part.sort().values for part in torch.tensor_split(chosen, ends[:-1])]


def _read(model: nn.Module, path: Path) -> None:
    """Register the masks of a file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: torch.from_numpy(file[name].astype(np.int64)) for name in file if name != "meta"}
            json.loads(str(file["meta"]))
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
