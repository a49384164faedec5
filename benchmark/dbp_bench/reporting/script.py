"""The report of an evaluation in a script: a table that prints itself, and its results."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from dbp_bench.entries.registry import Registry
from dbp_bench.errors import BadRequest, did_you_mean
from dbp_bench.reporting.columns import PARTS
from dbp_bench.reporting.leaderboard import Leaderboard, leaderboard
from dbp_bench.reporting.outcomes import KNOWN, outcome_table, remarks
from dbp_bench.reporting.pool import accuracies
from dbp_bench.reporting.records import Record, read_record
from dbp_bench.reporting.rendering import table_of
from dbp_bench.reporting.statistics import Estimate
from dbp_bench.result import Result

if TYPE_CHECKING:
    from rich.console import Console

_WIDTH = 80


@dataclass(frozen=True)
class Report:
    """The results of :func:`dbp_bench.evaluate`; it prints as a table, in a notebook as HTML."""

    name: str
    """The name of the defense."""
    records: Sequence[Record]
    """Its results and those of the base classifier, with their files."""
    board: Leaderboard
    """The leaderboard of these results."""
    same: Mapping[str, tuple[str, str]]
    """By threat that was not run: the one that measures the same of this defense, and why."""

    @classmethod
    def of(
        cls,
        name: str,
        paths: Sequence[Path],
        registry: Registry,
        same: Mapping[str, tuple[str, str]],
    ) -> "Report":
        """The report of the defense called `name` on the result files at `paths`."""
        records = [read_record(path) for path in paths]
        # The board compares what one attack left; here that is the one that was asked for.
        asked = [
            replace(
                record, result=record.result.model_copy(update={"attack": own, "setting": None})
            )
            for record in records
            for own in [registry.threat(record.result.threat).entry.attack]
        ]
        return cls(name, records, leaderboard(asked, registry), same)

    @property
    def results(self) -> list[Result]:
        """The results, of the defense and of the base classifier."""
        return [record.result for record in self.records]

    @cached_property
    def parts(self) -> dict[str, Estimate | None]:
        """The parts of the robustness: `base`, `purification`, `stochasticity`, `share`, ...

        Shares of 1, with 95 % intervals over images; None where something was not measured.
        """
        row = next(row for row in self.board.rows if row.defense == self.name)
        return {key: row.estimates[key] for key in PARTS}

    def accuracy(self, threat: str) -> Estimate:
        """The robust accuracy of the defense under `threat`, in 0 ... 1, with its 95 % interval.

        Raises:
            BadRequest: It was not measured.
        """
        mine = {each.threat: each for each in self.results if each.defense == self.name}
        known = self.same.get(threat, (threat, ""))[0]
        if known not in mine:
            raise BadRequest(f"threat {threat!r} was not measured.{did_you_mean(threat, mine)}")
        return accuracies(mine[known]).robust

    @cached_property
    def frame(self) -> pd.DataFrame:
        """One row for each result: accuracies in percent, with the ends of 95 % intervals."""
        rows = []
        for result in self.results:
            found = accuracies(result)
            row: dict[str, object] = {
                "defense": result.defense,
                "threat": result.threat,
                "attack": result.label,
                "images": len(result.ids),
                "draws": len(result.draws),
                "nfe": result.evaluations.nfe,
            }
            estimates = {"clean": found.clean, "robust": found.robust, "fresh": found.fresh}
            for key, value in estimates.items():
                for end in ("value", "low", "high"):
                    column = key if end == "value" else f"{key}_{end}"
                    row[column] = None if value is None else round(100 * getattr(value, end), 2)
            rows.append(row)
        return pd.DataFrame(rows)

    def save(self, folder: str | Path) -> list[Path]:
        """Copy the result files to where ``dbp-bench run --out FOLDER`` would write them.

        Returns:
            Their paths; ``dbp-bench report --results FOLDER`` reads them.
        """
        made = []
        for record in self.records:
            path = record.result.path(Path(folder))
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(record.path, path)
            made.append(path)
        return made

    def __str__(self) -> str:
        """The table in 80 columns, and what should be known of it."""
        from rich.console import Console

        text = StringIO()
        self._print(Console(file=text, width=_WIDTH, markup=False, highlight=False))
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())

    def _repr_html_(self) -> str:
        """The table in HTML."""
        from rich.console import Console

        console = Console(file=StringIO(), width=_WIDTH, record=True, markup=False, highlight=False)
        self._print(console)
        return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")

    def _print(self, console: "Console") -> None:
        console.print(outcome_table(self.results))
        if any(result.knows for result in self.results):
            console.print(KNOWN)
        named = {each.key: each for each in self.board.columns}
        parts = {named[key].name: found for key, found in self.parts.items() if found}
        if parts:
            table = table_of(["Where the robustness comes from"], ["% [95 %]"])
            for heading, found in parts.items():
                table.add_row(heading, found.percent())
            console.print("")
            console.print(table)
        for threat, (other, why) in self.same.items():
            console.print(f"{threat} measures the same as {other}, since {why}.")
        for remark in remarks(self.results):
            console.print(remark)
