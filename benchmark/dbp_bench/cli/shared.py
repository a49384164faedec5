"""Helpers of several commands: they read options, show progress, and print numbers."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from dbp_bench.errors import BadRequest, plain

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from dbp_bench.entries.registry import Registry
    from dbp_bench.runs.execute import Progress
    from dbp_bench.runs.job import Overrides


def registry_of(
    entries: list[Path] | None, trust_code: bool = False, data: Path | None = None
) -> "Registry":
    from dbp_bench.entries.registry import Registry

    return Registry(entries or [], trust_code=trust_code, data=data)


def show(text: object = "") -> None:
    """Print `text`, some of which others wrote: without their control characters."""
    print(plain(str(text)))


def console(quiet: bool) -> "Console":
    """The console of a command: it writes text as it is, in which no bracket or colon is markup.

    Control characters in it don't reach the terminal.
    """
    from rich import console as rich

    class Console(rich.Console):
        def render_str(self, text: str, **options: Any) -> "Text":
            return super().render_str(plain(text), **options)

    # A log has no width of its own: its tables aren't folded at 80, unless COLUMNS says so.
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 140
    return Console(quiet=quiet, width=width, markup=False, emoji=False, highlight=False)


_kept: list["TextIO"] = []
"""Standard output, while it is kept for JSON."""


@contextmanager
def json_alone() -> Iterator[None]:
    """Keep standard output for :func:`show_json`: what else is printed goes to standard error.

    That holds for what a defense prints, and for what the processes print that it starts.
    """
    sys.stdout.flush()
    # A test has put something else in its place.
    own = isinstance(sys.__stdout__, TextIOWrapper) and sys.stdout is sys.__stdout__
    out = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding) if own else sys.stdout
    if own:
        os.dup2(2, 1)
    _kept.append(out)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _kept.remove(out)
        out.flush()
        if own:
            os.dup2(out.fileno(), 1)
            out.close()


def show_json(table: Any) -> None:
    """Print `table` for scripts."""
    print(json.dumps(table, indent=1), file=_kept[-1], flush=True)


def split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def options_of(given: list[str] | None) -> dict[str, object]:
    """The options that ``--set name=value`` gives; values are read as in an entry's YAML."""
    from dbp_bench.declaration import value_of

    options = {}
    for text in given or []:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise BadRequest(f"--set {text!r}: write it as steps=50.")
        options[name.strip().replace("-", "_")] = value_of(value)
    return options


def eps_of(text: str) -> float:
    from dbp_bench.declaration import number

    try:
        return number(text)
    except ValueError:
        raise BadRequest(f"--eps {text!r}: not a number such as 0.2 or 8/255.") from None


def overrides_of(options: list[str] | None, eps: str | None = None, **others: Any) -> "Overrides":
    """The options that are set against entries: ``--set``, ``--eps``, and others as they are."""
    from dbp_bench.runs.job import Overrides

    size = None if eps is None else eps_of(eps)
    return Overrides(effort=options_of(options), eps=size, **others)


def table_of(left: Sequence[str], right: Sequence[str], **options: Any) -> "Table":
    """A table without lines, whose columns are aligned to the left or, of numbers, to the right."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, **options)
    for name in left:
        table.add_column(name)
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def device_of(name: str) -> str:
    if name == "cpu":
        return name
    if name not in ("auto", "cuda"):
        raise BadRequest(f"--device {name!r}: auto, cpu or cuda.")
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if name == "cuda":
        raise BadRequest(
            "--device cuda: this torch sees no GPU; `dbp-bench check --environment` tells more."
        )
    return "cpu"


class Tick(Protocol):
    """Says that `done` of `total` are done (None: nobody knows); `note` stands beside it."""

    def __call__(self, done: int, total: int | None, note: str = "") -> None: ...


@contextmanager
def progress(say: "Console", label: str, unit: str, *, lines: int = 0) -> Iterator[Tick]:
    """Show how far a command is: on a terminal by a bar with the time that is left.

    Elsewhere a line says the total when the work starts, and up to `lines` more how far it is.

    Args:
        say: The console that shows it.
        label: A name for the work.
        unit: The unit of the count; "bytes" are shown as sizes and speed.
        lines: Lines between start and end, where there is no terminal.
    """
    if not say.is_terminal or say.quiet:
        yield _in_lines(say, label, unit, lines)
        return
    from rich import progress as bars

    counted: tuple[bars.ProgressColumn, ...] = (
        (bars.DownloadColumn(), bars.TransferSpeedColumn())
        if unit == "bytes"
        else (bars.MofNCompleteColumn(), bars.TextColumn(unit))
    )
    columns = (bars.TextColumn("{task.description}", markup=False), bars.BarColumn(), *counted)
    note_column = bars.TextColumn("{task.fields[note]}", markup=False)
    remaining = bars.TimeRemainingColumn()
    with bars.Progress(*columns, note_column, remaining, console=say, transient=True) as bar:
        task = bar.add_task(plain(label), total=None, note="")

        def tick(done: int, total: int | None, note: str = "") -> None:
            bar.update(task, completed=done, total=total, note=note)

        yield tick


def _in_lines(say: "Console", label: str, unit: str, lines: int) -> Tick:
    started = False

    def tick(done: int, total: int | None, note: str = "") -> None:
        nonlocal started
        if not started:
            amount = "started" if total is None else f"{total} {unit}"
            say.print(f"{label}: {amount}", highlight=False)
            started = True
        if lines and total and done and done % -(-total // lines) == 0:
            said = f", {note}" if note else ""
            say.print(f"{label}: {done}/{total} {unit}{said}", highlight=False)

    return tick


@contextmanager
def progress_bar(say: "Console", label: str) -> "Iterator[Progress]":
    """The progress of one job, in gradient evaluations."""
    from dbp_bench.runs.execute import Progress

    done = total = 0
    with progress(say, label, "gradient evaluations") as show:

        def start(number: int) -> None:
            nonlocal total
            total = number
            show(done, total)

        def tick(number: int) -> None:
            nonlocal done
            done += number
            show(done, total)

        yield Progress(start, tick)


def duration(seconds: float) -> str:
    if seconds < 1:
        return "under 1 s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
