"""Estimates with intervals: of accuracies, and of differences from a paired bootstrap over images.

An accuracy has the interval of Clopper and Pearson (1934) at an effective sample size, as Korn and
Graubard (1998) take it for small proportions in clusters of unequal weight, which images with
several draws each are. A bootstrap interval has no width at 0 or 100 % and too little near them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import exp, lgamma, log, log1p
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

RESAMPLES: Final = 2000
SEED: Final = 0
LEVEL: Final = 0.95
_BILLION: Final = 10**9
_EXACT: Final = 2**53
"""Sums of integers below this are exact in a float."""

Counts = NDArray[np.int64]
Replicates = NDArray[np.float64]
"""One quantity ``(1 + resamples,)``: on the images as they are, then on each resample of them."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A quantity and its 95 % interval."""

    value: float
    low: float
    high: float

    def percent(self, *, sign: bool = False) -> str:
        """The text in percent, such as ``46.6 [43.4, 49.9]``; `sign` also shows a plus."""
        # Adding 0 turns -0.0 into 0.0.
        value, low, high = (round(100 * x, 1) + 0.0 for x in (self.value, self.low, self.high))
        return f"{value:{'+' if sign else ''}.1f} [{low:.1f}, {high:.1f}]"


class Score(NamedTuple):
    """The number of `trials` in which each image was right: integers, whose mean is exact."""

    right: Sequence[int]
    trials: int

    @property
    def mean(self) -> float:
        """The mean over images."""
        return sum(self.right) / (self.trials * len(self.right))


def proportion(score: Score, draws: int | None = None) -> Estimate:
    """The mean of a score with its 95 % interval, which holds near 0 and 100 % too.

    The effective sample size ``n_eff`` is the number of independent yes-or-no outcomes whose mean
    would vary as this one does from image to image, p (1 - p) / variance. It is at most the number
    of images times max(1, 4 p (1 - p) draws): near the ends, images that were not met may differ
    from all that were, and more draws of the same images say little of them. The interval is that
    of Clopper and Pearson for p n_eff successes in n_eff trials.

    Args:
        score: The number of trials in which each image was right.
        draws: The draws of each image; the score's trials if not given.
    """
    n, total, whole = len(score.right), sum(score.right), score.trials * len(score.right)
    p = total / whole
    # Integers, so that the last digit is the same on every machine.
    spread = n * sum(right * right for right in score.right) - total * total
    most = n * max(1.0, 4 * p * (1 - p) * (draws or score.trials))
    effective = min(most, total * (whole - total) * (n - 1) / spread) if spread else most
    hits = p * effective
    low = 0.0 if total == 0 else _beta_quantile((1 - LEVEL) / 2, hits, effective - hits + 1)
    high = 1.0 if total == whole else _beta_quantile((1 + LEVEL) / 2, hits + 1, effective - hits)
    return Estimate(p, round(min(low, p), 9), round(max(high, p), 9))


def _beta_quantile(chance: float, a: float, b: float) -> float:
    """The quantile of Beta(a, b) at the probability `chance`, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _beta(middle, a, b) < chance else (low, middle)
    return (low + high) / 2


def _beta(x: float, a: float, b: float) -> float:
    """The distribution function of Beta(a, b) at `x` in (0, 1).

    By the continued fraction of the incomplete beta function (Abramowitz and Stegun 1964, 26.5.8),
    evaluated by Lentz's method.
    """
    if x > (a + 1) / (a + b + 2):
        return 1 - _beta(1 - x, b, a)
    d = 1 / (1 - (a + b) * x / (a + 1))
    c, fraction = 1.0, d
    for m in range(1, 1000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d, c = 1 / (1 + term * d), 1 + term / c
            fraction *= c * d
        if abs(c * d - 1) < 1e-13:
            break
    weight = lgamma(a + b) - lgamma(a) - lgamma(b) + a * log(x) + b * log1p(-x)
    return exp(weight) * fraction / a


class Bootstrap:
    """The same resamples of `images` images for every quantity, so that differences are paired.

    A quantity is an array of its replicates. What is derived from quantities is derived from their
    arrays, element by element, and :meth:`estimate` reads value and interval off the result.

    Args:
        images: The number of images that the outcomes are of.
        resamples: The number of times they are drawn anew, with replacement.
        seed: The seed of the resamples.
    """

    def __init__(self, images: int, resamples: int = RESAMPLES, seed: int = SEED) -> None:
        if images < 1 or resamples < 2:
            raise ValueError(f"{images} images and {resamples} resamples: too few.")
        rng = np.random.default_rng(seed)
        self.images = images
        # How often each image is in the sample; row 0 is the sample itself.
        self._weights = np.ones((1 + resamples, images))
        for row in self._weights[1:]:
            row[:] = np.bincount(rng.integers(0, images, images), minlength=images)

    @classmethod
    @lru_cache(maxsize=8)
    def of(cls, images: int) -> "Bootstrap":
        """The one bootstrap that all reports of so many `images` share."""
        return cls(images)

    def average(self, values: Sequence[float]) -> Replicates:
        """The mean of one real value per image, each rounded to a billionth (see :meth:`mean`)."""
        return self.mean([round(_BILLION * value) for value in values], _BILLION)

    def mean(self, right: Counts | Sequence[int], trials: int) -> Replicates:
        """The accuracy where image i was right in ``right[i]`` of `trials` trials.

        Counts, not means per image: sums of integers are exact, so that the last digit is the same
        on every machine. Numbers too large for that are rounded to billionths.
        """
        if trials * len(right) >= _EXACT:
            return self.average([int(count) / trials for count in right])
        counts = np.asarray(right, dtype=np.float64)
        if counts.shape != (self.images,):
            raise ValueError(f"counts of shape {counts.shape} for {self.images} images.")
        accuracy: Replicates = self._weights @ counts / (self.images * trials)
        return accuracy

    def estimate(self, quantity: Replicates) -> Estimate:
        """Value and percentile interval of a `quantity` ``(1 + resamples,)``."""
        ordered = np.sort(quantity[1:])
        # Order statistics, not interpolated: as many replicates lie outside on either side.
        outside = max(0, round((1 - LEVEL) / 2 * len(ordered)) - 1)
        low, high = ordered[outside], ordered[-1 - outside]
        return Estimate(float(quantity[0]), float(low), float(high))


def ratio(numerator: Replicates, denominator: Replicates) -> Replicates | None:
    """The quotient, or None where a replicate of `denominator` isn't positive.

    A share of a quantity that may be zero has no meaning.
    """
    if not bool((denominator > 0).all()):
        return None
    quotient: Replicates = numerator / denominator
    return quotient
