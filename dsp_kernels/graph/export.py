"""What torch.fx cannot follow, followed by torch.export: the same kind of graph, of the model's modules.

torch.export runs forward() with sizes as symbols. Python's own control flow over sizes, ``**kwargs`` and
modules called by other names are no obstacle then; what was assumed about sizes comes out as conditions.
"""

from __future__ import annotations

import contextlib
import logging
import operator
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree

from dsp_kernels.errors import DSPError, DSPTraceError
from dsp_kernels.graph.size_check import SizeCheck, holds, parse_condition
from dsp_kernels.tolerances import network_tolerance

__all__ = [
    "SIZE_CHECK",
    "Exported",
    "IsLeaf",
    "Translation",
    "export_calls",
    "exported_network",
    "is_check",
    "place_in_user_code",
    "plain_call",
    "same_calls",
]

_SIZE = re.compile(r"L\['\w+'\](?:\[0\])?\.size\(\)\[([023])\]")
_AXES = {"0": "batch", "2": "height", "3": "width"}
_OTHER_BATCHES = (2, 3, 5, 8, 64)


@dataclass
class Exported:
    """graph: calls of modules, functions and methods, with one input; conditions: see ``SizeCheck``.

    constants: name -> tensor that forward() makes by itself, read by ``get_attr`` nodes of that name.
    """

    graph: fx.Graph
    conditions: tuple[str, ...] = ()
    constants: dict[str, Tensor] = field(default_factory=dict)


def export_calls(model: nn.Module, example_input: Tensor, is_leaf: IsLeaf, mutates: bool = False) -> Exported:
    """The calls of a model in its present mode, for images such as the example, at any batch size but 1.

    example_input: (batch, channels, height, width); is_leaf(module, path): whether a call of this module is
    one node. mutates: whether forward() may write into buffers, as batch norm does in training mode.
    Raises DSPTraceError, naming the line of the model's code, if torch.export cannot follow it either.
    """
    batch = example_input if len(example_input) == 1 else example_input[:1].repeat(2, 1, 1, 1)
    auto = torch.export.Dim.AUTO
    try:
        with _quiet(), torch.no_grad():
            program = torch.export.export(
                model, (batch.clone(),), dynamic_shapes=({0: auto, 2: auto, 3: auto},), strict=False
            )
    except Exception as error:  # torch.export raises errors of many kinds
        raise DSPTraceError(_why(model, error)) from error
    translation = Translation(model, program, is_leaf)
    if not mutates:
        translation.refuse_mutations()
    graph = translation.run()
    conditions = _conditions(model, program, tuple(batch.shape))
    return Exported(graph, conditions, translation.constants)


def place_in_user_code(error: BaseException) -> str:
    """The innermost line outside torch and this package that an error came through; "" if there is none."""
    ours, torchs, contexts = Path(__file__).parent, Path(torch.__file__).parent, Path(contextlib.__file__)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        foreign = path.is_relative_to(ours) or path.is_relative_to(torchs) or path == contexts
        if path.is_file() and not foreign:
            return f"line {frame.lineno} of {path.name}: {frame.line}"
    return ""


def _conditions(
    model: nn.Module, program: torch.export.ExportedProgram, shape: tuple[int, ...]
) -> tuple[str, ...]:
    """What an exported program takes for granted about sizes; the size itself where that cannot be said."""
    found = []
    sizes = shape[0], shape[2], shape[3]
    for guard in program._guards_code:
        text = _SIZE.sub(lambda match: _AXES[match[1]], guard)
        try:
            parsed = parse_condition(text)
        except DSPError:
            return f"height == {shape[2]}", f"width == {shape[3]}"
        if "batch" in text and len(sizes) and sizes[0] > 1:
            others = [holds(parsed, (batch, *sizes[1:])) for batch in _OTHER_BATCHES]
            if not all(others):
                raise DSPTraceError(
                    f"{type(model).__name__}.forward() is another one for other numbers of images ({text}); "
                    "move what depends on their number out of it"
                )
            if not holds(parsed, (1, *sizes[1:])):  # of one image there is a graph of its own
                continue
        if not (text.endswith("!= 1") and _always_above_one(parsed)):
            found.append(text)
    return tuple(dict.fromkeys(found))


def _always_above_one(parsed: tuple[Any, ...]) -> bool:
    """Whether ``... != 1`` only says what export says of every size: that it is not one by chance."""
    return all(holds(parsed, (2, size, size)) for size in range(4, 257))


def _why(model: nn.Module, error: Exception) -> str:
    place = place_in_user_code(error)
    message = str(error).strip().partition("\n")[0][:200]
    if type(error).__name__ in ("GuardOnDataDependentSymNode", "UserError") and "data-dependent" in str(
        error
    ):
        message = "what it does there depends on the values of a tensor; move that out of forward()"
    return f"{type(model).__name__} cannot be traced{f', {place}' if place else ''}: {message}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch.export says about graphs that it gives up on."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


_INLINED = {"wrap_with_set_grad_enabled", "wrap_with_autocast"}
IsLeaf = Callable[[nn.Module, str], bool]


def same_calls(left: fx.Graph, right: fx.Graph) -> bool:
    """Whether two graphs call the same things on the same tensors; sizes may be numbers in one of them."""
    first, second = _computing(left), _computing(right)
    names = dict(zip(second, first, strict=False))
    return len(first) == len(second) and all(
        (a.op, a.target) == (b.op, b.target) and _alike(a.args, b.args, names)
        for a, b in zip(first, second, strict=True)
    )


def _computing(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if not (n.meta.get("number") or n.op == "placeholder")]


def _alike(left: Any, right: Any, names: dict[fx.Node, fx.Node]) -> bool:
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(_alike(a, b, names) for a, b in zip(left, right, strict=True))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_alike(left[key], right[key], names) for key in left)
    numbers = [
        isinstance(value, int) or (isinstance(value, fx.Node) and bool(value.meta.get("number")))
        for value in (left, right)
    ]
    if all(numbers):
        return not (isinstance(left, int) and isinstance(right, int)) or left == right
    if isinstance(left, fx.Node) and isinstance(right, fx.Node):
        return left.op == right.op == "placeholder" or names.get(right) is left
    return bool(left == right)


class Translation:
    """From an exported program to a graph whose calls are those of the model's modules."""

    def __init__(self, model: nn.Module, program: torch.export.ExportedProgram, is_leaf: IsLeaf) -> None:
        self.model, self.program, self.is_leaf = model, program, is_leaf
        self.graph = fx.Graph()
        self.made: dict[fx.Node, Any] = {}
        self.paths: dict[fx.Node, str] = {}  # placeholders of parameters and buffers
        self.constants: dict[str, Tensor] = {}
        self.leaves: dict[str, tuple[str, list[fx.Node]]] = {}  # call of a module -> its path and nodes
        self.leaf_of: dict[fx.Node, str] = {}
        self.outer: dict[fx.Node, Any] = {}  # input of an inlined block -> what is given for it
        self.results: dict[fx.Node, Any] = {}  # an inlined block -> what it returns

    def refuse_mutations(self) -> None:
        """Raises DSPTraceError where forward() writes into buffers of the model."""
        changed = set(self.program.graph_signature.buffers_to_mutate.values())
        for node in self._inlined(self.program.graph_module):
            name = getattr(node.target, "_opname", "")
            if node.args and isinstance(node.args[0], fx.Node) and name.endswith("_") and name != "detach_":
                changed.add(self._held(self._source(node.args[0])))
                if not node.users and _is_view(self._source(node.args[0])):
                    changed.add(f"a part of a tensor ({name})")
        changed.discard("")
        if changed:
            raise DSPTraceError(
                f"{type(self.model).__name__}.forward() writes into {', '.join(sorted(changed))} in eval "
                "mode; expected a forward() that changes no buffer and no part of a tensor in place"
            )

    def run(self) -> fx.Graph:
        signature = self.program.graph_signature
        held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        lifted = signature.inputs_to_lifted_tensor_constants
        nodes = list(self._inlined(self.program.graph_module))
        self._find_leaves(nodes)
        for node in nodes:
            if node.op == "placeholder":
                if node.name in held:
                    self.paths[node] = held[node.name]
                elif node.name in lifted:
                    self.paths[node] = name = f"constant_{lifted[node.name]}".replace(".", "_")
                    self.constants[name] = self.program.constants[lifted[node.name]].detach()
                else:
                    self.made[node] = self.graph.placeholder("x")
            elif node.op == "output":
                values = list(node.args[0])[len(signature.buffers_to_mutate) :]  # type: ignore[arg-type]
                flat = [self._new(value) for value in values]
                self.graph.output(_pytree.tree_unflatten(flat, self.program.call_spec.out_spec))
            elif not is_check(node):
                self._call(node)
        self.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
        return self.graph

    def _inlined(self, module: Any) -> Iterator[fx.Node]:
        """The nodes of a graph, with blocks that only switch gradients or autocast off put in their place."""
        for node in module.graph.nodes:
            name = getattr(node.target, "__name__", "")
            if node.op == "get_attr":
                continue
            if node.op != "call_function" or name not in _INLINED:
                yield node
                continue
            args = list(node.args)
            if name == "wrap_with_autocast" and args[2] is not False:
                raise DSPTraceError(
                    f"{type(self.model).__name__}.forward() turns autocast on by itself; trace it without: "
                    "the precision is then chosen once, outside of it"
                )
            place = next(i for i, arg in enumerate(args) if isinstance(arg, fx.Node) and arg.op == "get_attr")
            inner = module.get_submodule(str(args[place].target))
            operands = iter(args[place + 1 :])
            for part in self._inlined(inner):
                if part.op == "placeholder":
                    self.outer[part] = next(operands)
                elif part.op == "output":
                    self.results[node] = part.args[0]
                else:
                    yield part

    def _source(self, node: Any) -> fx.Node:
        """The node outside of inlined blocks, and behind picking one result of such a block."""
        while node in self.outer:
            node = self.outer[node]
        if getattr(node.target, "__name__", "") == "getitem" and node.args[0] in self.results:
            return self._source(self.results[node.args[0]][node.args[1]])
        return node

    def _find_leaves(self, nodes: list[fx.Node]) -> None:
        """Which nodes are one call of one module."""
        for node in nodes:
            for key, (path, _) in node.meta.get("nn_module_stack", {}).items():
                if not path or node.op != "call_function":
                    continue
                module = self._module(path)
                if module is not None and self.is_leaf(module, path):
                    self.leaves.setdefault(key, (path, []))[1].append(node)
                    self.leaf_of[node] = key
                    break
        for key, (path, parts) in list(self.leaves.items()):
            if self._given(path, parts) is None or len(self._kept(parts)) != 1:
                del self.leaves[key]
                for node in parts:
                    del self.leaf_of[node]

    def _module(self, path: str) -> nn.Module | None:
        try:
            return self.model.get_submodule(path)
        except AttributeError:
            return None

    def _given(self, path: str, parts: list[fx.Node]) -> fx.Node | None:
        """The one tensor that a module's nodes read besides its own parameters; None if there are more."""
        inside, found = set(parts), set()
        for node in parts:
            for source in (self._source(n) for n in node.all_input_nodes):
                own = source.op == "placeholder" and self._held(source).startswith(f"{path}.")
                if source not in inside and not own and not _is_number(source):
                    found.add(source)
        return found.pop() if len(found) == 1 else None

    def _held(self, placeholder: fx.Node) -> str:
        signature = self.program.graph_signature
        held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        return held.get(placeholder.name, "")

    def _kept(self, parts: list[fx.Node]) -> list[fx.Node]:
        inside = set(parts)
        return [node for node in parts if any(user not in inside for user in node.users)]

    def _call(self, node: fx.Node) -> None:
        if self._source(node) is not node:
            return
        key = self.leaf_of.get(node)
        if key is not None:
            path, parts = self.leaves[key]
            if node is self._kept(parts)[0]:
                given = self._given(path, parts)
                assert given is not None
                self.made[node] = self.graph.call_module(path, (self._new(given),))
            return
        owner = self._owner(node)
        if owner is not None:
            self.made[node] = self.graph.call_module(owner, (self._new(node.args[0]),))
            return
        args, kwargs = self._new(tuple(node.args)), self._new(dict(node.kwargs))
        op, target, args, kwargs = plain_call(node, args, kwargs)
        if not op:
            self.made[node] = args[0]
            return
        self.made[node] = made = self.graph.create_node(op, target, args, kwargs)
        made.meta["number"] = _is_number(node)

    def _owner(self, node: fx.Node) -> str | None:
        """The module whose work a function does with this module's own parameters, as ``conv.forward(x)``."""
        name, args = getattr(node.target, "_opname", ""), [*node.args]
        if (
            name not in ("conv2d", "linear", "batch_norm")
            or len(args) < 2
            or not isinstance(args[1], fx.Node)
        ):
            return None
        path = self._held(self._source(args[1])).rpartition(".")[0]
        module = self._module(path) if path else None
        if module is None or not self.is_leaf(module, path):
            return None
        bias = args[2] if len(args) > 2 else None
        own = None if getattr(module, "bias", None) is None else f"{path}.bias"
        if (self._held(self._source(bias)) if isinstance(bias, fx.Node) else None) != own:
            return None
        if name == "linear":
            return path if type(module) is nn.Linear else None
        if name == "batch_norm":
            fits = type(module) is nn.BatchNorm2d and args[5] is False and args[7] == module.eps
            return path if fits and self._held(self._source(args[3])) == f"{path}.running_mean" else None
        if type(module) is not nn.Conv2d or module.padding_mode != "zeros":
            return None
        settings = [*args[3:], *[[1, 1], [0, 0], [1, 1], 1][len(args) - 3 :]]
        expected = [module.stride, module.padding, module.dilation, module.groups]
        plain = [tuple(part) if isinstance(part, list | tuple) else part for part in settings]
        return path if plain == expected else None

    def _new(self, value: Any) -> Any:
        """An argument of the old graph as one of the new graph."""
        if isinstance(value, fx.Node):
            source = self._source(value)
            if source in self.made:
                return self.made[source]
            self.made[source] = self.graph.get_attr(self.paths[source])
            return self.made[source]
        if isinstance(value, list | tuple):
            return type(value)(self._new(part) for part in value)
        if isinstance(value, dict):
            return {key: self._new(part) for key, part in value.items()}
        return value


def _is_view(node: fx.Node) -> bool:
    """Whether a node hands on the memory of another, as a slice does."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(result.alias_info is not None for result in schema.returns)


def _is_number(node: fx.Node) -> bool:
    return isinstance(
        node.meta.get("val"), torch.SymInt | int | float | bool | torch.SymFloat | torch.SymBool
    )


_LAST = 2**63 - 1
_WHOLE: tuple[Any, ...] = (None, 0, 0, _LAST, 1)  # arguments of a slice that leaves nothing out
# (op, target, args, kwargs); op "" says that the call is its first argument itself.
_Call = tuple[str, Any, tuple[Any, ...], dict[str, Any]]
_CHECKS = {"_assert_scalar", "_assert_tensor_metadata", "_assert_async", "sym_constrain_range_for_size"}
_SAME = {"alias", "detach", "detach_", "lift_fresh_copy", "lift_fresh"}
_METHODS = {"view", "expand", "contiguous", "repeat", "unfold", "type_as", "view_as", "expand_as"}
_FUNCTIONAL_FIRST = {
    *("relu", "relu6", "silu", "gelu", "hardswish", "hardsigmoid", "leaky_relu", "elu", "dropout", "mish"),
    *("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "softplus", "hardtanh", "linear", "layer_norm"),
    *("group_norm", "pixel_shuffle", "instance_norm", "feature_dropout"),
}
_RENAMED = {
    "mean.dim": torch.mean,
    "flatten.using_ints": torch.flatten,
    "split_with_sizes.default": torch.split,
    "split.sizes": torch.split,
    "softmax.int": torch.softmax,
    "sum.dim_IntList": torch.sum,
    "group_norm.default": F.group_norm,
}


def is_check(node: fx.Node) -> bool:
    """Whether a call computes nothing and only checks."""
    return getattr(node.target, "_opname", "") in _CHECKS


def plain_call(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
    """What a model's code would have called for this node. args, kwargs: already those of the new graph."""
    packet = getattr(node.target, "overloadpacket", None)
    if packet is None:  # an operator on sizes
        return "call_function", node.target, args, kwargs
    name, full = packet.__name__, f"{packet.__name__}.{getattr(node.target, '_overloadname', '')}"
    if not str(node.target).startswith("aten."):
        return "call_function", node.target, args, kwargs
    special: Callable[..., _Call | None] | None = _SPECIAL.get(name)
    made = special(args, kwargs) if special is not None else None
    if made is not None:
        return made
    if name in _SAME:
        return "", None, args[:1], {}
    if full in _RENAMED:
        return "call_function", _RENAMED[full], args, kwargs
    if name in _METHODS or (name.endswith("_") and hasattr(torch.Tensor, name)):
        return "call_method", name, args, kwargs
    places: list[Any] = [F, torch] if name in _FUNCTIONAL_FIRST else [torch, F]
    for place in places:
        if callable(getattr(place, name, None)) and full != "to.dtype":
            return "call_function", getattr(place, name), args, kwargs
    return "call_function", node.target, args, kwargs


def _slice(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
    source, dim, start, stop, step = (*args, *_WHOLE[len(args) :])
    if kwargs or not isinstance(dim, int) or not 0 <= dim < 4:
        return None
    if start in (None, 0) and stop in (None, _LAST) and step == 1:
        return "", None, (source,), {}
    bounds = slice(start, None if stop == _LAST else stop, step)
    return "call_function", operator.getitem, (source, (*[slice(None)] * dim, bounds)), {}


def _size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
    return "call_method", "size", args, kwargs


def _pad(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
    amounts = args[1] if len(args) > 1 else kwargs["pad"]
    value = args[2] if len(args) > 2 else kwargs.get("value", 0)
    return "call_function", F.pad, (args[0], amounts, "constant", value), {}


def _upsample(mode: str) -> Callable[..., _Call | None]:
    def made(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
        aligned = mode != "nearest"
        source, size, *rest = args
        scales = rest[aligned] if len(rest) > aligned else None
        if kwargs or not (size is None or isinstance(size, list | tuple)):
            return None
        settings: dict[str, Any] = {"size": size, "scale_factor": scales, "mode": mode}
        if size is not None:
            settings["scale_factor"] = None
        if aligned:
            settings["align_corners"] = rest[0]
        return "call_function", F.interpolate, (source,), settings

    return made


def _batch_norm(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
    if kwargs or len(args) != 9:
        return None
    source, weight, bias, mean, variance, training, momentum, eps, _ = args
    return "call_function", F.batch_norm, (source, mean, variance, weight, bias, training, momentum, eps), {}


def _layer_norm(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
    return "call_function", F.layer_norm, args[:5], kwargs


def _group_norm(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
    return "call_function", F.group_norm, args[:5], kwargs


_SPECIAL: dict[str, Callable[..., _Call | None]] = {
    "slice": _slice,
    "sym_size": _size,
    "constant_pad_nd": _pad,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "upsample_nearest2d": _upsample("nearest"),
    "upsample_bilinear2d": _upsample("bilinear"),
    "upsample_bicubic2d": _upsample("bicubic"),
}


SIZE_CHECK = "size_check"  # where a graph holds the check of its input's sizes
# Products per sum and layers in a row, of a network with little known about it.
_REDUCTION, _DEPTH = 4096, 100


def exported_network(
    model: nn.Module, example_input: Tensor, every_path: bool, is_leaf: IsLeaf, first: DSPTraceError
) -> tuple[fx.GraphModule, SizeCheck | None, bool]:
    """The graph of torch.export, the check of its sizes, and whether it holds two ways of forward().

    The graph is compared with the model. first: what torch.fx said. Raises DSPTraceError as ``trace`` does.
    """
    if example_input.dim() != 4 or not len(example_input):
        raise first
    try:
        many = export_calls(model, example_input[:1].repeat(2, 1, 1, 1), is_leaf)
    except DSPTraceError as error:
        raise DSPTraceError(f"{error}. torch.fx says: {first}") from first
    one = export_calls(model, example_input[:1], is_leaf)
    conditions = tuple(dict.fromkeys((*many.conditions, *one.conditions)))
    check = SizeCheck(conditions) if conditions else None
    two_ways = not same_calls(many.graph, one.graph)
    modules = _graph_module(model, many, check)
    _compare(model, modules, example_input[:1].repeat(3, 1, 1, 1))
    if not two_ways:
        _compare(model, modules, example_input[:1])
        return modules, check, False
    if not every_path:
        raise DSPTraceError(
            f"{type(model).__name__}.forward() goes another way for a batch of one image than for more; such "
            f"a network can be packed, but not be written as one graph. torch.fx says: {first}"
        )
    return _both_ways(model, many, one, check), check, True


def _graph_module(model: nn.Module, exported: Exported, check: SizeCheck | None) -> fx.GraphModule:
    """A graph with the model's modules, its own constants and the check of sizes in front."""
    graph = exported.graph
    if check is not None:
        image = next(node for node in graph.nodes if node.op == "placeholder")
        with graph.inserting_after(image):
            checked = graph.call_module(SIZE_CHECK, (image,))
        image.replace_all_uses_with(checked, lambda user: user is not checked)
    places = _places(model, graph, {SIZE_CHECK: check, **exported.constants})
    return fx.GraphModule(places, graph, type(model).__name__)


def _places(model: nn.Module, graph: fx.Graph, others: Mapping[str, Any]) -> dict[str, Any]:
    """Path -> the module or tensor that a graph reads there."""
    places = dict(others)
    for node in graph.nodes:
        path = str(node.target)
        parent, _, name = path.rpartition(".")
        if node.op in ("call_module", "get_attr") and path not in places:
            places[path] = getattr(model.get_submodule(parent), name)
    return places


def _compare(model: nn.Module, graph_module: fx.GraphModule, x: Tensor) -> None:
    """Raises DSPTraceError where the graph does not answer as the model does."""
    bound = network_tolerance(x.dtype, _REDUCTION, _DEPTH)
    with torch.no_grad():
        expected, got = (_pytree.tree_leaves(run(x.clone())) for run in (model, graph_module))
    for a, b in zip(expected, got, strict=True):
        if isinstance(a, Tensor) and not (a - b).abs().max() <= bound * a.abs().max():
            raise DSPTraceError(
                f"{type(model).__name__} answers otherwise than the graph torch.export made of it"
            )


def _both_ways(model: nn.Module, many: Exported, one: Exported, check: SizeCheck | None) -> fx.GraphModule:
    """One graph that runs both, for one image; the modules that both call are called twice then."""
    graph = many.graph
    end = next(node for node in graph.nodes if node.op == "output")
    image = next(node for node in graph.nodes if node.op == "placeholder")
    given = next(node for node in one.graph.nodes if node.op == "placeholder")
    checked = [node for node in graph.nodes if node.op == "call_module" and node.target == SIZE_CHECK]
    with graph.inserting_before(end):
        other = graph.graph_copy(one.graph, {given: checked[0] if checked else image})
    end.args = ((end.args[0], other),)
    constants = {**many.constants, **one.constants}
    places = _places(model, graph, {SIZE_CHECK: check, **constants})
    return fx.GraphModule(places, graph, type(model).__name__)
