"""The traced graph: one kind however an operation is written, and edges of in-place operations."""

import operator
from typing import Any

import nets
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsp_kernels.errors import DSPTraceError
from dsp_kernels.graph.network import call_graph, trace


class Calls(nn.Module):
    """forward(x) is function(self, x)."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        self.relu, self.flatten = nn.ReLU(inplace=True), nn.Flatten()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def norm_by_function(m: Any, x: Tensor, eps: float = 1e-5) -> Tensor:
    return F.batch_norm(x, m.norm.running_mean, m.norm.running_var, m.norm.weight, m.norm.bias, eps=eps)


WRITTEN = {
    "add": [
        lambda m, x: x + x,
        lambda m, x: torch.add(x, x),
        lambda m, x: x.add(x),
        lambda m, x: operator.iadd(x, x),
    ],
    "flatten": [
        lambda m, x: torch.flatten(x, 1),
        lambda m, x: torch.flatten(input=x, start_dim=1),
        lambda m, x: x.flatten(1),
        lambda m, x: x.view(x.size(0), -1),
        lambda m, x: x.reshape(x.shape[0], -1),
        lambda m, x: m.flatten(x),
    ],
    "global_avg_pool": [
        lambda m, x: F.adaptive_avg_pool2d(x, 1),
        lambda m, x: F.adaptive_avg_pool2d(x, (1, 1)),
        lambda m, x: x.mean((2, 3)),
        lambda m, x: x.mean([-1, -2], keepdim=True),
        lambda m, x: torch.mean(x, dim=(3, 2)),
    ],
    "max_pool": [lambda m, x: F.max_pool2d(x, 2), lambda m, x: F.max_pool2d(x, kernel_size=2, stride=2)],
    "avg_pool": [lambda m, x: F.avg_pool2d(x, 2, 2)],
    "identity": [
        lambda m, x: x.contiguous(),
        lambda m, x: F.dropout(x, training=m.training),
        lambda m, x: F.dropout2d(x, 0.1, m.training),
    ],
    "activation": [
        lambda m, x: F.relu(x),
        lambda m, x: F.relu(x, inplace=True),
        lambda m, x: torch.relu(x),
        lambda m, x: x.relu(),
        lambda m, x: x.relu_(),
        lambda m, x: m.relu(x),
    ],
    "elementwise": [
        lambda m, x: x + 1,
        lambda m, x: 1 - x,
        lambda m, x: x.mul(2),
        lambda m, x: torch.tanh(x),
        lambda m, x: x.sigmoid(),
        lambda m, x: x.clamp(0, 6),
        lambda m, x: F.gelu(x),
    ],
    "combine": [
        lambda m, x: x * x,
        lambda m, x: x - x,
        lambda m, x: x + x.mean((2, 3), keepdim=True),
        lambda m, x: torch.mul(x, F.adaptive_avg_pool2d(x, 1)),
        lambda m, x: torch.mul(x, torch.ones(4, 1, 1)),
        lambda m, x: m.norm.weight.view(1, -1, 1, 1) + x,
    ],
    "leaky": [lambda m, x: F.leaky_relu(x, 0.1), lambda m, x: F.prelu(x, m.norm.weight)],
    "batch_norm": [norm_by_function, lambda m, x: norm_by_function(m, x, eps=1e-3), lambda m, x: m.norm(x)],
    "concat": [lambda m, x: torch.cat([x, x], 1), lambda m, x: torch.cat((x, x, x), dim=-3)],
    "piece": [
        lambda m, x: x.chunk(2, 1)[1],
        lambda m, x: list(x.chunk(2, dim=1))[1],
        lambda m, x: torch.split(x, 3, dim=1)[-1],
        lambda m, x: tuple(x.split(split_size=[3, 1], dim=1))[1],
        lambda m, x: list(x.split(3, 1))[-1],
        lambda m, x: x[:, 1:3],
        lambda m, x: x[:, :2, :, :],
        lambda m, x: x[..., 1:3, :, :],
    ],
    "same_channels": [
        lambda m, x: x[..., 1:-1],
        lambda m, x: x[..., :2],
        lambda m, x: x[:, ..., 1:3],
        lambda m, x: x[:, :, 2:, ::2],
        lambda m, x: x.flatten(2),
    ],
    "join_channels": [
        lambda m, x: x.view(x.size(0), 2, x.size(1) // 2, 8, 8).transpose(1, 2).reshape(x.size(0), -1, 8, 8)
    ],
    "adaptive_pool": [lambda m, x: F.adaptive_avg_pool2d(x, 2), lambda m, x: F.adaptive_max_pool2d(x, 2)],
    "pad": [lambda m, x: F.pad(x, (1, 1, 0, 2)), lambda m, x: F.pad(x, [1, 1, 1, 1], mode="reflect")],
    "interpolate": [lambda m, x: F.interpolate(x, scale_factor=2.0)],
    "spatial_mean": [lambda m, x: x.mean(3, keepdim=True), lambda m, x: x.mean(-2, True)],
    "opaque": [
        lambda m, x: torch.add(x, x, alpha=2),
        lambda m, x: x.mean((1, 2)),
        lambda m, x: x.mean(),
        lambda m, x: x.view(-1, 8),
        lambda m, x: torch.cat([x, x], 2),
        lambda m, x: x[:1],
        lambda m, x: list(x.tensor_split(2, 1))[-1],
        lambda m, x: list(torch.tensor_split(x, [1, 3], dim=1))[2],
        lambda m, x: list(x.unbind(1))[3],
        lambda m, x: x + x.mean(1, keepdim=True),
        lambda m, x: x.softmax(1),
        lambda m, x: F.pad(x, (0, 0, 0, 0, 1, 1)),
        lambda m, x: x.permute(0, 2, 3, 1),
        lambda m, x: x[:, :, :4] + m.norm.weight.view(4, 1),  # along the rows
        lambda m, x: x.view(-1, 256),  # of images of another size it would make another batch
        lambda m, x: torch.reshape(x, (-1, 256)),
        lambda m, x: F.avg_pool2d(x, x.size()[3]),
    ],
}


@pytest.mark.parametrize(
    ("kind", "number"), [(kind, number) for kind, calls in WRITTEN.items() for number in range(len(calls))]
)
def test_one_kind_however_it_is_written(kind: str, number: int) -> None:
    network = trace(Calls(WRITTEN[kind][number]), torch.ones(2, 4, 8, 8))
    assert [node for node in network if node.kind not in ("input", "output", "scalar")][-1].kind == kind


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.MaxPool2d(3, 2, 1, ceil_mode=True)),
        Calls(lambda m, x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True)),
        Calls(lambda m, x: F.max_pool2d(x, kernel_size=(3, 3), padding=1, stride=2, ceil_mode=True)),
    ],
)
def test_settings_of_a_pool_in_one_form(model: nn.Module) -> None:
    (node,) = trace(model, torch.zeros(1, 2, 9, 9)).of_kind("max_pool")
    pairs = {"kernel_size": (3, 3), "stride": (2, 2), "padding": (1, 1), "dilation": (1, 1)}
    assert node.attributes == {**pairs, "ceil_mode": True}


def test_nodes_know_module_shape_and_users() -> None:
    network = trace(nets.make("residual"), torch.zeros(4, 3, 8, 8))
    (packed,) = network.calls("packed")
    assert packed.kind == "packed_conv"
    assert packed.shape == (4, 8, 8, 8)
    assert [network[name].kind for name in packed.users] == ["batch_norm"]
    assert network.of_kind("linear")[0].shape == (4, 5)
    assert "Linear 'classifier'" in network.of_kind("linear")[0].describe()


def test_edges_follow_operations_in_place() -> None:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        y = x * 2
        z = F.relu(y, inplace=True)
        return z + y

    network = trace(Calls(run), torch.ones(1, 2, 3, 3))
    (add,) = network.of_kind("add")
    assert set(add.inputs) == {network.of_kind("activation")[0].name}


class LikeNamed(nn.Module):
    """torch.fx names the placeholder of ``mask`` like the other argument."""

    def forward(self, x: Tensor, mask_1: Tensor, mask: Tensor | None = None) -> Tensor:
        return x * mask_1 if mask is None else x * mask


class ByKeyword(nn.Module):
    def forward(self, x: Tensor, /, *, mask: Tensor | None = None, scale: float = 2.0) -> Tensor:
        return x * scale if mask is None else x * mask


class Unused(nn.Module):
    def forward(self, x: Tensor, mode: str = "scaled", *rest: Tensor, **others: Tensor) -> Tensor:
        return x * 2 if mode == "scaled" else x


@pytest.mark.parametrize(("model", "count"), [(LikeNamed(), 2), (ByKeyword(), 1), (Unused(), 1)])
def test_optional_arguments_are_no_inputs(model: nn.Module, count: int) -> None:
    inputs = tuple(torch.rand(2, 3, 4, 4) for _ in range(count))
    network = trace(model, inputs)
    assert len(network.of_kind("input")) == count
    assert torch.equal(network.graph_module(*inputs), model(*inputs))


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (lambda m, x: x if x.sum() > 0 else -x, "the values of a tensor; move that out of"),
        (lambda m, x: x * float(x.mean()), "the values of a tensor; move that out of"),
        (lambda m, x: x if x.shape[0] > 1 else -x, "the number of images; move that out of"),
        (lambda m, x: torch.stack([-image for image in x]), "the number of images; move that out of"),
        (lambda m, x: [half + 1 for half in x.split(4)], "the number of images; move that out of"),
        (lambda m, x: x.__setitem__(0, x[1]), "writes into a part of a tensor there"),
    ],
)
def test_a_refusal_is_short_and_names_the_line(run: Any, reason: str) -> None:
    assert call_graph(Calls(run)) is None
    with pytest.raises(DSPTraceError, match=r"line \d+ of test_trace.py: \(lambda") as refusal:
        trace(Calls(run), torch.zeros(2, 2, 3, 3))
    assert reason in str(refusal.value)
    assert len(str(refusal.value)) < 300


def test_an_example_that_does_not_fit() -> None:
    with pytest.raises(DSPTraceError, match=r"does not run on an example input of shape \(1, 9, 8, 8\)"):
        trace(nets.make("residual"), torch.zeros(1, 9, 8, 8))
