"""Estimates with intervals, from a paired bootstrap over images."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
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
        """As in ``46.6 [43.4, 49.9]``; `sign` also shows a plus."""
        # Adding 0 turns -0.0 into 0.0.
        value, low, high = (round(100 * x, 1) + 0.0 for x in (self.value, self.low, self.high))
        return f"{value:{'+' if sign else ''}.1f} [{low:.1f}, {high:.1f}]"


class Score(NamedTuple):
    """How often each image was right, in how many trials: a mean that is exact."""

    right: Sequence[int]
    trials: int

    @property
    def mean(self) -> float:
        """The mean over images."""
        return sum(self.right) / (self.trials * len(self.right))


class Bootstrap:
    """The same resamples of `images` images for every quantity, so that differences are paired.

    A quantity is an array of its replicates. What is derived from quantities is derived from their
    arrays, element by element, and :meth:`estimate` reads value and interval off the result.

    Args:
        images: How many images the outcomes are of.
        resamples: How often they are drawn anew, with replacement.
        seed: Of the resamples.
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

    def histogram(self, category: Counts, categories: int) -> Counts:
        """How many images are of each category ``(1 + resamples, categories)``.

        Args:
            category: Of each image, in 0 ... categories - 1.
            categories: How many there are.

        Raises:
            ValueError: `category` isn't one number per image.
        """
        if category.shape != (self.images,):
            raise ValueError(f"categories of shape {category.shape} for {self.images} images.")
        found: Counts = (self._weights @ np.eye(categories)[category]).astype(np.int64)
        return found

    def estimate(self, quantity: Replicates) -> Estimate:
        """Value and percentile interval of a `quantity` ``(1 + resamples,)``."""
        ordered = np.sort(quantity[1:])
        # Order statistics, not interpolated: as many replicates lie outside on either side.
        outside = max(0, round((1 - LEVEL) / 2 * len(ordered)) - 1)
        low, high = ordered[outside], ordered[-1 - outside]
        return Estimate(float(quantity[0]), float(low), float(high))


def ratio(numerator: Replicates, denominator: Replicates) -> Replicates | None:
    """The quotient, or None where a replicate of `denominator` isn't positive.

    A share of something that may be nothing says nothing.
    """
    if not bool((denominator > 0).all()):
        return None
    quotient: Replicates = numerator / denominator
    return quotient
