"""The columns of a leaderboard: a formula of accuracies, or a threat model's own, with a heading.

A formula is added here alone; a threat model's column comes from its entry. Costs and numbers of
draws, which have no interval, are in :mod:`dbp_bench.reporting.tables`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from operator import sub
from typing import Final

from dbp_bench.reporting.statistics import Replicates, ratio

NULL: Final = "null"
"""The column of the null attack, whatever its threat model is called."""

ACCURACY: Final = "Accuracy, by what the attacker knows"
PARTS: Final = "Where the robustness comes from"
CHECKS: Final = "Checks and cost"
SECTIONS: Final = (ACCURACY, PARTS, CHECKS)
"""The tables of a leaderboard, by title."""


@dataclass(frozen=True)
class Column:
    """A number with its interval that every defense has."""

    key: str
    """Its name in CSV files."""
    heading: str
    """Its name for readers; ``R_WB`` is a symbol with an index."""
    section: str
    """One of :data:`SECTIONS`."""
    of: tuple[str, ...] = ()
    """The columns whose results it follows from; empty where it has results of its own."""
    formula: Callable[..., Replicates | None] | None = None
    """Computes it from the robust accuracies of those columns; None if it is an accuracy."""


def _share(hidden: Replicates, all_known: Replicates, base: Replicates) -> Replicates | None:
    """The part of the robustness that hiding the draws gives."""
    return ratio(hidden - all_known, hidden - base)


def _shapley(
    hidden: Replicates, known: Replicates, other_known: Replicates, all_known: Replicates
) -> Replicates:
    """The Shapley value of hiding the noise of one site: its gain hidden first and last, averaged.

    It doesn't depend on the order, and the values of two sites add up to the gain of hiding both.
    """
    part: Replicates = ((hidden - known) + (other_known - all_known)) / 2
    return part


_FORWARD: Final = ("hidden", "forward_known", "reverse_known", "all_known")
_REVERSE: Final = ("hidden", "reverse_known", "forward_known", "all_known")

COLUMNS: Final = (
    Column("clean", "Clean", ACCURACY),
    Column("base", "Base classifier, R_0", PARTS),
    Column("hidden", "Hidden, R_WB", ACCURACY),
    Column("forward_known", "Forward known, R_F", ACCURACY),
    Column("reverse_known", "Reverse known, R_R", ACCURACY),
    Column("all_known", "All known, R_DW", ACCURACY),
    # P: the accuracy with all draws known, above the base classifier's. S: the gain of hiding them.
    Column("purification", "Purification, P", PARTS, ("all_known", "base"), sub),
    Column("stochasticity", "Stochasticity, S", PARTS, ("hidden", "all_known"), sub),
    Column("share", "Share of S, %", PARTS, ("hidden", "all_known", "base"), _share),
    Column("stochasticity_forward", "S, forward noise", PARTS, _FORWARD, _shapley),
    Column("stochasticity_reverse", "S, reverse noise", PARTS, _REVERSE, _shapley),
    Column("fresh", "Known-draw images on fresh draws", CHECKS, ("all_known",)),
    Column(NULL, "Null attack, eps = 0", CHECKS),
)
"""All columns in the order of CSV files, which is also that of each section's table."""


def columns_of(extra: Iterable[str], eot: Mapping[str, object]) -> list[Column]:
    """The columns of one leaderboard.

    Args:
        extra: The protocol's other columns, which are named as their threat models are.
        eot: The EoT samples to show in a column's heading, by its key.
    """
    others = [Column(key, key, CHECKS) for key in extra]
    return [
        replace(column, heading=f"{column.heading}, EoT-{eot[column.key]}")
        if eot.get(column.key) is not None
        else column
        for column in (*COLUMNS[:-1], *others, COLUMNS[-1])
    ]


def derived(robust: Mapping[str, Replicates]) -> dict[str, Replicates | None]:
    """The columns with a formula, from the robust accuracies of others; None where one lacks."""
    return {
        column.key: column.formula(*(robust[key] for key in column.of))
        if all(key in robust for key in column.of)
        else None
        for column in COLUMNS
        if column.formula
    }
