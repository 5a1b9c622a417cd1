"""From an exported program (ATen on lifted parameters) to a graph of calls of the model's modules.

Every node carries the modules inside of which it was made; the nodes of one call of a known module become
that call again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree

from dsp_kernels.errors import DSPTraceError
from dsp_kernels.trace_aten import is_check, plain_call

__all__ = ["IsLeaf", "Translation", "same_calls"]

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
