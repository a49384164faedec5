"""Statistics of repeated draws beyond the mean: votes, worst cases, worst of several attacks."""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from math import comb, lcm
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dbp_bench.reporting.statistics import Counts, Estimate, Score, proportion
from dbp_bench.result import NO_MAJORITY, NOT_RECORDED, Right

FEW: Final = 3
"""The number of draws whose worst case every table shows."""

METRICS: Final = ("mean", "plurality", f"worst_{FEW}", "worst_all")
"""The accuracies of one draw, of a vote of :func:`votes` draws, and of the worst of :data:`FEW`
and of all draws."""

Classes = NDArray[np.int64]
"""Predicted classes (image x draw)."""


def worst(m: int, draws: int) -> tuple[list[int], int]:
    """The chance that `m` draws are all right: C(right, m) / C(M, m), where M = `draws`.

    It is that of `m` of the M draws without replacement, hence unbiased for p^m, where each draw is
    right with probability p (a U-statistic; Hoeffding 1948).

    Returns:
        The numerator for each number of right draws, 0 ... M, and the denominator.

    Raises:
        ValueError: `m` isn't in 1 ... M.
    """
    _check(m, draws)
    return [comb(right, m) for right in range(draws + 1)], comb(draws, m)


def plurality(predicted: Sequence[int], label: int, k: int) -> int:
    """The number of the C(M, k) choices of `k` of the M draws in which the label wins the vote.

    It wins where more draws predict it than any other class: a tie is wrong. A draw whose own votes
    had no majority predicts no class, and votes for none. Divided by C(M, k), this is the chance
    that `k` draws without replacement vote for the label, hence unbiased for that of k new draws (a
    U-statistic; Hoeffding 1948).

    Args:
        predicted: The class that each of the M draws predicts; -1 for no majority.
        label: The right class.
        k: The number of draws that vote.

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
    """The number of draws in a vote: the largest odd one up to `draws`, where ties are fewest."""
    return draws - (draws + 1) % 2


def _check(number: int, draws: int) -> None:
    if not 1 <= number <= draws:
        raise ValueError(f"{number} of {draws} draws: at least 1, and no more than there are.")


class Tally:
    """The predictions of all draws of one setting, with their mean, votes and worst cases.

    Args:
        tables: Predicted classes (image x draw), one table for each seed, which attacked anew.
        labels: The right classes.
        noisy: True if the defense draws noise. Without noise, one draw is as good as any number,
            and every metric is the mean.

    Raises:
        ValueError: The tables are not of the same images and number of draws.
    """

    def __init__(self, tables: Sequence[Classes], labels: Sequence[int], *, noisy: bool) -> None:
        self._classes, self._labels, self._noisy = _stacked(tables), labels, noisy
        self._seeds, _, self._each = self._classes.shape
        right = self._classes == np.asarray(labels)[:, None]
        self._right: list[list[int]] = right.sum(2).T.tolist()  # image x seed: right draws

    @property
    def draws(self) -> int | None:
        """The number M of draws of each seed; None where the defense draws no noise."""
        return self._each if self._noisy else None

    @property
    def votes(self) -> int | None:
        """The number k of draws in a vote; None where :attr:`draws` is."""
        return votes(self._each) if self._noisy else None

    def score(self, name: str) -> Score | None:
        """The metric `name` of each image, over its seeds: exact.

        None where there are too few draws, or where a vote needs a class that was not recorded.
        """
        m = {"mean": 1, "plurality": votes(self._each), "worst_all": self._each}.get(name, FEW)
        m = m if self._noisy else 1
        if m > self._each:
            return None
        if name == "plurality" and self._noisy:
            if (self._classes == NOT_RECORDED).any():
                return None
            images = zip(self._classes.transpose(1, 0, 2).tolist(), self._labels, strict=True)
            wins = [sum(plurality(row, label, m) for row in seeds) for seeds, label in images]
            return Score(wins, comb(self._each, m) * self._seeds)
        numerators, whole = worst(m, self._each)
        right = [sum(numerators[count] for count in seeds) for seeds in self._right]
        return Score(right, whole * self._seeds)

    @cached_property
    def estimates(self) -> Mapping[str, Estimate | None]:
        """All of :data:`METRICS` by name, with their intervals from image to image."""
        scores = {name: self.score(name) for name in METRICS}
        draws = self._each * self._seeds
        return {name: score and proportion(score, draws) for name, score in scores.items()}


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
