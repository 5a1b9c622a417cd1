"""Tuning: measures what can run a step or a network, keeps the fastest, and remembers it on disk.

DSP_KERNELS_TUNE: 1 (or unset) measures for at most BUDGET seconds per input shape, 0 takes the first option
of everything, "all" has no limit and also measures every tile size of Triton, each of which compiles for
seconds.
"""

import hashlib
import json
import logging
import math
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

import torch

from dsp_kernels.errors import DSPError
from dsp_kernels.run.gpu.graphs import capture
from dsp_kernels.whole_file import cached_file, write_text

BUDGET = 5.0
_LOG = logging.getLogger(__name__)  # DEBUG: what was measured
_LAUNCHES, _REPLAYS = 10, 3

Launch = Callable[[], None]


def tuning() -> str:
    """DSP_KERNELS_TUNE: "0", "1" or "all". Raises DSPError for another value."""
    value = os.environ.get("DSP_KERNELS_TUNE", "1")
    if value not in ("0", "1", "all"):
        raise DSPError(f"DSP_KERNELS_TUNE is {value!r}; expected 0, 1 or all")
    return value


class Choices:
    """signature -> name of the fastest option, in one JSON file. A damaged file counts as empty."""

    _VERSION, _MOST_BYTES, _MOST_ENTRIES = 1, 4 << 20, 8192

    def __init__(self, file: Path) -> None:
        self.file = file
        self._new: dict[str, str] = {}
        self.names = self._read()

    def put(self, signature: str, name: str) -> None:
        self.names[signature] = self._new[signature] = name

    def save(self) -> None:
        """Add the new ones to what other processes wrote. A folder that cannot be written is not an error."""
        if self._new:
            kept = list({**self._read(), **self._new}.items())[-self._MOST_ENTRIES :]
            plain = {"version": self._VERSION, "choices": dict(kept)}
            with suppress(OSError):
                self.file.parent.mkdir(parents=True, exist_ok=True)
                write_text(self.file, json.dumps(plain, indent=1))
            self._new = {}

    def _read(self) -> dict[str, str]:
        try:
            if self.file.stat().st_size > self._MOST_BYTES:
                return {}
            plain = json.loads(self.file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(plain, dict) or plain.get("version") != self._VERSION:
            return {}
        names = plain.get("choices")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            return {}
        return names


_opened = lru_cache(maxsize=16)(Choices)


class Tuner:
    """Chooses among options for one input shape of a network; its budget in seconds starts when it is made.

    seconds: how long a launch takes; None measures nothing. what: for the progress line.
    """

    def __init__(
        self,
        choices: Choices,
        seconds: Callable[[Launch], float] | None,
        what: str = "",
        budget: float = BUDGET,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._choices, self._seconds, self._what = choices, seconds, what
        self._clock, self._end = clock, clock() + budget
        self._has_said = False

    def fastest(self, key: Any, options: Mapping[str, Callable[[], Launch]], *, always: bool = False) -> str:
        """The name of the fastest option, kept by ``key`` (of JSON types); each option makes a launch.

        An option that raises is left out, with a warning. Without measuring, and after the budget unless
        ``always``, it is the first. What was measured after the budget or only in part is not kept.
        """
        first, *others = options
        if self._seconds is None or not others:
            return first
        signature = hashlib.sha256(json.dumps([key, *options]).encode()).hexdigest()
        kept = self._choices.names.get(signature)
        if kept is not None and kept in options:
            return kept
        times: dict[str, float] = {}
        in_time = True
        for name, make in options.items():
            in_time = in_time and self._clock() < self._end
            if not in_time and not always:
                break
            self._say()
            try:
                times[name] = self._seconds(make())
            except Exception as error:  # not compiled for this GPU, too much shared memory, ...
                warnings.warn(f"{name} does not run on this GPU: {error}", stacklevel=2)
        by_time = sorted(times, key=lambda name: times[name])
        _LOG.debug("%s, us: %s", key, ", ".join(f"{name} {1e6 * times[name]:.1f}" for name in by_time))
        if not times:
            return others[-1] if in_time else first
        best = by_time[0]
        if in_time:
            self._choices.put(signature, best)
        return best

    def _say(self) -> None:
        if not self._has_said:
            print(f"dsp_kernels: measuring kernels {self._what}, once", file=sys.stderr, flush=True)
            self._has_said = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._choices.save()
        if self._has_said:
            _timed.last = None
            torch.cuda.empty_cache()  # a no-op without a GPU


def tuner_for(device: torch.device, what: str) -> Tuner:
    """The tuner of a GPU; elsewhere and with DSP_KERNELS_TUNE=0 it measures nothing."""
    wanted = tuning()
    if device.type != "cuda" or wanted == "0":
        return Tuner(Choices(Path(os.devnull)), None)
    from dsp_kernels import __version__

    versions = [__version__, "torch", torch.__version__]
    with suppress(PackageNotFoundError):
        versions += ["triton", version("triton")]
    name = torch.cuda.get_device_name(device)
    budget = math.inf if wanted == "all" else BUDGET
    limit = "" if wanted == "all" else f"for at most {BUDGET:.0f} s "
    choices = _opened(cached_file(name, *versions))
    return Tuner(choices, partial(gpu_seconds, device), f"on {name} {limit}{what}", budget)


# Of each thread: device, pool and the graph that was timed last, whose memory the next one uses again.
_timed = threading.local()


def gpu_seconds(device: torch.device, launch: Launch) -> float:
    """The least time of a launch over replays of a CUDA graph of several."""
    last = getattr(_timed, "last", None)
    pool = last[1] if last and last[0] == device else torch.cuda.graph_pool_handle()

    def launch_all() -> None:
        for _ in range(_LAUNCHES):
            launch()

    with torch.cuda.device(device):
        captured = capture(launch_all, device, pool)
        _timed.last = device, pool, captured
        replay = captured or launch_all
        replay()
        times = []
        for _ in range(_REPLAYS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
    return min(times) / 1e3 / _LAUNCHES
