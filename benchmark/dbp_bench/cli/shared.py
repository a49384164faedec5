"""Helpers of several commands: they read options and print text and numbers."""

import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from dbp_bench.errors import BadRequest, plain

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from dbp_bench.entries.registry import Registry
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


def show_random_weights(say: "Console", names: Iterable[str]) -> None:
    """Name the checkpoints, if any, in whose place a plan was timed with random weights."""
    missing = ", ".join(dict.fromkeys(names))
    if missing:
        say.print(
            f"timed with random weights: {missing} not in the cache. `dbp-bench weights list` says "
            "where they are from.",
            soft_wrap=True,
        )


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


def overrides_of(
    options: list[str] | None, eps: str | None = None, budget: int | None = None, **others: Any
) -> "Overrides":
    """The options that are set against entries.

    They are ``--set``, ``--eps`` and ``--budget``, and others as they are.
    """
    from dbp_bench.runs.job import Overrides

    size = None if eps is None else eps_of(eps)
    effort = options_of(options)
    if budget is not None:
        if "budget" in effort:
            raise BadRequest(f"--budget {budget}: --set gives a budget, too. Give one.")
        effort["budget"] = budget
    return Overrides(effort=effort, eps=size, **others)


def device_of(name: str) -> str:
    if name == "cpu":
        return name
    if name not in ("auto", "cuda"):
        raise BadRequest(
            f"--device {name!r}: auto, cpu or cuda; CUDA_VISIBLE_DEVICES chooses among GPUs."
        )
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if name == "cuda":
        raise BadRequest(
            "--device cuda: this torch sees no GPU; `dbp-bench check --environment` tells more."
        )
    return "cpu"


def duration(seconds: float) -> str:
    if seconds < 1:
        return "under 1 s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:,.1f} h" if seconds < 360_000 else f"{seconds / 3600:,.0f} h"
