"""A network as ONNX bytes, for the engines that read those."""

from __future__ import annotations

import copy
import tempfile
import warnings
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .base import module_available

__all__ = ["BATCH", "INPUT", "OPSET", "OUTPUT", "any_batch_bytes", "can_export", "onnx_bytes"]

INPUT, OUTPUT = "x", "logits"
OPSET = 20
BATCH = "batch"  # the name of the free first axis

_exported: WeakKeyDictionary[nn.Module, bytes] = WeakKeyDictionary()


def can_export() -> tuple[bool, str]:
    """Whether torch's exporter has what it needs."""
    return module_available("onnx")


def onnx_bytes(model: nn.Module, example: Tensor, dtype: torch.dtype = torch.float32) -> bytes:
    """model in eval mode with weights, input and output of ``dtype``, for inputs of the example's shape.

    float16 gives a strongly typed float16 network: every tensor in it is float16.
    """
    return _export(model, example, dtype, {})


def any_batch_bytes(model: nn.Module, example: Tensor) -> bytes:
    """The same in float32 with a free first axis, ``BATCH``; exported once per module, from one image.

    Engines fix the axis before they optimise: exporting anew for each batch size took most of their build.
    """
    if model not in _exported:
        _exported[model] = _export(model, example[:1], torch.float32, {INPUT: {0: BATCH}, OUTPUT: {0: BATCH}})
    return _exported[model]


def _export(model: nn.Module, example: Tensor, dtype: torch.dtype, axes: dict[str, dict[int, str]]) -> bytes:
    network = copy.deepcopy(model).eval().to("cpu", dtype)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
        file = Path(folder) / "network.onnx"
        # The TorchScript-based exporter: it needs no onnxscript and writes a graph that all engines read.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            (example.to("cpu", dtype),),
            file,
            dynamo=False,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_axes=axes,
        )
        return file.read_bytes()
