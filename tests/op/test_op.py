"""The op: every backend against the definition, and what torch expects of an op."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, IDS, UNEQUAL, Case, reference
from torch import Tensor

import dsp_kernels
from dsp_kernels.errors import DSPBackendError, DSPError, DSPShapeError, DSPStructureError
from dsp_kernels.op.torch_op import index_tensors
from dsp_kernels.run.convs import BACKENDS
from dsp_kernels.tolerances import op_tolerance

OP = torch.ops.dsp_kernels.gather_grouped_conv2d


def call_op(case: Case, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The op's answer and the definition's."""
    a = case.tensors(dtype)
    spec = case.spec
    y = dsp_kernels.gather_grouped_conv2d(
        a.x,
        a.weights,
        case.structure,
        a.bias,
        a.residual,
        kernel_size=spec.kernel_size,
        stride=spec.stride,
        padding=spec.padding,
        dilation=spec.dilation,
        activation=spec.activation,
    )
    return y, reference(case, a)


def assert_close(y: Tensor, expected: Tensor, dtype: torch.dtype, reduction: int) -> None:
    assert y.shape == expected.shape
    assert y.dtype == dtype
    assert not y.isnan().any()
    if expected.numel():
        error = (y.double() - expected).abs().max().item()
        assert error <= op_tolerance(dtype, reduction) * max(expected.abs().max().item(), 1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_op_is_its_definition(case: Case, dtype: torch.dtype) -> None:
    y, expected = call_op(case, dtype)
    assert_close(y, expected, dtype, case.reduction)


@pytest.mark.parametrize("backend", list(BACKENDS), ids=lambda backend: backend.name)
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.batch], ids=lambda c: c.name
)  # the op answers for none
def test_every_backend_is_the_definition(backend: object, case: Case) -> None:
    a = case.tensors()
    able, reason = backend.can_run(case.spec, a.x.dtype, a.x.device)  # type: ignore[attr-defined]
    if not able:  # tests/run_cpu fails where the extension could be there and is not
        pytest.skip(reason)
    y = BACKENDS.choose(backend.name, case.spec, a.x.dtype, a.x.device).prepare(  # type: ignore[attr-defined]
        case.spec, a.weights, a.bias
    )(a.x, a.residual)
    assert_close(y, reference(case, a), torch.float32, case.reduction)


@pytest.mark.parametrize("form", ["single", "gathered", "per_group"])
@pytest.mark.parametrize("case", [c for c in CASES if c.structure.read and c.batch], ids=lambda c: c.name)
def test_every_form_of_the_eager_backend(form: str, case: Case) -> None:
    """The rule picks by size, so that small cases alone would not reach every form."""
    from dsp_kernels.run.eager import conv as eager

    a = case.tensors()
    y = eager._FORMS[form](case.spec, a.weights, a.bias)(a.x)
    if a.residual is not None:
        y = y + a.residual
    y = eager.activate_(y, case.spec.activation)
    assert_close(y, reference(case, a), torch.float32, case.reduction)


def test_arguments_are_not_written() -> None:
    case = Case("", UNEQUAL, residual=True, activation="relu")
    a = case.tensors()
    before = [t.clone() for t in (a.x, *a.weights, a.bias, a.residual)]
    dsp_kernels.gather_grouped_conv2d(
        a.x, a.weights, UNEQUAL, a.bias, a.residual, padding=1, activation="relu"
    )
    assert all(torch.equal(t, b) for t, b in zip((a.x, *a.weights, a.bias, a.residual), before, strict=True))


def test_layout_of_the_input_is_the_layout_of_the_output() -> None:
    a = Case("", UNEQUAL, channels_last=True).tensors()
    y = dsp_kernels.gather_grouped_conv2d(a.x, a.weights, UNEQUAL, padding=1)
    assert y.is_contiguous(memory_format=torch.channels_last)
    y = dsp_kernels.gather_grouped_conv2d(a.x.contiguous(), a.weights, UNEQUAL, padding=1)
    assert y.is_contiguous()


def raw_arguments(case: Case, dtype: torch.dtype, requires_grad: bool) -> list[object]:
    a = case.tensors(dtype)
    tensors = [a.x, *a.weights, *(t for t in (a.bias, a.residual) if t is not None)]
    for tensor in tensors:
        tensor.requires_grad_(requires_grad)
    in_index, out_index = index_tensors(case.structure, a.x.device)
    spec = case.spec
    return [
        *(a.x, a.weights, list(in_index), list(out_index), a.bias, a.residual, case.structure.out_channels),
        *(spec.kernel_size, spec.stride, spec.padding, spec.dilation, spec.activation),
    ]


OPCHECKED = [
    Case("plain", UNEQUAL, residual=True, activation="relu"),
    Case("channels_last", UNEQUAL, channels_last=True, stride=2, hw=(8, 8), bias=False, activation="silu"),
    Case("dense", dsp_kernels.GroupStructure.dense(3, 4), kernel=1, padding=0),
    Case("no groups", dsp_kernels.GroupStructure(3, 4), residual=True),
]


@pytest.mark.parametrize("case", OPCHECKED, ids=lambda case: case.name)
def test_opcheck(case: Case) -> None:
    torch.library.opcheck(OP.default, raw_arguments(case, torch.float32, requires_grad=True))


GRADIENTS = [
    *(
        Case(f"{name}", UNEQUAL, residual=True, activation=name, hw=(4, 3), batch=1, stride=2, seed=5)
        for name in ("none", "relu", "relu6", "silu", "hardswish")
    ),
    Case("no bias, no residual", UNEQUAL, bias=False, hw=(3, 3), batch=2),
    Case("reads nothing", dsp_kernels.GroupStructure.build(2, 3, [([], [2]), ([1], [0])]), hw=(3, 3)),
    Case("dilation", UNEQUAL, dilation=2, padding=2, hw=(4, 4), batch=1),
]


@pytest.mark.parametrize("case", GRADIENTS, ids=lambda case: case.name)
def test_gradients(case: Case) -> None:
    arguments = raw_arguments(case, torch.float64, requires_grad=True)
    x, weights, in_index, out_index, bias, residual, *settings = arguments

    def run(x: Tensor, bias: Tensor | None, residual: Tensor | None, *weights: Tensor) -> Tensor:
        return OP(x, list(weights), in_index, out_index, bias, residual, *settings)

    assert torch.autograd.gradcheck(run, (x, bias, residual, *weights))


def test_gradients_equal_those_of_the_packed_conv() -> None:
    case = Case("", UNEQUAL)
    conv = dsp_kernels.PackedConv2d(UNEQUAL, 3, padding=1, bias=True, dtype=torch.float64)
    x = case.tensors(torch.float64).x
    conv(x).square().sum().backward()
    expected = [parameter.grad for parameter in conv.parameters()]
    conv.zero_grad(set_to_none=True)
    y = dsp_kernels.gather_grouped_conv2d(x, list(conv.weights), UNEQUAL, conv.bias, padding=1)
    y.square().sum().backward()
    for parameter, gradient in zip(conv.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_compiles_in_one_graph_with_any_batch() -> None:
    case = Case("", UNEQUAL, residual=True, activation="relu")

    @torch.compile(fullgraph=True, dynamic=True)
    def run(x: Tensor, weights: list[Tensor], bias: Tensor, residual: Tensor) -> Tensor:
        return dsp_kernels.gather_grouped_conv2d(
            x, weights, UNEQUAL, bias, residual, padding=1, activation="relu"
        )

    for batch in (2, 5):
        a = Case("", UNEQUAL, residual=True, batch=batch).tensors()
        expected = reference(Case("", UNEQUAL, residual=True, activation="relu", batch=batch), a)
        assert_close(run(a.x, a.weights, a.bias, a.residual), expected, torch.float32, case.reduction)


# -- bad input: one clear error each, never a crash or a wrong answer ------------------------------------


def good() -> dict[str, object]:
    a = Case("", UNEQUAL).tensors()
    return {"x": a.x, "weights": a.weights, "structure": UNEQUAL, "bias": a.bias, "padding": 1}


BAD_ARGUMENTS = {
    "wrong input channels": (lambda g: {"x": g["x"][:, :6]}, "expected \\(batch, 7"),
    "three dimensions": (lambda g: {"x": g["x"][0]}, "expected \\(batch"),
    "integer input": (lambda g: {"x": g["x"].int()}, "int32"),
    "one weight too few": (lambda g: {"weights": g["weights"][:2]}, "expected one per group"),
    "weight of the wrong shape": (
        lambda g: {"weights": [g["weights"][0][:, :2], *g["weights"][1:]]},
        "group 0 has shape",
    ),
    "weight of another dtype": (lambda g: {"x": g["x"].double()}, "must match"),
    "short bias": (lambda g: {"bias": g["bias"][:3]}, "expected \\(9,\\)"),
    "wrong residual": (lambda g: {"residual": g["x"]}, "residual has shape"),
    "residual of another dtype": (lambda g: {"residual": torch.zeros(2, 9, 7, 6).double()}, "residual is"),
    "unknown activation": (lambda g: {"activation": "tanh"}, "known are none, relu"),
    "stride 0": (lambda g: {"stride": 0}, "stride is 0"),
    "negative padding": (lambda g: {"padding": -1}, "padding is -1"),
    "three strides": (lambda g: {"stride": (1, 1, 1)}, "one or two"),
    "input smaller than the kernel": (lambda g: {"x": g["x"][:, :, :1], "padding": 0}, "too small"),
    "no weights and no kernel size": (
        lambda g: {"weights": [], "structure": dsp_kernels.GroupStructure(7, 9)},
        "pass kernel_size",
    ),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments(name: str) -> None:
    change, message = BAD_ARGUMENTS[name]
    arguments = {**good(), **change(good())}
    with pytest.raises(DSPShapeError, match=message):
        dsp_kernels.gather_grouped_conv2d(**arguments)


@pytest.mark.parametrize(
    ("which", "value", "message"),
    [
        ("in_index", [7, 0, 1], "holds 7, but in_channels is 7"),
        ("in_index", [-1, 0, 1], "holds -1"),
        ("in_index", [0, 0, 1], "twice"),
        ("out_index", [9, 1], "holds 9, but out_channels is 9"),
        ("out_index", [0, 1], "in group 0 and in group 1"),
        ("out_index", [2**40, 1], "out_channels is 9"),
    ],
)
def test_index_tensors_are_checked_again_by_the_op(which: str, value: list[int], message: str) -> None:
    arguments = raw_arguments(Case("", UNEQUAL), torch.float32, requires_grad=False)
    lists = arguments[2 if which == "in_index" else 3]
    lists[0] = torch.tensor(value)  # type: ignore[index]
    with pytest.raises(DSPStructureError, match=message):
        OP(*arguments)


def test_index_tensors_changed_in_place_are_checked_again() -> None:
    arguments = raw_arguments(Case("", UNEQUAL), torch.float32, requires_grad=False)
    index = arguments[2][0].clone()  # type: ignore[index]
    arguments[2][0] = index  # type: ignore[index]
    OP(*arguments)
    index[0] = 1000
    with pytest.raises(DSPStructureError, match="holds 1000"):
        OP(*arguments)


def test_backend_asked_for_by_name() -> None:
    spec = Case("", UNEQUAL).spec
    assert BACKENDS.choose("eager", spec, torch.float32, torch.device("cpu")).name == "eager"
    with pytest.raises(DSPBackendError, match="'warp' is unknown; known are auto"):
        BACKENDS.choose("warp", spec, torch.float32, torch.device("cpu"))
    with pytest.raises(DSPBackendError, match="not a floating dtype"):
        BACKENDS.choose("eager", spec, torch.int8, torch.device("cpu"))


def test_errors_are_one_family() -> None:
    assert issubclass(DSPShapeError, DSPError)
    assert issubclass(DSPShapeError, ValueError)


def test_the_result_may_be_overwritten_before_backward() -> None:
    a = Case("", UNEQUAL).tensors()
    a.x.requires_grad_()
    y = dsp_kernels.gather_grouped_conv2d(a.x, a.weights, UNEQUAL, a.bias, padding=1)
    y += 1
    torch.relu_(y).sum().backward()
    assert a.x.grad is not None


def test_an_infinite_gradient_stays_out_where_relu_is_flat() -> None:
    a = Case("", UNEQUAL).tensors()
    a.x.requires_grad_()
    y = dsp_kernels.gather_grouped_conv2d(a.x, a.weights, UNEQUAL, a.bias, padding=1, activation="relu")
    y.backward(torch.where(y == 0, torch.inf, 1.0))
    assert a.x.grad is not None
    assert a.x.grad.isfinite().all()


def test_fake_tensors_leave_nothing_behind() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    structure = dsp_kernels.GroupStructure.build(3, 4, [([0, 2], [3, 1])])
    for _ in range(2):
        with FakeTensorMode():
            x, weight = torch.empty(1, 3, 5, 5), torch.empty(2, 2, 3, 3)
            y = dsp_kernels.gather_grouped_conv2d(x, [weight], structure, padding=1)
            assert y.shape == (1, 4, 5, 5)
        x, weight = torch.ones(1, 3, 5, 5), torch.ones(2, 2, 3, 3)
        assert dsp_kernels.gather_grouped_conv2d(x, [weight], structure, padding=1)[0, 1, 2, 2] == 18
