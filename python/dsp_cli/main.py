"""The ``dsp`` command. A DSPError or OSError prints one red line and no traceback."""

import sys
from collections.abc import Sequence

_USAGE, _INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 for an error, 2 for wrong usage, 130 for Ctrl-C."""
    try:
        return _run(arguments)
    except KeyboardInterrupt:  # during the import of torch, which takes seconds
        print("error: interrupted", file=sys.stderr)
        return _INTERRUPTED


def _run(arguments: Sequence[str] | None) -> int:
    try:
        import typer

        from dsp_cli.app import app
        from dsp_cli.show import print_error
        from dsp_kernels.errors import DSPError
    except ImportError as error:
        print(f"error: the dsp command needs 'dsp-kernels[cli]': {error}", file=sys.stderr)
        return 1
    try:
        status = app(list(arguments) if arguments is not None else None, standalone_mode=False)
    except (DSPError, OSError) as error:  # OSError: a file is missing or not writable
        print_error(str(error))
        return 1
    except typer.Abort:
        status = _INTERRUPTED
    except Exception as error:
        # Usage errors have format_message; their base class differs between versions of typer.
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        print_error(f"{message()} (dsp --help)")
        return _USAGE
    if status == _INTERRUPTED:  # for Ctrl-C, typer returns this or raises Abort, depending on its version
        print_error("interrupted; --resume continues a training run from its last complete epoch")
    return status if isinstance(status, int) else 0


if __name__ == "__main__":
    sys.exit(main())
