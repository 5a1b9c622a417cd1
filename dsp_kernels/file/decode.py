"""A network from the plain JSON of ``graph_encode``: its calls, its modules and its loose tensors.

The calls are in the order in which they run, and a call can only read the results of earlier ones; there is
no recursion and no control flow. What may be called stands in ``graph_ops``.
"""

from __future__ import annotations

import copy
import keyword
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from dsp_kernels.errors import DSPError, DSPFormatError
from dsp_kernels.file.encode import CONTAINERS, DTYPES
from dsp_kernels.file.modules import Budget, build_module
from dsp_kernels.file.operations import ATTRIBUTES, METHODS, SCALAR_FUNCTIONS, functions
from dsp_kernels.file.two_modes import TRAINING

__all__ = ["LoadedNetwork", "build_network"]

_MOST_CALLS, _MOST_MODULES, _DEEPEST = 50_000, 20_000, 6
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")

_STATE = ("_modules", "_parameters", "_buffers")


class LoadedNetwork(fx.GraphModule):
    """A network whose forward() is the graph of a file; otherwise an ordinary module.

    dense_widths: path of a layer -> its (input channels, output channels, groups) before packing, or None.
    ``train()`` raises DSPError where training mode runs operations that the file does not hold.
    """

    dense_widths: Mapping[str, tuple[int, int, int]] | None

    def __init__(self, root: nn.Module, graph: fx.Graph, meta: Mapping[str, Any]) -> None:
        super().__init__(root, graph)
        # All of the root, in its order, and not only what the graph reads.
        for kind in _STATE:
            self.__dict__[kind] = root.__dict__[kind]
        self.meta.update(meta)
        self.dense_widths = None

    @property
    def example_shape(self) -> tuple[int, ...]:
        """(batch, channels, height, width) of an input that fits."""
        return self.meta["example_shapes"][0]

    @property
    def example_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The same for every input, of which most networks have one."""
        return self.meta["example_shapes"]

    @property
    def example_given(self) -> bool:
        """Whether the shape was given, or is a usual one that happened to fit."""
        return self.meta["example_given"]

    def train(self, mode: bool = True) -> LoadedNetwork:
        """Training or eval mode, as for every module."""
        if mode and self.meta["modes"] == "eval":
            raise DSPError(
                "this network runs other operations in training mode than its file holds (auxiliary heads, "
                "for example); it can only be evaluated"
            )
        return super().train(mode)

    def __deepcopy__(self, memo: dict[int, Any]) -> LoadedNetwork:
        root = nn.Module()
        for kind in _STATE:
            root.__dict__[kind] = copy.deepcopy(self.__dict__[kind], memo)
        made = LoadedNetwork(root, copy.deepcopy(self.graph), {})
        memo[id(self)] = made
        for name, value in self.__dict__.items():
            if name != "_graph":
                made.__dict__[name] = copy.deepcopy(value, memo)
        return made


def build_network(
    described: Mapping[str, Any],
    meta: Mapping[str, Any],
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    budget: Budget,
) -> LoadedNetwork:
    """The network of ``encode_network`` on the meta device: it holds no memory.

    shapes: shape and dtype of the tensors in the file; the loose ones take theirs from here.
    Raises DSPFormatError for a description that contradicts itself or names something unknown.
    """
    calls, modules, tensors = (described.get(key) for key in ("calls", "modules", "tensors"))
    if not isinstance(calls, list) or not isinstance(modules, dict) or not isinstance(tensors, dict):
        raise DSPFormatError("the description has no calls, no modules or no tensors")
    if len(calls) > _MOST_CALLS or len(modules) + len(tensors) > _MOST_MODULES:
        raise DSPFormatError(
            f"{len(calls)} calls of {len(modules)} modules; expected at most {_MOST_CALLS} and "
            f"{_MOST_MODULES}"
        )
    root = nn.Module()
    callable_paths = set()
    for path, settings in modules.items():
        parent, name = _place(root, path), path.rpartition(".")[2]
        container = CONTAINERS.get(settings["class"]) if _is_container(settings) else None
        if container is not None:
            parent.add_module(name, container())
            continue
        callable_paths.add(path)
        parent.add_module(name, build_module(settings, path, budget))
    for path, kind in tensors.items():
        if path not in shapes:
            raise DSPFormatError(f"tensor {path!r} is not in the file")
        shape, dtype = shapes[path]
        tensor = torch.empty(shape, dtype=dtype, device="meta")
        parent, name = _place(root, path), path.rpartition(".")[2]
        if kind == "parameter" and dtype.is_floating_point:
            parent.register_parameter(name, nn.Parameter(tensor))
        elif kind == "buffer":
            parent.register_buffer(name, tensor)
        else:
            raise DSPFormatError(
                f"tensor {path!r} is a {kind!r} of {dtype}; expected a parameter or a buffer"
            )
    graph = fx.Graph()
    nodes: list[fx.Node] = []
    names = {"module": callable_paths, "tensor": {TRAINING, *tensors}}
    for call in calls:
        nodes.append(_build_call(graph, call, nodes, len(nodes) == len(calls) - 1, names))
    inputs = [node for node in nodes if node.op == "placeholder"]
    if not nodes or nodes[-1].op != "output" or len(inputs) != len(meta["example_shapes"]):
        end = nodes[-1].op if nodes else "nothing"
        raise DSPFormatError(
            f"the calls take {len(inputs)} inputs and end with {end!r}; expected inputs of the "
            f"{len(meta['example_shapes'])} shapes in the description, and an output"
        )
    if nodes[: len(inputs)] != inputs or [call["input"] for call in calls[: len(inputs)]] != [
        *range(len(inputs))
    ]:
        raise DSPFormatError("the inputs have to be the first calls, and numbered")
    try:
        return LoadedNetwork(root, graph, meta)
    except Exception as error:  # fx writes forward(); it raises anything for, say, a sum of one number
        raise DSPFormatError(f"the calls do not make a network: {error!r}") from error


def _place(root: nn.Module, path: Any) -> nn.Module:
    """The module that holds ``path``, which is a new and plain name there."""
    parts = path.split(".") if isinstance(path, str) else []
    if not 1 <= len(parts) <= 32 or not all(
        _PART.fullmatch(part) and not keyword.iskeyword(part) for part in parts
    ):
        raise DSPFormatError(f"{str(path)[:80]!r} is no path of a module")
    parent = root
    for part in parts[:-1]:
        child = parent._modules.get(part)
        if child is None or type(child) not in CONTAINERS.values():
            raise DSPFormatError(f"{path!r} is inside a module that is no container")
        parent = child
    _free(parent, parts[-1], path)
    return parent


def _is_container(settings: Any) -> bool:
    return isinstance(settings, dict) and set(settings) == {"class"} and isinstance(settings["class"], str)


def _free(parent: nn.Module, name: str, path: str) -> None:
    if hasattr(parent, name) or hasattr(LoadedNetwork, name) or name == "meta":
        raise DSPFormatError(f"{path!r} takes a name that a module has already")


def _build_call(
    graph: fx.Graph,
    call: Any,
    nodes: list[fx.Node],
    last: bool,
    names: Mapping[str, set[str]],
) -> fx.Node:
    number = len(nodes)
    if not isinstance(call, dict):
        raise DSPFormatError(f"call {number} is no mapping")
    if set(call) == {"input"}:
        return graph.placeholder("x" if not nodes else f"x{number}")
    if set(call) == {"output"} and last:
        return graph.output(_decode(call["output"], nodes))
    kinds = set(call) - {"args", "kwargs"}
    kind = kinds.pop() if len(kinds) == 1 else None
    name, args, kwargs = call.get(str(kind)), call.get("args", []), call.get("kwargs", {})
    if not isinstance(name, str) or not isinstance(args, list) or not isinstance(kwargs, dict):
        raise DSPFormatError(f"call {number} has the parts {sorted(call)}; expected a name, args and kwargs")
    arguments = tuple(_decode(value, nodes) for value in args)
    named = {key: _decode(value, nodes) for key, value in kwargs.items() if _is_name(key) and key != "out"}
    if len(named) != len(kwargs):
        raise DSPFormatError(f"call {number} has an argument whose name is no name")
    if kind == "module" and name in names["module"]:
        return graph.call_module(name, arguments, named)
    if kind == "tensor" and name in names["tensor"] and not args and not kwargs:
        return graph.create_node("get_attr", name)
    if kind == "method" and name in METHODS and arguments and isinstance(arguments[0], fx.Node):
        return graph.call_method(name, arguments, named)
    function = functions(name) if kind == "function" else None
    if function is None:
        raise DSPFormatError(f"call {number} is of the {kind} {name[:80]!r}, which is not known here")
    if function is getattr and (len(arguments) != 2 or named or not _is_attribute(arguments[1])):
        raise DSPFormatError(f"call {number} reads an attribute other than {', '.join(sorted(ATTRIBUTES))}")
    if name in SCALAR_FUNCTIONS and not (arguments and _are_operands(name, arguments)):
        raise DSPFormatError(f"call {number} is {name} of {str(args)[:80]}; expected calls and numbers")
    return graph.call_function(function, arguments, named)


def _is_attribute(value: Any) -> bool:
    return isinstance(value, str) and value in ATTRIBUTES


def _are_operands(name: str, arguments: tuple[Any, ...]) -> bool:
    if name == "operator.getitem":
        return isinstance(arguments[0], fx.Node)
    kinds = all(isinstance(argument, fx.Node | int | float | tuple) for argument in arguments)
    return kinds and any(isinstance(argument, fx.Node) for argument in arguments)


def _is_name(text: str) -> bool:
    # torch.fx writes names of modules and arguments into the source of forward(): they must be only that.
    return text.isascii() and text.isidentifier() and not keyword.iskeyword(text) and len(text) <= 64


_DECODERS: dict[str, Callable[[list[Any]], Any]] = {"tuple": tuple, "slice": lambda parts: slice(*parts)}


def _decode(value: Any, nodes: list[fx.Node], depth: int = 0) -> Any:
    """An argument of a call. A node is the number of an earlier call, so there can be no cycle."""
    if depth > _DEEPEST:
        raise DSPFormatError(f"an argument is nested more than {_DEEPEST} deep")
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, int):
        if abs(value) >= 2**63:
            raise DSPFormatError("an argument has more than 63 bits")
        return value
    if isinstance(value, str):
        if len(value) > 64:
            raise DSPFormatError(f"an argument is a text of {len(value)} characters; expected at most 64")
        return value
    if isinstance(value, list):
        return [_decode(item, nodes, depth + 1) for item in value]
    ((form, content),) = value.items() if isinstance(value, dict) and len(value) == 1 else (("", None),)
    if form == "node" and isinstance(content, int) and not isinstance(content, bool):
        if not 0 <= content < len(nodes):
            raise DSPFormatError(f"call {len(nodes)} reads call {content}; it can only read earlier ones")
        return nodes[content]
    if form == "dtype" and isinstance(content, str) and content in DTYPES:
        return DTYPES[content]
    if form == "ellipsis":
        return ...
    if form == "dict" and isinstance(content, dict):
        return {key: _decode(item, nodes, depth + 1) for key, item in content.items()}
    if form in _DECODERS and isinstance(content, list) and (form == "tuple" or len(content) == 3):
        return _DECODERS[form]([_decode(item, nodes, depth + 1) for item in content])
    raise DSPFormatError(f"an argument of call {len(nodes)} is {str(value)[:80]}; no argument has that form")
