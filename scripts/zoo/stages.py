"""A network from wrapper to engines: pruned, packed, fused, saved, exported, compared after every stage."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import networks
import torch
from torch import Tensor, nn

import dsp_kernels
from dsp_kernels.errors import DSPError, DSPPruningError
from dsp_kernels.program.steps import Program, TorchStep
from dsp_pruning import PruneWrapper, pack
from dsp_pruning.export import export_onnx

SIDE, GROUPS, RATE = 128, 2, 0.5
MOST_ERROR, MOST_ENGINE_ERROR, MOST_PACK, MOST_FUSE = 1e-10, 1e-4, 10, 5


@dataclass
class Outcome:
    """What happened to a network. errors: largest difference over the largest output, of ``packed`` (float64
    against the masked network) and, float32 against the packed one, ``fused``, ``saved``, ``onnxruntime`` and
    ``openvino``. seconds: process time of ``pack`` and ``fuse``, their own checks included.
    steps, plain, plain_before_head: of the fused network; the head begins after the last map of several
    pixels. failed: stage -> its error.
    """

    name: str
    errors: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    steps: int = 0
    plain: int = 0
    plain_before_head: int = 0
    reasons: tuple[str, ...] = ()

    @property
    def within_bounds(self) -> bool:
        """Whether every stage worked, is exact and took no longer than it may."""
        errors = dict(self.errors)
        exact = errors.pop("packed") <= MOST_ERROR and max(errors.values()) <= MOST_ENGINE_ERROR
        return (
            exact
            and not self.failed
            and self.seconds["pack"] <= MOST_PACK
            and self.seconds["fuse"] <= MOST_FUSE
        )


def run_all(name: str, model: nn.Module | None = None, side: int = SIDE) -> Outcome:
    """All stages of a network of the zoo, or of ``model``, which is in float64 and eval mode."""
    made = Outcome(name)
    model = networks.settle(networks.build(name) if model is None else model)
    x = networks.images(2, side)
    made.errors["packed"] = networks.largest_error(prune(model, x), pack(model, x), [x, x[:1]])
    model, x = model.float(), x.float()
    packed = _timed(made, "pack", lambda: pack(model, x))

    def fused() -> nn.Module:
        fused = _timed(made, "fuse", lambda: dsp_kernels.fuse(packed, x[:1]))
        _count(made, fused.program)
        return fused

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "net.onnx"

        def saved() -> nn.Module:
            dsp_kernels.save(packed, Path(folder) / "net", x)
            return dsp_kernels.load(Path(folder) / "net")

        stages = {
            "fused": fused,
            "saved": saved,
            "onnxruntime": lambda: onnxruntime(export_onnx(packed, file, x)),
            "openvino": lambda: openvino(file),
        }
        for stage, run in stages.items():
            try:
                made.errors[stage] = networks.largest_error(packed, run(), [x])
            except (DSPError, RuntimeError) as error:
                made.failed[stage] = str(error)
    return made


def prune(model: nn.Module, x: Tensor) -> nn.Module:
    """Prune random groups to RATE, or as far as possible, in place."""
    pruner = PruneWrapper(model, GROUPS, 2, example_input=x)
    for layer in pruner.layers:
        layer.conv.get_buffer("group").normal_()
    try:
        pruner.initialize(RATE)
    except DSPPruningError:
        pruner.initialize(pruner.reachable()[1])
    return model


def onnxruntime(path: Path) -> Callable[[Tensor], Any]:
    """The file in ONNX Runtime, one thread: images -> answers."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: [torch.from_numpy(answer) for answer in session.run(None, {name: x.numpy()})]


def openvino(path: Path) -> Callable[[Tensor], Any]:
    """The file in OpenVINO, float32: images -> answers."""
    from openvino import Core

    compiled = Core().compile_model(
        path, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    )
    return lambda x: [torch.from_numpy(answer) for answer in compiled(x.numpy()).values()]


def _timed(made: Outcome, what: str, run: Callable[[], Any]) -> Any:
    start = time.process_time()
    result = run()
    made.seconds[what] = time.process_time() - start
    return result


def _count(made: Outcome, program: Program) -> None:
    head = 0
    for place, step in enumerate(program.steps):
        shape = program.shapes.get(step.output) or ()
        if len(shape) == 4 and shape[2] * shape[3] > 1:
            head = place + 1
    plain = {place: step for place, step in enumerate(program.steps) if isinstance(step, TorchStep)}
    made.steps, made.plain = len(program.steps), len(plain)
    made.plain_before_head = sum(place < head for place in plain)
    called = [step.describe() for step in plain.values() if step.operation != "get_attr"]
    made.reasons = tuple(dict.fromkeys(called))
