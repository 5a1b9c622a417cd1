"""Tuning: measures the candidate configurations of one convolution and input, and keeps the fastest on disk.

Only on request: by calling ``tune``, or by DSP_KERNELS_AUTOTUNE=1, which tunes every convolution at its
first launch for an input size. During the capture of a CUDA graph the rule's choice is launched without
tuning.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import torch
from torch import Tensor

from dsp_kernels.errors import DSPBackendError
from dsp_kernels.run.gpu.graphs import is_capturing
from dsp_kernels.run.gpu.triton.config import TritonConfig, candidates
from dsp_kernels.whole_file import write_text

if TYPE_CHECKING:
    from dsp_kernels.run.gpu.triton.conv import TritonConv


# Runs a launch and returns milliseconds.
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
    """The fastest of at most 12 configurations for these operands of a launch; kept on disk.

    ``out`` is not written. Compiling each candidate takes seconds. timer: by default the median of
    triton.testing.do_bench, which needs a GPU. Candidates that need too much shared memory are skipped.
    Raises DSPBackendError without a GPU and timer, during stream capture, and if no candidate runs.
    """
    if timer is None and x.device.type != "cuda":
        raise DSPBackendError(f"tuning measures on a GPU; the tensors are on {x.device}")
    if is_capturing(x.device):
        raise DSPBackendError("tuning while a CUDA graph is being captured; tune before the capture")
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    scratch = torch.empty_like(out)
    times: dict[TritonConfig, float] = {}
    for config in _candidates(conv, x, out):

        def launch(config: TritonConfig = config) -> None:
            conv.launch(config, x, scratch, residual)

        try:
            times[config] = timer(launch) if timer else float(do_bench(launch, return_mode="median"))
        except OutOfResources:
            continue
    if not times:
        raise DSPBackendError(f"none of the configurations for {conv.spec.structure} can run on this GPU")
    best = min(times, key=lambda config: times[config])
    (cache or _cache_of(x)).put(signature(conv, x, residual), best)
    conv.remember(x, residual, best)
    return best


def kept_config(
    conv: TritonConv, x: Tensor, out: Tensor, residual: Tensor | None, cache: ConfigCache | None = None
) -> TritonConfig | None:
    """The configuration on disk for these operands, if it is a candidate; else a tuned one if enabled."""
    config = (cache or _cache_of(x)).get(signature(conv, x, residual))
    if config is not None and config in _candidates(conv, x, out):
        return config
    if os.environ.get("DSP_KERNELS_AUTOTUNE") == "1" and x.device.type == "cuda":
        return tune(conv, x, out, residual, cache=cache)
    return None


def signature(conv: TritonConv, x: Tensor, residual: Tensor | None) -> str:
    """A hash of everything that the time of a launch depends on, except GPU and triton version."""
    spec = conv.spec
    settings = [
        spec.structure.to_dict(),
        *spec.settings,
        *(conv.layout.name, str(x.dtype), list(x.shape), residual is not None),
    ]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def _candidates(conv: TritonConv, x: Tensor, out: Tensor) -> list[TritonConfig]:
    batch, _, height, width = conv.layout.as_nchw(out).shape
    return candidates(conv.spec, x.dtype, conv.layout, conv.wide_in, batch, (height, width))


def _cache_of(x: Tensor) -> ConfigCache:
    import triton

    name = torch.cuda.get_device_name(x.device) if x.device.type == "cuda" else "interpreter"
    return _opened(cache_file(name, triton.__version__))


_VERSION = 1
_MOST_BYTES = 4 << 20
_MOST_ENTRIES = 8192


def cache_file(gpu: str, triton_version: str) -> Path:
    """One file per GPU name and triton version, in $DSP_KERNELS_CACHE or the user's cache folder."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsp-kernels"
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"triton {triton_version} {gpu}")
    return Path(os.environ.get("DSP_KERNELS_CACHE") or user) / f"{name}.json"


class ConfigCache:
    """signature -> configuration, in one JSON file. A missing, foreign or damaged file counts as empty."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._configs: dict[str, TritonConfig] | None = None

    def get(self, signature: str) -> TritonConfig | None:
        """The configuration of a signature; None if there is none."""
        if self._configs is None:
            self._configs = _read(self.file)
        return self._configs.get(signature)

    def put(self, signature: str, config: TritonConfig) -> None:
        """Add one to what other processes wrote. A folder that cannot be written is not an error."""
        configs = _read(self.file)
        configs.pop(signature, None)
        configs[signature] = config
        while len(configs) > _MOST_ENTRIES:
            configs.pop(next(iter(configs)))
        self._configs = configs
        plain = {"version": _VERSION, "configs": {key: asdict(kept) for key, kept in configs.items()}}
        with suppress(OSError):
            write_text(self.file, json.dumps(plain, indent=1))


_opened = lru_cache(maxsize=16)(ConfigCache)


def _read(file: Path) -> dict[str, TritonConfig]:
    try:
        if file.stat().st_size > _MOST_BYTES:
            return {}
        plain = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(plain, dict) or plain.get("version") != _VERSION:
        return {}
    configs = plain.get("configs")
    if not isinstance(configs, dict):
        return {}
    read = {key: _config(entry) for key, entry in list(configs.items())[:_MOST_ENTRIES]}
    return {key: config for key, config in read.items() if config is not None}


def _config(entry: Any) -> TritonConfig | None:
    """The configuration, if the entry has exactly its fields, each of its type."""
    expected = get_type_hints(TritonConfig)
    if not isinstance(entry, dict) or entry.keys() != expected.keys():
        return None
    if any(type(entry[name]) is not kind for name, kind in expected.items()):
        return None
    return TritonConfig(**entry)
