"""A GPU whose memory is the host's. Tensors are on it or not, and mixing both raises an error as there."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, Self
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from dsp_kernels.run.gpu.cuda.blocks.plan import H200

GPU = torch.device("cuda", 0)
_NOOPS = "record", "record_event", "synchronize", "wait_event", "wait_stream"
_STREAM = SimpleNamespace(**dict.fromkeys(_NOOPS, lambda *_: None), elapsed_time=lambda end: 1.0)  # or event
# Of torch.cuda.
ANSWERS: dict[str, Any] = {
    "is_available": True,
    "device_count": 1,
    "current_device": 0,
    "get_device_name": "an interpreter as H200",
    "get_device_capability": (9, 0),
    "get_device_properties": SimpleNamespace(
        multi_processor_count=H200.multiprocessors,
        shared_memory_per_block_optin=H200.shared_per_block,
        shared_memory_per_multiprocessor=H200.shared_per_multiprocessor,
    ),
    "device": nullcontext(),
    "current_stream": _STREAM,
    "Event": _STREAM,
    "is_current_stream_capturing": False,
    "graph_pool_handle": (0, 0),
    "synchronize": None,
    "empty_cache": None,
    "_sleep": None,
}
# Functions that take tensors of both devices.
_MIXING = "copy_", "__set__", "set_", "to", "__getitem__", "__setitem__", "_has_compatible_shallow_copy_type"


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Inside, this thread's tensors are on the GPU if they were made or moved there."""
    patches = [
        mock.patch.object(torch.cuda, name, lambda *a, value=value, **k: value)
        for name, value in ANSWERS.items()
    ]
    patches += [
        mock.patch.object(torch, "Generator", _HostGenerator),
        mock.patch.object(Tensor, "record_stream", _STREAM.record),
    ]
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        stack.enter_context(_Gpu())
        yield


class _Gpu(TorchFunctionMode):
    """What every function of torch is told and says of devices."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: set[StorageWeakRef] = set()  # on the GPU

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = tree_leaves((args, kwargs))
        read = [each for each in given if isinstance(each, Tensor)]
        # Devices that are only named; parameters without memory.
        if func in (torch.device, torch._C._nn._parse_to) or any(map(is_lazy, read)):
            return func(*args, **kwargs)
        if func == Tensor.device.__get__ and self._holds(read[0]):  # type: ignore[attr-defined]
            return GPU
        if func == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return self._holds(read[0])
        if func.__name__ not in _MIXING and len({self._holds(each) for each in read if each.dim()}) > 1:
            raise RuntimeError(f"{func.__name__}: Expected all tensors to be on the same device")
        named = [str(each) for each in given if isinstance(each, str | torch.device)]
        named = [each for each in named if each.startswith(("cuda", "cpu", "meta"))]
        named += [func.__name__] * (func in (Tensor.cuda, Tensor.cpu))
        if func == Tensor.to:  # as another tensor
            named += ["cuda" if self._holds(other) else "cpu" for other in read[1:]]
        is_there = named[0].startswith("cuda") if named else any(map(self._holds, read))
        before = {_storage(each) for each in read}
        args, kwargs = tree_map(_host, (args, kwargs))
        made = args[0] if func == Tensor.cuda else func(*args, **kwargs)

        def placed(tensor: Tensor) -> Tensor:
            if _storage(tensor) in before:  # a view, or it was written
                if not named or self._holds(tensor) == is_there:
                    return tensor
                tensor = tensor.clone()
            (self._storages.add if is_there else self._storages.discard)(_storage(tensor))
            return tensor

        return made if isinstance(made, torch.Size) else tree_map_only(Tensor, placed, made)

    def _holds(self, tensor: Tensor) -> bool:
        return _storage(tensor) in self._storages


def _storage(tensor: Tensor) -> StorageWeakRef:
    """While it exists, no other storage is at its address."""
    return StorageWeakRef(tensor.untyped_storage())


def _host(value: Any) -> Any:
    is_gpu = isinstance(value, str | torch.device) and str(value).startswith("cuda")
    return torch.device("cpu") if is_gpu else value


class _HostGenerator(torch.Generator):
    """Of any device."""

    def __new__(cls, device: object = "cpu") -> Self:
        return super().__new__(cls, "cpu")
