"""What repeated draws say beyond their mean: votes, worst cases, the worst of several attacks."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import comb, lcm
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dbp_bench.reporting.statistics import SEED, Bootstrap, Counts, Estimate, Replicates, Score
from dbp_bench.result import NO_MAJORITY, NOT_RECORDED, Right

FEW: Final = 3
"""The number of draws whose worst case every table shows."""

METRICS: Final = ("mean", "plurality", f"worst_{FEW}", "worst_all")
"""One draw; the vote of :func:`votes` draws; the worst of :data:`FEW`, and of all draws."""

_GRID: Final = np.linspace(0, 1, 41)
"""Chances of being right between which the images of a result are spread."""
_ITERATIONS: Final = 1000

Classes = NDArray[np.int64]
"""Predicted classes (image x draw)."""


@dataclass(frozen=True)
class Metric:
    """An unbiased estimate, for one image, from how many of its M draws were right."""

    numerators: Sequence[int]
    """``(M + 1,)``, by the number of right draws."""
    denominator: int

    def __call__(self, right: int) -> float:
        """The estimate for an image that was right in `right` draws."""
        return self.numerators[right] / self.denominator


def mean(draws: int) -> Metric:
    """The accuracy at one draw."""
    return Metric(range(draws + 1), draws)


def worst(m: int, draws: int) -> Metric:
    """The chance that `m` draws are all right: C(right, m) / C(M, m), where M = `draws`.

    It is that of `m` of the M draws without replacement, hence unbiased for p^m, where each draw is
    right with probability p (a U-statistic; Hoeffding 1948).

    Raises:
        ValueError: `m` isn't in 1 ... M.
    """
    _check(m, draws)
    return Metric([comb(right, m) for right in range(draws + 1)], comb(draws, m))


def plurality(predicted: Sequence[int], label: int, k: int) -> int:
    """In how many of the C(M, k) choices of `k` of the M draws the label wins the vote.

    It wins where more draws predict it than any other class: a tie is wrong. A draw whose own votes
    had no majority predicts no class, and votes for none. Divided by C(M, k), this is the chance
    that `k` draws without replacement vote for the label, hence unbiased for that of k new draws (a
    U-statistic; Hoeffding 1948).

    Args:
        predicted: The class that each of the M draws predicts; -1 for no majority.
        label: The right class.
        k: The draws that vote.

    Raises:
        ValueError: `k` isn't in 1 ... M, or a class was not recorded.
    """
    _check(k, len(predicted))
    counts = Counter(predicted)
    if NOT_RECORDED in counts:
        raise ValueError("a class that was not recorded can't vote.")
    mine, silent = counts.pop(label, 0), counts.pop(NO_MAJORITY, 0)
    return _wins(mine, silent, tuple(sorted(counts.values())), k)


@lru_cache(maxsize=65536)  # most images have one of few sets of counts
def _wins(mine: int, silent: int, others: tuple[int, ...], k: int) -> int:
    """See :func:`plurality`: `mine` draws for the label, `others` for each other class."""
    wins = 0
    for for_label in range(1, min(mine, k) + 1):
        # ways[n]: the choices of n draws that give every other class fewer votes than the label.
        ways = [comb(silent, n) for n in range(k - for_label + 1)]
        for votes_for_other in others:
            ways = [
                sum(
                    comb(votes_for_other, taken) * ways[n - taken]
                    for taken in range(min(votes_for_other, n, for_label - 1) + 1)
                )
                for n in range(len(ways))
            ]
        wins += comb(mine, for_label) * ways[k - for_label]
    return wins


def votes(draws: int) -> int:
    """The draws of a vote: the largest odd number up to `draws`, where ties are fewest."""
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
    """k of the vote; null where `draws` is."""
    estimates: Mapping[str, Estimate | None]
    """By name, all of :data:`METRICS`; null where there are too few draws, or where a vote needs a
    class that was not recorded."""


def account(tally: "Tally", bootstrap: Bootstrap) -> Account:
    """The metrics of the draws in `tally`, with 95 % intervals."""
    return Account(
        draws=tally.draws if tally.noisy else None,
        votes=votes(tally.draws) if tally.noisy else None,
        estimates={name: tally.estimate(name, bootstrap) for name in METRICS},
    )


def gaps(clean: "Tally", adversarial: "Tally", bootstrap: Bootstrap) -> dict[str, Estimate | None]:
    """By metric, robust minus clean accuracy on the same draws, paired by image.

    The null attack (eps = 0) must leave none. Images are resampled, not draws, which are the same
    on both sides.
    """
    found: dict[str, Estimate | None] = {}
    for name in METRICS:
        before, after = clean.score(name), adversarial.score(name)
        if before is None or after is None:
            found[name] = None
            continue
        gap = [a - b for a, b in zip(after.right, before.right, strict=True)]
        found[name] = bootstrap.estimate(bootstrap.mean(gap, before.trials))
    return found


class Tally:
    """What each image's draws predict: one table of classes (image x draw) for each seed.

    Args:
        tables: Predicted classes; each seed was attacked anew.
        labels: The right classes.
        noisy: Whether noise is drawn. Without, one draw is as good as any number, and every metric
            is the mean.

    Raises:
        ValueError: The tables are not of the same images and number of draws.
    """

    def __init__(self, tables: Sequence[Classes], labels: Sequence[int], *, noisy: bool) -> None:
        classes = _stacked(tables)
        self.classes, self.labels, self.noisy = classes, labels, noisy
        self.seeds, self.images, self.draws = classes.shape
        self.right: Counts = (classes == np.asarray(labels)[:, None]).sum(2).T
        """``(images, seeds)``, in 0 ... draws: how many draws are right."""
        self._redrawn: dict[Bootstrap, Counts] = {}

    def score(self, name: str) -> Score | None:
        """The metric `name` of each image, over its seeds: exact. None where it has none."""
        if name == "plurality" and self.noisy:
            return self._vote()
        metric = self._by_right(name)
        if metric is None:
            return None
        right = [sum(metric.numerators[count] for count in row) for row in self.right.tolist()]
        return Score(right, metric.denominator * self.seeds)

    def estimate(self, name: str, bootstrap: Bootstrap) -> Estimate | None:
        """The metric `name` with its interval; None where it has none.

        Of draws that are noisy, images are resampled and their number of right draws made anew (see
        :meth:`redrawn`); for the vote, which needs more than that number, images alone.
        """
        if name == "plurality" and self.noisy:
            score = self._vote()
            return score and bootstrap.estimate(bootstrap.mean(*score))
        metric = self._by_right(name)
        if metric is None:
            return None
        if bootstrap not in self._redrawn:
            replicates = self.redrawn(bootstrap) if self.noisy else self.resampled(bootstrap)
            self._redrawn[bootstrap] = replicates
        return bootstrap.estimate(self.apply(metric, self._redrawn[bootstrap]))

    def _by_right(self, name: str) -> Metric | None:
        """The metric `name`, of those that the number of right draws decides."""
        if name == "mean" or not self.noisy:
            return mean(self.draws)
        m = self.draws if name == "worst_all" else FEW
        return worst(m, self.draws) if m <= self.draws else None

    def _vote(self) -> Score | None:
        if (self.classes == NOT_RECORDED).any():
            return None
        k = votes(self.draws)
        images = zip(self.classes.transpose(1, 0, 2).tolist(), self.labels, strict=True)
        wins = [sum(plurality(row, label, k) for row in seeds) for seeds, label in images]
        return Score(wins, comb(self.draws, k) * self.seeds)

    def apply(self, metric: Metric, replicates: Counts) -> Replicates:
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
        means: Replicates = (replicates * np.array(values)).sum(1) / (
            (metric.denominator if exact else 1) * whole
        )
        return means

    def resampled(self, bootstrap: Bootstrap) -> Counts:
        """How often each count occurs ``(1 + resamples, M + 1)``, as is and on resampled images."""
        return sum(
            (bootstrap.histogram(column, self.draws + 1) for column in self.right.T),
            start=np.zeros((), dtype=np.int64),
        )

    def redrawn(self, bootstrap: Bootstrap) -> Counts:
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


def _posterior(counts: Counts, images: Counts, trials: int) -> NDArray[np.float64]:
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


def worst_hidden(attacks: Sequence[Right]) -> Score:
    """The worst case over `attacks` whose images were frozen before the draws.

    The smallest of several noisy means is too small. So the draws are split in halves, even and
    odd: one chooses, for each image, the attack that leaves it right least often, and the other
    evaluates that attack; then they swap, so that every draw counts once (cross-fitting). Of those
    that tie, the attack that is strongest over all images of that half is chosen, and those that
    still tie share the image. A choice by few draws can miss the strongest attack, so that the
    result is never too low on average, but may be too high.

    Args:
        attacks: Outcomes (image x draw) of each attack, on the same images and draws.

    Raises:
        ValueError: They are not of the same images x draws, or there are less than two draws.
    """
    right = _stacked(attacks)
    draws = right.shape[2]
    if draws < 2:
        raise ValueError("one draw: it can't both choose an attack and evaluate it.")
    halves = right[:, :, 0::2].sum(2), right[:, :, 1::2].sum(2)
    shares = lcm(*range(1, len(attacks) + 1))
    total = np.zeros(right.shape[1], dtype=np.int64)
    for choosing, evaluating in ((0, 1), (1, 0)):
        right_of_all = halves[choosing].sum(1, keepdims=True)
        order = halves[choosing] * (right_of_all.max() + 1) + right_of_all
        chosen = order == order.min(0)
        total += (chosen * halves[evaluating]).sum(0) * (shares // chosen.sum(0))
    return Score(total.tolist(), shares * draws)


def worst_known(attacks: Sequence[Right]) -> Score:
    """The worst case over `attacks` that knew all noise, draw by draw.

    Nothing is left to chance there: an image falls at a draw if any attack succeeded at it. The
    plain minimum is exact.

    Args:
        attacks: Outcomes (image x known draw) of each attack, on the same images and draws.

    Raises:
        ValueError: They are not of the same images x draws.
    """
    right = _stacked(attacks)
    return Score(right.min(0).sum(1).tolist(), right.shape[2])


def _stacked(tables: Sequence[NDArray[Any]]) -> Counts:
    """All `tables` as one array (table x image x draw) of 0 and 1."""
    shapes = {np.shape(table) for table in tables}
    if len(shapes) != 1 or len(shape := shapes.pop()) != 2 or 0 in shape:
        raise ValueError("outcomes that are not of the same images x draws.")
    return np.stack([np.asarray(table, dtype=np.int64) for table in tables])
