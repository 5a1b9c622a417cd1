"""The graph of a model by torch.fx, which runs forward() on proxies; the model stays as it was."""

import contextlib
import inspect
import os
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from dsp_kernels.errors import DSPError, DSPTraceError
from dsp_kernels.graph.operations.table import BY_CALL, LEAF_TYPES

_CHUNKS = (torch.chunk, "chunk")
_SPLITS = (torch.split, "split", "split_with_sizes")
_TENSOR_SPLITS = (torch.tensor_split, "tensor_split")


class Tracer(fx.Tracer):
    """Modules of this library are one node. Refuses autocast, which a graph does not keep.

    buffers: whether what is computed from a buffer is recorded, so that it follows the buffer.
    """

    executing = False  # whether an operation runs beside being recorded

    def __init__(self, buffers: bool = True) -> None:
        super().__init__()
        self.proxy_buffer_attributes = buffers
        self.autocast = _autocast()
        self.thread = threading.get_ident()

    def is_outside(self) -> bool:
        """Whether the code that runs is not traced. torch.fx patches nn.Module for the whole process."""
        return self.executing or threading.get_ident() != self.thread

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self.is_outside():
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if self.is_outside():
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, LEAF_TYPES) or super().is_leaf_module(m, module_qualified_name)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if any(now[0] and now != before for now, before in zip(_autocast(), self.autocast, strict=True)):
            raise DSPTraceError("forward() turns autocast on by itself; trace it without")
        return super().create_node(*args, **kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Proxy(node, self)

    def length_of(self, obj: fx.Proxy) -> int | None:
        """Number of parts of a result; None if its call does not tell."""
        node = obj.node
        named = (value for name, value in node.kwargs.items() if name not in ("input", "dim"))
        amount: Any = next(iter((*node.args[1:2], *named)), None)
        if isinstance(amount, list | tuple) and node.target in (*_SPLITS, *_TENSOR_SPLITS):
            return len(amount) + (node.target in _TENSOR_SPLITS)
        return amount if isinstance(amount, int) and node.target in (*_CHUNKS, *_TENSOR_SPLITS) else None

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        length = self.length_of(obj)
        if length is None:
            return super().iter(obj)
        return (obj[place] for place in range(length))  # type: ignore[index]

    def keys(self, obj: fx.Proxy) -> Any:
        # A traced call gives no keywords to **kwargs.
        return [] if obj.node.op == "placeholder" and str(obj.node.target)[:2] == "**" else super().keys(obj)


class Proxy(fx.Proxy):
    """Has a length where the tracer knows it."""

    def __len__(self) -> int:
        length = self.tracer.length_of(self)  # type: ignore[attr-defined]
        return super().__len__() if length is None else length

    def __setitem__(self, index: Any, value: Any) -> None:
        raise fx.proxy.TraceError("it writes into a part of a tensor there; make another, as torch.cat does")


def _autocast() -> tuple[tuple[bool, torch.dtype], ...]:
    return tuple((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda"))


def symbolic_graph(model: nn.Module, count: int | None, tracer: Tracer) -> fx.Graph:
    """The graph of a model in its present mode. Raises DSPTraceError naming the line of its code.

    count: of the inputs; other arguments of forward() keep their default. None if it is unknown: every
    argument is an input then. Proxies may stay in the model: see ``without_stand_ins``.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise DSPTraceError(
            f"{type(model).__name__} is scripted (torch.jit), and scripted parts cannot be followed; give "
            "the module that it was made of"
        )
    try:
        return _without_checks(_calls_of(tracer, model, count))
    except Exception as error:  # fx raises whatever the model's own code raises on proxies
        place = _place_in_user_code(error)
        reason = str(error).strip().partition("\n")[0][:300]
        if not isinstance(error, fx.proxy.TraceError | DSPError):
            reason += "; move what torch.fx cannot record there out of forward()"
        raise DSPTraceError(
            f"{type(model).__name__} cannot be traced by torch.fx{f', {place}' if place else ''}: {reason}"
        ) from error


def _without_checks(graph: fx.Graph) -> fx.Graph:
    """Remove asserts and the sizes and comparisons that only they read."""
    for node in reversed(list(graph.nodes)):
        computes = any(entry.kind in ("scalar", "piece") for entry in BY_CALL.get(node.target, ()))
        asserts = getattr(node.target, "__name__", "") == "_assert"  # torch's and timm's
        if not node.users and (computes or asserts or node.target is getattr):
            graph.erase_node(node)
    return graph


def _place_in_user_code(error: BaseException) -> str:
    """The innermost line of an error's traceback outside torch and this package; "" if there is none."""
    skipped = Path(__file__).parents[1], Path(torch.__file__).parent, Path(contextlib.__file__)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.is_file() and not any(path.is_relative_to(place) for place in skipped):
            return f"line {frame.lineno} of {path.name}: {(frame.line or '').rstrip(':')}"
    return ""


def _calls_of(tracer: fx.Tracer, model: nn.Module, count: int | None) -> fx.Graph:
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    # The class's function, as torch.fx uses, whatever is assigned to the instance.
    signature = inspect.signature(type(model).forward).parameters.values()
    # In the order of torch.fx's placeholders; *args and **kwargs come last.
    arguments = [argument for argument in list(signature)[1:] if argument.kind not in several]
    given = len(arguments) if count is None else count
    fixed = {
        place: argument
        for place, argument in enumerate(arguments)
        if (place >= given or (count is not None and argument.kind is argument.KEYWORD_ONLY))
        and (argument.default is None or isinstance(argument.default, bool | int | float | str))
    }
    # ``if mask is not None`` takes the wrong branch for a proxy, which is never None.
    concrete = {argument.name: argument.default for argument in fixed.values()}
    with _one_trace_at_a_time():
        graph = tracer.trace(model, concrete_args=concrete or None)
    # By position: torch.fx may name the placeholder of ``mask`` "mask_1", like another argument.
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for place in fixed:
        _erase(graph, placeholders[place])
    # *args and **kwargs that get nothing.
    positional = sum(argument.kind is not argument.KEYWORD_ONLY for argument in arguments)
    for node in placeholders[len(arguments) :]:
        keywords = str(node.target).startswith("**")
        if not node.users and (keywords or (count is not None and count <= positional)):
            graph.erase_node(node)
    return graph


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a node and its users: torch.fx only compares such an argument with its default."""
    for user in list(node.users):
        _erase(graph, user)
    graph.erase_node(node)


_tracing = threading.RLock()
_methods: tuple[Any, Any] | None = None  # of nn.Module, as they were before the trace that runs


@contextmanager
def _one_trace_at_a_time() -> Iterator[None]:
    """torch.fx patches two methods of nn.Module; overlapping traces would leave a patch in place."""
    global _methods
    with _tracing:
        outer, _methods = _methods, (nn.Module.__call__, nn.Module.__getattr__)
        try:
            yield
        finally:
            _restore_methods()
            _methods = outer


def _restore_methods() -> None:
    if _methods is not None:
        nn.Module.__call__, nn.Module.__getattr__ = _methods  # type: ignore[method-assign]


def _after_fork() -> None:
    """The thread that traces does not exist in the child, so it cannot release the lock or undo the patch."""
    global _tracing, _methods
    _tracing = threading.RLock()
    _restore_methods()
    _methods = None


os.register_at_fork(after_in_child=_after_fork)


CONSTANT = "_tensor_constant"  # torch.fx stores tensors that forward() makes in the model, by such names


@contextmanager
def without_stand_ins(model: nn.Module) -> Iterator[list[str]]:
    """Undo what tracing ``model`` in this context changes in it: proxies, fake tensors, written buffers.

    Yields a list that holds the names of all written buffers when the context has ended. Other changes stay
    (counters, flags, tensors and modules made at the first call), because any call would make them.
    """
    before = {id(own): dict(own) for _, own in _namespaces(model)}
    tensors = [value for _, own in _namespaces(model) for value in own.values() if isinstance(value, Tensor)]
    copies = [(tensor, tensor.detach().clone()) for tensor in tensors if not isinstance(tensor, nn.Parameter)]
    copy_of = {id(tensor): copy for tensor, copy in copies}
    buffers = [(name, copy_of[id(tensor)]) for name, tensor in model.named_buffers() if id(tensor) in copy_of]
    written: list[str] = []
    try:
        yield written
    finally:
        now = dict(model.named_buffers(remove_duplicate=False))
        written += [name for name, copy in buffers if not _equal(now.get(name), copy)]
        for tensor, copy in copies:
            if not _equal(tensor, copy):
                with torch.no_grad():
                    tensor.detach().copy_(copy)
        for name, own in _namespaces(model):
            was = before.get(id(own), {})
            for key, value in list(own.items()):
                _remove_stand_ins(value)
                replaced = f"{name}.{key}".lstrip(".") in written
                if _is_stand_in(value) or replaced or (key.startswith(CONSTANT) and key not in was):
                    if key in was:
                        own[key] = was[key]
                    else:
                        del own[key]


def _namespaces(model: nn.Module) -> list[tuple[str, dict[str, Any]]]:
    """(path, dictionary) for all that forward() may assign to. Script modules run on real tensors only."""
    modules = [(name, m) for name, m in model.named_modules() if not isinstance(m, torch.jit.ScriptModule)]
    return [(name, own) for name, module in modules for own in (module._buffers, module.__dict__)]


def _is_stand_in(value: Any) -> bool:
    if isinstance(value, tuple):
        return any(_is_stand_in(part) for part in value)
    return isinstance(value, fx.Proxy | FakeTensor)


def _remove_stand_ins(value: Any) -> None:
    """From a list or a dict."""
    if type(value) is list and any(map(_is_stand_in, value)):
        value[:] = [part for part in value if not _is_stand_in(part)]
    elif type(value) is dict:
        for key in [key for key, part in value.items() if _is_stand_in(part)]:
            del value[key]


def _equal(now: Any, before: Tensor) -> bool:
    """NaN equals NaN."""
    if not isinstance(now, Tensor) or isinstance(now, FakeTensor) or now.shape != before.shape:
        return False
    if before.is_meta or now.dtype != before.dtype or now.device != before.device:
        return before.is_meta
    return torch.equal(now, before) or bool(((now == before) | ((now != now) & (before != before))).all())
