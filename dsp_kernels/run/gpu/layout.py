"""What all GPU kernels share: tensor layouts, the call of a prepared convolution, and its checks.

A gather costs nothing where a channel is a contiguous plane (CHWN), and little where the channels of a
pixel are contiguous (NHWC). A whole network stays in one of the two from its first convolution to its pool.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from dsp_kernels.errors import DSPShapeError
from dsp_kernels.op.spec import ConvSpec
from dsp_kernels.op.structure import Group, GroupStructure

# The numbers of the activations in the CUDA and Triton kernels.
ACTIVATION_CODES = {"none": 0, "relu": 1, "relu6": 2, "silu": 3, "hardswish": 4}
GPU_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# CHWN is accessed in 16-byte pieces of eight 16-bit numbers along the batch.
BATCH_MULTIPLE = 8


class GpuLayout(Enum):
    """The order of the axes (batch, channels, height, width) in memory; tensors are contiguous in it."""

    CHWN = (1, 2, 3, 0)
    NHWC = (0, 2, 3, 1)

    def shape(self, nchw: Sequence[int]) -> tuple[int, ...]:
        """The shape in this layout of a tensor (batch, channels, height, width)."""
        return tuple(nchw[axis] for axis in self.value)

    def from_nchw(self, x: Tensor) -> Tensor:
        """x: (batch, channels, height, width), any strides -> contiguous in this layout, 16-byte aligned."""
        made = x.permute(self.value).contiguous()
        return made if made.is_meta or made.data_ptr() % 16 == 0 else made.clone()

    def as_nchw(self, x: Tensor) -> Tensor:
        """A view (batch, channels, height, width) of a tensor in this layout."""
        return x.permute([self.value.index(axis) for axis in range(4)])


def layout_for_batch(batch: int) -> GpuLayout:
    """CHWN for a multiple of 8, else NHWC."""
    return GpuLayout.CHWN if batch and batch % BATCH_MULTIPLE == 0 else GpuLayout.NHWC


def round_up(value: int, multiple: int) -> int:
    """The least multiple of ``multiple`` that is not below ``value``."""
    return -(-value // multiple) * multiple


def all_groups(structure: GroupStructure) -> tuple[Group, ...]:
    """The groups, and one that reads nothing and writes the absent channels, so that all outputs are written.

    The weights of that group are (absent, 0, kh, kw). An absent channel has no bias, whatever its entry in
    the bias is (dsp_kernels/op/reference.py).
    """
    if not structure.absent:
        return structure.groups
    return (*structure.groups, Group((), structure.absent))


@dataclass(frozen=True, eq=False)
class GpuLayer:
    """A convolution for tensors of one layout, dtype and device; weights and bias are of these, too.

    weights[g]: (O_g, C_g, kh, kw); bias: (out_channels,) or None. Raises DSPShapeError if they do not fit.
    """

    spec: ConvSpec
    weights: Sequence[Tensor]
    bias: Tensor | None
    layout: GpuLayout
    dtype: torch.dtype
    device: torch.device

    def __post_init__(self) -> None:
        self.spec.check_constants(self.weights, self.bias)
        held = next(iter(self.weights), self.bias)  # all are alike
        if held is not None and (held.dtype, held.device) != (self.dtype, self.device):
            raise DSPShapeError(
                f"weights are {held.dtype} on {held.device}; this is for {self.dtype} on {self.device}"
            )

    def check(self, *operands: Any) -> tuple[int, int, int, int]:
        """See ``check_operands``."""
        kind, channels = (self.dtype, self.device), self.spec.structure.in_channels
        return check_operands(operands, self.layout, kind, channels, self.spec.output_shape)


def check_operands(
    operands: tuple[Tensor, Tensor, Tensor | None],
    layout: GpuLayout,
    kind: tuple[torch.dtype, torch.device],
    channels: int,
    output_shape: Callable[[Sequence[int]], tuple[int, ...]],
) -> tuple[int, int, int, int]:
    """(batch, channels, height, width) of x; operands: x, out, residual, see GpuConv.

    kind: of the weights. output_shape: of an input (batch, channels, height, width).
    Raises DSPShapeError unless each operand has its shape, this dtype and device, is contiguous and 16-byte
    aligned, and out is not x.
    """
    x, out, _ = operands
    if x.dim() != 4:
        raise DSPShapeError(f"x has shape {tuple(x.shape)}; expected 4 dimensions in {layout.name}")
    batch, _, height, width = layout.as_nchw(x).shape
    shape = batch, channels, height, width
    expected = layout.shape(output_shape(shape))
    shapes = layout.shape(shape), expected, expected
    for name, tensor, wanted in zip(("x", "out", "residual"), operands, shapes, strict=True):
        if tensor is None:
            continue
        if tuple(tensor.shape) != wanted:
            raise DSPShapeError(f"{name} has shape {tuple(tensor.shape)}; expected {wanted} ({layout.name})")
        if (tensor.dtype, tensor.device) != kind:
            raise DSPShapeError(
                f"{name} is {tensor.dtype} on {tensor.device}; the weights are {kind[0]} on {kind[1]}"
            )
        if not tensor.is_contiguous() or tensor.data_ptr() % 16:
            raise DSPShapeError(f"{name} is not contiguous in {layout.name} or not 16-byte aligned")
    if out.numel() and x.data_ptr() == out.data_ptr():
        raise DSPShapeError("out is x; a convolution needs other memory for its output")
    if layout is GpuLayout.CHWN and batch % BATCH_MULTIPLE:
        raise DSPShapeError(f"CHWN needs a batch that is a multiple of {BATCH_MULTIPLE}; got {batch}")
    return shape


@cache
def why_not_on(index: int | None, oldest: tuple[int, int] = (8, 0)) -> str:
    """Why CUDA device ``index`` (None: the current one) cannot run the kernels; empty if it can.

    8.0 is the first with asynchronous copies and bfloat16 on tensor cores.
    """
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    capability = torch.cuda.get_device_capability(index)
    if capability >= oldest:
        return ""
    name, (major, minor) = torch.cuda.get_device_name(index), capability
    return f"{name} has compute capability {major}.{minor}; these kernels need {oldest[0]}.{oldest[1]}"


def uses_tf32(dtype: torch.dtype) -> bool:
    """Whether float32 may be multiplied in TF32, as PyTorch's own convolutions are by default.

    ``torch.backends.cudnn.allow_tf32 = False`` or ``conv.fp32_precision = "ieee"`` switches it off.
    """
    return dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]


# One convolution with its weights arranged: (x, out, residual), contiguous in the layout it was prepared for.
# All of out is overwritten; residual may be ``out`` itself: every element is read before it is written.
# Launches on the current stream of x's device; can be captured in a CUDA graph (no synchronisation, no
# allocation).
GpuConv = Callable[[Tensor, Tensor, Tensor | None], None]


class GpuKernels(Protocol):
    """A family of kernels: CUDA C++ or Triton."""

    name: str

    def can_run(self, spec: ConvSpec, dtype: torch.dtype, device: torch.device) -> tuple[bool, str]:
        """Whether it runs this convolution on this device, in both layouts; the reason if not."""
        ...

    def prepare(self, layer: GpuLayer) -> GpuConv:
        """With the tile sizes that rules choose."""
        ...

    def options(self, layer: GpuLayer, shape: Sequence[int]) -> dict[str, Callable[[], GpuConv]]:
        """By name, everything worth measuring for an input of this shape (batch first)."""
        ...

    def why_not(self, device: torch.device) -> str:
        """Why no convolution can run on this device, and the cure; empty if some can."""
        ...
