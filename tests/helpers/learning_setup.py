"""A toy net that learns groups, and all state that a step could change."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from nets import ToyA
from torch import Tensor, nn
from torch.optim import Optimizer

from dsp_pruning.learn.wrapper import GroupWrapper

MODES = ("exact", "none", "original")
LAYERS = ("conv1", "conv2", "conv3")
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, dampening=0.1, weight_decay=1e-3),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "adamw-amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True),
    "adam-tensors": lambda p: torch.optim.Adam(p, lr=1e-3, betas=(torch.tensor(0.9), torch.tensor(0.99))),
    "adam-fused": lambda p: torch.optim.Adam(p, lr=1e-3, fused=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-3),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "radam": lambda p: torch.optim.RAdam(p, lr=1e-3),
    "adamax": lambda p: torch.optim.Adamax(p, lr=1e-3),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.1),
    "asgd": lambda p: torch.optim.ASGD(p, lr=1e-3),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-3),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-3),
}


class Setup:
    def __init__(
        self, optimizer: str = "momentum", model: nn.Module | None = None, seed: int = 0, **settings: Any
    ) -> None:
        torch.manual_seed(seed)
        self.model = (ToyA() if model is None else model).train()
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        settings = {"reg": 0.05, "total_steps": 10, "n_groups": 3, "temp": 0.5} | settings
        self.learner = GroupWrapper(self.model, self.optimizer, F.cross_entropy, **settings)
        self.x, self.y = torch.randn(8, 3, 16, 16), torch.randint(10, (8,))

    def forward_and_step(self, noise: dict[str, Tensor] | None = None) -> None:
        self.learner.initialize(noise)
        self.optimizer.zero_grad()
        F.cross_entropy(self.learner(self.x), self.y).backward()
        self.optimizer.step()

    def step(self) -> None:
        self.forward_and_step()
        self.learner.after_step(self.x, self.y)

    def logits(self) -> list[Tensor]:
        return [self.model.get_submodule(name).group.clone() for name in LAYERS]


def regulariser(prob: Tensor, weight: Tensor) -> Tensor:
    """R by its definition (paper, equation 3), with the masked filters of every group written out."""
    masked = prob[:, :, None, None, None] * weight
    norms = masked.square().sum(dim=(1, 3, 4)).sqrt()
    return (prob.sqrt().sum(dim=1).square() * norms.sum(dim=1)).sum()


def everything(setup: Setup) -> dict[str, Tensor]:
    """All state of training: weights, buffers, gradients, optimizer state, random state."""
    found = {f"state/{key}": value for key, value in setup.model.state_dict().items()}
    for name, parameter in setup.model.named_parameters():
        if parameter.grad is not None:
            found[f"grad/{name}"] = parameter.grad
        for key, value in setup.optimizer.state.get(parameter, {}).items():
            found[f"optimizer/{name}/{key}"] = torch.as_tensor(value) if value is not None else torch.zeros(0)
    found["lr"] = torch.tensor([group["lr"] for group in setup.optimizer.param_groups])
    found["random"] = torch.get_rng_state()
    return {key: value.detach().clone() for key, value in found.items()}
