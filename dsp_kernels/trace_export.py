"""What torch.fx cannot follow, followed by torch.export: the same kind of graph, of the model's modules.

torch.export runs forward() with sizes as symbols. Python's own control flow over sizes, ``**kwargs`` and
modules called by other names are no obstacle then; what was assumed about sizes comes out as conditions.
"""

from __future__ import annotations

import contextlib
import logging
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from dsp_kernels.errors import DSPError, DSPTraceError
from dsp_kernels.size_check import holds, parse_condition
from dsp_kernels.trace_translate import IsLeaf, Translation

__all__ = ["Exported", "export_calls", "place_in_user_code"]

_SIZE = re.compile(r"L\['\w+'\](?:\[0\])?\.size\(\)\[([023])\]")
_AXES = {"0": "batch", "2": "height", "3": "width"}
_OTHER_BATCHES = (2, 3, 5, 8, 64)


@dataclass
class Exported:
    """graph: calls of modules, functions and methods, with one input; conditions: see ``SizeCheck``.

    constants: name -> tensor that forward() makes by itself, read by ``get_attr`` nodes of that name.
    """

    graph: fx.Graph
    conditions: tuple[str, ...] = ()
    constants: dict[str, Tensor] = field(default_factory=dict)


def export_calls(model: nn.Module, example_input: Tensor, is_leaf: IsLeaf, mutates: bool = False) -> Exported:
    """The calls of a model in its present mode, for images such as the example, at any batch size but 1.

    example_input: (batch, channels, height, width); is_leaf(module, path): whether a call of this module is
    one node. mutates: whether forward() may write into buffers, as batch norm does in training mode.
    Raises DSPTraceError, naming the line of the model's code, if torch.export cannot follow it either.
    """
    batch = example_input if len(example_input) == 1 else example_input[:1].repeat(2, 1, 1, 1)
    auto = torch.export.Dim.AUTO
    try:
        with _quiet(), torch.no_grad():
            program = torch.export.export(
                model, (batch.clone(),), dynamic_shapes=({0: auto, 2: auto, 3: auto},), strict=False
            )
    except Exception as error:  # torch.export raises errors of many kinds
        raise DSPTraceError(_why(model, error)) from error
    translation = Translation(model, program, is_leaf)
    if not mutates:
        translation.refuse_mutations()
    graph = translation.run()
    conditions = _conditions(model, program, tuple(batch.shape))
    return Exported(graph, conditions, translation.constants)


def place_in_user_code(error: BaseException) -> str:
    """The innermost line outside torch and this package that an error came through; "" if there is none."""
    ours, torchs, contexts = Path(__file__).parent, Path(torch.__file__).parent, Path(contextlib.__file__)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        foreign = path.is_relative_to(ours) or path.is_relative_to(torchs) or path == contexts
        if path.is_file() and not foreign:
            return f"line {frame.lineno} of {path.name}: {frame.line}"
    return ""


def _conditions(
    model: nn.Module, program: torch.export.ExportedProgram, shape: tuple[int, ...]
) -> tuple[str, ...]:
    """What an exported program takes for granted about sizes; the size itself where that cannot be said."""
    found = []
    sizes = shape[0], shape[2], shape[3]
    for guard in program._guards_code:
        text = _SIZE.sub(lambda match: _AXES[match[1]], guard)
        try:
            parsed = parse_condition(text)
        except DSPError:
            return f"height == {shape[2]}", f"width == {shape[3]}"
        if "batch" in text and len(sizes) and sizes[0] > 1:
            others = [holds(parsed, (batch, *sizes[1:])) for batch in _OTHER_BATCHES]
            if not all(others):
                raise DSPTraceError(
                    f"{type(model).__name__}.forward() is another one for other numbers of images ({text}); "
                    "move what depends on their number out of it"
                )
            if not holds(parsed, (1, *sizes[1:])):  # of one image there is a graph of its own
                continue
        if not (text.endswith("!= 1") and _always_above_one(parsed)):
            found.append(text)
    return tuple(dict.fromkeys(found))


def _always_above_one(parsed: tuple[Any, ...]) -> bool:
    """Whether ``... != 1`` only says what export says of every size: that it is not one by chance."""
    return all(holds(parsed, (2, size, size)) for size in range(4, 257))


def _why(model: nn.Module, error: Exception) -> str:
    place = place_in_user_code(error)
    message = str(error).strip().partition("\n")[0][:200]
    if type(error).__name__ in ("GuardOnDataDependentSymNode", "UserError") and "data-dependent" in str(
        error
    ):
        message = "what it does there depends on the values of a tensor; move that out of forward()"
    return f"{type(model).__name__} cannot be traced{f', {place}' if place else ''}: {message}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch.export says about graphs that it gives up on."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)
