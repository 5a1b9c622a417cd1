"""An example image for a loaded network, as far as its file tells."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsp_kernels.file.save_load import input_channels

_SMALL = 32  # where neither the file nor the user says how large an image is


def example_of(model: nn.Module, image_size: int | None = None) -> tuple[tuple[Tensor, ...], bool]:
    """One image of zeros, (1, channels, height, width), and further inputs; and whether its size is known.

    The size is the user's, else the one in the file, else a usual one that fits.
    """
    shapes = getattr(model, "example_shapes", ())
    further = tuple(torch.zeros(shape) for shape in shapes[1:])
    channels = shapes[0][1] if shapes else input_channels(model)
    if image_size is not None:
        return (torch.zeros(1, channels, image_size, image_size), *further), True
    if shapes:
        return (torch.zeros(1, *shapes[0][1:]), *further), bool(getattr(model, "example_given", False))
    return (torch.zeros(1, channels, _SMALL, _SMALL),), False
