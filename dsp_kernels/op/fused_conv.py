"""FusedConv2d: a gather-grouped convolution with norm, activation and residual add fused, for inference."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from dsp_kernels.op.dense import index_tensors
from dsp_kernels.op.spec import ConvSpec, memory_format_of
from dsp_kernels.op.torch_op import call_op
from dsp_kernels.run.convs import BACKENDS, ConvPlan, first_working
from dsp_kernels.run.gpu.conv import warn_of_missing


class FusedConv2d(nn.Module):
    """y = act(conv(x) + bias (+ residual)) by the fastest backend; the convolution as of PackedConv2d.

    Input (batch, in_channels, height, width), contiguous or channels_last; output in the same memory format.
    weights[g]: (O_g, C_g, kh, kw); bias: (out_channels,) or None. They become parameters without gradient.
    backend: "auto" or the name of one.
    Raises DSPShapeError for tensors that do not fit, DSPBackendError for a backend that cannot run.

    The weights are packed once, and again when PyTorch counts a change of them. A write through ``.data`` is
    not counted: call ``reset_plan()`` after it. Under torch.compile and torch.export, or where a gradient is
    needed, the module calls the torch op instead. Under autocast it computes in its weights' dtype.

    >>> from dsp_kernels import GroupStructure
    >>> spec = ConvSpec(GroupStructure.uniform(4, 2, n_groups=2), (3, 3), padding=(1, 1), activation="relu")
    >>> conv = FusedConv2d(spec, [torch.ones(1, 2, 3, 3), -torch.ones(1, 2, 3, 3)])
    >>> conv(torch.ones(1, 4, 3, 3))[0, :, 1, 1]
    tensor([18.,  0.])
    """

    def __init__(
        self, spec: ConvSpec, weights: Sequence[Tensor], bias: Tensor | None = None, backend: str = "auto"
    ) -> None:
        super().__init__()
        spec.check_constants(weights, bias)
        self.spec = spec
        self.backend = BACKENDS.check(backend)
        copies = (weight.detach().clone() for weight in weights)
        self.weights = nn.ParameterList(nn.Parameter(copy, requires_grad=False) for copy in copies)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.reset_index(next((t.device for t in (*weights, *([] if bias is None else [bias]))), None))
        self._plan: tuple[tuple[Any, ...], Any, ConvPlan] | None = None

    def reset_index(self, device: torch.device | str | None = None) -> None:
        """Make the index buffers from the structure, for a module that was made on the meta device."""
        indices = index_tensors(self.spec.structure, device)
        for name, tensors in zip(("in_index", "out_index"), indices, strict=True):
            for number, index in enumerate(tensors):
                self.register_buffer(f"{name}_{number}", index, persistent=False)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:  # noqa: A002  (nn.Conv2d's name)
        """input: (batch, in_channels, height, width); residual: like the output, or None."""
        x = input
        if not isinstance(x, Tensor):  # a Proxy of torch.fx
            return self._call_op(x, residual)
        constants = [*self.weights, *([] if self.bias is None else [self.bias])]
        if not torch.is_autocast_enabled(x.device.type):
            return self._run(x, residual, constants)
        if constants and x.dtype != constants[0].dtype:
            x = x.to(constants[0].dtype)
            residual = None if residual is None else residual.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return self._run(x, residual, constants)

    def _run(self, x: Tensor, residual: Tensor | None, constants: list[Tensor]) -> Tensor:
        if self._needs_op(x, residual):
            return self._call_op(x, residual)
        layout = memory_format_of(x)
        key = (x.dtype, x.device, layout, *(_version(constant) for constant in constants))
        added = None if residual is None else (residual.shape, residual.dtype, residual.device)
        cached = self._plan  # in one attribute: another thread may replace it meanwhile
        fits = cached is not None and cached[0] == key and not any(one.is_inference() for one in constants)
        if cached is None or not fits or cached[1] != (x.shape, added):
            self.spec.check_input(x, constants, residual)
            plan = cached[2] if cached is not None and fits else self._new_plan(x, layout)
            cached = self._plan = key, (x.shape, added), plan
        with torch.no_grad():
            return cached[2](x, residual).contiguous(memory_format=layout)

    def _new_plan(self, x: Tensor, layout: torch.memory_format) -> ConvPlan:
        request = self.backend, self.spec, x.dtype, x.device, layout
        backend = BACKENDS.choose(*request)
        if x.device.type == "cuda" and self.backend == "auto":
            warn_of_missing(x.device)
        make = backend.prepare
        if backend.name != "cpu":
            make = partial(first_working, BACKENDS.candidates(*request))
        return make(self.spec, list(self.weights), self.bias)

    def reset_plan(self) -> None:
        """Pack the weights again at the next call."""
        self._plan = None
        increment_version([constant for constant in self.parameters() if not constant.is_inference()])

    def _apply(self, fn: Any, recurse: bool = True) -> FusedConv2d:
        self.reset_plan()
        super()._apply(fn, recurse)
        return self

    def _needs_op(self, x: Tensor, residual: Tensor | None) -> bool:
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) is not Tensor:
            return True
        # A recorder, as make_fx, has to see an operation; forward-mode derivatives are refused there.
        if torch._C._len_torch_dispatch_stack() > 0 or forward_ad._current_level >= 0:
            return True
        if not torch.is_grad_enabled():
            return False
        inputs = (x, residual, self.bias, *self.weights)
        return any(tensor is not None and tensor.requires_grad for tensor in inputs)

    def _call_op(self, x: Tensor, residual: Tensor | None) -> Tensor:
        in_index, out_index = (
            [self.get_buffer(f"{name}_{number}") for number in range(len(self.weights))]
            for name in ("in_index", "out_index")
        )
        lists = list(self.weights), in_index, out_index
        return call_op(x, *lists, self.bias, residual, self.spec.structure.out_channels, *self.spec.settings)

    def __getstate__(self) -> dict[str, Any]:
        # A plan holds closures and native objects, which cannot be copied.
        return {**self.__dict__, "_plan": None}

    def extra_repr(self) -> str:
        return f"{self.spec}, bias={self.bias is not None}"


def _version(tensor: Tensor) -> tuple[int, int]:
    """Changes when the tensor's memory is replaced or written in place."""
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version
