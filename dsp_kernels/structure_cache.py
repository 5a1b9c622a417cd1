"""From the index tensors of a torch op back to a checked GroupStructure, once per set of tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from dsp_kernels.errors import DSPStructureError
from dsp_kernels.structure import GroupStructure

__all__ = ["structure_of"]

_LIMIT = 1024
_lock = Lock()
# An entry is good while the very same tensors live, unchanged (their version counters are in the key).
_checked: OrderedDict[tuple[int, ...], tuple[tuple[TensorWeakRef, ...], GroupStructure]] = OrderedDict()


def structure_of(
    in_index: Sequence[Tensor], out_index: Sequence[Tensor], in_channels: int, out_channels: int
) -> GroupStructure:
    """in_index[g], out_index[g]: 1-D int32 or int64 tensors on any device. The structure that they describe.

    Raises DSPStructureError for anything that is not a valid structure.
    """
    if len(in_index) != len(out_index):
        raise DSPStructureError(f"{len(in_index)} in_index lists but {len(out_index)} out_index lists")
    tensors = (*in_index, *out_index)
    if any(tensor.is_inference() for tensor in tensors):  # no version counter: cannot be remembered safely
        return _check(in_index, out_index, in_channels, out_channels)
    key = (in_channels, out_channels, *(id(t) for t in tensors), *(t._version for t in tensors))
    with _lock:
        entry = _checked.get(key)
        if entry is not None and all(ref() is t for ref, t in zip(entry[0], tensors, strict=True)):
            _checked.move_to_end(key)
            return entry[1]
    structure = _check(in_index, out_index, in_channels, out_channels)
    with _lock:
        _checked[key] = (tuple(TensorWeakRef(t) for t in tensors), structure)
        while len(_checked) > _LIMIT:
            _checked.popitem(last=False)
    return structure


def _check(
    in_index: Sequence[Tensor], out_index: Sequence[Tensor], in_channels: int, out_channels: int
) -> GroupStructure:
    for name, index in (("in_index", in_index), ("out_index", out_index)):
        for number, tensor in enumerate(index):
            if tensor.dim() != 1 or tensor.dtype not in (torch.int32, torch.int64):
                raise DSPStructureError(
                    f"{name} of group {number} is a {tensor.dim()}-D tensor of {tensor.dtype}; "
                    "expected one dimension of int32 or int64"
                )
    pairs = [(i.tolist(), o.tolist()) for i, o in zip(in_index, out_index, strict=True)]
    return GroupStructure.build(in_channels, out_channels, pairs)
