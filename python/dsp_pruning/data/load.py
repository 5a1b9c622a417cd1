"""Data sets by name. Digits come with scikit-learn, so the demo downloads nothing."""

from pathlib import Path

import torch
import torch.nn.functional as F

from dsp_kernels.errors import DSPError
from dsp_pruning.data.batches import TrainingData
from dsp_pruning.data.folder import load_folder
from dsp_pruning.data.images import ImageData, Split, stratified_split
from dsp_pruning.named import call

# Per channel over the training images, after scaling to 0..1.
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
_DIGITS_MEAN, _DIGITS_STD = (0.305,), (0.319,)  # of all 1,797 images at 16 x 16

_DIGITS_TEST_SHARE = 0.3
_VALIDATION_SHARE = 0.1  # of the images that are not in the test split


def load(
    name: str,
    root: str | Path | None = None,
    *,
    download: bool = False,
    seed: int = 0,
    image_size: int = 224,
    workers: int = 0,
) -> TrainingData:
    """Load a data set by name.

    name: ``digits`` (needs no root), ``cifar10`` (root: torchvision's folder), ``folder`` (root, image_size
        and workers: see ``load_folder``), or ``package.module:function``, which returns ImageData or
        FolderData.
    seed: selects the validation images, and the test images of digits.
    Raises DSPError for an unknown name or a missing root.

    >>> data = load("digits")
    >>> data.num_classes, data.channels, data.image_hw
    (10, 1, (16, 16))
    """
    if ":" in name:
        data = call(name, {})
        if not isinstance(data, TrainingData):
            raise DSPError(f"{name} returned a {type(data).__name__}; expected ImageData or FolderData")
        return data
    if name not in ("digits", "cifar10", "folder"):
        raise DSPError(
            f"unknown data set {name!r}; expected digits, cifar10, folder or package.module:function"
        )
    if name == "digits":
        return load_digits(seed)
    if root is None:
        raise DSPError(f"data set {name!r} needs --data-root, the folder that contains it")
    if name == "cifar10":
        return load_cifar10(root, download=download, seed=seed)
    return load_folder(root, image_size=image_size, workers=workers, seed=seed)


def load_digits(seed: int = 0, size: int = 16) -> ImageData:
    """The 1,797 digits of scikit-learn, upsampled bilinearly from 8 x 8 to size x size pixels, one channel.

    30 % of each class are the test split and 10 % of the rest the validation split; seed selects them.
    Training shifts digits by up to one pixel but does not flip them: a mirrored digit is another sign.
    Raises DSPError if scikit-learn is not installed.

    >>> data = load_digits()
    >>> len(data.train), len(data.validation), len(data.test)
    (1123, 130, 544)
    >>> data.test.images.shape, data.test.images.dtype
    (torch.Size([544, 1, 16, 16]), torch.uint8)
    """
    try:
        from sklearn.datasets import load_digits as load_sklearn_digits
    except ImportError as error:
        raise DSPError("the digits data set needs scikit-learn: pip install 'dsp-kernels[cli]'") from error
    raw = load_sklearn_digits()
    pixels = torch.from_numpy(raw.images).float().unsqueeze(1) / 16
    resized = F.interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False)
    everything = Split((resized * 255).round().to(torch.uint8), torch.from_numpy(raw.target).long())

    generator = torch.Generator().manual_seed(seed)
    rest, test = stratified_split(everything.labels, _DIGITS_TEST_SHARE, generator)
    train, validation = stratified_split(everything.labels[rest], _VALIDATION_SHARE, generator)
    splits = everything[rest[train]], everything[rest[validation]], everything[test]
    return ImageData("digits", *splits, _DIGITS_MEAN, _DIGITS_STD, num_classes=10, crop_padding=1)


def load_cifar10(root: str | Path, *, download: bool = False, seed: int = 0) -> ImageData:
    """CIFAR-10 through torchvision: 45,000 training, 5,000 validation and 10,000 test images of 3 x 32 x 32.

    root: the folder that contains (or gets, with download) ``cifar-10-batches-py``.
    seed: selects the validation images, 10 % of each class of the original training images.
    Raises DSPError if torchvision is not installed, or if the files are missing and download is off.

    >>> data = load_cifar10("data", download=True)  # doctest: +SKIP
    """
    try:
        from torchvision.datasets import CIFAR10
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision was built for another torch
        raise DSPError(f"CIFAR-10 needs torchvision: pip install 'dsp-kernels[vision]' ({error})") from error
    try:
        parts = [CIFAR10(str(root), train=train, download=download) for train in (True, False)]
    except (RuntimeError, OSError) as error:
        raise DSPError(f"no CIFAR-10 in {root}: --download fetches it ({type(error).__name__})") from error
    pixels = [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in parts]
    labels = [torch.tensor(part.targets, dtype=torch.int64) for part in parts]
    everything, test = map(Split, pixels, labels)
    generator = torch.Generator().manual_seed(seed)
    train, validation = stratified_split(everything.labels, _VALIDATION_SHARE, generator)
    splits = everything[train], everything[validation], test
    return ImageData("cifar10", *splits, CIFAR10_MEAN, CIFAR10_STD, 10, flip=True, crop_padding=4)
