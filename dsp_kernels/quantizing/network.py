"""quantize(packed, images): a packed network that computes in 8-bit integers."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dsp_kernels.errors import DSPBackendError, DSPError
from dsp_kernels.graph.inputs import Example, fusable_inputs
from dsp_kernels.graph.operations.table import LEAF_TYPES
from dsp_kernels.program.fuse import FusedNetwork, float_program
from dsp_kernels.program.steps import ConvStep, LinearStep, Program
from dsp_kernels.quantizing.calibrate import METHODS, calibration_inputs, find_grids
from dsp_kernels.quantizing.choose import Choice, choose, is_kept
from dsp_kernels.quantizing.rewrite import Grid, Rewriter


class QuantizedNetwork(FusedNetwork):
    """A network of integers, in plain PyTorch; made by ``quantize`` or ``load``. For inference only.

    Weights are 8-bit integers with one scale per filter, values 8-bit integers with one scale each; sums are
    exact. ``fuse`` runs it natively, with the same answers. ``dsp_kernels.save`` writes it.

    packed: a float32 copy of the network that it was made from. keep: modules that stay in float.
    grids: value -> scale and range of its integers.

    >>> import torch, dsp_kernels
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1))
    >>> quantized = dsp_kernels.quantize(net, torch.randn(16, 3, 8, 8))
    >>> sorted(quantized.grids), quantized.grids["_1"].high
    (['_1', 'input_1'], 255)
    """

    def __init__(
        self, packed: nn.Module, choice: Choice, grids: Mapping[str, Grid], keep: Collection[str]
    ) -> None:
        program = Rewriter(choice, grids).run()
        if not program.is_integer:
            reasons = ", ".join(sorted(set(choice.why.values())))
            raise DSPError(f"no layer of this network can compute in integers: {reasons}")
        super().__init__(program, torch.float32, torch.device("cpu"), "eager")
        self.packed = packed
        self.keep = tuple(keep)
        self.grids = dict(grids)

    @property
    def example_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of inputs that fit: one image, and further inputs."""
        return tuple((1, *shape[1:]) for shape in self._example_shapes)

    def forward(self, *inputs: Tensor) -> Any:
        """As of FusedNetwork. Raises DSPError in training mode."""
        if self.training:
            raise DSPError("a quantised network cannot be trained: call eval(), or train its .packed network")
        return super().forward(*inputs)

    def train(self, mode: bool = True) -> QuantizedNetwork:
        self.training = mode
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedNetwork:
        super()._apply(fn, recurse)
        self.packed._apply(fn, recurse)
        return self


def quantize(
    packed: nn.Module, images: Tensor | Iterable[Example], method: str = "mse", keep: Collection[str] = ()
) -> QuantizedNetwork:
    """A packed (or any) CNN in 8-bit integers, from its weights and the values that some images give.

    images: (batch, channels, height, width), normalised as in training, or an iterable of such batches (of
    tuples for a model of several inputs); the first 256 images are used. Take training images.
    method: how far the range of a value reaches: "mse" for the least squared error, "minmax" for all numbers
    that were seen. keep: names of modules that stay in float, with all that they hold, as "classifier".

    Layers with SiLU, norms after no convolution and operations of plain PyTorch stay in float too;
    ``explain()`` says which and why. The model is not changed and shares no memory with the result.
    Raises DSPError for an unknown method or name and for values that are not finite, and what ``fuse`` raises
    for a model that it cannot trace.

    >>> import torch, dsp_kernels
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1))
    >>> images = torch.randn(64, 3, 8, 8)
    >>> quantized = dsp_kernels.quantize(net, images)
    >>> difference = (quantized(images) - net(images)).abs().max() / net(images).abs().max()
    >>> bool(difference < 0.05)
    True
    """
    if method not in METHODS:
        raise DSPError(f"method is {method!r}; expected {' or '.join(METHODS)}")
    if isinstance(packed, FusedNetwork):
        raise DSPBackendError("this network is fused or quantised already; quantise the packed one")
    inputs = calibration_inputs(images)
    model = copy.deepcopy(packed).cpu().float().eval()
    model.requires_grad_(False)
    if isinstance(model, LEAF_TYPES):
        model = nn.Sequential(model)  # torch.fx traces what a module calls, not the module itself
    program = float_program(model, fusable_inputs(model, tuple(x[:1] for x in inputs)), torch.float32)
    choice = choose(program, checked_keep(program, keep))
    return QuantizedNetwork(model, choice, find_grids(choice, inputs, method), keep)


def checked_keep(program: Program, keep: Collection[str]) -> Collection[str]:
    """``keep``. Raises DSPError for the name of a module that neither is nor holds a layer."""
    if isinstance(keep, str):
        raise DSPError(f"keep is {keep!r}; expected a collection of names, as [{keep!r}]")
    paths = {step.path for step in program.steps if isinstance(step, ConvStep | LinearStep) and step.path}
    known = {path.rsplit(".", n)[0] for path in paths for n in range(path.count(".") + 1)}
    for name in keep:
        if not any(is_kept(path, [name]) for path in paths):
            near = difflib.get_close_matches(str(name), sorted(known), 1, 0)
            nearest = f"; the nearest is {near[0]!r}" if near else ""
            raise DSPError(f"keep names {name!r}, which is no layer of this network{nearest}")
    return keep
