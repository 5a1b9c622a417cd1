"""Fuzz dsp_kernels.load with damaged files: ``python scripts/safety/fuzz_files.py --count 20000 --seed 0``.

A file must load completely or raise DSPFormatError, with limited memory and time; a network that loads runs
on its example shapes. Any other outcome is an error that names the seed of the file.
"""

import argparse
import copy
import json
import random
import resource
import signal
import struct
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

import dsp_kernels
from dsp_kernels.errors import DSPError, DSPFormatError
from dsp_kernels.graph.size_check import SizeCheck

_SECONDS = 10  # per file; a good one takes less than 0.1
_MEMORY = 1 << 30  # bytes on top of what the process has at the start; files are smaller than 64 KiB
_NUMBERS = (-1, 0, 1, 2, 3, 7, 255, 2**16, 2**20, 2**31, 2**40, 2**63, 10**18, 10**30, 0.5, -1e300, True)
_WORDS = ("", "\x00", "x" * 1000, "os.system", "__class__", "relu", "../../x", "a.b", "if", "F64", "same")

Header = dict[str, Any]
Tensors = dict[str, Tensor]


def networks() -> list[tuple[Header, Tensors]]:
    """Headers and tensors of small networks with every kind of module, call and tensor attribute."""
    made = []
    torch.manual_seed(0)
    image, features = torch.zeros(1, 3, 8, 8), torch.zeros(1, 5)
    first = _Residual()
    first.dense_widths = {"packed": (8, 16, 1)}  # type: ignore[assignment]
    quantized = dsp_kernels.quantize(_Residual().eval(), torch.randn(4, 3, 8, 8))
    for network in (first, dsp_kernels.swap(_Residual().eval()), _TwoInputs(), quantized):
        example = (image, features) if isinstance(network, _TwoInputs) else (image,)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "net"
            dsp_kernels.save(network.eval(), path, example)
            size = struct.unpack("<Q", path.read_bytes()[:8])[0]
            header = json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]["dsp_kernels"]
            state = (quantized.packed if network is quantized else network).state_dict()
            made.append((json.loads(header), {name: t.clone() for name, t in state.items()}))
    return made


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        mixed = dsp_kernels.GroupStructure.build(6, 8, [([0, 5, 2], [1, 7, 4]), ([1], [0]), ([], [5])])
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.packed = dsp_kernels.PackedConv2d(mixed, 3, padding=1, bias=True)
        self.sizes = SizeCheck(("height % 2 == 0", "width >= 4", "(2 + width * 3) // 2 < 4096"))
        self.scale = nn.Parameter(torch.rand(8, 1, 1))
        self.same_scale = self.scale
        self.register_buffer("shift", torch.rand(8, 1, 1))
        self.pool = nn.AvgPool2d(2, padding=1)
        self.classifier = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Any:
        batch, _, height, width = x.shape
        x = self.packed(self.stem(self.sizes(x))) * self.scale * self.same_scale + self.shift
        x = x.view(batch, 2, 8 // 2, height, width).transpose(1, 2).reshape(batch, -1, height, width)
        left, right = torch.chunk(nn.functional.dropout(x, 0.5, self.training), 2, dim=1)
        y = torch.cat([self.pool(left), self.pool(right)[:, :, :, ::1], left[:, :, 1:6, 1:6]], 1)
        y = nn.functional.interpolate(y, size=(height, width)) + 1
        return {"logits": self.classifier(torch.flatten(y.mean((2, 3), keepdim=True), 1)), "map": y}


class _TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.embed = nn.Conv2d(3, 4, 3), nn.Linear(5, 4)

    def forward(self, x: Tensor, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.conv(x) * torch.sigmoid(self.embed(features))[:, :, None, None]
        flat = torch.where(y > 0, y**2, y).flatten(2)
        windows = nn.functional.unfold(y, 3).repeat(1, 1, 2)[:, :, :4] + torch.arange(flat.shape[1])
        places = torch.zeros(1, 4, dtype=torch.int64, device=y.device) + flat.shape[1] - 1
        words = nn.functional.embedding(places, features.expand(4, 5)).sum(1)
        return torch.einsum("bck,bdk->bcd", flat, flat), windows, words


def mutated(header: Header, tensors: Tensors, rng: random.Random) -> bytes:
    """A file whose bytes, length, JSON header, tensors or safetensors table are damaged."""
    header, tensors = copy.deepcopy(header), dict(tensors)
    kind = rng.choice(("bytes", "header bytes", "length", "json", "json", "json", "tensors", "table"))
    if kind == "json":
        for _ in range(rng.randint(1, 3)):
            _mutate_json(header, rng)
    if kind == "tensors":
        _mutate_tensors(tensors, rng)
    data = bytearray(save(tensors, metadata={"dsp_kernels": json.dumps(header)}))
    length = struct.unpack("<Q", data[:8])[0]
    if kind == "bytes":
        for _ in range(rng.randint(1, 20)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    if kind == "header bytes":
        for _ in range(rng.randint(1, 4)):
            replacement = (rng.randrange(256), ord(rng.choice('0123456789[]{},:"-')))
            data[rng.randrange(8 + length)] = rng.choice(replacement)
    if kind == "length":
        if rng.random() < 0.5:
            del data[rng.randrange(len(data)) :]
        else:
            data[:8] = struct.pack("<Q", rng.choice((0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1)))
    if kind == "table":  # offsets, shapes and dtypes of safetensors
        table = json.loads(data[8 : 8 + length])
        _mutate_json(table, rng)
        text = json.dumps(table).encode()
        data = bytearray(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return bytes(data)


def _mutate_json(root: Any, rng: random.Random) -> None:
    """Change, drop, copy or replace one value of a JSON tree."""
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key in value if isinstance(value, dict) else range(len(value)):
            places.append((value, key))
            if isinstance(value[key], dict | list):
                walk(value[key])

    walk(root)
    parent, key = rng.choice(places)
    old = parent[key]
    action = rng.choice(("number", "number", "word", "drop", "copy", "near", "wrap", "rename"))
    if action == "number":
        parent[key] = rng.choice(_NUMBERS)
    elif action == "near" and isinstance(old, int):
        parent[key] = old + rng.choice((-2, -1, 1, 2, 100))
    elif action == "word":
        parent[key] = rng.choice(_WORDS)
    elif action == "drop":
        del parent[key]
    elif action == "wrap":
        for _ in range(rng.choice((1, 5, 200))):
            old = rng.choice(([old], {"tuple": [old]}, {"node": old}))
        parent[key] = old
    elif action == "rename" and isinstance(parent, dict):
        parent[rng.choice(_WORDS)] = parent.pop(key)
    else:
        other, from_key = rng.choice(places)
        parent[key] = copy.deepcopy(other[from_key])


def _mutate_tensors(tensors: Tensors, rng: random.Random) -> None:
    name = rng.choice(list(tensors))
    tensor = tensors.pop(name)
    dtypes = (torch.float16, torch.float64, torch.int32, torch.bool, torch.int64)
    damaged: tuple[Tensors, ...] = (
        {},
        {name: torch.zeros(rng.choices((0, 1, 3, 6, 8), k=rng.randint(0, 5)))},
        {name: tensor.to(rng.choice(dtypes))},
        {rng.choice([word for word in _WORDS if word]): tensor},
        {name: torch.full_like(tensor, rng.choice((0, 1, 100)))},
        {name: tensor, "extra": torch.zeros(3)},
    )
    tensors |= rng.choice(damaged)


def outcome(path: Path) -> str:
    """ "refused", "loaded", or "does not run" for a network that loads but fails on its own example."""
    try:
        model = dsp_kernels.load(path)
    except DSPFormatError:
        return "refused"
    with torch.no_grad():
        try:
            dtype = next(model.parameters()).dtype
            model(*(torch.zeros(shape, dtype=dtype) for shape in model.example_shapes))
        except (DSPError, RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
            return "does not run"
    return "loaded"


def fuzz(count: int, seed: int) -> Counter[str]:
    """Load ``count`` damaged files. Reraises any error but DSPFormatError with the file's seed."""
    bases = networks()
    signal.signal(signal.SIGALRM, _too_slow)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net"
        for number in range(seed, seed + count):
            rng = random.Random(number)
            path.write_bytes(mutated(*rng.choice(bases), rng))
            signal.alarm(_SECONDS)
            try:
                counts[outcome(path)] += 1
            except BaseException as error:
                error.add_note(f"file of seed {number}")
                raise
            finally:
                signal.alarm(0)
            if (number - seed + 1) % 1000 == 0:
                print(number - seed + 1, dict(counts), flush=True)
    return counts


def _too_slow(number: int, frame: Any) -> None:
    raise TimeoutError(f"a file took more than {_SECONDS} s")


def main() -> None:
    """Limit memory and load damaged files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    networks()  # allocate now what torch allocates on first use
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + _MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    counts = fuzz(arguments.count, arguments.seed)
    print(f"{sum(counts.values())} files: {dict(counts)}; no crash, no hang, no other error")


if __name__ == "__main__":
    main()
