"""Image files in folders, and a torchvision ResNet trained on them and packed by the commands."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dsp_kernels
from dsp_cli.main import main
from dsp_kernels import PackedConv2d
from dsp_kernels.errors import DSPFormatError
from dsp_pruning.data import evaluation_batches, load_folder, training_batches
from dsp_pruning.recipes.checkpoint import load_weights

pytest.importorskip("PIL")


def test_files_become_batches_of_their_classes(image_folder: Path) -> None:
    data = load_folder(image_folder, image_size=32)
    assert data.classes == ("cat", "dog", "frog")
    assert (len(data.train), len(data.validation), len(data.test)) == (24, 3, 9)
    assert not set(data.train.paths) & set(data.validation.paths)
    generator = torch.Generator().manual_seed(0)
    batches = list(training_batches(data, 10, generator))
    assert [images.shape for images, _ in batches] == [(10, 3, 32, 32), (10, 3, 32, 32), (4, 3, 32, 32)]
    for images, labels in [*batches, *evaluation_batches(data, data.test)]:
        assert torch.equal(images.mean((2, 3)).argmax(1), labels)  # the class is the brightest colour
    assert torch.cat([labels for _, labels in batches]).bincount().tolist() == [8, 8, 8]


def test_random_crops_depend_on_the_generator_and_not_on_the_workers(image_folder: Path) -> None:
    def images(workers: int, seed: int) -> torch.Tensor:
        data = load_folder(image_folder, image_size=16, workers=workers)
        generator = torch.Generator().manual_seed(seed)
        return torch.cat([batch for batch, _ in training_batches(data, 12, generator)])

    alone = images(0, 1)
    assert torch.equal(images(1, 1), alone)
    assert not torch.equal(images(0, 2), alone)


def test_two_processes_share_every_batch(image_folder: Path) -> None:
    data = load_folder(image_folder, image_size=16)
    runs = [
        list(training_batches(data, 12, torch.Generator().manual_seed(3), r, n))
        for r, n in ((0, 1), (0, 2), (1, 2))
    ]
    for (whole, labels), (even, _), (odd, odd_labels) in zip(*runs, strict=True):
        assert torch.equal(whole[::2], even)
        assert torch.equal(whole[1::2], odd)
        assert torch.equal(labels[1::2], odd_labels)


def test_incomplete_folders_are_refused(image_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DSPFormatError, match="one folder of images per class"):
        load_folder(tmp_path)
    (tmp_path / "train" / "cat").mkdir(parents=True)
    (tmp_path / "val" / "cow").mkdir(parents=True)
    with pytest.raises(DSPFormatError, match="classes that are not in train: cow"):
        load_folder(tmp_path)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named(image_folder: Path, tmp_path: Path, workers: int) -> None:
    for part in ("train", "val"):
        for i in range(3):
            path = tmp_path / part / "cat" / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes((image_folder / "train" / "cat" / "0.jpg").read_bytes()[:200])
    data = load_folder(tmp_path, image_size=16, workers=workers)
    with pytest.raises(DSPFormatError, match=r"\d\.jpg is not a readable image"):
        list(evaluation_batches(data, data.test))


def test_a_torchvision_resnet_is_trained_and_packed_by_the_commands(
    image_folder: Path, tmp_path: Path
) -> None:
    """Two groups in every layer, but four in layer4."""
    pytest.importorskip("torchvision")
    flags = ["--arch", "resnet18", "--data", "folder", "--data-root", image_folder, "--image-size", "32"]
    flags += ["--epochs", "1", "--batch-size", "12", "--device", "cpu", "--save-dir", tmp_path]
    groups = ["-g", "2", "--layer-groups", "layer4.*=4"]
    commands = [
        ["pretrain", *flags, "--lr", "0.01"],
        ["learn-groups", *flags, *groups, "--second-order", "none", "--precision", "bfloat16"],
        ["finetune", *flags, *groups, "-p", "0.4", "--cycles", "1", "--channels-last"],
    ]
    for command in commands:
        assert main([str(part) for part in command]) == 0
    ckpt, packed = tmp_path / "finetune_g2_layer4.%2A=4_p0.4" / "model.pt", tmp_path / "packed.safetensors"
    weights, _ = load_weights(ckpt)
    assert weights["fc.weight"].shape == (3, 512)
    for name, value in weights.items():
        assert not name.endswith(".group") or len(value) == (4 if name.startswith("layer4") else 2), name
    assert main(["pack", "--ckpt", str(ckpt), "--save", str(packed), "--image-size", "32"]) == 0
    model = dsp_kernels.load(packed)
    convs = [module for module in model.modules() if isinstance(module, PackedConv2d)]
    assert len(convs) >= 16
    assert max(len(conv.structure.groups) for conv in convs) == 4
