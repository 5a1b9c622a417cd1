"""Files that are there whole or not at all, whoever reads or kills meanwhile."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

__all__ = ["UNFINISHED", "fill", "require_file", "whole_file", "write_bytes", "write_text"]

UNFINISHED = f".{'[0-9a-f]' * 32}.tmp*"  # what a killed process leaves


@contextmanager
def whole_file(path: str | Path, previous: Path | None = None) -> Iterator[Path]:
    """A file beside ``path``, with its ending, to write to; it takes that place when the block ends.

    Where the block raises or the process dies, ``path`` is what it was. Access rights are those of the file
    that was there, else of any new file; safetensors would let nobody but the owner read it.
    previous: where the file that was there goes, at the last moment.
    Raises OSError, which names ``path``, where nothing can be written.
    """
    target = Path(path)
    if target.is_symlink():  # what it points to is written
        target = target.resolve()
    if not target.name or target.is_dir():
        raise IsADirectoryError(f"{target} is a folder; expected the name of a file")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"no folder {target.parent}")
    temporary = target.with_name(f".{uuid4().hex}.tmp{target.suffix}")
    try:
        temporary.touch()
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(target)) from None
    try:
        mode = stat.S_IMODE((target if target.exists() else temporary).stat().st_mode)
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        if stat.S_IMODE(temporary.stat().st_mode) != mode:
            with suppress(PermissionError):  # of a file system that has no such rights
                temporary.chmod(mode)
        if previous is not None and target.exists():
            target.replace(previous)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def fill(temporary: Path, save: Callable[[io.BytesIO], object]) -> None:
    """By way of memory: where the disk is full torch's own writers raise no OSError, or end the process."""
    memory = io.BytesIO()
    save(memory)
    temporary.write_bytes(memory.getbuffer())


def require_file(path: str | Path) -> None:
    """Raise FileNotFoundError, in plain words, where there is no file to read."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is a folder" if Path(path).is_dir() else f"no file {path}")


def write_bytes(path: Path, content: bytes) -> Path:
    """Write a file and the folders that it needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_bytes(content)
    return path


def write_text(path: Path, text: str) -> Path:
    """Write a text file in UTF-8 and the folders that it needs."""
    return write_bytes(path, text.encode("utf-8"))
