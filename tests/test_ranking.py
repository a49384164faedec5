import numpy as np
import pytest

from dbp_bench.reporting.ranking import holm, pairwise, permutation, ranks_with_ties
from dbp_bench.reporting.statistics import Score


def score(right: float, images: int = 200, start: int = 0) -> Score:
    """Right on a fraction `right` of the images, from image `start` on."""
    hit = {(start + i) % images for i in range(round(right * images))}
    return Score([int(i in hit) for i in range(images)], 1)


def test_holms_rule() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_far_apart_is_an_order_and_equal_is_a_tie() -> None:
    ranks = ranks_with_ties(
        {"a": score(0.9), "b": score(0.5), "c": score(0.5, start=50), "d": score(0.1)}
    )
    assert {name: str(standing) for name, standing in ranks.items()} == {
        "a": "1",
        "b": "2-3",
        "c": "2-3",
        "d": "4",
    }
    assert list(ranks) == ["a", "b", "c", "d"]


def test_the_test_is_paired() -> None:
    """Ten images of 200: far within either interval, but all on one side."""
    better = ranks_with_ties({"a": score(0.55), "b": score(0.5)})
    assert [str(s) for s in better.values()] == ["1", "2"]
    # The same accuracies, on images that hardly overlap, tell nothing.
    tied = ranks_with_ties({"a": score(0.55), "b": score(0.5, start=100)})
    assert [str(s) for s in tied.values()] == ["1-2", "1-2"]


def test_a_tie_need_not_be_transitive() -> None:
    ranks = ranks_with_ties({"a": score(0.53), "b": score(0.51), "c": score(0.49)})
    assert {name: str(standing) for name, standing in ranks.items()} == {
        "a": "1-2",
        "b": "1-3",
        "c": "2-3",
    }


def test_more_pairs_make_it_harder() -> None:
    """What two defenses alone would be told apart by is not enough among many."""
    two = {"a": score(0.53), "b": score(0.5)}
    alone = pairwise(two)["a", "b"]
    assert 0.001 < alone < 0.05
    many = two | {f"c{i}": score(0.5, start=i) for i in range(1, 9)}
    assert pairwise(many)["a", "b"] > 0.05


def test_draws_of_different_numbers() -> None:
    nine = Score([9] * 100 + [0] * 100, 9)
    assert [str(s) for s in ranks_with_ties({"a": nine, "b": score(0.5)}).values()] == ["1-2"] * 2


def test_the_level_is_kept_where_nothing_differs() -> None:
    rng = np.random.default_rng(0)
    p = [
        pairwise({n: Score(rng.integers(0, 2, 60).tolist(), 1) for n in "ab"})["a", "b"]
        for _ in range(60)
    ]
    assert sum(x <= 0.05 for x in p) <= 8
    assert min(p) > 0


def test_what_cannot_be_ranked() -> None:
    assert ranks_with_ties({}) == {}
    assert str(ranks_with_ties({"a": score(0.5)})["a"]) == "1"
    with pytest.raises(ValueError, match="same images"):
        ranks_with_ties({"a": score(0.5), "b": score(0.5, images=100)})
    with pytest.raises(ValueError, match="no image"):
        ranks_with_ties({"a": Score([], 1), "b": Score([], 1)})


def test_ranks_follow_from_the_test_that_compares_two() -> None:
    rng = np.random.default_rng(1)
    a, b = (Score(rng.integers(0, 10, 80).tolist(), 9) for _ in "ab")
    assert pairwise({"a": a, "b": b})["a", "b"] == permutation(a, b)
    # Three images of 200, all on one side: a coin does so once in four times.
    few = {"a": score(0.515), "b": score(0.5)}
    assert pairwise(few)["a", "b"] == 0.25
