"""Exported networks give the same outputs in other programs, without this package unless they use its op."""

import copy
import math
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import nets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import cifar_images, golden_counts, golden_logits
from torch import Tensor, nn

import dsp_kernels
from dsp_cli.main import main
from dsp_kernels import GroupStructure, PackedConv2d
from dsp_kernels.errors import DSPError, DSPShapeError
from dsp_pruning import read_released
from dsp_pruning.export import export_onnx, export_pt2, export_torchscript

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
openvino = pytest.importorskip("openvino")
pytest.importorskip("onnxscript")


def run(path: Path, x: Tensor) -> Tensor:
    """The answer of ONNX Runtime, after a check that OpenVINO gives the same."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    answer = torch.from_numpy(session.run(None, {"input": x.numpy()})[0])
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    bound = (1e-2 if x.dtype == torch.float16 else 1e-4) * answer.abs().max().item()
    torch.testing.assert_close(torch.from_numpy(compiled(x.numpy())[0]), answer, rtol=0, atol=bound)
    return answer


def error(path: Path, model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return (run(path, x) - model(x)).abs().max().item()


def export_by_command(network: nn.Module, path: Path, form: str, *options: str) -> None:
    file = path.with_suffix(".safetensors")
    dsp_kernels.save(network, file, nets.example(1))
    assert main(["export", str(file), str(path), "--format", form, *options]) == 0


def test_onnx_of_a_released_network(shared: Path, tmp_path: Path) -> None:
    network = read_released(shared / "nets" / "resnet20_g4.npz")
    path = export_onnx(network, tmp_path / "net.onnx", nets.example(1, size=32))
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]
    golden, _ = golden_logits(shared, "resnet20_g4")
    assert (run(path, cifar_images(shared)[:8]) - golden[:8]).abs().max() <= 1e-4
    assert error(path, network, nets.example(3, size=32)) <= 1e-4
    graph = onnx.load(path).graph
    kinds = [node.op_type for node in graph.node]
    convs = [module for module in network.modules() if isinstance(module, PackedConv2d)]
    others = sum(isinstance(module, nn.Conv2d) for module in network.modules())
    # Each branch is one ordinary convolution, each layer gathers once and orders once at most.
    assert kinds.count("Conv") == others + sum(len(conv.structure.groups) for conv in convs)
    assert kinds.count("Gather") <= 2 * len(convs)
    assert "BatchNormalization" not in kinds
    assert {node.domain for node in graph.node} == {""}


def resnet50(shared: Path) -> nn.Module:
    """torchvision's ResNet-50 with a pruned structure and random weights and statistics."""
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.resnet50(weights=None)
    arrays = np.load(shared / "structures" / "resnet50_g2_70.npz")
    layers = sorted({name.rsplit(".", 2)[0] for name in arrays.files if name != "meta"})
    assert len(layers) == 48
    for layer in layers:
        conv = model.get_submodule(layer)
        groups = [
            (arrays[f"{layer}.{g}.in_index"].tolist(), arrays[f"{layer}.{g}.out_index"].tolist())
            for g in range(64)
            if f"{layer}.{g}.out_index" in arrays.files
        ]
        structure = GroupStructure.build(conv.in_channels, conv.out_channels, groups)
        packed = PackedConv2d(structure, conv.kernel_size, conv.stride, conv.padding)
        parent, _, name = layer.rpartition(".")
        setattr(model.get_submodule(parent), name, packed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # statistics of the batch: logits as large as those of trained networks
    with torch.no_grad():
        model.train()(nets.example(4, size=64))
    return model.eval()


def test_onnx_of_a_pruned_resnet50(shared: Path, tmp_path: Path) -> None:
    model = resnet50(shared)
    dsp_kernels.save(model, tmp_path / "net.safetensors", nets.example(1, size=64))
    loaded = dsp_kernels.load(tmp_path / "net.safetensors")
    x = nets.example(2, size=64)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(loaded(x), expected)
    path = export_onnx(loaded, tmp_path / "net.onnx", x)
    assert 0.1 < expected.abs().max() < 100
    assert (run(path, x) - expected).abs().max() <= 1e-4


ALONE = """
import sys
sys.modules.update(dict.fromkeys(("torch", "dsp_kernels", "dsp_pruning")))  # cannot be imported
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
shape = session.get_inputs()[0].shape
assert shape == ["batch", 3, "height", "width"], shape
for batch in (1, 2, 7):
    x = np.zeros((batch, 3, 7 + batch, 9), np.float16 if sys.argv[2] == "fp16" else np.float32)
    (y,) = session.run(None, {"input": x})
    assert y.shape == (batch, 5) and y.dtype == x.dtype, (y.shape, y.dtype)
"""


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_onnx_runs_without_this_package(tmp_path: Path, precision: str) -> None:
    network, path, x = nets.make("residual"), tmp_path / "net.onnx", nets.example(4)
    export_by_command(network, path, "onnx", "--precision", precision)
    half = precision == "fp16"
    got = run(path, x.half() if half else x).float()
    torch.testing.assert_close(got, network(x).detach(), rtol=0, atol=0.02 if half else 1e-5)
    command = [sys.executable, "-c", ALONE, str(path), precision]
    subprocess.run(command, check=True, timeout=60, cwd=tmp_path, env={"PATH": "/usr/bin:/bin"})


def unusual() -> nn.Module:
    """Groups that read nothing, no groups, absent channels that a norm shifts, outputs out of order, biases
    of absent channels."""
    torch.manual_seed(1)
    mixed = GroupStructure.build(3, 6, [([], [4]), ([2, 0], [5, 0]), ([1], [2])])
    empty = GroupStructure.build(6, 4, [])
    constant = GroupStructure.build(4, 3, [([], [2, 0])])
    first = PackedConv2d(mixed, 3, padding=1, bias=True)
    last = PackedConv2d(constant, 1, bias=True)
    for conv in (first, last):
        nn.init.uniform_(conv.bias, 0.5, 1.0)
    return nets.settled(
        nn.Sequential(
            first,
            nn.BatchNorm2d(6),
            nn.ReLU6(),
            PackedConv2d(empty, (1, 3), stride=(2, 1)),
            nn.BatchNorm2d(4),
            nn.Hardswish(),
            last,
        )
    )


STRUCTURES = {
    "groups share channels": [([0, 5, 2, 7], [1, 7, 4]), ([1, 2, 3], [0, 6, 3]), ([6, 4], [2, 5])],
    "groups part all channels": [([0, 5, 2], [1, 7, 4]), ([7, 1], [6, 3, 0]), ([4, 6, 3], [2, 5])],
    "absent filters": [([0, 5, 2, 7], [7, 4]), ([1, 3], [6, 3, 0])],
}


class Alternating(nn.Module):
    """A packed convolution before every kind of reader, plain or packed, and a plain one before it."""

    def __init__(self, groups: list[tuple[list[int], list[int]]]) -> None:
        super().__init__()

        def packed() -> nn.Module:
            return PackedConv2d(GroupStructure.build(8, 8, groups), 3, padding=1, bias=True)

        readers = {
            "conv": nn.Conv2d(8, 8, 1),
            "relu": nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3)),
            "norm": nn.Sequential(nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 8, 1)),
            "pool": nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(8, 8, 1)),
            "grouped": nn.Conv2d(8, 8, 3, groups=2),
            "depthwise": nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1)),
            "transposed": nn.ConvTranspose2d(8, 8, 2, 2),
            "prelu": nn.Sequential(nn.PReLU(8), packed(), nn.Hardswish(), nn.Conv2d(8, 8, 1)),
            "packed": nn.Sequential(nn.ReLU6(), packed(), packed(), nn.Conv2d(8, 8, 1), packed()),
        }
        self.stem, self.readers = nn.Conv2d(3, 8, 3, padding=1), nn.ModuleDict(readers)
        self.first, self.head = nn.ModuleDict({name: packed() for name in readers}), nn.Linear(8, 4)
        self.side, self.last = packed(), nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        maps = [reader(self.first[name](x)) for name, reader in self.readers.items()]
        added = self.side(x)
        maps += [F.relu(x + added), self.last(torch.cat([x + added, added], 1))]
        return torch.cat([self.head(m.mean((2, 3))) for m in maps], 1)


@pytest.mark.parametrize("name", STRUCTURES)
def test_onnx_where_packed_and_plain_convolutions_alternate(tmp_path: Path, name: str) -> None:
    torch.manual_seed(2)
    network = nets.settled(Alternating(STRUCTURES[name]))
    path = export_onnx(network, tmp_path / "net.onnx", nets.example(1, size=12))
    for x in (nets.example(2, size=12), nets.example(3, size=17)):
        assert error(path, network, x) <= 1e-5 * network(x).abs().max()


@pytest.mark.parametrize(
    ("network", "free", "warns"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5)), False, False),
        (nets.ConvThen(lambda y: F.interpolate(y, size=(y.shape[2] // 2, 5))), True, False),
        (nets.ConvThen(lambda y: y * (1 if y.shape[2] > 8 else 2)), False, True),
    ],
    ids=["flattened maps", "a size from a size", "a condition on sizes"],
)
def test_height_and_width_are_free_unless_the_network_depends_on_them(
    network: nn.Module, free: bool, warns: bool, tmp_path: Path
) -> None:
    with warnings.catch_warnings(record=True) as said:
        path, x = export_onnx(network, tmp_path / "net.onnx", nets.example(1)), nets.example(3)
    # A network that takes one size only needs no warning.
    assert any("the example's size only" in str(one.message) for one in said) == warns
    dims = onnx.load(path).graph.input[0].type.tensor_type.shape.dim
    sizes = ["height", "width"] if free else [8, 8]
    assert [dim.dim_param or dim.dim_value for dim in dims] == ["batch", 3, *sizes]
    assert error(path, network, x) <= 1e-5


def test_unusual_structures_are_plain_operations(tmp_path: Path) -> None:
    network, x = unusual(), nets.example(3)
    with torch.no_grad():
        expected = network(x)
        for part, name in ((network, "all.pt"), (network[0], "first.pt")):
            traced = torch.jit.load(export_torchscript(part, tmp_path / name, x))
            torch.testing.assert_close(traced(x), part(x))
        assert (expected[:, 1] == 0).all()
    export_onnx(network, tmp_path / "net.onnx", x)
    torch.testing.assert_close(run(tmp_path / "net.onnx", x), expected)


def test_exported_programs_of_packed_and_swapped_networks(tmp_path: Path) -> None:
    network = nets.make("residual")
    export_by_command(network, tmp_path / "packed.pt2", "pt2")
    swapped = dsp_kernels.swap(copy.deepcopy(network))
    export_pt2(swapped, tmp_path / "swapped.pt2", nets.example(1))
    for name, model in (("packed", network), ("swapped", swapped)):
        program = torch.export.load(tmp_path / f"{name}.pt2")
        for batch in (1, 5):
            x = nets.example(batch)
            torch.testing.assert_close(program.module()(x), model(x))
        ops = [
            str(node.target) for node in program.graph.nodes if "gather_grouped_conv2d" in str(node.target)
        ]
        assert len(ops) == (2 if name == "swapped" else 0)


def test_torchscript_runs_without_this_package(tmp_path: Path) -> None:
    network = nets.make("residual")
    export_by_command(network, tmp_path / "net.pt", "torchscript")
    inputs = nets.example(1), nets.example(5), nets.example(2, size=13)
    torch.save([(x, network(x).detach()) for x in inputs], tmp_path / "pairs.pt")
    code = (
        "import sys, torch\n"
        "sys.modules.update(dsp_kernels=None, dsp_pruning=None)\n"
        "network = torch.jit.load('net.pt')\n"
        "for x, y in torch.load('pairs.pt', weights_only=True): torch.testing.assert_close(network(x), y)\n"
        "print('equal')"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "equal\n"


@pytest.mark.parametrize(
    "middle",
    [
        lambda y: F.interpolate(y, size=(math.floor(y.shape[2] / 2),) * 2),
        lambda y: y * math.sqrt(y.shape[2]),
        lambda y: torch.cat(y.split(4, 2)[:1], 2).mean((2, 3)) / y.shape[3],
        lambda y: sum(part.mean() for part in y.split(4, 2)) * y,
    ],
)
def test_torchscript_of_numbers_computed_from_sizes_is_refused(
    tmp_path: Path, middle: Callable[[Tensor], Tensor]
) -> None:
    with pytest.raises(DSPError, match="cannot be exported"):
        export_torchscript(nets.ConvThen(middle).eval(), tmp_path / "net.pt", nets.example(1))
    assert not list(tmp_path.iterdir())


def test_float16_onnx_of_operations_without_float16_kernels(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LocalResponseNorm(2)).eval()
    export_onnx(model, tmp_path / "net.onnx", nets.example(1), dtype=torch.float16)
    assert (tmp_path / "net.onnx").is_file()


def test_errors_of_exports(tmp_path: Path) -> None:
    network = nets.make("residual")
    with pytest.raises(DSPError, match="export the packed one"):
        export_onnx(dsp_kernels.fuse(network, nets.example(1)), tmp_path / "net.onnx", nets.example(1))
    with pytest.raises(DSPError, match="opset is 11"):
        export_onnx(network, tmp_path / "net.onnx", nets.example(1), opset=11)
    for write in (export_onnx, export_pt2, export_torchscript):
        with pytest.raises(DSPShapeError, match=r"does not run on an example of shape \(1, 4, 8, 8\): .*4"):
            write(network, tmp_path / "net", torch.zeros(1, 4, 8, 8))
        with pytest.raises(DSPError, match=r"Undecided cannot be exported to .*net: "):
            write(nets.Undecided(), tmp_path / "net", nets.example(1))
    with pytest.raises(DSPError, match="the example has shape"):
        export_onnx(network, tmp_path / "net.onnx", torch.zeros(3, 8, 8))
    assert not list(tmp_path.iterdir())


def test_inspect_of_any_file(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No image size is asked for; a network of unknown dense widths is shown as well."""
    network = read_released(shared / "nets" / "resnet20_g4.npz")
    dsp_kernels.save(network, tmp_path / "known", nets.example(1, size=32))
    dsp_kernels.save(nets.make("residual"), tmp_path / "graph", nets.example(1))
    dsp_kernels.save(nets.make("residual"), tmp_path / "unsized")
    shown = {}
    for name in ("known", "graph", "unsized"):
        assert main(["inspect", str(tmp_path / name), "--overview", str(tmp_path / f"{name}.pdf")]) == 0
        shown[name] = capsys.readouterr().out
        assert (tmp_path / f"{name}.pdf").read_bytes().count(b"/Type /Page ") == 1
    pruned = golden_counts(shared, "resnet20_g4")["upstream_pruned_layers_only"]["pruned_macs_pct"]
    assert f"packed layers: {100 - pruned:.2f} %" in shown["known"]
    assert "images of 8 x 8" in shown["graph"]
    assert "does not hold" in shown["graph"]
    assert "does not say how large" in shown["unsized"]
