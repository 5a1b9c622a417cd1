"""fuse: networks of several inputs, and of answers that are more than one tensor."""

import copy
import pickle
from typing import Any

import nets
import pytest
import torch
from torch import nn

import dsp_kernels
from dsp_kernels.errors import DSPVerificationError

NAMES = [*nets.ANSWERS, *nets.INPUT_SHAPES]


def check(fused: nn.Module, model: nn.Module, *inputs: torch.Tensor) -> None:
    """Same containers, shapes, dtypes and numbers."""
    with torch.no_grad():
        got, expected = fused(*inputs), model(*inputs)
    assert type(got) is type(expected)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", nets.ON_A_CPU)
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_model(name: str, backend: str) -> None:
    model = nets.answering(name)
    fused = dsp_kernels.fuse(model, nets.inputs_of(name, 2), backend=backend)
    for batch in (1, 3, 40):
        check(fused, model, *nets.inputs_of(name, batch))
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        check(other, model, *nets.inputs_of(name, 3))


def test_images_of_other_sizes() -> None:
    for name in nets.ANSWERS:
        model = nets.answering(name)
        check(dsp_kernels.fuse(model, nets.inputs_of(name, 1)), model, torch.randn(2, 3, 13, 10))
    model, (_, _, *features) = nets.answering("inputs"), nets.inputs_of("inputs", 2)
    fused = dsp_kernels.fuse(model, nets.inputs_of("inputs", 1))
    check(fused, model, torch.randn(2, 3, 5, 9), torch.randn(2, 4, 11, 4), *features)
    assert "per image of 3x8x8 and 4x5x5 and 5 and 7" in fused.explain()


@pytest.mark.parametrize("name", ["dict", "integers", "inputs"])
def test_it_can_be_compiled_and_exported(name: str) -> None:
    model, inputs = nets.answering(name), nets.inputs_of(name, 3)
    fused = dsp_kernels.fuse(model, inputs)
    check(torch.compile(fused, fullgraph=True), model, *inputs)
    check(torch.export.export(fused, inputs).module(), model, *inputs)


@pytest.mark.parametrize("backend", nets.ON_A_CPU)
def test_memory_format_and_dtype_are_those_of_the_input(backend: str) -> None:
    """Integers keep theirs; a large batch, which runs in parts, too."""
    model, x = nets.answering("integers"), nets.example(64).contiguous(memory_format=torch.channels_last)
    fused = dsp_kernels.fuse(model, x, backend=backend, dtype=torch.bfloat16)
    got, expected = fused(x), model(x)
    assert {key: y.dtype for key, y in got.items()} == {key: y.dtype for key, y in expected.items()}
    assert got["maps"].is_contiguous(memory_format=torch.channels_last)
    assert (got["class"] == expected["class"]).float().mean() > 0.9


@pytest.mark.parametrize("changed", [0, 1])
def test_every_tensor_of_an_answer_is_compared(changed: int) -> None:
    def offset(module: object, given: object, answer: Any) -> Any:
        return answer + 0.1

    model = nets.answering("tuple")
    (model.high, model.norm)[changed].register_forward_hook(offset)  # a Program does not see it
    with pytest.raises(DSPVerificationError, match="differs from the model on the example input"):
        dsp_kernels.fuse(model, nets.inputs_of("tuple", 2), backend="eager")
