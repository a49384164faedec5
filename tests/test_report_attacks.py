"""What a report says of attacks: flags, packages' verdicts, third parties against ours, sweeps."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from dbp_bench.checks import conformance
from dbp_bench.errors import BadResult, NotComparable
from dbp_bench.reporting import sanity as flags
from dbp_bench.reporting.findings import Findings, Flag, Measured, findings_path
from dbp_bench.reporting.leaderboard import Leaderboard, Row, leaderboard
from dbp_bench.reporting.records import load
from dbp_bench.reporting.rendering import in_words
from dbp_bench.reporting.report import write_leaderboards
from dbp_bench.reporting.statistics import Bootstrap, Estimate
from dbp_bench.result import Result
from records import BOTH, IMAGES, TRACK, attacked, make, matrix, outcomes, save, table

SQUARE = {"n_queries": 500, "p_init": 0.8, "eot": 5}
TRANSFER = {
    "source": "none",
    "search": {
        **{"attack": "pgd", "steps": 20, "step_size": 0.25, "eot": 1},
        **{"loss": "ce", "random_start": False, "restarts": 1},
    },
}
PGD = {"alpha": 0.05, "steps": 20}
EFFORT: dict[str, Any] = {"effort": {"budget": 500}, "evaluations": (500, 0)}
BLACK_BOX: dict[str, Any] = {"gradient": None, "evaluations": (0, 500)}


def square(robust: float, **changes: Any) -> Result:
    changes = {"effort": SQUARE, **BLACK_BOX, **changes}
    return attacked("both", "square", robust, attack="square", **changes)


def lf(label: str, robust: float, **changes: Any) -> Result:
    effort = {"steps": 20, "eot": 10, "band": 0.5}
    return attacked("both", label, robust, attack="lf", effort=effort, **changes)


def board(folder: Path, *results: Result) -> Leaderboard:
    return leaderboard(load(save(folder, *matrix(), *results)))


def both(folder: Path, *results: Result) -> Row:
    return next(row for row in board(folder, *results).rows if row.defense == "both")


def instead(folder: Path, result: Result) -> Row:
    """The row where `result` stands in place of the matrix's own of that setting."""
    own = [r for r in matrix() if r.path(folder) != result.path(folder)]
    kept = own if result.gradient == "exact" else []
    found = leaderboard(load(save(folder, *kept, result)))
    return next(row for row in found.rows if row.defense == result.defense)


def named(row: Row) -> dict[str, list[str]]:
    return {check.name: list(check.tested) for check in row.checks}


# --- Flags ----------------------------------------------------------------------------------------


def test_what_was_not_tested_is_said(tmp_path: Path) -> None:
    """No flag because nothing was found is not the same as because nothing was tested."""
    row = both(tmp_path)
    assert row.flags == []
    assert named(row) == {
        "null attack": ["null/standard"],
        "conformance": [],
        "gradient": [],
        "zero gradients": [],
        "convergence": [],
        "more knowledge": ["eot/standard", "dwbox/standard"],
        "known draws": ["dw-fwd/standard", "dw-rev/standard", "dwbox/standard"],
        "black box": [],
        "more effort": [],
        "other attacks": [],
        "sweeps": [],
    }
    write_leaderboards(tmp_path, tmp_path / "out")
    text = (tmp_path / "out" / f"{TRACK}.md").read_text()
    line = next(line for line in text.splitlines() if "| none *(control)* |" in line)
    assert line.endswith("| checks not tested |")
    tests = table(tmp_path / "out" / f"{TRACK}.csv", "defense").loc["both", "tests"]
    assert "null attack: no finding (null/standard); " in tests
    assert "black box: not tested; " in tests


def test_a_black_box_that_does_better(tmp_path: Path) -> None:
    row = both(tmp_path, square(0.4))
    (flag,) = row.flags
    bootstrap = Bootstrap(IMAGES)
    gap = bootstrap.mean([-int(16 <= i < 26) for i in range(IMAGES)], 1)
    difference = bootstrap.estimate(gap).percent(sign=True)
    assert difference.startswith("-25.0 [")
    assert flag.startswith(
        f"eot/square, which follows no gradient, finds {difference} points against "
        "eot/standard, the strongest"
    )
    assert "masked" in flag
    assert named(row)["black box"] == ["eot/square"]


@pytest.mark.parametrize("left", [0.625, 0.65, 0.9])
def test_a_black_box_that_does_no_better(tmp_path: Path, left: float) -> None:
    """One image of 40 is within the interval."""
    row = both(tmp_path, square(left))
    assert (row.flags, named(row)["black box"]) == ([], ["eot/square"])


def test_transfer_is_a_black_box_too(tmp_path: Path) -> None:
    transfer = attacked(
        *("both", "transfer", 0.3), attack="transfer", effort=TRANSFER, evaluations=(0, 0)
    )
    assert [flag.split(",")[0] for flag in both(tmp_path, transfer).flags] == ["eot/transfer"]


def test_a_black_box_is_known_by_what_it_evaluated(tmp_path: Path) -> None:
    """Square of a package is one, whatever gradient the run could have followed; its PGD isn't."""
    row = both(
        tmp_path,
        attacked("both", "ta-square", 0.6, attack="torchattacks:Square", evaluations=(0, 9)),
        attacked("both", "ta-pgd", 0.1, attack="torchattacks:PGD", effort=PGD),
    )
    assert named(row)["black box"] == ["eot/ta-square"]
    (flag,) = row.flags
    assert flag.startswith("eot/standard: another attack, eot/ta-pgd, finds")


def test_a_black_box_below_our_own_attack_but_not_below_the_strongest(tmp_path: Path) -> None:
    """That shows a weak search, not a masked gradient."""
    row = both(tmp_path, square(0.4), lf("lf", 0.2))
    flag, other = row.flags
    assert flag.startswith(
        "eot/standard: its search has not converged: eot/square, which follows no gradient"
    )
    assert "masked" not in flag
    assert other.startswith("eot/standard: another attack, eot/lf, finds")


def test_a_black_box_that_knows_more_shows_nothing(tmp_path: Path) -> None:
    """Knowing the forward noise, it stands against what knows the same: 60 %, not 65 %."""
    row = both(tmp_path, square(0.6, knows=["forward"]))
    assert (row.flags, named(row)["black box"]) == ([], ["dw-fwd/square"])
    (flag,) = both(tmp_path, square(0.1, knows=["forward"])).flags
    assert "against dw-fwd/standard" in flag


def more(robust: float, **changes: Any) -> Result:
    """Our own attack with a budget of 500."""
    changes = {"effort": {"budget": 500}, "evaluations": (500, 0), **changes}
    return attacked("both", "long", robust, attack="standard", **changes)


def test_more_effort_of_the_same_attack(tmp_path: Path) -> None:
    row = both(tmp_path, more(0.4))
    (flag,) = row.flags
    assert flag.startswith(
        "eot/standard: its search has not converged: eot/long, with 500 gradient evaluations "
        "against 200"
    )
    assert "finds -25.0 [" in flag
    assert named(row)["more effort"] == ["eot/long"]
    assert both(tmp_path, more(0.625)).flags == []


@pytest.mark.parametrize(
    ("changes", "counts"),
    [
        ({"evaluations": (200, 0)}, False),
        ({"evaluations": (199, 10_000)}, False),
        ({"evaluations": (201, 0)}, True),
        ({"gradient": "bpda"}, False),
        ({"attack": "lf"}, False),
        ({"attack": "apgd"}, False),
        ({"eps": 1.0}, False),
        ({"knows": list(BOTH), "evaluations": (200, 0)}, False),
        ({"knows": list(BOTH), "evaluations": (201, 0)}, True),
    ],
)
def test_what_is_more_effort(tmp_path: Path, changes: dict[str, Any], counts: bool) -> None:
    row = both(
        tmp_path, attacked("both", "other", 0.1, **{"attack": "standard", **EFFORT, **changes})
    )
    assert bool(named(row)["more effort"]) == counts
    assert any("not converged" in flag for flag in row.flags) == counts


def test_another_attack_that_does_better(tmp_path: Path) -> None:
    """The leaderboard's number is an upper bound, and a lower one is known."""
    row = both(tmp_path, lf("smooth", 0.4))
    (flag,) = row.flags
    assert flag.startswith("eot/standard: another attack, eot/smooth, finds -25.0 [")
    assert named(row)["other attacks"] == ["eot/smooth"]
    row = both(tmp_path, lf("smooth", 0.625))
    assert (row.flags, named(row)["other attacks"]) == ([], ["eot/smooth"])
    # What is held against ours elsewhere, as a black box or as more of the same, isn't twice.
    rest = both(tmp_path / "rest", square(0.6), more(0.625))
    assert named(rest)["other attacks"] == []


def test_conformance(tmp_path: Path) -> None:
    record = {"checks": {"replays exactly": "pass"}, "gradient": None}
    row = instead(tmp_path, make("both", "eot", 0.65, conformance=record))
    assert (row.flags, named(row)["conformance"]) == ([], ["eot/standard"])
    record = {"checks": {"replays exactly": "two evaluations differ"}, "gradient": None}
    row = instead(tmp_path, make("both", "eot", 0.65, conformance=record))
    (flag,) = row.flags
    assert flag.startswith(
        "the defense fails a conformance check in eot/standard: replays exactly: "
    )
    assert row.checked.startswith("conformance failed: replays exactly; ")


def checked(errors: list[float | None], cosine: list[float | None], **changes: Any) -> Result:
    check = {"ids": [0, 1], "difference_errors": errors, "cosine": cosine}
    record = {"checks": {}, "gradient": check}
    return make("both", "eot", 0.65, conformance=record, **changes)


@pytest.mark.parametrize(
    ("result", "says"),
    [
        (checked([1e-6, 2e-6], [1.0, 1.0]), None),
        (
            checked([1e-6, 0.031], [1.0, 1.0]),
            "off from finite differences by 0.031 in eot/standard",
        ),
        (
            checked([1e-6, 1e-6], [1.0, 0.98]),
            "the exact gradient, which .* only 0.98 in eot/standard",
        ),
        (checked([None, 1e-6], [None, 1.0]), r"no gradient on images .*\(eot/standard\)"),
    ],
)
def test_gradient_check(tmp_path: Path, result: Result, says: str | None) -> None:
    row = instead(tmp_path, result)
    assert named(row)["gradient"] == ["eot/standard"]
    assert len(row.flags) == (says is not None)
    if says is not None:
        (flag,) = row.flags
        assert re.search(says, flag)


@pytest.mark.parametrize("mode", ["bpda", "surrogate:2", "declared-surrogate"])
def test_a_number_of_another_gradient_says_so_in_its_row(tmp_path: Path, mode: str) -> None:
    """Nothing but the option --gradient tells it from the protocol's own number."""
    row = instead(tmp_path, checked([1e-6, 1e-6], [1.0, 0.7], gradient=mode))
    (flag,) = row.flags
    assert flag.startswith(f"the attack followed the gradient {mode} in eot/standard, not the def")
    assert row.checked.startswith(f"attacked along {mode}, not its own gradient; ")
    row = instead(tmp_path / "low", checked([1e-6, 1e-6], [0.9, -0.12], gradient=mode))
    assert re.search(f"the {mode} gradient, which .* only -0.12 in eot/standard", row.flags[0])
    assert row.checked.startswith(f"gradient check failed; attacked along {mode}, not its own")
    unchecked = instead(tmp_path / "unchecked", make("both", "eot", 0.65, gradient=mode))
    assert unchecked.checked.startswith(f"attacked along {mode}, not its own gradient; ")
    write_leaderboards(tmp_path / "unchecked", tmp_path / "out")
    for suffix in ("md", "csv", "tex", "html"):
        text = (tmp_path / "out" / f"{TRACK}.{suffix}").read_text()
        assert f"attacked along {mode}, not its own gradient" in text, suffix


def test_the_check_is_as_strict_as_conformance() -> None:
    assert flags.ERROR == conformance.TOLERANCE


# --- Sweeps ---------------------------------------------------------------------------------------


def swept(**changes: Any) -> Findings:
    values = [
        Measured(
            value=20,
            file="sweeps/standard/x.json",
            accuracy=Estimate(value=0.5, low=0.4, high=0.6),
            fall=None,
            zero_gradient=0.0,
        ),
        Measured(
            value=100,
            file=None,
            accuracy=Estimate(value=0.3, low=0.2, high=0.4),
            fall=Estimate(value=0.2, low=0.1, high=0.3),
            zero_gradient=0.0,
        ),
    ]
    table: dict[str, Any] = {
        **{"schema": 1, "track": TRACK, "defense": "both", "threat": "eot", "seed": 0},
        **{
            "attack": "standard",
            "axis": "steps",
            "standard": 20,
            "images": 16,
            "draws": 3,
            "chance": 0.1,
        },
        **{"values": values, "notes": ["the ball may be too small"]},
        "flags": [Flag(name="not-converged", message="accuracy falls from 50.0 to 30.0 %")],
    }
    return Findings(**table | changes)


def place(folder: Path, found: Findings) -> Path:
    names = (found.track, found.defense, found.threat)
    path = findings_path(folder, *names, found.attack, found.seed, found.axis)
    found.write(path)
    return path


def test_sweeps_are_found_shown_and_flagged(tmp_path: Path) -> None:
    results = save(tmp_path / "results", *matrix())
    place(results, swept())
    place(results, swept(defense="ddim-like", axis="eot", flags=[], notes=[]))
    place(results, swept(track="another"))
    place(results, swept(track="other")).write_text("not read")
    paths = write_leaderboards(results, tmp_path / "out")
    names = [path.name for path in paths]
    assert names[-2:] == [f"{TRACK}-sweeps.csv", f"{TRACK}-attacks.md"]
    rows = table(tmp_path / "out" / f"{TRACK}.csv", "defense")
    assert rows.loc["both", "flags"] == (
        "sweep of eot/standard over steps: accuracy falls from 50.0 to 30.0 %"
    )
    assert rows.loc["both", "tests"].endswith("sweeps: flagged (eot/standard steps)")
    assert rows.loc["ddim-like", "tests"].endswith("sweeps: no finding (eot/standard eot)")
    text = (tmp_path / "out" / f"{TRACK}-attacks.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("| both | eot"))
    assert "16 x 3 | 20 (its own): 50.0 [40.0, 60.0]; 100: 30.0 [20.0, 40.0] |" in line
    assert "**not-converged**: accuracy falls" in line
    assert "undecided: the ball may be too small" in line
    assert "| ddim-like | eot | standard | 0 | eot |" in text
    found = table(tmp_path / "out" / f"{TRACK}-sweeps.csv", "defense", "value")
    assert found["fall"].dropna().to_dict() == {("both", 100): 0.2, ("ddim-like", 100): 0.2}
    assert len(found) == 4


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ({"track": 3}, "track"),
        ({"chance": "NaN"}, "chance"),
        ({"schema": 2}, "schema"),
        ({"more": 1}, "more: is unknown"),
        ({"threat": "dwbox"}, r"not where it belongs.*both/dwbox/standard/seed-0-steps\.json"),
    ],
)
def test_findings_that_cannot_be_right(tmp_path: Path, damage: dict[str, Any], says: str) -> None:
    results = save(tmp_path / "results", *matrix())
    path = place(results, swept())
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    with pytest.raises(BadResult, match=says) as refused:
        write_leaderboards(results, tmp_path / "out")
    assert "\n" not in str(refused.value)
    assert str(path) in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_numbers_of_findings_are_finite(tmp_path: Path) -> None:
    path = place(tmp_path, swept())
    path.write_text(path.read_text().replace("0.5", "NaN"))
    with pytest.raises(BadResult, match="NaN is not a number"):
        Findings.read(path)


# --- Packages -------------------------------------------------------------------------------------


def test_the_packages_own_verdict(tmp_path: Path) -> None:
    """Half of the draws are right on every image, and the package's single draw on a quarter."""
    verdict = [[i < 10] for i in range(IMAGES)]
    robust = [[draw < 2 for draw in range(4)] for _ in range(IMAGES)]
    rand = attacked("both", "rand", robust, attack="autoattack:rand", package_robust=verdict)
    known = attacked(
        *("both", "autoattack-standard", outcomes(0.25, 3)),
        attack="autoattack:standard",
        knows=list(BOTH),
        package_robust=outcomes(0.25, 3),
    )
    save(tmp_path, *matrix(), rand, known, square(0.7))
    write_leaderboards(tmp_path, tmp_path / "out")
    rows = table(tmp_path / "out" / f"{TRACK}-attacks.csv", "knows", "attack")
    hidden = rows.loc["none", "rand"]
    assert hidden[["robust", "package_verdict", "package_gap"]].tolist() == [0.5, 0.25, -0.25]
    bootstrap = Bootstrap(IMAGES)
    gap = bootstrap.estimate(bootstrap.mean([2 * (i < 10) - 1 for i in range(IMAGES)], 2))
    assert hidden[["package_gap_lo", "package_gap_hi"]].tolist() == pytest.approx(
        [gap.low, gap.high]
    )
    assert rows.loc["none"].drop("rand")["package_gap"].isna().all()
    assert rows.loc[("all", "autoattack-standard"), "package_gap"] == 0
    text = (tmp_path / "out" / f"{TRACK}-attacks.md").read_text()
    line = next(x for x in text.splitlines() if x.startswith("| both | none | eot | rand | 25.0 ["))
    assert line.endswith(f"| 50.0 [42.0, 58.0] | {gap.percent(sign=True)} |")
    assert "| both | all | dwbox | autoattack-standard | 25.0 [" in text
    assert "p^(n + 1)" in text


def ta(robust: float, gradient: int, forward: int = 0, **changes: Any) -> Result:
    """PGD of a package."""
    return attacked(
        *("both", "ta", robust),
        attack="torchattacks:PGD",
        effort=PGD,
        evaluations=(gradient, forward),
        **changes,
    )


def duel(folder: Path, *results: Result) -> Any:
    save(folder, *matrix(), *results)
    write_leaderboards(folder, folder / "out")
    return table(folder / "out" / f"{TRACK}-third-party.csv", "defense", "attack")


def test_third_parties_against_ours(tmp_path: Path) -> None:
    """They stand beside the strongest of ours with at most as many evaluations, image by image."""
    fair = attacked("both", "fair", 0.5, evaluations=(350, 50))
    weaker = attacked("both", "weaker", 0.6, evaluations=(10, 0))
    strong = attacked("both", "strong", 0.05, evaluations=(350, 51))
    also = attacked("both", "also", 0.05, attack="autoattack:rand", evaluations=(1, 0))
    row = duel(tmp_path, ta(0.25, 300, 100), fair, weaker, strong, also).loc["both", "ta"]
    keys = ["robust", "gradient_evaluations", "forward_evaluations", "evaluations"]
    assert row[keys].tolist() == [0.25, 300, 100, 400]
    assert row[["ours_threat", "ours_attack", "ours_robust"]].tolist() == ["eot", "fair", 0.5]
    assert row[["difference", "lower"]].tolist() == [-0.25, True]
    assert pd.isna(row["why"])
    bootstrap = Bootstrap(IMAGES)
    gap = bootstrap.mean([-int(10 <= i < 20) for i in range(IMAGES)], 1)
    assert row["difference_lo"] == pytest.approx(bootstrap.estimate(gap).low)
    names = [f"{TRACK}/both/eot/{label}/seed-0.json" for label in ("ta", "fair")]
    assert row["results"].split() == names
    text = (tmp_path / "out" / f"{TRACK}-attacks.md").read_text()
    line = next(x for x in text.splitlines() if x.startswith("| both | none | eot | ta | 25.0 ["))
    assert "| 400 | eot | fair | 50.0 [" in line
    assert line.endswith("| **yes** |")
    assert "Of 2 comparisons, the third-party attack leaves less" not in text
    assert "Of 1 comparisons, the third-party attack leaves less" in text
    assert "interval in 1." in text


def test_a_third_party_within_the_interval(tmp_path: Path) -> None:
    row = duel(tmp_path, ta(0.625, 2000)).loc["both", "ta"]
    assert row[["ours_attack", "difference", "lower"]].tolist() == ["standard", -0.025, False]


def test_of_a_tie_the_one_with_fewer_evaluations(tmp_path: Path) -> None:
    cheap = attacked("both", "z", 0.65, evaluations=(10, 0))
    assert duel(tmp_path, ta(0.9, 2000), cheap).loc[("both", "ta"), "ours_attack"] == "z"


def test_nothing_to_hold_against_a_third_party(tmp_path: Path) -> None:
    counts = {"gradient": None, "forward": None, "nfe": 0, "searched_nfe": None}
    free = [
        make("free", "eot", 0.2, sites=["s"]).model_dump(by_alias=True) | {"evaluations": counts},
        attacked("free", "ta", 0.3, attack="torchattacks:PGD", sites=["s"]).model_dump(
            by_alias=True
        )
        | {"evaluations": counts},
    ]
    alone = attacked("alone", "ta", 0.3, attack="torchattacks:PGD", sites=["s"])
    rows = duel(tmp_path, ta(0.3, 5, 5), *map(Result.model_validate, free), alone)
    assert rows["why"].to_dict() == {
        ("alone", "ta"): "no attack of ours with this knowledge",
        ("both", "ta"): "none of ours has as few evaluations (the fewest: 200)",
        ("free", "ta"): "evaluations were not recorded",
    }
    assert rows[["ours_robust", "difference", "lower"]].isna().all(axis=None)
    assert pd.isna(rows.loc[("free", "ta"), "gradient_evaluations"])
    text = (tmp_path / "out" / f"{TRACK}-attacks.md").read_text()
    assert "| none of ours has as few evaluations (the fewest: 200) |" in text
    assert "Of 0 comparisons" in text


def test_a_third_party_that_knows_the_same_only(tmp_path: Path) -> None:
    row = duel(tmp_path, ta(0.1, 600, knows=list(BOTH))).loc["both", "ta"]
    assert (row["knows"], row["ours_threat"]) == ("all", "dwbox")


# --- Effort ---------------------------------------------------------------------------------------


def test_effort_in_words() -> None:
    effort = {"steps": 20, "step_size": 0.25, "targets": None}
    assert in_words(effort | {"eot": 10, "random_start": False}) == (
        "20 steps, step size 0.25 eps, EoT-10, no random start"
    )
    assert in_words(TRANSFER).startswith("source none, search pgd (20 steps, step size 0.25 eps,")
    assert in_words(PGD) == "20 steps, alpha 0.05"
    members = [{"attack": "apgd", "steps": 5, "targets": None}, {"attack": "square", "eot": 2}]
    assert in_words({"members": members}) == "members apgd (5 steps) and square (EoT-2)"


def test_equal_efforts_are_folded_and_a_transfer_makes_no_query(tmp_path: Path) -> None:
    transfer: dict[str, Any] = {"attack": "transfer", "effort": TRANSFER, "evaluations": (0, 0)}
    others = [
        *(attacked(d, "transfer", 0.8, **transfer, gradient=None) for d in ("a", "both")),
        *(make("a", "eot", 0.9), make("a", "dwbox", 0.5)),
        attacked("both", "long", 0.7, evaluations=(7, 3)),
        attacked("a", "long", 0.7, evaluations=(8, 3)),
    ]
    save(tmp_path, *matrix(), *others)
    write_leaderboards(tmp_path, tmp_path / "out")
    text = (tmp_path / "out" / f"{TRACK}-attacks.md").read_text()
    shown, effort = text.split("## Effort")
    assert effort.count("| none | eot | transfer |") == 1
    assert "| a, both: no query |" in effort
    assert "| a: 8 + 3; both: 7 + 3 |" in effort
    assert "{" not in effort
    assert shown.count("(no query)") == 2
    assert "(0x)" not in text


def test_what_a_surrogate_takes_is_said(tmp_path: Path) -> None:
    counts = {"gradient": [10] * IMAGES, "forward": [0] * IMAGES, "nfe": 20, "searched_nfe": 5}
    fast = more(0.7, gradient="surrogate:5").model_dump(by_alias=True) | {"evaluations": counts}
    save(tmp_path, *matrix(), Result.model_validate(fast))
    write_leaderboards(tmp_path, tmp_path / "out")
    text = (tmp_path / "out" / f"{TRACK}-attacks.md").read_text()
    assert "gradient surrogate:5 | both: 10 + 0, of 5 NFE in place of 20 |" in text


def test_everything_is_the_same_again(tmp_path: Path) -> None:
    save(tmp_path, *matrix(), ta(0.25, 300, 100), square(0.1))
    place(tmp_path, swept())
    paths = write_leaderboards(tmp_path, tmp_path / "out")
    before = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in write_leaderboards(tmp_path, tmp_path / "out")] == before
    text = (tmp_path / "out" / f"{TRACK}-attacks.md").read_text()
    assert all(ord(character) < 128 for character in text)
    for block in text.split("\n\n"):
        if block.startswith("|"):
            assert len({line.count(" | ") for line in block.splitlines()}) == 1


def flow(robust: float, eps: float = 0.15, **changes: Any) -> Result:
    """StAdv, by mischance with the number that is the budget of the track."""
    effort = {"steps": 100, "flow": eps, "eot": 10}
    changes = {"effort": effort, "norm": "flow", "eps": eps, **changes}
    return attacked("both", "stadv", robust, attack="stadv", **changes)


def perceptual(robust: float, eps: float = 0.15, **changes: Any) -> Result:
    """LPIPS, by mischance with the number that is the budget of the track."""
    effort = {"network": "none", "layers": ["conv1", "conv2"], "distance": eps, "eot": 10}
    changes = {"attack": "lpips", "effort": effort, "norm": "lpips", "eps": eps, **changes}
    return attacked("both", "lpips", robust, **changes)


@pytest.mark.parametrize(
    ("make", "attack", "bound"),
    [(flow, "stadv", "flow 0.15"), (perceptual, "lpips", "lpips 0.15 of none: conv1, conv2")],
)
def test_an_attack_with_a_bound_of_its_own_stands_in_a_table_of_its_own(
    make: Callable[..., Result], attack: str, bound: str, tmp_path: Path
) -> None:
    """It moves no number, rank, flag or worst case, however little it leaves."""
    written: list[dict[str, str]] = []
    for name, more in (("without", []), ("with", [make(0.0), make(0.1, knows=list(BOTH))])):
        save(tmp_path / name, *matrix(), square(0.6), *more)
        write_leaderboards(tmp_path / name, tmp_path / "out" / name)
        files = [p for p in (tmp_path / "out" / name).iterdir() if p.suffix in (".md", ".csv")]
        written.append({p.name: p.read_text() for p in files})
    without, found = written
    assert without.keys() == found.keys()
    apart = (f"{TRACK}-results.csv", f"{TRACK}-attacks.md")
    assert {name for name in found if found[name] != without[name]} == set(apart)
    lines = found[apart[1]].splitlines()
    start = lines.index("## Attacks with a bound of their own")
    section = lines[start : start + 6]
    assert lines[:start] + lines[start + 9 :] == without[apart[1]].splitlines()
    assert section[4].startswith(f"| both | all | dwbox | {attack} | {bound} | 10.0 [")
    assert section[5].startswith(f"| both | none | eot | {attack} | {bound} | 0.0 [")
    rows = table(tmp_path / "out" / "with" / apart[0], "norm", "attack")
    assert set(rows.loc[bound.split()[0]].index) == {attack}
    assert attack not in rows.loc["linf"].index


def test_bounds_of_several_kinds_stand_beside_each_other(tmp_path: Path) -> None:
    """An attack from outside need not say by which option it names the network."""
    theirs = perceptual(0.2, attack="my:Own", setting=None, effort={"distance": 0.15})
    found = leaderboard(load(save(tmp_path, *matrix(), flow(0.3), perceptual(0.1), theirs)))
    bounds = {pool.bound for pool in found.apart}
    assert bounds == {"flow 0.15", "lpips 0.15 of none: conv1, conv2", "lpips 0.15"}
    alone = leaderboard(load(save(tmp_path / "alone", flow(0.3), perceptual(0.1))))
    assert [pool.any.norm for pool in alone.apart] == [
        {"flow": "lpips", "lpips": "flow"}[alone.norm]
    ]


def test_results_of_a_bound_of_its_own_alone_make_a_board(tmp_path: Path) -> None:
    found = leaderboard(load(save(tmp_path, flow(0.3, 0.05))))
    assert (found.norm, found.eps, found.apart) == ("flow", 0.05, [])


def test_images_of_a_bound_of_its_own_must_be_those_of_the_track(tmp_path: Path) -> None:
    labels = [(i + 1) % 10 for i in range(IMAGES)]
    with pytest.raises(NotComparable, match="labels"):
        board(tmp_path, flow(0.3, labels=labels))
