"""Reports on effort: the test of convergence, and the attack to use."""

from pathlib import Path
from typing import Any

import pytest

from dbp_bench.errors import NotComparable
from dbp_bench.reporting.attacks import attack_curves
from dbp_bench.reporting.effort import Curve
from dbp_bench.reporting.leaderboard import Leaderboard, Row, leaderboard
from dbp_bench.reporting.records import load, load_sweeps
from dbp_bench.reporting.report import write_leaderboards
from dbp_bench.reporting.statistics import Bootstrap
from dbp_bench.result import Result
from records import BOTH, IMAGES, TRACK, attacked, doubled, make, matrix, outcomes, save, table

PASSED: dict[str, Any] = {
    "zero_gradient": [False] * IMAGES,
    "conformance": {
        "checks": {"replays exactly": "pass"},
        "gradient": {"ids": [0], "difference_errors": [1e-6], "cosine": [1.0]},
    },
}


def board_of(folder: Path) -> Leaderboard:
    return leaderboard(load(folder), swept=load_sweeps(folder, [TRACK]))


def both(folder: Path) -> Row:
    return next(row for row in board_of(folder).rows if row.defense == "both")


def cells(row: Row) -> dict[str, str]:
    return {each.column: each.verdict for each in row.convergence}


# --- Convergence ----------------------------------------------------------------------------------


def test_twice_the_budget_beside_each_cell(tmp_path: Path) -> None:
    """The white-box cell stays, the DW-box cell loses one image of 40, the others have no sweep."""
    save(tmp_path, *matrix())
    doubled(tmp_path, make("both", "eot", 0.65), make("both", "dwbox", 0.225))
    row = both(tmp_path)
    assert cells(row) == {
        "hidden": "converged",
        "forward_known": "not tested",
        "reverse_known": "not tested",
        "all_known": "not converged",
    }
    assert "not converged: DW-box (-2.5)" in row.checked
    assert "convergence not tested: forward known, reverse known" in row.checked
    write_leaderboards(tmp_path, tmp_path / "out")
    rows = table(tmp_path / "out" / f"{TRACK}-convergence.csv", "defense", "column")
    known = rows.loc["both", "all_known"]
    assert known[["robust", "twice", "difference"]].tolist() == [0.25, 0.225, -0.025]
    bootstrap = Bootstrap(IMAGES)
    gap = bootstrap.estimate(bootstrap.mean([-int(i == 9) for i in range(IMAGES)], 1))
    assert known[["difference_lo", "difference_hi"]].tolist() == pytest.approx([gap.low, gap.high])
    assert known[["budget", "images", "gradient_evaluations"]].tolist() == [200, IMAGES, 200]
    assert rows.loc[("both", "forward_known"), "verdict"] == "not tested"
    assert rows["difference"].notna().sum() == 2
    # One result serves all columns of a defense without noise, and is tested once.
    assert list(rows.loc["none"].index) == ["hidden"]
    text = (tmp_path / "out" / f"{TRACK}.md").read_text()
    line = next(x for x in text.splitlines() if "| both | DW-box | 200 |" in x)
    assert "| -2.5 [" in line
    assert line.endswith("| not converged |")
    assert rows.loc[("both", "hidden"), "results"].split() == [
        f"{TRACK}/both/eot/standard/seed-0.json",
        f"sweeps/budget-400/{TRACK}/both/eot/standard/seed-0.json",
    ]


def test_the_interval_of_the_fall_counts(tmp_path: Path) -> None:
    """One draw of one image is 0.6 points, within 1, but other images could give 1.9."""
    robust = outcomes(0.65, 4)
    less = [[*row] for row in robust]
    less[0][0] = False
    save(tmp_path, make("both", "eot", robust), make("both", "dwbox", 0.25))
    doubled(tmp_path, make("both", "eot", less))
    row = both(tmp_path)
    assert cells(row) == {"hidden": "not converged", "all_known": "not tested"}
    assert row.checked.startswith("not converged: white-box (-0.6, interval to -1.9)")


def test_a_rise_is_no_fall(tmp_path: Path) -> None:
    save(tmp_path, make("both", "eot", 0.65))
    doubled(tmp_path, make("both", "eot", 0.9))
    assert cells(both(tmp_path)) == {"hidden": "converged"}


def test_a_row_is_raised_until_it_has_converged(tmp_path: Path) -> None:
    """The white-box cell falls at 400 and not at 800; the DW-box cell, which stays, goes along."""
    known = make("both", "dwbox", 0.25, **PASSED)
    save(tmp_path, make("both", "eot", 0.65, **PASSED), known, make("both", "null", 1.0))
    doubled(tmp_path, make("both", "eot", 0.5, **PASSED), known)
    assert both(tmp_path).checked == (
        "budget 400 (200 left up to 15.0 more); convergence not tested"
    )
    doubled(tmp_path, make("both", "eot", 0.5, **PASSED), known, budget=800)
    board = board_of(tmp_path)
    (row,) = board.rows
    assert row.budget == 400
    assert row.checked == "budget 400 (200 left up to 15.0 more); all passed"
    hidden, stochasticity = row.estimates["hidden"], row.estimates["stochasticity"]
    assert hidden is not None
    assert stochasticity is not None
    assert (hidden.value, stochasticity.value) == (0.5, 0.25)
    assert [(each.own.any.effort["budget"], each.verdict) for each in row.convergence] == [
        (200, "not converged"),
        (200, "converged"),
        (400, "converged"),
        (400, "converged"),
    ]
    # The results that it began with count as a sweep's.
    files = [record.name for pool, _ in board.pools for record in pool.records]
    assert [name.partition("/")[0] for name in files] == ["sweeps", "sweeps", TRACK]
    assert sorted(pool.any.effort["budget"] for pool in board.swept) == [200, 200, 800, 800]
    write_leaderboards(tmp_path, tmp_path / "out")
    shown = table(tmp_path / "out" / f"{TRACK}.csv", "defense").loc["both"]
    assert (shown["hidden"], shown["effort"]) == (0.5, '{"budget": 400}')
    text = (tmp_path / "out" / f"{TRACK}.md").read_text()
    assert "| budget 400 (200 left up to 15.0 more); all passed |" in text


def test_a_raised_row_may_have_more_seeds(tmp_path: Path) -> None:
    """It takes the seeds that all of its cells have at the larger budget, not those of a few."""
    known = make("both", "dwbox", 0.25)
    save(tmp_path, make("both", "eot", 0.65), known)
    again: dict[str, Any] = {"seed": 1}
    doubled(tmp_path, make("both", "eot", 0.5), make("both", "eot", 0.4, **again), known)
    assert both(tmp_path).budget is None
    doubled(tmp_path, make("both", "dwbox", 0.25, **again))
    row = both(tmp_path)
    assert row.budget == 400
    hidden, stochasticity = row.estimates["hidden"], row.estimates["stochasticity"]
    assert hidden is not None
    assert stochasticity is not None
    assert round(hidden.value, 9) == 0.45
    assert round(stochasticity.value, 9) == 0.2


def test_all_passed(tmp_path: Path) -> None:
    results = [
        make("both", "eot", 0.65, **PASSED),
        make("both", "dwbox", 0.25, **PASSED),
        make("both", "null", 1.0),
    ]
    save(tmp_path, *results)
    assert both(tmp_path).checked == "convergence not tested"
    doubled(tmp_path, *results[:2])
    row = both(tmp_path)
    assert row.checked == "all passed"
    assert row.flags == []


def test_a_missing_check_is_said_once(tmp_path: Path) -> None:
    save(tmp_path, *matrix())
    assert both(tmp_path).checked == (
        "conformance, gradient, zero gradients, convergence not tested"
    )
    board = board_of(save(tmp_path / "bare", make("both", "eot", 0.5)))
    assert board.rows[0].checked == "checks not tested"


@pytest.mark.parametrize("changes", [{"budget": 300}, {"budget": 800}])
def test_only_twice_the_budget_counts(tmp_path: Path, changes: dict[str, int]) -> None:
    save(tmp_path, make("both", "eot", 0.65))
    doubled(tmp_path, make("both", "eot", 0.1), **changes)
    assert cells(both(tmp_path)) == {"hidden": "not tested"}


def test_a_sweep_on_fewer_images_is_paired_on_those(tmp_path: Path) -> None:
    """The first 20 images are right at the budget, 19 of them at twice the budget."""
    save(tmp_path, make("both", "eot", 0.65))
    doubled(tmp_path, make("both", "eot", outcomes(0.95, 2, 20), draws=2, ids=list(range(20))))
    row = both(tmp_path)
    (found,) = row.convergence
    assert found.images == 20
    assert found.difference is not None
    assert round(found.difference.value, 9) == -0.05
    assert row.budget is None


def test_a_sweep_of_other_weights_is_refused(tmp_path: Path) -> None:
    save(tmp_path, *matrix())
    doubled(tmp_path, make("both", "eot", 0.5, options={"t_star": 5}))
    with pytest.raises(NotComparable, match=r"options\.t_star missing and 5.*Run the sweep again"):
        write_leaderboards(tmp_path, tmp_path / "out")


# --- Which attack to use --------------------------------------------------------------------------


def curves_of(folder: Path, *results: Result) -> dict[str, Curve]:
    save(folder, *results)
    (group,) = attack_curves(board_of(folder))
    return {curve.attack: curve for curve in group}


def own(robust: Any = 0.5, evaluations: int = 20) -> Result:
    return make("both", "eot", robust, evaluations=(evaluations, 0))


def other(label: str, robust: Any, evaluations: int, **changes: Any) -> Result:
    return attacked("both", label, robust, evaluations=(evaluations, 0), **changes)


def test_areas_by_hand(tmp_path: Path) -> None:
    """The range is 20 to 2,000: two decades, in which the clean accuracy is 1.

    The own attack leaves 0.5 over both, and another one 0.25 over the second: areas 1 and 0.75
    decades, of 0.5 + 0.75.
    """
    found = curves_of(tmp_path, own(), other("late", 0.25, 200))
    assert {name: curve.optimality for name, curve in found.items()} == {
        "standard": pytest.approx(1 / 1.25),
        "late": pytest.approx(0.75 / 1.25),
    }
    assert found["standard"].own
    assert list(found) == ["late", "standard"]


def test_outside_the_range_of_efforts(tmp_path: Path) -> None:
    """An attack that needs more finds nothing in it; one that needs less counts from its start."""
    found = curves_of(tmp_path, own(), other("large", 0.1, 2001), other("small", 0.5, 1))
    assert found["large"].optimality == 0
    assert found["small"].optimality == found["standard"].optimality == 1
    assert found["large"].difference is None
    assert found["large"].best.accuracy == 0.1


def test_ties(tmp_path: Path) -> None:
    """Fewest evaluations are best where accuracies are equal; equal curves are equal."""
    found = curves_of(
        tmp_path,
        own(0.5, 200),
        other("a", 0.5, 200),
        other("a", 0.5, 300, threat="pgd20-eot", knows=[]),
    )
    assert len(found["a"].points) == 2
    assert found["a"].best.evaluations == 200
    assert found["a"].optimality == found["standard"].optimality == 1
    assert found["a"].lower is False


def test_more_effort_that_leaves_more_changes_nothing(tmp_path: Path) -> None:
    save(tmp_path, own(), other("late", 0.25, 200))
    doubled(tmp_path, own(0.9, 40))
    (group,) = attack_curves(board_of(tmp_path))
    standard = next(curve for curve in group if curve.own)
    assert [point.evaluations for point in standard.points] == [20, 40]
    assert standard.optimality == pytest.approx(0.8)


def test_a_sweep_on_fewer_images_is_placed_by_its_fall(tmp_path: Path) -> None:
    """On the first 20 images it falls from 1 to 0.9: 0.4 where the own result on 40 has 0.5."""
    save(tmp_path, own(), other("late", 0.25, 200))
    fewer = make(*("both", "eot", outcomes(0.9, 4, 20)), ids=list(range(20)), evaluations=(40, 0))
    doubled(tmp_path, fewer)
    (group,) = attack_curves(board_of(tmp_path))
    standard = next(curve for curve in group if curve.own)
    assert [round(point.accuracy, 9) for point in standard.points] == [0.5, 0.4]


def test_whether_another_attack_is_below_ours(tmp_path: Path) -> None:
    results = (own(), other("low", 0.25, 2000), other("near", 0.475, 200))
    found = curves_of(tmp_path, *results)
    low, near = found["low"], found["near"]
    assert (low.lower, near.lower, found["standard"].lower) == (True, False, None)
    assert low.difference is not None
    assert low.difference.value == -0.25
    write_leaderboards(tmp_path, tmp_path / "out")
    text = (tmp_path / "out" / f"{TRACK}-attacks.md").read_text()
    assert (
        "Of 2 comparisons with standard, another attack at up to 10 times its budget of 200 leaves "
        "less by more than the paired interval in 1 (low on both)."
    ) in text
    assert f"![Accuracy against effort]({TRACK}-attacks.svg)" in text
    assert "| both | **standard** | 1 | 50.0 | 20 | 0.98+ |" in text
    rows = table(tmp_path / "out" / f"{TRACK}-optimality.csv", "attack")
    assert rows["points"].to_dict() == {"standard": 1, "low": 1, "near": 1}
    assert rows["lower"].to_dict()["low"] in (True, "True")
    for end in ("svg", "pdf"):
        assert (tmp_path / "out" / f"{TRACK}-attacks.{end}").stat().st_size > 1000
    checked = both(tmp_path).checked
    assert "low finds -25.0 at white-box" in checked


def test_known_draws_have_curves_of_their_own(tmp_path: Path) -> None:
    save(
        tmp_path,
        *matrix(),
        other("x", 0.6, 50),
        other("x", 0.2, 50, knows=list(BOTH)),
    )
    groups = attack_curves(board_of(tmp_path))
    assert [(group[0].defense, group[0].knows) for group in groups] == [
        ("both", "none"),
        ("both", "all"),
    ]


# --- Older results --------------------------------------------------------------------------------


def test_a_track_that_only_has_other_attacks(tmp_path: Path) -> None:
    """Its cells stay blank, and the page says which attack it has."""
    results = [
        make("both", "eot", 0.5, attack="pgd"),
        make("both", "dwbox", 0.25, attack="pgd"),
        make("none", "eot", 0.0, sites=(), attack="pgd"),
    ]
    write_leaderboards(save(tmp_path, *results), tmp_path / "out")
    row = table(tmp_path / "out" / f"{TRACK}.csv", "defense").loc["both"]
    assert row[["hidden", "all_known", "rank"]].isna().all()
    assert (row["clean"], row["checks"]) == (1, "not measured")
    said = "The protocol's attack, standard, was not run on this track. What was run instead (pgd)"
    for end in ("md", "html"):
        assert said.replace("'", "&#39;" if end == "html" else "'") in (
            (tmp_path / "out" / f"{TRACK}.{end}").read_text()
        )
    attacks = table(tmp_path / "out" / f"{TRACK}-attacks.csv", "defense", "knows")
    assert attacks.loc[("both", "none"), "robust"] == 0.5
