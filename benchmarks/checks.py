"""Options that would only fail after minutes, refused at once."""

from __future__ import annotations

from argparse import Namespace
from contextlib import suppress

import torch

from dsp_kernels.errors import DSPError

from .engines.base import cuda_available

__all__ = ["check_options"]


def check_options(options: Namespace) -> None:
    """Raises DSPError for an option of ``run`` that cannot work here."""
    for name in ("rounds", "threads", "image_size", "seconds"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise DSPError(f"--{name.replace('_', '-')} is {value}; expected more than 0")
    _check_device(options.device)
    if options.profile and "/" not in options.profile:
        raise DSPError(f"--profile is {options.profile!r}; expected FORM/ENGINE, as packed/fused:cpu")


def _check_device(name: str) -> None:
    device = None
    with suppress(RuntimeError):
        device = torch.device(name)
    # torch keeps eight bits of a number: "cuda:256" would be the first device.
    wrapped = device is not None and ":" in name and str(device) != name
    if device is None or wrapped or (device.type != "cuda" and name != "cpu"):
        raise DSPError(f"--device is {name!r}; expected cpu, cuda or cuda:1")
    if device.type == "cpu":
        return
    able, reason = cuda_available()
    count = torch.cuda.device_count() if able else 0
    if able and (device.index or 0) >= count:
        reason = f"torch finds {count} CUDA device{'s' * (count != 1)}, the last is cuda:{count - 1}"
    if reason:
        raise DSPError(f"--device is {name!r}, but {reason}")
