"""What several commands do: read options, and say numbers on the terminal."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dbp_bench.errors import BadRequest

if TYPE_CHECKING:
    from rich.console import Console

    from dbp_bench.entries.registry import Registry
    from dbp_bench.runs.execute import Progress


def registry_of(
    entries: list[Path] | None, trust_code: bool = False, data: Path | None = None
) -> "Registry":
    from dbp_bench.entries.registry import Registry

    return Registry(entries or [], trust_code=trust_code, data=data)


def console(quiet: bool) -> "Console":
    """Where a command writes: text as it is, in which no bracket and no colon is markup."""
    from rich.console import Console

    # A log has no width of its own: its tables aren't folded at 80, unless COLUMNS says so.
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 140
    return Console(quiet=quiet, width=width, markup=False, emoji=False, highlight=False)


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


@contextmanager
def progress_bar(say: "Console", label: str) -> "Iterator[Progress]":
    """A bar with the time that is left, on a terminal; a line at start and end elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    from dbp_bench.runs.execute import Progress

    if not say.is_terminal or say.quiet:
        yield Progress(start=lambda total: say.print(f"{label}: {total} gradient evaluations"))
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("gradient evaluations"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=say, transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield Progress(
            start=lambda total: bar.update(task, total=total),
            tick=lambda rows: bar.advance(task, rows),
        )


def percent(estimate: "dict[str, float] | None") -> str:
    if estimate is None:
        return ""
    value, low, high = (100 * estimate[key] for key in ("value", "low", "high"))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def duration(seconds: float) -> str:
    if seconds < 1:
        return "under 1 s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
