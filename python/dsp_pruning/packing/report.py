"""What packing did: the original channels of every layer, and where channels had to stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dsp_pruning.packing.plan import Barrier, LayerPlan

__all__ = ["PackingReport"]


@dataclass(frozen=True)
class PackingReport:
    """Attached to what ``pack`` returns, as ``packed.packing``. It is not part of the state dict.

    layers: module path -> its original channels (``in_keep``, ``out_keep``, numbered as in the original
        network), its groups and the constants that were folded into its bias.
    barriers: where channels stayed although nothing needs their values, with the reason.
    """

    layers: Mapping[str, LayerPlan]
    barriers: tuple[Barrier, ...]

    @property
    def removed(self) -> int:
        """Output channels of convolutions that are gone."""
        return sum(
            plan.out_channels - len(plan.out_keep)
            for plan in self.layers.values()
            if plan.structure is not None
        )

    @property
    def folded(self) -> int:
        """Input channels whose constant went into a bias, counted per layer that read them."""
        return sum(len(plan.folded) for plan in self.layers.values())

    def __str__(self) -> str:
        lines = [f"{self.removed} channels removed, {self.folded} constants folded"]
        lines += [
            f"kept {barrier.kept} channels: {barrier.reason}" for barrier in self.barriers if barrier.kept
        ]
        return "\n".join(lines)
