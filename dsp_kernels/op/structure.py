"""GroupStructure: which channels each group of a convolution reads and which it writes.

It is checked once, when it is built, so no kernel ever gets an index that is out of bounds.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsp_kernels.errors import DSPStructureError

# Symbols of ``render``, one per group; reused if there are more groups.
_MARKS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Group:
    """The input channels that one group reads and the output channels that it writes, in weight order.

    A group may read no channel: its outputs are then its bias. It writes at least one.

    >>> GroupStructure.uniform(4, 8, n_groups=2).groups[1]
    Group(in_index=(2, 3), out_index=(4, 5, 6, 7))
    """

    in_index: tuple[int, ...]
    out_index: tuple[int, ...]


@dataclass(frozen=True)
class GroupStructure:
    """The channels of every group of one convolution; immutable, checked and hashable.

    in_channels, out_channels: channels of the tensors that the convolution reads and writes.
    groups: any number, also none. Groups may share input channels.
    absent: output channels that no group writes, ascending. read: input channels that at least one group
        reads, ascending. kernels: number of 2-D kernels, the sum over groups of filters x channels.
    is_uniform: whether the groups are those of ``nn.Conv2d(groups=len(groups))``.

    Raises DSPStructureError if an index is out of bounds or repeated within its list, an output channel
    belongs to two groups, or a group writes nothing.

    >>> structure = GroupStructure.build(4, 2, [([0, 2], [1]), ([0, 1, 3], [0])])
    >>> print(structure.render())
    11.1
    0.0.
    >>> structure.absent, structure.params((3, 3))
    ((), 45)
    """

    in_channels: int
    out_channels: int
    groups: tuple[Group, ...] = ()
    absent: tuple[int, ...] = field(init=False, repr=False, compare=False)
    read: tuple[int, ...] = field(init=False, repr=False, compare=False)
    kernels: int = field(init=False, repr=False, compare=False)
    is_uniform: bool = field(init=False, repr=False, compare=False)
    # There are thousands of indices, and structures are keys of caches.
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("in_channels", "out_channels"):
            object.__setattr__(self, name, _whole(getattr(self, name), name))
            if getattr(self, name) < 1:
                raise DSPStructureError(f"{name} is {getattr(self, name)}; expected at least 1")
        owner: dict[int, int] = {}
        checked = []
        for place, group in enumerate(self.groups):
            in_index = _index(group.in_index, self.in_channels, f"group {place} in_index", "in_channels")
            out_index = _index(group.out_index, self.out_channels, f"group {place} out_index", "out_channels")
            if not out_index:
                raise DSPStructureError(f"group {place} writes no output channel; leave it out instead")
            for channel in out_index:
                if channel in owner:
                    raise DSPStructureError(
                        f"output channel {channel} is in group {owner[channel]} and in group {place}; "
                        "an output channel belongs to one group at most"
                    )
                owner[channel] = place
            checked.append(Group(in_index, out_index))
        read = {channel for group in checked for channel in group.in_index}
        derived = {
            "groups": tuple(checked),
            "absent": tuple(channel for channel in range(self.out_channels) if channel not in owner),
            "read": tuple(sorted(read)),
            "kernels": sum(len(group.in_index) * len(group.out_index) for group in checked),
            "is_uniform": checked == _uniform(self.in_channels, self.out_channels, len(checked)),
            "_hash": hash((self.in_channels, self.out_channels, tuple(checked))),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def __hash__(self) -> int:
        return self._hash

    @classmethod
    def build(
        cls, in_channels: int, out_channels: int, groups: Iterable[tuple[Sequence[int], Sequence[int]]]
    ) -> GroupStructure:
        """A structure from pairs (in_index, out_index) of integer sequences, one per group.

        >>> GroupStructure.build(3, 2, [(range(2), [0]), ([2], [1])]).groups[0]
        Group(in_index=(0, 1), out_index=(0,))
        """
        return cls(in_channels, out_channels, tuple(Group(tuple(i), tuple(o)) for i, o in groups))

    @classmethod
    def dense(cls, in_channels: int, out_channels: int) -> GroupStructure:
        """One group that reads and writes every channel: an ordinary convolution."""
        return cls.build(in_channels, out_channels, [(range(in_channels), range(out_channels))])

    @classmethod
    def uniform(cls, in_channels: int, out_channels: int, n_groups: int) -> GroupStructure:
        """Equal groups of consecutive channels, as of ``nn.Conv2d(groups=n_groups)``."""
        groups = _uniform(in_channels, out_channels, n_groups)
        if groups is None:
            raise DSPStructureError(
                f"{in_channels} -> {out_channels} channels cannot be divided into {n_groups} equal groups"
            )
        return cls(in_channels, out_channels, tuple(groups))

    @property
    def is_dense(self) -> bool:
        """Whether one group reads and writes every channel in order."""
        return self.is_uniform and len(self.groups) == 1

    def macs(self, kernel_size: tuple[int, int], output_hw: tuple[int, int]) -> int:
        """Multiply-adds for one image with an output of ``output_hw`` = (height, width) pixels."""
        return self.params(kernel_size) * output_hw[0] * output_hw[1]

    def params(self, kernel_size: tuple[int, int]) -> int:
        """Number of weights of all groups, without bias."""
        return self.kernels * kernel_size[0] * kernel_size[1]

    def render(self) -> str:
        """The (out_channels, in_channels) matrix as text: a group's symbol at its kernels, else a dot."""
        rows = [["."] * self.in_channels for _ in range(self.out_channels)]
        for number, group in enumerate(self.groups):
            for out_channel in group.out_index:
                for in_channel in group.in_index:
                    rows[out_channel][in_channel] = _MARKS[number % len(_MARKS)]
        return "\n".join("".join(row) for row in rows)

    def __str__(self) -> str:
        sizes = ", ".join(f"{len(group.in_index)}->{len(group.out_index)}" for group in self.groups)
        absent = f", {len(self.absent)} absent" if self.absent else ""
        return f"{self.in_channels}->{self.out_channels} in {len(self.groups)} groups ({sizes}{absent})"

    def to_dict(self) -> dict[str, Any]:
        """JSON-serializable values for ``from_dict``."""
        return {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "groups": [[list(group.in_index), list(group.out_index)] for group in self.groups],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GroupStructure:
        """The structure of which ``to_dict`` gave ``data``. Raises DSPStructureError for anything else."""
        try:
            pairs = [(tuple(in_index), tuple(out_index)) for in_index, out_index in data["groups"]]
            widths = data["in_channels"], data["out_channels"]
        except (KeyError, TypeError, ValueError) as error:
            raise DSPStructureError(
                f"not a group structure: {error!r}; expected in_channels, out_channels and pairs of indices"
            ) from error
        return cls.build(*widths, pairs)


def _uniform(in_channels: int, out_channels: int, n_groups: int) -> list[Group] | None:
    """Equal groups of consecutive channels; None if the channels cannot be divided."""
    if n_groups < 1 or in_channels % n_groups or out_channels % n_groups:
        return None
    c, o = in_channels // n_groups, out_channels // n_groups
    starts = range(n_groups)
    return [Group(tuple(range(g * c, g * c + c)), tuple(range(g * o, g * o + o))) for g in starts]


def _whole(value: Any, what: str) -> int:
    """Convert anything that is exactly an integer: also of numpy, or a 0-d tensor."""
    if isinstance(value, bool):
        raise DSPStructureError(f"{what} is {value!r}; expected an integer")
    try:
        return operator.index(value)
    except TypeError:
        raise DSPStructureError(f"{what} is {value!r}; expected an integer") from None


def _index(values: Iterable[Any], bound: int, what: str, bound_name: str) -> tuple[int, ...]:
    try:
        index = tuple(_whole(value, f"an entry of {what}") for value in values)
    except TypeError:
        raise DSPStructureError(f"{what} is {values!r}; expected a list of integers") from None
    seen: set[int] = set()
    for channel in index:
        if not 0 <= channel < bound:
            raise DSPStructureError(
                f"{what} holds {channel}, but {bound_name} is {bound}: expected 0 to {bound - 1}"
            )
        if channel in seen:
            raise DSPStructureError(f"{what} holds channel {channel} twice")
        seen.add(channel)
    return index
