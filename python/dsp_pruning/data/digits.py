"""Scikit-learn's handwritten digits: real images inside a package, so that the demo downloads nothing."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dsp_kernels.errors import DSPError
from dsp_pruning.data.images import ImageData, Split, stratified_split

__all__ = ["load_digits"]

# Of the 1,797 images after upsampling, on the 0..1 scale.
MEAN = 0.305
STD = 0.319

TEST_SHARE = 0.3
VALIDATION_SHARE = 0.1  # of what the test split leaves


def load_digits(seed: int = 0, size: int = 16) -> ImageData:
    """The 1,797 digits of 8 x 8 pixels, upsampled bilinearly to ``size`` x ``size``, one channel.

    30 % of each class are held out as test, 10 % of the rest as validation; ``seed`` chooses which.
    Digits are not flipped in training: a mirrored digit is another sign; they are shifted by one pixel.
    Raises DSPError where scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load_sklearn_digits
    except ImportError as error:
        raise DSPError(
            "the digits data set comes with scikit-learn: pip install 'dsp-kernels[cli]'"
        ) from error
    raw = load_sklearn_digits()
    pixels = torch.from_numpy(raw.images).float().unsqueeze(1) / 16
    resized = F.interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False)
    everything = Split((resized * 255).round().to(torch.uint8), torch.from_numpy(raw.target).long())

    generator = torch.Generator().manual_seed(seed)
    rest, test = stratified_split(everything.labels, TEST_SHARE, generator)
    train, validation = stratified_split(everything.labels[rest], VALIDATION_SHARE, generator)
    return ImageData(
        name="digits",
        train=everything[rest[train]],
        validation=everything[rest[validation]],
        test=everything[test],
        mean=(MEAN,),
        std=(STD,),
        num_classes=10,
        crop_padding=1,
    )
