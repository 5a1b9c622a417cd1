"""PackedConv2d: a pruned, grouped convolution as several small ones, in plain PyTorch."""

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsp_kernels.errors import DSPShapeError
from dsp_kernels.op.dense import index_tensors
from dsp_kernels.op.reference import conv_output_hw
from dsp_kernels.op.spec import ConvSpec, memory_format_of, pair
from dsp_kernels.op.structure import GroupStructure


class PackedConv2d(nn.Module):
    """A trainable convolution whose groups each read their own input channels; runs on any device.

    It equals the dense convolution with the same weights and zeros everywhere else.
    Input (batch, structure.in_channels, height, width), output (batch, structure.out_channels, ...) in the
    input's memory format.
    ``weights[g]``: (O_g, C_g, kh, kw) for the channels of ``structure.groups[g]``; ``bias``: (out_channels,)
    or None. Absent output channels are 0, whatever ``bias`` holds there.
    kernel_size, stride, padding, dilation: in pixels, as of ``nn.Conv2d``.
    Raises DSPShapeError for settings or inputs that do not fit.

    >>> structure = GroupStructure.build(4, 3, [([0, 2], [1]), ([3], [0, 2])])
    >>> conv = PackedConv2d(structure, kernel_size=3, padding=1)
    >>> [tuple(weight.shape) for weight in conv.weights]
    [(1, 2, 3, 3), (2, 1, 3, 3)]
    >>> conv(torch.ones(1, 4, 8, 8)).shape
    torch.Size([1, 3, 8, 8])
    """

    def __init__(
        self,
        structure: GroupStructure,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        bias: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.structure = structure
        self.in_channels, self.out_channels = structure.in_channels, structure.out_channels
        self.kernel_size = pair(kernel_size, "kernel_size", 1)
        self.stride = pair(stride, "stride", 1)
        self.padding = pair(padding, "padding", 0)
        self.dilation = pair(dilation, "dilation", 1)
        empty = partial(torch.empty, device=device, dtype=dtype)
        sizes = ((len(group.out_index), len(group.in_index)) for group in structure.groups)
        self.weights = nn.ParameterList(empty(*size, *self.kernel_size) for size in sizes)
        self.bias = nn.Parameter(empty(structure.out_channels)) if bias else None
        self.reset_index(device)
        self.reset_parameters()

    @property
    def spec(self) -> ConvSpec:
        """Structure and settings, as of a FusedConv2d."""
        return ConvSpec(self.structure, self.kernel_size, self.stride, self.padding, self.dilation)

    def reset_index(self, device: torch.device | str | None = None) -> None:
        """Make the index buffers from the structure, for a module that was made on the meta device."""
        # Buffers, so that they follow the module to its device; not in the state dict, because a file's
        # indices would bypass the structure's checks.
        structure = self.structure
        for number, index in enumerate(index_tensors(structure, device)[0]):
            self.register_buffer(f"in_index_{number}", index, persistent=False)
        # Outputs are computed group by group, then the absent ones. place[c] is where channel c then is.
        computed = [*(c for group in structure.groups for c in group.out_index), *structure.absent]
        place = sorted(range(len(computed)), key=computed.__getitem__)
        self._outputs_in_order = computed == sorted(computed)
        self.register_buffer("output_place", torch.tensor(place, device=device), persistent=False)

    def reset_parameters(self) -> None:
        """He-uniform weights and zero bias."""
        for weight in self.weights:
            if weight.numel():
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (nn.Conv2d's name)
        """input: (batch, in_channels, height, width) -> (batch, out_channels, out_height, out_width)."""
        x = input
        # torch.fx traces with a Proxy, which cannot be checked.
        if isinstance(x, Tensor) and (x.dim() != 4 or x.shape[1] != self.in_channels):
            raise DSPShapeError(
                f"PackedConv2d got an input of shape {tuple(x.shape)}; "
                f"expected (batch, {self.in_channels}, height, width)"
            )
        outputs = []
        for number, (group, weight) in enumerate(zip(self.structure.groups, self.weights, strict=True)):
            if not group.in_index:
                outputs.append(self._zeros(x, len(group.out_index)))
                continue
            gathered = x.index_select(1, self.get_buffer(f"in_index_{number}"))
            outputs.append(F.conv2d(gathered, weight, None, self.stride, self.padding, self.dilation))
        absent = len(self.structure.absent)
        if absent:
            outputs.append(self._zeros(x, absent))
        y = torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]
        if not self._outputs_in_order:
            y = y.index_select(1, self.get_buffer("output_place"))
        if self.bias is not None:
            bias: Tensor = self.bias
            # dense.live_bias, by a buffer: index tensors made here would be copied to a GPU each call
            if absent:
                bias = torch.where(self.get_buffer("output_place") < self.out_channels - absent, bias, 0.0)
            y = y + bias[:, None, None]
        # index_select() makes contiguous tensors.
        channels_last = isinstance(x, Tensor) and memory_format_of(x) == torch.channels_last
        return y.contiguous(memory_format=torch.channels_last) if channels_last else y

    def _zeros(self, x: Tensor, channels: int) -> Tensor:
        settings = self.kernel_size, self.stride, self.padding, self.dilation
        return x.new_zeros(x.shape[0], channels, *conv_output_hw(x.shape[2:], *settings))

    def extra_repr(self) -> str:
        return f"{self.spec}, bias={self.bias is not None}"
