"""The dense network that a packed one was made from, as far as its file tells."""

from __future__ import annotations

import copy

from torch import nn

from dsp_kernels.architectures import build_architecture
from dsp_kernels.errors import DSPFormatError
from dsp_kernels.op.packed import PackedConv2d

__all__ = ["dense_of_one_width", "dense_twin", "input_channels"]


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


def dense_of_one_width(model: nn.Module) -> nn.Module:
    """The network with an ordinary convolution, of random weights, for each packed one of the same width.

    It stands for the dense network where a file does not name its architecture, whose widths it has not got.
    """
    dense = copy.deepcopy(model).eval()
    for name, module in list(dense.named_modules()):
        if isinstance(module, PackedConv2d):
            parent, _, child = name.rpartition(".")
            conv = nn.Conv2d(
                *(module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding),
                dilation=module.dilation,
                bias=module.bias is not None,
            )
            setattr(dense.get_submodule(parent), child, conv)
    return dense


def input_channels(model: nn.Module) -> int:
    """Channels of an input image: those of the first conv. Raises DSPFormatError where there is none."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | PackedConv2d):
            return module.in_channels
    raise DSPFormatError(f"{type(model).__name__} holds no convolution")
