"""PyTorch captured once in a CUDA graph and replayed: no launch overhead from Python."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .base import Runner, cuda_available

__all__ = ["CudaGraph", "capture", "replayed"]

_WARM_CALLS = 3


@dataclass(frozen=True)
class CudaGraph:
    """dtype: of weights and activations; channels_last: the layout that tensor cores read directly."""

    name: str = "cuda-graph"
    dtype: torch.dtype = torch.float32
    channels_last: bool = True
    device: str = "cuda"
    slow_build: bool = False
    any_batch: bool = False

    def available(self) -> tuple[bool, str]:
        """Where torch finds a CUDA device."""
        return cuda_available()

    def prepare(self, model: nn.Module, example: Tensor) -> Runner:
        """Captures the model on the example's shape; input and output are copied outside the graph."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        network = copy.deepcopy(model).eval().to(example.device, self.dtype).to(memory_format=layout)
        return replayed(network, example, self.dtype, layout)


def replayed(network: Runner, example: Tensor, dtype: torch.dtype, layout: torch.memory_format) -> Runner:
    """The network captured on the example's shape; input and float32 answer are copied outside the graph."""
    static_input = example.to(dtype).contiguous(memory_format=layout).clone()
    graph, static_output = capture(lambda: network(static_input))

    def run(x: Tensor) -> Tensor:
        static_input.copy_(x)
        graph.replay()
        return static_output.float()

    return run


def capture(call: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """The graph of one call without arguments, and the tensor in which every replay leaves its result."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        for _ in range(_WARM_CALLS):  # cuDNN and cuBLAS allocate and choose here, which no graph may do
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        result = call()
    return graph, result
