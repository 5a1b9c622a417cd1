"""A network as plain JSON: the calls of its torch.fx graph, its modules and its other tensors."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from dsp_kernels.errors import DSPFormatError
from dsp_kernels.file.decode import Budget, build_module
from dsp_kernels.file.format import CONTAINERS, DTYPES, MODULES, TRAINING, function_name, is_plain
from dsp_kernels.file.two_modes import traced_calls
from dsp_kernels.graph.inputs import Example
from dsp_kernels.graph.network import SIZE_CHECK, insert_check
from dsp_kernels.graph.operations.table import CONV_SETTINGS, METHODS
from dsp_kernels.op.fused_conv import FusedConv2d
from dsp_kernels.op.packed import PackedConv2d

_CALLS = {"call_module": "module", "call_function": "function", "call_method": "method", "get_attr": "tensor"}


def encode_network(
    model: nn.Module, example_input: Example | None = None
) -> tuple[dict[str, Any], Mapping[str, Tensor], dict[str, int]]:
    """{"calls", "modules", "tensors", "modes", "tied"} of plain JSON values; tensors that forward() makes;
    the number of every call by the name of its node.

    example_input: (batch, channels, height, width), or a tuple of all inputs; needed for a model of several
    inputs and for one whose forward() needs sizes as numbers.
    Raises DSPFormatError that names whatever a file cannot hold.
    """
    found, modes = traced_calls(model, example_input)
    graph = found.graph
    if found.check is not None:
        insert_check(graph)
    numbers: dict[fx.Node, int] = {}
    calls: list[dict[str, Any]] = []
    for node in graph.nodes:
        numbers[node] = len(calls)
        calls.append(_encode_call(node, numbers))
    called = {call["module"] for call in calls if "module" in call}
    modules: dict[str, Any] = {}
    tensors: dict[str, str] = {}
    whole = "."  # the last path that was written as one module; its submodules follow
    for path, module in model.named_modules(remove_duplicate=False):
        if path.startswith(whole):
            continue
        # Of a module that is never called (an auxiliary head) only the tensors are kept.
        if path in called and is_known(module):
            modules[path], whole = encode_module(module, path), f"{path}."
            _check_state(module, modules[path], path)
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
    tensors |= dict.fromkeys(found.constants, "buffer")
    readable = {TRAINING, *tensors, *model.state_dict()}
    for call in calls:
        if call.get("tensor", TRAINING) not in readable:
            raise DSPFormatError(f"the network reads {call['tensor']!r}, which is not in its state_dict")
        path = call.get("module", "")
        if path == SIZE_CHECK and found.check is not None:
            modules[path] = encode_module(found.check, path)
        elif path and not is_known(model.get_submodule(path)):
            encode_module(model.get_submodule(path), path)  # raises
    parts = {"calls": calls, "modules": modules, "tensors": tensors, "modes": modes, "tied": _tied(model)}
    return parts, found.constants, {node.name: number for node, number in numbers.items()}


def is_known(module: nn.Module) -> bool:
    """Whether a file can hold this module as one."""
    return type(module) in (*MODULES, PackedConv2d, FusedConv2d)


def encode_module(module: nn.Module, path: str) -> dict[str, Any]:
    """{"class": name, setting: value, ...} of plain JSON values. Raises DSPFormatError for other modules."""
    encoded: dict[str, Any] = {"class": type(module).__name__}
    if type(module) is PackedConv2d or type(module) is FusedConv2d:
        encoded |= {name: list(getattr(module.spec, name)) for name in CONV_SETTINGS}
        encoded |= {"structure": module.spec.structure.to_dict(), "bias": module.bias is not None}
        if isinstance(module, FusedConv2d):
            encoded |= {"activation": module.spec.activation, "backend": module.backend}
        return encoded
    if type(module) not in MODULES:
        raise DSPFormatError(
            f"layer {path!r} is a {type(module).__module__}.{type(module).__name__}, which a file cannot hold"
        )
    for name in MODULES[type(module)]:
        value = getattr(module, name)
        if name == "bias":
            value = value is not None
        encoded[name] = list(value) if isinstance(value, tuple) else value
        if not is_plain(encoded[name]):
            raise DSPFormatError(f"layer {path!r}: {name} is {value!r}, which a file cannot hold")
    return encoded


def _check_state(module: nn.Module, encoded: dict[str, Any], path: str) -> None:
    """Raises DSPFormatError for tensors that were added to a module: ``load`` would not know them."""
    added = sorted(set(module.state_dict()) - set(build_module(encoded, path, Budget()).state_dict()))
    if added:
        raise DSPFormatError(
            f"layer {path!r} carries {', '.join(added)}, which no {type(module).__name__} has; a network "
            "with masks has to be packed before it is saved"
        )


def _tied(model: nn.Module) -> dict[str, str]:
    """Name in the state dict -> the first name of the same tensor, for tensors of several names."""
    first: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    names = {name: first.setdefault(id(tensor), name) for name, tensor in state.items()}
    return {name: earlier for name, earlier in names.items() if name != earlier}


def _encode_call(node: fx.Node, numbers: Mapping[fx.Node, int]) -> dict[str, Any]:
    if node.op == "placeholder":
        return {"input": sum(other.op == "placeholder" for other in numbers) - 1}
    if node.op == "output":
        return {"output": _encode(node.args[0], numbers, node)}
    kind, target = _CALLS[node.op], node.target
    name = function_name(target) if kind == "function" else str(target)
    if name is None or (kind == "method" and name not in METHODS):
        if target == "forward":
            raise DSPFormatError("a scripted part (torch.jit) cannot be followed, so a file cannot hold it")
        label = getattr(target, "__module__", None)
        raise DSPFormatError(
            f"node {node.name!r} calls {f'{label}.' if label else ''}{getattr(target, '__name__', target)}, "
            "which a file cannot hold"
        )
    call: dict[str, Any] = {kind: name}
    if node.args:
        call["args"] = [_encode(value, numbers, node) for value in node.args]
    # A file has no argument ``out``; functions of torch pass out=None.
    kwargs = {key: value for key, value in node.kwargs.items() if key != "out" or value is not None}
    if kwargs:
        call["kwargs"] = {key: _encode(value, numbers, node) for key, value in kwargs.items()}
    return call


def _encode(value: Any, numbers: Mapping[fx.Node, int], node: fx.Node) -> Any:
    """An argument of ``node``; the inverse of ``_decode`` in decode.py."""
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
