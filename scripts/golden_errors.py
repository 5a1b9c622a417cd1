"""Print how far the learner is from the golden files and its terms from autograd.

The tests hold the same numbers to their bounds; this shows how much room is left. Needs ../shared.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "pruning"))

import test_group_learning as learning  # noqa: E402
import test_penalty  # noqa: E402
from toy_net import ToyA  # noqa: E402

from dsp_pruning.learn import penalty as terms  # noqa: E402
from dsp_pruning.models import cifar_resnet  # noqa: E402


def trajectory(shared: Path, tag: str) -> dict[str, float]:
    """Largest absolute error over all steps of one golden file, mode "original", float64."""
    golden = learning.Golden(shared, tag)
    model = ToyA() if tag == "learn_toyA" else cifar_resnet(20)
    worst = {"weights and statistics": 0.0, "momentum": 0.0, "logits": 0.0}
    for step, _, optimizer, _ in learning.replay(golden, model):
        state = model.state_dict()
        momentum = {
            name: optimizer.state[parameter]["momentum_buffer"]
            for name, parameter in model.named_parameters()
            if parameter in optimizer.state
        }
        logits = {layer: state[f"{layer}.group"] for layer in golden.meta["layers"]}
        after = {layer: golden[f"step{step}/{layer}/logits_after"] for layer in logits}
        for name, found, wanted in (
            ("weights and statistics", state, golden.under(f"step{step}/final/")),
            ("momentum", momentum, golden.under(f"step{step}/momentum/")),
            ("logits", logits, after),
        ):
            full, _ = learning.full_and_reduced(wanted)
            worst[name] = max(worst[name], learning.largest_difference(found, full))
    return worst


def against_autograd() -> dict[str, float]:
    """Largest absolute error of every closed form against torch.autograd of the regulariser, float64."""
    worst = {"penalty": 0.0, "first order": 0.0, "second order, exact": 0.0}
    for parameters in test_penalty.SHAPES:
        prob, weight, direction = test_penalty.problem(*parameters.values)
        prob.requires_grad_()
        weight.requires_grad_()
        value = test_penalty.true_regulariser(prob, weight)
        by_prob, by_weight = torch.autograd.grad(value, (prob, weight), create_graph=True)
        (mixed,) = torch.autograd.grad((by_weight * direction).sum(), prob)
        prob, weight = prob.detach(), weight.detach()
        energy, product = terms.kernel_energy(weight), terms.kernel_product(weight, direction)
        pairs: dict[str, tuple[Tensor, Tensor]] = {
            "penalty": (terms.penalty(prob, weight, eps=0.0), by_weight),
            "first order": (terms.first_order(prob, energy, eps=0.0), by_prob),
            "second order, exact": (terms.second_order_exact(prob, energy, product), mixed),
        }
        for name, (found, wanted) in pairs.items():
            worst[name] = max(worst[name], float((found - wanted.detach()).abs().max()))
    return worst


def main() -> None:
    """Print one line per file and one for autograd."""
    shared = Path(os.environ.get("DSP_SHARED") or ROOT.parent / "shared")
    rows = {tag: trajectory(shared, tag) for tag in ("learn_toyA", "learn_resnet20")}
    rows["autograd"] = against_autograd()
    for name, errors in rows.items():
        print(f"{name:<16}", ", ".join(f"{what} {error:.1e}" for what, error in errors.items()))


if __name__ == "__main__":
    main()
