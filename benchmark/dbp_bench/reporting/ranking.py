"""Ranks with ties: two defenses differ only where a paired test says so.

For each pair, images are resampled (the same ones for both) and the share of resamples on either
side of no difference, doubled, is the p-value (Davison and Hinkley 1997, section 4.4). Over all
pairs the p-values are adjusted by Holm (1979), so that the chance of one false order in the whole
ranking is 5 %.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dbp_bench.reporting.statistics import Score

ALPHA: Final = 0.05
SEED: Final = 2
"""Seed of the resamples, which are others than those of the intervals."""
_LEAST: Final = 10_000
_PER_PAIR: Final = 200
"""Resamples for each pair, so that Holm's strictest level is well above the smallest p-value."""
_CHUNK: Final = 1_000
"""Resamples held at a time."""


@dataclass(frozen=True, slots=True)
class Standing:
    """Where one of several defenses can stand."""

    best: int
    """One more than those that are shown to be better: the shared rank."""
    worst: int
    """All but those that are shown to be worse."""

    def __str__(self) -> str:
        """As in ``2`` or ``2-5``."""
        return str(self.best) if self.best == self.worst else f"{self.best}-{self.worst}"


def ranks_with_ties(scores: Mapping[str, Score], alpha: float = ALPHA) -> dict[str, Standing]:
    """The standing of each of `scores`, best first; those that tie in order of their score.

    Not to be told apart isn't transitive: the first may tie with the second and the second with the
    third while the first is better than the third. Hence a span of ranks for each.

    Args:
        scores: By name, on the same images in the same order.
        alpha: The chance of any false order.

    Raises:
        ValueError: They are not of the same number of images, or of none.
    """
    tested = pairwise(scores)
    names = sorted(scores, key=lambda name: (-scores[name].mean, name))
    better: dict[str, int] = dict.fromkeys(names, 0)
    worse: dict[str, int] = dict.fromkeys(names, 0)
    for (first, second), p in tested.items():
        if p > alpha:
            continue
        a, b = scores[first].mean, scores[second].mean
        winner, loser = (first, second) if a > b else (second, first)
        worse[winner] += 1
        better[loser] += 1
    return {name: Standing(1 + better[name], len(names) - worse[name]) for name in names}


def pairwise(scores: Mapping[str, Score]) -> dict[tuple[str, str], float]:
    """The p-value of each pair's difference, adjusted for the number of pairs.

    Raises:
        ValueError: The scores are not of the same number of images, or of none.
    """
    pairs = list(combinations(sorted(scores), 2))
    if len({len(score.right) for score in scores.values()}) > 1:
        raise ValueError("scores that are not of the same images.")
    if any(not score.right or score.trials < 1 for score in scores.values()):
        raise ValueError("a score of no image or no trial.")
    if not pairs:
        return {}
    counts = [difference(scores[a], scores[b]) for a, b in pairs]
    return dict(zip(pairs, holm(_bootstrapped(np.stack(counts, axis=1))), strict=True))


def difference(a: Score, b: Score) -> NDArray[np.float64]:
    """A minus B for each image, times the trials of both: sums of integers are exact everywhere."""
    left, other = (np.asarray(score.right, dtype=np.float64) for score in (a, b))
    found: NDArray[np.float64] = left * b.trials - other * a.trials
    return found


def holm(p: Sequence[float]) -> list[float]:
    """Each p-value adjusted for their number by Holm's step-down rule (1979)."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    adjusted = [0.0] * len(p)
    highest = 0.0
    for place, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p) - place) * p[i]))
        adjusted[i] = highest
    return adjusted


def _bootstrapped(differences: NDArray[np.float64]) -> list[float]:
    """Two-sided p-values that the sums of `differences` ``(images, pairs)`` are 0."""
    images, pairs = differences.shape
    resamples = max(_LEAST, _PER_PAIR * pairs)
    rng = np.random.default_rng(SEED)
    low, high = np.zeros(pairs, dtype=np.int64), np.zeros(pairs, dtype=np.int64)
    for start in range(0, resamples, _CHUNK):
        number = min(_CHUNK, resamples - start)
        drawn = rng.integers(0, images, (number, images))
        weights = np.stack([np.bincount(row, minlength=images) for row in drawn]).astype(float)
        sums = weights @ differences
        low += (sums <= 0).sum(0)
        high += (sums >= 0).sum(0)
    # The sample itself counts as one resample, so that no p-value is 0.
    smaller = (1 + np.minimum(low, high)) / (1 + resamples)
    return [min(1.0, 2 * float(p)) for p in smaller]
