"""The ``dsp`` command. An error of ours is one red line and exit status 1, never a traceback."""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]

_USAGE, _INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status: 0, 1 for our errors, 2 for bad flags, 130 for Ctrl-C."""
    try:
        return _run(arguments)
    except KeyboardInterrupt:  # while torch is imported, which takes seconds
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
    except (DSPError, OSError) as error:  # OSError: a file that is not there or may not be written
        print_error(str(error))
        return 1
    except typer.Abort:
        status = _INTERRUPTED
    except Exception as error:
        # Bad flags: typer's own family, whose base class has moved between its versions.
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        print_error(f"{message()} (dsp --help)")
        return _USAGE
    if status == _INTERRUPTED:  # typer gives this back for Ctrl-C, or raises Abort, depending on its version
        print_error("interrupted; a training run goes on from its last whole epoch with --resume")
    return status if isinstance(status, int) else 0


if __name__ == "__main__":
    sys.exit(main())
