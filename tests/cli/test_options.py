"""Names that commands make of their options."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest

from dsp_cli.options import groups_folder

CHOICES: list[tuple[int, dict[str, int]]] = [
    (4, {}),
    (48, {}),
    (4, {"stage_3.*": 8}),
    (4, {"stage_3.?": 8}),
    (4, {"stage_3.": 8}),
    (4, {"stage_3/*": 8}),
    (4, {"stage_3.%2A": 8}),
    (4, {"a": 1, "b": 2}),
    (4, {"b": 2, "a": 1}),  # the order counts where both fit a layer
    (4, {"a=1_b": 2}),
    (4, {"a": 12}),
    (4, {f"layer{number}.*": 2 for number in range(40)}),
    (4, {f"layer{number}.?": 2 for number in range(40)}),
]


def test_other_groups_have_another_folder() -> None:
    for (groups, one), (others, other) in combinations(CHOICES, 2):
        assert groups_folder(groups, one) != groups_folder(others, other), (one, other)


@pytest.mark.parametrize(("groups", "by_layer"), CHOICES)
def test_a_folder_of_that_name_can_be(groups: int, by_layer: dict[str, int], tmp_path: Path) -> None:
    name = f"learn_groups_{groups_folder(groups, by_layer)}"
    (tmp_path / name).mkdir()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_plain_names_are_readable() -> None:
    assert groups_folder(4, {}) == "g4"
    assert groups_folder(4, {"stage_3.0.conv_a": 8}) == "g4_stage_3.0.conv_a=8"
