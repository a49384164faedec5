"""More effort: does the leaderboard's attack converge, and which attack finds most at what effort?

Effort is counted in evaluations of the whole defense that a search really used for one image and,
where draws are known, one draw.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import log
from typing import Final, Literal, NamedTuple

import numpy as np

from dbp_bench.reporting.columns import CELLS
from dbp_bench.reporting.pool import Accuracy, Pool
from dbp_bench.reporting.statistics import Estimate
from dbp_bench.result import Right

BUDGET: Final = "budget"
"""The option of the standard attack: gradient evaluations of one image and known draw."""
FALL: Final = 0.01
"""The most that twice the budget may take from a cell that has converged."""
FALL_END: Final = 0.015
"""The most that the end of the fall's interval may be."""
WITHIN: Final = 10
"""No attack should be below the leaderboard's own at up to so many times its budget."""
USUAL: Final = 200
"""The budget that stands for that of the leaderboard's own attack, where it has none."""

Verdict = Literal["converged", "not converged", "not tested"]


def paired(a: Pool, b: Pool) -> tuple[Accuracy, Accuracy] | None:
    """The robust accuracies of both on the seeds, images and draws that they share, if any."""
    both: tuple[list[Right], list[Right]] = ([], [])
    ids = sorted({*a.any.ids} & {*b.any.ids})
    for first in (record.result for record in a.records):
        for second in (record.result for record in b.records):
            draws = sorted({*first.draws} & {*second.draws})
            if first.seed != second.seed or not ids or not draws:
                continue
            for side, result in zip(both, (first, second), strict=True):
                rows = [result.ids.index(each) for each in ids]
                columns = [result.draws.index(each) for each in draws]
                side.append(result.right("adversarial")[np.ix_(rows, columns)])
    return (Accuracy.of(both[0]), Accuracy.of(both[1])) if both[0] else None


# --- Convergence


@dataclass(frozen=True)
class Convergence:
    """A result of the leaderboard beside one of the same attack with twice the budget."""

    column: str
    """The column of the result; the first one, where it serves several."""
    own: Pool
    twice: Pool | None
    """The result with twice the budget; None where there is none."""
    accuracies: tuple[Accuracy, Accuracy] | None
    """The robust accuracies at the budget and at twice the budget, on the images that both have."""

    @property
    def difference(self) -> Estimate | None:
        """The accuracy at twice the budget minus that at the budget, paired by image."""
        return None if self.accuracies is None else self.accuracies[1].above(self.accuracies[0])

    @property
    def images(self) -> int | None:
        """The number of images that both have."""
        return None if self.accuracies is None else len(self.accuracies[0].score.right)

    @property
    def whole(self) -> bool:
        """True if the result with twice the budget has all seeds, images and draws of the other."""

        def measured(pool: Pool) -> set[object]:
            results = (record.result for record in pool.records)
            return {(each.seed, tuple(each.ids), tuple(each.draws)) for each in results}

        return self.twice is not None and measured(self.own) <= measured(self.twice)

    @property
    def verdict(self) -> Verdict:
        """Converged: it falls by at most :data:`FALL`, in its interval by :data:`FALL_END`."""
        found = self.difference
        if found is None:
            return "not tested"
        small = -found.value <= FALL + _ROUNDING and -found.low <= FALL_END + _ROUNDING
        return "converged" if small else "not converged"

    @property
    def said(self) -> str:
        """The column, and the difference in points; its lower end where that decides."""
        found = self.difference
        if found is None:
            return CELLS[self.column]
        low = f", interval to {100 * found.low:.1f}" if -found.value <= FALL + _ROUNDING else ""
        return f"{CELLS[self.column]} ({100 * found.value:+.1f}{low})"


_ROUNDING: Final = 1e-9
"""Far below what one outcome of one image weighs."""


def convergence(
    columns: Mapping[str, Pool], threats: Mapping[str, str], swept: Sequence[Pool]
) -> list[Convergence]:
    """One check for each result that serves a column of robust accuracy at equal effort.

    Args:
        columns: The results that serve the columns, by key.
        threats: The threat model of each column, by key.
        swept: The results of sweeps on that defense.
    """
    found = []
    own_first = sorted(
        (key for key in CELLS if key in columns),
        key=lambda key: columns[key].any.threat != threats.get(key),
    )
    named = {columns[key]: key for key in reversed(own_first)}
    for pool, key in sorted(named.items(), key=lambda pair: list(CELLS).index(pair[1])):
        effort = pool.any.effort
        more = {**effort, BUDGET: 2 * effort[BUDGET]} if BUDGET in effort else None
        fitting = (
            (each, accuracies)
            for each in swept
            if _search(each) == _search(pool) and each.any.effort == more
            if (accuracies := paired(pool, each))
        )
        found.append(Convergence(key, pool, *next(fitting, (None, None))))
    return found


@dataclass(frozen=True)
class Settled:
    """The results that serve a row, at the smallest budget at which all of its cells converge."""

    columns: Mapping[str, Pool]
    convergence: Sequence[Convergence]
    """One check for each of these results."""
    before: Sequence[Convergence] = ()
    """Those at smaller budgets, where a cell had not converged."""

    @property
    def budget(self) -> int | None:
        """The budget that the row was raised to; None where it was not."""
        budget = self.convergence[0].own.any.effort[BUDGET] if self.before else None
        return budget if isinstance(budget, int) else None

    @property
    def raised(self) -> str:
        """Why the row was raised, in a few words; empty where it was not."""
        if not self.budget:
            return ""
        half = self.budget // 2
        last = [each for each in self.before if each.own.any.effort[BUDGET] == half]
        fall = max(-each.difference.value for each in last if each.difference)
        return f"budget {self.budget} ({half} left up to {100 * fall:.1f} more)"


def settled(
    columns: Mapping[str, Pool], threats: Mapping[str, str], swept: Sequence[Pool]
) -> Settled:
    """Double the budget of a row until each of its cells has converged.

    All cells of a row have one budget, for their differences are at equal effort. So it is doubled
    only where every cell has a result at twice the budget, on the same images and draws; of further
    seeds there, if any, all must have each.

    Args:
        columns: The results that serve the columns, by key.
        threats: The threat model of each column, by key.
        swept: The results of sweeps on that defense.
    """
    before: list[Convergence] = []
    while True:
        found = convergence(columns, threats, swept)
        twice = {each.own: each.twice for each in found if each.twice and each.whole}
        seeds = {tuple(pool.seeds) for pool in twice.values()}
        complete = len(twice) == len(found) and len(seeds) == 1
        if not complete or all(each.verdict == "converged" for each in found):
            return Settled(columns, found, before)
        before += found
        columns = {key: twice.get(pool, pool) for key, pool in columns.items()}


def _search(pool: Pool) -> tuple[object, ...]:
    """The threat model, the attack and its gradient, and eps: all but the effort."""
    result = pool.any
    return result.threat, result.label, result.attack, result.gradient, result.eps


# --- Optimality


class Point(NamedTuple):
    """The robust accuracy that an attack left, and the evaluations that it took."""

    evaluations: float
    accuracy: float
    pool: Pool


@dataclass(frozen=True)
class Curve:
    """The accuracy that an attack leaves on one defense, against its evaluations."""

    defense: str
    knows: str
    attack: str
    """The attack's label, with its gradient where that isn't exact."""
    own: bool
    """True for the attack of the leaderboard."""
    points: Sequence[Point]
    """Sorted by evaluations."""
    optimality: float | None
    """The area above the curve over that above the envelope; None where no attack finds any.

    With few points it is a lower bound: between them the curve can only be lower than it is taken.
    """
    difference: Estimate | None
    """The attack's best accuracy at up to :data:`WITHIN` times the budget minus that of the
    leaderboard's own attack, paired by image; None for that one, or where there is none."""

    @property
    def best(self) -> Point:
        """The point of lowest accuracy; of a tie, that of fewest evaluations."""
        return min(self.points, key=_rank)

    @property
    def lower(self) -> bool | None:
        """True if the attack leaves less than the leaderboard's own by more than the interval."""
        return None if self.difference is None else self.difference.high < 0


def curves(
    pools: Sequence[Pool], swept: Sequence[Pool], own: Pool | None, clean: float
) -> list[Curve]:
    """The curves of all attacks on one defense at one knowledge, those that leave least first.

    A curve is a step function: before the attack's first point it is the clean accuracy, and from
    each point on it is the least accuracy so far. Its area is that between the clean accuracy and
    the curve over the logarithm of the evaluations, from a tenth of the budget of the leaderboard's
    own attack to ten times as many. The envelope is the curve of all their points together.

    Args:
        pools: The results of that defense and knowledge.
        swept: The results of sweeps on that defense, of which those with other efforts of the
            attacks in `pools` count. One on fewer images stands as far below the attack's own
            result as it is on the images that both have.
        own: The leaderboard's own result among `pools`, if it has one.
        clean: The clean accuracy of the defense.
    """
    points: dict[str, list[Point]] = {}
    for pool in pools:
        if pool.evaluations is None:
            continue
        mine = points.setdefault(_name(pool), [])
        accuracy = pool.robust.score.mean
        mine.append(Point(pool.evaluations, accuracy, pool))
        for other in swept:
            known = _search(other) == _search(pool) and other.effort != pool.effort
            both = paired(pool, other) if known and other.evaluations is not None else None
            if both is not None:
                fall = both[0].score.mean - both[1].score.mean
                mine.append(Point(other.evaluations or 0, accuracy - fall, other))
    if not points:
        return []
    every = [point for each in points.values() for point in each]
    budget = _budget(own)
    whole = _area(every, clean, budget)
    found = [
        Curve(
            defense=pools[0].any.defense,
            knows=pools[0].knowledge,
            attack=name,
            own=own is not None and name == _name(own),
            points=sorted(mine, key=lambda point: point[:2]),
            optimality=_area(mine, clean, budget) / whole if whole > 0 else None,
            difference=_against(own, name, mine),
        )
        for name, mine in points.items()
    ]
    return sorted(found, key=lambda curve: (*_rank(curve.best), curve.attack))


def _rank(point: Point) -> tuple[float, float]:
    """The lowest accuracy first; of a tie, that of fewest evaluations."""
    return round(point.accuracy, 9), point.evaluations


def _name(pool: Pool) -> str:
    label, gradient = pool.any.label, pool.any.gradient
    return label if gradient in (None, "exact", label) else f"{label} ({gradient})"


def steps(points: Iterable[Point]) -> list[tuple[float, float]]:
    """The corners of a curve: from so many evaluations on, the least accuracy so far."""
    ordered = sorted(point[:2] for point in points)
    least = accumulate((accuracy for _, accuracy in ordered), min)
    return [(count, low) for (count, _), low in zip(ordered, least, strict=True)]


def _area(points: Iterable[Point], clean: float, budget: float) -> float:
    """The area between the clean accuracy and the curve, over the logarithm of evaluations."""
    first, last = budget / WITHIN, budget * WITHIN
    corners = [(count, low) for count, low in steps(points) if count < last]
    return sum(
        max(0.0, clean - accuracy) * log(until / max(first, count))
        for (count, accuracy), (until, _) in pairwise([*corners, (last, 0.0)])
        if until > first
    )


def _budget(own: Pool | None) -> float:
    """The budget of the leaderboard's own attack."""
    budget = own.any.effort.get(BUDGET) if own else None
    return budget if isinstance(budget, int) else USUAL


def _against(own: Pool | None, name: str, points: Sequence[Point]) -> Estimate | None:
    """The attack's best accuracy within the effort, minus that of the leaderboard's own result."""
    if own is None or name == _name(own):
        return None
    within = [point for point in points if point.evaluations <= WITHIN * _budget(own)]
    if not within:
        return None
    best = min(within, key=lambda point: (point.accuracy, point.evaluations)).pool
    both = paired(best, own)
    return both[0].above(both[1]) if both else None
