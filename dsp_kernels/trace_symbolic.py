"""A model's calls by torch.fx, which runs forward() on stand-ins for tensors; the model stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from threading import get_ident
from typing import Any

import torch
from torch import fx, nn

from dsp_kernels.errors import DSPTraceError
from dsp_kernels.trace_export import place_in_user_code
from dsp_kernels.trace_inputs import calls_of
from dsp_kernels.trace_ops import LEAF_TYPES

__all__ = ["Tracer", "is_leaf", "symbolic_graph"]

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
