"""Data sets in memory and in folders: splits, batches, augmentation and errors."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dsp_kernels
from dsp_cli.main import main
from dsp_kernels import PackedConv2d
from dsp_kernels.errors import DSPError, DSPFormatError, DSPShapeError
from dsp_pruning.data import (
    ImageData,
    Split,
    augment,
    evaluation_batches,
    load,
    load_digits,
    load_folder,
    normalise,
    stratified_split,
    training_batches,
    training_steps,
)
from dsp_pruning.recipes.checkpoint import load_weights


@pytest.fixture
def tiny() -> ImageData:
    """11 training, 4 validation and 5 test images of 6 x 5 pixels in three classes."""
    generator = torch.Generator().manual_seed(3)

    def split(n: int) -> Split:
        images = torch.randint(0, 256, (n, 1, 6, 5), generator=generator, dtype=torch.uint8)
        return Split(images, torch.arange(n) % 3)

    return ImageData("tiny", split(11), split(4), split(5), (0.5,), (0.25,), 3)


def splits(data: ImageData) -> tuple[Split, Split, Split]:
    return data.train, data.validation, data.test


def test_splits_of_digits_are_disjoint_stratified_seeded_and_normalised() -> None:
    data = load_digits(seed=1)
    assert sum(len(split) for split in splits(data)) == 1797
    assert len(data.test) >= 0.3 * 1797
    every, other = (
        torch.cat([split.images for split in splits(d)]).flatten(1) for d in (data, load_digits(seed=0))
    )
    assert len(every.unique(dim=0)) == len(other.unique(dim=0))
    for split in splits(data):
        shares = torch.bincount(split.labels, minlength=10) / len(split)
        assert float((shares - 0.1).abs().max()) < 0.02
    assert torch.equal(load_digits(seed=1).test.images, data.test.images)
    assert not torch.equal(load_digits(seed=2).test.images, data.test.images)
    images = normalise(data.train.images, data.mean, data.std)
    assert abs(float(images.mean())) < 0.02
    assert abs(float(images.std()) - 1) < 0.02


def test_cifar10_comes_from_torchvision_with_a_validation_split(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    pixels = torch.randint(0, 256, (100, 32, 32, 3), dtype=torch.uint8)

    def stub(root: str, *, train: bool, download: bool) -> Any:
        assert (root, download) == ("somewhere", True)
        n = 100 if train else 30
        return SimpleNamespace(data=pixels[:n].numpy(), targets=[i % 10 for i in range(n)])

    monkeypatch.setattr(datasets, "CIFAR10", stub)
    data = load("cifar10", "somewhere", download=True)
    assert isinstance(data, ImageData)
    assert [len(split) for split in splits(data)] == [90, 10, 30]
    assert torch.equal(data.test.images, pixels[:30].permute(0, 3, 1, 2))


def test_normalisation_is_per_channel() -> None:
    images = torch.tensor([0, 255], dtype=torch.uint8).view(1, 2, 1, 1)
    normalised = normalise(images, (0.5, 0.25), (0.5, 0.125))
    assert normalised.flatten().tolist() == [-1.0, 6.0]
    assert normalised.dtype == torch.float32


def test_a_stratified_split_contains_every_position_once() -> None:
    labels = torch.tensor([0] * 10 + [1] * 7)
    rest, held_out = stratified_split(labels, 0.3, torch.Generator().manual_seed(0))
    assert torch.cat([rest, held_out]).sort().values.tolist() == list(range(17))
    assert torch.bincount(labels[held_out]).tolist() == [3, 3]  # 2.1 of 7 is rounded up
    with pytest.raises(DSPFormatError, match="class 1 has 1 images"):
        stratified_split(torch.tensor([0, 0, 1]), 0.5, torch.Generator())


def test_augmentation_shifts_and_mirrors_all_channels_alike() -> None:
    images = torch.arange(1, 31, dtype=torch.uint8).view(1, 1, 5, 6).repeat(64, 3, 1, 1)
    augmented = augment(images, torch.Generator().manual_seed(0), flip=True, crop_padding=2)
    assert torch.equal(augmented[:, :1].expand_as(augmented), augmented)
    padded = torch.nn.functional.pad(images[:1], (2, 2, 2, 2))
    windows = {
        tuple(view[0, 0, top : top + 5, left : left + 6].flatten().tolist())
        for view in (padded, padded.flip(3))
        for top in range(5)
        for left in range(5)
    }
    seen = {tuple(image[0].flatten().tolist()) for image in augmented}
    assert seen <= windows
    assert len(seen) > 25  # of 50


# A whole number of batches, a short last batch, a last batch of one that is skipped, one batch.
@pytest.mark.parametrize(
    ("batch_size", "steps", "images"), [(11, 1, 11), (4, 3, 11), (5, 2, 10), (64, 1, 11)]
)
def test_an_epoch_is_a_seeded_permutation(tiny: ImageData, batch_size: int, steps: int, images: int) -> None:
    batches, again = (
        list(training_batches(tiny, batch_size, torch.Generator().manual_seed(5))) for _ in range(2)
    )
    assert len(batches) == steps == training_steps(tiny, batch_size)
    ((in_order, labels),) = evaluation_batches(tiny, tiny.train)
    label_of = {image.numpy().tobytes(): int(label) for image, label in zip(in_order, labels, strict=True)}
    seen = [(x.numpy().tobytes(), int(y)) for xs, ys in batches for x, y in zip(xs, ys, strict=True)]
    assert len({image for image, _ in seen}) == len(seen) == images
    assert all(label_of[image] == label for image, label in seen)
    assert [image for image, _ in seen] != list(label_of)[:images]
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(batches, again, strict=True))


def test_evaluation_keeps_the_order_and_every_image(tiny: ImageData) -> None:
    images, labels = (torch.cat(part) for part in zip(*evaluation_batches(tiny, tiny.test, 3), strict=True))
    assert torch.equal(labels, tiny.test.labels)
    assert torch.equal(images, normalise(tiny.test.images, tiny.mean, tiny.std))


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)),
    ],
    ids=["float", "three-dimensional", "label-count"],
)
def test_a_split_of_wrong_shape_or_dtype_is_refused(images: torch.Tensor, labels: torch.Tensor) -> None:
    with pytest.raises(DSPShapeError):
        Split(images, labels)


def test_labels_out_of_range_are_refused(tiny: ImageData) -> None:
    with pytest.raises(DSPFormatError, match=r"labels range from 0 to 2, expected 0\.\.1"):
        ImageData("bad", *splits(tiny), tiny.mean, tiny.std, 2)


def test_unknown_names_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DSPError, match="unknown data set 'mnist'; expected digits"):
        load("mnist")
    with pytest.raises(DSPError, match="'cifar10' needs --data-root"):
        load("cifar10")
    pytest.importorskip("torchvision")
    with pytest.raises(DSPError, match="no CIFAR-10 in"):
        load("cifar10", tmp_path)


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
