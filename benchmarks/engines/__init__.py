"""Ways of running a network side by side."""

import torch

from .base import Engine, Runner
from .cuda_graph import CudaGraph, CudnnFused
from .fused import fused_engines
from .onnx_engines import OnnxRuntime, OpenVINO
from .pytorch import TorchCompile, TorchEager, TorchScript
from .tensorrt import TensorRT

__all__ = ["ENGINES", "Engine", "Runner"]

_HALF = torch.float16
_AUTOTUNE = {"mode": "max-autotune"}
_ALL: tuple[Engine, ...] = (
    TorchEager("torch"),
    TorchEager("torch-nhwc", layout=torch.channels_last),
    TorchScript("torchscript"),
    TorchCompile("compile"),
    TorchCompile("compile-autotune", options=_AUTOTUNE),
    TorchCompile("compile-freezing", device="cpu", freezing=True),
    OnnxRuntime("onnxruntime"),
    OpenVINO("openvino"),
    OpenVINO("openvino-bf16", torch.bfloat16),
    OpenVINO("openvino-fp16", _HALF),
    OpenVINO("openvino-int8", torch.int8, slow_build=True),
    OnnxRuntime("onnxruntime-int8", torch.int8, slow_build=True),
    CudaGraph("cuda-graph"),
    CudaGraph("cuda-graph-tf32", tf32=True),
    CudaGraph("cuda-graph-fp16", _HALF),
    CudnnFused("cudnn-fused-fp16", _HALF),
    TorchEager("torch-fp16", _HALF, "cuda"),
    TorchCompile("compile-autotune-tf32", device="cuda", tf32=True, options=_AUTOTUNE),
    TorchCompile("compile-autotune-fp16", _HALF, "cuda", options=_AUTOTUNE),
    OnnxRuntime("onnxruntime-cuda", device="cuda"),
    OnnxRuntime("onnxruntime-cuda-tf32", device="cuda", tf32=True),
    TensorRT("tensorrt"),
    TensorRT("tensorrt-tf32", tf32=True),
    TensorRT("tensorrt-fp16", _HALF),
    *fused_engines(),
)

ENGINES: dict[str, Engine] = {engine.name: engine for engine in _ALL}
