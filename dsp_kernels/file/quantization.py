"""The record of a quantised network in the header of a file: the scale and range of every integer value.

A value is known by the number of the call that computes it. The rest follows from the network: which steps
compute in integers, and the weights.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch

from dsp_kernels.errors import DSPFormatError
from dsp_kernels.file.decode import LoadedNetwork
from dsp_kernels.graph.inputs import fusable_inputs
from dsp_kernels.program.fuse import float_program
from dsp_kernels.quantizing.calibrate import SCALES
from dsp_kernels.quantizing.choose import FEWEST_LEVELS, choose
from dsp_kernels.quantizing.network import QuantizedNetwork, checked_keep
from dsp_kernels.quantizing.rewrite import Grid

RECORD = "quantization"  # key of the header
DEFINITION = 1  # of the arithmetic, dsp_kernels/run/eager/integers.py
_BYTES = ((0, 255), (-128, 127))


def encode_record(network: QuantizedNetwork, numbers: Mapping[str, int]) -> dict[str, Any]:
    """numbers: of the calls, by the names of their values."""
    values = {}
    for name, grid in network.grids.items():
        # The planner makes two values of some calls: "sub" and "sub_minus".
        node, _, part = (name, "", "") if name in numbers else name.rpartition("_")
        values[f"{numbers[node]}_{part}".rstrip("_")] = list(grid)
    return {"definition": DEFINITION, "keep": list(network.keep), "values": values}


def check_record(header: Mapping[str, Any]) -> None:
    """Raises DSPFormatError for a record that no network can have, before a tensor is read."""
    if RECORD not in header:
        return
    record = header[RECORD] if isinstance(header[RECORD], dict) else {}
    if record.get("definition") != DEFINITION:
        raise DSPFormatError(
            f"the network is quantised by definition {str(record.get('definition'))[:20]!r} of integer "
            f"arithmetic; this dsp_kernels knows {DEFINITION}. Install a later one"
        )
    keep, values, calls = record.get("keep"), record.get("values"), header.get("calls")
    if not isinstance(keep, list) or len(keep) > 1000 or not all(isinstance(name, str) for name in keep):
        raise DSPFormatError(f"the layers that are kept in float are {str(keep)[:80]}; expected names")
    if not isinstance(values, dict) or not isinstance(calls, list):
        raise DSPFormatError(f"the scales are {str(values)[:80]}; expected one for each value")
    for key, grid in values.items():
        known = re.fullmatch(r"([0-9]{1,6})(_[a-z]{1,8})?", key)
        if not known or int(known[1]) >= len(calls):
            raise DSPFormatError(f"a scale is of call {key[:80]!r}, which the file does not hold")
        if not _is_grid(grid):
            raise DSPFormatError(
                f"call {key} is quantised by {str(grid)[:80]}; expected a positive scale, the least and the "
                "largest integer"
            )


def _is_grid(grid: Any) -> bool:
    if not isinstance(grid, list) or len(grid) != 3 or type(grid[0]) not in (int, float):
        return False
    scale, *levels = grid
    if not all(type(level) is int for level in levels) or not SCALES[0] <= scale <= SCALES[1]:
        return False
    low, high = levels
    return (low, high) in _BYTES or (-low == high and FEWEST_LEVELS <= high <= 32767)


def decode_record(model: LoadedNetwork, record: Mapping[str, Any]) -> QuantizedNetwork:
    """The quantised network of a loaded one and a checked record. Raises DSPFormatError if they differ."""
    names = [node.name for node in model.graph.nodes]
    given = {}
    for key, grid in record["values"].items():
        number, sign, part = key.partition("_")
        given[f"{names[int(number)]}{sign}{part}"] = Grid(*grid)
    model.float().requires_grad_(False)
    try:
        inputs = fusable_inputs(model, tuple(torch.zeros(shape) for shape in model.example_shapes))
        program = float_program(model, inputs, torch.float32)
        keep = checked_keep(program, record["keep"])
        choice = choose(program, keep)
        for name, first in choice.scaled.items():
            grid, limit = given.get(name), choice.limits.get(first)
            levels = _BYTES if limit is None else ((-grid.high, grid.high),) if grid else ()
            if grid is None or grid != given.get(first) or grid[1:] not in levels:
                raise DSPFormatError(
                    f"value {name!r} is quantised by {grid}, like {first!r}: {given.get(first)}"
                )
            if limit is not None and not FEWEST_LEVELS <= grid.high <= limit:
                raise DSPFormatError(f"value {name!r} has the levels -+{grid.high}; expected at most {limit}")
        return QuantizedNetwork(model, choice, {name: given[name] for name in choice.scaled}, keep)
    except DSPFormatError:
        raise
    except Exception as error:  # planning asserts and indexes what a file may lack
        raise DSPFormatError(
            f"the network cannot be quantised as its file says: {str(error)[:300]}"
        ) from error
