"""The ``dsp`` application with all commands."""

import typer

from dsp_cli import bench, calibrate, demo, doctor, files, train

app = typer.Typer(
    name="dsp",
    help="Learn groups, prune, pack exactly, run fused.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("demo")(demo.demo)
app.command("pretrain")(train.pretrain)
app.command("learn-groups")(train.learn_groups)
app.command("finetune")(train.finetune)
app.command("pack")(files.pack)
app.command("inspect")(files.inspect)
app.command("bench")(bench.bench)
app.command("import")(files.import_network)
app.command("export")(files.export)
app.command("calibrate")(calibrate.calibrate)
app.command("doctor")(doctor.doctor)
