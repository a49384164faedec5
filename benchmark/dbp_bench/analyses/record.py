"""The record of an analysis: numbers in rows, the request, and where they come from. No torch."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field

from dbp_bench.declaration import read_json
from dbp_bench.reporting.statistics import Estimate
from dbp_bench.result import Provenance, write_atomically

SCHEMA: Literal[1] = 1

FIGURES = (".svg", ".png", ".pdf")
"""The suffixes of the figures beside a record."""

DIGITS, DECIMALS = 6, 9
"""Significant digits and decimals that are written: below, the order of a sum decides."""


class Row(NamedTuple):
    """One number and its 95 % interval."""

    defense: str
    series: str
    """The attack, known sites or direction that is compared; "" where nothing is."""
    at: tuple[float, ...]
    """The place on the axes of the analysis; empty for numbers that belong to no place on them."""
    quantity: str
    value: float
    low: float | None
    """None, with `high`, where the number is exact for its image and draw: nothing was sampled."""
    high: float | None


def row(
    defense: str, series: str, at: Sequence[float], quantity: str, found: Estimate | float
) -> Row:
    """A row of an estimate with its interval, or of an exact number without one."""
    place = tuple(_rounded(x) for x in at)
    if not isinstance(found, Estimate):
        return Row(defense, series, place, quantity, _rounded(found), None, None)
    numbers = (found.value, found.low, found.high)
    return Row(defense, series, place, quantity, *(_rounded(x) for x in numbers))


def _rounded(x: float) -> float:
    # Adding 0 turns -0.0 into 0.0.
    return round(float(f"{float(x):.{DIGITS}g}"), DECIMALS) + 0.0


def record_path(out: Path, track: str, analysis: str, defenses: list[str]) -> Path:
    """The path of the numbers below the folder of results; CSV and figures lie beside them."""
    # A plus sign is in no defense's name.
    return out / track / "analyses" / analysis / f"{'+'.join(defenses)}.json"


class Record(BaseModel):
    """The record of an analysis; its figure is drawn from nothing else."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    schema_version: Literal[1] = Field(alias="schema")
    analysis: str
    track: str
    defenses: list[str]
    titles: dict[str, str] = {}
    """The titles of the defenses' entries."""
    images: list[int]
    """Ids of the images."""
    statement: list[str]
    """The quantities that are measured, and their definitions."""
    request: dict[str, Any]
    """The values that must be equal for the analysis to be continued."""
    provenance: dict[str, Provenance]
    """The sources of each defense's numbers."""
    axes: list[str]
    """Names of the places of a row, in order."""
    rows: list[Row]

    def select(self, defense: str, quantity: str, series: str | None = None) -> list[Row]:
        """The rows of a `quantity` of a `defense`, of one series or of all, in order."""
        return [
            r
            for r in self.rows
            if (r.defense, r.quantity) == (defense, quantity) and series in (None, r.series)
        ]

    def series(self, defense: str, quantity: str) -> list[str]:
        """The series that have a `quantity`, each once, in order."""
        return list(dict.fromkeys(r.series for r in self.select(defense, quantity)))

    def to_json(self) -> str:
        """The text of the file: one line per key, and one per row."""
        table = self.model_dump(by_alias=True, mode="json")
        rows = table.pop("rows")
        parts = [f' "{key}": {json.dumps(value, allow_nan=False)}' for key, value in table.items()]
        lines = ",\n  ".join(json.dumps(each, separators=(",", ":")) for each in rows)
        parts.append(f' "rows": [\n  {lines}\n ]')
        return "{\n" + ",\n".join(parts) + "\n}\n"

    def to_csv(self) -> str:
        """The rows as a table; a number that is missing is blank."""
        names = ["defense", "series", *self.axes, "quantity", "value", "low", "high"]
        rows = [(*r[:2], *r.at, *[None] * (len(self.axes) - len(r.at)), *r[3:]) for r in self.rows]
        return pd.DataFrame(rows, columns=names).to_csv(index=False, lineterminator="\n")

    def write(self, path: Path) -> None:
        """Write the JSON file at `path` and the CSV file beside it, each all of it or nothing."""
        write_atomically(path.with_suffix(".csv"), self.to_csv())
        write_atomically(path, self.to_json())

    @classmethod
    def read(cls, path: Path) -> Self:
        """The record in the file at `path`.

        Raises:
            BadResult: It holds none.
        """
        return read_json(path, cls, "a record of an analysis")
