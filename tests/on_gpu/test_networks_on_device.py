"""Whole networks on a GPU: results, CUDA graphs, streams, devices, and invalid inputs."""

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nets
import pytest
import torch
from golden import RELEASED, cifar_images, golden_labels, golden_logits
from torch import Tensor

import dsp_kernels
from dsp_kernels.errors import DSPError
from dsp_kernels.program.fuse import FusedNetwork
from dsp_kernels.run.gpu.program import GpuRunner
from dsp_kernels.run.programs import EXECUTORS
from dsp_kernels.tolerances import network_tolerance
from dsp_pruning import read_released

HALF = (torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def _exact_float32() -> Iterator[None]:
    """The reference must not round float32 to tf32 in cuDNN and cuBLAS."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def network(gpu: torch.device) -> FusedNetwork:
    model = nets.make("residual").to(gpu)
    return dsp_kernels.fuse(model, torch.randn(1, 3, 8, 8, device=gpu))


@pytest.mark.parametrize(
    "backend", [name for name in EXECUTORS.names() if name in ("cuda", "triton", "cudnn")]
)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("name", nets.NAMES)
def test_fused_networks(name: str, dtype: torch.dtype, backend: str, gpu: torch.device) -> None:
    """``fuse`` compares with the model itself, within the derived tolerance; here at more batch sizes."""
    model = nets.make(name).to(gpu)
    fused = dsp_kernels.fuse(model, torch.randn(3, 3, 8, 8, device=gpu), backend=backend, dtype=dtype)
    eager = dsp_kernels.fuse(model, torch.randn(3, 3, 8, 8, device=gpu), backend="eager", dtype=dtype)
    # Both round: twice the error of one.
    bound = 2 * network_tolerance(dtype, 200, len(fused.program.steps))
    for batch in (1, 8, 5, 32, 0, 8):
        x = torch.randn(batch, 3, 8, 8, device=gpu)
        got, expected = fused(x), eager(x)
        assert got.shape == expected.shape
        if batch:
            assert (got - expected).abs().max() <= bound * expected.abs().max()


@pytest.mark.parametrize("name", [*nets.ANSWERS, *nets.INPUT_SHAPES])
def test_several_inputs_and_outputs(name: str, gpu: torch.device) -> None:
    model = nets.answering(name).to(gpu)
    fused = dsp_kernels.fuse(model, [x.to(gpu) for x in nets.inputs_of(name, 2)])
    for batch in (1, 8, 3, 8):
        inputs = [x.to(gpu) for x in nets.inputs_of(name, batch)]
        with torch.no_grad():
            torch.testing.assert_close(fused(*inputs), model(*inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("name", RELEASED)
def test_real_networks(
    name: str,
    dtype: torch.dtype,
    gpu: torch.device,
    shared: Path,
    record_property: Callable[[str, object], None],
) -> None:
    images = cifar_images(shared).to(gpu)
    labels = golden_labels(shared).to(gpu)
    golden, correct = golden_logits(shared, name)
    packed = read_released(shared / "nets" / f"{name}.npz").to(gpu)
    fused = dsp_kernels.fuse(packed, images[:8], backend="cuda", dtype=dtype)
    logits = torch.cat([fused(batch) for batch in images.split(256)])
    right = int((logits.argmax(1) == labels).sum())
    record_property("correct", right)
    print(f"{name} {dtype}: {right} of {len(labels)} right, float32 on the CPU {correct}")
    if dtype == torch.float32:
        assert (logits.cpu() - golden).abs().max() <= 1e-4
    assert abs(right - correct) <= (0 if dtype == torch.float32 else 2 if dtype == torch.float16 else 6)


def test_calls_replay_a_graph(network: FusedNetwork, gpu: torch.device) -> None:
    runner = GpuRunner(network.program)
    x = torch.randn(8, 3, 8, 8, device=gpu)
    with torch.no_grad():
        first = runner([x])[0].clone()
        assert runner.is_captured([x.shape])
        assert not torch.equal(runner([torch.randn(8, 3, 8, 8, device=gpu)])[0], first)
        assert torch.equal(runner([x])[0], first)


def test_streams_and_threads(network: FusedNetwork, gpu: torch.device) -> None:
    images = [torch.randn(8, 3, 8, 8, device=gpu) for _ in range(4)]
    expected = [network(x).clone() for x in images]
    torch.cuda.synchronize()

    def is_right(number: int) -> bool:
        with torch.cuda.stream(torch.cuda.Stream()):
            outputs = [network(images[number]) for _ in range(50)]
            torch.cuda.current_stream().synchronize()
            return all(torch.equal(output, expected[number]) for output in outputs)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(is_right, range(4)))


def test_captured_in_a_graph_of_the_caller(network: FusedNetwork, gpu: torch.device) -> None:
    x = torch.randn(8, 3, 8, 8, device=gpu)
    expected = network(x).clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer = network(x)
    x.copy_(torch.randn_like(x))
    other = network(x).clone()
    graph.replay()
    assert torch.equal(answer, other)
    assert not torch.equal(answer, expected)


def test_moving_and_copying(network: FusedNetwork, gpu: torch.device) -> None:
    x = torch.randn(8, 3, 8, 8, device=gpu)
    expected = network(x).cpu()
    copied = copy.deepcopy(network)
    assert torch.equal(copied(x).cpu(), expected)
    back = copied.to("cpu")
    assert (back(x.cpu()) - expected).abs().max() <= 1e-4 * expected.abs().max()
    again = back.to(gpu)
    assert (again(x).cpu() - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_swapped_layers(gpu: torch.device) -> None:
    model = nets.make("residual").to(gpu)
    x = torch.randn(8, 3, 8, 8, device=gpu)
    expected = model(x)
    swapped = dsp_kernels.swap(copy.deepcopy(model))
    for layout in (torch.contiguous_format, torch.channels_last):
        got = swapped(x.contiguous(memory_format=layout))
        assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_bad_input(network: FusedNetwork, gpu: torch.device) -> None:
    for x in (
        torch.randn(8, 3, 8, 8),
        torch.randn(8, 4, 8, 8, device=gpu),
        torch.zeros(8, 3, 8, 8, device=gpu, dtype=torch.int64),
        torch.randn(3, 8, 8, device=gpu),
    ):
        with pytest.raises(DSPError):
            network(x)
    big: Tensor = torch.randn(8, 6, 8, 16, device=gpu)
    view = big[:, ::2, :, ::2]
    assert torch.equal(network(view), network(view.contiguous()))
    assert network(torch.randn(0, 3, 8, 8, device=gpu)).shape[0] == 0
