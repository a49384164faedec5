"""The command line. Thin: heavy imports are inside the verbs, and no user's mistake is a traceback.

Exit codes: 0 done; 1 a check failed; 2 the request, an entry or a file is wrong; 3 an attack or a
defense failed while running; 130 stopped (the same command continues).
"""

import os
import signal
import sys
from typing import Annotated

import typer

from dbp_bench import __version__

# Each module adds its commands to the app, in the order of the help.
from dbp_bench.cli import (
    analyze,
    check,
    list,
    new,
    report,
    run,
    submit,
    sweep,
    training,
    verify,
    weights,
)  # isort: skip
from dbp_bench.cli.app import app
from dbp_bench.errors import AttackFailed, DbpError

__all__ = [
    "analyze",
    "app",
    "check",
    "list",
    "main",
    "new",
    "report",
    "run",
    "submit",
    "sweep",
    "training",
    "verify",
    "weights",
]


def main() -> None:
    """Entry point of the ``dbp-bench`` command."""
    signal.signal(signal.SIGTERM, _interrupt)
    # One thread, unless the user says otherwise: the operations on small images are too short to
    # share. More threads sleep while they wait: beside other jobs, spinning is 15 times slower.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        _invoke()
    except AttackFailed as error:
        _fail(str(error), 3)
    except DbpError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail("stopped. The same command continues where this one was.", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        _fail(f"{error.filename or 'input/output'}: {error.strerror or error}.", 2)


def _invoke() -> None:
    try:
        app(standalone_mode=True)
    except SystemExit as stop:
        if stop.code == 130:  # typer's way to say that it was interrupted
            raise KeyboardInterrupt from None
        raise


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _fail(message: str, code: int) -> None:
    print(f"dbp-bench: {message}", file=sys.stderr)
    sys.exit(code)


def _version(value: bool) -> None:
    if value:
        print(f"dbp-bench {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="And exit.")
    ] = False,
) -> None:
    pass
