"""The ``dsp`` application with all commands."""

from typing import Annotated

import typer

from dsp_cli import bench, calibrate, demo, doctor, files, quantize, train
from dsp_kernels import __version__

app = typer.Typer(
    name="dsp",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True)] = False,
) -> None:
    """Learn groups, prune, pack exactly, run fused."""


app.command("demo")(demo.demo)
app.command("pretrain")(train.pretrain)
app.command("learn-groups")(train.learn_groups)
app.command("finetune")(train.finetune)
app.command("pack")(files.pack)
app.command("quantize")(quantize.quantize)
app.command("inspect")(files.inspect)
app.command("bench")(bench.bench)
app.command("import")(files.import_network)
app.command("download")(files.download)
app.command("export")(files.export)
app.command("calibrate")(calibrate.calibrate)
app.command("doctor")(doctor.doctor)
