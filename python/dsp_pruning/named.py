"""The user's own networks and data, by name: ``package.module:function``."""

import importlib
import os
import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

from dsp_kernels.errors import DSPError


def make_model(name: str, args: Mapping[str, Any]) -> nn.Module:
    """The network that ``package.module:function(**args)`` returns, or timm's for ``timm/NAME``.

    Modules are also found in the current folder. Raises DSPError if it cannot be made.

    >>> make_model("torch.nn:Conv2d", {"in_channels": 3, "out_channels": 8, "kernel_size": 3})
    Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
    """
    if name.startswith("timm/"):
        name, args = "timm:create_model", {"model_name": name.removeprefix("timm/"), **args}
    model = call(name, args)
    if not isinstance(model, nn.Module):
        raise DSPError(f"{name} returned a {type(model).__name__}; expected a torch.nn.Module")
    return model


def call(name: str, args: Mapping[str, Any]) -> Any:
    """What ``package.module:function(**args)`` returns. Raises DSPError, naming what is wrong."""
    path, _, function = name.partition(":")
    if not path or not function:
        raise DSPError(f"{name!r} is not of the form package.module:function")
    if (here := os.getcwd()) not in sys.path:  # noqa: PTH109
        sys.path.insert(0, here)  # as python -m does
    try:
        module = importlib.import_module(path)
    except Exception as error:  # the module runs any code
        raise DSPError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    found = getattr(module, function, None)
    if not callable(found):
        raise DSPError(f"{path} ({module.__file__}) has no function {function!r}")
    try:
        return found(**args)
    except Exception as error:
        given = ", ".join(f"{key}={value!r}" for key, value in args.items())
        raise DSPError(f"{name} failed with ({given}): {type(error).__name__}: {error}") from error
