"""Prune torchvision's classification networks to a rate and train three steps; print a table.

``python scripts/prune_zoo.py [--rate 0.5] [names]``. Weights and group logits are random, four groups for
each layer (fewer where a layer has fewer filters), every second chosen layer may lose filters, inputs small.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

from dsp_kernels.errors import DSPError, DSPPruningError
from dsp_pruning.layers import select_layers
from dsp_pruning.prune.wrapper import PruneWrapper

NAMES = (
    *("squeezenet1_0", "squeezenet1_1", "resnet18", "mobilenet_v2", "mobilenet_v3_small", "mnasnet0_5"),
    *("mobilenet_v3_large", "mnasnet0_75", "mnasnet1_0", "mnasnet1_3", "shufflenet_v2_x0_5"),
    *("shufflenet_v2_x1_0", "shufflenet_v2_x1_5", "shufflenet_v2_x2_0", "regnet_y_400mf", "regnet_x_400mf"),
    *("regnet_y_800mf", "regnet_x_800mf", "googlenet", "resnet34", "efficientnet_b0", "efficientnet_b1"),
    *("resnet50", "resnext50_32x4d", "densenet121", "inception_v3", "convnext_tiny", "alexnet", "vgg11_bn"),
)
INPUT = {"inception_v3": 96}
HEAD = (
    "| network | layers | pruned FLOPs | pruned params | reach | seconds to prune | three steps |\n"
    "|---|---|---|---|---|---|---|"
)
NEAR = 0.5  # points: how far above the target the one threshold for all layers may end


def main() -> int:
    """Exit status 1 if a network fails, or misses the rate although it is within reach."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=0.5)
    parser.add_argument("names", nargs="*")
    given = parser.parse_args()
    torch.set_num_threads(1)
    failed = 0
    print(HEAD, flush=True)
    for name in given.names or NAMES:
        try:
            row, good = prune(name, given.rate)
        except DSPError as error:
            row, good = f"| {name} | {type(error).__name__}: {error} | | | | | |", False
        failed += not good
        print(row, flush=True)
    return 1 if failed else 0


def prune(name: str, rate: float) -> tuple[str, bool]:
    """One row of the table, and whether the network came within half a point of the rate or cannot."""
    from torchvision import models

    torch.manual_seed(0)
    more = {"init_weights": False, "aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    model: nn.Module = models.get_model(name, weights=None, num_classes=10, **more)
    size = INPUT.get(name, 64)
    example = torch.randn(1, 3, size, size)
    n_groups = min(4, *(layer.out_channels for layer in select_layers(model, example)))
    started = time.perf_counter()
    pruner = PruneWrapper(model, n_groups, fp_every_nth_conv=2, example_input=example)
    with torch.no_grad():
        for layer in pruner.layers:
            layer.conv.get_buffer("group").normal_()
    reach = "in reach"
    try:
        flops, params = pruner.initialize(rate)
    except DSPPruningError:
        high = pruner.reachable()[1]
        reach = f"0..{100 * high:.2f} %"
        flops, params = pruner.initialize(high)
    seconds = time.perf_counter() - started
    report = pruner.report()
    loss = three_steps(pruner, size)
    alone = sum("own mask" in row["note"] for row in report.layers)
    near = flops - 100 * rate < NEAR
    reach += f", {alone} layers by their own mask" if alone else ""
    row = (
        f"| {name} | {len(report.layers)} | {flops:.2f} % | {params:.2f} % | {reach} | {seconds:.1f} "
        f"| {'loss is finite' if torch.isfinite(loss) else 'NaN'} |"
    )
    kept = pruner.report().pruned_flops == flops
    return row, near and kept and bool(torch.isfinite(loss))


def three_steps(pruner: PruneWrapper, size: int) -> torch.Tensor:
    """Train on noise; the loss of the last step."""
    optimizer = torch.optim.SGD(pruner.model.parameters(), lr=0.01, momentum=0.9)
    pruner.model.train()
    loss = torch.zeros(())
    for _ in range(3):
        loss = F.cross_entropy(pruner(torch.randn(2, 3, size, size)), torch.randint(10, (2,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pruner.after_step()
    return loss.detach()


if __name__ == "__main__":
    sys.exit(main())
