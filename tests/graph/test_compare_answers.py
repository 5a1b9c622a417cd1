"""The comparison of two answers."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from dsp_kernels.errors import DSPVerificationError
from dsp_kernels.graph.compare import compare_answers, largest_difference

ONE = torch.tensor([[1.0, -4.0]])
EMPTY = torch.empty(0, 2)


@pytest.mark.parametrize(
    ("expected", "got", "answer"),
    [
        (ONE, ONE + 0.5, (0.5, 4.0)),
        ({"a": ONE, "b": [ONE * 2]}, {"a": ONE, "b": (ONE * 2 - 3,)}, (3.0, 8.0)),
        (ONE.half(), ONE.double() - 1e-9, (1e-9, 4.0)),  # in the precision of neither
        (ONE > 0, ONE < 0, (1.0, 1.0)),
        (EMPTY, EMPTY, (0.0, 0.0)),
        (EMPTY, [], None),
        (ONE, ONE[:, :1], None),
        ([ONE, ONE], [ONE], None),
    ],
)
def test_largest_difference(expected: Any, got: Any, answer: tuple[float, float] | None) -> None:
    if answer is None:
        with pytest.raises(DSPVerificationError, match=r"the answer has shapes .*; expected"):
            largest_difference(expected, got)
    else:
        assert largest_difference(expected, got) == pytest.approx(answer)


@pytest.mark.parametrize("place", [0, 1])
def test_nan_is_not_close_to_anything(place: int) -> None:
    bad = ONE.clone()
    bad[0, place] = math.nan
    for pair in ((ONE, bad), (bad, ONE), (bad, bad)):
        with pytest.raises(DSPVerificationError, match="by nan"):
            compare_answers(*pair, 1e9, "it differs from the model", "random images")


def test_the_bound_is_relative_to_the_largest_output() -> None:
    message = r"it differs from the model on zeros by 0\.5 \(largest output 4, allowed 0\.4\); sorry"
    assert compare_answers(ONE, ONE + 0.5, 0.13, "", "") == 0.5
    assert compare_answers(ONE, ONE + 0.5, 0.1, "", "", slack=0.2) == 0.5
    with pytest.raises(DSPVerificationError, match=message):
        compare_answers(ONE, ONE + 0.5, 0.1, "it differs from the model", "zeros", advice="; sorry")


def test_subnormal_answers_are_as_good_as_zero() -> None:
    expected = torch.full((1,), 1e-7)
    assert compare_answers(expected, expected.half(), 1e-3, "it differs", "", dtype=torch.float16) < 1e-7
    with pytest.raises(DSPVerificationError):
        compare_answers(expected, expected * 2, 1e-3, "it differs", "")


@pytest.mark.parametrize(
    ("value", "reason"), [(1e30, "its sums are not"), (math.nan, "'weight' is not finite")]
)
def test_a_model_that_is_not_finite_is_named(value: float, reason: str) -> None:
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, value)
    answer = model(torch.full((1, 1), 1e30))
    with pytest.raises(
        DSPVerificationError, match=f"Linear itself answers zeros with NaN or infinity.*{reason}"
    ):
        compare_answers(answer, answer, 1.0, "it differs", "zeros", model=model)


def test_imaginary_parts_count() -> None:
    difference, scale = largest_difference(torch.tensor([1 + 1j]), torch.tensor([1 - 1j]))
    assert (difference, scale) == pytest.approx((2.0, 2**0.5))
