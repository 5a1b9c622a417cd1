"""One case is a form of a network in an engine: chosen, built, and checked against its reference."""

import math
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dsp_kernels.errors import DSPBackendError, DSPError, DSPVerificationError
from dsp_kernels.graph.compare import largest_difference
from dsp_kernels.program.steps import ConvStep, LinearStep, Program
from dsp_kernels.run.cpu.extension import adds_in_half
from dsp_kernels.tolerances import network_tolerance

from .engines import ENGINES, Runner
from .report.results import Row
from .subjects.networks import REFERENCE, Labelled, Network


@dataclass(frozen=True)
class Case:
    """A form of a network (``networks.FORMS``) and the name of an engine."""

    form: str
    engine: str

    @property
    def label(self) -> str:
        """As in tables."""
        return f"{self.form}/{self.engine}"

    @property
    def is_key(self) -> bool:
        """Whether a result is of no use without it: the strongest dense engines, the native fused network."""
        if self.form == "packed":
            return self.engine.startswith("fused:") and self.engine != "fused:eager"
        return self.form == "dense" and self.engine in _STRONGEST

    def row(self, batch: int, status: str, reason: str) -> Row:
        """A row without times."""
        return Row(self.label, batch, status=status, reason=reason, form=self.form, runner=self.engine)

    @property
    def priority(self) -> tuple[bool, bool, bool]:
        """The smallest is built first; whatever is slow to build comes last."""
        return ENGINES[self.engine].slow_build, not self.is_key, not self.engine.startswith("fused")


_STRONGEST = ("openvino", "onnxruntime", "cudnn-fused-fp16", "cuda-graph-fp16")
# Worth comparing: the dense network and dense forms of the pruned one in strong engines, the pruned one as it
# is released and as exporters take it, and ours.
_CPU = ("torch-nhwc", "onnxruntime", "openvino", "openvino-bf16")
_INT8 = ("openvino-int8", "onnxruntime-int8")
_GPU = (
    *("cuda-graph", "cuda-graph-tf32", "cuda-graph-fp16", "cudnn-fused-fp16"),
    *("onnxruntime-cuda", "onnxruntime-cuda-tf32", "tensorrt", "tensorrt-tf32", "tensorrt-fp16"),
)
_COMPILED = (
    *("compile", "compile-autotune", "compile-freezing"),
    *("compile-autotune-tf32", "compile-autotune-fp16"),
)
_FUSED = tuple(name for name in ENGINES if name.startswith("fused:"))
_PLAN = {
    "dense": ("torch", *_CPU, *_INT8, *_COMPILED, *_GPU),
    "released": ("torchscript", "torch-fp16", "cuda-graph-fp16"),
    "packed": ("torch", "onnxruntime", "openvino", "openvino-bf16", *_GPU, *_FUSED),
    "compacted": (*_CPU, "compile-freezing", *_GPU),
    "filters": ("torch-nhwc", "onnxruntime", "openvino", *_GPU),
}


def default_cases(device: str = "cpu") -> list[Case]:
    """The default plan, in the order of its rows."""
    cases = [Case(form, engine) for form, engines in _PLAN.items() for engine in engines]
    if device == "cpu":  # that GPU engines cannot run is shown once, not for each form
        return [case for case in cases if ENGINES[case.engine].device != "cuda" or case.form == "dense"]
    return [case for case in cases if ENGINES[case.engine].device != "cpu"]


def choose_cases(device: str = "cpu", engines: Sequence[str] = (), forms: Sequence[str] = ()) -> list[Case]:
    """The default plan, or every given form (default: all but "released") in every given engine.

    engines: names, or ``form/engine`` for one form only. Raises DSPBackendError for an unknown name.
    """
    exact = [Case(*name.split("/", 1)) for name in engines if "/" in name]
    plain = [name for name in engines if "/" not in name]
    _check_known(ENGINES, *plain, *(case.engine for case in exact))
    _check_known(REFERENCE, *forms, *(case.form for case in exact))
    if not engines:
        return [case for case in default_cases(device) if not forms or case.form in forms]
    chosen = forms or [form for form in REFERENCE if form != "released"]
    return [*exact, *(Case(form, engine) for form in chosen for engine in plain)]


def _check_known(known: Collection[str], *names: str) -> None:
    for name in names:
        if name not in known:
            raise DSPBackendError(f"unknown engine or form {name!r}; known are {', '.join(known)}")


def build_case(
    case: Case,
    network: Network,
    x: Tensor,
    *,
    answers: dict[str, Tensor] | None = None,
    built: dict[str, tuple[Runner, float]] | None = None,
    count_right: bool = False,
) -> tuple[Row, Runner | None]:
    """The row without times and, only if the engine runs and gives the right answer, its callable.

    x: (batch, channels, height, width). answers: reference outputs for x by form, read and added to.
    built: callables and build seconds, by label, of engines that run any batch size; read and added to.
    count_right: fill in the accuracy of 16-bit and int8 engines, of the native one and of OpenVINO, if the
    network has labelled images. Not of all: a thousand images in a slow engine take longer than its timing.
    """
    row = case.row(len(x), "ok", "")
    engine, form, reference = ENGINES[case.engine], case.form, REFERENCE[case.form]
    if network.is_quantized and case == Case("packed", "fused:cpu:int8"):
        form = reference = "quantized"
    answers, built = {} if answers is None else answers, {} if built is None else built
    try:
        if engine.device not in ("any", x.device.type):
            raise DSPBackendError(f"it runs on {engine.device} only, this run is on {x.device.type}")
        model = network.form_on(form, x.device)
        program = network.program(case.form)
        row = replace(row, macs=program.macs)
        if reference not in answers:
            with torch.inference_mode():
                answers[reference] = network.form_on(reference, x.device)(x)
        expected = answers[reference]
        if case.label in built:
            run, seconds = built[case.label]
        else:
            started = time.perf_counter()
            if engine.dtype == torch.int8:
                engine = replace(engine, images=network.calibration)
            run = engine.runner(model, x)
            seconds = time.perf_counter() - started
        half_sums = engine.dtype == torch.float16 and x.device.type == "cpu" and adds_in_half()
        allowed = allowed_difference(program, engine.rounding, expected, half_sums)
        difference, wrong = check(case.label, run, x, expected, allowed)
    except Exception as error:  # an engine may break in any way; the others are still measured
        text = " ".join(str(error).split())
        if isinstance(error, ImportError):
            text += " (pip install 'dsp-kernels[bench]' installs all engines but TensorRT)"
        if isinstance(error, ImportError | DSPError):  # it cannot run here, or not in this form
            return replace(row, status="unavailable", reason=text), None
        return replace(row, status="failed", reason=f"{type(error).__name__}: {text[:300]}"), None
    row = replace(row, difference=difference, allowed=allowed, build_seconds=seconds)
    if wrong:
        return replace(row, status="wrong", reason=wrong), None
    if engine.any_batch:
        built[case.label] = run, seconds
    counted = engine.dtype.itemsize < 4 or engine.name in ("fused:cpu", "openvino")
    if count_right and counted and network.labelled is not None and reference != "filters":
        row = replace(
            row, accuracy=accuracy(lambda images: run(images.to(x.device)).cpu(), network.labelled, len(x))
        )
    return row, run


def allowed_difference(
    program: Program, dtype: torch.dtype, expected: Tensor, half_sums: bool = False
) -> float:
    """How far rounding in ``dtype`` may move an output: the bound of ``dsp_kernels.tolerances``, absolute.

    program: of the network; expected: its reference output, to whose largest value the bound is relative;
    half_sums: as ``network_tolerance`` takes it.
    """
    convs = [step for step in program.steps if isinstance(step, ConvStep)]
    linears = [step for step in program.steps if isinstance(step, LinearStep)]
    # Of the whole layer, not of a group: other forms sum over all live channels.
    sizes = [step.spec.structure.in_channels * math.prod(step.spec.kernel_size) for step in convs]
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    depth = len(convs) + len(linears)
    bound = network_tolerance(dtype, max(sizes, default=1), depth, half_sums)
    return bound * max(scale, torch.finfo(dtype).tiny)


def check(name: str, run: Runner, x: Tensor, expected: Tensor, allowed: float) -> tuple[float, str]:
    """(largest difference from ``expected``, why the output of ``run`` for ``x`` is wrong or "")."""
    got = run(x)
    try:
        difference, _ = largest_difference(expected, got)
    except DSPVerificationError as error:
        return math.nan, f"engine {name!r} is not timed: {error}"
    wrong = f"engine {name!r} is off by {difference:.3g}, at most {allowed:.3g} is right: it is not timed"
    return difference, "" if difference <= allowed else wrong


def accuracy(run: Runner, labelled: Labelled, batch: int) -> float:
    """The share (0..1) of correct answers; ``run`` is called with ``batch`` images each time."""
    correct = 0
    for images, labels in zip(labelled.images.split(batch), labelled.labels.split(batch), strict=True):
        # An engine may be built for this batch size only: the last batch is padded with repeated images.
        places = torch.arange(batch, device=images.device).clamp(max=len(images) - 1)
        found = run(images[places].contiguous())[: len(images)].argmax(1)
        correct += int((found == labels).sum())
    return correct / len(labelled.labels)
