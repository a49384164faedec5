"""The columns of a leaderboard: a formula of accuracies, or a threat model's own, with a heading.

A formula is added here alone; a threat model's column comes from its entry. Costs and numbers of
draws, which have no interval, are in :mod:`dbp_bench.reporting.tables`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from operator import sub
from typing import Final

from dbp_bench.reporting.statistics import Replicates, ratio

NULL: Final = "null"
"""The column of the null attack, whatever its threat model is called."""

HEADLINE: Final = "Leaderboard"
DETAILS: Final = "Details"
SECTIONS: Final = (HEADLINE, DETAILS)
"""The tables of a leaderboard with one row per defense, by title."""


@dataclass(frozen=True)
class Column:
    """A number with its interval that every defense has."""

    key: str
    """Its name in CSV files."""
    heading: str
    """Its heading in tables, which is narrow; ``R_WB`` is a symbol with an index."""
    section: str
    """One of :data:`SECTIONS`."""
    of: tuple[str, ...] = ()
    """The columns whose results it follows from; empty where it has results of its own."""
    formula: Callable[..., Replicates | None] | None = None
    """Computes it from the robust accuracies of those columns; None if it is an accuracy."""
    title: str = ""
    """Its name where there is room; the heading if empty."""

    @property
    def name(self) -> str:
        """Its name in a sentence or a list."""
        return self.title or self.heading


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
    Column("clean", "Clean", HEADLINE),
    Column("base", "Base, R_0", HEADLINE, title="Base classifier, R_0"),
    Column("hidden", "White-box, R_WB", HEADLINE),
    Column("forward_known", "Forward known, R_F", HEADLINE),
    Column("reverse_known", "Reverse known, R_R", HEADLINE),
    Column("all_known", "DW-box, R_DW", HEADLINE),
    # P: the accuracy with all draws known, above the base classifier's. S: the gain of hiding them.
    Column("purification", "P", HEADLINE, ("all_known", "base"), sub, "Purification, P"),
    Column("stochasticity", "S", HEADLINE, ("hidden", "all_known"), sub, "Stochasticity, S"),
    Column("share", "Share of S, %", HEADLINE, ("hidden", "all_known", "base"), _share),
    Column("stochasticity_forward", "S, forward noise", DETAILS, _FORWARD, _shapley),
    Column("stochasticity_reverse", "S, reverse noise", DETAILS, _REVERSE, _shapley),
    Column("fresh", "DW-box images on fresh draws", DETAILS, ("all_known",)),
    Column(NULL, "Null attack, eps = 0", DETAILS),
)
"""All columns in the order of CSV files, which is also that of each section's table."""

PARTS: Final = ("base", *(column.key for column in COLUMNS if column.formula))
"""The columns that say where the robustness comes from, by key."""

CELLS: Final[Mapping[str, str]] = {
    "hidden": "white-box",
    "forward_known": "forward known",
    "reverse_known": "reverse known",
    "all_known": "DW-box",
}
"""The columns of robust accuracy at equal effort, as texts name them."""


def columns_of(extra: Iterable[str]) -> list[Column]:
    """The columns of one leaderboard; `extra` are the protocol's others, named by threat model."""
    others = [Column(key, key, DETAILS) for key in extra]
    return [*COLUMNS[:-1], *others, COLUMNS[-1]]


def derived(robust: Mapping[str, Replicates]) -> dict[str, Replicates | None]:
    """The columns with a formula, from the robust accuracies of others; None where one lacks."""
    return {
        column.key: column.formula(*(robust[key] for key in column.of))
        if all(key in robust for key in column.of)
        else None
        for column in COLUMNS
        if column.formula
    }
