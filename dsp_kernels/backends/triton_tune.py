"""Measuring the few configurations that suit one convolution and input, and remembering the fastest.

Nothing is measured unless it is asked for: by calling ``tune``, or by DSP_KERNELS_AUTOTUNE=1 in the
environment, which tunes every convolution at its first launch on an input size. Never while a stream is
being captured into a CUDA graph: the rule's choice is launched then.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dsp_kernels.backends.triton_cache import ConfigCache, cache_file
from dsp_kernels.backends.triton_config import TritonConfig, candidates
from dsp_kernels.errors import DSPBackendError

if TYPE_CHECKING:
    from dsp_kernels.backends.triton import TritonConv

__all__ = ["kept_config", "signature", "tune"]

# A function that runs a launch and answers milliseconds.
Timer = Callable[[Callable[[], None]], float]


def tune(
    conv: TritonConv,
    x: Tensor,
    out: Tensor,
    residual: Tensor | None = None,
    *,
    timer: Timer | None = None,
    cache: ConfigCache | None = None,
) -> TritonConfig:
    """The fastest of at most 12 configurations for these tensors (as in a launch); kept on disk.

    ``out`` keeps its value. Compiling each candidate takes seconds. timer: by default the median of
    triton.testing.do_bench, which needs a GPU. A candidate that cannot be launched there (too little shared
    memory) is passed over. Raises DSPBackendError without a GPU and timer, during stream capture, and if no
    candidate runs.
    """
    if timer is None and x.device.type != "cuda":
        raise DSPBackendError(f"tuning measures on a GPU; the tensors are on {x.device}")
    if _capturing(x):
        raise DSPBackendError("tuning while a CUDA graph is being captured; tune before the capture")
    scratch = torch.empty_like(out)
    times: dict[TritonConfig, float] = {}
    for config in _candidates(conv, x, out):

        def launch(config: TritonConfig = config) -> None:
            conv.launch(config, x, scratch, residual)

        try:
            times[config] = (timer or _median)(launch)
        except _out_of_resources():
            continue
    if not times:
        raise DSPBackendError(f"none of the configurations for {conv.spec.structure} can be launched here")
    best = min(times, key=lambda config: times[config])
    (cache or _cache_of(x)).put(signature(conv, x, residual), best)
    conv.remember(x, residual, best)
    return best


def kept_config(
    conv: TritonConv, x: Tensor, out: Tensor, residual: Tensor | None, cache: ConfigCache | None = None
) -> TritonConfig | None:
    """The configuration kept for these tensors, if it is one of the candidates; tuned first if so asked."""
    config = (cache or _cache_of(x)).get(signature(conv, x, residual))
    if config is not None and config in _candidates(conv, x, out):
        return config
    if os.environ.get("DSP_KERNELS_AUTOTUNE") == "1" and x.device.type == "cuda":
        return tune(conv, x, out, residual, cache=cache)
    return None


def signature(conv: TritonConv, x: Tensor, residual: Tensor | None) -> str:
    """What the time of a launch depends on, but GPU and triton, as a short text."""
    spec = conv.spec
    told = [
        spec.structure.to_dict(),
        *(spec.kernel_size, spec.stride, spec.padding, spec.dilation, spec.activation),
        *(conv.layout.name, str(x.dtype), list(x.shape), residual is not None),
    ]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _candidates(conv: TritonConv, x: Tensor, out: Tensor) -> list[TritonConfig]:
    batch, _, height, width = conv.layout.as_nchw(out).shape
    return candidates(conv.spec, x.dtype, conv.layout, conv.wide_in, batch, (height, width))


def _capturing(x: Tensor) -> bool:
    return x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _median(launch: Callable[[], None]) -> float:
    from triton.testing import do_bench

    return float(do_bench(launch, return_mode="median"))


def _out_of_resources() -> type[Exception]:
    from triton.runtime.errors import OutOfResources

    kind: type[Exception] = OutOfResources
    return kind


def _cache_of(x: Tensor) -> ConfigCache:
    import triton

    name = torch.cuda.get_device_name(x.device) if x.device.type == "cuda" else "interpreter"
    return _opened(str(cache_file(name, triton.__version__)))


@lru_cache(maxsize=16)
def _opened(file: str) -> ConfigCache:
    return ConfigCache(Path(file))
