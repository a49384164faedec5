import json
from itertools import pairwise
from math import comb
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from dbp_bench.errors import BadRequest, BadResult, NotComparable
from dbp_bench.reporting.compare import (
    Comparisons,
    compare,
    in_words,
    mcnemar,
    side,
    to_table,
)
from dbp_bench.reporting.ranking import permutation
from dbp_bench.reporting.statistics import Score
from records import IMAGES, TRACK, attacked, make, matrix, save

if TYPE_CHECKING:
    from conftest import Command


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return save(tmp_path / "results", *matrix())


def between(a: str, b: str, results: Path, track: str | None = None) -> Comparisons:
    return compare(side(a, results, track), side(b, results, track))


# --- The tests themselves -------------------------------------------------------------------------


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (5, 0), (1, 6), (8, 8), (3, 12)])
def test_mcnemar_is_the_sign_test_of_the_images_that_differ(only_a: int, only_b: int) -> None:
    a = [True] * only_a + [False] * only_b + [True, False]
    b = [False] * only_a + [True] * only_b + [True, False]
    ids = list(range(100, 100 + len(a)))
    found = mcnemar(ids, a, b)
    assert list(found.only_a) == ids[:only_a]
    assert list(found.only_b) == ids[only_a : only_a + only_b]
    n = only_a + only_b
    want = sum(comb(n, k) for k in range(n + 1) if min(k, n - k) <= min(only_a, only_b)) / 2**n
    assert found.p == pytest.approx(want)


def test_permutation_exact_where_few_images_differ() -> None:
    assert permutation(Score([1, 1, 1, 1, 1], 1), Score([0, 0, 0, 0, 0], 1)) == 2 / 2**5
    assert permutation(Score([1, 0, 1], 1), Score([1, 0, 1], 1)) == 1.0
    # 3 of 4 draws against 1 of 2, twice: half of all four exchanges are as far from 0.
    assert permutation(Score([3, 3], 4), Score([1, 1], 2)) == 0.5


def test_permutation_by_chance_agrees_with_the_sign_test() -> None:
    a, b = [1] * 25 + [0] * 10, [0] * 25 + [1] * 10
    exact = mcnemar(range(35), [bool(x) for x in a], [bool(x) for x in b]).p
    assert permutation(Score(a, 1), Score(b, 1)) == pytest.approx(exact, abs=0.003)
    assert permutation(Score([1] * 60, 1), Score([0] * 60, 1)) == 1 / 20001


# --- What two names mean --------------------------------------------------------------------------


def test_two_threats_of_a_defense(results: Path) -> None:
    (pair,) = between("both/eot", "both/dwbox", results).pairs
    assert [pair.a.robust.estimate.value, pair.b.robust.estimate.value] == [0.65, 0.25]
    assert pair.difference.value == pytest.approx(0.4)
    assert pair.difference.low < 0.4 < pair.difference.high
    assert pair.clean.value == 0
    # The first 65 % of the images against the first 25 %.
    assert list(pair.mcnemar.only_a) == list(range(10, 26))
    assert list(pair.mcnemar.only_b) == []
    assert pair.mcnemar.p == 2 / 2**16
    assert any("knows no draw of A, forward and reverse of B" in note for note in pair.notes)
    assert any("4 draws, B on 3" in note for note in pair.notes)
    assert not any("unequal effort" in note for note in pair.notes)


def test_two_defenses_meet_in_the_threats_that_both_have(results: Path) -> None:
    found = between("both", "ddim-like", results)
    assert [pair.a.any.threat for pair in found.pairs] == ["dwbox", "eot"]
    assert all(pair.a.any.threat == pair.b.any.threat for pair in found.pairs)
    assert found.unmatched == [f"{threat}, only in both" for threat in ("dw-fwd", "dw-rev", "null")]
    assert all(pair.adjusted >= pair.permutation for pair in found.pairs)


def test_two_attacks_meet_in_the_defenses_that_both_have(results: Path) -> None:
    save(
        results,
        attacked("both", "apgd", 0.5),
        attacked("ddim-like", "apgd", 0.4, sites=["forward"]),
    )
    found = between("eot/apgd", "eot/standard", results)
    assert [p.a.any.defense for p in found.pairs] == ["both", "ddim-like"]
    assert [p.difference.value for p in found.pairs] == pytest.approx([-0.15, -0.15])
    assert "unequal effort: attack apgd and standard" in "; ".join(found.pairs[0].notes)
    alone = between("apgd", "dwbox/standard", results)
    assert [(p.a.setting, p.b.setting) for p in alone.pairs] == [("eot/apgd", "dwbox/standard")] * 2
    (pair,) = between("both/eot/apgd", "both/eot/standard", results).pairs
    assert pair.difference.value == pytest.approx(-0.15)


def test_without_an_attack_it_is_the_protocols_own(results: Path) -> None:
    """Where there is a result of that; others are compared when they are named."""
    save(
        results,
        attacked("both", "apgd", 0.5),
        attacked("ddim-like", "apgd", 0.4, sites=["forward"]),
        attacked("third", "apgd", 0.3),
    )
    found = between("both/eot", "ddim-like/eot", results)
    assert [pair.a.setting for pair in found.pairs] == ["eot/standard"]
    assert in_words(found)[-1] == "not compared unless named, as both/eot/apgd: attacks apgd"
    everywhere = between("both", "ddim-like", results)
    assert [pair.a.setting for pair in everywhere.pairs] == ["dwbox/standard", "eot/standard"]
    (named,) = between("both/eot/apgd", "ddim-like/eot/apgd", results).pairs
    assert named.a.setting == "eot/apgd"
    assert [pool.setting for pool in side("third", results, None).pools.values()] == ["eot/apgd"]


def test_two_threats_meet_in_the_defenses_that_both_have(results: Path) -> None:
    found = between("eot", "dwbox", results)
    assert [pair.a.any.defense for pair in found.pairs] == ["both", "ddim-like"]
    assert found.unmatched == ["none, only in eot"]


def test_files_and_folders(results: Path, tmp_path: Path) -> None:
    base = results / TRACK / "both"
    by_file = between(
        str(base / "eot/standard/seed-0.json"), str(base / "dwbox/standard/seed-0.json"), results
    )
    assert (
        by_file.pairs[0].difference
        == between("both/eot", "both/dwbox", results).pairs[0].difference
    )
    other = save(tmp_path / "other", make("both", "eot", 0.5), make("both", "dwbox", 0.25))
    found = between(str(results), str(other), tmp_path)
    assert [(p.a.any.threat, p.difference.value) for p in found.pairs] == [
        ("dwbox", 0),
        ("eot", pytest.approx(0.15)),
    ]
    # Sweeps are of other budgets, and unfinished work is no result.
    save(results / "sweeps" / "eps-0.3", make("both", "eot", 0.1, eps=0.3))
    save(results / ".work", make("both", "eot", 0.1, eps=0.3))
    again = between(str(results), str(other), tmp_path)
    assert [p.difference for p in again.pairs] == [p.difference for p in found.pairs]


def test_seeds_are_taken_together(tmp_path: Path) -> None:
    folder = save(
        tmp_path,
        *(make(d, "eot", r, seed=s) for d, r in (("a", 0.5), ("b", 0.25)) for s in (0, 1)),
    )
    (pair,) = between("a", "b", folder).pairs
    assert pair.a.seeds == [0, 1]
    assert pair.difference.value == 0.25
    save(tmp_path, make("a", "eot", 0.5, seed=2))
    with pytest.raises(NotComparable, match=r"seeds \[0, 1, 2\] and \[0, 1\]"):
        between("a", "b", folder)


def test_ties_of_draws_count_as_wrong(tmp_path: Path) -> None:
    half = [[True, True, False, False]] * IMAGES
    more = [[True, True, True, False]] * IMAGES
    folder = save(tmp_path, make("a", "eot", more), make("b", "eot", half))
    (pair,) = between("a", "b", folder).pairs
    assert len(pair.mcnemar.only_a) == IMAGES


def test_efforts_that_differ_are_said(results: Path) -> None:
    save(results, make("both", "pgd20-eot", 0.6), make("both", "whitebox", 0.7))
    (pair,) = between("both/pgd20-eot", "both/whitebox", results).pairs
    assert any("unequal effort: eot" in note for note in pair.notes)


# --- What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"eps": 0.2}, "eps 0.15 and 0.2"),
        ({"norm": "l2"}, "norm linf and l2"),
        ({"track": "other"}, "track toy-linf and other"),
        ({"ids": list(range(1, IMAGES + 1))}, "ids"),
        ({"labels": [0] * IMAGES}, "labels"),
        ({"draws": 5}, "draws"),
    ],
)
def test_what_may_not_be_compared(changes: dict[str, object], said: str, tmp_path: Path) -> None:
    a = save(tmp_path / "a", make("both", "eot", 0.5))
    b = save(tmp_path / "b", make("both", "eot", 0.5, **changes))  # type: ignore[arg-type]
    with pytest.raises(NotComparable, match="cannot be compared") as error:
        between(str(a), str(b), tmp_path)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_defense_without_noise_has_one_draw_for_any(tmp_path: Path) -> None:
    folder = save(tmp_path, make("both", "eot", 0.5), make("none", "eot", 0.1, sites=(), draws=1))
    (pair,) = between("both", "none", folder).pairs
    assert pair.difference.value == pytest.approx(0.4)


def test_names_that_mean_nothing(results: Path, tmp_path: Path) -> None:
    for name, said in {
        "bot": "Did you mean 'both'",
        "both/eott": "Did you mean 'eot'",
        "nobody/eot": "no file, folder, defense, threat or attack 'nobody'",
        "missing.json": "no such file",
        "both/eot/standrd": "Did you mean 'standard'",
        "ddim-like/dw-fwd": "has no such result",
        "a/b/c/d": "no such file",
    }.items():
        with pytest.raises(BadRequest, match=said):
            side(name, results, None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadRequest, match="no results"):
        side(str(tmp_path / "empty"), results, None)
    with pytest.raises(BadResult, match="no results"):
        side("both", tmp_path / "empty", None)
    save(results, make("both", "eot", 0.5, track="other"))
    with pytest.raises(NotComparable, match="--track"):
        side("both", results, None)
    assert side("both", results, TRACK).pools


def test_nothing_in_common(tmp_path: Path) -> None:
    folder = save(
        tmp_path,
        *(make("a", threat, 0.5) for threat in ("eot", "dwbox")),
        *(make("b", threat, 0.5) for threat in ("whitebox", "null")),
    )
    with pytest.raises(
        NotComparable, match="no setting in common: a has a/dwbox/standard, a/eot/standard; b has"
    ):
        between("a", "b", folder)


# --- What is said ---------------------------------------------------------------------------------


def test_the_command(results: Path, command: "Command") -> None:
    where = ("--results", results, "--track", TRACK)
    said = command("compare", "both/eot", "both/dwbox", *where)
    assert said.code == 0
    assert "A - B: +40.0" in said.out
    assert "16 images only A, 0 only B" in said.out
    assert "and 4 more" in said.out
    table = json.loads(command("compare", "both", "ddim-like", *where, "--json").out)
    assert [each["a"]["threat"] for each in table["comparisons"]] == ["dwbox", "eot"]
    assert table["comparisons"][1]["only_a_right"] == list(range(22, 26))
    refused = command("compare", "both", "nobody", *where)
    assert (refused.code, refused.err.count("\n")) == (2, 1)


def test_words_and_table_agree(results: Path) -> None:
    found = between("both", "ddim-like", results)
    table = to_table(found)
    assert len(table["comparisons"]) == 2  # type: ignore[arg-type]
    assert sum(line.startswith("A - B") for line in in_words(found)) == 2
    assert all(a != "" or b != "" for a, b in pairwise(in_words(found)))
