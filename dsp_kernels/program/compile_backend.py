"""torch.compile(model, backend="dsp_kernels"): graphs that torch.compile captures run as fused networks."""

import copy
import gc
import warnings
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any
from weakref import ref

import torch
from torch import Tensor, fx, nn

from dsp_kernels.errors import DSPBackendError, DSPShapeError, DSPTraceError
from dsp_kernels.graph.capture import Tracer
from dsp_kernels.op.spec import memory_format_of
from dsp_kernels.program.fuse import FusedNetwork, fuse


def compile_graph(graph: fx.GraphModule, examples: Sequence[Any], **settings: Any) -> Callable[..., Any]:
    """The backend "dsp_kernels" of torch.compile, by this name where the package is installed.

    For packed or dense networks in eval mode, under ``torch.no_grad()``. A graph is fused at its first call,
    once for each model that runs it, and again after a change of a weight that PyTorch's version counter sees
    (writes through ``.data`` are not seen). A graph that cannot be fused or needs a gradient or autocast
    stays in plain PyTorch; a warning says why.
    Raises DSPBackendError for ``mode=`` and ``options=``.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    >>> x = torch.randn(2, 3, 16, 16)
    >>> with torch.no_grad():
    ...     y = torch.compile(net, backend=compile_graph)(x)  # or backend="dsp_kernels"
    >>> torch.allclose(y, net(x), atol=1e-4)
    True
    """
    if settings:
        raise DSPBackendError(f'backend "dsp_kernels" takes no {" and no ".join(settings)}')
    places = list(enumerate(graph.graph.find_nodes(op="placeholder")))
    # parameters and buffers; sizes are inputs that are no tensors
    held = [
        place for place, node in places if "_dynamo_static_input_type" in node.meta.get("tensor_dict", {})
    ]
    images = [place for place, node in places if place not in held and _is_tensor(node)]
    # torch.compile records what layers do inside, and in nn_module_stack the ids and types of the modules
    around = {key for node in graph.graph.nodes for key in node.meta.get("nn_module_stack", {})}
    training = any(module.training for module in _modules() if str(id(module)) in around)
    made: dict[tuple[int, ...], tuple[Any, ...]] = {}  # models of one class share a graph
    plain = False

    def call(*arguments: Any) -> Any:
        nonlocal plain
        if plain:
            return graph.forward(*arguments)
        weights = [arguments[place] for place in held]
        key = tuple(map(id, weights))
        now = [(x.data_ptr(), 0 if x.is_inference() else x._version) for x in weights]
        entry = made.get(key)
        if entry is None or entry[0] != now:
            try:
                if training:
                    raise DSPTraceError("it is in training mode; call model.eval()")
                fused = _fused(graph, arguments, held, images)
            except Exception as error:  # whatever the graph's operations raise on random images
                plain = True
                made.clear()
                warnings.warn(f'backend "dsp_kernels" runs a graph in plain PyTorch: {error}', stacklevel=2)
                return graph.forward(*arguments)
            # Dropped when one of its weights is freed, before its id can be reused.
            entry = made[key] = now, fused, [ref(x, lambda _: made.pop(key, None)) for x in weights]
        try:
            return entry[1](*(arguments[place] for place in images))
        except DSPShapeError:  # sizes that the graph allows and one network of several inputs does not
            return graph.forward(*arguments)

    return call


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("example_value"), Tensor)


def _modules() -> list[nn.Module]:
    found = [part for part in gc.get_objects() if issubclass(type(part), nn.Module)]
    return [part for part in found if "_parameters" in vars(part)]  # not those that another thread is making


def _fused(graph: fx.GraphModule, values: Sequence[Any], held: list[int], images: list[int]) -> FusedNetwork:
    """Raises DSPError where plain PyTorch has to run instead."""
    tensors = [x for x in values if isinstance(x, Tensor)]
    places = graph.graph.find_nodes(op="placeholder")
    if not images:
        raise DSPTraceError("it has no input")
    if not all(values[place].dim() for place in images):
        raise DSPTraceError("it takes a number as an input; leave out dynamic=True, or keep the number fixed")
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise DSPBackendError("it needs gradients; call the network under torch.no_grad()")
    if any(torch.is_autocast_enabled(kind) for kind in {x.device.type for x in tensors}):
        raise DSPBackendError("autocast is on; use fuse() with a dtype")
    if any(values[place].is_inference() for place in held):
        raise DSPBackendError("its weights were made in inference mode, where no changes are counted")
    # torch.compile ran the graph on these stand-ins without data, and PyTorch counted its writes
    written = [node.name for node in places if _is_tensor(node) and node.meta["example_value"]._version]
    if written:
        raise DSPTraceError(f"it writes into its input or buffer {written[0]}")
    first = places[images[0]].meta["example_value"]
    for node in filter(_is_tensor, graph.graph.output_node().all_input_nodes):
        answer = node.meta["example_value"]
        if answer.is_floating_point() and answer.dtype != first.dtype:
            raise DSPTraceError(f"it answers in {answer.dtype} to {first.dtype}")
        if answer.dim() == first.dim() == 4 and memory_format_of(answer) != memory_format_of(first):
            raise DSPTraceError("the memory format of its answer is not that of its input")

    def captured(*inputs: Tensor) -> Any:
        given = dict(zip(images, inputs, strict=True))
        try:
            return graph.forward(*(given.get(place, x) for place, x in enumerate(values)))
        except Exception as error:
            raise DSPTraceError(f"it does not run on random images: {error}") from error

    with torch.inference_mode(False), torch.no_grad():
        model = _with_layers(graph, values, held, images)
        model.forward = captured  # fuse traces what the class does and compares with what the instance does
        return fuse(model, tuple(values[place] for place in images))


def _with_layers(
    graph: fx.GraphModule, values: Sequence[Any], held: list[int], images: list[int]
) -> nn.Module:
    """The graph of the images alone: weights are attributes, sizes are read off, layers are called.

    A layer is found by the weights that its calls read: its model need not be the one that was captured.
    """
    root, calls = nn.Module(), copy.deepcopy(graph.graph)
    places = calls.find_nodes(op="placeholder")
    shapes = {places[image]: places[image].meta["example_value"].shape for image in images}
    sizes = {str(size): (image, dim) for image, shape in shapes.items() for dim, size in enumerate(shape)}
    with calls.inserting_before(places[-1].next):
        for place, node in enumerate(places):
            if place in images:
                continue
            if place in held:
                root.register_buffer(node.name, values[place].detach())
                node.replace_all_uses_with(calls.get_attr(node.name))
            elif (size := sizes.get(str(node.meta["example_value"]))) is not None:
                node.replace_all_uses_with(calls.call_method("size", size))
            else:
                raise DSPTraceError(f"it computes with {node.name}, which is no size of an input")
            calls.erase_node(node)
    weights, tracer = {places[place].name: id(values[place]) for place in held}, Tracer()
    layers = [part for part in _modules() if tracer.is_leaf_module(part, "")]
    owned = {part: {id(x) for x in (*part.parameters(), *part.buffers())} for part in layers}

    def layer(node: fx.Node) -> tuple[str, type[nn.Module]] | None:
        around = [(key, kind) for key, (_, kind) in node.meta.get("nn_module_stack", {}).items()]
        return next((call for call in around if tracer.is_leaf_module(nn.Module.__new__(call[1]), "")), None)

    for called, group in groupby([node for node in calls.nodes if node.op.startswith("call")], layer):
        nodes = list(group)
        read = {x for node in nodes for x in node.all_input_nodes if x not in nodes and _is_tensor(x)}
        results = [node for node in nodes if any(user not in nodes for user in node.users)]
        used = {weights[x.target] for node in nodes for x in node.all_input_nodes if x.op == "get_attr"}
        found = [part for part, own in owned.items() if called and type(part) is called[1] and used <= own]
        if not used or len(found) != 1 or len(read) != 1 or len(results) != 1:
            continue
        root.add_module(results[0].name, found[0])
        with calls.inserting_after(nodes[-1]):
            new = calls.call_module(results[0].name, tuple(read))
        new.meta = results[0].meta
        results[0].replace_all_uses_with(new)
        for node in reversed(nodes):
            calls.erase_node(node)
    return fx.GraphModule(root, calls)
