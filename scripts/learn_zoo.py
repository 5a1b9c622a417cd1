"""Learn groups for a few steps on torchvision's classification networks, small inputs, and print a table.

Every network takes three steps in the modes "none" and "exact": no value may become NaN, and every layer's
logits have to move. Names on the command line choose networks; without any all are run.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsp_pruning.learn.wrapper import GroupWrapper, SecondOrder

# Name -> height and width of the input; as small as the network's strides allow.
NETWORKS = {
    "alexnet": 64,
    "convnext_tiny": 32,
    "densenet121": 32,
    "densenet169": 32,
    "efficientnet_b0": 32,
    "efficientnet_b1": 32,
    "efficientnet_v2_s": 32,
    "googlenet": 32,
    "inception_v3": 75,
    "mnasnet0_5": 32,
    "mnasnet1_0": 32,
    "mobilenet_v2": 32,
    "mobilenet_v3_large": 32,
    "mobilenet_v3_small": 32,
    "regnet_x_400mf": 32,
    "regnet_x_800mf": 32,
    "regnet_y_400mf": 32,
    "regnet_y_800mf": 32,
    "resnet18": 32,
    "resnet34": 32,
    "resnet50": 32,
    "resnet101": 32,
    "resnext50_32x4d": 32,
    "shufflenet_v2_x0_5": 32,
    "shufflenet_v2_x1_0": 32,
    "squeezenet1_0": 64,
    "squeezenet1_1": 64,
    "vgg11": 32,
    "vgg16_bn": 32,
    "wide_resnet50_2": 32,
}
GROUPS, STEPS, BATCH = 4, 3, 4


def build(name: str) -> nn.Module:
    """The network with 10 classes and random weights."""
    from torchvision import models

    # These two build auxiliary classifiers that need full-size inputs, and a slow initialisation.
    extra: dict[str, Any] = (
        {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    )
    return models.get_model(name, weights=None, num_classes=10, **extra)


def learn(name: str, mode: SecondOrder) -> dict[str, Any]:
    """Three steps of one network; raises AssertionError where something became NaN or stood still."""
    torch.manual_seed(0)
    model, side = build(name).train(), NETWORKS[name]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    learner = GroupWrapper(
        model,
        optimizer,
        F.cross_entropy,
        2e-3,
        STEPS,
        lambda name, conv: min(GROUPS, conv.out_channels),
        0.5,
        example_input=torch.zeros(1, 3, side, side),
        second_order=mode,
    )
    before = [layer.conv.group.detach().clone() for layer in learner.layers.chosen]
    plain, own = 0.0, 0.0
    for _ in range(STEPS):
        x, y = torch.randn(BATCH, 3, side, side), torch.randint(10, (BATCH,))
        marks = [time.perf_counter()]
        learner.initialize()
        marks.append(time.perf_counter())
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(learner(x), y).backward()
        optimizer.step()
        marks.append(time.perf_counter())
        learner.after_step(x, y)
        marks.append(time.perf_counter())
        plain, own = marks[2] - marks[1], marks[1] - marks[0] + marks[3] - marks[2]
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    assert all(bool(tensor.isfinite().all()) for tensor in tensors), f"{name}: a value is not finite"
    for layer, start in zip(learner.layers.chosen, before, strict=True):
        assert layer.out_channels == 1 or layer.conv.group.ne(start).any(), (
            f"{name}: {layer.name} stood still"
        )
    survey = learner.layers
    return {"convs": len(survey.convs), "chosen": len(survey.chosen), "plain": plain, "own": own}


def main() -> None:
    """Print a Markdown table, one row per network."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(NETWORKS), metavar="name")
    print("| network | input | convs | that learn | plain step, ms | + none, ms | + exact, ms |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name in parser.parse_args().names:
        none, exact = learn(name, "none"), learn(name, "exact")
        costs = " | ".join(f"{1e3 * value:.0f}" for value in (exact["plain"], none["own"], exact["own"]))
        sizes = f"{NETWORKS[name]} | {exact['convs']} | {exact['chosen']}"
        print(f"| {name} | {sizes} | {costs} |", flush=True)


if __name__ == "__main__":
    main()
