"""What packing does to each layer, and where channels have to stay."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from dsp_kernels import GroupStructure


@dataclass(frozen=True)
class LayerPlan:
    """One module with parameters, or one tensor outside of modules that are known, after packing.

    Channel numbers are those of the original network.

    in_channels, out_channels: original widths; features of a linear layer.
    in_keep, out_keep: channels of its input and output that stay, ascending.
    structure: groups of a convolution, numbered within in_keep and out_keep; None for other modules and for
        convolutions with groups of their own.
    bias: float64 per channel of out_keep where constants were folded into it; None where it is unchanged.
    folded: input channels whose constant went into the bias.
    position_bias: [out_keep, height, width] float64 where constants were folded into a bias per output
        position, for inputs of in_size (height, width) only.
    groups: of a layer, before packing.
    axis: of a tensor, the dimension of its channels; path is its name. Where it holds channel numbers of
        another tensor, these are renumbered within in_keep.
    """

    path: str
    in_channels: int
    out_channels: int
    in_keep: tuple[int, ...]
    out_keep: tuple[int, ...]
    structure: GroupStructure | None
    bias: tuple[float, ...] | None = field(default=None, repr=False)
    folded: tuple[int, ...] = ()
    position_bias: Tensor | None = field(default=None, repr=False, compare=False)
    in_size: tuple[int, int] | None = None
    groups: int = 1
    axis: int | None = None

    @property
    def changes(self) -> bool:
        """Whether channels are removed."""
        return len(self.in_keep) < self.in_channels or len(self.out_keep) < self.out_channels


@dataclass(frozen=True)
class Barrier:
    """An operation that keeps ``kept`` channels of itself and its inputs that nothing needs."""

    node: str
    reason: str
    kept: int


@dataclass(frozen=True)
class PackingReport:
    """What ``pack`` did, as ``packed.packing``. It is not part of the state dict.

    layers: module path -> original channels, groups and folded constants of every layer.
    barriers: operations around which channels stay, in the order in which they run.
    needs: "images of 96 x 96" for a network that is traced for one size; "" if it takes any.
    unsaved: why a file cannot hold the network; "" if it can.
    """

    layers: Mapping[str, LayerPlan]
    barriers: tuple[Barrier, ...]
    needs: str = ""
    unsaved: str = ""

    @property
    def removed(self) -> int:
        """Number of output channels removed from convolutions."""
        plans = (plan for plan in self.layers.values() if plan.structure is not None)
        return sum(plan.out_channels - len(plan.out_keep) for plan in plans)

    @property
    def folded(self) -> int:
        """Input channels whose constant went into a bias, counted per layer that reads them."""
        return sum(len(plan.folded) for plan in self.layers.values())

    def __str__(self) -> str:
        lines = [f"{self.removed} channels removed, {self.folded} constants folded"]
        lines += [f"needs {self.needs}"] if self.needs else []
        lines += [f"cannot be saved: {self.unsaved}"] if self.unsaved else []
        lines += [f"kept {one.kept} channels: {one.reason}" for one in self.barriers if one.kept]
        return "\n".join(lines)
