"""One step of a Program on values in a GPU layout. Convolutions go to the GPU kernels.

Every 4-D value is a tensor contiguous in the layout; all other values are as in PyTorch.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dsp_kernels.program.steps import (
    ConcatStep,
    ConvStep,
    ElementwiseStep,
    GlobalPoolStep,
    PoolStep,
    SelectStep,
    Step,
)
from dsp_kernels.run.eager.conv import EagerBackend
from dsp_kernels.run.eager.program import EagerExecutor, elementwise
from dsp_kernels.run.gpu.cuda.blocks.step import BlockStep
from dsp_kernels.run.gpu.layout import GpuConv, GpuLayer, GpuLayout

Values = dict[str, Any]
# Computes one step from the values so far; ``out``: a buffer in the layout for the result, or None.
StepCall = Callable[[Values, Tensor | None], Any]


def eager_conv(layer: GpuLayer) -> GpuConv:
    """A convolution in plain PyTorch."""
    convolve = EagerBackend().prepare(layer.spec, layer.weights, layer.bias)
    nchw = layer.layout.as_nchw

    def call(x: Tensor, out: Tensor, residual: Tensor | None = None) -> None:
        nchw(out).copy_(convolve(nchw(x), None if residual is None else nchw(residual)))

    return call


def step_call(
    step: Step,
    layout: GpuLayout,
    conv: GpuConv | None,
    shapes: Mapping[str, tuple[int, ...] | None],
    device: torch.device,
) -> StepCall:
    """The function for one step. conv: its launcher if the step is a convolution or a block of them."""
    images = all(len(shapes[name] or ()) == 4 for name in (*step.inputs, step.output))
    if isinstance(step, ConvStep | BlockStep):
        assert conv is not None
        return _conv(step, conv)
    if images and isinstance(step, ElementwiseStep):
        return elementwise(step, layout.value.index(1))
    if images and isinstance(step, (ConcatStep, SelectStep)):
        return _channels(step, layout, device)
    if images and isinstance(step, PoolStep):
        return _pool(step)
    return _in_nchw(step, layout)


def _conv(step: ConvStep | BlockStep, conv: GpuConv) -> StepCall:
    def call(values: Values, out: Tensor | None) -> Tensor:
        assert out is not None
        conv(values[step.inputs[0]], out, values[step.inputs[1]] if len(step.inputs) == 2 else None)
        return out

    return call


def _channels(step: ConcatStep | SelectStep, layout: GpuLayout, device: torch.device) -> StepCall:
    axis = layout.value.index(1)
    if isinstance(step, ConcatStep):
        return lambda values, out: torch.cat([values[name] for name in step.inputs], axis, out=out)
    # On the device already: a copy to it cannot be captured.
    index = torch.tensor(step.index, device=device)
    return lambda values, out: torch.index_select(values[step.inputs[0]], axis, index, out=out)


def _pool(step: PoolStep) -> StepCall:
    # Pooling treats images and channels alike, so CHWN can be seen as a channels_last tensor of C images
    # with N channels, without a copy.
    run = EagerExecutor().call(step)
    source = step.inputs[0]

    def call(values: Values, out: Tensor | None) -> Tensor:
        pooled: Tensor = run({source: values[source].permute(0, 3, 1, 2)})
        return pooled.permute(0, 2, 3, 1).contiguous()

    return call


def _in_nchw(step: Step, layout: GpuLayout) -> StepCall:
    """Any other step as the eager executor runs it, on NCHW tensors.

    They are contiguous copies, because a ``view`` may need those; a mean does not.
    """
    run = EagerExecutor().call(step)

    def call(values: Values, out: Tensor | None) -> Any:
        read = {name: pytree.tree_map_only(Tensor, to_nchw, values[name]) for name in step.inputs}
        result = pytree.tree_map_only(Tensor, to_layout, run(read))
        return result if out is None else out.copy_(result)

    def to_nchw(value: Tensor) -> Tensor:
        if value.dim() != 4:
            return value
        nchw = layout.as_nchw(value)
        return nchw if isinstance(step, GlobalPoolStep) else nchw.contiguous()

    def to_layout(value: Tensor) -> Tensor:
        return layout.from_nchw(value) if value.dim() == 4 else value

    return call
