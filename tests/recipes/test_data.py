"""Data sets in memory: splits, batches, augmentation and bad files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dsp_kernels.errors import DSPError, DSPFormatError, DSPShapeError
from dsp_pruning.data import (
    ImageData,
    Split,
    augment,
    evaluation_batches,
    load,
    load_cifar10_jpeg,
    load_cifar10_subset,
    load_digits,
    normalise,
    stratified_split,
    training_batches,
    training_steps,
)


def _data(train: int = 11, channels: int = 1) -> ImageData:
    generator = torch.Generator().manual_seed(3)

    def split(n: int) -> Split:
        images = torch.randint(0, 256, (n, channels, 6, 5), generator=generator, dtype=torch.uint8)
        return Split(images, torch.arange(n) % 3)

    return ImageData("tiny", split(train), split(4), split(5), (0.5,) * channels, (0.25,) * channels, 3)


def test_digits_splits_are_disjoint_stratified_and_seeded() -> None:
    data = load_digits(seed=1)
    sizes = [len(split) for split in (data.train, data.validation, data.test)]
    assert sum(sizes) == 1797
    assert sizes[2] >= 0.3 * 1797
    assert data.image_hw == (16, 16)
    assert data.channels == 1
    images = torch.cat([split.images for split in (data.train, data.validation, data.test)])
    assert len(torch.unique(images.flatten(1), dim=0)) == len(torch.unique(_all_digits(), dim=0))
    for split in (data.train, data.validation, data.test):
        shares = torch.bincount(split.labels, minlength=10) / len(split)
        assert float((shares - 0.1).abs().max()) < 0.02
    assert torch.equal(load_digits(seed=1).test.images, data.test.images)
    assert not torch.equal(load_digits(seed=2).test.images, data.test.images)


def _all_digits() -> torch.Tensor:
    data = load_digits(seed=0)
    return torch.cat([split.images for split in (data.train, data.validation, data.test)]).flatten(1)


def test_digits_are_normalised_by_their_own_mean_and_std() -> None:
    data = load_digits()
    images = normalise(data.train.images, data.mean, data.std)
    assert abs(float(images.mean())) < 0.02
    assert abs(float(images.std()) - 1) < 0.02


def test_normalise_follows_the_formula_per_channel() -> None:
    images = torch.tensor([0, 255], dtype=torch.uint8).view(1, 2, 1, 1)
    got = normalise(images, (0.5, 0.25), (0.5, 0.125))
    assert got.flatten().tolist() == [-1.0, 6.0]
    assert got.dtype == torch.float32


def test_stratified_split_covers_every_position_once() -> None:
    labels = torch.tensor([0] * 10 + [1] * 7)
    rest, held_out = stratified_split(labels, 0.3, torch.Generator().manual_seed(0))
    assert torch.cat([rest, held_out]).sort().values.tolist() == list(range(17))
    assert torch.bincount(labels[held_out]).tolist() == [3, 3]  # 2.1 of 7 rounds up


def test_a_class_too_small_to_split_is_an_error() -> None:
    with pytest.raises(DSPFormatError, match="class 1 has 1 images"):
        stratified_split(torch.tensor([0, 0, 1]), 0.5, torch.Generator())


def test_augmentation_only_moves_and_mirrors() -> None:
    images = torch.arange(1, 31, dtype=torch.uint8).view(1, 1, 5, 6).repeat(64, 1, 1, 1)
    got = augment(images, torch.Generator().manual_seed(0), flip=True, crop_padding=2)
    padded = torch.nn.functional.pad(images[:1], (2, 2, 2, 2))
    windows = {
        tuple(view[0, 0, top : top + 5, left : left + 6].flatten().tolist())
        for view in (padded, padded.flip(3))
        for top in range(5)
        for left in range(5)
    }
    seen = {tuple(image.flatten().tolist()) for image in got}
    assert seen <= windows
    assert len(seen) > 25  # of 50


def test_augmentation_keeps_the_channels_of_an_image_together() -> None:
    images = torch.randint(
        0, 256, (8, 1, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    got = augment(images.repeat(1, 3, 1, 1), torch.Generator().manual_seed(1), flip=True, crop_padding=2)
    assert torch.equal(got[:, 0], got[:, 1])
    assert torch.equal(got[:, 0], got[:, 2])


# 11 images: a whole number of batches, a short last batch, a last batch of one that is left out, one batch.
@pytest.mark.parametrize(
    ("batch_size", "steps", "images"), [(11, 1, 11), (4, 3, 11), (5, 2, 10), (64, 1, 11)]
)
def test_an_epoch_is_a_seeded_permutation(batch_size: int, steps: int, images: int) -> None:
    data = _data()
    batches = list(training_batches(data, batch_size, torch.Generator().manual_seed(5)))
    again = list(training_batches(data, batch_size, torch.Generator().manual_seed(5)))
    assert len(batches) == steps == training_steps(data, batch_size)
    seen = torch.cat([x for x, _ in batches])
    assert len(seen) == images
    everything = {x.numpy().tobytes(): y for x, y in _items(data, data.train)}
    for x, y in batches:
        assert all(everything[image.numpy().tobytes()] == label for image, label in zip(x, y, strict=True))
    assert len({image.numpy().tobytes() for image in seen}) == images
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(batches, again, strict=True))
    assert not torch.equal(seen, torch.cat([x for x, _ in evaluation_batches(data, data.train)])[:images])


def _items(data: ImageData, split: Split) -> list[tuple[torch.Tensor, int]]:
    return [(x, int(y)) for xs, ys in evaluation_batches(data, split, 3) for x, y in zip(xs, ys, strict=True)]


def test_evaluation_keeps_order_and_every_image() -> None:
    data = _data()
    got = _items(data, data.test)
    assert [label for _, label in got] == data.test.labels.tolist()
    expected = normalise(data.test.images, data.mean, data.std)
    assert torch.equal(torch.stack([image for image, _ in got]), expected)


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64)),  # not uint8
        (torch.zeros(2, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)),  # no channels
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)),  # a label too many
    ],
    ids=["float", "three-dimensional", "label-count"],
)
def test_a_split_that_contradicts_itself_is_an_error(images: torch.Tensor, labels: torch.Tensor) -> None:
    with pytest.raises(DSPShapeError):
        Split(images, labels)


def test_labels_outside_the_classes_are_an_error() -> None:
    data = _data()
    with pytest.raises(DSPFormatError, match=r"labels run from 0 to 2, they must lie in 0\.\.1"):
        ImageData("bad", data.train, data.validation, data.test, data.mean, data.std, 2)


def test_subset_is_read_whole(shared: Path) -> None:
    data = load_cifar10_subset(shared / "data" / "cifar10_subset.npz", seed=4)
    assert len(data.train) + len(data.validation) == 5085
    assert len(data.test) == 1017
    with np.load(shared / "data" / "cifar10_subset.npz") as archive:
        assert np.array_equal(data.test.images.numpy(), archive["test_images"])
        assert np.array_equal(data.test.labels.numpy(), archive["test_labels"])


def test_jpeg_images_show_what_the_originals_show(tmp_path: Path, shared: Path) -> None:
    """Every lossless test cat is found among the 1,000 JPEG ones, in its own colours."""
    cat = 3
    with np.load(shared / "data" / "cifar10_jpeg.npz") as archive:
        files, offsets, labels = (archive[f"test_{what}"] for what in ("bytes", "offsets", "labels"))
    cats = np.flatnonzero(labels == cat)
    parts = [files[offsets[i] : offsets[i + 1]] for i in cats]
    small = {
        "bytes": np.concatenate(parts),
        "offsets": np.cumsum([0, *(len(part) for part in parts)]),
        "labels": labels[cats],
    }
    path = tmp_path / "cats.npz"
    np.savez(
        path, **{f"{split}_{what}": array for split in ("train", "test") for what, array in small.items()}
    )
    seen: list[tuple[int, int]] = []
    data = load_cifar10_jpeg(path, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1000, 2000), (2000, 2000)]
    assert data.test.labels.tolist() == [cat] * 1000

    original = load_cifar10_subset(shared / "data" / "cifar10_subset.npz").test
    wanted = original.images[original.labels == cat].float().flatten(1)
    apart = torch.cdist(wanted, data.test.images.float().flatten(1)).min(1).values / 3072**0.5
    # Root mean square in grey levels: 7.7 on average; swapped colours give 28, mirrored images 48.
    assert float(apart.mean()) < 10


def test_unknown_names_and_missing_roots_are_clear_errors() -> None:
    with pytest.raises(DSPError, match="unknown data set 'mnist'; known are digits"):
        load("mnist")
    with pytest.raises(DSPError, match="'subset' needs --data-root"):
        load("subset")


@pytest.mark.parametrize(
    "content", [b"", b"not an archive", b"PK\x03\x04 cut off"], ids=["empty", "text", "cut"]
)
def test_a_foreign_archive_is_one_clear_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "cifar10_subset.npz"
    path.write_bytes(content)
    with pytest.raises(DSPFormatError, match=r"not a readable \.npz"):
        load("subset", tmp_path)


def test_a_missing_or_incomplete_archive_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DSPFormatError, match="no such file"):
        load("jpeg", tmp_path)
    np.savez(tmp_path / "other.npz", test_images=np.zeros(3))
    with pytest.raises(DSPFormatError, match="lacks the arrays train_images"):
        load("subset", tmp_path / "other.npz")


def test_cifar10_without_its_files_is_a_clear_error(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    with pytest.raises(DSPError, match="no CIFAR-10 in"):
        load("cifar10", tmp_path)
