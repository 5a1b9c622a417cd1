"""Run a network of a file on the meta device: do its calls fit each other, and how large do they get?

Nothing is computed and no memory is taken. A file whose network would need far more memory than its input
is refused before any of its tensors is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from dsp_kernels.errors import DSPFormatError
from dsp_kernels.file.operations import SCALAR_FUNCTIONS
from dsp_kernels.op.fused_conv import FusedConv2d

__all__ = ["check_network", "is_example_shape", "is_input_shape"]

# Numbers alive at one time, for one that the input holds; networks of torchvision and timm stay below 200.
_MOST_PER_INPUT = 512
_ALWAYS_ALLOWED = 2**24
_LARGEST_INPUT = 2**24
_LONGEST_PRODUCT = 8  # products of products of sizes: each doubles the length of a number at most
_NUMBERS = (Tensor, int, float)


def is_example_shape(shape: Any) -> bool:
    """Whether this is (batch, channels, height, width) of an input of a sane size."""
    if not isinstance(shape, list | tuple) or len(shape) != 4:
        return False
    if not all(isinstance(size, int) and not isinstance(size, bool) and 1 <= size <= 2**16 for size in shape):
        return False
    return shape[0] * shape[1] * shape[2] * shape[3] <= _LARGEST_INPUT


def is_input_shape(shape: Any) -> bool:
    """The same for a further input, of any number of dimensions: a vector of features, for instance."""
    if not isinstance(shape, list | tuple) or not 1 <= len(shape) <= 4:
        return False
    return is_example_shape([*shape, *[1] * (4 - len(shape))])


def check_network(
    network: fx.GraphModule, example_shapes: Sequence[tuple[int, ...]], dtype: torch.dtype
) -> None:
    """Raises DSPFormatError where the network, on the meta device, cannot run on inputs of these shapes.

    dtype: of the tensors in its file; modules on the meta device are made in another one and get this one.
    """
    network.to(dtype)
    inputs = [torch.empty(shape, device="meta", dtype=dtype) for shape in example_shapes]
    checker = _Checker(network, max(_ALWAYS_ALLOWED, _MOST_PER_INPUT * sum(x.numel() for x in inputs)))
    try:
        with torch.no_grad():
            checker.run(*inputs)
    except DSPFormatError:
        raise
    except Exception as error:  # whatever torch says about arguments that do not fit
        raise DSPFormatError(
            f"the network does not run on an input of shape {' and '.join(map(str, example_shapes))}: "
            f"{str(error)[:300]}"
        ) from error


class _Checker(fx.Interpreter):
    """Runs call by call and watches the memory that a run on real numbers would hold."""

    def __init__(self, network: fx.GraphModule, allowed: int) -> None:
        super().__init__(network)
        self.extra_traceback = False
        self._allowed = allowed
        self._live: dict[fx.Node, int] = {}
        self._total = 0
        self._products: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        operands = [self.env[node] for node in n.all_input_nodes]
        if n.op == "call_method" and not isinstance(operands[0], Tensor):
            raise DSPFormatError(f"method {n.target!r} is called of a {type(operands[0]).__name__}")
        if n.op == "call_function" and n.target in _SCALAR:
            self._check_numbers(n)
        result = super().run_node(n)
        self._check_result(n, result)
        return result

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(target)
        if isinstance(module, FusedConv2d):
            width, shape = module.spec.structure.in_channels, tuple(getattr(args[0], "shape", ()))
            if len(shape) != 4 or shape[1] != width:
                raise DSPFormatError(f"layer {target!r} of {width} channels reads a tensor of shape {shape}")
            return module._call_op(
                *args, *[None] * (2 - len(args))
            )  # its backends have no meta device, its op has
        return module(*args, **kwargs) if isinstance(module, nn.Module) else None

    def _check_numbers(self, n: fx.Node) -> None:
        """Python's own operators on anything but numbers and tensors could make lists of any length."""
        operands: Any = self.map_nodes_to_values(n.args, n)
        if n.target is SCALAR_FUNCTIONS["operator.getitem"]:
            fine = bool(operands) and isinstance(operands[0], Tensor | tuple | list | Mapping)
        elif n.target is SCALAR_FUNCTIONS["operator.add"] and all(isinstance(o, tuple) for o in operands):
            fine = sum(len(operand) for operand in operands) <= 16  # of sizes
        else:
            fine = all(isinstance(operand, _NUMBERS) for operand in operands)
        if not fine or n.kwargs:
            raise DSPFormatError(f"{n.target} of {[type(operand).__name__ for operand in operands]}")
        factors = max((self._products.get(node, 0) for node in n.all_input_nodes), default=0)
        self._products[n] = factors + 1
        if factors >= _LONGEST_PRODUCT and not any(isinstance(operand, Tensor) for operand in operands):
            raise DSPFormatError(f"more than {_LONGEST_PRODUCT} operations on sizes, one after the other")

    def _check_result(self, n: fx.Node, result: Any) -> None:
        if n.op == "placeholder" or n.op == "get_attr":
            return
        self._live[n] = sum(tensor.numel() for tensor in _tensors(result))
        self._total += self._live[n]
        if self._total > self._allowed:
            raise DSPFormatError(
                f"call {n.name!r} brings the network to {self._total} numbers alive at one time; expected at "
                f"most {self._allowed} for such an input"
            )
        for done in self.user_to_last_uses.get(n, []):
            self._total -= self._live.pop(done, 0)


_SCALAR = frozenset(SCALAR_FUNCTIONS.values())


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, tuple | list):
        return [tensor for item in value for tensor in _tensors(item)]
    return []
