"""The regulariser and its derivatives: against golden numbers and torch.autograd, and at the edges."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learning_setup import regulariser
from torch import Tensor

from dsp_pruning.learn import penalty as terms
from dsp_pruning.learn.penalty import Assigned

# Golden values have up to 7 digits before the point: float64 keeps 1e-13 of a value through the sums.
RELATIVE = 1e-13
AUTOGRAD = 1e-9  # absolute, at the default eps if the term has no addend


def penalty(prob: Tensor, weight: Tensor, scale: float = 1.0, **eps: float) -> Tensor:
    """scale * dR/dw, [O, C, kh, kw]."""
    factor = terms.penalty_factor(Assigned(prob), terms.kernel_energy(weight), scale, **eps)
    return weight * factor.to(weight.dtype)[..., None, None]


def case(shared: Path, index: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    arrays = np.load(shared / "golden" / "terms.npz")
    prefix = f"case{index}/"
    values = {
        key.removeprefix(prefix): torch.from_numpy(np.asarray(arrays[key]))
        for key in arrays.files
        if key.startswith(prefix)
    }
    return json.loads(str(arrays["meta"]))[index], values


def close(found: Tensor, wanted: Tensor, relative: float = RELATIVE) -> None:
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) <= relative * float(wanted.abs().max())


@pytest.mark.shared
@pytest.mark.parametrize("index", range(4))
def test_terms_equal_the_golden_numbers(shared: Path, index: int) -> None:
    meta, golden = case(shared, index)
    prob, weight, scale = golden["prob"], golden["w"], float(golden["scale"])
    energy, product = terms.kernel_energy(weight), terms.kernel_product(weight, golden["v"])
    close(terms.regulariser(Assigned(prob), energy), golden["R"])
    close(penalty(prob, weight, scale), golden["penalty"])
    close(penalty(prob, weight, eps=0.0), golden["dR_dw_exact_unscaled"])
    close(terms.first_order(Assigned(prob), energy), golden["dR_dp"])
    close(terms.first_order(Assigned(prob), energy, eps=0.0), golden["dR_dp_exact"])
    close(terms.second_order_exact(Assigned(prob), energy, product), golden["second_exact"])
    # The published code divides by n without eps in one place, ours never does: 1e-8 / n in that term.
    close(terms.second_order_original(Assigned(prob), energy, product), golden["second_upstream"], 1e-7)
    close(terms.second_order_original(Assigned(prob), energy, product, eps=1e-300), original(golden), 1e-12)
    hard = terms.hard_assignment(golden["logits"])
    assert torch.equal(hard.argmax(0), golden["hard"].long())
    close(terms.regulariser(Assigned(hard), energy), golden["R_hard"])
    close(penalty(hard, weight, scale), golden["penalty_hard"])
    close(
        terms.assignment(golden["logits"], torch.zeros(()), meta["temperature"]).sum(0), torch.ones(meta["O"])
    )
    kernel, input_hw = (meta["k"], meta["k"]), (meta["in_hw"], meta["in_hw"])
    found = terms.layer_scale(meta["C"], meta["O"], kernel, input_hw, meta["G"])
    assert found == pytest.approx(scale, rel=1e-15)


def original(golden: dict[str, Tensor]) -> Tensor:
    """The published implementation's mixed term, factor by factor and without eps."""
    p, w, v = golden["prob"], golden["w"], golden["v"]
    n = torch.einsum("go,ockl->gc", p.square(), w.square()).sqrt()
    root = p.sqrt()
    s = root.sum(1, keepdim=True).square()
    u = torch.einsum("go,ockl,gc->gockl", p.square(), w, 1 / n)
    slope = root * s / (p * root.sum(1, keepdim=True))
    uv = torch.einsum("gockl,ockl->go", u, v)
    uv_by_n = torch.einsum("gockl,ockl,gc->go", u, v, 1 / n)
    along = torch.einsum("ockl,ockl,gc->go", w, v, 1 / n)
    own = p * torch.einsum("ockl,gc->go", w.square(), 1 / n)
    return slope * uv + s * (2 * p * along - own * uv_by_n)


SHAPES = [
    pytest.param(4, 16, 8, (3, 3), id="usual"),  # groups, filters, channels, kernel
    pytest.param(5, 5, 6, (3, 3), id="one-filter-per-group"),
    pytest.param(3, 7, 1, (1, 1), id="one-channel"),
    pytest.param(1, 6, 4, (3, 3), id="one-group"),
    pytest.param(2, 9, 5, (1, 7), id="1x7"),
]


def problem(
    groups: int, filters: int, channels: int, kernel: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Assignment, weight and direction."""
    generator = torch.Generator().manual_seed(groups * 100 + filters)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    prob = torch.softmax(2 * normal(groups, filters), dim=0)
    return prob, normal(filters, channels, *kernel), normal(filters, channels, *kernel)


@pytest.mark.parametrize(("groups", "filters", "channels", "kernel"), SHAPES)
def test_terms_are_the_derivatives(groups: int, filters: int, channels: int, kernel: tuple[int, int]) -> None:
    prob, weight, direction = problem(groups, filters, channels, kernel)
    prob.requires_grad_()
    weight.requires_grad_()
    value = regulariser(prob, weight)
    by_prob, by_weight = torch.autograd.grad(value, (prob, weight), create_graph=True)
    (mixed,) = torch.autograd.grad((by_weight * direction).sum(), prob)
    prob, weight = prob.detach(), weight.detach()
    energy = terms.kernel_energy(weight)
    product = terms.kernel_product(weight, direction)
    # Without eps, because autograd's R has none; the golden numbers pin the default eps.
    for found, wanted in (
        (terms.regulariser(Assigned(prob), energy), value),
        (penalty(prob, weight, eps=0.0), by_weight),
        (terms.first_order(Assigned(prob), energy, eps=0.0), by_prob),
        (terms.second_order_exact(Assigned(prob), energy, product), mixed),
    ):
        assert float((found - wanted.detach()).abs().max()) <= AUTOGRAD


def test_logit_gradient_is_that_of_the_softmax() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, noise, slope = torch.randn(3, 4, 9, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    prob = terms.assignment(logits, noise, 0.3)
    (wanted,) = torch.autograd.grad((prob * slope).sum(), logits)
    found = terms.logit_gradient(prob.detach(), slope, 0.3)
    assert float((found - wanted).abs().max()) <= 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("zeroed", ["channel", "filter", "layer", "kernel"])
def test_zero_weights_contribute_zero(zeroed: str, dtype: torch.dtype) -> None:
    prob, weight, direction = (value.to(dtype) for value in problem(4, 12, 6, (3, 3)))
    where = {"channel": np.s_[:, 2], "filter": np.s_[3], "layer": np.s_[:], "kernel": np.s_[3, 2]}[zeroed]
    weight[where] = 0
    energy, product = terms.kernel_energy(weight), terms.kernel_product(weight, direction)
    for assigned in (prob, terms.hard_assignment(prob)):
        shrink = penalty(assigned, weight)
        assert torch.isfinite(shrink).all()
        assert (shrink[where] == 0).all()
        for second in (terms.second_order_exact, terms.second_order_original):
            assert torch.isfinite(second(Assigned(assigned), energy, product)).all()
        assert torch.isfinite(terms.first_order(Assigned(assigned), energy)).all()
    if zeroed == "channel":
        kept = torch.arange(6) != 2
        for second in (terms.second_order_exact, terms.second_order_original):
            close(
                second(Assigned(prob), energy, product),
                second(Assigned(prob), energy[:, kept], product[:, kept]),
                1e-5,
            )
        close(
            terms.first_order(Assigned(prob), energy),
            terms.first_order(Assigned(prob), energy[:, kept]),
            1e-5,
        )
    if zeroed == "layer":
        assert (terms.first_order(Assigned(prob), energy) == 0).all()
        assert (terms.second_order_exact(Assigned(prob), energy, product) == 0).all()


def test_probabilities_of_exactly_zero_stay_finite() -> None:
    """A softmax at a low temperature gives exact zeros, where the derivative of sqrt does not exist."""
    prob = terms.assignment(torch.tensor([[0.0, 1.0], [500.0, 0.0]]), torch.zeros(2, 2), 0.01)
    assert (prob == 0).any()
    energy = terms.kernel_energy(torch.randn(2, 3, 3, 3, generator=torch.Generator().manual_seed(1)))
    slope = terms.first_order(Assigned(prob), energy) + terms.second_order_exact(
        Assigned(prob), energy, energy
    )
    assert torch.isfinite(terms.logit_gradient(prob, slope, 0.01)).all()


def test_equal_logits_go_to_the_lowest_group() -> None:
    logits = torch.tensor([[1.0, 0.0, 2.0], [1.0, 3.0, 2.0], [0.0, 3.0, 2.0]])
    hard = terms.hard_assignment(logits)
    assert torch.equal(hard.argmax(0), torch.tensor([0, 1, 0]))
    assert torch.equal(hard.sum(0), torch.ones(3))


def test_half_precision_weights_are_squared_in_float32() -> None:
    weight = torch.full((2, 2, 3, 3), 1e-4, dtype=torch.float16)
    energy = terms.kernel_energy(weight)
    assert energy.dtype == torch.float32
    assert float(energy[0, 0]) == pytest.approx(9e-8, rel=0.01)
    assert torch.isfinite(penalty(torch.full((1, 2), 1.0), weight)).all()
