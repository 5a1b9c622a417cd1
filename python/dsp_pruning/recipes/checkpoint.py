"""Checkpoints of a run and files of weights: written whole or not at all, read without pickled code."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsp_kernels.errors import DSPFormatError
from dsp_kernels.whole_file import UNFINISHED, fill, whole_file

__all__ = [
    "LAST",
    "PREVIOUS",
    "load_checkpoint",
    "load_weights",
    "remove_unfinished",
    "restore_weights",
    "save_checkpoint",
    "save_weights",
]

LAST = "checkpoint.pt"
PREVIOUS = "checkpoint.previous.pt"

_FORMAT = "dsp-kernels training checkpoint 1"


def save_checkpoint(directory: Path, state: Mapping[str, Any]) -> Path:
    """Write ``state`` as the newest checkpoint of ``directory`` and keep the one before it.

    state: tensors, numbers, strings and containers of them. A crash at any moment leaves a readable file.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with whole_file(directory / LAST, directory / PREVIOUS) as temporary:
        fill(temporary, partial(torch.save, {**state, "format": _FORMAT}))
    return directory / LAST


def load_checkpoint(directory: Path) -> dict[str, Any]:
    """The newest readable checkpoint of ``directory``, on the CPU.

    A corrupted newest one gives a warning, and the one before it is read.
    Raises DSPFormatError where neither can be read.
    """
    problems = []
    for path in (directory / LAST, directory / PREVIOUS):
        if not path.is_file():
            continue
        try:
            state = _read(path)
            if not isinstance(state, dict) or state.get("format") != _FORMAT:
                raise DSPFormatError(f"{path} is not a training checkpoint")
        except DSPFormatError as error:
            problems.append(str(error))
            continue
        if problems:
            warnings.warn(f"{problems[0]}; going on from {path.name}", RuntimeWarning, stacklevel=2)
        return state
    raise DSPFormatError("; ".join(problems) or f"{directory} holds no checkpoint to resume from")


def save_weights(path: Path, state_dict: Mapping[str, Tensor], accuracy: float) -> Path:
    """Write ``[state_dict, accuracy]``, the form of the published checkpoints. accuracy: 0..1."""
    path.parent.mkdir(parents=True, exist_ok=True)
    on_cpu = {name: tensor.detach().cpu() for name, tensor in state_dict.items()}
    with whole_file(path) as temporary:
        fill(temporary, partial(torch.save, [on_cpu, float(accuracy)]))
    return path


def remove_unfinished(directory: Path) -> None:
    """Delete what a killed process had only begun to write in ``directory``."""
    for path in directory.glob(UNFINISHED):
        if path.is_file():
            path.unlink(missing_ok=True)


def load_weights(path: str | Path) -> tuple[dict[str, Tensor], float | None]:
    """The weights in a file: ``[state_dict, accuracy]``, a bare state dict or a checkpoint of a run.

    Names that nn.DataParallel wrote lose their ``module.``. The accuracy is None where the file has none.
    Raises DSPFormatError for a file that is missing, truncated or foreign.
    """
    content = _read(Path(path))
    accuracy: float | None = None
    if isinstance(content, dict) and content.get("format") == _FORMAT:
        content = content["model"]
    elif isinstance(content, list | tuple) and len(content) == 2:
        content, accuracy = content[0], float(content[1])
    named = isinstance(content, dict) and all(isinstance(name, str) for name in content)
    if not named or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise DSPFormatError(f"{path} holds no weights: it must be a state dict or [state_dict, accuracy]")
    return {name.removeprefix("module."): value for name, value in content.items()}, accuracy


def restore_weights(
    model: nn.Module, weights: Mapping[str, Tensor], path: str | Path, *, optional: tuple[str, ...] = ()
) -> None:
    """Copy ``weights`` into ``model``, where a name or a shape that does not fit is an error.

    optional: endings of names that the file may lack or have in excess, such as ``.group`` and ``.mask``.
    Raises DSPFormatError that names the first tensors that do not fit.
    """
    own = model.state_dict()
    wrong = [
        f"{name} is {tuple(weights[name].shape)} in the file and {tuple(own[name].shape)} in the model"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    wrong += [f"{name} is missing" for name in own if name not in weights and not name.endswith(optional)]
    extra = [name for name in weights if name not in own]
    wrong += [f"{name} is not in the model" for name in extra if not name.endswith(optional)]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise DSPFormatError(f"{path} does not fit {type(model).__name__}: {'; '.join(wrong[:3])}{more}")
    model.load_state_dict({name: value for name, value in weights.items() if name in own}, strict=False)


def _read(path: Path) -> Any:
    if not path.is_file():
        raise DSPFormatError(f"{path}: no such file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises zip, pickle, runtime and key errors for a bad file
        raise DSPFormatError(
            f"{path} is not a readable checkpoint: it must be a whole file of torch.save that holds only "
            f"tensors and plain values ({type(error).__name__})"
        ) from error
