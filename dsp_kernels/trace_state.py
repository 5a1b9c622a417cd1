"""What forward() may leave in a model while it runs on stand-ins for tensors, taken out again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["without_stand_ins"]

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
