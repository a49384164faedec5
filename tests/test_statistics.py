import math

import numpy as np
import pytest
from numpy.typing import NDArray

from dbp_bench.reporting.statistics import (
    RESAMPLES,
    Bootstrap,
    Estimate,
    Score,
    proportion,
    ratio,
)
from dbp_bench.reporting.votes import worst

Chances = NDArray[np.float64]


def test_constant_has_zero_width() -> None:
    bootstrap = Bootstrap(37)
    # Exactly: thirds are no binary fractions, and sums of them would differ in the last digit.
    assert bootstrap.estimate(bootstrap.mean([1] * 37, 3)) == Estimate(1 / 3, 1 / 3, 1 / 3)


def test_bernoulli_matches_normal_approximation() -> None:
    n, right = 400, 120
    bootstrap = Bootstrap(n)
    estimate = bootstrap.estimate(bootstrap.mean([1] * right + [0] * (n - right), 1))
    half = 1.96 * np.sqrt(0.3 * 0.7 / n)
    assert estimate.value == 0.3
    assert estimate.low == pytest.approx(0.3 - half, abs=0.006)
    assert estimate.high == pytest.approx(0.3 + half, abs=0.006)


def test_interval_leaves_a_fortieth_on_either_side() -> None:
    bootstrap = Bootstrap(5)
    replicates = np.concatenate([[0.0], np.random.default_rng(1).permutation(RESAMPLES)])
    estimate = bootstrap.estimate(replicates)
    assert (estimate.low, estimate.high) == (49, 1950)


def test_images_are_the_unit_not_draws() -> None:
    """Ten draws that agree on each image tell no more than one."""
    right = [1, 0] * 50
    one, ten = Bootstrap(100), Bootstrap(100)
    assert one.estimate(one.mean(right, 1)) == ten.estimate(ten.mean([10 * r for r in right], 10))


def test_differences_are_paired() -> None:
    """Two defenses right on the same images, but for a fixed gain, differ without doubt."""
    bootstrap = Bootstrap(100)
    low = bootstrap.mean([0, 5] * 50, 10)
    high = bootstrap.mean([3, 8] * 50, 10)
    gap = bootstrap.estimate(high - low)
    assert gap.high - gap.low == pytest.approx(0, abs=1e-12)
    assert gap.value == pytest.approx(0.3)


def test_same_numbers_every_time_and_others_for_another_seed() -> None:
    right = list(range(50))
    first, again, other = Bootstrap(50), Bootstrap(50), Bootstrap(50, seed=1)
    assert (first.mean(right, 50) == again.mean(right, 50)).all()
    assert not (first.mean(right, 50) == other.mean(right, 50)).all()


def test_ratio_is_blank_where_the_whole_may_be_nothing() -> None:
    bootstrap = Bootstrap(100)
    part = bootstrap.mean([1] * 20 + [0] * 80, 1)
    sure = bootstrap.mean([1] * 40 + [0] * 60, 1)
    share = ratio(part, sure)
    assert share is not None
    assert bootstrap.estimate(share).value == 0.5
    # One image of a hundred is missing from more than a third of the resamples.
    assert ratio(part, bootstrap.mean([1] + [0] * 99, 1)) is None
    assert ratio(part, -sure) is None


def test_real_values_are_averaged_to_a_billionth() -> None:
    bootstrap = Bootstrap(3)
    found = bootstrap.average([0.25, -1.5, 1 / 3])
    assert found[0] == pytest.approx((0.25 - 1.5 + 1 / 3) / 3, abs=1e-9)
    # On every machine the same: what is summed are integers.
    assert found * 3e9 == pytest.approx(np.round(found * 3e9), abs=1e-4)


def test_counts_too_large_for_a_float_are_rounded() -> None:
    bootstrap, trials = Bootstrap(4), math.comb(2000, 999)
    right = [trials, trials // 2, 0, trials // 4]
    found = bootstrap.mean(right, trials)
    assert found == pytest.approx(bootstrap.mean([4, 2, 0, 1], 4), abs=1e-9)


def test_all_reports_on_as_many_images_share_their_resamples() -> None:
    assert Bootstrap.of(7) is Bootstrap.of(7)
    assert (Bootstrap.of(7).mean([1] * 6 + [0], 1) == Bootstrap(7).mean([1] * 6 + [0], 1)).all()


def test_refuses_counts_of_other_images() -> None:
    with pytest.raises(ValueError, match="for 3 images"):
        Bootstrap(3).mean([1, 0], 1)
    with pytest.raises(ValueError, match="too few"):
        Bootstrap(0)


def test_percent() -> None:
    assert Estimate(0.466, 0.434, 0.499).percent() == "46.6 [43.4, 49.9]"
    assert Estimate(-0.0001, -0.02, 0.01).percent() == "0.0 [-2.0, 1.0]"
    assert Estimate(0.05, -0.02, 0.1).percent(sign=True) == "+5.0 [-2.0, 10.0]"


# --- Intervals of accuracies ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "images", "low", "high"),
    [
        # Clopper and Pearson's exact limits, as tables of the binomial distribution have them.
        (0, 10, 0.0, 0.308497),
        (1, 64, 0.000396, 0.084009),
        (5, 10, 0.187086, 0.812914),
        (10, 10, 0.691503, 1.0),
    ],
)
def test_one_draw_has_the_exact_binomial_interval(
    right: int, images: int, low: float, high: float
) -> None:
    found = proportion(Score([1] * right + [0] * (images - right), 1))
    assert found.value == right / images
    # The variance is over images - 1: the sample is worth one image less, inside.
    allowed = 0 if right in (0, images) else 0.02
    assert found.low == pytest.approx(low, abs=allowed + 1e-6)
    assert found.high == pytest.approx(high, abs=allowed + 1e-6)


def test_draws_that_agree_tell_no_more_than_one_and_others_do() -> None:
    one = proportion(Score([1, 0] * 50, 1))
    assert proportion(Score([9, 0] * 50, 9)) == one
    sure = proportion(Score([5, 4] * 50, 9))
    assert sure.high - sure.low < 0.5 * (one.high - one.low)


def test_an_interval_is_never_a_point_and_mirrors() -> None:
    for right in ([0] * 64, [1] + [0] * 63, [9] * 64, [8, 9] * 32):
        low, high = proportion(Score(right, 9)), proportion(Score([9 - r for r in right], 9))
        assert low.low <= low.value <= low.high
        assert low.high - low.low > 0.01
        assert (high.low, high.high) == pytest.approx((1 - low.high, 1 - low.low), abs=1e-8)


def _images(kind: str, n: int, rng: np.random.Generator) -> Chances:
    """The chances of `n` images to be right in a draw."""
    if kind == "all alike, 1.6 %":
        return np.full(n, 0.016)
    if kind == "1.6 % sure, others wrong":
        return (rng.random(n) < 0.016).astype(float)
    if kind == "few sure, few weak":
        return np.where(rng.random(n) < 0.02, 1.0, np.where(rng.random(n) < 0.05, 0.1, 0.0))
    if kind == "97 %":
        return np.full(n, 0.97)
    return rng.beta(*{"low": (0.1, 0.9), "even": (0.5, 0.5)}[kind], n)


@pytest.mark.slow
@pytest.mark.parametrize("images", [64, 360])
@pytest.mark.parametrize(
    "kind",
    ["all alike, 1.6 %", "1.6 % sure, others wrong", "few sure, few weak", "97 %", "low", "even"],
)
def test_intervals_hold_near_0_and_100_percent(kind: str, images: int) -> None:
    """Means over 9 draws, and the worst of 9 and of 3: 95 % or more of intervals cover the truth.

    1,000 samples have a standard error of 0.7 points; a bootstrap covers 33 to 84 % here.
    """
    rng = np.random.default_rng(0)
    many, draws, times = _images(kind, 1_000_000, rng), 9, 1_000
    truth = {1: many.mean(), 3: (many**3).mean(), 9: (many**9).mean()}
    covered = dict.fromkeys(truth, 0)
    for _ in range(times):
        right = rng.binomial(draws, _images(kind, images, rng)).tolist()
        for m, expected in truth.items():
            numerators, whole = worst(m, draws)
            found = proportion(Score([numerators[count] for count in right], whole), draws)
            covered[m] += found.low <= expected <= found.high
    assert min(covered.values()) >= 0.93 * times, covered
