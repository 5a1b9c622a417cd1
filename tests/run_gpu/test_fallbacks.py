"""What runs where the fastest kernels cannot, with one warning that says why; weights are prepared once."""

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import nets
import pytest
import torch
from cases import UNEQUAL, Case, definition
from ptx.pretended import pretended_gpu
from torch import Tensor

import dsp_kernels
from dsp_kernels import PackedConv2d, gather_grouped_conv2d
from dsp_kernels.errors import DSPBackendError, DSPVerificationError
from dsp_kernels.op import fused_conv, torch_op
from dsp_kernels.op.fused_conv import FusedConv2d
from dsp_kernels.op.spec import ConvSpec
from dsp_kernels.program import fuse as fuse_module
from dsp_kernels.program.steps import Program, Runner
from dsp_kernels.run.eager.program import EagerExecutor
from dsp_kernels.run.gpu import conv as gpu_conv
from dsp_kernels.run.gpu.cuda import conv as cuda_conv
from dsp_kernels.run.gpu.layout import why_not_on
from dsp_kernels.run.gpu.triton import conv as triton_conv
from dsp_kernels.run.programs import EXECUTORS
from dsp_kernels.run.registry import Registry

GPU = torch.device("cuda", 0)
Run = Callable[[Tensor, Tensor | None], Tensor]


class StandIn:
    """A backend of the op that counts its preparations."""

    name = "stand-in"

    def __init__(self) -> None:
        self.prepared: list[ConvSpec] = []
        self.plans: list[weakref.ref[Run]] = []

    def can_run(self, *request: object) -> tuple[bool, str]:
        return True, ""

    def prepare(self, spec: ConvSpec, weights: Sequence[Tensor], bias: Tensor | None) -> Run:
        self.prepared.append(spec)
        kept = [weight.clone() for weight in weights]

        def run(x: Tensor, residual: Tensor | None) -> Tensor:
            return definition(spec, x, kept, bias, residual).to(x.dtype)

        self.plans.append(weakref.ref(run))
        return run


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    backend = StandIn()
    for module in (torch_op, fused_conv):
        monkeypatch.setattr(module, "BACKENDS", Registry("backend", backend))
    return backend


def test_a_swapped_network_prepares_each_layer_once_in_every_mode(backend: StandIn) -> None:
    network = dsp_kernels.swap(nets.make("residual"))
    x = nets.example()
    expected = network(x).detach()
    # Where gradients are needed, inductor itself copies weights at every call.
    compiled = torch.compile(network, backend="aot_eager")
    for mode in (nullcontext, torch.no_grad, torch.inference_mode, torch.enable_grad):
        for run in (network, compiled, network):
            with mode():
                torch.testing.assert_close(run(x).detach(), expected)
    assert len(backend.prepared) == 2  # packed convolutions of this network


def test_the_op_prepares_again_what_has_changed(backend: StandIn) -> None:
    a = Case("", UNEQUAL).tensors()

    def run() -> Tensor:
        return gather_grouped_conv2d(a.x, a.weights, UNEQUAL, a.bias, padding=1)

    first = run()
    assert torch.equal(run(), first)
    assert len(backend.prepared) == 1
    a.weights[-1].mul_(2)
    assert not torch.equal(run(), first)
    a.weights[0].data.zero_()  # not counted
    torch.autograd.graph.increment_version(a.weights[0])
    changed = run()
    a.weights[1] = a.weights[1].clone()
    assert torch.equal(run(), changed)
    assert len(backend.prepared) == 4
    # Another view that begins at the same address.
    a.weights[1] = a.weights[1].transpose(2, 3)
    expected = definition(backend.prepared[0], a.x, a.weights, a.bias, None)
    torch.testing.assert_close(run(), expected.to(a.x.dtype))


def test_what_was_prepared_for_a_network_is_freed_with_it(backend: StandIn) -> None:
    network, x = dsp_kernels.swap(nets.make("residual")), nets.example()
    with torch.no_grad():
        for _ in range(2):
            network(x)
    assert all(plan() is not None for plan in backend.plans)
    del network
    gc.collect()
    assert all(plan() is None for plan in backend.plans)


class Failing(StandIn):
    name = "failing"

    def prepare(self, spec: ConvSpec, weights: Sequence[Tensor], bias: Tensor | None) -> Run:
        def run(x: Tensor, residual: Tensor | None) -> Tensor:
            raise RuntimeError("no kernel image is available")

        return run


def test_a_layer_goes_on_with_the_next_backend_when_a_launch_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (torch_op, fused_conv):
        monkeypatch.setattr(module, "BACKENDS", Registry("backend", Failing(), StandIn()))
    packed, x = PackedConv2d(UNEQUAL, 3).eval(), torch.randn(2, 7, 5, 5)
    expected = definition(packed.spec, x, packed.weights, packed.bias, None).detach().float()
    message = "stand-in takes over, because failing failed: no kernel image"
    swapped = dsp_kernels.swap(packed)
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            torch.testing.assert_close(swapped(x), expected)
            y = gather_grouped_conv2d(x, list(packed.weights), UNEQUAL, packed.bias)
            torch.testing.assert_close(y, expected)
    assert [message in str(each.message) for each in caught] == [True]  # it is not tried again
    explicit = FusedConv2d(packed.spec, list(packed.weights), packed.bias, "failing")
    with pytest.raises(RuntimeError, match="no kernel image"):
        explicit(x)


class Executor(EagerExecutor):
    """One that fails in a launch, or in its answers."""

    def __init__(self, name: str) -> None:
        self.name = name

    def prepare(self, program: Program) -> Runner:
        right = super().prepare(program)

        def run(inputs: Sequence[Tensor]) -> list[Any]:
            if self.name == "raises":
                raise RuntimeError("no kernel image is available")
            return [y + (self.name == "wrong") for y in right(inputs)]

        return run


def test_auto_goes_on_where_an_explicit_choice_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    names = "raises", "wrong", "right"
    monkeypatch.setattr(fuse_module, "EXECUTORS", Registry("backend", *map(Executor, names)))
    model, x = nets.make("residual"), nets.example()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fused = dsp_kernels.fuse(model, x)
    assert fused.backend == "right"
    texts = [str(each.message) for each in caught]
    assert [text.split(":")[0] for text in texts] == [
        f"fuse tries another backend, because {name} failed" for name in names[:2]
    ]
    assert "no kernel image" in texts[0]
    with pytest.warns(UserWarning, match="because raises failed: no kernel image"):
        moved = fused.to(torch.float64)
    assert moved.backend == "wrong"  # there is no model to compare with
    monkeypatch.setattr(fuse_module, "EXECUTORS", Registry("backend", Executor("raises")))
    with pytest.raises(RuntimeError, match="no kernel image"):
        moved.to(torch.float32)
    assert moved.backend == "wrong"  # it is as it was
    assert moved(x.double()).dtype == torch.float64
    monkeypatch.setattr(fuse_module, "EXECUTORS", Registry("backend", *map(Executor, names)))
    with pytest.raises(RuntimeError, match="no kernel image"):
        dsp_kernels.fuse(model, x, backend="raises")
    with pytest.raises(DSPVerificationError):
        dsp_kernels.fuse(model, x, backend="wrong")


@pytest.mark.parametrize("backend", ["cuda", "triton", "cudnn"])
def test_gpu_backends_by_name_on_a_cpu(backend: str) -> None:
    with pytest.raises(DSPBackendError, match="cpu"):
        dsp_kernels.fuse(nets.make("residual"), nets.example(), backend=backend)
    if backend == "cuda":
        packed = PackedConv2d(UNEQUAL, 3).eval()
        with pytest.raises(DSPBackendError, match="tensors are on cpu"):
            dsp_kernels.swap(packed, backend=backend)


@pytest.fixture
def _fresh_answers() -> Iterator[None]:
    kept = why_not_on, gpu_conv.warn_of_missing, triton_conv._why_no_triton
    for function in kept:
        function.cache_clear()
    yield
    for function in kept:
        function.cache_clear()


@pytest.mark.usefixtures("_fresh_answers")
@pytest.mark.parametrize(
    ("capability", "dtype", "missing", "expected", "reason"),
    [
        ((9, 0), torch.float16, "", ["cuda", "triton", "cudnn", "eager"], None),
        (
            (9, 0),
            torch.float16,
            "library",
            ["triton", "cudnn", "eager"],
            "triton on cuda:0; cuda: not built",
        ),
        ((9, 0), torch.float32, "compiler", ["cuda", "cudnn", "eager"], None),
        ((9, 0), torch.float16, "both", ["cudnn", "eager"], "install gcc or set CC"),
        ((9, 0), torch.float64, "", ["cudnn", "eager"], None),
        ((7, 5), torch.float32, "", ["triton", "cudnn", "eager"], "card has compute capability 7.5"),
        ((7, 5), torch.float16, "", ["cudnn", "eager"], "these kernels need 8.0"),
        ((7, 0), torch.float32, "", ["cudnn", "eager"], "these kernels need 7.5"),
    ],
)
def test_what_auto_tries_on_a_gpu(
    capability: tuple[int, int],
    dtype: torch.dtype,
    missing: str,
    expected: list[str],
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "card")
    without_library = missing in ("library", "both")
    monkeypatch.setattr(
        cuda_conv,
        "why_no_cuda_on",
        lambda device: "not built" if without_library else why_not_on(device.index),
    )
    if missing in ("compiler", "both"):
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setattr("shutil.which", lambda name: None)
    program = dsp_kernels.fuse(nets.make("residual"), nets.example(), backend="eager").program
    assert [each.name for each in EXECUTORS.candidates("auto", program, dtype, GPU)] == expected
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            gpu_conv.warn_of_missing(GPU)
    assert len(caught) == (reason is not None)
    assert not reason or reason in str(caught[0].message)


def test_a_graph_of_the_caller_keeps_the_arranged_weights_that_it_reads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Arranged:
        """One convolution of a family of kernels, which writes zeros."""

        def __call__(self, x: Tensor, out: Tensor, residual: Tensor | None = None) -> None:
            out.zero_()

    made: list[weakref.ref[Arranged]] = []

    class Kernels:
        name = "stand-in"

        def prepare(self, *request: object) -> Arranged:
            arranged = Arranged()
            made.append(weakref.ref(arranged))
            return arranged

    waits: list[torch.device] = []
    stream = SimpleNamespace(synchronize=lambda: waits.append(GPU))
    a = Case("", UNEQUAL).tensors()
    with pretended_gpu(), monkeypatch.context() as during:
        during.setattr(torch.cuda, "current_stream", lambda device: stream)
        weights, x = [weight.to(GPU) for weight in a.weights], a.x.to(GPU)
        case = ConvSpec(UNEQUAL, (3, 3), padding=(1, 1)), weights, None
        run = gpu_conv.GpuBackend(Kernels()).prepare(*case)
        for _ in range(2):
            run(x, None)
            assert waits == [GPU]  # for the weights, which other streams may read
        during.setattr(gpu_conv, "is_capturing", lambda device: True)
        run(x, None)
        with pytest.raises(DSPBackendError, match="call the network once before"):
            gpu_conv.GpuBackend(Kernels()).prepare(*case)(x, None)
    del run
    gc.collect()
    assert made[0]() is not None
