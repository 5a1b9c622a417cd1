"""A small network with learned groups to prune, and readings of its state."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsp_pruning.models.cifar import cifar_resnet
from dsp_pruning.prune.wrapper import PruneWrapper


def learned(model: nn.Module, n_groups: Any = 3, seed: int = 0, **options: Any) -> PruneWrapper:
    generator = torch.Generator().manual_seed(seed)
    pruner = PruneWrapper(model, n_groups, **({"fp_every_nth_conv": 2} | options))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                # Channels of different norms, as after group learning.
                shape = (module.weight.shape[0], module.weight.shape[1], 1, 1)
                module.weight.mul_(torch.rand(shape, generator=generator) * 2)
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
                module.bias.copy_(torch.randn(module.num_features, generator=generator) * 0.3)
        for layer in pruner.layers:
            layer.conv.group.copy_(torch.randn(layer.conv.group.shape, generator=generator))
    return pruner


def fresh(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return cifar_resnet(8)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def train(pruner: PruneWrapper, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(pruner.model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    generator = torch.Generator().manual_seed(1)
    pruner.model.train()
    for _ in range(steps):
        x = torch.randn(4, 3, 16, 16, generator=generator)
        loss = F.cross_entropy(pruner(x), torch.randint(10, (4,), generator=generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pruner.after_step()


def zeros(pruner: PruneWrapper) -> dict[str, Tensor]:
    return {layer.name: (layer.conv.weight.detach() == 0).flatten(2).all(2) for layer in pruner.layers}
