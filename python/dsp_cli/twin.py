"""The dense network that a packed one was made from, as far as its file tells."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsp_kernels.architectures import build_architecture
from dsp_kernels.errors import DSPFormatError
from dsp_kernels.packed import PackedConv2d

__all__ = ["dense_twin", "example_of", "input_channels"]

_SMALL = 32  # where neither the file nor the user says how large an image is


def dense_twin(model: nn.Module) -> nn.Module:
    """The architecture of a loaded network before pruning, with random weights, in eval mode.

    Raises DSPFormatError where the network does not name a known architecture.
    """
    # Built without memory and without values, so each module draws its own.
    dense = build_architecture(getattr(model, "architecture", None)).to_empty(device="cpu")
    for module in dense.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
    return dense.eval()


def input_channels(model: nn.Module) -> int:
    """Channels of an input image: those of the first conv. Raises DSPFormatError where there is none."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | PackedConv2d):
            return module.in_channels
    raise DSPFormatError(f"{type(model).__name__} holds no convolution")


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
