"""Ways of running a network, one file each: ``available()`` says whether here, ``prepare()`` builds."""

from __future__ import annotations

import torch

from .base import Engine, Runner
from .cuda_graph import CudaGraph
from .cudnn_fused import CudnnFused
from .fused import fused_engines
from .onnxruntime import OnnxRuntime
from .openvino import OpenVINO
from .tensorrt import TensorRT
from .torch_compile import TorchCompile
from .torch_eager import TorchEager
from .torchscript import TorchScript

__all__ = ["ENGINES", "Engine", "Runner"]

_ALL: tuple[Engine, ...] = (
    TorchEager("torch"),
    TorchEager("torch-nhwc", channels_last=True),
    TorchScript("torchscript"),
    TorchScript("torchscript-opt", optimize=True),
    TorchCompile("compile"),
    TorchCompile("compile-autotune", {"mode": "max-autotune"}),
    TorchCompile("compile-freezing", freezing=True, device="cpu"),
    OnnxRuntime("onnxruntime"),
    OpenVINO("openvino"),
    OpenVINO("openvino-bf16", torch.bfloat16),
    CudaGraph("cuda-graph"),
    CudaGraph("cuda-graph-fp16", torch.float16),
    CudnnFused("cudnn-fused-fp16"),
    TorchEager("torch-fp16", dtype=torch.float16, device="cuda"),
    TorchCompile("compile-autotune-fp16", {"mode": "max-autotune"}, device="cuda", dtype=torch.float16),
    OnnxRuntime("onnxruntime-cuda", "cuda"),
    TensorRT("tensorrt"),
    TensorRT("tensorrt-fp16", torch.float16),
    *fused_engines(),
)

# name -> engine; the ones of our own stand last. On a GPU torch counts as TF32-free: see run.py.
ENGINES: dict[str, Engine] = {engine.name: engine for engine in _ALL}
