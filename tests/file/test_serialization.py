"""save and load: round trips, and files that are damaged, foreign or hostile."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import dsp_kernels
from dsp_kernels.errors import DSPFormatError
from dsp_kernels.file.header import FORMAT_VERSION, new_header
from dsp_kernels.file.version_1 import encode_changes


class Dense(nn.Module):
    """The architecture that the packed model of these tests came from."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        if not 1 <= classes <= 1000:
            raise ValueError(f"classes is {classes}")
        self.architecture = {"name": "tests.dense", "args": {"classes": classes}}
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False)
        self.classifier = nn.Linear(8, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.last(torch.relu(self.norm(self.conv(x))))
        return self.classifier(x.mean((2, 3)))


def packed() -> nn.Module:
    dsp_kernels.register_architecture("tests.dense", Dense)
    torch.manual_seed(2)
    model = Dense()
    first = dsp_kernels.GroupStructure.build(3, 6, [([0, 2], [5, 1]), ([1], [0, 3, 4])])
    model.conv = dsp_kernels.PackedConv2d(first, 3, padding=1, bias=True)
    model.norm = nn.BatchNorm2d(6)
    last = dsp_kernels.GroupStructure.build(6, 7, [([0, 5], [1, 6, 2])])
    model.last = dsp_kernels.PackedConv2d(last, 3, stride=2, padding=1)
    model.classifier = nn.Linear(7, 5)
    return nets.settled(model)


def images() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    dsp_kernels.save(packed(), path)
    return path


@pytest.fixture
def named(tmp_path: Path) -> Path:
    """A file of version 1: the architecture by its name."""
    path = tmp_path / "named.safetensors"
    model = packed()
    header = new_header(1, **encode_changes(model))
    save_file(model.state_dict(), path, metadata={"dsp_kernels": json.dumps(header)})
    return path


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder .*missing$"):
        dsp_kernels.save(packed(), tmp_path / "missing" / "model.safetensors", torch.rand(1, 3, 8, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_round_trip_is_bit_equal(tmp_path: Path, dtype: torch.dtype) -> None:
    model = packed().to(dtype)
    path = tmp_path / "model.safetensors"
    dsp_kernels.save(model, path)
    loaded = dsp_kernels.load(path)
    assert not loaded.training
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name
    x = images().to(dtype)
    assert torch.equal(loaded(x), model(x))
    dsp_kernels.save(loaded, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["again.safetensors", "model.safetensors"]


def test_loaded_model_trains_and_fuses(saved: Path) -> None:
    loaded = dsp_kernels.load(saved)
    loaded.train()(images()).sum().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())
    fused = dsp_kernels.fuse(loaded, images())
    torch.testing.assert_close(fused(images()), loaded.eval()(images()))


def test_a_failed_save_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dsp_kernels.file.save_load as module

    before = saved.read_bytes()

    def fail(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(before[:100])
        raise OSError("disk full")

    monkeypatch.setattr(module, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        dsp_kernels.save(packed(), saved)
    assert saved.read_bytes() == before
    assert len(list(saved.parent.iterdir())) == 1


def test_version_1_is_still_read(named: Path) -> None:
    model, loaded = packed(), dsp_kernels.load(named)
    assert isinstance(loaded, Dense)
    assert torch.equal(loaded(images()), model(images()))


class Untraceable(Dense):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x if x.sum() > 0 else -x)


def test_what_cannot_be_traced_is_saved_by_name_or_not_at_all(tmp_path: Path) -> None:
    dsp_kernels.register_architecture("tests.untraceable", Untraceable)
    model = packed()
    model.__class__ = Untraceable
    model.architecture = {"name": "nobody's", "args": {}}
    with pytest.raises(DSPFormatError, match=r"Untraceable cannot be traced by torch\.fx"):
        dsp_kernels.save(model, tmp_path / "a")
    assert not list(tmp_path.iterdir())
    model.architecture = {"name": "tests.untraceable", "args": {"classes": 5}}
    dsp_kernels.save(model, tmp_path / "a")
    loaded = dsp_kernels.load(tmp_path / "a")
    assert isinstance(loaded, Untraceable)
    assert torch.equal(loaded(images()), model(images()))
    model.norm = nn.GroupNorm(2, 6)
    with pytest.raises(DSPFormatError, match="cannot be traced"):
        dsp_kernels.save(model, tmp_path / "b")


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> None:
    """Change the description and the tensors of a saved file."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["dsp_kernels"])
    tensors = load_file(path)
    change(header, tensors)
    save_file(tensors, path, metadata={"dsp_kernels": json.dumps(header)})


def _set(*keys: Any) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], None]:
    """Set header[keys[0]][keys[1]]... to the last one."""

    def change(header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        *path, last, value = keys
        for key in path:
            header = header[key]
        header[last] = value

    return change


def _tensor(
    name: str, value: torch.Tensor | None
) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], None]:
    def change(header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        tensors.pop(name)
        if value is not None:
            tensors[name] = value

    return change


CONV = ("modules", "conv", "structure")
HOSTILE = {
    "a later version": (_set("readable_from", FORMAT_VERSION + 1), "this dsp_kernels reads version 3"),
    "another format": (_set("format", "weights"), "packed model"),
    "version of text": (_set("version", "2"), "expected whole numbers"),
    "no modules": (_set("modules", None), "no architecture or no modules"),
    "unknown architecture": (_set("architecture", "name", "os.system"), "'os.system' is unknown"),
    "architecture arguments": (_set("architecture", "args", {"classes": 10**9}), "cannot be built"),
    "foreign arguments": (_set("architecture", "args", {"weights": "IMAGENET1K_V1"}), "cannot be built"),
    "arguments that are no mapping": (_set("architecture", "args", 3), "mapping of args"),
    "index out of range": (_set(*CONV, "groups", [[[0, 3], [5, 1]], [[1], [0, 3, 4]]]), "holds 3, but"),
    "negative index": (_set(*CONV, "groups", [[[0, -1], [5, 1]], [[1], [0, 3, 4]]]), "holds -1"),
    "output channel twice": (_set(*CONV, "groups", [[[0, 2], [5, 1]], [[1], [0, 5, 4]]]), "in group 0 and"),
    "index of text": (_set(*CONV, "groups", [["02", [5, 1]], [[1], [0, 3, 4]]]), "expected an integer"),
    "groups that are no list": (_set(*CONV, "groups", 7), "no group structure"),
    "huge width": (_set(*CONV, "out_channels", 10**12), "in a file of this size"),
    "wide": (_set(*CONV, "out_channels", 9), "expected 1 to 8"),
    "width that is text": (_set(*CONV, "in_channels", "3"), "in_channels is '3'"),
    "unknown layer": (_set("modules", "conv9", {"type": "packed_conv"}), "conv9"),
    "unknown kind": (_set("modules", "conv", "type", "exec"), "cannot become 'exec'"),
    "kind of another layer": (_set("modules", "norm", "type", "linear"), "cannot become 'linear'"),
    "change that is no mapping": (_set("modules", "conv", 3), "'conv'"),
    "more groups than tensors": (
        _set(*CONV, "groups", [[[0], [c]] for c in range(6)] * 9),
        "more groups than tensors",
    ),
    "huge norm": (_set("modules", "norm", "channels", 10**12), "expected 1 to 8"),
    "fractional width": (_set("modules", "classifier", "features", 7.0), "expected 1 to 8"),
    "another group count": (_set(*CONV, "groups", [[[0, 2], [5, 1]]]), "not of this model"),
    "missing tensor": (_tensor("classifier.bias", None), "missing: \\['classifier.bias'\\]"),
    "foreign tensor": (lambda h, t: t.update(spy=torch.zeros(1)), "not of this model: \\['spy'\\]"),
    "wrong shape": (
        _tensor("norm.weight", torch.zeros(5)),
        "'norm.weight' has shape \\[5\\]; expected \\[6\\]",
    ),
    "integers for floats": (
        _tensor("norm.weight", torch.zeros(6, dtype=torch.int64)),
        "has dtype torch.int64",
    ),
    "two float dtypes": (_tensor("norm.weight", torch.zeros(6).double()), "several floating dtypes"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_refuses_hostile_files(named: Path, name: str) -> None:
    change, message = HOSTILE[name]
    rewrite(named, change)
    with pytest.raises(DSPFormatError, match=message):
        dsp_kernels.load(named)


def test_a_later_version_may_stay_readable(saved: Path) -> None:
    """A later version that only adds parts says so, and its files are read."""
    rewrite(
        saved,
        lambda header, tensors: header.update(version=9, readable_from=2, licence="of the later version"),
    )
    assert torch.equal(dsp_kernels.load(saved)(images()), packed()(images()))


def test_refuses_foreign_files(tmp_path: Path, saved: Path) -> None:
    path = tmp_path / "foreign"
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(DSPFormatError, match=r"not one that dsp_kernels\.save wrote"):
        dsp_kernels.load(path)
    save_file({"a": torch.zeros(2)}, path, metadata={"dsp_kernels": "{"})
    with pytest.raises(DSPFormatError, match="not JSON"):
        dsp_kernels.load(path)
    save_file({"a": torch.zeros(2)}, path, metadata={"dsp_kernels": "[" * 100_000})
    with pytest.raises(DSPFormatError):
        dsp_kernels.load(path)
    torch.save(packed().state_dict(), path)
    with pytest.raises(DSPFormatError, match=r"not a readable safetensors file \(it is a zip archive"):
        dsp_kernels.load(path)
    with pytest.raises(FileNotFoundError, match="is a folder"):
        dsp_kernels.load(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(DSPFormatError, match="not a readable safetensors file"):
        dsp_kernels.load(path)
    with pytest.raises(FileNotFoundError, match="no file"):
        dsp_kernels.load(tmp_path / "nothing")


def test_refuses_every_truncation(saved: Path) -> None:
    whole = saved.read_bytes()
    for size in [*range(0, 200, 7), *range(200, len(whole), 97), len(whole) - 1]:
        saved.write_bytes(whole[:size])
        with pytest.raises(DSPFormatError):
            dsp_kernels.load(saved)
