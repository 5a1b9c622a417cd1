"""The archives that the authors of the paper published, fetched by name and verified before use."""

import fcntl
import hashlib
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from dsp_kernels.errors import DSPFormatError
from dsp_kernels.whole_file import cache_folder

ADDRESS = "https://github.com/irishev/DSP/raw/9bafcefd60109a0bb42959ae9d8550ae0b5198c9/checkpoints"

# Name of the network -> SHA-256 of its archive, or where only that is known, its git blob id (40 digits).
ARCHIVES = {
    "resnet20_g2": "8b5d606a0ee5f1d16dcfe93102d34fab3e7e0b74b930d86dd43696c220218d2b",
    "resnet20_g3": "1986a199a6232b705cb1d741d65c8f6facbfd4a9f7743c83e9673d8ea05dda8b",
    "resnet20_g4": "dfe0cace37ada21864339593046d8882a6d8a1a2077c473a5c7a3d6c4b358036",
    "resnet56_g2": "8f38f9ec34d00afee945895987fe030d49fb0f40059a36a135edd1e3bea025da",
    "resnet56_g3": "5e463a313ac24c26020d430c1bff3dbf7dae79b25f1f8a263ab4db041b4596db",
    "resnet56_g4": "62da0b3d38e886606297fd75c2c3f79c5db8ea8055d338a67940a1af3c79dab0",
    "resnet18_g2_0.60": "783dbf4ec21d53e0f373efffccbda9aacc8e7844",
    "resnet18_g2_0.70": "610479d8732776831a52d6db70baf16835644e19",
    "resnet18_g2_0.80": "3db8b7ac98b9bd3440b12f5b4be4038b03618e62",
    "resnet50_g2_0.70": "ec0f1b46ca3b74a5b2cc9f52475aae53dcc03510",
    "resnet50_g2_0.80": "6acfce6d120ae240b8358b1bf7920e5311ef7122",
    "resnet50_g2_0.90": "7880e4164d252118065196d33a4fc99d83748be1",
}

_MOST_BYTES = 2**30  # ten times the largest archive
_PIECE = 1 << 16
_TIMEOUT = 30.0  # seconds without a byte

Progress = Callable[[int, int, str], None]  # bytes so far, bytes in all (0: unknown), the same as text


def find_shared(path: str) -> Path | None:
    """A file or folder of the authors' networks, structures, images or golden numbers; None if it is nowhere.

    path: in the folder $DSP_SHARED, else ``shared`` beside the repository. Of a network, ``nets/<name>.npz``,
    also the archive that ``download_released`` keeps in the cache folder; ``load_released`` reads both.
    """
    found = Path(os.environ.get("DSP_SHARED") or Path(__file__).resolve().parents[4] / "shared") / path
    places = [found, *([_kept(found.stem)] if path.startswith("nets/") else [])]
    return next((place for place in places if place.exists()), None)


def _kept(name: str) -> Path:
    return cache_folder() / "released" / f"{name}.pt"


def download_released(name: str, progress: Progress = lambda done, total, text: None) -> Path:
    """The archive of a released network, ``released/<name>.pt`` in the cache folder, for ``load_released``.

    name: of ``ARCHIVES``. A file that is there and right is not fetched again; an interrupted download
    continues where it stopped; a second process waits for the first. $DSP_RELEASED_URL names a mirror of
    the authors' folder.
    Raises DSPFormatError for an unknown name or a file with another digest, ConnectionError where the address
    cannot be reached.

    >>> download_released("resnet56_g4")  # doctest: +SKIP
    PosixPath('/home/me/.cache/dsp-kernels/released/resnet56_g4.pt')
    """
    if name not in ARCHIVES:
        raise DSPFormatError(f"no released network {name!r}; there are {', '.join(ARCHIVES)}")
    path = _kept(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file() and _is_right(path, ARCHIVES[name]):
        return path
    address = f"{os.environ.get('DSP_RELEASED_URL') or ADDRESS}/{path.name}"
    part = path.with_suffix(".part")
    with part.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # another process that downloads it goes first
        if path.is_file() and _is_right(path, ARCHIVES[name]):
            part.unlink(missing_ok=True)
            return path
        try:
            _fetch(address, file, progress)
        except urllib.error.HTTPError as error:
            raise ConnectionError(f"{address} answers {error.code} {error.reason}") from error
        except (OSError, http.client.HTTPException, ValueError) as error:  # URLError too
            reason = getattr(error, "reason", error)
            raise ConnectionError(
                f"cannot read {address} ({reason}); fetch it where there is a network and put it at {path}"
            ) from error
        if not _is_right(part, ARCHIVES[name]):
            file.truncate(0)  # the next call starts again
            raise DSPFormatError(f"{address} is not the file that the authors published: its digest differs")
        part.replace(path)
    return path


def _fetch(address: str, file: BinaryIO, progress: Progress) -> None:
    """Append what is missing. A server that ignores ranges sends everything again."""
    done = file.seek(0, os.SEEK_END)
    request = urllib.request.Request(address, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        answer = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is missing
            return
        raise
    with answer:
        if answer.status != 206:
            done = 0
            file.truncate(0)
        length = int(answer.headers.get("Content-Length") or 0)
        total = done + length if length else 0
        while piece := answer.read(_PIECE):
            file.write(piece)
            done += len(piece)
            progress(done, total, f"{done:,} bytes")
            if done > _MOST_BYTES:
                file.truncate(0)
                raise OSError(f"it is larger than {_MOST_BYTES} bytes")
        file.flush()
        if total and done < total:
            raise OSError(f"the connection ended after {done} of {total} bytes; call again to continue")


def _is_right(path: Path, digest: str) -> bool:
    if len(digest) == 64:
        found = hashlib.sha256()
    else:  # git's id of a file's content
        found = hashlib.sha1(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            found.update(piece)
    return found.hexdigest() == digest
