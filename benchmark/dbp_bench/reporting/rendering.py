"""Writes numbers and names as text: effort in words, Markdown, LaTeX, tables of terminals."""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import yaml

from dbp_bench.reporting.statistics import LEVEL, RESAMPLES

if TYPE_CHECKING:
    from rich.table import Table


def table_of(left: Sequence[str], right: Sequence[str], **options: Any) -> "Table":
    """A table without lines, whose columns are aligned to the left or, of numbers, to the right."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, **options)
    for name in left:
        table.add_column(name)
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


@cache
def _notes() -> dict[str, str]:
    return dict(yaml.safe_load(Path(__file__).with_name("notes.yaml").read_text(encoding="utf-8")))


def note(name: str, **numbers: object) -> str:
    """The text under `name` in ``notes.yaml``, with its `numbers` filled in."""
    return _notes()[name].format(level=f"{100 * LEVEL:.0f}", resamples=RESAMPLES, **numbers)


def shown_eps(eps: float) -> str:
    """The text of an `eps` in [0, 1]: a decimal of six digits if exact, else a fraction of 255."""
    if float(f"{eps:.6g}") == eps:
        return f"{eps:.6g}"
    levels = round(eps * 255)
    return f"{levels}/255" if abs(eps * 255 - levels) < 1e-6 else f"{eps:.6g}"


def listed(values: Iterable[int | None]) -> str:
    """The different numbers in order, joined by "or"; None is left out."""
    return " or ".join(str(value) for value in sorted({v for v in values if v is not None}))


def md(text: str) -> str:
    """The Markdown that shows `text` as plain text."""
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", " ".join(text.split()))


_TEX: Final = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def tex(text: str) -> str:
    """The LaTeX that prints `text` as plain text."""
    return "".join(_TEX.get(character, character) for character in " ".join(text.split()))


def in_words(effort: Mapping[str, object]) -> str:
    """An effort as it reads in a sentence; options that are None are left out."""
    words = [_PHRASES[key].format(effort[key]) for key in _PHRASES if effort.get(key) is not None]
    for key, value in effort.items():
        if key not in (*_PHRASES, "attack") and value is not None:
            words.append(_setting(key.replace("_", " "), value))
    return ", ".join(filter(None, words))


_PHRASES: Final = {"steps": "{} steps", "step_size": "step size {} eps", "eot": "EoT-{}"}


def _setting(key: str, value: object) -> str:
    """One option of an effort; the options of an attack inside another stand in parentheses."""
    if isinstance(value, bool):
        return key if value else f"no {key}"
    if isinstance(value, Mapping):
        return f"{key} {_inside(value)}" if "attack" in value else in_words(value)
    if isinstance(value, list):
        each = [_inside(v) if isinstance(v, Mapping) else str(v) for v in value]
        return f"{key} {' and '.join(each)}"
    return f"{key} {value}"


def _inside(effort: Mapping[str, object]) -> str:
    return f"{effort.get('attack')} ({in_words(effort)})"
