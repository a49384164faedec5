"""The command line. Thin: heavy imports are inside the verbs, and no user's mistake is a traceback.

Exit codes: 0 done; 1 a check failed; 2 the request, an entry or a file is wrong; 3 an attack or a
defense failed while running; 130 stopped (the same command continues).
"""

import os
import signal
import sys
from importlib import import_module
from typing import Annotated, Any

import typer

from dbp_bench import __version__
from dbp_bench.cli import moved
from dbp_bench.cli.app import app
from dbp_bench.errors import AttackFailed, DbpError, did_you_mean, plain

for _module in (
    *("list", "run", "weights", "train"),
    *("report", "check", "sweep", "analyze"),
    *("new", "submit", "verify"),
):
    # Each adds its commands to the app, whose help shows them in this order.
    import_module(f"{__name__}.{_module}")

_UsageError: Any = typer.BadParameter.__mro__[1]
"""What the parser of the command line raises, which Typer does not export."""


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
        code = app(prog_name="dbp-bench", standalone_mode=False)
    except _UsageError as error:
        _fail(_misused(error), 2)
    if code == 130:  # typer's way to say that it was interrupted
        raise KeyboardInterrupt
    sys.exit(code)


def _misused(error: Any) -> str:
    """What is wrong with the command line, on one line, and which help tells more."""
    names = error.ctx.command_path.split()[1:] if error.ctx else []
    shown = " ".join(["dbp-bench", *names, "--help"])
    if hasattr(error, "possibilities") and hasattr(error, "option_name"):
        # An option that there is not.
        name = str(error.option_name)
        if names == ["run"] and name in moved.OPTIONS:
            return moved.OPTIONS[name]
        known = [option for parameter in error.ctx.command.params for option in parameter.opts]
        hint = did_you_mean(name, [option for option in known if option.startswith("--")], shown)
        return f"{' '.join(names)}: no option {name!r}.{hint}"
    message = " ".join(error.format_message().split())
    if not message:  # it was called without arguments: the help has been shown
        sys.exit(2)
    where = f"{' '.join(names)}: " if names else ""
    end = "" if message.endswith((".", "?")) else "."
    return f"{where}{message[0].lower()}{message[1:]}{end} `{shown}` tells more."


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _fail(message: str, code: int) -> None:
    print(plain(f"dbp-bench: {message}"), file=sys.stderr)
    sys.exit(code)


def _version(value: bool) -> None:
    if value:
        print(f"dbp-bench {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say it and exit.")
    ] = False,
) -> None:
    pass
