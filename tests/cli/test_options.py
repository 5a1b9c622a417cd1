"""Names of the folders that ``--groups`` and ``--layer-groups`` make."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

from dsp_cli.train import groups_folder

CHOICES: list[tuple[int, dict[str, int]]] = [
    (4, {}),
    (48, {}),
    (4, {"stage_3.*": 8}),
    (4, {"stage_3.?": 8}),
    (4, {"stage_3.": 8}),
    (4, {"stage_3/*": 8}),
    (4, {"stage_3.%2A": 8}),
    (4, {"a": 1, "b": 2}),
    (4, {"b": 2, "a": 1}),  # the order counts if both match a layer
    (4, {"a=1_b": 2}),
    (4, {"a": 12}),
    (4, {f"layer{number}.*": 2 for number in range(40)}),
    (4, {f"layer{number}.?": 2 for number in range(40)}),
]


def test_different_groups_have_different_valid_folders(tmp_path: Path) -> None:
    for (groups, one), (others, other) in combinations(CHOICES, 2):
        assert groups_folder(groups, one) != groups_folder(others, other), (one, other)
    names = {f"learn_groups_{groups_folder(*choice)}" for choice in CHOICES}
    for name in names:
        (tmp_path / name).mkdir()
    assert {path.name for path in tmp_path.iterdir()} == names


def test_plain_names_are_readable() -> None:
    assert groups_folder(4, {}) == "g4"
    assert groups_folder(4, {"stage_3.0.conv_a": 8}) == "g4_stage_3.0.conv_a=8"
