"""What every step of a Program runs on for one input shape: the fastest as measured (tune.py)."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import Any

import torch

from dsp_kernels.program.steps import ConvStep, Program, Step, TorchStep
from dsp_kernels.run.gpu.conv import GPU_KERNELS
from dsp_kernels.run.gpu.cuda.blocks.conv import CudaBlock, why_no_blocks
from dsp_kernels.run.gpu.cuda.blocks.plan import block_options, blocks_wanted, limits_of
from dsp_kernels.run.gpu.cuda.blocks.step import BlockStep, blocks_of, residual_last, with_blocks
from dsp_kernels.run.gpu.cuda.blocks.tables import BlockTables, block_tables
from dsp_kernels.run.gpu.layout import (
    BATCH_MULTIPLE,
    GpuConv,
    GpuLayer,
    GpuLayout,
    layout_for_batch,
    round_up,
    uses_tf32,
)
from dsp_kernels.run.gpu.memory import value_shapes
from dsp_kernels.run.gpu.steps import StepCall, eager_conv, step_call
from dsp_kernels.run.gpu.tune import Launch, Tuner

Sizes = Sequence[Sequence[int]]  # the shape of each input
Shapes = Mapping[str, tuple[int, ...] | None]
_PYTORCH = "PyTorch"  # the option of a convolution that is PyTorch's own: cuDNN on a GPU


@dataclass(frozen=True, eq=False)
class GpuPlan:
    """images: per input, perhaps padded to a multiple of 8. shapes: of all values, batch first.

    program: with a BlockStep for every block that is one kernel. calls: of its steps; they hold everything on
    the GPU that their launches read. forms, launchers: by the output of a step, what it runs on.
    """

    program: Program
    layout: GpuLayout
    images: int
    shapes: Shapes
    calls: tuple[StepCall, ...]
    forms: Mapping[str, str]
    launchers: Mapping[str, GpuConv]
    dtype: torch.dtype
    device: torch.device

    def describe(self, output: str, verbose: bool) -> str:
        """What makes this value; verbose: with the parameters of a launch, where its launcher has a text."""
        made = {step.output: step for step in self.program.steps}
        text = getattr(self.launchers.get(output), "describe", None) if verbose and output in made else None
        parameters = f"; {text(self.shapes[made[output].inputs[0]])}" if text else ""
        return self.forms[output] + parameters


class Planner:
    """Plans a Program with GPU_KERNELS from the family ``kernels`` on, all if "auto", or none if "cudnn"."""

    def __init__(self, program: Program, kernels: str) -> None:
        self.dtype, self.device = dtype_and_device(program)
        self._program = residual_last(program)
        names = "auto", *GPU_KERNELS.names(), "cudnn"
        self._families = list(GPU_KERNELS)[max(names.index(kernels) - 1, 0) :]
        self._may_use_blocks = blocks_wanted() and kernels in ("auto", "cuda")
        # Arranged once for all input shapes: by layout, output and option; by the members of a block.
        self._convs: dict[tuple[GpuLayout, str, str], GpuConv] = {}
        self._tables: dict[tuple[str, ...], BlockTables] = {}

    def plan(self, inputs: Sizes, tuner: Tuner, launch: Callable[[GpuPlan], Launch]) -> GpuPlan:
        """The fastest plan for inputs of these shapes. launch: of the whole network, for measuring.

        Layouts are CHWN, for which a batch is padded unless a TorchStep may mix its images, NHWC, and NHWC
        with PyTorch's own convolutions only.
        """
        batch = inputs[0][0]
        first = layout_for_batch(batch)
        if not self._families:
            return self._plan(inputs, GpuLayout.NHWC, tuner)
        options = {first.name: partial(self._plan, inputs, first, tuner)}
        mixes = any(isinstance(step, TorchStep) for step in self._program.steps)
        if first is GpuLayout.CHWN:
            options["NHWC"] = partial(self._plan, inputs, GpuLayout.NHWC, tuner)
        elif not mixes:
            padded = [(round_up(batch, BATCH_MULTIPLE), *shape[1:]) for shape in inputs]
            options["CHWN"] = partial(self._plan, padded, GpuLayout.CHWN, tuner)
        options[_PYTORCH] = partial(self._plan, inputs, GpuLayout.NHWC, tuner, False)
        made: dict[str, GpuPlan] = {}

        def launch_of(name: str) -> Launch:
            made[name] = options[name]()
            return launch(made[name])

        steps = json.dumps([*map(_key, self._program.steps)])
        key = ["network", self._kind(), [*map(list, inputs)], sha256(steps.encode()).hexdigest()]
        name = tuner.fastest(key, {name: partial(launch_of, name) for name in options}, always=True)
        return made.get(name) or options[name]()

    def _plan(self, inputs: Sizes, layout: GpuLayout, tuner: Tuner, kernels: bool = True) -> GpuPlan:
        """The fastest option of every step and block. kernels: False for PyTorch's own only."""
        shapes = value_shapes(self._program, inputs, self.dtype)
        launchers: dict[str, GpuConv] = {}
        forms = {step.output: f"torch {layout.name}" for step in self._program.steps}
        forms |= {step.output: "" for step in self._program.steps if isinstance(step, TorchStep)}
        for step in self._program.steps:
            if isinstance(step, ConvStep):
                chosen = self._conv(step, layout, shapes, tuner, kernels)
                forms[step.output], launchers[step.output] = chosen
        fused = []
        if kernels and self._may_use_blocks and not why_no_blocks(self.dtype, self.device, layout):
            for block in blocks_of(self._program):
                name, part = self._block(block, launchers, layout, shapes, tuner)
                if part is not None:
                    fused.append(part)
                    forms |= {member.output: f"part of {block.output}" for member in part.members}
                    forms[block.output] = name
        program = with_blocks(self._program, fused)
        kind, images = (self.dtype, self.device), inputs[0][0]
        calls = tuple(
            step_call(step, layout, launchers.get(step.output), shapes, self.device) for step in program.steps
        )
        return GpuPlan(program, layout, images, shapes, calls, forms, launchers, *kind)

    def _conv(
        self, step: ConvStep, layout: GpuLayout, shapes: Shapes, tuner: Tuner, kernels: bool
    ) -> tuple[str, GpuConv]:
        """The fastest option of a convolution: its name and launcher."""
        shape = shapes[step.inputs[0]] or ()
        layer = GpuLayer(step.spec, step.weights, step.bias, layout, self.dtype, self.device)
        options: dict[str, Callable[[], GpuConv]] = {}
        reasons = []
        for family in self._families if kernels else ():
            able, reason = family.can_run(step.spec, self.dtype, self.device)
            if able:
                options |= family.options(layer, shape)
            else:
                reasons.append(f"{family.name}: {reason}")
        options[_PYTORCH] = partial(eager_conv, layer)
        made: dict[str, GpuConv] = {}

        def launch_of(name: str) -> Launch:
            made[name] = options[name]()
            return self._launch((step,), {step.output: made[name]}, layout, shapes)

        key = ["conv", self._kind(), layout.name, list(shape), _key(step)]
        name = tuner.fastest(key, {name: partial(launch_of, name) for name in options})
        kept = layout, step.output, name
        if kept not in self._convs:
            self._convs[kept] = made.get(name) or options[name]()
        because = f": {'; '.join(reasons)}" if reasons and name == _PYTORCH else ""
        return f"{name} {layout.name}{because}", self._convs[kept]

    def _block(
        self, block: BlockStep, launchers: dict[str, GpuConv], layout: GpuLayout, shapes: Shapes, tuner: Tuner
    ) -> tuple[str, BlockStep | None]:
        """The fastest form of a block: its name, and the part that is one kernel, whose launcher is added."""
        found = block_options(block, shapes, limits_of(self.device))

        def launcher(name: str) -> GpuConv:
            step, geometry = found[name]
            members = tuple(member.output for member in step.members)
            if members not in self._tables:
                self._tables[members] = block_tables(step, self.dtype, self.device)
            return CudaBlock(step, self._tables[members], geometry)

        def launch_of(name: str) -> Launch:
            step, _ = found[name]
            apart = [member for member in block.members if member not in step.members]
            return self._launch((*apart, step), {**launchers, step.output: launcher(name)}, layout, shapes)

        options = {"convolutions": partial(self._launch, block.members, dict(launchers), layout, shapes)}
        options |= {name: partial(launch_of, name) for name in found}
        key = ["block", self._kind(), *(_key(member) for member in block.members)]
        name = tuner.fastest([*key, list(shapes[block.inputs[0]] or ())], options)
        if name not in found:
            return name, None
        launchers[block.output] = launcher(name)
        return name, found[name][0]

    def _launch(
        self,
        steps: Sequence[ConvStep | BlockStep],
        launchers: Mapping[str, GpuConv],
        layout: GpuLayout,
        shapes: Shapes,
    ) -> Launch:
        """The steps on memory of their own; the caller's random numbers stay as they were."""
        random, tensors = torch.Generator(self.device).manual_seed(0), {}
        for name in sorted({name for step in steps for name in (*step.inputs, step.output)}):
            values = torch.rand(layout.shape(shapes[name] or ()), generator=random, device=self.device)
            tensors[name] = values.to(self.dtype)

        def launch() -> None:
            for step in steps:
                x, residual = step.inputs[0], step.inputs[1] if len(step.inputs) == 2 else None
                added = None if residual is None else tensors[residual]
                launchers[step.output](tensors[x], tensors[step.output], added)

        return launch

    def _kind(self) -> list[object]:
        return [str(self.dtype), uses_tf32(self.dtype)]


def _key(step: Step) -> list[Any]:
    if isinstance(step, ConvStep):
        return [step.spec.structure.to_dict(), *step.spec.settings, len(step.inputs)]
    return [step.describe()]


def dtype_and_device(program: Program) -> tuple[torch.dtype, torch.device]:
    """Of the convolutions' weights."""
    weight = next(weight for step in program.steps if isinstance(step, ConvStep) for weight in step.weights)
    return weight.dtype, weight.device
