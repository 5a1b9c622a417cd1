"""Checkpoints and weights on disk: written atomically, read without running pickled code."""

import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsp_kernels.errors import DSPFormatError
from dsp_kernels.whole_file import UNFINISHED, fill, whole_file

LAST = "checkpoint.pt"
PREVIOUS = "checkpoint.previous.pt"

_FORMAT = "dsp-kernels training checkpoint 1"


def save_checkpoint(directory: Path, state: Mapping[str, Any]) -> None:
    """Write ``state`` as the last checkpoint of ``directory`` and keep the previous one.

    state: tensors, numbers, strings and containers of them. A crash at any time leaves a readable file.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with whole_file(directory / LAST, directory / PREVIOUS) as temporary:
        fill(temporary, partial(torch.save, {**state, "format": _FORMAT}))


def has_checkpoint(directory: Path) -> bool:
    """Is there a checkpoint to resume from?"""
    return any((directory / name).is_file() for name in (LAST, PREVIOUS))


def load_checkpoint(directory: Path) -> dict[str, Any]:
    """The last readable checkpoint of ``directory``, on the CPU.

    Falls back to the previous checkpoint, with a warning, if the last one is corrupted.
    Raises DSPFormatError if neither can be read.
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
            warnings.warn(f"{problems[0]}; resuming from {path.name}", RuntimeWarning, stacklevel=2)
        return state
    raise DSPFormatError("; ".join(problems) or f"{directory} contains no checkpoint to resume from")


def save_weights(path: Path, state_dict: Mapping[str, Tensor], accuracy: float) -> Path:
    """Write ``[state_dict, accuracy]``, the format of the published checkpoints. accuracy: 0..1."""
    path.parent.mkdir(parents=True, exist_ok=True)
    on_cpu = {name: tensor.detach().cpu() for name, tensor in state_dict.items()}
    with whole_file(path) as temporary:
        fill(temporary, partial(torch.save, [on_cpu, float(accuracy)]))
    return path


def remove_unfinished(directory: Path) -> None:
    """Delete the temporary files that a killed process left in ``directory``."""
    for path in directory.glob(UNFINISHED):
        if path.is_file():
            path.unlink(missing_ok=True)


def load_weights(path: str | Path) -> tuple[dict[str, Tensor], float | None]:
    """State dict and accuracy from ``[state_dict, accuracy]``, a plain state dict or a training checkpoint.

    The ``module.`` prefix of nn.DataParallel is removed. The accuracy is None if the file has none.
    Raises DSPFormatError for a file that is missing, truncated or of another format.
    """
    content = _read(Path(path))
    accuracy: float | None = None
    if isinstance(content, dict) and content.get("format") == _FORMAT:
        content = content["model"]
    elif isinstance(content, list | tuple) and len(content) == 2:
        content, accuracy = content[0], float(content[1])
    named = isinstance(content, dict) and all(isinstance(name, str) for name in content)
    if not named or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise DSPFormatError(f"{path} contains no weights: expected a state dict or [state_dict, accuracy]")
    return {name.removeprefix("module."): value for name, value in content.items()}, accuracy


def restore_weights(
    model: nn.Module, weights: Mapping[str, Tensor], path: str | Path, *, optional: tuple[str, ...] = ()
) -> None:
    """Copy ``weights`` into ``model``; every name and shape must match.

    optional: suffixes of names that may be missing or unexpected, such as ``.group`` and ``.mask``.
    Raises DSPFormatError that names the first mismatches.
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
            f"{path} is not a readable checkpoint: expected a complete file of torch.save with tensors and "
            f"plain values only ({type(error).__name__})"
        ) from error
