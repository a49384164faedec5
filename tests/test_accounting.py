"""Votes, worst cases and the worst of several attacks, on models whose chances are known."""

from itertools import combinations
from math import comb, erf, sqrt

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dbp_bench.defense import Defense
from dbp_bench.evaluate import Group, judge
from dbp_bench.noise import FORWARD
from dbp_bench.reporting.statistics import Bootstrap
from dbp_bench.reporting.votes import (
    METRICS,
    Tally,
    account,
    gaps,
    majority,
    mean,
    metrics,
    votes,
    worst,
    worst_hidden,
    worst_known,
)
from dbp_bench.result import Outcomes
from toys import Linear, Noisy, uniform

Chances = NDArray[np.float64]


def outcomes(chances: Chances, draws: int, rng: np.random.Generator) -> Outcomes:
    """Right with each image's own chance, each draw on its own."""
    table: Outcomes = (rng.random((len(chances), draws)) < chances[:, None]).tolist()
    return table


def truth(metric: str, p: Chances, draws: int) -> float:
    """The expectation of a metric over images whose chances are `p`."""
    k = votes(draws)
    tail = sum(comb(k, j) * p**j * (1 - p) ** (k - j) for j in range((k + 1) // 2, k + 1))
    values = {"mean": p, "majority": tail, "worst_3": p**3, "worst_all": p**draws}
    return float(np.mean(values[metric]))


def spread(n: int, rng: np.random.Generator) -> Chances:
    """Two kinds of images, as attacks leave them: most mostly wrong, some mostly right."""
    kind = rng.random(n) < 0.6
    chances: Chances = np.where(kind, rng.beta(0.5, 2, n), rng.beta(6, 1, n))
    return chances


# --- Formulas -------------------------------------------------------------------------------------


@pytest.mark.parametrize("draws", [1, 4, 5])
def test_each_metric_is_that_of_draws_without_replacement(draws: int) -> None:
    for right in range(draws + 1):
        row = [True] * right + [False] * (draws - right)
        for k in range(1, draws + 1):
            drawn = list(combinations(row, k))
            assert worst(k, draws)(right) == pytest.approx(np.mean([all(d) for d in drawn]))
            voted = [2 * sum(d) > len(d) for d in drawn]
            assert majority(k, draws)(right) == pytest.approx(np.mean(voted))


@pytest.mark.parametrize("p", [0.0, 0.3, 0.9, 1.0])
def test_each_metric_is_unbiased(p: float) -> None:
    draws = 9
    chance = [comb(draws, x) * p**x * (1 - p) ** (draws - x) for x in range(draws + 1)]
    for name, metric in metrics(draws, noisy=True).items():
        assert metric is not None
        found = sum(c * metric(x) for x, c in enumerate(chance))
        assert found == pytest.approx(truth(name, np.array([p]), draws)), name


def test_ties_are_wrong_and_votes_avoid_them() -> None:
    assert [majority(2, 2)(right) for right in range(3)] == [0, 0, 1]
    assert [votes(draws) for draws in (1, 2, 3, 8, 9)] == [1, 1, 3, 7, 9]


def test_a_stochastic_model_whose_chances_are_known() -> None:
    """Noise on the input of a linear classifier: right with the normal distribution's chance."""
    n, draws, sigma = 400, 9, 0.25
    weight = torch.linspace(-1, 1, 16, dtype=torch.float64)
    images = uniform(n, 1, 4, 4, dtype=torch.float64)
    linear = Linear(weight)
    score = linear.score(images).detach().numpy()
    labels = torch.arange(n) % 2
    margin = np.where(labels.numpy() == 1, score, -score) / (sigma * float(weight.norm()))
    p = np.array([(1 + erf(z / sqrt(2))) / 2 for z in margin])
    sites = frozenset({FORWARD})
    defense = Defense(Noisy(sigma, 0, sites), linear, [])
    group = Group(images, labels, range(n))
    seen = [judge(defense, images, group, seed=0, draw=draw) for draw in range(draws)]
    tally = Tally([torch.stack(seen, 1).tolist()])
    for name, metric in metrics(draws, noisy=True).items():
        assert metric is not None
        values = np.array(tally.per_image(metric)) / metric.denominator
        # Of these images, so that only the draws are by chance.
        error = values.mean() - truth(name, p, draws)
        assert abs(error) < 4 * values.std() / sqrt(n), name
        assert 0.1 < truth(name, p, draws) < 0.6, "a test at the edge would show nothing"


@pytest.mark.parametrize("number", [0, 4])
def test_more_draws_than_there_are_is_refused(number: int) -> None:
    for metric in (worst, majority):
        with pytest.raises(ValueError, match=f"{number} of 3 draws"):
            metric(number, 3)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="not of the same images x draws"):
        Tally([[[True], [True]], [[True]]])
    with pytest.raises(ValueError, match="other than 2 draws"):
        Tally([[[True, True]]]).apply(mean(3), np.ones((1, 4), dtype=np.int64))
    with pytest.raises(ValueError, match="for 3 images"):
        account([[[True]] * 2], Bootstrap(3), noisy=False)


# --- Intervals ------------------------------------------------------------------------------------


def test_intervals_cover_the_truth() -> None:
    """95 % of intervals should; 300 of them leave 4 standard errors of 1.3 points."""
    rng = np.random.default_rng(0)
    n, draws, times = 120, 9, 300
    p = spread(200_000, rng)
    expected = {name: truth(name, p, draws) for name in METRICS}
    bootstrap = Bootstrap(n, resamples=400)
    covered = dict.fromkeys(METRICS, 0)
    for _ in range(times):
        table = outcomes(spread(n, rng), draws, rng)
        for name, estimate in account([table], bootstrap, noisy=True).estimates.items():
            assert estimate is not None
            covered[name] += estimate.low <= expected[name] <= estimate.high
    for name, times_covered in covered.items():
        assert 0.90 <= times_covered / times <= 0.99, name


def test_redrawing_does_not_shift_what_repeating_outcomes_would() -> None:
    rng = np.random.default_rng(1)
    n, draws = 200, 9
    table = np.array(outcomes(spread(n, rng), draws, rng))
    tally, bootstrap = Tally([table.tolist()]), Bootstrap(n)
    redrawn = tally.redrawn(bootstrap)
    repeated = np.concatenate(
        [
            rng.permuted(row[rng.integers(0, draws, (200, draws))], axis=1).sum(1)[None]
            for row in table
        ]
    )
    for name, metric in metrics(draws, noisy=True).items():
        assert metric is not None
        replicates = tally.apply(metric, redrawn)
        width = replicates[1:].std()
        assert abs(replicates[1:].mean() - replicates[0]) < 0.2 * width, name
        if name == "worst_all":
            naive = np.mean(np.array(metric.numerators)[repeated] / metric.denominator)
            assert naive - replicates[0] > 1.5 * width


def test_intervals_count_the_noise_of_draws_once() -> None:
    """Every image alike: the spread of one draw is that of n M coins, not of twice as many."""
    rng = np.random.default_rng(2)
    n, draws = 300, 9
    tally = Tally([outcomes(np.full(n, 0.5), draws, rng)])
    replicates = tally.apply(mean(draws), tally.redrawn(Bootstrap(n)))
    assert replicates[1:].std() == pytest.approx(sqrt(0.25 / (n * draws)), rel=0.12)


def test_without_noise_one_draw_is_as_good_as_any() -> None:
    table = [[i < 30] for i in range(40)]
    bootstrap = Bootstrap(40)
    found = account([table], bootstrap, noisy=False)
    expected = bootstrap.estimate(bootstrap.mean([int(row[0]) for row in table], 1))
    assert (found.draws, found.votes) == (None, None)
    assert list(found.estimates.values()) == [expected] * len(METRICS)


def test_draws_that_agree_leave_images_alone_to_resample() -> None:
    table = [[i < 30] * 9 for i in range(40)]
    bootstrap = Bootstrap(40)
    expected = bootstrap.estimate(bootstrap.mean([int(i < 30) for i in range(40)], 1))
    found = account([table], bootstrap, noisy=True)
    assert (found.draws, found.votes) == (9, 9)
    assert list(found.estimates.values()) == [expected] * len(METRICS)


def test_too_few_draws_are_blank() -> None:
    found = account([[[True, False]] * 10], Bootstrap(10), noisy=True)
    assert found.votes == 1
    assert found.estimates["worst_3"] is None
    assert found.estimates["worst_all"] is not None
    assert found.estimates["worst_all"].value == 0


def test_seeds_are_attacked_anew_and_not_pooled() -> None:
    """Draws of one seed don't judge another's images: half of the seeds have a worst case of 1."""
    tables: list[Outcomes] = [[[True] * 4] * 20, [[False] * 4] * 20]
    found = account(tables, Bootstrap(20), noisy=True).estimates
    for name in METRICS:
        estimate = found[name]
        assert estimate is not None
        assert estimate.value == 0.5, name


def test_seeds_of_an_image_go_together() -> None:
    """Images differ, seeds don't: two seeds tell little more about images than one."""
    rng = np.random.default_rng(3)
    p = np.where(rng.random(200) < 0.5, 0.95, 0.05)
    tables = [outcomes(p, 9, rng) for _ in range(2)]
    bootstrap = Bootstrap(200)
    widths = []
    for kept in (tables[:1], tables):
        estimate = account(kept, bootstrap, noisy=True).estimates["mean"]
        assert estimate is not None
        widths.append(estimate.high - estimate.low)
    assert widths[1] == pytest.approx(widths[0], rel=0.1)


def test_seeds_share_an_images_chance_when_redrawn() -> None:
    """As uncertain as images with all their outcomes; with a chance for each seed, 9 % less so."""
    rng = np.random.default_rng(9)
    n = 600
    p = rng.random(n)
    tally = Tally([outcomes(p, 1, rng) for _ in range(4)])
    bootstrap = Bootstrap(n, resamples=4000)
    redrawn = tally.apply(mean(1), tally.redrawn(bootstrap))
    whole = bootstrap.mean(tally.right.sum(1), 4)
    assert redrawn[1:].std() == pytest.approx(whole[1:].std(), rel=0.045)


def test_same_numbers_every_time() -> None:
    table = outcomes(spread(50, np.random.default_rng(4)), 9, np.random.default_rng(5))
    first, again = (account([table], Bootstrap(50), noisy=True) for _ in range(2))
    assert first == again


# --- The null attack ------------------------------------------------------------------------------


def test_null_attack_is_held_against_every_metric() -> None:
    """Half of the images always right, then all images right half of the time: one mean."""
    n, draws = 40, 4
    clean: Outcomes = [[i % 2 == 0] * draws for i in range(n)]
    assert all(
        gap is not None and gap.value == gap.low == gap.high == 0
        for gap in gaps([clean], [clean], Bootstrap(n), noisy=True).values()
    )
    shuffled: Outcomes = [[draw % 2 == 0 for draw in range(draws)] for _ in range(n)]
    found = gaps([clean], [shuffled], Bootstrap(n), noisy=True)
    assert found["mean"] is not None
    assert found["worst_all"] is not None
    assert found["mean"].low <= 0 <= found["mean"].high
    assert (found["worst_all"].value, found["worst_all"].high < 0) == (-0.5, True)


# --- Several attacks ------------------------------------------------------------------------------


def test_worst_of_equal_attacks_is_not_too_low() -> None:
    """The smallest mean of five attacks, all of which leave a half, is far below a half."""
    rng = np.random.default_rng(6)
    n, draws = 2000, 9
    attacks = [outcomes(np.full(n, 0.5), draws, rng) for _ in range(5)]
    naive = np.asarray(attacks).mean(2).min(0).mean()
    error = 0.5 / sqrt(n * draws)
    assert naive < 0.5 - 20 * error
    assert abs(worst_hidden(attacks).mean - 0.5) < 4 * error


def test_worst_case_finds_the_stronger_attack_of_each_image() -> None:
    rng = np.random.default_rng(7)
    n = 1000
    first = np.where(np.arange(n) % 2 == 0, 0.05, 0.95)
    found = worst_hidden([outcomes(first, 9, rng), outcomes(1 - first, 9, rng)])
    assert found.mean == pytest.approx(0.05, abs=0.01)


def test_ties_go_to_the_attack_that_is_stronger_elsewhere() -> None:
    """On the first image the draws that choose see no difference; on the other they do."""
    weak: list[list[bool]] = [[False, True, False, False], [True] * 4]
    strong: list[list[bool]] = [[False] * 4, [False] * 4]
    for attacks in ([weak, strong], [strong, weak]):
        assert worst_hidden(attacks).numerators == [0, 0]


def test_one_attack_and_the_order_of_attacks() -> None:
    rng = np.random.default_rng(8)
    attacks = [outcomes(np.full(50, p), 9, rng) for p in (0.3, 0.4, 0.5)]
    assert worst_hidden(attacks[:1]).mean == pytest.approx(np.mean(attacks[0]))
    assert worst_hidden(attacks).numerators == worst_hidden(attacks[::-1]).numerators
    assert worst_hidden([attacks[0]] * 3).mean == pytest.approx(np.mean(attacks[0]))


def test_worst_case_of_known_draws_is_the_minimum_of_each() -> None:
    attacks: list[Outcomes] = [[[True, False, True]], [[True, True, False]]]
    found = worst_known(attacks)
    assert (list(found.numerators), found.denominator) == ([1], 3)
    estimate = Bootstrap(1).estimate(found.replicates(Bootstrap(1)))
    assert estimate.value == pytest.approx(1 / 3)


def test_worst_case_refuses_other_images_and_one_draw() -> None:
    with pytest.raises(ValueError, match="one draw"):
        worst_hidden([[[True]], [[False]]])
    for worst_case in (worst_hidden, worst_known):
        with pytest.raises(ValueError, match="not of the same images x draws"):
            worst_case([[[True, True]], [[True, True]] * 2])
        with pytest.raises(ValueError, match="not of the same"):
            worst_case([])
