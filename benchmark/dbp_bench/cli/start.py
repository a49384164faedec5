"""Runs a command, and says on one line what went wrong."""

import os
import sys
from io import TextIOWrapper
from traceback import walk_tb
from typing import Any, NoReturn

import typer

from dbp_bench.cli import moved
from dbp_bench.cli.app import application
from dbp_bench.errors import AttackFailed, DbpError, NotConforming, did_you_mean, place_of, words_of

_UsageError: Any = typer.BadParameter.__mro__[1]
"""The error of the parser of the command line, which Typer does not export."""


def start() -> None:
    """Run the command that ``sys.argv`` asks for; always ends in SystemExit.

    Raises:
        KeyboardInterrupt: It was stopped.
        BrokenPipeError: Nobody reads on.
    """
    # One thread, unless the user says otherwise: the operations on small images are too short to
    # share. More threads sleep while they wait: beside other jobs, spinning is 15 times slower.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):
        # A character that the terminal has no code for is shown as its number.
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.argv[1:] = [_at_home(argument) for argument in sys.argv[1:]]
    try:
        _invoke()
    except (AttackFailed, NotConforming) as error:
        _fail(str(error), 3)
    except DbpError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # somebody's own code raises anything
        own = place_of(error) is not None
        if not own and isinstance(error, SystemExit | BrokenPipeError):
            raise
        if not own and isinstance(error, OSError):
            _fail(f"{error.filename or 'input/output'}: {error.strerror or error}.", 2)
        if _is_exhausted(error):
            _fail(
                "out of memory. Give a smaller --max-batch or --batch-size, or take "
                "--checkpointing step.",
                3,
            )
        if not own and "--trust-code" not in sys.argv:
            raise  # a fault of ours: the traceback says where
        _fail(_failed(error), 3)


def _at_home(argument: str) -> str:
    """An argument such as ``--data=~/x``, which shells leave as it is, with the home folder."""
    option, equals, value = argument.partition("=")
    if option.startswith("--") and equals and value.startswith("~"):
        return f"{option}={os.path.expanduser(value)}"  # noqa: PTH111
    return argument


def _is_exhausted(error: BaseException) -> bool:
    """Tell whether memory did not suffice."""
    if "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from dbp_bench.memory import is_exhausted

    return is_exhausted(error)


def _failed(error: BaseException) -> str:
    """Say what somebody's own code raised, and where; or that what it returned made ours raise."""
    said = " ".join(words_of(error).split())
    what = f"{type(error).__name__}{f': {said}' if said else ''}"
    if isinstance(error, SystemExit):
        what = f"ends the process (exit {error.code or 0})"
    place = place_of(error)
    if place is not None:
        return f"{place}: {what}"
    frame, line = list(walk_tb(error.__traceback__))[-1]
    return (
        f"{what} ({frame.f_code.co_filename}:{line}), with what the code returned that is trusted "
        "here. `dbp-bench check` tells more of a defense."
    )


def _invoke() -> None:
    try:
        code = application()(prog_name="dbp-bench", standalone_mode=False)
    except _UsageError as error:
        _fail(_misused(error), 2)
    if code == 130:  # typer's way to say that it was interrupted
        raise KeyboardInterrupt
    sys.exit(code)


def _misused(error: Any) -> str:
    """Say what is wrong with the command line, on one line, and which help tells more."""
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


def _fail(message: str, code: int) -> NoReturn:
    print(DbpError(f"dbp-bench: {message}"), file=sys.stderr)
    sys.exit(code)
