"""How tables are written: CSV cells, Markdown and LaTeX that show plain text as it is."""

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from dbp_bench.reporting.records import Effort
from dbp_bench.reporting.statistics import LEVEL, RESAMPLES, Estimate

BOOTSTRAP: Final = (
    f"In brackets: {100 * LEVEL:.0f} % intervals from a paired bootstrap over images ({RESAMPLES} "
    "resamples, the same ones for every number of the track; percentiles). They say what other "
    "images of the kind could have given, not what other training runs or stronger attacks could. "
    "At 0 or 100 % a bootstrap has no width."
)


def fractions(estimate: Estimate | None) -> list[object]:
    """Value and interval, rounded; blank for null."""
    if estimate is None:
        return [None, None, None]
    return [round(x, 6) + 0.0 for x in (estimate.value, estimate.low, estimate.high)]


def shown_eps(eps: float) -> str:
    """As a decimal where it is one, else as a fraction of 255."""
    if float(f"{eps:.6g}") == eps:
        return f"{eps:.6g}"
    levels = round(eps * 255)
    return f"{levels}/255" if abs(eps * 255 - levels) < 1e-6 else f"{eps:.6g}"


def to_csv_text(header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A CSV file; null is blank."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(lines)
    return file.getvalue()


def json_of(effort: Effort | None) -> str:
    """An effort for programs; blank for null."""
    return "" if effort is None else json.dumps(effort)


def joined(values: Iterable[object]) -> str:
    """The different values, in order; blank for null."""
    return " ".join(dict.fromkeys(str(value) for value in values if value is not None))


def listed(values: Iterable[int | None]) -> str:
    """Numbers in a sentence, without null."""
    return " or ".join(str(value) for value in sorted(v for v in values if v is not None))


def text_of(value: object) -> str:
    """Blank for null."""
    return "" if value is None else str(value)


def md(text: str) -> str:
    """Plain text, as Markdown that shows it as it is."""
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
    """Plain text, as LaTeX that prints it as it is."""
    return "".join(_TEX.get(character, character) for character in " ".join(text.split()))


def md_lines(lines: Iterable[Sequence[str]]) -> list[str]:
    """Rows of a Markdown table."""
    return [f"| {' | '.join(line)} |" for line in lines]


def md_name(defense: str, kind: str) -> str:
    """A defense; a control is marked."""
    return f"{md(defense)} *(control)*" if kind == "control" else md(defense)


def percent(estimate: Estimate | None, *, sign: bool = False) -> str:
    """In percent with its interval; blank for null."""
    return "" if estimate is None else estimate.percent(sign=sign)


def in_words(effort: Mapping[str, object]) -> str:
    """An effort as it reads in a sentence, without what isn't set."""
    words = [_PHRASES[key].format(effort[key]) for key in _PHRASES if effort.get(key) is not None]
    for key, value in effort.items():
        if key not in (*_PHRASES, "attack", "name") and value is not None:
            words.append(_setting(key.replace("_", " "), value))
    return ", ".join(words)


_PHRASES: Final = {"steps": "{} steps", "step_size": "step size {} eps", "eot": "EoT-{}"}


def _setting(key: str, value: object) -> str:
    """One setting of an effort; attacks inside another, with their own, stand in parentheses."""
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
