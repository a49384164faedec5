"""Shows the progress of a job or a command: a bar on a terminal or in a notebook, else lines."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from dbp_bench.errors import plain
from dbp_bench.runs.execute import Progress
from dbp_bench.runs.job import Job

if TYPE_CHECKING:
    from rich.console import Console


class Tick(Protocol):
    """Says that `done` of `total` are done (None: nobody knows); `note` stands beside it."""

    def __call__(self, done: int, total: int | None, note: str = "") -> None: ...


@contextmanager
def progress(
    say: "Console", label: str, unit: str, *, lines: int = 0, at_most: bool = False
) -> Iterator[Tick]:
    """Show how far a command is: on a terminal by a bar with the time that is left.

    Elsewhere a line says the total when the work starts, and up to `lines` more how far it is.

    Args:
        say: Where to show it.
        label: What is being done.
        unit: What is counted; "bytes" are shown as sizes and speed.
        lines: Lines between start and end, where there is no terminal.
        at_most: The total is the largest that it can come to.
    """
    if not _live(say):
        yield _in_lines(say, label, unit, lines, "at most " if at_most else "")
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


def _live(say: "Console") -> bool:
    return not say.quiet and (say.is_terminal or say.is_jupyter)


def _in_lines(say: "Console", label: str, unit: str, lines: int, bound: str) -> Tick:
    started, shown = False, 0

    def tick(done: int, total: int | None, note: str = "") -> None:
        nonlocal started, shown
        if not started:
            amount = "started" if total is None else f"{bound if total else ''}{total} {unit}"
            say.print(f"{label}: {amount}", highlight=False)
            started = True
        step = -(-total // lines) if lines and total else 0
        if step and done // step > shown:
            shown = done // step
            said = f", {note}" if note else ""
            say.print(f"{label}: {done}/{total} {unit}{said}", highlight=False)

    return tick


@contextmanager
def progress_of_job(say: "Console", job: Job, part: str = "") -> Iterator[Progress]:
    """The progress of one job, or of a `part` of it, in gradient evaluations."""
    label = job.label + (f" / {part}" if part else "")
    at_most = not job.evaluations.exact
    with progress_of_count(say, label, "gradient evaluations", at_most=at_most) as shown:
        yield shown


@contextmanager
def progress_of_count(
    say: "Console", label: str, unit: str, *, lines: int = 0, at_most: bool = False
) -> Iterator[Progress]:
    """The progress of what is counted in steps; the `lines` of a log say the time that is left."""
    done = total = 0
    begun = time.monotonic()
    with progress(say, label, unit, lines=lines, at_most=at_most) as show:

        def start(number: int) -> None:
            nonlocal total, begun
            total, begun = number, time.monotonic()
            show(done, total)

        def tick(number: int) -> None:
            nonlocal done
            done += number
            left = (time.monotonic() - begun) * (total - done) / done if done else 0.0
            said = f"{left:.0f} s left" if left < 120 else f"{left / 60:.0f} min left"
            show(done, total, "" if _live(say) else said)

        yield Progress(start, tick)
