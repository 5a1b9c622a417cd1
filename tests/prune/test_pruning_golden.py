"""Masks and pruned shares of whole networks against the published code, at every beta of its bisection."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toy_net import ToyA

from dsp_pruning.models.cifar import cifar_resnet
from dsp_pruning.prune.wrapper import PruneWrapper

pytestmark = pytest.mark.shared
STEPS = [*(f"iter{i}" for i in range(10)), "final"]
RATES = ("0.3", "0.5", "0.7")
# pflops and pparams of the files: float32 percentages of at most 100
PERCENT = 1e-4


def load(shared: Path, net: str, rate: str) -> tuple[PruneWrapper, Any, dict[str, Any]]:
    golden = np.load(shared / "golden" / f"prune_{net}_{rate}.npz")
    initial = np.load(shared / "golden" / f"prune_{net}_0.3.npz")
    meta = json.loads(str(golden["meta"]))
    model: nn.Module = ToyA() if net == "toyA" else cifar_resnet(20)
    pruner = PruneWrapper(model, meta["n_groups"], **meta["fp"])
    state = {key[5:]: torch.from_numpy(initial[key]) for key in initial if key.startswith("init/")}
    logits = {
        f"{key[7:]}.group": torch.from_numpy(initial[key]) for key in initial if key.startswith("logits/")
    }
    wrong = model.load_state_dict(state | logits, strict=False)
    assert not wrong.unexpected_keys
    assert all(key.endswith(".mask") for key in wrong.missing_keys)
    assert [layer.name for layer in pruner.layers] == meta["layers"]
    assert list(pruner.filter_layers) == meta["fp_layers"]
    assert not meta.get("wraparound")  # so that every group of every step may be compared
    return pruner, golden, meta


def kept_kernels(pruner: PruneWrapper) -> dict[str, Tensor]:
    kept = {layer.name: layer.conv.weight.detach().flatten(2).any(2) for layer in pruner.layers}
    for layer in pruner.layers:  # the weights show what the mask says
        assert torch.equal(kept[layer.name], layer.conv.mask[:, :, 0, 0] == 1)
    return kept


@pytest.mark.parametrize("rate", RATES)
def test_resnet20_without_dead_kernels_at_every_beta(shared: Path, rate: str) -> None:
    pruner, golden, _ = load(shared, "resnet20", rate)
    for step in STEPS:
        flops, params = pruner.prune_at(float(golden[f"{step}/beta"]))
        for name, kernels in kept_kernels(pruner).items():
            assert np.array_equal(kernels.numpy(), golden[f"{step}/kernels/{name}"]), (step, name)
        assert flops == pytest.approx(float(golden[f"{step}/pflops"]), abs=PERCENT)
        assert params == pytest.approx(float(golden[f"{step}/pparams"]), abs=PERCENT)
        for key in golden:
            if key.startswith(f"{step}/bn_alive/stage"):
                norm = pruner.model.get_submodule(key.split("/")[2])
                cleared = (norm.weight == 0) & (norm.bias == 0)
                assert np.array_equal(cleared.numpy(), ~golden[key]), (step, key)
            if key.startswith(f"{step}/other_kernels/"):
                weight = pruner.model.get_submodule(key.split("/")[2]).weight
                assert np.array_equal(weight.flatten(2).any(2).numpy(), golden[key]), (step, key)


@pytest.mark.parametrize(("rate", "kernels"), [("0.3", 229), ("0.5", 167), ("0.7", 75)])
def test_dead_kernels_are_removed_to_the_fixpoint(shared: Path, rate: str, kernels: int) -> None:
    pruner, golden, meta = load(shared, "toyA", rate)
    flops, _ = pruner.prune_at(float(golden["final/beta"]))
    kept = kept_kernels(pruner)
    assert sum(int(mask.sum()) for mask in kept.values()) == kernels
    assert meta["kernels_alive_after_repeating_dead_pass"] == kernels
    assert flops == pytest.approx(meta["pflops_after_repeating_dead_pass"], abs=PERCENT)
    for name, mask in kept.items():  # the published code does one pass
        assert not (mask & ~torch.from_numpy(golden[f"final/kernels/{name}"])).any()
