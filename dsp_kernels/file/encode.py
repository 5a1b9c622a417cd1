"""A network as plain JSON: the calls of its torch.fx graph, its modules and its loose tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from dsp_kernels.errors import DSPFormatError
from dsp_kernels.file.modules import Budget, build_module, encode_module, is_known
from dsp_kernels.file.operations import METHODS, function_name
from dsp_kernels.file.two_modes import TRAINING, traced_calls
from dsp_kernels.graph.inputs import Example

__all__ = ["CONTAINERS", "DTYPES", "encode_network"]

# Modules that only hold others; a file keeps them for the names and for the order of the state_dict.
CONTAINERS: dict[str, type[nn.Module]] = {
    kind.__name__: kind for kind in (nn.Module, nn.Sequential, nn.ModuleList)
}
# Types of numbers that a call may name.
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool)
}
_OPS = {"call_module": "module", "call_function": "function", "call_method": "method", "get_attr": "tensor"}


def encode_network(model: nn.Module, example_input: Example | None = None) -> dict[str, Any]:
    """{"calls", "modules", "tensors", "modes", "tied"} of plain JSON values.

    example_input: (batch, channels, height, width), or a tuple of all inputs; a model of several inputs, or
    one that torch.fx cannot follow, needs one.
    Raises DSPFormatError, naming it, for whatever a file cannot hold.
    """
    graph, modes, added = traced_calls(model, example_input)
    numbers: dict[fx.Node, int] = {}
    calls: list[dict[str, Any]] = []
    for node in graph.nodes:
        numbers[node] = len(calls)
        calls.append(_encode_call(node, numbers))
    called = {call["module"] for call in calls if "module" in call}
    modules: dict[str, Any] = {}
    tensors: dict[str, str] = {}
    whole = "."  # path of the module that was saved as one, last; its parts follow it
    for path, module in model.named_modules(remove_duplicate=False):
        if path.startswith(whole):
            continue
        # A module that nothing calls (an auxiliary head) is only its tensors.
        if path in called and is_known(module):
            modules[path], whole = encode_module(module, path), f"{path}."
            _refuse_additions(module, path)
            continue
        if path:
            kind = next((k for k in CONTAINERS.values() if type(module) is k), nn.Module)
            modules[path] = {"class": kind.__name__}
        prefix = f"{path}." if path else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                tensors[f"{prefix}{name}"] = "parameter"
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                tensors[f"{prefix}{name}"] = "buffer"
    for call in calls:
        if call.get("tensor", TRAINING) not in (TRAINING, *tensors):
            raise DSPFormatError(f"the network reads {call['tensor']!r}, which is not in its state_dict")
        path = call.get("module", "")
        if path in added:
            modules[path] = encode_module(added[path], path)
        elif path and not is_known(model.get_submodule(path)):
            encode_module(model.get_submodule(path), path)
    return {"calls": calls, "modules": modules, "tensors": tensors, "modes": modes, "tied": _tied(model)}


def _refuse_additions(module: nn.Module, path: str) -> None:
    made = build_module(encode_module(module, path), path, Budget(2**62, 2**62))
    added = sorted(set(module.state_dict()) - set(made.state_dict()))
    if added:
        raise DSPFormatError(
            f"layer {path!r} carries {', '.join(added)}, which no {type(module).__name__} has; a network "
            "with masks has to be packed before it is saved"
        )


def _tied(model: nn.Module) -> dict[str, str]:
    """Name of a tensor in the state dict -> the first name of the same tensor, where it has several."""
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for path, tensor in model.state_dict(keep_vars=True).items():
        name = first.setdefault(id(tensor), path)
        if name != path:
            tied[path] = name
    return tied


def _encode_call(node: fx.Node, numbers: Mapping[fx.Node, int]) -> dict[str, Any]:
    if node.op == "placeholder":
        return {"input": sum(other.op == "placeholder" for other in numbers) - 1}
    if node.op == "output":
        return {"output": _encode(node.args[0], numbers, node)}
    kind, target = _OPS[node.op], node.target
    name = function_name(target) if node.op == "call_function" else str(target)
    if name is None or (kind == "method" and name not in METHODS):
        label = getattr(target, "__module__", None)
        raise DSPFormatError(
            f"node {node.name!r} calls {f'{label}.' if label else ''}{getattr(target, '__name__', target)}, "
            "which a file cannot hold"
        )
    call: dict[str, Any] = {kind: name}
    if node.args:
        call["args"] = [_encode(value, numbers, node) for value in node.args]
    # ``out`` is no argument of a file's calls; functions of torch hand on that there is none.
    kwargs = {key: value for key, value in node.kwargs.items() if key != "out" or value is not None}
    if kwargs:
        call["kwargs"] = {key: _encode(value, numbers, node) for key, value in kwargs.items()}
    return call


def _encode(value: Any, numbers: Mapping[fx.Node, int], node: fx.Node) -> Any:
    if isinstance(value, fx.Node):
        return {"node": numbers[value]}
    if isinstance(value, torch.dtype) and str(value).removeprefix("torch.") in DTYPES:
        return {"dtype": str(value).removeprefix("torch.")}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, slice):
        return {"slice": [_encode(part, numbers, node) for part in (value.start, value.stop, value.step)]}
    if value is Ellipsis:
        return {"ellipsis": True}
    if isinstance(value, list):
        return [_encode(item, numbers, node) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [_encode(item, numbers, node) for item in value]}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _encode(item, numbers, node) for key, item in value.items()}}
    raise DSPFormatError(f"node {node.name!r} has the argument {value!r}, which a file cannot hold")
