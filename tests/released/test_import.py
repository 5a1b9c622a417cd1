"""Files in the authors' formats: TorchScript archives, training checkpoints and arrays."""

import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import lookalike
import nets
import numpy as np
import pytest
import torch
from dsp_benchmarks.subjects.networks import NetworkSource, load_network
from torch import Tensor, nn

import dsp_kernels
from dsp_cli.main import main
from dsp_kernels import PackedConv2d
from dsp_kernels.errors import DSPFormatError, DSPVerificationError
from dsp_pruning import PruneWrapper, pack, read_released
from dsp_pruning.models import cifar_resnet
from dsp_pruning.released.load import load_released, verify_released

SMALL, IMAGES = nets.example(size=16), nets.example(size=32)
CASES: dict[str, Callable[[], nn.Module]] = {
    "1 branch": lambda: lookalike.random_network(1),
    "2 branches": lambda: lookalike.random_network(2),
    "9 branches": lambda: lookalike.random_network(9, widths=(30, 36, 40), blocks=1, classes=100),
    "bottlenecks": lambda: lookalike.random_network(
        2, layers=3, widths=(16, 24, 32, 40), classes=1000, pooled=True
    ),
    "a block pruned away": lambda: lookalike.random_network(2, widths=(16, 32, 64), without=[(0, 1), (1, 0)]),
    "all blocks pruned away": lambda: lookalike.random_network(
        2, widths=(16, 32), without=[(s, b) for s in (0, 1) for b in (0, 1)]
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_lookalikes_are_imported(tmp_path: Path, name: str) -> None:
    network = CASES[name]()
    lookalike.save_traced(network, tmp_path / "net.pt")
    imported = load_released(tmp_path / "net.pt")
    with torch.no_grad():
        expected, got = network(SMALL), imported(SMALL)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    sets = [
        [len(branch[0].weight) for branch in module]
        for path, module in network.named_modules()
        if path.rpartition(".")[2].startswith("layers_")
    ]
    convs = [module for module in imported.modules() if isinstance(module, PackedConv2d)]
    assert [[len(group.out_index) for group in conv.structure.groups] for conv in convs] == sets
    # An ordinary packed network: it is saved, fused and trained as any other.
    dsp_kernels.save(imported, tmp_path / "net.safetensors")
    assert torch.equal(dsp_kernels.load(tmp_path / "net.safetensors")(SMALL), imported(SMALL))
    fused = dsp_kernels.fuse(imported, SMALL)
    torch.testing.assert_close(fused(SMALL), expected, rtol=1e-4, atol=1e-4)
    assert imported.train()(SMALL).requires_grad


def released_form(arrays: Mapping[str, np.ndarray]) -> lookalike.LookAlike:
    meta = json.loads(str(arrays["meta"]))

    def tensor(name: str) -> Tensor:
        array = arrays[name]
        return torch.from_numpy(array.astype(np.int64) if array.dtype.kind in "iu" else array)

    def fill(conv: nn.Conv2d, norm: nn.BatchNorm2d, weight: str, bn: str) -> None:
        conv.weight.data.copy_(tensor(weight))
        for part in ("weight", "bias", "running_mean", "running_var"):
            getattr(norm, part).data.copy_(tensor(f"{bn}.{part}"))

    stages: dict[str, list[lookalike.Block]] = {}
    width = arrays["stem.conv.weight"].shape[0]
    before = width
    for block in meta["blocks"]:
        name, counts = block["name"], (block["groups_a"], block["groups_b"])
        planes = 16 * 2 ** (int(name[6]) - 1)
        prefixes = [
            [f"{name}.conv_{letter}.{g}" for g in range(n)] for letter, n in zip("ab", counts, strict=True)
        ]
        indices = [[tensor(f"{prefix}.in_index") for prefix in layer] for layer in prefixes]
        filters = [[len(arrays[f"{prefix}.weight"]) for prefix in layer] for layer in prefixes]
        last = [tensor(f"{prefix}.out_index") for prefix in prefixes[1]]
        made = lookalike.Block(before, planes, block["stride"], indices, filters, last)
        for letter, layer in zip("ab", prefixes, strict=True):
            for branch, prefix in zip(made.get_submodule(f"layers_{letter}"), layer, strict=True):
                fill(branch[0], branch[1], f"{prefix}.weight", f"{prefix}.bn")
        if block["downsample"]:
            fill(*made.downsample, f"{name}.downsample.conv.weight", f"{name}.downsample.bn")
        stages.setdefault(name.split(".")[0], []).append(made)
        before = planes
    network = lookalike.LookAlike(list(stages.values()), width, before, meta["num_classes"], pooled=False)
    fill(network.conv_1_3x3, network.bn_1, "stem.conv.weight", "stem.bn")
    network.classifier.weight.data.copy_(tensor("classifier.weight"))
    network.classifier.bias.data.copy_(tensor("classifier.bias"))
    return network.eval()


@pytest.mark.parametrize("name", ["resnet20_g2", "resnet20_g4"])
def test_released_networks_from_archives_of_their_form(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path, archive = shared / "nets" / f"{name}.npz", tmp_path / "released" / f"{name}.pt"
    archive.parent.mkdir()
    lookalike.save_traced(released_form(np.load(path)), archive, 32)
    imported, expected = load_released(archive), read_released(path)
    assert imported.dense_widths == expected.dense_widths
    state = expected.state_dict()
    assert set(imported.state_dict()) == set(state)
    for key, tensor in imported.state_dict().items():
        assert torch.equal(tensor, state[key]), key
    structures = {path: m.structure for path, m in expected.named_modules() if isinstance(m, PackedConv2d)}
    assert structures == {
        path: m.structure for path, m in imported.named_modules() if isinstance(m, PackedConv2d)
    }
    with torch.no_grad():
        assert torch.equal(imported(IMAGES), expected(IMAGES))
    assert verify_released(archive, imported, (32, 32)) <= 1e-4
    # Benchmarks find it where `dsp download` keeps it.
    monkeypatch.setenv("DSP_SHARED", str(tmp_path / "none"))
    monkeypatch.setenv("DSP_KERNELS_CACHE", str(tmp_path))
    measured = load_network(NetworkSource(name))
    assert measured.label == f"{name}, real weights"
    with torch.no_grad():
        torch.testing.assert_close(measured.form("released")(IMAGES), expected(IMAGES), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(measured.dense(IMAGES), expected(IMAGES), rtol=1e-4, atol=1e-4)


def test_the_code_of_an_archive_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lookalike.save_traced(lookalike.random_network(2), tmp_path / "net.pt")

    def forbidden(*arguments: object, **named: object) -> None:
        raise AssertionError("the archive was run")

    monkeypatch.setattr(torch.jit.ScriptModule, "__call__", forbidden)
    monkeypatch.setattr(torch._C.ScriptMethod, "__call__", forbidden, raising=False)
    load_released(tmp_path / "net.pt")
    with pytest.raises(AssertionError, match="the archive was run"):
        verify_released(tmp_path / "net.pt", lookalike.random_network(2), (16, 16))


def test_verify_sees_another_network(tmp_path: Path) -> None:
    lookalike.save_traced(lookalike.random_network(2), tmp_path / "net.pt")
    imported = load_released(tmp_path / "net.pt")
    imported.classifier.bias.data[3] += 1
    with pytest.raises(DSPVerificationError, match="differ on random images by"):
        verify_released(tmp_path / "net.pt", imported, (16, 16))


class _InPlace(nn.Module):
    """The shortcut is read again after branches were added into it in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch = nn.Conv2d(3, 4, 3), nn.Conv2d(2, 2, 1)
        self.index, self.places = torch.tensor([3, 1]).view(1, 2, 1, 1), torch.tensor([2, 0])

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        z = torch.relu(y.index_add_(1, self.places, self.branch(torch.take_along_dim(y, self.index, 1))))
        return z + y


def test_readers_of_a_tensor_changed_in_place_read_the_result(tmp_path: Path) -> None:
    network = _InPlace().eval()
    lookalike.save_traced(network, tmp_path / "net.pt")
    with torch.no_grad():
        torch.testing.assert_close(load_released(tmp_path / "net.pt")(SMALL), network(SMALL))


TWICE = torch.tensor([0, 0])
TWICE_4D = TWICE.view(1, -1, 1, 1)
REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "operation": (torch.erf, "aten::erf is not known here"),
    "gather without convolution": (
        lambda x: torch.relu(torch.take_along_dim(x, TWICE_4D, 1)),
        "read by something other than a convolution",
    ),
    "index_add of a whole tensor": (lambda x: x.index_add(1, TWICE, x[:, :2]), "aten::slice is not known"),
    "pixels gathered": (lambda x: x.index_select(2, TWICE), "gathered in an unknown way"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_archives_of_other_networks(tmp_path: Path, name: str) -> None:
    function, message = REFUSED[name]
    lookalike.save_traced(nets.ConvThen(function).eval(), tmp_path / "net.pt")
    with pytest.raises(DSPFormatError, match=message):
        load_released(tmp_path / "net.pt")


def test_refuses_branches_that_write_one_channel_twice(tmp_path: Path) -> None:
    network = lookalike.random_network(2)
    network.stage_1[0].residual.index[1] = (
        network.stage_1[0].residual.index[0][:1].repeat(len(network.stage_1[0].residual.index[1]))
    )
    lookalike.save_traced(network, tmp_path / "net.pt")
    with pytest.raises(DSPFormatError, match=r"branches of 'stage_1\.0\.conv_b' do not fit together"):
        load_released(tmp_path / "net.pt")


class _Starts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    @torch.jit.export
    def __getstate__(self) -> int:
        return 1

    @torch.jit.export
    def __setstate__(self, state: int) -> None:
        print("code of the archive ran")

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def test_refuses_archives_that_run_code_when_loaded(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.jit.script(_Starts()).save(str(tmp_path / "net.pt"))
    with pytest.raises(DSPFormatError, match="would run code when it is loaded"):
        load_released(tmp_path / "net.pt")
    assert "ran" not in capfd.readouterr().out


def test_refuses_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    with pytest.raises(FileNotFoundError, match="no file"):
        load_released(path)
    path.write_text("this is no network")
    with pytest.raises(DSPFormatError):
        load_released(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("net/code/__torch__.py", "import os\nos.abort()\n")
    with pytest.raises(DSPFormatError, match="not a readable TorchScript archive"):
        load_released(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("net/code/__torch__.py", "#" * 200_000_000)
    with pytest.raises(DSPFormatError, match="would grow beyond"):
        load_released(path)
    lookalike.save_traced(lookalike.random_network(1), path)
    whole = path.read_bytes()
    for size in range(0, len(whole), len(whole) // 15):
        path.write_bytes(whole[:size])
        with pytest.raises(DSPFormatError):
            load_released(path)


def test_a_published_training_checkpoint_is_packed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = cifar_resnet(8)
    example = torch.zeros(1, 3, 32, 32)
    PruneWrapper(model, 2, fp_layer_indices=[], example_input=example)
    for module in model.modules():
        if hasattr(module, "mask"):
            module.mask[::2, 1::2] = module.mask[1::2, ::2] = 0
            module.weight.data.mul_(module.mask)
    torch.save([model.state_dict(), 91.5], tmp_path / "ckpt.pt")
    imported = load_released(tmp_path / "ckpt.pt")
    assert any(isinstance(module, PackedConv2d) for module in imported.modules())
    torch.testing.assert_close(imported(IMAGES), pack(model.eval(), example)(IMAGES))
    torch.save([{"weight": torch.zeros(1)}, 91.5], tmp_path / "ckpt.pt")
    with pytest.raises(DSPFormatError):
        load_released(tmp_path / "ckpt.pt")


def test_import_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = lookalike.random_network(2)
    lookalike.save_traced(network, tmp_path / "net.pt")
    out = tmp_path / "net.safetensors"
    assert main(["import", str(tmp_path / "net.pt"), str(out), "--verify", "--image-size", "16"]) == 0
    assert "8 packed layers of 16 branches" in capsys.readouterr().out
    loaded = dsp_kernels.load(out)
    assert loaded.example_shape == (1, 3, 16, 16)
    torch.testing.assert_close(loaded(SMALL), network(SMALL), rtol=1e-5, atol=1e-5)
    assert main(["import", str(out), str(tmp_path / "again")]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_arrays_from_the_command_line(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays, out = shared / "nets" / "resnet20_g2.npz", tmp_path / "net.safetensors"
    assert main(["import", str(arrays), str(out)]) == 0
    x = IMAGES
    assert torch.equal(dsp_kernels.load(out)(x), read_released(arrays)(x))
    assert main(["import", str(arrays), str(out), "--verify"]) == 1
    assert "--verify runs a TorchScript archive" in capsys.readouterr().err
    structure = shared / "structures" / "resnet18_g2_90.npz"
    assert main(["import", str(structure), str(out)]) == 1
    assert "needs blocks, bn_eps, depth, num_classes" in capsys.readouterr().err
