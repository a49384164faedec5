"""What repeated draws say beyond their mean: votes, worst cases, and the worst of several attacks.

Outcomes store right or wrong, not the class. Where more than half of the draws of a vote are right,
a plurality vote over classes is right too; it can also be right with fewer, where the wrong ones
disagree. The accuracies of votes here are therefore lower bounds of that of a plurality vote.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb, lcm
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dbp_bench.reporting.statistics import SEED, Bootstrap, Estimate, Replicates
from dbp_bench.result import Outcomes

FEW: Final = 3
"""The number of draws whose worst case every table shows."""

METRICS: Final = ("mean", "majority", f"worst_{FEW}", "worst_all")
"""One draw; majority of :func:`votes` draws; worst of :data:`FEW`, and of all draws."""

_GRID: Final = np.linspace(0, 1, 41)
"""Chances of being right between which the images of a result are spread."""
_ITERATIONS: Final = 1000

Table = Sequence[int]
"""A number for each count of right draws 0 ... M, over a common denominator."""


@dataclass(frozen=True)
class Metric:
    """An unbiased estimate, for one image, from how many of its M draws were right."""

    numerators: Table
    """``(M + 1,)``, by the number of right draws."""
    denominator: int

    def __call__(self, right: int) -> float:
        """The estimate for an image that was right in `right` draws."""
        return self.numerators[right] / self.denominator


def mean(draws: int) -> Metric:
    """The accuracy at one draw."""
    return Metric(range(draws + 1), draws)


def worst(m: int, draws: int) -> Metric:
    """The chance that `m` draws are all right: C(right, m) / C(M, m), of M = `draws`.

    It is that of `m` of the M draws without replacement, hence unbiased for p^m, where each draw is
    right with probability p (a U-statistic; Hoeffding 1948).

    Raises:
        ValueError: `m` isn't in 1 ... M.
    """
    _check(m, draws)
    return Metric([comb(right, m) for right in range(draws + 1)], comb(draws, m))


def majority(k: int, draws: int) -> Metric:
    """The chance that more than half of `k` draws are right; a tie is wrong.

    The sum over j > k / 2 of C(right, j) C(M - right, k - j) / C(M, k): that of `k` of the
    M = `draws` draws without replacement, hence unbiased for the binomial tail of p.

    Raises:
        ValueError: `k` isn't in 1 ... M.
    """
    _check(k, draws)
    numerators = [
        sum(comb(right, j) * comb(draws - right, k - j) for j in range(k // 2 + 1, k + 1))
        for right in range(draws + 1)
    ]
    return Metric(numerators, comb(draws, k))


def votes(draws: int) -> int:
    """The draws of the largest vote that cannot tie: the largest odd number up to `draws`."""
    return draws - (draws + 1) % 2


def _check(number: int, draws: int) -> None:
    if not 1 <= number <= draws:
        raise ValueError(f"{number} of {draws} draws: at least 1, and no more than there are.")


@dataclass(frozen=True)
class Account:
    """What one setting's draws say."""

    draws: int | None
    """M, of each seed; null where no noise is drawn, so that any number of draws is alike."""
    votes: int | None
    """k of the majority; null where `draws` is."""
    estimates: Mapping[str, Estimate | None]
    """By name, all of :data:`METRICS`; null where there are too few draws."""


def metrics(draws: int, *, noisy: bool) -> dict[str, Metric | None]:
    """All of :data:`METRICS` for M = `draws`.

    Without noise (not `noisy`) one draw is as good as any number: each of them is the mean.
    """
    if not noisy:
        return dict.fromkeys(METRICS, mean(draws))
    found = (
        mean(draws),
        majority(votes(draws), draws),
        worst(FEW, draws) if draws >= FEW else None,
        worst(draws, draws),
    )
    return dict(zip(METRICS, found, strict=True))


def account(tables: Sequence[Outcomes], bootstrap: Bootstrap, *, noisy: bool) -> Account:
    """The metrics of outcomes (image x draw), one table for each seed, with 95 % intervals.

    Raises:
        ValueError: The tables are not of the same images and number of draws.
    """
    tally = Tally(tables)
    replicates = tally.redrawn(bootstrap) if noisy else tally.resampled(bootstrap)
    return Account(
        draws=tally.draws if noisy else None,
        votes=votes(tally.draws) if noisy else None,
        estimates={
            name: None if metric is None else bootstrap.estimate(tally.apply(metric, replicates))
            for name, metric in metrics(tally.draws, noisy=noisy).items()
        },
    )


class Tally:
    """How many draws were right, for each image and seed.

    Args:
        tables: Outcomes (image x draw), one table for each seed; each seed attacked anew.

    Raises:
        ValueError: They are not of the same images and number of draws.
    """

    def __init__(self, tables: Sequence[Outcomes]) -> None:
        shapes = {np.shape(table) for table in tables}
        if len(shapes) != 1 or len(shape := shapes.pop()) != 2 or 0 in shape:
            raise ValueError("tables of outcomes that are not of the same images x draws.")
        self.images, self.draws = shape
        self.seeds = len(tables)
        self.right: NDArray[np.int64] = np.stack(
            [np.asarray(table, dtype=np.int64).sum(1) for table in tables], axis=1
        )
        """``(images, seeds)``, in 0 ... draws."""

    def per_image(self, metric: Metric) -> list[int]:
        """The sum of `metric` over seeds for each image, times its denominator: exact."""
        return [sum(metric.numerators[right] for right in row) for row in self.right.tolist()]

    def apply(self, metric: Metric, replicates: NDArray[np.int64]) -> Replicates:
        """The mean of `metric` ``(1 + resamples,)`` in each of the `replicates`.

        Raises:
            ValueError: The metric is of another number of draws.
        """
        if len(metric.numerators) != self.draws + 1:
            raise ValueError(f"a metric of other than {self.draws} draws.")
        whole = self.images * self.seeds
        # Sums of integers are exact, so that the last digit is the same on every machine.
        exact = metric.denominator * whole < 2**53
        values = [float(n) if exact else n / metric.denominator for n in metric.numerators]
        sums: Replicates = (replicates * np.array(values)).sum(1)
        return sums / ((metric.denominator if exact else 1) * whole)

    def resampled(self, bootstrap: Bootstrap) -> NDArray[np.int64]:
        """How often each count occurs ``(1 + resamples, M + 1)``, as is and on resampled images."""
        return sum(
            (bootstrap.histogram(column, self.draws + 1) for column in self.right.T),
            start=np.zeros((), dtype=np.int64),
        )

    def redrawn(self, bootstrap: Bootstrap) -> NDArray[np.int64]:
        """The same with two levels: images resampled, and each one's draws made anew.

        Resampling the M outcomes of an image repeats some of them, and to U-statistics of
        repetitions, such as the worst of all M, a tie is no second draw: they come out too high.
        It also counts the draws' noise twice, which is in the outcomes already (Davison and
        Hinkley 1997, section 3.8). So the draws are parametric: each image's chance of being right
        is drawn from its posterior given its outcomes, then M outcomes with that chance. The prior
        is the distribution of chances that makes the result's own counts likeliest, whatever its
        form (Laird 1978), by expectation maximisation on a grid. At its fixed point redrawn counts
        are distributed like the ones that were seen, as far as a mixture of binomials can be.

        Images whose draws all agree, in all seeds, leave nothing to draw anew if all are so. Seeds
        of an image share its chance.
        """
        seen = self.resampled(bootstrap)
        trials = self.draws * self.seeds
        total = self.right.sum(1)
        if bool(((total == 0) | (total == trials)).all()):
            return seen
        counts, which = np.unique(total, return_inverse=True)
        images = bootstrap.histogram(which, len(counts))
        posterior = _posterior(counts, images[0], trials)
        chance = np.stack([_binomial(self.draws, p) for p in _GRID])
        rng = np.random.default_rng([SEED, 1])
        if self.seeds == 1:
            anew = rng.multinomial(images[1:], _exact(posterior @ chance)).sum(1)
        else:
            chances = rng.multinomial(images[1:], _exact(posterior)).sum(1)
            anew = rng.multinomial(self.seeds * chances, _exact(chance)).sum(1)
        return np.concatenate([seen[:1], anew])


def _posterior(
    counts: NDArray[np.int64], images: NDArray[np.int64], trials: int
) -> NDArray[np.float64]:
    """The chances ``(len(counts), grid)`` of images, given their count.

    Args:
        counts: The counts of right draws that occur.
        images: How many images have each of them.
        trials: Draws of each image.
    """
    likelihood = np.stack([_binomial(trials, p)[counts] for p in _GRID], axis=1)
    prior = np.full(len(_GRID), 1 / len(_GRID))
    share = images / images.sum()
    posterior = likelihood
    for _ in range(_ITERATIONS):
        joint = likelihood * prior
        posterior = joint / joint.sum(1, keepdims=True)
        prior = share @ posterior
    return posterior


def _binomial(trials: int, p: float) -> NDArray[np.float64]:
    """The chance of each count 0 ... trials."""
    return np.array([comb(trials, x) * p**x * (1 - p) ** (trials - x) for x in range(trials + 1)])


def _exact(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each row in steps of about 1e-9, summing to 1: rounding in its making leaves no trace."""
    levels = np.floor(rows * 2.0**30 + 0.5)
    exact: NDArray[np.float64] = levels / levels.sum(-1, keepdims=True)
    return exact


def gaps(
    clean: Sequence[Outcomes], robust: Sequence[Outcomes], bootstrap: Bootstrap, *, noisy: bool
) -> dict[str, Estimate | None]:
    """By metric, robust minus clean accuracy on the same draws, paired by image.

    The null attack (eps = 0) must leave none. Images are resampled, not draws, which are the same
    on both sides.
    """
    before, after = Tally(clean), Tally(robust)
    found: dict[str, Estimate | None] = {}
    for name, metric in metrics(before.draws, noisy=noisy).items():
        if metric is None:
            found[name] = None
            continue
        pairs = zip(after.per_image(metric), before.per_image(metric), strict=True)
        gap = [a - b for a, b in pairs]
        found[name] = bootstrap.estimate(bootstrap.mean(gap, metric.denominator * before.seeds))
    return found


@dataclass(frozen=True)
class WorstCase:
    """For each image, the accuracy under the strongest of several attacks."""

    numerators: Sequence[int]
    """One per image."""
    denominator: int

    @property
    def mean(self) -> float:
        """Over images."""
        return sum(self.numerators) / (self.denominator * len(self.numerators))

    def replicates(self, bootstrap: Bootstrap) -> Replicates:
        """On resampled images. Each image's selection and its draws stay with it."""
        return bootstrap.mean(self.numerators, self.denominator)


def worst_hidden(attacks: Sequence[Outcomes]) -> WorstCase:
    """The worst case over `attacks` whose images were frozen before the draws, re-judged.

    The smallest of several noisy means is too small. So the draws are split in halves, even and
    odd: one chooses, for each image, the attack that leaves it right least often, and the other
    judges that attack; then they swap, so that every draw judges once (cross-fitting). Of attacks
    that tie, the one that is strongest over all images of that half is chosen, and those that still
    tie share the image. A choice by few draws can miss the strongest attack, so that the
    result is never too low on average, but may be too high.

    Args:
        attacks: Outcomes (image x draw) of each attack, on the same images and draws.

    Raises:
        ValueError: They are not of the same images x draws, or there are less than two draws.
    """
    right = _stacked(attacks)
    draws = right.shape[2]
    if draws < 2:
        raise ValueError("one draw: it can't both choose an attack and judge it.")
    halves = right[:, :, 0::2].sum(2), right[:, :, 1::2].sum(2)
    shares = lcm(*range(1, len(attacks) + 1))
    total = np.zeros(right.shape[1], dtype=np.int64)
    for choosing, judging in ((0, 1), (1, 0)):
        right_of_all = halves[choosing].sum(1, keepdims=True)
        order = halves[choosing] * (right_of_all.max() + 1) + right_of_all
        chosen = order == order.min(0)
        total += (chosen * halves[judging]).sum(0) * (shares // chosen.sum(0))
    return WorstCase(total.tolist(), shares * draws)


def worst_known(attacks: Sequence[Outcomes]) -> WorstCase:
    """The worst case over `attacks` that knew all noise, draw by draw.

    Nothing is left to chance there: an image falls at a draw if any attack succeeded at it. The
    plain minimum is exact.

    Args:
        attacks: Outcomes (image x known draw) of each attack, on the same images and draws.

    Raises:
        ValueError: They are not of the same images x draws.
    """
    right = _stacked(attacks)
    return WorstCase(right.min(0).sum(1).tolist(), right.shape[2])


def _stacked(attacks: Sequence[Outcomes]) -> NDArray[np.int64]:
    if not attacks or len({np.shape(table) for table in attacks}) != 1:
        raise ValueError("attacks whose outcomes are not of the same images x draws.")
    return np.asarray(attacks, dtype=np.int64)
