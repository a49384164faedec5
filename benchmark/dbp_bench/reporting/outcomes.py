"""The results of one evaluation, in a terminal: a table, what it means, and what to doubt."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from dbp_bench.reporting.pool import accuracies
from dbp_bench.reporting.rendering import table_of
from dbp_bench.reporting.sanity import doubts
from dbp_bench.result import Result

if TYPE_CHECKING:
    from rich.table import Table

KNOWN: Final = (
    "robust: on the draws that the attacker knew. fresh draws: the same images on draws that no "
    "attacker was shown."
)


def outcome_table(results: Sequence[Result]) -> "Table":
    """One row for each result; it fits 80 columns. A star leads to :func:`remarks`."""
    table = table_of(
        ["defense", "threat", "attack"],
        ["clean\n%", "robust\n% [95 %]", "fresh draws\n% [95 %]", "images\nx draws"],
        padding=(0, 1, 0, 0),
    )
    for result in results:
        found = accuracies(result)
        table.add_row(
            result.defense,
            result.threat,
            result.label,
            f"{100 * found.clean.value:.1f}",
            f"{found.robust.percent()}{' *' if doubts(result) else ''}",
            found.fresh.percent() if found.fresh else "",
            f"{len(result.ids)} x {len(result.draws)}",
        )
    return table


def remarks(results: Sequence[Result]) -> list[str]:
    """The doubts about each result that the table marks."""
    return [
        f"* {result.defense}, {result.threat}: {doubt}."
        for result in results
        for doubt in doubts(result)
    ]
