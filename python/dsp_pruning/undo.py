"""Taking a change of a model's state back, for as long as nobody has built on it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Undo", "read_state"]


@dataclass(frozen=True, eq=False)
class Undo:
    """Parameters and buffers, by dotted name, before a change and after it."""

    before: dict[str, Tensor]
    after: dict[str, Tensor]

    def possible(self, model: nn.Module) -> bool:
        """Whether the model still holds exactly what the change left."""
        return all(
            now.shape == left.shape and now.device == left.device and torch.equal(now, left)
            for now, left in zip(_tensors(model, self.after), self.after.values(), strict=True)
        )

    @torch.no_grad()
    def undo(self, model: nn.Module) -> None:
        """Put the state from before the change back."""
        for tensor, value in zip(_tensors(model, self.before), self.before.values(), strict=True):
            tensor.copy_(value)


def read_state(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Copies of the parameters and buffers of these dotted names."""
    names = list(names)
    return {name: tensor.clone() for name, tensor in zip(names, _tensors(model, names), strict=True)}


def _tensors(model: nn.Module, names: Iterable[str]) -> list[Tensor]:
    found = []
    for name in names:
        path, _, last = name.rpartition(".")
        found.append(getattr(model.get_submodule(path), last).detach())
    return found
