"""The traced graph: known operations under one name, however they were written."""

from __future__ import annotations

import operator

import nets
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsp_kernels.errors import DSPTraceError
from dsp_kernels.graph.network import call_graph, trace
from dsp_kernels.graph.operations import KINDS


class Spelled(nn.Module):
    """One operation, given as a function of x."""

    def __init__(self, function: object, *modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.held = nn.ModuleList(modules)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)  # type: ignore[operator]


ACTIVATIONS = [
    lambda m, x: F.relu(x),
    lambda m, x: F.relu(x, inplace=True),
    lambda m, x: torch.relu(x),
    lambda m, x: x.relu(),
    lambda m, x: x.relu_(),
    lambda m, x: m.held[0](x),
]
SPELLINGS = {
    "add": [lambda m, x: x + x, lambda m, x: torch.add(x, x), lambda m, x: x.add(x), operator.iadd],
    "flatten": [
        lambda m, x: torch.flatten(x, 1),
        lambda m, x: x.flatten(1),
        lambda m, x: x.view(x.size(0), -1),
        lambda m, x: x.reshape(x.shape[0], -1),
        lambda m, x: m.held[1](x),
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
    "identity": [lambda m, x: x.contiguous(), lambda m, x: F.dropout(x, training=m.training)],
    "activation": ACTIVATIONS,
    "elementwise": [
        lambda m, x: x + 1,
        lambda m, x: 1 - x,
        lambda m, x: x.mul(2),
        lambda m, x: torch.tanh(x),
        lambda m, x: x.sigmoid(),
        lambda m, x: F.leaky_relu(x, 0.1),
        lambda m, x: x.clamp(0, 6),
        lambda m, x: F.gelu(x),
    ],
    "combine": [
        lambda m, x: x * x,
        lambda m, x: x - x,
        lambda m, x: x + x.mean((2, 3), keepdim=True),
        lambda m, x: torch.mul(x, F.adaptive_avg_pool2d(x, 1)),
    ],
    "concat": [lambda m, x: torch.cat([x, x], 1), lambda m, x: torch.cat((x, x, x), dim=-3)],
    "piece": [
        lambda m, x: x.chunk(2, 1)[1],
        lambda m, x: torch.split(x, 3, dim=1)[-1],
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
        lambda m, x: x + x.mean(1, keepdim=True),
        lambda m, x: x.softmax(1),
        lambda m, x: F.pad(x, (0, 0, 0, 0, 1, 1)),
        lambda m, x: x.permute(0, 2, 3, 1),
        lambda m, x: torch.mul(x, torch.ones(4, 1, 1)),
    ],
}


@pytest.mark.parametrize(
    ("kind", "number"), [(kind, number) for kind, ways in SPELLINGS.items() for number in range(len(ways))]
)
def test_one_kind_for_every_spelling(kind: str, number: int) -> None:
    way = SPELLINGS[kind][number]
    function = (lambda m, x: operator.iadd(x, x)) if way is operator.iadd else way
    model = Spelled(function, nn.ReLU(inplace=True), nn.Flatten())
    network = trace(model, torch.ones(2, 4, 8, 8))
    found = [node for node in network if node.kind not in ("input", "output", "scalar")]
    assert found[-1].kind == kind
    assert all(node.kind in KINDS for node in network)


def test_pool_settings_are_read_from_every_place() -> None:
    expected = {
        "kernel_size": (3, 3),
        "stride": (2, 2),
        "padding": (1, 1),
        "dilation": (1, 1),
        "ceil_mode": True,
    }
    for model in (
        nn.Sequential(nn.MaxPool2d(3, 2, 1, ceil_mode=True)),
        Spelled(lambda m, x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True)),
        Spelled(lambda m, x: F.max_pool2d(x, kernel_size=(3, 3), padding=1, stride=2, ceil_mode=True)),
    ):
        (node,) = trace(model, torch.zeros(1, 2, 9, 9)).of_kind("max_pool")
        assert dict(node.attributes) == expected


def test_shapes_and_modules() -> None:
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

    network = trace(Spelled(run), torch.ones(1, 2, 3, 3))
    (add,) = network.of_kind("add")
    assert set(add.inputs) == {network.of_kind("activation")[0].name}


class LikeNamed(nn.Module):
    """torch.fx gives the placeholder of ``mask`` the name of the other one."""

    def forward(self, x: Tensor, mask_1: Tensor, mask: Tensor | None = None) -> Tensor:
        return x * mask_1 if mask is None else x * mask


class ByKeyword(nn.Module):
    """Not even the first argument after x can be given by place."""

    def forward(self, x: Tensor, /, *, mask: Tensor | None = None, scale: float = 2.0) -> Tensor:
        return x * scale if mask is None else x * mask


class Unused(nn.Module):
    """Takes what it does not need."""

    def forward(self, x: Tensor, mode: str = "scaled", *rest: Tensor, **others: Tensor) -> Tensor:
        return x * 2 if mode == "scaled" else x


@pytest.mark.parametrize(
    ("model", "count"),
    [(LikeNamed(), 2), (ByKeyword(), 1), (Unused(), 1)],
    ids=["names", "keywords", "unused"],
)
def test_an_option_is_not_an_input_whatever_its_name(model: nn.Module, count: int) -> None:
    inputs = tuple(torch.rand(2, 3, 4, 4) for _ in range(count))
    network = trace(model, inputs)
    assert len(network.of_kind("input")) == count
    assert torch.equal(network.graph_module(*inputs), model(*inputs))


def test_changes_nothing() -> None:
    model = nets.make("residual").train()
    model.norm.eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trace(model, torch.randn(2, 3, 8, 8))
    assert model.training
    assert not model.norm.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_what_cannot_be_traced() -> None:
    def undecided(m: nn.Module, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x

    assert call_graph(Spelled(undecided)) is None
    with pytest.raises(DSPTraceError, match="cannot be traced by torch"):
        trace(Spelled(undecided), torch.zeros(1, 2, 3, 3))
    with pytest.raises(DSPTraceError, match=r"does not run on an example input of shape \(1, 9, 8, 8\)"):
        trace(nets.make("residual"), torch.zeros(1, 9, 8, 8))
