"""PackedConv2d equals the masked dense convolution, and behaves like any other module."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Case, reference
from hypothesis import given, settings
from hypothesis import strategies as st
from test_structure import structures
from torch import Tensor

from dsp_kernels import GroupStructure, PackedConv2d
from dsp_kernels.errors import DSPShapeError


def packed_and_dense(
    structure: GroupStructure, kernel: int, bias: bool, seed: int
) -> tuple[PackedConv2d, Tensor, Tensor | None]:
    """A float64 packed conv, and the dense weight and bias of the masked conv that it stands for."""
    torch.manual_seed(seed)
    conv = PackedConv2d(structure, kernel, padding=kernel // 2, bias=bias, dtype=torch.float64)
    dense = torch.zeros(structure.out_channels, structure.in_channels, kernel, kernel, dtype=torch.float64)
    for group, weight in zip(structure.groups, conv.weights, strict=True):
        for row, out_channel in enumerate(group.out_index):
            for column, in_channel in enumerate(group.in_index):
                dense[out_channel, in_channel] = weight[row, column].detach()
    if conv.bias is None:
        return conv, dense, None
    torch.nn.init.normal_(conv.bias)
    live = conv.bias.detach().clone()
    live[list(structure.absent)] = 0
    return conv, dense, live


@settings(max_examples=60, deadline=None)
@given(structures(), st.sampled_from([1, 3]), st.booleans(), st.integers(0, 9))
def test_equals_the_masked_dense_conv(structure: GroupStructure, kernel: int, bias: bool, seed: int) -> None:
    conv, dense, dense_bias = packed_and_dense(structure, kernel, bias, seed)
    x = torch.randn(2, structure.in_channels, 5, 4, dtype=torch.float64)
    expected = F.conv2d(x, dense, dense_bias, padding=kernel // 2)
    torch.testing.assert_close(conv(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_definition(case: Case) -> None:
    spec = case.spec
    a = case.tensors(torch.float64)
    settings_ = (spec.kernel_size, spec.stride, spec.padding, spec.dilation)
    conv = PackedConv2d(case.structure, *settings_, bias=case.bias, dtype=torch.float64)
    state = {f"weights.{number}": weight for number, weight in enumerate(a.weights)}
    if a.bias is not None:
        state["bias"] = a.bias
    conv.load_state_dict(state)
    plain = Case(**{**case.__dict__, "residual": False, "activation": "none"})
    torch.testing.assert_close(conv(a.x), reference(plain, plain.tensors(torch.float64)), rtol=0, atol=1e-12)


def test_copies_are_independent_and_equal() -> None:
    conv, _, _ = packed_and_dense(CASES[0].structure, 3, True, 0)
    x = torch.randn(1, 7, 6, 6, dtype=torch.float64)
    expected = conv(x)
    for other in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        assert torch.equal(other(x), expected)
        torch.nn.init.zeros_(other.weights[0])
        assert torch.equal(conv(x), expected)


def test_trains() -> None:
    conv, _, _ = packed_and_dense(CASES[0].structure, 3, True, 0)
    optimizer = torch.optim.SGD(conv.parameters(), lr=0.5)
    x, target = torch.randn(8, 7, 6, 6, dtype=torch.float64), torch.zeros(())
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (conv(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_exports_and_compiles() -> None:
    conv, _, _ = packed_and_dense(CASES[0].structure, 3, True, 0)
    x = torch.randn(2, 7, 6, 6, dtype=torch.float64)
    compiled = torch.compile(conv, fullgraph=True)
    torch.testing.assert_close(compiled(x), conv(x))
    batch = torch.export.Dim("batch", min=1)
    exported = torch.export.export(conv, (x,), dynamic_shapes={"input": {0: batch}})
    torch.testing.assert_close(exported.module()(x[:1]), conv(x[:1]))


def test_refuses_the_wrong_input() -> None:
    conv, _, _ = packed_and_dense(CASES[0].structure, 3, True, 0)
    with pytest.raises(DSPShapeError, match="expected \\(batch, 7, height, width\\)"):
        conv(torch.zeros(1, 6, 5, 5, dtype=torch.float64))
    with pytest.raises(DSPShapeError, match="kernel_size is 0"):
        PackedConv2d(GroupStructure.dense(1, 1), 0)
    with pytest.raises(DSPShapeError, match="stride is"):
        PackedConv2d(GroupStructure.dense(1, 1), 3, stride=(1, 2, 3))
