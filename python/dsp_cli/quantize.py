"""``dsp quantize``: a packed network in 8-bit integers."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

import dsp_kernels
from dsp_cli import options as o
from dsp_cli.files import check_packed_name, packed_network, quantized_layers
from dsp_cli.show import console
from dsp_kernels.errors import DSPFormatError
from dsp_kernels.quantizing.calibrate import MOST_IMAGES
from dsp_pruning.data import evaluation_batches
from dsp_pruning.data import load as load_data
from dsp_pruning.recipes.training import evaluate

Method = StrEnum("Method", "mse minmax")


def quantize(
    file: o.File,
    save: Annotated[Path, typer.Option("--save", help="File to write (.safetensors).")],
    data: o.Data = "digits",
    data_root: o.DataRoot = None,
    download: o.Download = False,
    image_size: o.CropSize = 224,
    workers: o.Workers = 0,
    method: Annotated[
        Method, typer.Option("--method", help="How the range of a value is found.")
    ] = Method.mse,
    keep: Annotated[
        list[str] | None, typer.Option("--keep", help="Module that stays in float; repeatable.")
    ] = None,
    seed: o.Seed = 0,
    model: o.Model = "",
    model_args: o.ModelArgs = None,
) -> None:
    """Turn a packed network into one of 8-bit integers, and compare their accuracies on the test images.

    The ranges of its values are those for at most 256 images, evenly spread over the training images.
    With --model, FILE holds the weights that dsp finetune wrote.
    """
    check_packed_name(save)
    packed, example, _ = packed_network(file, None, model, model_args)
    if isinstance(packed, dsp_kernels.QuantizedNetwork):
        raise DSPFormatError(f"{file} is quantised already")
    images = load_data(data, data_root, download=download, seed=seed, image_size=image_size, workers=workers)
    stride = -(-len(images.train) // MOST_IMAGES)
    chosen = [x for x, _ in evaluation_batches(images, images.train, world_size=stride)]
    quantized = dsp_kernels.quantize(packed, chosen, method.value, keep or ())
    before, after = (
        evaluate(network, images, images.test)
        for network in (dsp_kernels.fuse(packed, example), dsp_kernels.fuse(quantized))
    )
    dsp_kernels.save(quantized, save)
    console.print(
        f"{save}: {100 * after.accuracy:.2f} % of {after.n} test images right, {100 * before.accuracy:.2f} % "
        f"in float32; calibrated on {sum(map(len, chosen))} training images",
        soft_wrap=True,
    )
    console.print(quantized_layers(quantized), soft_wrap=True)
