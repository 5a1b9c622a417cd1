"""Released networks by name, from a local server in place of the authors' address."""

import hashlib
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import lookalike
import pytest
import torch

import dsp_kernels
from dsp_cli.main import main
from dsp_kernels.errors import DSPFormatError
from dsp_pruning.released.download import ARCHIVES, download_released

NAME = "resnet20_g2"


class Server(ThreadingHTTPServer):
    """Serves one archive; ranges: whether it can continue one, breaks: whether it ends after 1,000 bytes."""

    content = b""
    ranges = True
    breaks = False
    asked: list[str | None]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.asked.append(asked)
        if not self.path.endswith(f"/{NAME}.pt"):
            self.send_error(404)
            return
        match = re.fullmatch(r"bytes=(\d+)-", asked or "")
        start = int(match[1]) if match and self.server.ranges else 0
        self.send_response(206 if start else 200)
        rest = self.server.content[start:]
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.wfile.write(rest[:1000])
        if not self.server.breaks:
            self.wfile.write(rest[1000:])

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    torch.manual_seed(0)
    lookalike.save_traced(lookalike.random_network(2), tmp_path / "net.pt")
    with Server(("127.0.0.1", 0), Handler) as server:
        server.content = (tmp_path / "net.pt").read_bytes()
        server.asked = []
        monkeypatch.setenv("DSP_RELEASED_URL", f"http://127.0.0.1:{server.server_address[1]}/checkpoints")
        monkeypatch.setenv("DSP_KERNELS_CACHE", str(tmp_path / "cache"))
        monkeypatch.setitem(ARCHIVES, NAME, hashlib.sha256(server.content).hexdigest())
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_an_archive_is_fetched_once(server: Server, tmp_path: Path) -> None:
    seen = []
    path = download_released(NAME, progress=lambda done, total, text: seen.append((done, total)))
    assert path == tmp_path / "cache" / "released" / f"{NAME}.pt"
    assert path.read_bytes() == server.content
    assert seen[-1] == (len(server.content), len(server.content))
    assert download_released(NAME) == path
    assert server.asked == [None]


@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_download_continues(server: Server, ranges: bool) -> None:
    server.breaks, server.ranges = True, ranges
    with pytest.raises(ConnectionError, match=r"ended after 1000 of \d+ bytes"):
        download_released(NAME)
    server.breaks = False
    assert download_released(NAME).read_bytes() == server.content
    assert server.asked == [None, "bytes=1000-"]


def test_of_two_downloads_at_once_one_fetches(server: Server) -> None:
    server.breaks = True
    with pytest.raises(ConnectionError):
        download_released(NAME)
    server.breaks = False
    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(download_released, [NAME] * 2))
    assert server.asked == [None, "bytes=1000-"]
    assert [path.read_bytes() for path in paths] == [server.content] * 2
    assert [path.name for path in paths[0].parent.iterdir()] == [f"{NAME}.pt"]


def git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@pytest.mark.parametrize("digest", [git_blob, lambda content: hashlib.sha256(content).hexdigest()])
def test_a_file_with_another_digest_is_refused(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, digest: Callable[[bytes], str]
) -> None:
    monkeypatch.setitem(ARCHIVES, NAME, digest(server.content))
    right = server.content
    server.content = right[:-1] + bytes([right[-1] ^ 1])
    with pytest.raises(DSPFormatError, match="digest differs"):
        download_released(NAME)
    server.content = right
    assert download_released(NAME).read_bytes() == right
    assert server.asked == [None, None]  # it started again


def test_errors_say_what_to_do(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DSPFormatError, match=r"no released network 'resnet21'; there are resnet20_g2"):
        download_released("resnet21")
    with pytest.raises(ConnectionError, match=r"resnet50_g2_0\.70\.pt answers 404"):
        download_released("resnet50_g2_0.70")
    monkeypatch.setenv("DSP_RELEASED_URL", "http://127.0.0.1:9/closed")
    with pytest.raises(ConnectionError, match=r"cannot read .*fetch it where there is a network and put it"):
        download_released(NAME)


def test_the_command_writes_a_packed_network(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["download", NAME, "--folder", str(tmp_path)]) == 0
    assert "packed layers" in capsys.readouterr().out
    network = dsp_kernels.load(tmp_path / f"{NAME}.safetensors")
    assert network(torch.zeros(1, 3, 32, 32)).shape[0] == 1
    assert main(["download", "resnet21"]) == 1
    assert "no released network" in capsys.readouterr().err
