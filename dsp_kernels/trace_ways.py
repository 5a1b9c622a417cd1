"""A network by torch.export, for every batch size: the graphs for one image and for several, as one.

torch.export takes a size of one for a constant, so what forward() does with one image is a graph of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree

from dsp_kernels.errors import DSPTraceError
from dsp_kernels.size_check import SizeCheck
from dsp_kernels.tolerances import network_tolerance
from dsp_kernels.trace_export import Exported, export_calls
from dsp_kernels.trace_translate import IsLeaf, same_calls

__all__ = ["SIZE_CHECK", "exported_network"]

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
