"""GroupStructure: valid and invalid structures, and what it counts."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsp_kernels import Group, GroupStructure
from dsp_kernels.errors import DSPStructureError


@st.composite
def structures(draw: st.DrawFn) -> GroupStructure:
    """Any valid structure of up to 12 channels."""
    in_channels, out_channels = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    owner = draw(st.lists(st.integers(-1, 3), min_size=out_channels, max_size=out_channels))
    groups = []
    for number in range(4):
        out_index = [channel for channel, group in enumerate(owner) if group == number]
        if out_index:
            in_index = draw(st.lists(st.integers(0, in_channels - 1), unique=True))
            groups.append((in_index, draw(st.permutations(out_index))))
    return GroupStructure.build(in_channels, out_channels, groups)


@given(structures())
def test_counts_agree_with_the_rendered_matrix(structure: GroupStructure) -> None:
    rows = structure.render().split("\n")
    assert len(rows) == structure.out_channels
    assert all(len(row) == structure.in_channels for row in rows)
    alive = sum(mark != "." for row in rows for mark in row)
    assert alive == structure.kernels
    assert structure.params((3, 5)) == 15 * alive
    assert structure.macs((3, 5), (4, 2)) == 8 * 15 * alive
    written = {channel for group in structure.groups for channel in group.out_index}
    assert written | set(structure.absent) == set(range(structure.out_channels))
    assert not written & set(structure.absent)
    assert set(structure.read) == {channel for group in structure.groups for channel in group.in_index}


@given(structures())
def test_round_trips(structure: GroupStructure) -> None:
    assert GroupStructure.from_dict(structure.to_dict()) == structure
    for other in (pickle.loads(pickle.dumps(structure)), copy.deepcopy(structure)):
        assert other == structure
        assert hash(other) == hash(structure)


def test_dense_and_uniform_structures() -> None:
    assert GroupStructure.dense(3, 4).is_dense
    assert GroupStructure.uniform(4, 8, 2).groups[1] == Group((2, 3), (4, 5, 6, 7))
    assert GroupStructure.uniform(4, 8, 2).is_uniform
    assert not GroupStructure.uniform(4, 8, 2).is_dense
    assert not GroupStructure.build(2, 2, [([1, 0], [0, 1])]).is_dense
    assert not GroupStructure(3, 4).is_uniform
    with pytest.raises(DSPStructureError, match="cannot be divided into 3 equal groups"):
        GroupStructure.uniform(4, 8, 3)


def test_is_frozen() -> None:
    structure = GroupStructure.dense(2, 2)
    with pytest.raises(AttributeError):
        structure.in_channels = 3  # type: ignore[misc]


def test_any_exact_integer_is_an_index() -> None:
    structure = GroupStructure.build(np.int64(3), 2, [(np.array([2, 0]), torch.tensor([1]))])
    assert structure.groups == (Group((2, 0), (1,)),)
    assert all(type(channel) is int for channel in structure.groups[0].in_index)


BAD = {
    "input index too large": ((3, 2, [([3], [0])]), "holds 3, but in_channels is 3: expected 0 to 2"),
    "input index negative": ((3, 2, [([-1], [0])]), "holds -1"),
    "output index too large": ((3, 2, [([0], [2])]), "group 0 out_index holds 2, but out_channels is 2"),
    "input channel twice": ((3, 2, [([1, 1], [0])]), "holds channel 1 twice"),
    "output channel twice": ((3, 2, [([1], [0, 0])]), "holds channel 0 twice"),
    "output channel in two groups": ((3, 2, [([1], [0]), ([2], [1, 0])]), "is in group 0 and in group 1"),
    "group that writes nothing": ((3, 2, [([1], [])]), "group 0 writes no output channel"),
    "no input channels": ((0, 2, []), "in_channels is 0"),
    "negative output channels": ((1, -2, []), "out_channels is -2"),
    "float index": ((3, 2, [([1.0], [0])]), "expected an integer"),
    "bool index": ((3, 2, [([True], [0])]), "expected an integer"),
    "text": ((3, 2, [("a", [0])]), "expected an integer"),
}


@pytest.mark.parametrize("name", BAD)
def test_invalid_structures(name: str) -> None:
    arguments, message = BAD[name]
    with pytest.raises(DSPStructureError, match=message):
        GroupStructure.build(*arguments)


@pytest.mark.parametrize(
    "data", [{}, [], None, {"in_channels": 1, "out_channels": 1, "groups": [[1]]}, {"groups": 3}]
)
def test_from_dict_of_anything_else(data: object) -> None:
    with pytest.raises(DSPStructureError):
        GroupStructure.from_dict(data)  # type: ignore[arg-type]
