"""Files are written completely or not at all, with the access rights of any new file."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

import dsp_kernels
from dsp_kernels.whole_file import UNFINISHED, whole_file, write_text
from dsp_pruning.recipes.checkpoint import remove_unfinished


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_a_saved_network_has_the_rights_of_any_new_file(tmp_path: Path) -> None:
    path, network = tmp_path / "net.safetensors", nn.Conv2d(2, 3, 1)
    before = os.umask(0o027)
    try:
        dsp_kernels.save(network, path, torch.zeros(1, 2, 4, 4))
    finally:
        os.umask(before)
    assert mode(path) == 0o640
    path.chmod(0o604)
    dsp_kernels.save(network, path, torch.zeros(1, 2, 4, 4))
    assert mode(path) == 0o604
    assert [file.name for file in tmp_path.iterdir()] == ["net.safetensors"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "before")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_text(tmp_path / "link", "after")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "after"


@pytest.mark.parametrize("there", [False, True])
def test_what_fails_leaves_what_was_there(tmp_path: Path, there: bool) -> None:
    path = tmp_path / "a b *.txt"
    if there:
        write_text(path, "before")

    def fail() -> None:
        with whole_file(path) as temporary:
            temporary.write_text("half")
            assert [file.name for file in tmp_path.glob(UNFINISHED)] == [temporary.name]
            assert temporary.suffix == ".txt"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [file.read_text() for file in tmp_path.iterdir()] == ["before"] * there


def test_a_failure_after_writing_keeps_both_that_were_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, previous = tmp_path / "last", tmp_path / "previous"
    for text in ("1", "2"):
        with whole_file(path, previous) as temporary:
            temporary.write_text(text)

    def full(_: int) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"), whole_file(path, previous) as temporary:
        temporary.write_text("3")
    assert (path.read_text(), previous.read_text()) == ("2", "1")


def test_a_file_system_without_rights_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("no rights here")

    write_text(tmp_path / "a", "before")
    (tmp_path / "a").chmod(0o600)
    monkeypatch.setattr(os, "chmod", refuse)
    monkeypatch.setattr(Path, "chmod", refuse)
    write_text(tmp_path / "a", "after")
    assert (tmp_path / "a").read_text() == "after"


def test_only_what_this_package_left_unfinished_is_removed(tmp_path: Path) -> None:
    foreign = [".notes.tmpl", ".foo.tmp_backup.txt", ".config.tmp.d"]
    for name in foreign:
        (tmp_path / name).write_text("mine")
    (tmp_path / f".{'0' * 32}.tmp").mkdir()
    (tmp_path / f".{'a1' * 16}.tmp.pt").write_text("half")
    remove_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*foreign, f".{'0' * 32}.tmp"])


def test_the_error_names_the_file_that_was_asked_for(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere" / "a"
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"), whole_file(nowhere):
        pass
    with pytest.raises(IsADirectoryError, match="expected the name of a file"), whole_file(tmp_path):
        pass
    with pytest.raises(IsADirectoryError, match=r"\. is a folder"), whole_file("."):
        pass
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="is a device or a pipe"), whole_file(tmp_path / "pipe"):
        pass
    (tmp_path / "pipe").unlink()
    long = tmp_path / f"a.{'x' * 254}"
    with pytest.raises(OSError, match=r"File name too long: .*/a\.xxx"), whole_file(long):
        pass
    assert not list(tmp_path.iterdir())
