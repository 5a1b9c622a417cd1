"""One case: a form of a network in an engine, prepared and held against its reference."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dsp_kernels.errors import DSPError
from dsp_kernels.program.steps import ConvStep, LinearStep, Program
from dsp_kernels.tolerances import network_tolerance

from .engines import ENGINES, Engine, Runner
from .measure.accuracy import accuracy
from .measure.memory import peak_memory
from .report.results import Row
from .subjects.networks import REFERENCE, Network

__all__ = [
    "Case",
    "Checked",
    "allowed_difference",
    "build_case",
    "case_input",
    "check",
    "default_cases",
]


@dataclass(frozen=True)
class Case:
    """A form of a network (``networks.FORMS``) and the name of an engine."""

    form: str
    engine: str

    @property
    def label(self) -> str:
        """As shown in tables."""
        return f"{self.form}/{self.engine}"


# What is worth comparing: the dense network and the plain dense forms of the pruned one in strong engines,
# the pruned one as it is shipped and as exporters take it, and ours.
_STRONG = ("torch-nhwc", "torchscript-opt", "onnxruntime", "openvino", "openvino-bf16")
_GPU = ("cuda-graph", "cuda-graph-fp16", "cudnn-fused-fp16", "onnxruntime-cuda", "tensorrt", "tensorrt-fp16")
_NATIVE = "fused:cpu"
_COMPILED = ("compile", "compile-autotune", "compile-freezing")


def default_cases(device: str = "cpu") -> list[Case]:
    """The default plan, strongest dense baselines first and ours last."""
    fused = [name for name in ENGINES if name.startswith("fused")]
    plan = {
        "dense": ("torch", *_STRONG, *_COMPILED, "compile-autotune-fp16", *_GPU),
        "released": ("torchscript", "torch-fp16", "cuda-graph-fp16"),
        "packed": ("torch", "torchscript-opt", "onnxruntime", "openvino", "openvino-bf16", *_GPU, *fused),
        "compacted": (*_STRONG, "compile-freezing", *_GPU),
        "filters": ("torch-nhwc", "onnxruntime", "openvino", *_GPU),
    }
    cases = [Case(form, engine) for form, engines in plan.items() for engine in engines]
    if device == "cpu":  # one row says that the GPU engines cannot run; not one for each form
        return [case for case in cases if ENGINES[case.engine].device != "cuda" or case.form == "dense"]
    return [case for case in cases if ENGINES[case.engine].device != "cpu"]


def case_input(network: Network, batch: int, seed: int, device: str = "cpu") -> Tensor:
    """(batch, channels, height, width), standard normal: the same for every engine, in every process."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, *network.example.shape[1:], generator=generator).to(device)


def build_case(
    case: Case,
    network: Network,
    x: Tensor,
    expected: Tensor | None = None,
    *,
    built: dict[str, tuple[Runner, float]] | None = None,
    count_right: bool = False,
) -> tuple[Row, Runner | None]:
    """The row so far and, only where the engine can run and gives the right answer, its callable.

    x: (batch, channels, height, width); expected: the reference's answer where it is known already.
    built: callables and seconds, by label, of engines that run any batch size; read and added to.
    count_right: fill in the accuracy of 16-bit engines and, beside them, of the native one, where the network
    has labelled images. Not of all: a thousand images in a slow engine take longer than its timing.
    """
    row = Row(case.label, len(x), None, None, form=case.form, runner=case.engine)
    engine = ENGINES[case.engine]
    able, reason = engine.available()
    if able and engine.device not in ("any", x.device.type):
        able, reason = False, f"it runs on {engine.device} only, this run is on {x.device.type}"
    if not able:
        return replace(row, status="unavailable", reason=reason), None
    try:
        model = network.form(case.form)
        reference = network.reference(case.form)
    except DSPError as error:
        return replace(row, status="unavailable", reason=str(error)), None
    program = network.program(REFERENCE[case.form])
    row = replace(row, macs=program.macs)
    if expected is None:
        reference = reference.to(x.device)
        with torch.inference_mode():
            expected = reference(x)
    try:
        with peak_memory(x.device) as memory:
            run, build_seconds = (built or {}).get(case.label) or _prepare(engine, model, x)
            allowed = allowed_difference(program, engine.dtype, expected)
            checked = check(case.label, run, x, expected, allowed)
    except DSPError as error:  # ours say what is wrong: an executor that cannot run this network, ...
        return replace(row, status="unavailable", reason=" ".join(str(error).split())), None
    except Exception as error:  # an engine may break in any way; the other engines are still measured
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return replace(row, status="failed", reason=text), None
    row = replace(
        row,
        difference=checked.difference,
        allowed=allowed,
        build_seconds=build_seconds,
        peak_bytes=memory.bytes,
    )
    if checked.error:
        return replace(row, status="wrong", reason=checked.error), None
    if built is not None and engine.any_batch:
        built[case.label] = run, build_seconds
    telling = engine.dtype.itemsize == 2 or engine.name == _NATIVE
    if count_right and telling and network.labelled is not None and REFERENCE[case.form] == "packed":
        row = replace(row, accuracy=accuracy(run, network.labelled, len(x)))
    return row, run


def _prepare(engine: Engine, model: nn.Module, x: Tensor) -> tuple[Runner, float]:
    started = time.perf_counter()
    run = engine.prepare(model.to(x.device), x)
    return run, time.perf_counter() - started


@dataclass(frozen=True)
class Checked:
    """difference: the largest from the reference; error: why the answer is wrong, empty where it is right."""

    difference: float
    error: str = ""


def allowed_difference(program: Program, dtype: torch.dtype, expected: Tensor) -> float:
    """How far rounding in ``dtype`` may move an output: the bound of ``dsp_kernels.tolerances``, absolute.

    program: of the network; expected: its reference output, whose largest value the bound is relative to.
    """
    convs = [step for step in program.steps if isinstance(step, ConvStep)]
    linears = [step for step in program.steps if isinstance(step, LinearStep)]
    # Not the kernels of a group but of the whole layer: other forms sum over all live channels.
    sizes = [step.spec.structure.in_channels * math.prod(step.spec.kernel_size) for step in convs]
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    depth = len(convs) + len(linears)
    return network_tolerance(dtype, max(sizes, default=1), depth) * max(scale, torch.finfo(dtype).tiny)


def check(name: str, run: Runner, x: Tensor, expected: Tensor, allowed: float) -> Checked:
    """Compare what ``run`` gives for ``x`` with ``expected``; both outputs have the same shape if right."""
    got = run(x)
    if got.shape != expected.shape:
        shapes = f"{tuple(got.shape)}, it must be {tuple(expected.shape)}"
        return Checked(math.nan, f"engine {name!r} gives shape {shapes}: it is not timed")
    difference = float((got.float() - expected.float()).abs().max()) if got.numel() else 0.0
    if not difference <= allowed:
        return Checked(
            difference,
            f"engine {name!r} is off by {difference:.3g}, at most {allowed:.3g} is right: it is not timed",
        )
    return Checked(difference)
