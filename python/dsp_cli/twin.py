"""An example image for a loaded network, as far as its file tells."""

from __future__ import annotations

import torch
from dsp_benchmarks.twin import input_channels
from torch import Tensor, nn

__all__ = ["example_of"]

_SMALL = 32  # where neither the file nor the user says how large an image is


def example_of(model: nn.Module, image_size: int | None = None) -> tuple[Tensor, bool]:
    """One image of zeros, (1, channels, height, width), and whether its size is known.

    The size is the user's, else the one in the file, else a usual one that fits.
    """
    shape = getattr(model, "example_shape", None)
    if image_size is not None:
        shape = (1, shape[1] if shape else input_channels(model), image_size, image_size)
        return torch.zeros(shape), True
    if shape is not None:
        return torch.zeros(1, *shape[1:]), bool(getattr(model, "example_given", False))
    return torch.zeros(1, input_channels(model), _SMALL, _SMALL), False
