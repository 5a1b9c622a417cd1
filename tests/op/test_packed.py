"""PackedConv2d equals the masked dense convolution, and behaves like any other module."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, UNEQUAL, Case, reference
from hypothesis import given, settings
from hypothesis import strategies as st
from test_structure import structures
from torch import Tensor

from dsp_kernels import GroupStructure, PackedConv2d
from dsp_kernels.errors import DSPShapeError
from dsp_kernels.op.dense import dense_weight, group_weights, live_bias

X = torch.randn(2, 7, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def packed_and_dense(
    structure: GroupStructure = UNEQUAL, kernel: int = 3, bias: bool = True, seed: int = 0
) -> tuple[PackedConv2d, Tensor, Tensor | None]:
    """A float64 packed conv, and weight and bias of the masked dense conv that it equals."""
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
    if structure.groups:
        assert torch.equal(dense_weight(structure, list(conv.weights), (kernel, kernel)), dense)
    assert all(map(torch.equal, group_weights(structure, dense), conv.weights))
    assert dense_bias is None or torch.equal(live_bias(structure, conv.bias), dense_bias)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_definition(case: Case) -> None:
    case = Case(**{**case.__dict__, "residual": False, "activation": "none"})
    a = case.tensors(torch.float64)
    sizes = case.kernel, case.stride, case.padding, case.dilation
    conv = PackedConv2d(case.structure, *sizes, bias=case.bias, dtype=torch.float64)
    state = {f"weights.{number}": weight for number, weight in enumerate(a.weights)}
    if a.bias is not None:
        state["bias"] = a.bias
    conv.load_state_dict(state)
    torch.testing.assert_close(conv(a.x), reference(case, a), rtol=0, atol=1e-12)


def test_the_bias_of_an_absent_channel_is_ignored() -> None:
    conv, _, _ = packed_and_dense()
    expected = conv(X)
    assert conv.bias is not None
    with torch.no_grad():
        conv.bias[list(UNEQUAL.absent)] = math.nan
    assert torch.equal(conv(X), expected)
    conv(X).sum().backward()
    assert conv.bias.grad is not None
    assert conv.bias.grad[list(UNEQUAL.absent)].eq(0).all()


def test_copies_are_independent_and_equal() -> None:
    conv, _, _ = packed_and_dense()
    expected = conv(X)
    for other in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        assert torch.equal(other(X), expected)
        torch.nn.init.zeros_(other.weights[0])
        assert torch.equal(conv(X), expected)


def test_compiles_in_one_graph() -> None:
    conv, _, _ = packed_and_dense()
    torch.testing.assert_close(torch.compile(conv, fullgraph=True)(X), conv(X))


def test_invalid_input_and_settings() -> None:
    conv, _, _ = packed_and_dense()
    with pytest.raises(DSPShapeError, match=r"expected \(batch, 7, height, width\)"):
        conv(X[:, :6])
    with pytest.raises(DSPShapeError, match="kernel_size is 0"):
        PackedConv2d(UNEQUAL, 0)
    with pytest.raises(DSPShapeError, match="stride is"):
        PackedConv2d(UNEQUAL, 3, stride=(1, 2, 3))
