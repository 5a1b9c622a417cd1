"""Checks of a file before any of its tensors is read.

The tensors of the file have to fit its modules. The calls are run on the meta device, which computes nothing
and takes no memory: they have to fit each other, and a network that would need far more memory than its input
is refused.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dsp_kernels.errors import DSPFormatError
from dsp_kernels.file.format import SCALAR_FUNCTIONS
from dsp_kernels.graph.compare import tensors_of
from dsp_kernels.op.fused_conv import FusedConv2d

TensorTable = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # name -> shape and dtype

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
}
# Elements alive at one time, per element of the input; networks of torchvision and timm stay below 200.
_MOST_PER_INPUT = 512
_ALWAYS_ALLOWED = 2**24
_MOST_OF_QUANTIZED = 2**27  # alive at one time: load runs a quantised network, and not on the meta device
_LARGEST_INPUT = 2**24
_MOST_TENSORS = 2**16  # alive at one time; parts of one split
_LONGEST_PRODUCT = 8  # products of products of sizes: each at most doubles the number of digits


def tensor_table(file: Any, path: str | Path) -> TensorTable:
    """Name -> shape and dtype of every tensor of an open safetensors file, without reading one."""
    table = {}
    for name in file.keys():  # noqa: SIM118  # not a dict
        part, known = file.get_slice(name), ", ".join(_DTYPES)
        if (dtype := part.get_dtype()) not in _DTYPES:
            raise DSPFormatError(f"{path}: tensor {name!r} has dtype {dtype}; expected one of {known}")
        table[name] = tuple(part.get_shape()), _DTYPES[dtype]
    return table


def floating_dtype(table: TensorTable) -> torch.dtype:
    """The floating dtype of a checked file, which has at most one; float32 where it has none."""
    return next((dtype for _, dtype in table.values() if dtype.is_floating_point), torch.float32)


def check_tensors(model: nn.Module, table: TensorTable, tied: Any, path: str | Path) -> None:
    """Compare names, shapes and dtypes of the tensors in a file with the model they are for.

    tied: name -> the first name of the same tensor. Raises DSPFormatError.
    """
    expected = model.state_dict()
    if set(table) != set(expected):
        missing, foreign = sorted(set(expected) - set(table))[:3], sorted(set(table) - set(expected))[:3]
        raise DSPFormatError(f"{path}: tensors missing: {missing}; not of this model: {foreign}")
    for name, tensor in expected.items():
        what, (shape, dtype) = f"{path}: tensor {name!r}", table[name]
        if shape != tuple(tensor.shape):
            raise DSPFormatError(f"{what} has shape {list(shape)}; expected {list(tensor.shape)}")
        if dtype.is_floating_point != tensor.is_floating_point():
            raise DSPFormatError(f"{what} has dtype {dtype}; expected a dtype like {tensor.dtype}")
    floats = {str(dtype).removeprefix("torch.") for _, dtype in table.values() if dtype.is_floating_point}
    if len(floats) > 1:
        raise DSPFormatError(f"{path}: tensors of several floating dtypes: {', '.join(sorted(floats))}")
    state = model.state_dict(keep_vars=True)
    for name, first in tied.items() if isinstance(tied, dict) else [(tied, None)]:
        if not isinstance(first, str) or name not in state or first not in state or first in tied:
            raise DSPFormatError(
                f"{str(name)[:80]!r} is said to be {str(first)[:80]!r}; expected two tensors"
            )
        a, b = state[name], state[first]
        if type(a) is not type(b) or a.shape != b.shape:
            raise DSPFormatError(f"{name!r} and {first!r} cannot be the same tensor: {a.shape}, {b.shape}")


def is_shape(shape: Any, dims: Collection[int]) -> TypeGuard[Sequence[int]]:
    """Whether this is the shape of an input of sane size, with one of these numbers of dimensions."""
    return (
        isinstance(shape, list | tuple)
        and len(shape) in dims
        and all(type(size) is int and 1 <= size <= 2**16 for size in shape)
        and math.prod(shape) <= _LARGEST_INPUT
    )


def check_network(
    network: fx.GraphModule, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, is_quantized: bool = False
) -> None:
    """Raises DSPFormatError where a network on the meta device cannot run on inputs of these shapes.

    dtype: floating dtype of the tensors in its file; the modules get it.
    """
    network.to(dtype)
    inputs = [torch.empty(shape, device="meta", dtype=dtype) for shape in shapes]
    allowed = max(_ALWAYS_ALLOWED, _MOST_PER_INPUT * sum(x.numel() for x in inputs))
    if is_quantized:
        allowed = min(allowed, _MOST_OF_QUANTIZED)
    try:
        # The device is also that of tensors that the network makes.
        with torch.no_grad(), torch.device("meta"), _Bounded(allowed):
            _Checker(network, allowed).run(*inputs)
    except DSPFormatError:
        raise
    except Exception as error:  # whatever torch raises for arguments that do not fit
        raise DSPFormatError(
            f"the network does not run on an input of shape {' and '.join(map(str, shapes))}: "
            f"{str(error)[:300]}"
        ) from error


class _Bounded(TorchDispatchMode):
    """Bounds what operations inside a call make (of einsum, for example), which the graph does not show."""

    def __init__(self, allowed: int) -> None:
        super().__init__()
        self._allowed = allowed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (_aten.unbind.int, _aten.split.Tensor):
            given = args[1:] if func is _aten.split.Tensor else (1, *args[1:])
            size, dim = (*given, 0)[:2]
            if size and args[0].shape[dim] // size > _MOST_TENSORS:
                raise DSPFormatError(f"a tensor is split into more than {_MOST_TENSORS} parts")
        result = func(*args, **(kwargs or {}))
        most = max((tensor.numel() for tensor in tensors_of(result)), default=0)
        if most > self._allowed:
            raise DSPFormatError(f"{func} makes {most} elements alive at one time; at most {self._allowed}")
        return result


class _Checker(fx.Interpreter):
    """Runs call by call and counts the elements that a real run would hold."""

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
            raise DSPFormatError(f"method {n.target!r} is called on a {type(operands[0]).__name__}")
        if n.op == "call_function" and n.target in _SCALAR:
            self._check_operands(n)
        result = super().run_node(n)
        if n.op not in ("placeholder", "get_attr"):
            self._count(n, result)
        return result

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(target)
        if isinstance(module, FusedConv2d):
            width, shape = module.spec.structure.in_channels, tuple(getattr(args[0], "shape", ()))
            if len(shape) != 4 or shape[1] != width:
                raise DSPFormatError(f"layer {target!r} of {width} channels reads a tensor of shape {shape}")
            # Its backends do not run on the meta device, the torch op does.
            return module._call_op(*args, *[None] * (2 - len(args)))
        return module(*args, **kwargs) if isinstance(module, nn.Module) else None

    def _check_operands(self, n: fx.Node) -> None:
        """Python's operators on anything but numbers and tensors could make lists of any length."""
        operands: Any = self.map_nodes_to_values(n.args, n)
        if n.target is SCALAR_FUNCTIONS["operator.getitem"]:
            fine = bool(operands) and isinstance(operands[0], Tensor | tuple | list | Mapping)
        elif n.target is SCALAR_FUNCTIONS["operator.add"] and all(isinstance(o, tuple) for o in operands):
            fine = sum(len(operand) for operand in operands) <= 16  # shapes
        else:
            fine = all(isinstance(operand, Tensor | int | float) for operand in operands)
        if not fine or n.kwargs:
            kinds = [type(operand).__name__ for operand in operands]
            raise DSPFormatError(f"{n.target} of {kinds}; expected numbers and tensors")
        factors = max((self._products.get(node, 0) for node in n.all_input_nodes), default=0)
        self._products[n] = factors + 1
        if factors >= _LONGEST_PRODUCT and not any(isinstance(operand, Tensor) for operand in operands):
            raise DSPFormatError(f"more than {_LONGEST_PRODUCT} operations on sizes, one after the other")

    def _count(self, n: fx.Node, result: Any) -> None:
        least = self._allowed // _MOST_TENSORS  # an empty tensor takes memory too
        self._live[n] = sum(max(tensor.numel(), least) for tensor in tensors_of(result))
        self._total += self._live[n]
        if self._total > self._allowed:
            raise DSPFormatError(
                f"call {n.name!r} brings the network to {self._total} elements alive at one time; expected "
                f"at most {self._allowed} for such an input"
            )
        for done in self.user_to_last_uses.get(n, []):
            self._total -= self._live.pop(done, 0)


_aten = torch.ops.aten
_SCALAR = frozenset(SCALAR_FUNCTIONS.values())
