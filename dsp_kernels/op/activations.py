"""The activations that the op can apply, by name. Each of them maps 0 to 0."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor


def _identity(x: Tensor) -> Tensor:
    return x


def _silu_gradient(x: Tensor) -> Tensor:
    s = x.sigmoid()
    return s * (1 + x * (1 - s))


def _hardswish_gradient(x: Tensor) -> Tensor:
    return ((2 * x + 3) / 6) * ((x > -3) & (x < 3)) + (x >= 3)


# name -> (function, the same in place, derivative as a function of the activation's input)
ACTIVATIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[..., Tensor]]] = {
    "none": (_identity, _identity, torch.ones_like),
    "relu": (F.relu, F.relu_, lambda x: x > 0),
    "relu6": (F.relu6, lambda x: F.relu6(x, inplace=True), lambda x: (x > 0) & (x < 6)),
    "silu": (F.silu, lambda x: F.silu(x, inplace=True), _silu_gradient),
    "hardswish": (F.hardswish, lambda x: F.hardswish(x, inplace=True), _hardswish_gradient),
}


# Separate steps of a Program. The op cannot apply the sigmoids, because they do not map 0 to 0, and padding
# and absent channels are zeros; GELU and tanh cost more than the step.
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "tanh": torch.tanh,
}


def activate(x: Tensor, name: str) -> Tensor:
    """x: any shape; also the gates. A new tensor, or x itself for "none"."""
    return GATES[name](x) if name in GATES else ACTIVATIONS[name][0](x)


def activate_(x: Tensor, name: str) -> Tensor:
    """x: any shape. Overwrites and returns x."""
    return ACTIVATIONS[name][1](x)


def activation_gradient(before: Tensor, name: str) -> Tensor:
    """The derivative at ``before``, the activation's input, of any shape."""
    return ACTIVATIONS[name][2](before)
