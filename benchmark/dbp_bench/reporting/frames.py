"""Tables as data frames, and the CSV, Markdown and LaTeX made of them.

A cell is a number, a text, None where nothing was measured, or an :class:`Estimate`, which CSV
spreads over three columns (``x``, ``x_lo``, ``x_hi``, as fractions) and the others show in percent.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pandas as pd

from dbp_bench.reporting.rendering import md, tex
from dbp_bench.reporting.statistics import Estimate

NOT_MEASURED: Final = Estimate(float("nan"), float("nan"), float("nan"))
"""A blank cell in a column of estimates."""


class Shared(Estimate):
    """An estimate taken from the equivalent result of another setting; it is marked with ``=``."""


class Signed(Estimate):
    """A difference, shown with its sign."""

    def percent(self, *, sign: bool = True) -> str:
        """The text in percent with its sign, such as ``+1.2 [0.1, 2.3]``."""
        return super().percent(sign=sign)


@dataclass(frozen=True, order=True)
class Marked:
    """Text that is Markdown already."""

    text: str

    def __str__(self) -> str:
        """The text."""
        return self.text


def named(defense: str, kind: str) -> Marked:
    """The name of a defense in Markdown; a control is marked."""
    return Marked(f"{md(defense)} *(control)*" if kind == "control" else md(defense))


def cell(estimate: Estimate | None, kind: type[Estimate] = Estimate) -> Estimate:
    """The cell of an `estimate`, which may be missing, as one of the kinds above."""
    if estimate is None:
        return NOT_MEASURED
    return kind(estimate.value, estimate.low, estimate.high)


def frame_of(rows: Iterable[Mapping[str, object]]) -> pd.DataFrame:
    """A table with a row for each mapping; every cell keeps its Python type."""
    return pd.DataFrame(list(rows), dtype=object)


def to_csv(frame: pd.DataFrame) -> str:
    """A CSV file; what was not measured is blank, and fractions have six digits.

    A name that pandas would read as a missing value, such as ``null``, stands in apostrophes.
    """
    wide: dict[str, Any] = {}
    for name, column in frame.items():
        if any(isinstance(each, Estimate) for each in column):
            for end, part in (("", "value"), ("_lo", "low"), ("_hi", "high")):
                values = [getattr(each, part) for each in column]
                wide[f"{name}{end}"] = pd.Series(values, dtype=float).round(6) + 0.0
        else:
            wide[str(name)] = column.reset_index(drop=True).map(csv_name)
    return pd.DataFrame(wide).to_csv(index=False, lineterminator="\n")


_READ_AS_MISSING: Final = frozenset(
    "#N/A,#N/A N/A,#NA,-1.#IND,-1.#QNAN,-NaN,-nan,1.#IND,1.#QNAN,<NA>,N/A,NA,NULL,NaN,None,n/a,nan,"  # noqa: SIM905
    "null".split(",")
)
"""The texts that ``pandas.read_csv`` takes for a missing value."""


def csv_name(each: object) -> object:
    """A cell of text as CSV files hold it."""
    return f"'{each}'" if isinstance(each, str) and each in _READ_AS_MISSING else each


def read_csv(path: Path) -> pd.DataFrame:
    """A CSV file as :func:`to_csv` writes it, with the names as they are."""
    names = {csv_name(name): name for name in _READ_AS_MISSING}
    return pd.read_csv(path).replace(names)


def percent(estimate: Estimate | None) -> str:
    """An estimate in percent with its interval; blank where it was not measured."""
    return "" if _missing(estimate) or estimate is None else estimate.percent()


def to_markdown(frame: pd.DataFrame, *, stacked: bool = False) -> list[str]:
    """The lines of a table, and a blank one; columns of numbers stand to the right.

    Args:
        frame: The table.
        stacked: True for small headings, and intervals in small type below their numbers, so that a
            table of a dozen columns is as narrow as a README's page.
    """

    def text(each: object) -> str:
        if isinstance(each, Estimate):
            value, _, interval = percent(each).partition(" ")
            same = " =" if isinstance(each, Shared) else ""
            if stacked and value:
                return f"{value}{same.strip()}<br><sub>{interval}</sub>"
            return percent(each) + same
        return str(each) if isinstance(each, Marked) else md(_plain(each))

    headings = [symbols(str(name), r"\1<sub>\2</sub>") for name in frame.columns]
    if stacked:
        headings = [f"<sub>{heading}</sub>" if heading else "" for heading in headings]
    sides = ["--:" if _numeric(column) else ":--" for _, column in frame.items()]
    cells = [[text(each) for each in row] for row in frame.itertuples(index=False)]
    return [*(f"| {' | '.join(line)} |" for line in (headings, sides, *cells)), ""]


def to_latex(
    frame: pd.DataFrame, rules: Collection[int] = (), *, stacked: bool = False
) -> list[str]:
    """The lines of a booktabs tabular, with a rule before the rows in `rules`.

    Args:
        frame: The table.
        rules: The rows that have a rule above them.
        stacked: True for intervals below their numbers, and a last column of wrapped text.
    """

    def text(each: object) -> str:
        if not isinstance(each, Estimate):
            return tex(_plain(each))
        value, _, interval = percent(each).replace("-", "$-$").partition(" ")
        same = "{}={}" if isinstance(each, Shared) else ""
        if stacked and value:
            return rf"\shortstack[r]{{{value}{same} \\ {{\tiny {interval}}}}}"
        return rf"{value}{same} {{\scriptsize {interval}}}" if value else ""

    sides = "".join("r" if _numeric(column) else "l" for _, column in frame.items())
    if stacked:
        sides = sides[:-1] + r"p{24mm}"
    heads = [symbols(str(name).replace("%", r"\%"), r"$\1_{\2}$") for name in frame.columns]
    lines = [
        rf"\begin{{tabular}}{{{sides}}}",
        r"\toprule",
        " & ".join(map(_two_lines, heads)) + r" \\",
        r"\midrule",
    ]
    for i, row in enumerate(frame.itertuples(index=False)):
        if i in rules:
            lines.append(r"\midrule")
        lines.append(" & ".join(map(text, row)) + r" \\")
    return [*lines, r"\bottomrule", r"\end{tabular}"]


def _missing(each: object) -> bool:
    value = each.value if isinstance(each, Estimate) else each
    return value is None or value is pd.NA or value != value


def _plain(each: object) -> str:
    if _missing(each):
        return ""
    return f"{each:g}" if isinstance(each, float) else str(each)


def _numeric(column: pd.Series) -> bool:
    return all(isinstance(each, Estimate | int | float) or _missing(each) for each in column)


def symbols(heading: str, indexed: str) -> str:
    """A heading whose symbols are written as ``R_WB``, with their indices as they should be."""
    return re.sub(r"\b([A-Z])_([A-Z0-9]+)\b", indexed, heading)


def _two_lines(heading: str) -> str:
    """The heading on two lines, so that a column is as wide as its numbers."""
    words = heading.split(" ")
    if len(words) == 1:
        return heading
    half = len(words) // 2
    lines = rf"{' '.join(words[:half])} \\ {' '.join(words[half:])}"
    return rf"\begin{{tabular}}[b]{{@{{}}r@{{}}}}{lines}\end{{tabular}}"
