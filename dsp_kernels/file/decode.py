"""A network from the plain JSON of encode.py, on the meta device.

Calls are listed in the order in which they run and can only read the results of earlier ones: there is no
recursion and no control flow. What may be called is in format.py.
"""

from __future__ import annotations

import copy
import keyword
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from dsp_kernels.errors import DSPError, DSPFormatError
from dsp_kernels.file.check import TensorTable, is_shape
from dsp_kernels.file.format import ATTRIBUTES, CONTAINERS, DTYPES, MODULES, TRAINING, functions, is_plain
from dsp_kernels.graph.operations.table import CONV_SETTINGS, METHODS
from dsp_kernels.op.fused_conv import FusedConv2d
from dsp_kernels.op.packed import PackedConv2d
from dsp_kernels.op.spec import ConvSpec
from dsp_kernels.op.structure import GroupStructure

_MOST_CALLS, _MOST_MODULES, _MOST_INPUTS, _DEEPEST = 50_000, 20_000, 16, 6
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
_STATE = ("_modules", "_parameters", "_buffers")
# Of a LoadedNetwork, but not of its class.
_ATTRIBUTES = ("meta", "example_shapes", "example_given", "modes", "dense_widths")


class LoadedNetwork(fx.GraphModule):
    """A network whose forward() is the graph of a file; otherwise an ordinary module.

    example_shapes: shapes of inputs that fit, the image first; example_given: whether the user gave them.
    modes: "both", or "eval" where training mode runs operations that the file does not hold: ``train()``
    raises DSPError then.
    dense_widths: path -> (input channels, output channels, groups) of a layer before packing, or None.
    """

    def __init__(
        self,
        root: nn.Module,
        graph: fx.Graph,
        example_shapes: tuple[tuple[int, ...], ...],
        example_given: bool = False,
        modes: str = "both",
        dense_widths: Mapping[str, tuple[int, int, int]] | None = None,
    ) -> None:
        super().__init__(root, graph)
        for kind in _STATE:  # also what the graph does not read, in the order of the root
            self.__dict__[kind] = root.__dict__[kind]
        self.example_shapes = example_shapes
        self.example_given = example_given
        self.modes = modes
        self.dense_widths = dense_widths

    @property
    def example_shape(self) -> tuple[int, ...]:
        """(batch, channels, height, width) of an image that fits."""
        return self.example_shapes[0]

    def train(self, mode: bool = True) -> LoadedNetwork:
        if mode and self.modes == "eval":
            raise DSPError(
                "this network runs other operations in training mode than its file holds (auxiliary heads, "
                "for example); it can only be evaluated"
            )
        return super().train(mode)

    def __deepcopy__(self, memo: dict[int, Any]) -> LoadedNetwork:
        root = nn.Module()
        for kind in _STATE:
            root.__dict__[kind] = copy.deepcopy(self.__dict__[kind], memo)
        made = LoadedNetwork(root, copy.deepcopy(self.graph), self.example_shapes)
        memo[id(self)] = made
        for name, value in self.__dict__.items():
            if name != "_graph":
                made.__dict__[name] = copy.deepcopy(value, memo)
        return made


@dataclass
class Budget:
    """What the packed convolutions of a file may need before any of its tensors is read.

    widths: channels of all structures together; tensors: groups of all structures together. Absent channels
    take no byte in a file, so their number is bounded by the size of the file.
    """

    widths: int = 2**62
    tensors: int = 2**62

    def spend(self, structure: Any, path: str) -> None:
        """Raises DSPFormatError where a structure, still unchecked JSON, is too large for its file."""
        groups = structure.get("groups") if isinstance(structure, Mapping) else None
        if not isinstance(groups, list):
            raise DSPFormatError(f"layer {path!r} has no group structure")
        for name in ("in_channels", "out_channels"):
            width = structure.get(name)
            if type(width) is not int or not 1 <= width <= self.widths:
                raise DSPFormatError(
                    f"layer {path!r}: {name} is {width!r}; expected 1 to {self.widths} in a file of this size"
                )
            self.widths -= width
        self.tensors -= len(groups)
        if self.tensors < 0:
            raise DSPFormatError(f"layer {path!r}: the file has more groups than tensors")


def build_network(header: Mapping[str, Any], table: TensorTable, budget: Budget) -> LoadedNetwork:
    """The network that a header describes. The tensors outside of modules have their shapes from ``table``.

    Raises DSPFormatError for a description that contradicts itself or names something unknown.
    """
    shapes, modes = _input_shapes(header), header.get("modes")
    if modes not in ("both", "eval"):
        raise DSPFormatError(f"modes is {str(modes)[:80]}; expected both or eval")
    calls, modules, tensors = (header.get(key) for key in ("calls", "modules", "tensors"))
    if not isinstance(calls, list) or not isinstance(modules, dict) or not isinstance(tensors, dict):
        raise DSPFormatError("the description has no calls, no modules or no tensors")
    if len(calls) > _MOST_CALLS or len(modules) + len(tensors) > _MOST_MODULES:
        raise DSPFormatError(
            f"{len(calls)} calls of {len(modules)} modules; expected at most {_MOST_CALLS} of {_MOST_MODULES}"
        )
    root = nn.Module()
    callable_paths = set()
    for path, settings in modules.items():
        parent, module = _parent(root, path), build_module(settings, path, budget)
        parent.add_module(path.rpartition(".")[2], module)
        if type(module) not in CONTAINERS.values():
            callable_paths.add(path)
    for path, kind in tensors.items():
        if path not in table:
            raise DSPFormatError(f"tensor {path!r} is not in the file")
        shape, dtype = table[path]
        tensor = torch.empty(shape, dtype=dtype, device="meta")
        parent, name = _parent(root, path), path.rpartition(".")[2]
        if kind == "parameter" and dtype.is_floating_point:
            parent.register_parameter(name, nn.Parameter(tensor))
        elif kind == "buffer":
            parent.register_buffer(name, tensor)
        else:
            raise DSPFormatError(f"tensor {path!r} is a {kind!r} of {dtype}; expected a parameter or buffer")
    graph = fx.Graph()
    nodes: list[fx.Node] = []
    names = {"module": callable_paths, "tensor": {TRAINING, *root.state_dict()}}
    for call in calls:
        nodes.append(_build_call(graph, call, nodes, len(nodes) == len(calls) - 1, names))
    inputs = [node for node in nodes if node.op == "placeholder"]
    if not nodes or nodes[-1].op != "output" or len(inputs) != len(shapes):
        end = nodes[-1].op if nodes else "nothing"
        raise DSPFormatError(
            f"the calls take {len(inputs)} inputs and end with {end!r}; expected inputs of the {len(shapes)} "
            "shapes in the description, and an output"
        )
    first = calls[: len(inputs)]
    if nodes[: len(inputs)] != inputs or [call["input"] for call in first] != [*range(len(inputs))]:
        raise DSPFormatError("the inputs have to be the first calls, numbered in order")
    given, widths = header.get("example_given") is True, _dense_widths(header)
    try:
        return LoadedNetwork(root, graph, shapes, given, modes, widths)
    except Exception as error:  # torch.fx writes the source of forward() and compiles it
        raise DSPFormatError(f"the calls do not make a network: {error!r}") from error


def _input_shapes(header: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    shape = header.get("example_shape")
    if shape is None or not is_shape(shape, (4,)):
        raise DSPFormatError(f"the example's shape is {str(shape)[:80]}; expected four sizes of an image")
    further = header.get("further_shapes", []) if header["version"] > 2 else []
    fits = isinstance(further, list) and len(further) < _MOST_INPUTS
    if not fits or not all(is_shape(other, range(1, 5)) for other in further):
        raise DSPFormatError(f"shapes of further inputs are {str(further)[:80]}; expected up to 15 shapes")
    return tuple(shape), *map(tuple, further)


def _dense_widths(header: Mapping[str, Any]) -> dict[str, tuple[int, int, int]] | None:
    found: dict[str, tuple[int, int, int]] = {}
    for key, kind, least in (("dense_widths", "modules", 1), ("dense_tensors", "tensors", 0)):
        widths = header.get(key, {})
        for path, sizes in widths.items() if isinstance(widths, dict) else [("", widths)]:
            fits = isinstance(sizes, list) and len(sizes) == 3 and path in header[kind]
            if not fits or not all(type(size) is int and least <= size < 2**31 for size in sizes):
                raise DSPFormatError(f"{key} of {path[:80]!r} are {str(sizes)[:80]}; expected three sizes")
            found[path] = sizes[0], sizes[1], sizes[2]
    return found or None


def _parent(root: nn.Module, path: Any) -> nn.Module:
    """The module that holds ``path``, whose last part has to be a new, plain name in it."""
    parts = path.split(".") if isinstance(path, str) else []
    plain = all(_PART.fullmatch(part) and not keyword.iskeyword(part) for part in parts)
    if not plain or not 1 <= len(parts) <= 32:
        raise DSPFormatError(f"{str(path)[:80]!r} is no path of a module")
    parent = root
    for part in parts[:-1]:
        child = parent._modules.get(part)
        if child is None or type(child) not in CONTAINERS.values():
            raise DSPFormatError(f"{path!r} is inside a module that is no container")
        parent = child
    name = parts[-1]
    if hasattr(parent, name) or hasattr(LoadedNetwork, name) or (parent is root and name in _ATTRIBUTES):
        raise DSPFormatError(f"{path!r} takes a name that a module has already")
    return parent


def build_module(described: Any, path: str, budget: Budget) -> nn.Module:
    """The module of ``encode_module``, on the meta device. Raises DSPFormatError for anything else."""
    if not isinstance(described, Mapping) or not isinstance(described.get("class"), str):
        raise DSPFormatError(f"layer {path!r} has no class")
    settings = dict(described)
    name = settings.pop("class")
    for setting, value in settings.items():
        if setting != "structure" and not is_plain(value):
            raise DSPFormatError(f"layer {path!r}: {setting} is {str(value)[:80]}; no {name} has that")
    builder = _BUILDERS.get(name)
    if builder is None:
        raise DSPFormatError(f"layer {path!r}: class {name!r} is unknown")
    build, allowed = builder
    if set(settings) != set(allowed):
        raise DSPFormatError(
            f"layer {path!r}: the settings of this {name} are {sorted(settings)}; expected {sorted(allowed)}"
        )
    try:
        if "structure" in settings:
            budget.spend(settings["structure"], path)
            settings["structure"] = GroupStructure.from_dict(settings["structure"])
        with torch.device("meta"):
            return build(**{key: tuple(v) if isinstance(v, list) else v for key, v in settings.items()})
    except (DSPError, TypeError, ValueError, RuntimeError, AssertionError, OverflowError) as error:
        raise DSPFormatError(f"layer {path!r} cannot be made from its description: {error}") from error


def _fused(structure: GroupStructure, bias: Any, backend: Any, **settings: Any) -> FusedConv2d:
    spec = ConvSpec(structure, **settings)
    weights = [torch.empty(len(g.out_index), len(g.in_index), *spec.kernel_size) for g in structure.groups]
    return FusedConv2d(spec, weights, torch.empty(structure.out_channels) if bias else None, backend)


_PACKED = (*CONV_SETTINGS, "structure", "bias")
# Class -> the function that makes it, and the settings that it takes.
_BUILDERS: dict[str, tuple[Callable[..., nn.Module], tuple[str, ...]]] = {
    **{name: (kind, ()) for name, kind in CONTAINERS.items()},
    **{kind.__name__: (kind, settings) for kind, settings in MODULES.items()},
    "PackedConv2d": (PackedConv2d, _PACKED),
    "FusedConv2d": (_fused, (*_PACKED, "activation", "backend")),
}


def _build_call(
    graph: fx.Graph, call: Any, nodes: list[fx.Node], last: bool, names: Mapping[str, set[str]]
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
    if not isinstance(named.get("device"), fx.Node | None):
        raise DSPFormatError(f"call {number} names a device; expected that of an earlier call")
    if kind == "module" and name in names["module"]:
        return graph.call_module(name, arguments, named)
    if kind == "tensor" and name in names["tensor"] and not args and not kwargs:
        return graph.create_node("get_attr", name)
    if kind == "method" and name in METHODS and arguments and isinstance(arguments[0], fx.Node):
        return graph.call_method(name, arguments, named)
    function = functions(name) if kind == "function" else None
    if function is None:
        raise DSPFormatError(f"call {number} is of the {kind} {name[:80]!r}, which is not known here")
    if function is getattr and (len(args) != 2 or kwargs or args[1] not in ATTRIBUTES):
        raise DSPFormatError(f"call {number} reads an attribute other than {', '.join(ATTRIBUTES)}")
    return graph.call_function(function, arguments, named)


def _is_name(text: str) -> bool:
    # torch.fx writes the names of modules and arguments into the source of forward().
    return text.isascii() and text.isidentifier() and not keyword.iskeyword(text) and len(text) <= 64


def _decode(value: Any, nodes: list[fx.Node], depth: int = 0) -> Any:
    """An argument of a call. A node is the number of an earlier call, so there is no cycle."""
    if depth > _DEEPEST:
        raise DSPFormatError(f"an argument is nested more than {_DEEPEST} deep")
    if value is None or isinstance(value, bool | int | float | str):
        large = len(value) > 64 if isinstance(value, str) else type(value) is int and abs(value) >= 2**63
        if large:
            raise DSPFormatError(f"an argument is {str(value)[:80]}; expected 64 characters or 63 bits")
        return value
    if isinstance(value, list):
        return [_decode(item, nodes, depth + 1) for item in value]
    ((form, content),) = value.items() if isinstance(value, dict) and len(value) == 1 else (("", None),)
    if form == "node" and type(content) is int:
        if not 0 <= content < len(nodes):
            raise DSPFormatError(f"call {len(nodes)} reads call {content}; it can only read earlier ones")
        return nodes[content]
    if form == "dtype" and isinstance(content, str) and content in DTYPES:
        return DTYPES[content]
    if form == "ellipsis":
        return ...
    if form == "dict" and isinstance(content, dict):
        return {key: _decode(item, nodes, depth + 1) for key, item in content.items()}
    if isinstance(content, list) and (form == "tuple" or (form == "slice" and len(content) == 3)):
        items = [_decode(item, nodes, depth + 1) for item in content]
        return tuple(items) if form == "tuple" else slice(*items)
    raise DSPFormatError(f"an argument of call {len(nodes)} is {str(value)[:80]}; no argument has that form")
