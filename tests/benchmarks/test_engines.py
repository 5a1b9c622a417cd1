"""Every engine gives the right answer if it can run and the reason if it cannot; TensorRT against a fake."""

import os
import subprocess
import sys
import types
from dataclasses import dataclass
from typing import Any
from unittest.mock import MagicMock, call

import pytest
import torch
from dsp_benchmarks.cases import Case, build_case
from dsp_benchmarks.engines import ENGINES, Engine, Runner, onnx_engines, tensorrt
from dsp_benchmarks.engines.base import tf32_products
from dsp_benchmarks.engines.cuda_graph import CudnnConvs
from dsp_benchmarks.engines.onnx_engines import INPUT, OUTPUT, onnx_bytes
from dsp_benchmarks.measure.floors import program_of
from dsp_benchmarks.subjects.networks import Network
from torch import Tensor, nn

from dsp_kernels.errors import DSPBackendError

_FAST = [name for name, engine in ENGINES.items() if not engine.slow_build and engine.device != "cuda"]


@pytest.mark.parametrize("name", _FAST)
@pytest.mark.parametrize("form", ["dense", "packed", "compacted", "filters"])
def test_engines_give_the_right_answer_in_every_form(network: Network, form: str, name: str) -> None:
    row, run = build_case(Case(form, name), network, network.images(3, 0))
    if row.status == "unavailable":
        pytest.skip(row.reason)
    assert row.status == "ok", row.reason
    assert run is not None


@pytest.mark.parametrize("name", ["openvino-int8", "onnxruntime-int8", "fused:cpu:int8"])
def test_int8_engines_multiply_8_bit_numbers(network: Network, name: str) -> None:
    """Their answer is right by the bound of 8 bits and too far off for a wider number."""
    row, _ = build_case(Case("compacted", name), network, network.images(3, 0), count_right=True)
    if row.status == "unavailable":
        pytest.skip(row.reason)
    assert (row.status, row.reason) == ("ok", "")
    assert (row.allowed or 0) / 300 < (row.difference or 0) < (row.allowed or 0)
    assert row.accuracy is None  # it has no labelled images


def test_compiled_engines_do_not_share_what_they_compiled(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``torch.compile`` caches per code object; each engine must compile a network anew."""
    compiled: list[Any] = []

    def compile_(function: Any, **options: Any) -> Any:
        compiled.append((function.__code__, options))
        return function

    monkeypatch.setattr(torch, "compile", compile_)
    x = network.images(1, 0)
    for name in ("compile", "compile-autotune", "compile-freezing"):
        run = ENGINES[name].prepare(network.form("packed"), x)
        assert torch.allclose(run(x), network.form("packed")(x), atol=1e-5)
    codes = [id(code) for code, _ in compiled]
    assert len(set(codes)) == 3
    assert [options.get("mode") for _, options in compiled] == [None, "max-autotune", None]


def _reason(name: str, network: Network) -> str:
    row, run = build_case(Case("dense", name), network, network.images(1, 0))
    assert (row.status, run) == ("unavailable", None)
    return row.reason


@pytest.mark.parametrize(
    ("package", "engine"),
    [("onnxruntime", "onnxruntime"), ("openvino", "openvino"), ("nncf", "openvino-int8")],
)
def test_a_missing_package_is_the_reason(
    monkeypatch: pytest.MonkeyPatch, network: Network, package: str, engine: str
) -> None:
    if package == "nncf":
        pytest.importorskip("openvino")
    onnx_engines._core.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    reason = _reason(engine, network)
    assert f"import of {package} halted" in reason
    assert "pip install 'dsp-kernels[bench]'" in reason


def test_a_missing_compiler_is_the_reason(monkeypatch: pytest.MonkeyPatch, network: Network) -> None:
    from torch._inductor import cpp_builder

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", MagicMock(side_effect=RuntimeError("none found")))
    assert _reason("compile", network) == "Inductor finds no C++ compiler (none found)"


def test_a_processor_without_bfloat16_is_the_reason(
    monkeypatch: pytest.MonkeyPatch, network: Network
) -> None:
    openvino = pytest.importorskip("openvino")
    monkeypatch.setattr(openvino.Core, "get_property", lambda *_: ["FP32"])
    assert _reason("openvino-bf16", network).startswith("this processor has no bfloat16")


def test_tf32_is_on_only_in_rows_that_say_so() -> None:
    seen = []

    @dataclass(frozen=True)
    class Probe(Engine):
        def prepare(self, model: nn.Module, example: Tensor) -> Runner:
            def run(x: Tensor) -> Tensor:
                seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
                return x

            return run

    x, before = torch.zeros(1), torch.backends.cudnn.allow_tf32
    with tf32_products(False):
        for tf32 in (True, False):
            Probe("probe", tf32=tf32).runner(nn.Identity(), x)(x)
    assert seen == [(True, True), (False, False)]
    assert torch.backends.cudnn.allow_tf32 == before


def test_a_signal_does_not_kill_the_process_after_openvino_engines_are_gone() -> None:
    """In a process of its own, which dies silently if the signal stack is unmapped."""
    pytest.importorskip("openvino")
    code = (
        "import faulthandler, gc, signal, torch; faulthandler.enable()\n"
        "from dsp_benchmarks.engines import ENGINES\n"
        "engine = ENGINES['openvino']\n"
        "net, x = torch.nn.Conv2d(2, 3, 3).eval(), torch.zeros(1, 2, 5, 5)\n"
        "first = engine.prepare(net, x); second = engine.prepare(net, x)\n"
        "first(x); del first; gc.collect(); second(x); del second; gc.collect()\n"
        "signal.signal(signal.SIGUSR1, lambda *_: print('handled')); signal.raise_signal(signal.SIGUSR1)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, ["handled"]), done.stderr


@pytest.mark.parametrize("form", ["dense", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_the_onnx_file_for_tensorrt_gives_the_right_answer(
    network: Network, form: str, dtype: torch.dtype
) -> None:
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, x = network.form(form), network.images(2, 0)
    file = onnx_bytes(model, x, dtype)
    graph = onnx.load_from_string(file).graph
    kinds = {tensor.data_type for tensor in graph.initializer} - {onnx.TensorProto.INT64}
    expected_kind = onnx.TensorProto.FLOAT16 if dtype == torch.float16 else onnx.TensorProto.FLOAT
    assert kinds == {expected_kind}  # strongly typed: nothing in between
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (got,) = session.run([OUTPUT], {INPUT: x.to(dtype).numpy()})
    with torch.no_grad():
        expected = model(x)
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    assert float((torch.from_numpy(got).float() - expected).abs().max() / expected.abs().max()) <= bound


def _fake_tensorrt(version: str, parses: bool = True) -> MagicMock:
    """The part of TensorRT's builder that the engine uses, as documented."""
    fake = MagicMock(__version__=version)
    flags = {"STRONGLY_TYPED": 1} if version.startswith("10") else {}
    fake.NetworkDefinitionCreationFlag = types.SimpleNamespace(**flags)
    fake.OnnxParser.return_value.configure_mock(num_errors=1)
    fake.OnnxParser.return_value.parse.return_value = parses
    fake.OnnxParser.return_value.get_error.return_value = "unsupported node"
    builder = fake.Builder.return_value
    builder.build_serialized_network.return_value = b"plan"
    return fake


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize(("version", "flags"), [("10.9.0", 2), ("11.0.0", 0)])
def test_tensorrt_builds_strongly_typed_with_tf32_as_asked(
    monkeypatch: pytest.MonkeyPatch, version: str, flags: int, tf32: bool
) -> None:
    fake = _fake_tensorrt(version)
    builder = fake.Builder.return_value
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    assert tensorrt.build_engine(b"onnx", tf32) == b"plan"
    builder.create_network.assert_called_once_with(flags)
    fake.OnnxParser.return_value.parse.assert_called_once_with(b"onnx")
    cleared = builder.create_builder_config.return_value.clear_flag.call_args_list
    assert cleared == ([] if tf32 else [call(fake.BuilderFlag.TF32)])


def test_tensorrt_that_cannot_parse_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", _fake_tensorrt("10.9.0", parses=False))
    with pytest.raises(DSPBackendError, match="cannot read the network: unsupported node"):
        tensorrt.build_engine(b"onnx")


def test_cudnns_fused_operations_give_the_right_answer(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Emulated by PyTorch on the CPU; every convolution before a ReLU is one such call."""
    conv2d = torch.nn.functional.conv2d
    called: list[str] = []

    def relu(x: Tensor, w: Tensor, bias: Tensor, stride: Any, padding: Any, dilation: Any, g: int) -> Tensor:
        called.append("relu")
        return conv2d(x, w, bias, stride, padding, dilation, g).relu()

    def add_relu(x: Tensor, w: Tensor, z: Tensor, alpha: float, bias: Tensor, *place: Any) -> Tensor:
        called.append("add relu")
        return (conv2d(x, w, bias, *place) + alpha * z).relu()

    monkeypatch.setattr(torch, "cudnn_convolution_relu", relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", add_relu)
    x = network.images(3, 0)
    for form in ("dense", "packed", "compacted"):
        called.clear()
        model = network.form(form)
        run = CudnnConvs().prepare(program_of(model, x))
        with torch.no_grad():
            got, expected = run([x])[0], model(x)
        assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()
        assert sorted(called) == ["add relu"] * 3 + ["relu"] * 4  # ResNet-8: stem and three blocks
