"""``dsp doctor``: what runs here, whether it is right and how fast, as text for a bug report."""

import math

import torch
import typer
from dsp_benchmarks.cases import Case
from dsp_benchmarks.measure.timing import TimingRules
from dsp_benchmarks.run import run_cases
from dsp_benchmarks.subjects.networks import NetworkSource, load_network

from dsp_kernels import GroupStructure
from dsp_kernels.env import describe_environment
from dsp_kernels.op.reference import gather_grouped_conv2d_reference
from dsp_kernels.op.spec import ConvSpec
from dsp_kernels.run.convs import BACKENDS, ConvBackend
from dsp_kernels.run.gpu.conv import GPU_KERNELS
from dsp_kernels.tolerances import op_tolerance

_SPEC = ConvSpec(
    GroupStructure.build(32, 24, [(range(0, 32, 2), range(16)), (range(3, 30), range(16, 24))]),
    (3, 3),
    padding=(1, 1),
    activation="relu",
)
_NETWORK = NetworkSource("cifar_resnet20", "random:g=4,rate=0.62")
_GPU = {
    Case("dense", "cudnn-fused-fp16"): "dense, cuDNN in a CUDA graph",
    Case("packed", "fused:cuda:fp16"): "fused, CUDA",
    Case("packed", "fused:triton:fp16"): "fused, Triton",
}
_CPU = {Case("dense", "torch"): "dense, PyTorch", Case("packed", "fused"): "fused"}


def doctor() -> None:
    """Check the installation in a minute: versions, one convolution per backend, one network against dense.

    Needs no GPU and no files; shows why something cannot run. Exits with 1 if a backend is wrong or breaks.
    """
    print("Paste all below into a bug report.\n")
    for name, value in describe_environment().items():
        print(f"{name:<16} {value}", flush=True)
    broken = False
    for backend in BACKENDS:
        result = _check(backend)
        print(f"{'conv, ' + backend.name:<16} {result}", flush=True)
        broken |= result.startswith(("WRONG", "FAILED"))
    broken |= _time_network()
    if broken:
        raise typer.Exit(1)


def _check(backend: ConvBackend) -> str:
    """One convolution against its definition in float64."""
    on_gpu = backend.name in GPU_KERNELS.names()
    device, dtype = torch.device("cuda" if on_gpu else "cpu"), torch.float16 if on_gpu else torch.float32
    able, reason = backend.can_run(_SPEC, dtype, device, torch.contiguous_format)
    if not able:
        return f"cannot run: {reason}"
    generator = torch.Generator().manual_seed(0)
    shapes = [(len(group.out_index), len(group.in_index), 3, 3) for group in _SPEC.structure.groups]
    weights = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    x = torch.randn(8, 32, 14, 14, generator=generator).to(dtype)
    expected = gather_grouped_conv2d_reference(
        x.double(),
        [weight.double() for weight in weights],
        _SPEC.structure,
        padding=(1, 1),
        activation="relu",
    )
    try:
        plan = backend.prepare(_SPEC, [weight.to(device) for weight in weights], None)
        found = plan(x.to(device), None).double().cpu()
    except Exception as error:  # whatever breaks here belongs into the report
        return f"FAILED: {type(error).__name__}: {' '.join(str(error).split())}"
    difference = float((found - expected).abs().max() / expected.abs().max())
    allowed = op_tolerance(dtype, 9 * 27)
    word = "right" if difference <= allowed else "WRONG"
    return f"{word}, relative error {difference:.1e} of {allowed:.1e} ({str(dtype).removeprefix('torch.')})"


def _time_network() -> bool:
    """Print the times of a pruned ResNet-20 and of the dense one; whether something was wrong."""
    device, batch = ("cuda", 256) if torch.cuda.is_available() else ("cpu", 32)
    cases = _GPU if device == "cuda" else _CPU
    rows = run_cases(load_network(_NETWORK), [batch], list(cases), TimingRules(rounds=10), device=device)
    fastest: dict[str, float] = {}
    for row, name in zip(rows, cases.values(), strict=True):
        shown = f"{row.status}: {row.reason}"
        if row.samples is not None:
            seconds, what = row.samples.median, name.split(",")[0]
            fastest[what] = min(seconds, fastest.get(what, math.inf))
            shown = f"{1e3 * seconds:.3g} ms, off by {row.difference:.1e} of at most {row.allowed:.1e}"
        print(f"{name:<30} {shown}")
    times = [f"{what} {1e3 * fastest.get(what, math.nan):.3g} ms" for what in ("fused", "dense")]
    print(f"\n{', '.join(times)} (ResNet-20, random groups and weights, batch {rows[0].batch}, {device})")
    return any(row.status in ("wrong", "failed") for row in rows)
