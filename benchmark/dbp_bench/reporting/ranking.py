"""Ranks with ties: two defenses differ only where a paired test says so.

Each pair is tested by a permutation test, which exchanges the two image by image. Over all pairs
the p-values are adjusted by Holm (1979), so that the chance of one false order in the whole ranking
is 5 %.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dbp_bench.reporting.statistics import Score

ALPHA: Final = 0.05
FLIPS: Final = 20_000
"""The least number of random exchanges of the two sides in the permutation test."""
SEED: Final = 3
_EXACT: Final = 14
"""The most differing images for which all exchanges are counted."""
_CHUNK: Final = 1_000
_PER_PAIR: Final = 200
"""Exchanges for each of several pairs, so that Holm's strictest level is well above the least p."""


@dataclass(frozen=True, slots=True)
class Standing:
    """The span of ranks that one of several defenses can have."""

    best: int
    """One more than the number of defenses shown to be better: the shared rank."""
    worst: int
    """The number of all defenses but those shown to be worse."""

    def __str__(self) -> str:
        """The text of the span, such as ``2`` or ``2-5``."""
        return str(self.best) if self.best == self.worst else f"{self.best}-{self.worst}"


def ranks_with_ties(scores: Mapping[str, Score], alpha: float = ALPHA) -> dict[str, Standing]:
    """The standing of each of `scores`, best first; those that tie in order of their score.

    Ties are not transitive: the first may tie with the second and the second with the third while
    the first is better than the third. So each has a span of ranks.

    Args:
        scores: The scores by name, of the same images in the same order.
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
    flips = max(FLIPS, _PER_PAIR * len(pairs))
    found = [permutation(scores[a], scores[b], flips) for a, b in pairs]
    return dict(zip(pairs, holm(found), strict=True))


def permutation(a: Score, b: Score, flips: int = FLIPS) -> float:
    """The two-sided p-value of the difference of means, by exchanging A and B image by image.

    If the two were the same, each image's difference would be as likely with either sign
    (Fisher 1935). All exchanges are counted where few images differ, else `flips` random ones and
    the observed one.

    Args:
        a: The number of trials in which each image was right.
        b: The same for the other side, of the same images.
        flips: The number of random exchanges, where not all are counted.
    """
    counts = difference(a, b)
    differing = counts[counts != 0]
    if not len(differing):
        return 1.0
    seen = abs(float(differing.sum()))
    if len(differing) <= _EXACT:
        n = len(differing)
        signs = 1.0 - 2.0 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)
        return float((np.abs(signs @ differing) >= seen).mean())
    rng, extreme = np.random.default_rng(SEED), 0
    for start in range(0, flips, _CHUNK):
        number = min(_CHUNK, flips - start)
        signs = 1.0 - 2.0 * rng.integers(0, 2, (number, len(differing)))
        extreme += int((np.abs(signs @ differing) >= seen).sum())
    return (1 + extreme) / (1 + flips)


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
