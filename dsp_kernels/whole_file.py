"""Atomic writes (a file is there completely or not at all, even after kill -9), and the cache folder."""

import io
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

UNFINISHED = f".{'[0-9a-f]' * 32}.tmp*"  # left by a killed process


@contextmanager
def whole_file(path: str | Path, previous: Path | None = None) -> Iterator[Path]:
    """A temporary file beside ``path``, of the same suffix, which replaces ``path`` when the block ends.

    If the block raises or the process dies, ``path`` is unchanged. The file keeps the access rights of the
    one it replaces, else it gets those of any new file (safetensors lets only its owner read it).
    previous: where to keep the file that is replaced. Raises OSError that names ``path`` if it cannot be
    written.
    """
    target = Path(path)
    if target.is_symlink():  # write its target
        target = target.resolve()
    if not target.name or target.is_dir():
        raise IsADirectoryError(f"{target} is a folder; expected the name of a file")
    if target.exists() and not target.is_file():  # root could replace /dev/null
        raise OSError(f"{target} is a device or a pipe; expected the name of a file")
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
            with suppress(PermissionError):  # a file system without access rights
                temporary.chmod(mode)
        if previous is not None and target.exists():
            target.replace(previous)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def fill(temporary: Path, save: Callable[[io.BytesIO], object]) -> None:
    """Write through memory: on a full disk torch's own writers raise no OSError, or end the process."""
    memory = io.BytesIO()
    save(memory)
    temporary.write_bytes(memory.getbuffer())


def require_file(path: str | Path) -> None:
    """Raise FileNotFoundError if there is no file to read."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is a folder" if Path(path).is_dir() else f"no file {path}")


def write_text(path: Path, text: str) -> Path:
    """Write a text file in UTF-8; missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def cache_folder() -> Path:
    """Folder of files that can be made or fetched again: $DSP_KERNELS_CACHE, else the user's cache folder."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsp-kernels"
    return Path(os.environ.get("DSP_KERNELS_CACHE") or user)


def cached_file(*versions: str) -> Path:
    """One file for each machine or GPU and versions, in the cache folder."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", " ".join(versions))
    return cache_folder() / f"{name}.json"
