"""``dsp export``: a packed network in a format of another runtime."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer

import dsp_kernels
from dsp_cli import options as o
from dsp_cli.show import console
from dsp_cli.twin import example_of
from dsp_pruning.export import export_onnx, export_pt2, export_torchscript

Format = StrEnum("Format", "onnx pt2 torchscript")
Precision = StrEnum("Precision", "fp32 fp16")


def export(
    file: Annotated[Path, typer.Argument(help="A packed network (.safetensors).")],
    out: Annotated[Path, typer.Argument(help="File to write.")],
    format_: Annotated[Format, typer.Option("--format", help="onnx, pt2 or torchscript.")] = Format.onnx,
    precision: Annotated[
        Precision, typer.Option("--precision", help="Of the tensors in an ONNX file.")
    ] = Precision.fp32,
    opset: Annotated[int, typer.Option("--opset", min=18, help="Of an ONNX file.")] = 18,
    image_size: o.ImageSize = None,
) -> None:
    """Write a packed network as ONNX of ordinary convolutions, an exported PyTorch program or TorchScript."""
    network = dsp_kernels.load(file)
    example, _ = example_of(network, image_size)
    if format_ is Format.onnx:
        dtype = torch.float16 if precision is Precision.fp16 else torch.float32
        export_onnx(network, out, example, opset=opset, dtype=dtype)
    elif format_ is Format.pt2:
        export_pt2(network, out, example)
    else:
        export_torchscript(network, out, example)
    size = " and ".join("x".join(map(str, x.shape[1:])) for x in example)
    console.print(
        f"{out}: {out.stat().st_size:,} bytes, for images of {size}, any batch size", soft_wrap=True
    )
