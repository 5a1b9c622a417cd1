"""The op: every backend against its definition, and what torch expects of an op."""

from typing import Any

import pytest
import torch
from cases import CASES, IDS, UNEQUAL, Case, reference
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dsp_kernels import GroupStructure, PackedConv2d, gather_grouped_conv2d, swap
from dsp_kernels.errors import DSPBackendError, DSPError, DSPShapeError, DSPStructureError
from dsp_kernels.op.dense import index_tensors
from dsp_kernels.run.convs import BACKENDS
from dsp_kernels.run.eager import conv as eager
from dsp_kernels.tolerances import op_tolerance

OP = torch.ops.dsp_kernels.gather_grouped_conv2d


def assert_close(y: Tensor, expected: Tensor, dtype: torch.dtype, reduction: int) -> None:
    assert y.shape == expected.shape
    assert y.dtype == dtype
    assert not y.isnan().any()
    if expected.numel():
        error = (y.double() - expected).abs().max().item()
        assert error <= op_tolerance(dtype, reduction) * max(expected.abs().max().item(), 1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_op_equals_its_definition(case: Case, dtype: torch.dtype) -> None:
    a = case.tensors(dtype)
    given = [t for t in (a.x, *a.weights, a.bias, a.residual) if t is not None]
    before = [t.clone() for t in given]
    y = gather_grouped_conv2d(a.x, a.weights, case.structure, a.bias, a.residual, **case.settings)
    assert_close(y, reference(case, a), dtype, case.reduction)
    assert all(torch.equal(t, b) for t, b in zip(given, before, strict=True))


@pytest.mark.parametrize("form", ["single", "gathered", "per_group"])
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.batch and c.structure.read], ids=lambda case: case.name
)
def test_every_form_of_the_eager_backend(form: str, case: Case) -> None:
    """Small layers alone would not reach every form: it is chosen by size."""
    a = case.tensors()
    y = eager.FORMS[form](case.spec, a.weights, a.bias)(a.x)
    if a.residual is not None:
        y = y + a.residual
    y = eager.activate_(y, case.spec.activation)
    assert_close(y, reference(case, a), torch.float32, case.reduction)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_output_has_the_memory_format_of_the_input(layout: torch.memory_format) -> None:
    a = Case("", UNEQUAL).tensors()
    y = gather_grouped_conv2d(a.x.contiguous(memory_format=layout), a.weights, UNEQUAL, padding=1)
    assert y.is_contiguous(memory_format=layout)


def raw_arguments(case: Case, dtype: torch.dtype, requires_grad: bool) -> list[Any]:
    a = case.tensors(dtype)
    for tensor in (a.x, *a.weights, *(t for t in (a.bias, a.residual) if t is not None)):
        tensor.requires_grad_(requires_grad)
    lists = map(list, index_tensors(case.structure))
    return [a.x, a.weights, *lists, a.bias, a.residual, case.structure.out_channels, *case.settings.values()]


OPCHECKED = [
    Case("plain", UNEQUAL, residual=True, activation="relu"),
    Case("channels_last", UNEQUAL, channels_last=True, stride=2, hw=(8, 8), bias=False, activation="silu"),
    Case("dense", GroupStructure.dense(3, 4), kernel=1, padding=0),
    Case("no groups", GroupStructure(3, 4), residual=True),
]


@pytest.mark.parametrize("case", OPCHECKED, ids=lambda case: case.name)
def test_opcheck(case: Case) -> None:
    torch.library.opcheck(OP.default, raw_arguments(case, torch.float32, requires_grad=True))


GRADIENTS = [
    *(
        Case(name, UNEQUAL, residual=True, activation=name, hw=(4, 3), batch=1, stride=2, seed=5)
        for name in ("none", "relu", "relu6", "silu", "hardswish")
    ),
    Case("no bias, no residual", UNEQUAL, bias=False, hw=(3, 3), batch=2),
    Case("reads nothing", GroupStructure.build(2, 3, [([], [2]), ([1], [0])]), hw=(3, 3)),
    Case("dilation", UNEQUAL, dilation=2, padding=2, hw=(4, 4), batch=1),
]


@pytest.mark.parametrize("case", GRADIENTS, ids=lambda case: case.name)
def test_gradients(case: Case) -> None:
    x, weights, in_index, out_index, bias, residual, *settings = raw_arguments(case, torch.float64, True)

    def run(x: Tensor, bias: Tensor | None, residual: Tensor | None, *weights: Tensor) -> Tensor:
        return OP(x, list(weights), in_index, out_index, bias, residual, *settings)

    assert torch.autograd.gradcheck(run, (x, bias, residual, *weights))


@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode_derivatives_are_refused(grad: bool) -> None:
    a = Case("", UNEQUAL).tensors()
    swapped = swap(PackedConv2d(UNEQUAL, 3).requires_grad_(grad).eval())
    for run in (lambda x: gather_grouped_conv2d(x, a.weights, UNEQUAL), swapped):
        with pytest.raises(DSPError, match="no forward-mode derivative"):
            torch.func.jvp(run, (a.x,), (torch.ones_like(a.x),))


def test_the_result_may_be_overwritten_before_backward() -> None:
    a = Case("", UNEQUAL).tensors()
    a.x.requires_grad_()
    y = gather_grouped_conv2d(a.x, a.weights, UNEQUAL, a.bias, padding=1)
    y += 1
    torch.relu_(y).sum().backward()
    assert a.x.grad is not None


def test_an_infinite_gradient_is_masked_where_relu_is_flat() -> None:
    a = Case("", UNEQUAL).tensors()
    a.x.requires_grad_()
    y = gather_grouped_conv2d(a.x, a.weights, UNEQUAL, a.bias, padding=1, activation="relu")
    y.backward(torch.where(y == 0, torch.inf, 1.0))
    assert a.x.grad is not None
    assert a.x.grad.isfinite().all()


def test_compiles_in_one_graph_with_any_batch() -> None:
    @torch.compile(fullgraph=True, dynamic=True)
    def run(x: Tensor, weights: list[Tensor], bias: Tensor, residual: Tensor) -> Tensor:
        return gather_grouped_conv2d(x, weights, UNEQUAL, bias, residual, padding=1, activation="relu")

    for batch in (2, 5):
        case = Case("", UNEQUAL, residual=True, activation="relu", batch=batch)
        a = case.tensors()
        y = run(a.x, a.weights, a.bias, a.residual)
        assert_close(y, reference(case, a), torch.float32, case.reduction)


def test_fake_tensors_leave_nothing_behind() -> None:
    structure = GroupStructure.build(3, 4, [([0, 2], [3, 1])])
    for _ in range(2):
        with FakeTensorMode():
            x, weight = torch.empty(1, 3, 5, 5), torch.empty(2, 2, 3, 3)
            assert gather_grouped_conv2d(x, [weight], structure, padding=1).shape == (1, 4, 5, 5)
        x, weight = torch.ones(1, 3, 5, 5), torch.ones(2, 2, 3, 3)
        assert gather_grouped_conv2d(x, [weight], structure, padding=1)[0, 1, 2, 2] == 18


BAD_ARGUMENTS = {
    "wrong input channels": (lambda g: {"x": g["x"][:, :6]}, r"expected \(batch, 7"),
    "three dimensions": (lambda g: {"x": g["x"][0]}, r"expected \(batch"),
    "integer input": (lambda g: {"x": g["x"].int()}, "int32"),
    "one weight too few": (lambda g: {"weights": g["weights"][:2]}, "expected one per group"),
    "weight of the wrong shape": (
        lambda g: {"weights": [g["weights"][0][:, :2], *g["weights"][1:]]},
        "group 0 has shape",
    ),
    "weight of another dtype": (lambda g: {"x": g["x"].double()}, "must match"),
    "weights on two devices": (
        lambda g: {"weights": [*g["weights"][:2], g["weights"][2].to("meta")]},
        "x is on cpu, but a weight or bias is on meta",
    ),
    "short bias": (lambda g: {"bias": g["bias"][:3]}, r"expected \(9,\)"),
    "wrong residual": (lambda g: {"residual": g["x"]}, "residual has shape"),
    "residual of another dtype": (lambda g: {"residual": torch.zeros(2, 9, 7, 6).double()}, "residual is"),
    "unknown activation": (lambda g: {"activation": "tanh"}, "known are none, relu"),
    "stride 0": (lambda g: {"stride": 0}, "stride is 0"),
    "fractional stride": (lambda g: {"stride": 1.5}, "stride is 1.5"),
    "negative padding": (lambda g: {"padding": -1}, "padding is -1"),
    "three strides": (lambda g: {"stride": (1, 1, 1)}, "one or two"),
    "input smaller than the kernel": (lambda g: {"x": g["x"][:, :, :1], "padding": 0}, "too small"),
    "no weights and no kernel size": (
        lambda g: {"weights": [], "structure": GroupStructure(7, 9)},
        "pass kernel_size",
    ),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments(name: str) -> None:
    change, message = BAD_ARGUMENTS[name]
    a = Case("", UNEQUAL).tensors()
    good = {"x": a.x, "weights": a.weights, "structure": UNEQUAL, "bias": a.bias, "padding": 1}
    with pytest.raises(DSPShapeError, match=message):
        gather_grouped_conv2d(**{**good, **change(good)})


@pytest.mark.parametrize(
    ("which", "value", "message"),
    [
        (2, [7, 0, 1], "in_index holds 7, but in_channels is 7"),
        (2, [-1, 0, 1], "in_index holds -1"),
        (2, [0, 0, 1], "in_index holds channel 0 twice"),
        (2, [0.0, 1.0, 2.0], "in_index of group 0 is a 1-D tensor of torch.float32"),
        (3, [9, 1], "out_index holds 9, but out_channels is 9"),
        (3, [0, 1], "in group 0 and in group 1"),
        (3, [2**40, 1], "out_channels is 9"),
    ],
)
def test_index_tensors_are_checked_by_the_op(which: int, value: list[int], message: str) -> None:
    arguments = raw_arguments(Case("", UNEQUAL), torch.float32, requires_grad=False)
    arguments[which][0] = torch.tensor(value)
    with pytest.raises(DSPStructureError, match=message):
        OP(*arguments)


def test_index_tensors_changed_in_place_are_checked_again() -> None:
    arguments = raw_arguments(Case("", UNEQUAL), torch.float32, requires_grad=False)
    OP(*arguments)
    arguments[2][0][0] = 1000
    with pytest.raises(DSPStructureError, match="holds 1000"):
        OP(*arguments)


def test_tensors_on_meta() -> None:
    a = Case("", UNEQUAL).tensors()
    y = gather_grouped_conv2d(a.x.to("meta"), [w.to("meta") for w in a.weights], UNEQUAL, padding=1)
    assert y.is_meta
    assert y.shape == (2, 9, 7, 6)


def test_explicit_choice_of_a_backend() -> None:
    spec, cpu = Case("", UNEQUAL).spec, torch.device("cpu")
    assert BACKENDS.choose("eager", spec, torch.float32, cpu, torch.contiguous_format).name == "eager"
    with pytest.raises(DSPBackendError, match="'warp' is unknown; known are auto"):
        BACKENDS.choose("warp", spec, torch.float32, cpu, torch.contiguous_format)
    with pytest.raises(DSPBackendError, match="not a floating dtype"):
        BACKENDS.choose("eager", spec, torch.int8, cpu, torch.contiguous_format)
