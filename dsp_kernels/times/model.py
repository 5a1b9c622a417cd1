"""LayerTimes: the time of a convolution on this machine, from what its native plan counts."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from dsp_kernels.env import cpu_model
from dsp_kernels.errors import DSPBackendError, DSPFormatError
from dsp_kernels.op.spec import ConvSpec
from dsp_kernels.program.steps import Program
from dsp_kernels.run.cpu.conv import add_conv
from dsp_kernels.run.cpu.extension import chosen_isa, native, new_network, why_missing
from dsp_kernels.run.cpu.program import dtype_of, native_networks
from dsp_kernels.whole_file import cached_file, require_file, write_text

Matrix = np.ndarray[Any, np.dtype[np.float64]]
# (convolution, height and width of its input) -> what it costs, in any unit.
Price = Callable[[ConvSpec, tuple[int, int]], float]

_FORMAT = "dsp-kernels layer times 1"
# Bytes of the second-level cache, and of what a core gets of the third: what a network has beyond them comes
# from farther away.
_CACHES = {"far": 1 << 20, "farther": 8 << 20}
_FARAWAY = ("maps", "maps_of_others", "weights_once", "weights_of_others")


def macs(spec: ConvSpec, input_hw: tuple[int, int]) -> float:
    """The price of a convolution in multiply-adds of one image."""
    return float(spec.structure.macs(spec.kernel_size, spec.output_hw(input_hw)))


@dataclass(frozen=True)
class Surroundings:
    """What a network does to the time of each of its layers.

    interleave: images that are computed at once. map_bytes, weight_bytes: of the whole network.
    """

    interleave: int
    map_bytes: float
    weight_bytes: float

    @classmethod
    def of(cls, launch: Mapping[str, Any], threads: int) -> Self:
        held = np.array(launch["work"])[:, features().index("held")].sum()
        weight_bytes = 4.0 * held * (threads if launch["together"] else 1)
        return cls(launch["interleave"], launch["bytes"], weight_bytes)


@dataclass(frozen=True, eq=False)
class LayerTimes:
    """Times of layers on one machine, as ``dsp calibrate`` measured them.

    weights: microseconds per unit of each of ``features``; keys as "float32, 1 threads", and of several
        threads "float32, 2 threads together" on each image, or "apart" on images of their own.

    >>> from dsp_kernels import GroupStructure
    >>> times = LayerTimes("a machine", {"float32, 1 threads": np.full(len(features()), 1e-3)})
    >>> spec = ConvSpec(GroupStructure.dense(8, 8), (3, 3), padding=(1, 1))
    >>> times.layer(spec, (16, 16)) < times.layer(spec, (32, 32))
    True
    """

    machine: str
    weights: Mapping[str, Matrix]

    def layer(
        self,
        spec: ConvSpec,
        input_hw: tuple[int, int],
        batch: int = 1,
        threads: int | None = None,
        dtype: torch.dtype = torch.float32,
        around: Surroundings | None = None,
    ) -> float:
        """Microseconds of one convolution of a fused network for a whole batch.

        threads: None for torch's. around: the network; None: the layer alone, in the caches.
        Raises DSPBackendError if the machine was not measured with these threads and this dtype.
        """
        threads = threads or torch.get_num_threads()
        network = new_network(dtype)
        value = add_conv(network, spec, None, None, network.input(spec.structure.in_channels))
        network.output(value)
        interleave = around.interleave if around is not None else 0
        total = 0.0
        for launch in network.launches([input_hw], batch, threads, interleave):
            own = self.operations(launch, threads, dtype, around)
            names = [made for made, _ in launch["operations"]]
            total += float(own[1 : names.index(value) + 1].sum())  # without the conversion of layouts
        return total

    def operations(
        self, launch: Mapping[str, Any], threads: int, dtype: torch.dtype, around: Surroundings | None = None
    ) -> Matrix:
        """Microseconds of each operation of one of a network's ``launches``; raises as ``layer``."""
        key = key_of(dtype, threads, launch)
        if key not in self.weights:
            raise DSPBackendError(
                f"{self.machine} was measured for {', '.join(self.weights)}, not for {key}; "
                f"run `dsp calibrate --threads {threads}`"
            )
        return calls_of(launch, threads) * (counted(launch, threads, around) @ self.weights[key])

    def save(self, path: Path | None = None) -> Path:
        """Write the file, whole or not at all; path: None for this machine's own."""
        described = {
            "format": _FORMAT,
            "machine": self.machine,
            "features": features(),
            "weights": {key: list(map(float, row)) for key, row in self.weights.items()},
        }
        return write_text(path or times_file(), json.dumps(described, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path | None = None) -> Self:
        """Read a file of ``save``; path: None for this machine's own.

        Raises FileNotFoundError, DSPFormatError for a damaged file, of another machine or of other kernels.
        """
        path, again = path or times_file(), "measure again with `dsp calibrate`"
        try:
            require_file(path)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}: measure this machine with `dsp calibrate`") from None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            kind, names, machine = found["format"], found["features"], found["machine"]
            weights = {str(key): np.array(row, dtype=np.float64) for key, row in found["weights"].items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DSPFormatError(f"{path} holds no layer times ({error!r}); {again}") from None
        if kind != _FORMAT or names != features():
            raise DSPFormatError(f"{path} is of another version of the kernels; {again}")
        if machine != machine_name():
            raise DSPFormatError(f"{path} is of {machine}, this machine is {machine_name()}; {again}")
        for key, row in weights.items():
            if row.shape != (len(names),) or not (np.isfinite(row).all() and (row >= 0).all() and row.any()):
                raise DSPFormatError(f"{path} has impossible times for {key}; {again}")
        return cls(machine, weights)


def machine_name() -> str:
    """The processor, its cores and the instruction set of the kernels."""
    if native() is None:
        raise DSPBackendError(why_missing())
    return f"{cpu_model()} {os.cpu_count()} cores {chosen_isa()}"


def times_file() -> Path:
    """Where this machine's times are."""
    return cached_file("times", machine_name())


@cache
def features() -> list[str]:
    """Names of what is counted of an operation."""
    module = native()
    if module is None:
        raise DSPBackendError(why_missing())
    return [*module.counts, *(f"{far}_{what}" for far in _CACHES for what in _FARAWAY)]


def key_of(dtype: torch.dtype, threads: int, launch: Mapping[str, Any]) -> str:
    """Which of a machine's weights hold for a launch."""
    how = "" if threads == 1 else " together" if launch["together"] else " apart"
    return f"{str(dtype).removeprefix('torch.')}, {threads} threads{how}"


def counted(launch: Mapping[str, Any], threads: int, around: Surroundings | None = None) -> Matrix:
    """[operations, features] of one of a network's ``launches``, for one block of images on one thread."""
    work = np.array(launch["work"], dtype=np.float64)
    of = {name: work[:, column] for column, name in enumerate(features()[: work.shape[1]])}
    of["operations"][:] = 1.0
    around = around or Surroundings.of(launch, threads)
    conv = (of["bound"] + of["band_bound"]) > 0
    columns = []
    for held_bytes in _CACHES.values():
        maps = 4.0 * of["traffic"] * _beyond(around.map_bytes, held_bytes)
        held = of["held"] * _beyond(around.map_bytes + around.weight_bytes, held_bytes)
        columns += [maps * conv, maps * ~conv, held * conv, held * ~conv]
    return np.column_stack([work, *columns])


def _beyond(total: float, cache: int) -> float:
    return max(0.0, 1.0 - cache / total) if total else 0.0


def blocks_of(launch: Mapping[str, Any]) -> int:
    """Blocks of images that are computed at once."""
    return -(-launch["images"] // (1 if launch["together"] else launch["interleave"]))


def calls_of(launch: Mapping[str, Any], threads: int) -> int:
    """Blocks that a thread computes, one after the other."""
    return -(-blocks_of(launch) // (1 if launch["together"] else threads))


def surroundings(program: Program, batch: int, threads: int | None = None) -> Surroundings:
    """Of the layers of a network."""
    threads = threads or torch.get_num_threads()
    network, shapes, _ = max(native_networks(program, dtype_of(program)), key=lambda each: len(each[2]))
    return Surroundings.of(network.launches([shape[1:] for shape in shapes], batch, threads)[0], threads)
