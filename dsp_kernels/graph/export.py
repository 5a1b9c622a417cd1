"""The graph of a model that torch.fx cannot trace, by torch.export: of the same form, with the same modules.

torch.export runs forward() with symbolic sizes, so Python's control flow over sizes, ``**kwargs`` and modules
called by other names are no obstacle. What it assumes about sizes becomes a SizeCheck.
"""

from __future__ import annotations

import logging
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree

from dsp_kernels.errors import DSPError, DSPTraceError, DSPVerificationError
from dsp_kernels.graph.capture import is_leaf, place_in_user_code
from dsp_kernels.graph.compare import compare_answers
from dsp_kernels.graph.size_check import SizeCheck, holds, parse_condition
from dsp_kernels.tolerances import network_tolerance

SIZE_CHECK = "size_check"  # path of the SizeCheck in an exported graph
# For the tolerance: products per sum and layers in a row, more than most networks have.
_REDUCTION, _DEPTH = 4096, 100


@dataclass(frozen=True)
class Exported:
    """graph: calls of modules, functions and methods, with one input; conditions: see ``SizeCheck``.

    constants: name -> tensor that forward() makes itself, read by ``get_attr`` nodes of that name.
    """

    graph: fx.Graph
    conditions: tuple[str, ...]
    constants: dict[str, Tensor]


def exported_network(
    model: nn.Module, example_input: Tensor, every_path: bool, first: DSPTraceError
) -> tuple[fx.GraphModule, SizeCheck | None, bool]:
    """The graph of torch.export, the check of its sizes, and whether it holds two branches of forward().

    The graph is compared with the model. first: torch.fx's error. Raises DSPTraceError as ``trace`` does.
    """
    if example_input.dim() != 4 or not len(example_input):
        raise first
    image = example_input[:1]
    try:
        many = export_calls(model, image.repeat(2, 1, 1, 1))
    except DSPTraceError as error:
        raise DSPTraceError(f"{error}. torch.fx says: {first}") from first
    one = export_calls(model, image)
    conditions = tuple(dict.fromkeys((*many.conditions, *one.conditions)))
    check = SizeCheck(conditions) if conditions else None
    two_ways = not _same_calls(many.graph, one.graph)
    graph_module = _graph_module(model, many, check)
    _compare(model, graph_module, image.repeat(3, 1, 1, 1))
    if not two_ways:
        _compare(model, graph_module, image)
        return graph_module, check, False
    if not every_path:
        raise DSPTraceError(
            f"{type(model).__name__}.forward() takes another branch for a batch of one image than for more; "
            f"such a network can be packed, but not be written as one graph. torch.fx says: {first}"
        )
    return _both_branches(model, many, one, check), check, True


def export_calls(model: nn.Module, example_input: Tensor, mutates: bool = False) -> Exported:
    """The calls of a model in its present mode: for one image, or for any larger batch size.

    example_input: (batch, channels, height, width). mutates: whether forward() may write into buffers, as
    batch norm does in training mode.
    Raises DSPTraceError, naming the line of the model's code that torch.export cannot follow.
    """
    auto = torch.export.Dim.AUTO
    try:
        with _no_logging(), torch.no_grad():
            program = torch.export.export(
                model, (example_input.clone(),), dynamic_shapes=({0: auto, 2: auto, 3: auto},), strict=False
            )
    except Exception as error:  # torch.export raises errors of many kinds
        raise DSPTraceError(_reason(model, error)) from error
    translation = _Translation(model, program)
    if not mutates:
        translation.refuse_mutations()
    graph = translation.run()
    return Exported(graph, _conditions(model, program, tuple(example_input.shape)), translation.constants)


@contextmanager
def _no_logging() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def _reason(model: nn.Module, error: Exception) -> str:
    place = place_in_user_code(error)
    message = str(error).strip().partition("\n")[0][:200]
    if type(error).__name__ in ("GuardOnDataDependentSymNode", "UserError") and "data-dependent" in str(
        error
    ):
        message = "what it does there depends on the values of a tensor; move that out of forward()"
    return f"{type(model).__name__} cannot be traced{f', {place}' if place else ''}: {message}"


def _graph_module(model: nn.Module, exported: Exported, check: SizeCheck | None) -> fx.GraphModule:
    """The graph with the model's modules and its own constants, and the check of sizes first."""
    graph = exported.graph
    if check is not None:
        image = next(node for node in graph.nodes if node.op == "placeholder")
        with graph.inserting_after(image):
            checked = graph.call_module(SIZE_CHECK, (image,))
        image.replace_all_uses_with(checked, lambda user: user is not checked)
    return _with_modules(model, graph, {SIZE_CHECK: check, **exported.constants})


def _both_branches(
    model: nn.Module, many: Exported, one: Exported, check: SizeCheck | None
) -> fx.GraphModule:
    """One graph that computes both answers for one image; modules in both branches are called twice."""
    graph = many.graph
    end = next(node for node in graph.nodes if node.op == "output")
    image = next(node for node in graph.nodes if node.op == "placeholder")
    given = next(node for node in one.graph.nodes if node.op == "placeholder")
    checked = [node for node in graph.nodes if node.op == "call_module" and node.target == SIZE_CHECK]
    with graph.inserting_before(end):
        other = graph.graph_copy(one.graph, {given: checked[0] if checked else image})
    end.args = ((end.args[0], other),)
    return _with_modules(model, graph, {SIZE_CHECK: check, **many.constants, **one.constants})


def _with_modules(model: nn.Module, graph: fx.Graph, others: Mapping[str, Any]) -> fx.GraphModule:
    held = dict(others)
    for node in graph.nodes:
        path = str(node.target)
        parent, _, name = path.rpartition(".")
        if node.op in ("call_module", "get_attr") and path not in held:
            held[path] = getattr(model.get_submodule(parent), name)
    return fx.GraphModule(held, graph, type(model).__name__)


def _compare(model: nn.Module, graph_module: fx.GraphModule, x: Tensor) -> None:
    bound = network_tolerance(x.dtype, _REDUCTION, _DEPTH)
    with torch.no_grad():
        expected, got = (_pytree.tree_leaves(run(x.clone())) for run in (model, graph_module))
    try:
        compare_answers(
            expected, got, bound, "the graph of torch.export differs from the model", "the example"
        )
    except DSPVerificationError as error:
        raise DSPTraceError(f"{type(model).__name__} cannot be traced: {error}") from error


# -- conditions on sizes

_SIZE = re.compile(r"L\['\w+'\](?:\[0\])?\.size\(\)\[([023])\]")
_AXES = {"0": "batch", "2": "height", "3": "width"}
_OTHER_BATCHES = (2, 3, 5, 8, 64)


def _conditions(
    model: nn.Module, program: torch.export.ExportedProgram, shape: tuple[int, ...]
) -> tuple[str, ...]:
    """What an exported program assumes about sizes; the example's size where SizeCheck cannot express it."""
    found = []
    batch, _, *size = shape
    for guard in program._guards_code:
        text = _SIZE.sub(lambda match: _AXES[match[1]], guard)
        try:
            parsed = parse_condition(text)
        except DSPError:
            return f"height == {size[0]}", f"width == {size[1]}"
        if "batch" in text and batch > 1:
            if not all(holds(parsed, (other, *size)) for other in _OTHER_BATCHES):  # type: ignore[arg-type]
                raise DSPTraceError(
                    f"{type(model).__name__}.forward() depends on the number of images ({text}); move what "
                    "depends on it out of forward()"
                )
            if not holds(parsed, (1, *size)):  # type: ignore[arg-type]  # one image has a graph of its own
                continue
        # torch.export says of every size that it is not 1 by coincidence.
        always = text.endswith("!= 1") and all(holds(parsed, (2, n, n)) for n in range(4, 257))
        if not always:
            found.append(text)
    return tuple(dict.fromkeys(found))


# -- two graphs that call the same


def _same_calls(left: fx.Graph, right: fx.Graph) -> bool:
    """Whether two graphs make the same calls on the same tensors; sizes may be constants in one of them."""
    first, second = (
        [node for node in graph.nodes if not node.meta.get("number") and node.op != "placeholder"]
        for graph in (left, right)
    )
    names = dict(zip(second, first, strict=False))
    return len(first) == len(second) and all(
        (a.op, a.target) == (b.op, b.target) and _same_arguments(a.args, b.args, names)
        for a, b in zip(first, second, strict=True)
    )


def _same_arguments(left: Any, right: Any, names: dict[fx.Node, fx.Node]) -> bool:
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(
            _same_arguments(a, b, names) for a, b in zip(left, right, strict=True)
        )
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(
            _same_arguments(left[key], right[key], names) for key in left
        )
    if isinstance(left, int) and isinstance(right, int):
        return left == right
    if all(
        isinstance(value, int) or (isinstance(value, fx.Node) and value.meta.get("number"))
        for value in (left, right)
    ):
        return True
    if isinstance(left, fx.Node) and isinstance(right, fx.Node):
        return left.op == right.op == "placeholder" or names.get(right) is left
    return bool(left == right)


# -- from ATen operations back to calls of modules and of torch's functions

_INLINED = {"wrap_with_set_grad_enabled", "wrap_with_autocast"}


class _Translation:
    """From an exported program to a graph whose calls are those of the model's modules."""

    def __init__(self, model: nn.Module, program: torch.export.ExportedProgram) -> None:
        self.model, self.program = model, program
        signature = program.graph_signature
        # Name of a placeholder -> path of the parameter or buffer.
        self.parameter_paths = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.graph = fx.Graph()
        self.made: dict[fx.Node, Any] = {}
        self.paths: dict[fx.Node, str] = {}  # of parameters, buffers and constants
        self.constants: dict[str, Tensor] = {}
        self.leaves: dict[str, tuple[str, list[fx.Node]]] = {}  # call of a module -> its path and nodes
        self.leaf_of: dict[fx.Node, str] = {}
        self.outer: dict[fx.Node, Any] = {}  # input of an inlined block -> the argument
        self.results: dict[fx.Node, Any] = {}  # an inlined block -> what it returns

    def refuse_mutations(self) -> None:
        """Raise DSPTraceError where forward() writes into buffers of the model."""
        changed = set(self.program.graph_signature.buffers_to_mutate.values())
        for node in self._inlined(self.program.graph_module):
            name = getattr(node.target, "_opname", "")
            if node.args and isinstance(node.args[0], fx.Node) and name.endswith("_") and name != "detach_":
                source = self._source(node.args[0])
                changed.add(self._path_of(source))
                if not node.users and _is_view(source):
                    changed.add(f"a part of a tensor ({name})")
        changed.discard("")
        if changed:
            raise DSPTraceError(
                f"{type(self.model).__name__}.forward() writes into {', '.join(sorted(changed))} in eval "
                "mode; expected a forward() that changes no buffer and no part of a tensor in place"
            )

    def run(self) -> fx.Graph:
        signature = self.program.graph_signature
        lifted = signature.inputs_to_lifted_tensor_constants
        nodes = list(self._inlined(self.program.graph_module))
        self._find_leaves(nodes)
        for node in nodes:
            if node.op == "placeholder":
                if node.name in self.parameter_paths:
                    self.paths[node] = self.parameter_paths[node.name]
                elif node.name in lifted:
                    self.paths[node] = name = f"constant_{lifted[node.name]}".replace(".", "_")
                    self.constants[name] = self.program.constants[lifted[node.name]].detach()
                else:
                    self.made[node] = self.graph.placeholder("x")
            elif node.op == "output":
                values = list(node.args[0])[len(signature.buffers_to_mutate) :]  # type: ignore[arg-type]
                flat = [self._new(value) for value in values]
                self.graph.output(_pytree.tree_unflatten(flat, self.program.call_spec.out_spec))
            elif getattr(node.target, "_opname", "") not in _CHECKS:
                self._call(node)
        self.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
        return self.graph

    def _inlined(self, module: Any) -> Iterator[fx.Node]:
        """The nodes of a graph and, in place of blocks that turn gradients or autocast off, their nodes."""
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
            operands = iter(args[place + 1 :])
            for part in self._inlined(module.get_submodule(str(args[place].target))):
                if part.op == "placeholder":
                    self.outer[part] = next(operands)
                elif part.op == "output":
                    self.results[node] = part.args[0]
                else:
                    yield part

    def _source(self, node: Any) -> fx.Node:
        """The node that computes a value that enters or leaves an inlined block."""
        while node in self.outer:
            node = self.outer[node]
        if getattr(node.target, "__name__", "") == "getitem" and node.args[0] in self.results:
            return self._source(self.results[node.args[0]][node.args[1]])
        return node

    def _find_leaves(self, nodes: list[fx.Node]) -> None:
        """Collect the nodes that together are one call of one module."""
        for node in nodes:
            for key, (path, _) in node.meta.get("nn_module_stack", {}).items():
                if path and node.op == "call_function" and self._leaf(path) is not None:
                    self.leaves.setdefault(key, (path, []))[1].append(node)
                    self.leaf_of[node] = key
                    break
        for key, (path, parts) in list(self.leaves.items()):
            if self._given(path, parts) is None or len(self._results(parts)) != 1:
                del self.leaves[key]
                for node in parts:
                    del self.leaf_of[node]

    def _leaf(self, path: str) -> nn.Module | None:
        """The module at this path if a call of it is one node."""
        try:
            module = self.model.get_submodule(path)
        except AttributeError:
            return None
        return module if is_leaf(module, path) else None

    def _given(self, path: str, parts: list[fx.Node]) -> fx.Node | None:
        """The one tensor that a module's nodes read besides its own parameters; None if there are more."""
        inside, found = set(parts), set()
        for node in parts:
            for source in map(self._source, node.all_input_nodes):
                own = self._path_of(source).startswith(f"{path}.")
                if source not in inside and not own and not _is_number(source):
                    found.add(source)
        return found.pop() if len(found) == 1 else None

    def _path_of(self, node: Any) -> str:
        """Path of the parameter or buffer that a node is, or ""."""
        return (
            self.parameter_paths.get(node.name, "")
            if isinstance(node, fx.Node) and node.op == "placeholder"
            else ""
        )

    def _results(self, parts: list[fx.Node]) -> list[fx.Node]:
        inside = set(parts)
        return [node for node in parts if any(user not in inside for user in node.users)]

    def _call(self, node: fx.Node) -> None:
        if self._source(node) is not node:
            return
        key = self.leaf_of.get(node)
        if key is not None:
            path, parts = self.leaves[key]
            if node is self._results(parts)[0]:
                self.made[node] = self.graph.call_module(path, (self._new(self._given(path, parts)),))
            return
        owner = self._owner(node)
        if owner is not None:
            self.made[node] = self.graph.call_module(owner, (self._new(node.args[0]),))
            return
        op, target, args, kwargs = _plain_call(
            node, self._new(tuple(node.args)), self._new(dict(node.kwargs))
        )
        if not op:
            self.made[node] = args[0]
            return
        self.made[node] = made = self.graph.create_node(op, target, args, kwargs)
        made.meta["number"] = _is_number(node)

    def _owner(self, node: fx.Node) -> str | None:
        """Path of the module whose parameters and settings a function call uses, as conv.forward(x) does."""
        name, args = getattr(node.target, "_opname", ""), list(node.args)
        if name not in ("conv2d", "linear", "batch_norm") or len(args) < 2:
            return None
        held = [self._path_of(self._source(a)) if isinstance(a, fx.Node) else None for a in (*args, None)]
        path = (held[1] or "").rpartition(".")[0]
        module = self._leaf(path) if path else None
        bias = None if getattr(module, "bias", None) is None else f"{path}.bias"
        if module is None or held[2] != bias:
            return None
        if name == "linear":
            return path if type(module) is nn.Linear else None
        if name == "batch_norm":
            fits = type(module) is nn.BatchNorm2d and args[5] is False and args[7] == module.eps
            return path if fits and held[3] == f"{path}.running_mean" else None
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
            if source not in self.made:
                self.made[source] = self.graph.get_attr(self.paths[source])
            return self.made[source]
        if isinstance(value, list | tuple):
            return type(value)(self._new(part) for part in value)
        if isinstance(value, dict):
            return {key: self._new(part) for key, part in value.items()}
        return value


def _is_view(node: fx.Node) -> bool:
    """Whether a node returns the memory of its input, as a slice does."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(result.alias_info is not None for result in schema.returns)


def _is_number(node: fx.Node) -> bool:
    numbers = torch.SymInt | int | float | bool | torch.SymFloat | torch.SymBool
    return isinstance(node.meta.get("val"), numbers)


# (op, target, args, kwargs) of a new node; op "" says that the result is the first argument.
_NewCall = tuple[str, Any, tuple[Any, ...], dict[str, Any]]
_LAST = 2**63 - 1
_CHECKS = {"_assert_scalar", "_assert_tensor_metadata", "_assert_async", "sym_constrain_range_for_size"}
_SAME = {"alias", "detach", "detach_", "lift_fresh_copy", "lift_fresh"}
_METHODS = {"view", "expand", "contiguous", "repeat", "unfold", "type_as", "view_as", "expand_as"}
_FUNCTIONAL_FIRST = {
    *("relu", "relu6", "silu", "gelu", "hardswish", "hardsigmoid", "leaky_relu", "elu", "dropout", "mish"),
    *("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "softplus", "hardtanh", "linear", "pixel_shuffle"),
    *("instance_norm", "feature_dropout"),
}
_RENAMED = {
    "mean.dim": torch.mean,
    "flatten.using_ints": torch.flatten,
    "split_with_sizes.default": torch.split,
    "split.sizes": torch.split,
    "softmax.int": torch.softmax,
    "sum.dim_IntList": torch.sum,
}


def _plain_call(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _NewCall:
    """The call of torch's public function or method. args, kwargs: of the new graph."""
    packet = getattr(node.target, "overloadpacket", None)
    if packet is None or not str(node.target).startswith("aten."):  # on sizes, or an op of another library
        return "call_function", node.target, args, kwargs
    name, full = packet.__name__, f"{packet.__name__}.{getattr(node.target, '_overloadname', '')}"
    made = _SPECIAL[name](args, kwargs) if name in _SPECIAL else None
    if made is not None:
        return made
    if name in _SAME:
        return "", None, args[:1], {}
    if full in _RENAMED:
        return "call_function", _RENAMED[full], args, kwargs
    if name in _METHODS or (name.endswith("_") and hasattr(Tensor, name)):
        return "call_method", name, args, kwargs
    places: list[Any] = [F, torch] if name in _FUNCTIONAL_FIRST else [torch, F]
    for place in places:
        if callable(getattr(place, name, None)) and full != "to.dtype":
            return "call_function", getattr(place, name), args, kwargs
    return "call_function", node.target, args, kwargs


def _slice(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _NewCall | None:
    defaults: tuple[Any, ...] = (None, 0, None, None, 1)
    source, dim, start, stop, step = (*args, *defaults[len(args) :])
    stop = None if stop == _LAST else stop
    if kwargs or not isinstance(dim, int) or not 0 <= dim < 4:
        return None
    if start in (None, 0) and stop is None and step == 1:
        return "", None, (source,), {}
    return "call_function", operator.getitem, (source, (*[slice(None)] * dim, slice(start, stop, step))), {}


def _pad(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _NewCall:
    amounts = args[1] if len(args) > 1 else kwargs["pad"]
    value = args[2] if len(args) > 2 else kwargs.get("value", 0)
    return "call_function", F.pad, (args[0], amounts, "constant", value), {}


def _upsample(mode: str) -> Callable[..., _NewCall | None]:
    def made(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _NewCall | None:
        aligned = mode != "nearest"
        source, size, *rest = args
        if kwargs or not (size is None or isinstance(size, list | tuple)):
            return None
        scales = rest[aligned] if len(rest) > aligned and size is None else None
        settings: dict[str, Any] = {"size": size, "scale_factor": scales, "mode": mode}
        if aligned:
            settings["align_corners"] = rest[0]
        return "call_function", F.interpolate, (source,), settings

    return made


def _batch_norm(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _NewCall | None:
    if kwargs or len(args) != 9:
        return None
    source, weight, bias, mean, variance, training, momentum, eps, _ = args
    return "call_function", F.batch_norm, (source, mean, variance, weight, bias, training, momentum, eps), {}


_SPECIAL: dict[str, Callable[..., _NewCall | None]] = {
    "slice": _slice,
    "sym_size": lambda args, kwargs: ("call_method", "size", args, kwargs),
    "constant_pad_nd": _pad,
    "batch_norm": _batch_norm,
    # Without the flag for cuDNN.
    "layer_norm": lambda args, kwargs: ("call_function", F.layer_norm, args[:5], kwargs),
    "group_norm": lambda args, kwargs: ("call_function", F.group_norm, args[:5], kwargs),
    "upsample_nearest2d": _upsample("nearest"),
    "upsample_bilinear2d": _upsample("bilinear"),
    "upsample_bicubic2d": _upsample("bicubic"),
}
