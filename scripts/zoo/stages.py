"""A network from wrapper to engines: pruned, packed, fused, saved, exported, compared after every stage."""

import math
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
from dsp_kernels.errors import DSPError
from dsp_kernels.program.steps import Program, TorchStep
from dsp_pruning import pack
from dsp_pruning.export import export_onnx


@dataclass
class Outcome:
    """What happened to a network. errors: largest difference over the largest output, of ``packed`` (float64
    against the masked network) and, float32 against the packed one, ``fused``, ``saved``, ``onnxruntime`` and
    ``openvino``. seconds: process time of ``pack`` and ``fuse``, their own checks included.
    steps: of the fused network; plain: those of plain PyTorch before the head, which begins after the last
    map of several pixels. failed: stage -> its error.
    """

    errors: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    steps: int = 0
    plain: int = 0

    @property
    def within_bounds(self) -> bool:
        """Whether every stage worked, is exact and took no longer than it may."""
        bounds = dict.fromkeys(self.errors, 1e-4) | {"packed": 1e-10}
        exact = all(error <= bounds[stage] for stage, error in self.errors.items())
        return exact and not self.failed and self.seconds["pack"] <= 10 and self.seconds["fuse"] <= 5


def run_all(name: str, model: nn.Module | None = None, side: int = 128) -> Outcome:
    """All stages of a network of the zoo, or of ``model``, which is in float64 and eval mode."""
    made = Outcome()
    model = networks.settle(networks.build(name) if model is None else model)
    x = networks.images(2, side)
    networks.pruned(model, x, 2, 0.5)
    packed = _timed(made, "pack", lambda: pack(model, x))
    made.errors["packed"] = networks.largest_error(model, packed, [x, x[:1]])
    packed, x = packed.float(), x.float()

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

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = Core().compile_model(path, "CPU", settings)
    return lambda x: [torch.from_numpy(answer) for answer in compiled(x.numpy()).values()]


def _timed(made: Outcome, what: str, run: Callable[[], Any]) -> Any:
    start = time.process_time()
    result = run()
    made.seconds[what] = time.process_time() - start
    return result


def _count(made: Outcome, program: Program) -> None:
    shapes = [program.shapes.get(step.output) or () for step in program.steps]
    maps = [place for place, shape in enumerate(shapes) if len(shape) == 4 and math.prod(shape[2:]) > 1]
    head = maps[-1] + 1 if maps else 0
    made.steps = len(program.steps)
    made.plain = sum(isinstance(step, TorchStep) for step in program.steps[:head])
