"""What an analysis found: numbers in rows, the request, and where they come from. No torch."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field

from dbp_bench.declaration import read_json
from dbp_bench.reporting.statistics import Estimate
from dbp_bench.result import Provenance, write_atomically

SCHEMA: Literal[1] = 1

DIGITS, DECIMALS = 6, 9
"""Significant digits and decimals that are written: below, the order of a sum decides."""


class Row(NamedTuple):
    """One number and its 95 % interval."""

    defense: str
    series: str
    """What is compared: an attack, a set of known sites, a direction; "" where nothing is."""
    at: tuple[float, ...]
    """Where on the axes of the analysis; empty for what belongs to no place on them."""
    quantity: str
    value: float
    low: float | None
    """None, with `high`, where the number is exact for its image and draw: nothing was sampled."""
    high: float | None


def row(
    defense: str,
    series: str,
    at: Sequence[float],
    quantity: str,
    found: Estimate | float,
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


class Record(BaseModel):
    """All that an analysis wrote down; its figure is drawn from nothing else."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    schema_version: Literal[1] = Field(alias="schema")
    analysis: str
    track: str
    defenses: list[str]
    images: list[int]
    """Ids of the images."""
    statement: list[str]
    """What is measured, and by which definition."""
    request: dict[str, Any]
    """What must be equal for the analysis to be continued."""
    provenance: dict[str, Provenance]
    """Where each defense's numbers come from."""
    axes: list[str]
    """Names of the places of a row, in order."""
    rows: list[Row]

    def select(self, defense: str, quantity: str, series: str | None = None) -> list[Row]:
        """The rows of a `quantity` of a `defense`, of one series or of all, in order."""
        return [
            r
            for r in self.rows
            if r.defense == defense
            and r.quantity == quantity
            and (series is None or r.series == series)
        ]

    def series(self, defense: str, quantity: str) -> list[str]:
        """The series that have a `quantity`, each once, in order."""
        return list(dict.fromkeys(r.series for r in self.select(defense, quantity)))

    def to_json(self) -> str:
        """As written to a file: one line per key, and one per row."""
        table = self.model_dump(by_alias=True, mode="json")
        rows = table.pop("rows")
        parts = [f' "{key}": {json.dumps(value, allow_nan=False)}' for key, value in table.items()]
        lines = ",\n  ".join(json.dumps(each, separators=(",", ":")) for each in rows)
        parts.append(f' "rows": [\n  {lines}\n ]')
        return "{\n" + ",\n".join(parts) + "\n}\n"

    def to_csv(self) -> str:
        """The rows as a table; what is not there is blank."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["defense", "series", *self.axes, "quantity", "value", "low", "high"])
        for r in self.rows:
            place = [*r.at, *[""] * (len(self.axes) - len(r.at))]
            interval = ["" if x is None else x for x in (r.low, r.high)]
            writer.writerow([r.defense, r.series, *place, r.quantity, r.value, *interval])
        return text.getvalue()

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
