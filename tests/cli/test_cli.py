"""The commands, with small runs: what they write and print, and errors as one line without a traceback."""

import csv
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import recipe_cases
import torch
from recipe_cases import interrupt_at
from torch import Tensor, nn

import dsp_kernels
from dsp_cli import options
from dsp_cli.main import main
from dsp_cli.train import groups_folder
from dsp_kernels import GroupStructure, PackedConv2d
from dsp_kernels.times.model import LayerTimes, features, machine_name
from dsp_pruning.recipes.checkpoint import load_checkpoint, load_weights
from dsp_pruning.recipes.training import Progress

SMALL = ["-l", "8", "--data", "digits", "--epochs", "2", "--batch-size", "64"]
SMALL += ["--seed", "1", "--device", "cpu"]


Command = Callable[..., SimpleNamespace]


@pytest.fixture
def dsp(capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*arguments: object) -> SimpleNamespace:
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return SimpleNamespace(status=status, out=captured.out, error=captured.err)

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    common = [*SMALL, "--save-dir", str(folder)]
    assert main(["pretrain", *common, "--lr", "0.1", "--momentum", "0.9", "--wd", "1e-4"]) == 0
    assert main(["learn-groups", *common, "-g", "2", "-r", "2e-3", "--second-order", "none"]) == 0
    assert main(["finetune", *common, "-g", "2", "-p", "0.4"]) == 0
    return folder


@pytest.fixture(scope="module")
def packed_file(trained: Path) -> Path:
    path = trained / "packed.safetensors"
    ckpt = trained / "finetune_g2_p0.4" / "model.pt"
    assert main(["pack", "--ckpt", str(ckpt), "--save", str(path)]) == 0
    return path


def test_each_stage_starts_from_the_previous_one_and_writes_metrics(trained: Path) -> None:
    dense, _ = load_weights(trained / "pretrain" / "model.pt")
    learned, _ = load_weights(trained / "learn_groups_g2" / "model.pt")
    pruned, accuracy = load_weights(trained / "finetune_g2_p0.4" / "model.pt")
    assert accuracy is not None
    groups = {name for name in learned if name.endswith(".group")}
    assert set(learned) - set(dense) == groups
    assert {learned[name].shape[0] for name in groups} == {2}
    # Finetuning starts from the group logits and does not change them.
    assert all(torch.equal(learned[name], pruned[name]) for name in groups)
    settings = json.loads((trained / "learn_groups_g2" / "summary.json").read_text())["config"]
    wanted = {"depth": 8, "groups": 2, "regularize": 2e-3, "second_order": "none"}
    assert {name: settings[name] for name in wanted} == wanted
    for stage in ("pretrain", "learn_groups_g2", "finetune_g2_p0.4"):
        with (trained / stage / "metrics.csv").open() as file:
            assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]


def test_the_packed_file_has_the_structure_of_the_pruned_network(packed_file: Path) -> None:
    model = dsp_kernels.load(packed_file)
    assert model.example_shape == (1, 1, 16, 16)  # the training images
    convs = [module for module in model.modules() if isinstance(module, PackedConv2d)]
    assert len(convs) == 6
    summary = json.loads((packed_file.parent / "finetune_g2_p0.4" / "summary.json").read_text())
    assert summary["pruned_flops"] >= 40
    sizes = [(16, 16), (16, 16), (8, 8), (8, 8), (4, 4), (4, 4)]
    dense = [(16, 16), (16, 16), (16, 32), (32, 32), (32, 64), (64, 64)]
    macs = sum(c.structure.macs(c.kernel_size, hw) for c, hw in zip(convs, sizes, strict=True))
    whole = sum(9 * i * o * h * w for (i, o), (h, w) in zip(dense, sizes, strict=True))
    assert 100 * (1 - macs / whole) == pytest.approx(summary["pruned_flops"], abs=1e-6)


def test_inspect_lists_every_layer_and_draws_it(packed_file: Path, dsp: Command, tmp_path: Path) -> None:
    picture = tmp_path / "new" / "structure.png"
    shown = dsp("inspect", packed_file, "--picture", picture, "--image-size", 16)
    assert shown.status == 0
    model = dsp_kernels.load(packed_file)
    for name, module in model.named_modules():
        if isinstance(module, PackedConv2d):
            line = next(line for line in shown.out.splitlines() if name in line)
            planes = 16 * 2 ** (int(name[6]) - 1)
            filters = module.out_channels - len(module.structure.absent)
            assert f"{filters} of {planes}" in line
            assert f"{len(module.structure.read)} of" in line
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert [path.name for path in picture.parent.iterdir()] == ["structure.png"]


def test_quantize_compares_accuracies_and_inspect_lists_what_is_float(
    packed_file: Path, dsp: Command, tmp_path: Path
) -> None:
    save = tmp_path / "integers.safetensors"
    shown = dsp("quantize", packed_file, "--save", save, "--keep", "stage_3", "--method", "minmax")
    right = re.search(r"([\d.]+) % of \d+ test images right, ([\d.]+) % in float32", shown.out)
    assert right is not None, shown.error
    assert abs(float(right[1]) - float(right[2])) < 3
    assert "calibrated on 2" in shown.out
    inspected = dsp("inspect", save, "--image-size", 16).out
    for text in (shown.out, inspected):
        assert "layers in 8-bit integers, weights of" in text
        assert "float: stage_3.0.conv_a (kept in float)" in text
    assert "is quantised already" in dsp("quantize", save, "--save", tmp_path / "x").error
    assert "is quantised; export the packed" in dsp("export", save, tmp_path / "x.onnx").error


def test_bench_times_a_packed_file_in_the_chosen_engines(
    packed_file: Path, dsp: Command, tmp_path: Path
) -> None:
    out = tmp_path / "bench.json"
    flags = ["--batch", 1, "--batch", 3, "--rounds", 2, "--image-size", 16, "--out", out, "--report"]
    chosen = ["--engine", "torch", "--engine", "fused:eager", "--form", "dense", "--form", "packed"]
    shown = dsp("bench", packed_file, *flags, *chosen)
    assert shown.status == 0
    (run,) = json.loads(out.read_text())["runs"]
    pairs = [f"{form}/{engine}" for form in ("dense", "packed") for engine in ("torch", "fused:eager")]
    assert [(row["engine"], row["batch"]) for row in run["rows"]] == [(p, b) for b in (1, 3) for p in pairs]
    assert all(row["max_logit_difference"] <= row["allowed_difference"] for row in run["rows"])
    assert all(row["status"] == "ok" and row["n"] >= 2 for row in run["rows"])
    assert run["flop_ratio"] > 1
    assert out.with_suffix(".html").is_file()
    assert "packed/fused:eager" in shown.out


def test_an_own_network_on_own_data_in_every_command(dsp: Command, tmp_path: Path) -> None:
    model = ["--model", "recipe_cases:own_net", "--model-args", "width=12", "--model-args", "norm=batch"]
    common = [*model, "--epochs", 1, "--batch-size", 16, "--device", "cpu"]
    common += ["--data", "recipe_cases:own_data", "--save-dir", tmp_path]
    missing = dsp("finetune", *common, "-g", 3)
    assert "learn-groups --model recipe_cases:own_net --model-args width=12" in missing.error
    weights = ["--init", "weights", "-p", 0.4]
    for stage in (["pretrain"], ["learn-groups", "-g", 3, *weights], ["finetune", "-g", 3, "-p", 0.4]):
        shown = dsp(*stage, *common)
        assert shown.status == 0, shown.error
    ckpt, file = tmp_path / "finetune_g3_p0.4" / "model.pt", tmp_path / "own.safetensors"
    assert "name another network with --model" in dsp("pack", "--ckpt", ckpt, "--save", file).error
    shown = dsp("pack", "--ckpt", ckpt, "--save", file, *model)
    assert "for images of 8x8" in shown.out, shown.error
    weights, _ = load_weights(ckpt)
    masked = recipe_cases.own_net(12)
    masked.load_state_dict(
        {name: value for name, value in weights.items() if "." in name[:2] and value.dim()}, strict=False
    )
    x = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(dsp_kernels.load(file)(x), masked.eval()(x))
    assert "of 12" in dsp("inspect", ckpt, *model).out
    to, data = tmp_path / "made", ["--data", "recipe_cases:own_data"]
    for command in (["quantize", ckpt, "--save", to, *data], ["export", ckpt, to, "--format", "torchscript"]):
        shown = dsp(*command, *model)
        assert f"{to}: " in shown.out, shown.error
    timed = [
        "--batch",
        1,
        "--rounds",
        2,
        "--engine",
        "torch",
        "--form",
        "packed",
        "--out",
        tmp_path / "b.json",
    ]
    shown = dsp("bench", ckpt, *model, *timed)
    assert "packed/torch" in shown.out, shown.error


def test_demo_runs_the_whole_pipeline(dsp: Command, tmp_path: Path) -> None:
    shown = dsp("demo", "-l", 8, "--epochs", 2, "--rounds", 2, "--save-dir", tmp_path)
    assert shown.status == 0, shown.error
    cells = [line.split("│") for line in shown.out.splitlines() if "│ accuracy" in line]
    accuracy = {row[1].strip().removeprefix("accuracy "): row[2].strip() for row in cells}
    before = ["dense", "groups learned", "before finetuning"]
    assert list(accuracy) == [*before, "finetuned", "packed, reloaded", "fused"]
    assert accuracy["finetuned"] == accuracy["packed, reloaded"] == accuracy["fused"]
    rows = ["pruned FLOPs", "pruned params", "packed vs masked", "fused vs packed"]
    for row in [*rows, *(f"latency {engine}, batch 32" for engine in ("dense", "packed", "fused"))]:
        assert row in shown.out
    assert all(
        (tmp_path / name).is_file() for name in ("packed.safetensors", "structure.png", "latency.json")
    )


def test_ctrl_c_leaves_a_checkpoint_to_resume_from(
    dsp: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def interrupting() -> Iterator[Callable[[str], Progress]]:
        yield lambda stage: interrupt_at(20)  # in the second epoch of 18 steps

    arguments = ["pretrain", *SMALL, "--save-dir", tmp_path]
    with monkeypatch.context() as patch:
        patch.setattr(options, "progress_bars", interrupting)
        stopped = dsp(*arguments)
    assert stopped.status == 130
    assert stopped.error.startswith("error: interrupted")
    assert load_checkpoint(tmp_path / "pretrain")["epoch"] == 1
    assert dsp(*arguments, "--resume").status == 0
    assert load_checkpoint(tmp_path / "pretrain")["epoch"] == 2


# Arguments, exit status, part of the message. TEXT is a text file, FOLDER an empty folder, RUN stands for the
# options of the trained network, PACKED for the packed one.
BAD = [
    ("conquer", 2, "No such command 'conquer'"),
    ("demo --speed", 2, "No such option"),
    ("pretrain --epochs many", 2, "--epochs"),
    ("pretrain --epochs -3", 2, "--epochs"),
    ("pretrain --data mnist", 1, "unknown data set 'mnist'"),
    ("pretrain --data nowhere:data", 1, "nowhere cannot be imported: ModuleNotFoundError"),
    ("pretrain --data builtins:dict", 1, "returned a dict; expected ImageData or FolderData"),
    ("pretrain --model nowhere.nets:make", 1, "nowhere.nets cannot be imported: ModuleNotFoundError"),
    ("pretrain --model recipe_cases:net", 1, "has no function 'net'"),
    ("pretrain --model recipe_cases", 1, "'recipe_cases' is not of the form package.module:function"),
    ("pretrain --model builtins:list", 1, "returned a list; expected a torch.nn.Module"),
    ("pretrain --model recipe_cases:own_net", 1, "missing 1 required positional argument: 'width'"),
    ("pretrain --model recipe_cases:own_net --model-args width", 1, "expected NAME=VALUE"),
    ("pretrain --model recipe_cases:own_net --model-args width=8 --model-args classes=7", 1, "(1, 7)"),
    ("pretrain --model timm/no_such_net", 1, "no_such_net"),
    ("pack --ckpt TEXT --save FOLDER/x --model builtins:list", 1, "expected a torch.nn.Module"),
    ("learn-groups --second-order third", 2, "'third' is not one of"),
    ("pack", 2, "--ckpt"),
    ("pretrain --data cifar10", 1, "needs --data-root"),
    ("pretrain --data folder --data-root FOLDER", 1, "one folder of images per class"),
    ("pretrain -l 21 --data digits", 1, "depth is 21"),
    ("pretrain RUN --device cuda:99", 1, "device 'cuda:99' cannot be used"),
    ("pretrain RUN --resume --lr 0.7", 1, "has lr = 0.1, now it is 0.7"),
    ("learn-groups --save-dir FOLDER", 1, "run `dsp pretrain -l 20` first"),
    ("learn-groups RUN -g 99", 1, "16 filters"),
    ("learn-groups RUN -g 2 --layer-groups stage_9.*=3", 1, "stage_9.*"),
    ("learn-groups RUN -g 2 --layer-groups stage_1", 1, "expected PATTERN=G"),
    ("finetune RUN -g 2 --layer-groups stage_3.*=4", 1, "-g 2 --layer-groups 'stage_3.*=4'` first"),
    ("finetune RUN -g 2 -p 1.5", 1, "rate"),
    ("finetune RUN -g 2 --ckpt TRAINED/pretrain/model.pt", 1, "group is missing"),
    ("finetune --ckpt FOLDER/none.pt", 1, "none.pt: no such file"),
    ("finetune --ckpt TEXT", 1, "is not a readable checkpoint"),
    ("pack --ckpt TEXT --save FOLDER/x", 1, "is not a readable checkpoint"),
    ("pack --ckpt TEXT --save FOLDER/x.pt", 1, "use .safetensors"),
    ("inspect FOLDER/none", 1, "none"),
    ("inspect TEXT", 1, "not a readable safetensors file"),
    ("inspect PACKED --picture FOLDER/picture.doc", 1, "cannot write the picture"),
    ("bench TEXT", 1, "not a readable safetensors file"),
]


@pytest.mark.parametrize(("arguments", "status", "message"), BAD)
def test_bad_input_is_one_line(
    arguments: str, status: int, message: str, packed_file: Path, dsp: Command, tmp_path: Path
) -> None:
    text = tmp_path / "text.safetensors"
    text.write_text("not a network")
    (tmp_path / "empty").mkdir()
    for name, value in (
        ("RUN", " ".join([*SMALL, "--save-dir", "TRAINED"])),
        ("TRAINED", packed_file.parent),
        ("PACKED", packed_file),
        ("TEXT", text),
        ("FOLDER", tmp_path / "empty"),
    ):
        arguments = arguments.replace(name, str(value))
    outcome = dsp(*arguments.split())
    assert outcome.status == status
    assert outcome.error.startswith("error: ")
    assert message in outcome.error
    assert outcome.error.count("\n") == 1
    assert list((tmp_path / "empty").iterdir()) == []


def test_help_names_every_command(dsp: Command) -> None:
    shown = dsp("--help")
    assert shown.status == 0
    for command in ("demo", "pretrain", "learn-groups", "finetune", "pack", "quantize", "inspect", "bench"):
        assert command in shown.out


def test_without_typer_the_error_names_the_extra_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    assert main(["--help"]) == 1
    assert "needs 'dsp-kernels[cli]'" in capsys.readouterr().err


class _TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(1, 4, 3)
        self.head = PackedConv2d(GroupStructure.build(4, 2, [([0, 2], [0]), ([1], [1])]), 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(self.a(x) + self.b(y)).mean((2, 3))


def test_a_network_with_several_inputs_in_every_command(dsp: Command, tmp_path: Path) -> None:
    file = tmp_path / "two.safetensors"
    network, given = _TwoInputs().eval(), (torch.randn(1, 3, 8, 8), torch.randn(1, 1, 8, 8))
    dsp_kernels.save(network, file, given)
    assert "head" in dsp("inspect", file).out
    for name in ("two.onnx", "two.pt2"):
        shown = dsp("export", file, tmp_path / name, "--format", name[4:])
        assert "images of 3x8x8 and 1x8x8, any batch size" in shown.out, shown.error
    x, y = torch.randn(3, 3, 8, 8), torch.randn(3, 1, 8, 8)
    expected = network(x, y).detach()
    exported = torch.export.load(tmp_path / "two.pt2").module()
    assert torch.allclose(exported(x, y), expected, atol=1e-6)
    session = pytest.importorskip("onnxruntime").InferenceSession(tmp_path / "two.onnx")
    (answer,) = session.run(None, {"input": x.numpy(), "input_1": y.numpy()})
    assert torch.allclose(torch.from_numpy(answer), expected, atol=1e-5)
    refused = dsp("bench", file, "--out", tmp_path / "b.json")
    assert refused.status
    assert "takes several inputs" in refused.error


GROUPS: list[tuple[int, dict[str, int]]] = [
    (4, {}),
    (48, {}),
    *((4, {pattern: 8}) for pattern in ("stage_3.*", "stage_3.?", "stage_3.", "stage_3/*", "stage_3.%2A")),
    # The order counts if both match a layer.
    *((4, choice) for choice in ({"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a=1_b": 2}, {"a": 12})),
    *((4, {f"layer{number}.{end}": 2 for number in range(40)}) for end in "*?"),
]


def test_different_groups_have_different_valid_folders(tmp_path: Path) -> None:
    names = {f"learn_groups_{groups_folder(*choice)}" for choice in GROUPS}
    assert len(names) == len(GROUPS)
    for name in names:
        (tmp_path / name).mkdir()
    assert {path.name for path in tmp_path.iterdir()} == names
    assert groups_folder(4, {"stage_3.0.conv_a": 8}) == "g4_stage_3.0.conv_a=8"


def test_calibrate_keeps_what_was_measured_for_other_settings(
    dsp: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSP_KERNELS_CACHE", str(tmp_path))
    row = np.ones(len(features()))

    def measured(threads: list[int], dtype: torch.dtype, seconds: float, progress: Progress) -> LayerTimes:
        return LayerTimes(machine_name(), {f"{dtype}, {count}": row * seconds for count in threads})

    monkeypatch.setattr("dsp_cli.calibrate.measure", measured)
    assert dsp("calibrate", "--threads", 1, "--seconds", 2).status == 0
    assert dsp("calibrate", "--threads", 3, "--dtype", "bfloat16", "--seconds", 5).status == 0
    kept = LayerTimes.load().weights
    assert {key: values[0] for key, values in kept.items()} == {"torch.float32, 1": 2, "torch.bfloat16, 3": 5}


def test_finetune_by_time_names_the_command_that_measures(
    dsp: Command, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSP_KERNELS_CACHE", str(tmp_path))
    arguments = [
        "finetune",
        *SMALL,
        "--save-dir",
        trained,
        "-g",
        2,
        "-p",
        0.4,
        "--target",
        "time",
        "--dry-run",
    ]
    missing = dsp(*arguments)
    assert missing.status == 1
    assert "dsp calibrate" in missing.error
    how = " apart" * (torch.get_num_threads() > 1)
    key = f"float32, {torch.get_num_threads()} threads{how}"
    LayerTimes(machine_name(), {key: np.ones(len(features()))}).save()
    shown = dsp(*arguments, "--batch", 32)
    assert shown.status == 0
    assert "share of time" in shown.out
