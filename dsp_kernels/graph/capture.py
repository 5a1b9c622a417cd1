"""A model's calls by torch.fx, which runs forward() on stand-ins for tensors; the model stays as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from dsp_kernels.errors import DSPTraceError
from dsp_kernels.graph.export import place_in_user_code
from dsp_kernels.graph.inputs import calls_of
from dsp_kernels.graph.operations import LEAF_TYPES

__all__ = [
    "Tracer",
    "is_leaf",
    "symbolic_graph",
    "without_stand_ins",
]

_DEVICES = ("cpu", "cuda")


class Tracer(fx.Tracer):
    """Modules that the library knows are one node. Refuses autocast, which a graph does not keep."""

    def __init__(self) -> None:
        super().__init__()
        self.autocast = _autocast()
        self.thread = get_ident()

    # torch.fx looks into every module of the process: those that other threads run are none of its business.
    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if get_ident() != self.thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, LEAF_TYPES) or super().is_leaf_module(m, module_qualified_name)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if any(now[0] and now != before for now, before in zip(_autocast(), self.autocast, strict=True)):
            raise DSPTraceError("forward() turns autocast on by itself; trace it without")
        return super().create_node(*args, **kwargs)


def _autocast() -> tuple[tuple[bool, torch.dtype], ...]:
    return tuple((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in _DEVICES)


def is_leaf(module: nn.Module, path: str) -> bool:
    """Whether a call of this module is one node of a graph."""
    return Tracer().is_leaf_module(module, path)


def symbolic_graph(model: nn.Module, count: int | None) -> fx.Graph:
    """The calls of forward() in the model's present mode, given ``count`` inputs (None: not known).

    Raises DSPTraceError, naming the line of the model's code, where stand-ins do not do.
    """
    try:
        return calls_of(Tracer(), model, count)
    except Exception as error:  # fx raises whatever the model's own code raises on proxies
        place = place_in_user_code(error)
        raise DSPTraceError(
            f"{type(model).__name__} cannot be traced by torch.fx{f', {place}' if place else ''}: {error}"
        ) from error


_CONSTANT = "_tensor_constant"  # torch.fx hangs tensors that forward() makes on the model under such names


@contextmanager
def without_stand_ins(model: nn.Module) -> Iterator[list[str]]:
    """Let the block trace ``model``; gives the names of the buffers that forward() wrote into meanwhile.

    The names are there when the block has ended. In whatever way it ends, attributes that hold stand-ins are
    again what they were, and so are buffers and the numbers of tensors that are none. What forward() makes of
    real tensors or modules at its first call is left: any call would make it.
    """
    before = {id(own): dict(own) for _, own in _dictionaries(model)}
    numbers = [
        (tensor, tensor.detach().clone())
        for _, own in _dictionaries(model)
        for tensor in own.values()
        if isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter)
    ]
    kept = {id(tensor): copy for tensor, copy in numbers}
    buffers = [(name, kept[id(tensor)]) for name, tensor in model.named_buffers() if id(tensor) in kept]
    written: list[str] = []
    try:
        yield written
    finally:
        now = dict(model.named_buffers(remove_duplicate=False))
        written += [name for name, copy in buffers if not _equal(now.get(name), copy)]
        for tensor, copy in numbers:
            if not _equal(tensor, copy):
                with torch.no_grad():
                    tensor.detach().copy_(copy)
        for name, own in _dictionaries(model):
            was = before.get(id(own), {})
            for key, value in list(own.items()):
                _empty(value)
                replaced = f"{name}.{key}".lstrip(".") in written
                if _is_stand_in(value) or replaced or (key.startswith(_CONSTANT) and key not in was):
                    if key in was:
                        own[key] = was[key]
                    else:
                        del own[key]


def _dictionaries(model: nn.Module) -> list[tuple[str, dict[str, Any]]]:
    """Where forward() may assign something. A script module runs code of its own, on real tensors."""
    return [
        (name, own)
        for name, module in model.named_modules()
        if not isinstance(module, torch.jit.ScriptModule)
        for own in (module._buffers, module.__dict__)
    ]


def _is_stand_in(value: Any) -> bool:
    if isinstance(value, tuple):
        return any(_is_stand_in(part) for part in value)
    return isinstance(value, fx.Proxy | FakeTensor)


def _empty(value: Any) -> None:
    """Take stand-ins out of a list or a dict."""
    if type(value) is list and any(map(_is_stand_in, value)):
        value[:] = [part for part in value if not _is_stand_in(part)]
    elif type(value) is dict:
        for key in [key for key, part in value.items() if _is_stand_in(part)]:
            del value[key]


def _equal(now: Any, kept: Tensor) -> bool:
    if not isinstance(now, Tensor) or isinstance(now, FakeTensor) or now.shape != kept.shape:
        return False
    return kept.is_meta or bool(((now == kept) | ((now != now) & (kept != kept))).all())
