"""What every engine has: a name, a device, a precision, and how it is built."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Runner = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Engine:
    """One way of running a network; subclasses implement ``prepare``.

    name: as shown in tables. dtype: of weights and maps. device: "cpu", "cuda" or "any". slow_build: with
    ``--short`` built for one batch size only. any_batch: what is built for one batch size runs any other as
    fast, so it is built once. tf32: float32 products on a GPU may round their factors to TF32.
    images: (n, channels, height, width), on which an int8 engine finds the range of every value.
    """

    name: str
    dtype: torch.dtype = torch.float32
    device: str = "any"
    slow_build: bool = False
    any_batch: bool = False
    tf32: bool = False
    images: Tensor | None = None

    @property
    def rounding(self) -> torch.dtype:
        """The dtype that rounds as the products do: TF32 has as many bits as float16, int8 as bfloat16."""
        if self.dtype == torch.int8:
            return torch.bfloat16
        return torch.float16 if self.tf32 else self.dtype

    def runner(self, model: nn.Module, example: Tensor) -> Runner:
        """``prepare``, with TF32 on or off while it is prepared and at every call."""
        with tf32_products(self.tf32):
            run = self.prepare(model, example)
        return tf32_products(True)(run) if self.tf32 else run

    def prepare(self, model: nn.Module, example: Tensor) -> Runner:
        """A callable that computes what ``model`` computes in eval mode for inputs like ``example``.

        example: (batch, channels, height, width), float32. The callable takes and returns float32 tensors;
        it may return the same memory at every call. ``model`` is not modified. Raises ImportError or DSPError
        if the engine cannot run here.
        """
        raise NotImplementedError


@contextmanager
def tf32_products(allowed: bool) -> Iterator[None]:
    """Turn TF32 on or off for the float32 convolutions and matrix products of torch on a GPU."""
    settings: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [setting.allow_tf32 for setting in settings]  # not fp32_precision: Inductor reads allow_tf32
    try:
        for setting in settings:
            setting.allow_tf32 = allowed
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.allow_tf32 = value


def converted(model: nn.Module, dtype: torch.dtype, layout: torch.memory_format) -> nn.Module:
    """A copy in eval mode with this precision and memory format."""
    return copy.deepcopy(model).eval().to(dtype).to(memory_format=layout)
