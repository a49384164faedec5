"""Votes, worst cases and the worst of several attacks, on models whose chances are known."""

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from math import comb, erf, sqrt

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dbp_bench.defense import Defense
from dbp_bench.evaluation import predict
from dbp_bench.reporting.statistics import Bootstrap, Estimate, Score, proportion
from dbp_bench.reporting.votes import (
    METRICS,
    Tally,
    plurality,
    votes,
    worst,
    worst_hidden,
    worst_known,
)
from dbp_bench.result import NO_MAJORITY, NOT_RECORDED
from toys import Linear, Noisy, uniform

Chances = NDArray[np.float64]
Outcomes = Sequence[Sequence[bool]]


def tally(*tables: Outcomes, noisy: bool = True) -> Tally:
    """Predictions of one class where they are right, and of one other where they are wrong."""
    predicted = [1 - np.array(table, dtype=np.int64) for table in tables]
    return Tally(predicted, [0] * len(tables[0]), noisy=noisy)


def estimates(*tables: Outcomes, noisy: bool = True) -> dict[str, Estimate]:
    """Each metric of two classes, all of which there are."""
    found = tally(*tables, noisy=noisy).estimates
    return {name: estimate for name, estimate in found.items() if estimate is not None}


def outcomes(chances: Chances, draws: int, rng: np.random.Generator) -> Outcomes:
    """Right with each image's own chance, each draw on its own."""
    table: Outcomes = (rng.random((len(chances), draws)) < chances[:, None]).tolist()
    return table


def truth(metric: str, p: Chances, draws: int) -> float:
    """The expectation of a metric over images whose chances are `p`."""
    k = votes(draws)
    tail = sum(comb(k, j) * p**j * (1 - p) ** (k - j) for j in range((k + 1) // 2, k + 1))
    values = {"mean": p, "plurality": tail, "worst_3": p**3, "worst_all": p**draws}
    return float(np.mean(values[metric]))


def spread(n: int, rng: np.random.Generator) -> Chances:
    """Two kinds of images, as attacks leave them: most mostly wrong, some mostly right."""
    kind = rng.random(n) < 0.6
    chances: Chances = np.where(kind, rng.beta(0.5, 2, n), rng.beta(6, 1, n))
    return chances


# --- Formulas -------------------------------------------------------------------------------------


@pytest.mark.parametrize("draws", [1, 4, 5])
def test_a_worst_case_is_that_of_draws_without_replacement(draws: int) -> None:
    for right in range(draws + 1):
        row = [True] * right + [False] * (draws - right)
        for k in range(1, draws + 1):
            drawn = list(combinations(row, k))
            numerators, whole = worst(k, draws)
            assert numerators[right] / whole == pytest.approx(np.mean([all(d) for d in drawn]))


def wins(drawn: Sequence[int], label: int) -> bool:
    """Whether more of these draws predict the label than any other class."""
    counts = Counter(each for each in drawn if each != NO_MAJORITY)
    others = [count for each, count in counts.items() if each != label]
    return counts[label] > max(others, default=0)


def test_a_vote_is_that_of_draws_without_replacement() -> None:
    """Counted over all choices of k draws, for all kinds of predictions of seven draws."""
    rng = np.random.default_rng(10)
    rows = rng.integers(NO_MAJORITY, 4, (60, 7)).tolist()
    for row in [*rows, [0] * 7, [1] * 7, [NO_MAJORITY] * 7]:
        for k in range(1, 8):
            voted = [wins(drawn, 0) for drawn in combinations(row, k)]
            assert plurality(row, 0, k) == sum(voted)


def test_a_vote_is_unbiased() -> None:
    """Three classes with known chances: the mean over results of 5 draws is that of 3 new ones."""
    rng = np.random.default_rng(11)
    chances = [0.4, 0.35, 0.25]
    expected = np.mean([wins(row, 0) for row in rng.choice(3, (40_000, 3), p=chances).tolist()])
    found = [
        plurality(row, 0, 3) / comb(5, 3) for row in rng.choice(3, (8000, 5), p=chances).tolist()
    ]
    assert abs(np.mean(found) - expected) < 4 * np.std(found) / sqrt(8000) + 0.005


def test_ties_are_wrong_and_two_classes_avoid_them() -> None:
    assert plurality([0, 0, 1, 1], 0, 4) == 0
    assert plurality([0, 0, 1, 2], 0, 4) == 1
    assert plurality([0, 1, 2], 0, 3) == 0
    assert plurality([0, NO_MAJORITY, NO_MAJORITY], 0, 3) == 1
    assert [votes(draws) for draws in (1, 2, 3, 8, 9)] == [1, 1, 3, 7, 9]


def test_a_class_that_was_not_recorded_cannot_vote() -> None:
    with pytest.raises(ValueError, match="not recorded"):
        plurality([0, NOT_RECORDED], 0, 1)
    found = Tally([np.array([[0, 0, 0], [0, NOT_RECORDED, 0]])], [0, 0], noisy=True)
    assert found.score("plurality") is None
    assert found.score("worst_3") is not None


@pytest.mark.parametrize("p", [0.0, 0.3, 0.9, 1.0])
def test_each_metric_is_unbiased(p: float) -> None:
    draws = 9
    chance = [comb(draws, x) * p**x * (1 - p) ** (draws - x) for x in range(draws + 1)]
    every = tally([[j < x for j in range(draws)] for x in range(draws + 1)])
    for name in METRICS:
        score = every.score(name)
        assert score is not None
        found = sum(c * right / score.trials for c, right in zip(chance, score.right, strict=True))
        assert found == pytest.approx(truth(name, np.array([p]), draws)), name


def test_a_stochastic_model_whose_chances_are_known() -> None:
    """Noise on the input of a linear classifier: right with the normal distribution's chance."""
    n, draws, sigma = 400, 9, 0.25
    weight = torch.linspace(-1, 1, 16, dtype=torch.float64)
    images = uniform(n, 1, 4, 4, dtype=torch.float64)
    linear = Linear(weight)
    logit = linear.score(images).detach().numpy()
    labels = torch.arange(n) % 2
    margin = np.where(labels.numpy() == 1, logit, -logit) / (sigma * float(weight.norm()))
    p = np.array([(1 + erf(z / sqrt(2))) / 2 for z in margin])
    defense = Defense(Noisy(sigma, 0), linear, [])
    seen = [predict(defense, images, range(n), seed=0, draw=draw) for draw in range(draws)]
    found = Tally([torch.stack(seen, 1).numpy()], labels.tolist(), noisy=True)
    for name in METRICS:
        score = found.score(name)
        assert score is not None
        values = np.array(score.right) / score.trials
        # Of these images, so that only the draws are by chance.
        error = values.mean() - truth(name, p, draws)
        assert abs(error) < 4 * values.std() / sqrt(n), name
        assert 0.1 < truth(name, p, draws) < 0.6, "a test at the edge would show nothing"


@pytest.mark.parametrize("number", [0, 4])
def test_more_draws_than_there_are_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match=f"{number} of 3 draws"):
        worst(number, 3)
    with pytest.raises(ValueError, match=f"{number} of 3 draws"):
        plurality([0, 0, 1], 0, number)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="not of the same images x draws"):
        tally([[True], [True]], [[True]])


# --- Intervals ------------------------------------------------------------------------------------


def test_intervals_cover_the_truth() -> None:
    """95 % of intervals should, or more; 150 of them leave 3 standard errors of 1.8 points."""
    rng = np.random.default_rng(0)
    n, draws, times = 120, 9, 150
    p = spread(200_000, rng)
    expected = {name: truth(name, p, draws) for name in METRICS}
    covered = dict.fromkeys(METRICS, 0)
    for _ in range(times):
        table = outcomes(spread(n, rng), draws, rng)
        for name, estimate in estimates(table).items():
            covered[name] += estimate.low <= expected[name] <= estimate.high
    for name, times_covered in covered.items():
        assert times_covered / times >= 0.91, name


def test_without_noise_one_draw_is_as_good_as_any() -> None:
    table = [[i < 30] for i in range(40)]
    found = tally(table, noisy=False)
    expected = proportion(Score([int(row[0]) for row in table], 1))
    assert (found.draws, found.votes) == (None, None)
    assert list(found.estimates.values()) == [expected] * len(METRICS)


def test_draws_that_agree_leave_images_alone_to_resample() -> None:
    table = [[i < 30] * 9 for i in range(40)]
    expected = proportion(Score([int(i < 30) for i in range(40)], 1))
    found = tally(table)
    assert (found.draws, found.votes) == (9, 9)
    assert list(found.estimates.values()) == [expected] * len(METRICS)


def test_too_few_draws_are_blank() -> None:
    found = tally([[True, False]] * 10)
    assert found.votes == 1
    assert found.estimates["worst_3"] is None
    assert found.estimates["worst_all"] is not None
    assert found.estimates["worst_all"].value == 0


def test_seeds_are_attacked_anew_and_not_pooled() -> None:
    """A seed's draws never evaluate another's images: half of the seeds have a worst case of 1."""
    found = estimates([[True] * 4] * 20, [[False] * 4] * 20)
    assert {name: estimate.value for name, estimate in found.items()} == dict.fromkeys(METRICS, 0.5)


def test_seeds_of_an_image_go_together() -> None:
    """Images differ, seeds don't: two seeds tell little more about images than one."""
    rng = np.random.default_rng(3)
    p = np.where(rng.random(200) < 0.5, 0.95, 0.05)
    tables = [outcomes(p, 9, rng) for _ in range(2)]
    widths = []
    for kept in (tables[:1], tables):
        estimate = estimates(*kept)["mean"]
        widths.append(estimate.high - estimate.low)
    assert widths[1] == pytest.approx(widths[0], rel=0.1)


def test_same_numbers_every_time() -> None:
    table = outcomes(spread(50, np.random.default_rng(4)), 9, np.random.default_rng(5))
    first, again = (tally(table).estimates for _ in range(2))
    assert first == again


def hidden(attacks: Sequence[Outcomes]) -> Score:
    return worst_hidden([np.array(table) for table in attacks])


def known(attacks: Sequence[Outcomes]) -> Score:
    return worst_known([np.array(table) for table in attacks])


# --- Several attacks ------------------------------------------------------------------------------


def test_worst_of_equal_attacks_is_not_too_low() -> None:
    """The smallest mean of five attacks, all of which leave a half, is far below a half."""
    rng = np.random.default_rng(6)
    n, draws = 2000, 9
    attacks = [outcomes(np.full(n, 0.5), draws, rng) for _ in range(5)]
    naive = np.asarray(attacks).mean(2).min(0).mean()
    error = 0.5 / sqrt(n * draws)
    assert naive < 0.5 - 20 * error
    assert abs(hidden(attacks).mean - 0.5) < 4 * error


def test_worst_case_finds_the_stronger_attack_of_each_image() -> None:
    rng = np.random.default_rng(7)
    n = 1000
    first = np.where(np.arange(n) % 2 == 0, 0.05, 0.95)
    found = hidden([outcomes(first, 9, rng), outcomes(1 - first, 9, rng)])
    assert found.mean == pytest.approx(0.05, abs=0.01)


def test_ties_go_to_the_attack_that_is_stronger_elsewhere() -> None:
    """On the first image the draws that choose see no difference; on the other they do."""
    weak: list[list[bool]] = [[False, True, False, False], [True] * 4]
    strong: list[list[bool]] = [[False] * 4, [False] * 4]
    for attacks in ([weak, strong], [strong, weak]):
        assert hidden(attacks).right == [0, 0]


def test_one_attack_and_the_order_of_attacks() -> None:
    rng = np.random.default_rng(8)
    attacks = [outcomes(np.full(50, p), 9, rng) for p in (0.3, 0.4, 0.5)]
    assert hidden(attacks[:1]).mean == pytest.approx(np.mean(attacks[0]))
    assert hidden(attacks).right == hidden(attacks[::-1]).right
    assert hidden([attacks[0]] * 3).mean == pytest.approx(np.mean(attacks[0]))


def test_worst_case_of_known_draws_is_the_minimum_of_each() -> None:
    attacks: list[Outcomes] = [[[True, False, True]], [[True, True, False]]]
    found = known(attacks)
    assert (list(found.right), found.trials) == ([1], 3)
    estimate = Bootstrap(1).estimate(Bootstrap(1).mean(*found))
    assert estimate.value == pytest.approx(1 / 3)


def test_worst_case_refuses_other_images_and_one_draw() -> None:
    with pytest.raises(ValueError, match="one draw"):
        hidden([[[True]], [[False]]])
    for worst_case in (hidden, known):
        with pytest.raises(ValueError, match="not of the same images x draws"):
            worst_case([[[True, True]], [[True, True]] * 2])
        with pytest.raises(ValueError, match="not of the same"):
            worst_case([])
