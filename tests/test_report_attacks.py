"""What a report says of attacks: flags, packages' verdicts, packages against ours, sweeps."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

from dbp_bench.checks import conformance
from dbp_bench.errors import BadResult
from dbp_bench.reporting import sanity as flags
from dbp_bench.reporting.findings import Findings, Flag, Interval, Measured, findings_path
from dbp_bench.reporting.leaderboard import Leaderboard, Row, leaderboard
from dbp_bench.reporting.records import load
from dbp_bench.reporting.rendering import in_words
from dbp_bench.reporting.report import write_leaderboards
from dbp_bench.reporting.statistics import Bootstrap
from dbp_bench.result import Outcomes, Result
from records import BOTH, IMAGES, TRACK, apgd, attacks_table, make, matrix, outcomes, save

SQUARE = {"n_queries": 500, "p_init": 0.8, "eot": 5}
TRANSFER = {
    "source": "none",
    "search": {
        **{"attack": "pgd", "steps": 20, "step_size": 0.25, "eot": 1},
        **{"loss": "ce", "random_start": False, "restarts": 1},
    },
}
PGD = {"name": "PGD", "options": {"alpha": 0.05, "steps": 20}, "gradient": "exact"}


def attacked(threat: str, robust: float | Outcomes, attack: str, **changes: Any) -> Result:
    return apgd("both", threat, robust, attack=attack, **changes)


def square(robust: float, **changes: Any) -> Result:
    return attacked("square", robust, "square", effort=SQUARE, **changes)


def calls(gradient: int, other: int, draws: int = 4) -> dict[str, int]:
    """As recorded, for so many calls of the search of one image where draws are hidden."""
    judging = 20 * IMAGES * draws * 2 + IMAGES * other
    return {"per_purification": 20, "gradient": IMAGES * gradient, "judging": judging}


def board(folder: Path, *results: Result) -> Leaderboard:
    return leaderboard(load(save(folder, *matrix(), *results)))


def both(folder: Path, *results: Result) -> Row:
    return next(row for row in board(folder, *results).rows if row.defense == "both")


def looked(row: Row) -> dict[str, list[str]]:
    return {check.name: list(check.looked) for check in row.checks}


def csv_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# --- Flags ----------------------------------------------------------------------------------------


def test_what_was_not_looked_for_is_said(tmp_path: Path) -> None:
    """No flag because nothing was found is not the same as because nobody looked."""
    row = both(tmp_path)
    assert row.flags == []
    assert looked(row) == {
        "null attack": ["null"],
        "more knowledge": ["eot", "dwbox"],
        "zero gradients": [],
        "gradient check": [],
        "black box": [],
        "more effort": [],
        "other attacks": [],
        "sweeps": [],
    }
    write_leaderboards(tmp_path, tmp_path / "out")
    text = (tmp_path / "out" / f"{TRACK}.md").read_text()
    section = text.split("## Looked for")[1].split("\n\n")[1]
    assert "| both | no finding: null | no finding: eot, dwbox | not looked for |" in section
    # Of a deterministic defense both settings are one result, which shows nothing.
    assert "| none *(control)* | not looked for | not looked for |" in section
    (line,) = [r for r in csv_of(tmp_path / "out" / f"{TRACK}.csv") if r["defense"] == "both"]
    assert "null attack: no finding (null); " in line["checks"]
    assert "black box: not looked for; " in line["checks"]


def test_a_black_box_that_does_better(tmp_path: Path) -> None:
    row = both(tmp_path, square(0.4))
    (flag,) = row.flags
    bootstrap = Bootstrap(IMAGES)
    gap = bootstrap.mean([-int(16 <= i < 26) for i in range(IMAGES)], 1)
    difference = bootstrap.estimate(gap).percent(sign=True)
    assert difference.startswith("-25.0 [")
    assert flag.startswith(
        f"square, which follows no gradient, finds {difference} points against eot, the strongest"
    )
    assert "masked" in flag
    assert looked(row)["black box"] == ["square"]


@pytest.mark.parametrize("left", [0.625, 0.65, 0.9])
def test_a_black_box_that_does_no_better(tmp_path: Path, left: float) -> None:
    """One image of 40 is within the interval."""
    row = both(tmp_path, square(left))
    assert (row.flags, looked(row)["black box"]) == ([], ["square"])


def test_transfer_is_a_black_box_too(tmp_path: Path) -> None:
    row = both(tmp_path, attacked("transfer", 0.3, "transfer", effort=TRANSFER))
    assert [flag.split(",")[0] for flag in row.flags] == ["transfer"]


def test_square_of_a_package_is_a_black_box_and_its_pgd_is_none(tmp_path: Path) -> None:
    effort = PGD | {"name": "Square"}
    row = both(
        tmp_path,
        attacked("ta-square", 0.6, "torchattacks", effort=effort),
        attacked("ta-pgd", 0.1, "torchattacks", effort=PGD),
    )
    assert looked(row)["black box"] == ["ta-square"]
    (flag,) = row.flags
    assert flag.startswith("eot: another attack, ta-pgd, finds")


def test_a_black_box_below_our_own_attack_but_not_below_the_strongest(tmp_path: Path) -> None:
    """That shows a weak search, not a masked gradient."""
    lf = attacked("lf", 0.2, "lf", effort={"steps": 20, "eot": 10, "gradient": "exact"})
    row = both(tmp_path, square(0.4), lf)
    flag, other = row.flags
    assert flag.startswith("eot: its search has not converged: square, which follows no gradient")
    assert "masked" not in flag
    assert other.startswith("eot: another attack, lf, finds")


def test_a_black_box_that_knows_more_shows_nothing(tmp_path: Path) -> None:
    """Knowing the forward noise, it stands against what knows the same: 60 %, not 65 %."""
    known = square(0.6, knows=["forward"])
    row = both(tmp_path, known)
    assert (row.flags, looked(row)["black box"]) == ([], ["square"])
    known = attacked("square", 0.1, "square", effort=SQUARE, knows=["forward"])
    (flag,) = both(tmp_path, known).flags
    assert "against dw-fwd" in flag


def test_more_effort_of_the_same_family(tmp_path: Path) -> None:
    row = both(tmp_path, apgd("both", "long", 0.4))
    (flag,) = row.flags
    assert flag.startswith("eot: its search has not converged: long, with more steps or draws,")
    assert "finds -25.0 [" in flag
    assert looked(row)["more effort"] == ["long"]
    assert both(tmp_path, apgd("both", "long", 0.625)).flags == []


@pytest.mark.parametrize(
    ("changes", "counts"),
    [
        ({"effort": {"steps": 20, "eot": 10}}, False),
        ({"effort": {"steps": 100, "eot": 5}}, False),
        ({"effort": {"steps": 20, "eot": 11}}, True),
        ({"effort": {"steps": 20, "eot": 10, "restarts": 2}}, True),
        ({"effort": {"steps": 20, "eot": 10, "targets": 9}}, True),
        ({"effort": {"steps": 50, "eot": 10, "gradient": "bpda"}}, False),
        ({"attack": "lf", "effort": {"steps": 50, "eot": 10}}, False),
        ({"eps": 1.0}, False),
        # Where all is known EoT is idle.
        ({"knows": list(BOTH), "effort": {"steps": 20, "eot": 100}}, False),
        ({"knows": list(BOTH), "effort": {"steps": 21, "eot": 1}}, True),
    ],
)
def test_what_is_more_effort(tmp_path: Path, changes: dict[str, Any], counts: bool) -> None:
    row = both(tmp_path, apgd("both", "other", 0.1, **changes))
    assert looked(row)["more effort"] == (["other"] if counts else [])
    assert any("not converged" in flag for flag in row.flags) == counts


def test_another_attack_that_does_better(tmp_path: Path) -> None:
    """The leaderboard's number is an upper bound, and a lower one is known."""
    other = {"attack": "lf", "effort": {"steps": 20, "eot": 10, "band": 0.5}}
    row = both(tmp_path, apgd("both", "smooth", 0.4, **other))
    (flag,) = row.flags
    assert flag.startswith("eot: another attack, smooth, finds -25.0 [")
    assert looked(row)["other attacks"] == ["smooth"]
    row = both(tmp_path, apgd("both", "smooth", 0.625, **other))
    assert (row.flags, looked(row)["other attacks"]) == ([], ["smooth"])
    # What is judged elsewhere, as a black box or as more of the same, isn't judged twice.
    rest = both(tmp_path / "rest", square(0.6), apgd("both", "long", 0.625))
    assert looked(rest)["other attacks"] == []


def checked(errors: list[float | None], cosine: list[float | None], **effort: Any) -> Result:
    check = {"ids": [0, 1], "difference_errors": errors, "cosine": cosine}
    effort = {"steps": 5, "eot": 1, "gradient": "exact"} | effort
    return attacked("other", 0.9, "pgd", gradient_check=check, effort=effort)


@pytest.mark.parametrize(
    ("result", "says"),
    [
        (checked([1e-6, 2e-6], [1.0, 1.0]), None),
        (checked([1e-6, 0.031], [1.0, 1.0]), "off from finite differences by 0.031 in other"),
        (checked([1e-6, 1e-6], [1.0, 0.98]), "the exact gradient, which .* only 0.98 in other"),
        (checked([1e-6, 1e-6], [1.0, 0.7], gradient="bpda"), None),
        (
            checked([1e-6, 1e-6], [0.9, -0.12], gradient="bpda"),
            "the bpda gradient, which .* only -0.12 in other",
        ),
        (checked([None, 1e-6], [None, 1.0]), r"no gradient on images .*\(other\)"),
    ],
)
def test_gradient_check(tmp_path: Path, result: Result, says: str | None) -> None:
    row = both(tmp_path, result)
    assert looked(row)["gradient check"] == ["other"]
    assert len(row.flags) == (says is not None)
    if says is not None:
        (flag,) = row.flags
        assert re.search(says, flag)


def test_the_check_is_as_strict_as_conformance() -> None:
    assert flags.ERROR == conformance.TOLERANCE


# --- Sweeps ---------------------------------------------------------------------------------------


def swept(**changes: Any) -> Findings:
    values = [
        Measured(
            value=20,
            file="sweeps/standard/x.json",
            accuracy=Interval(value=0.5, low=0.4, high=0.6),
            fall=None,
            zero_gradient=0.0,
        ),
        Measured(
            value=100,
            file=None,
            accuracy=Interval(value=0.3, low=0.2, high=0.4),
            fall=Interval(value=0.2, low=0.1, high=0.3),
            zero_gradient=0.0,
        ),
    ]
    table: dict[str, Any] = {
        **{"schema": 1, "track": TRACK, "defense": "both", "threat": "eot", "seed": 0},
        **{"axis": "steps", "standard": 20, "images": 16, "draws": 3, "chance": 0.1},
        **{"values": values, "notes": ["the ball may be too small"]},
        "flags": [Flag(name="not-converged", message="accuracy falls from 50.0 to 30.0 %")],
    }
    return Findings(**table | changes)


def place(folder: Path, found: Findings) -> Path:
    path = findings_path(folder, found.track, found.defense, found.threat, found.seed, found.axis)
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
    rows = {row["defense"]: row for row in csv_of(tmp_path / "out" / f"{TRACK}.csv")}
    assert rows["both"]["flags"] == "sweep of eot over steps: accuracy falls from 50.0 to 30.0 %"
    assert rows["both"]["checks"].endswith("sweeps: flagged (eot steps)")
    assert rows["ddim-like"]["checks"].endswith("sweeps: no finding (eot eot)")
    text = (tmp_path / "out" / f"{TRACK}-attacks.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("| both | eot"))
    assert "16 x 3 | 20 (its own): 50.0 [40.0, 60.0]; 100: 30.0 [20.0, 40.0] |" in line
    assert "**not-converged**: accuracy falls" in line
    assert "undecided: the ball may be too small" in line
    assert "| ddim-like | eot | 0 | eot |" in text
    table = csv_of(tmp_path / "out" / f"{TRACK}-sweeps.csv")
    assert [(row["defense"], row["value"], row["fall"]) for row in table] == [
        ("both", "20.0", ""),
        ("both", "100.0", "0.2"),
        ("ddim-like", "20.0", ""),
        ("ddim-like", "100.0", "0.2"),
    ]
    assert "Sweeps" not in (tmp_path / "out" / f"{TRACK}.csv").read_text()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ({"track": 3}, "track"),
        ({"chance": "NaN"}, "chance"),
        ({"schema": 2}, "schema"),
        ({"more": 1}, "more: is unknown"),
        ({"threat": "dwbox"}, r"not where it belongs.*both/dwbox/seed-0-steps\.json"),
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
    with pytest.raises(BadResult, match="finite"):
        Findings.read(path)


# --- Packages -------------------------------------------------------------------------------------


def test_the_packages_own_verdict(tmp_path: Path) -> None:
    """Half of the draws are right on every image, and the package's single draw on a quarter."""
    verdict = [[i < 10] for i in range(IMAGES)]
    robust = [[draw < 2 for draw in range(4)] for _ in range(IMAGES)]
    rand = attacked("rand", robust, "autoattack", effort={"eot": 20}, package_robust=verdict)
    known = attacked(
        "standard",
        outcomes(0.25, 3),
        "autoattack",
        knows=list(BOTH),
        effort={"eot": 1},
        package_robust=outcomes(0.25, 3),
    )
    save(tmp_path, *matrix(), rand, known, square(0.7))
    write_leaderboards(tmp_path, tmp_path / "out")
    rows = attacks_table(tmp_path / "out")
    hidden = rows["both", "hidden"]
    assert (hidden["rand"], hidden["rand_package_verdict"]) == ("0.5", "0.25")
    bootstrap = Bootstrap(IMAGES)
    gap = bootstrap.estimate(bootstrap.mean([2 * (i < 10) - 1 for i in range(IMAGES)], 2))
    assert hidden["rand_package_gap"] == "-0.25"
    assert float(hidden["rand_package_gap_lo"]) == pytest.approx(gap.low)
    assert float(hidden["rand_package_gap_hi"]) == pytest.approx(gap.high)
    assert hidden["standard_package_gap"] == ""
    assert "square_package_verdict" not in hidden
    assert rows["both", "known"]["standard_package_gap"] == "0.0"
    text = (tmp_path / "out" / f"{TRACK}-attacks.md").read_text()
    line = next(x for x in text.splitlines() if x.startswith("| both | hidden | rand |"))
    assert line.endswith(f"| 50.0 [50.0, 50.0] | {gap.percent(sign=True)} |")
    assert "| both | known | standard | 25.0 [" in text
    assert "p^(n + 1)" in text


def duel(folder: Path, *results: Result) -> dict[str, dict[str, str]]:
    save(folder, *matrix(), *results)
    write_leaderboards(folder, folder / "out")
    rows = csv_of(folder / "out" / f"{TRACK}-packages.csv")
    return {f"{row['defense']}/{row['package_threat']}": row for row in rows}


def test_packages_against_ours(tmp_path: Path) -> None:
    """Of ours with at most as many calls the strongest; each image paired."""
    ta = attacked("ta", 0.25, "torchattacks", effort=PGD, network_calls=calls(300, 100))
    fair = attacked("fair", 0.5, "apgd", network_calls=calls(350, 50))
    weaker = attacked("weaker", 0.6, "apgd", network_calls=calls(10, 0))
    strong = attacked("strong", 0.05, "apgd", network_calls=calls(350, 51))
    also = attacked("also", 0.05, "autoattack", effort={"eot": 1}, network_calls=calls(1, 0))
    row = duel(tmp_path, ta, fair, weaker, strong, also)["both/ta"]
    assert (row["package_attack"], row["package"]) == ("torchattacks:PGD", "0.25")
    assert (row["package_gradient_calls"], row["package_other_calls"]) == ("300.0", "100.0")
    assert (row["ours_threat"], row["ours_attack"], row["ours"]) == ("fair", "apgd", "0.5")
    assert (row["difference"], row["package_lower"], row["why"]) == ("-0.25", "True", "")
    bootstrap = Bootstrap(IMAGES)
    gap = bootstrap.mean([-int(10 <= i < 20) for i in range(IMAGES)], 1)
    assert float(row["difference_lo"]) == pytest.approx(bootstrap.estimate(gap).low)
    assert row["results"].split() == [f"{TRACK}/both/{x}/seed-0.json" for x in ("ta", "fair")]
    text = (tmp_path / "out" / f"{TRACK}-attacks.md").read_text()
    line = next(x for x in text.splitlines() if x.startswith("| both | nothing | ta (torchattacks"))
    assert "| 400 | fair (apgd) | 50.0 [" in line
    assert line.endswith("| **yes** |")
    assert "Of 1 comparisons, the package's attack leaves less" in text
    assert "interval in 1." in text


def test_a_package_within_the_interval(tmp_path: Path) -> None:
    ta = attacked("ta", 0.625, "torchattacks", effort=PGD, network_calls=calls(2000, 0))
    row = duel(tmp_path, ta)["both/ta"]
    assert (row["ours_threat"], row["difference"]) == ("eot", "-0.025")
    assert row["package_lower"] == "False"


def test_of_a_tie_the_one_with_fewer_calls(tmp_path: Path) -> None:
    ta = attacked("ta", 0.9, "torchattacks", effort=PGD, network_calls=calls(2000, 0))
    cheap = attacked("z", 0.65, "apgd", network_calls=calls(10, 0))
    assert duel(tmp_path, ta, cheap)["both/ta"]["ours_threat"] == "z"


def test_nothing_to_hold_against_a_package(tmp_path: Path) -> None:
    few = attacked("few", 0.3, "torchattacks", effort=PGD, network_calls=calls(5, 5))
    free = {"per_purification": 0, "gradient": 0, "judging": 0}
    zero = apgd(
        *("free", "ta", 0.3), attack="torchattacks", effort=PGD, sites=["s"], network_calls=free
    )
    own = make("free", "eot", 0.2, sites=["s"], network_calls=free)
    alone = apgd("alone", "ta", 0.3, attack="torchattacks", effort=PGD, sites=["s"])
    rows = duel(tmp_path, few, zero, own, alone)
    assert {key: row["why"] for key, row in rows.items()} == {
        "alone/ta": "no attack of ours with this knowledge",
        "both/few": "none of ours has as few calls (the fewest: 200)",
        "free/ta": "purification calls no network, so that calls do not tell effort",
    }
    for row in rows.values():
        assert (row["ours"], row["difference"], row["package_lower"]) == ("", "", "")
    assert rows["free/ta"]["package_gradient_calls"] == ""
    text = (tmp_path / "out" / f"{TRACK}-attacks.md").read_text()
    assert "| none of ours has as few calls (the fewest: 200) |" in text
    assert "Of 0 comparisons" in text


def test_a_package_that_knows_the_same_only(tmp_path: Path) -> None:
    known = attacked(
        "ta-known",
        0.1,
        "torchattacks",
        effort=PGD,
        knows=list(BOTH),
        draws=3,
    )
    row = duel(tmp_path, known)["both/ta-known"]
    assert (row["knows"], row["ours_threat"]) == ("forward reverse", "dwbox")


# --- Effort ---------------------------------------------------------------------------------------


def test_effort_in_words() -> None:
    effort = {"gradient": "exact", "surrogate_steps": None, "steps": 20, "step_size": 0.25}
    assert in_words(effort | {"eot": 10, "random_start": False}) == (
        "20 steps, step size 0.25 eps, EoT-10, gradient exact, no random start"
    )
    assert in_words(TRANSFER).startswith("source none, search pgd (20 steps, step size 0.25 eps,")
    assert in_words(PGD) == "20 steps, alpha 0.05, gradient exact"
    members = [{"attack": "apgd", "steps": 5, "targets": None}, {"attack": "square", "eot": 2}]
    assert in_words({"members": members}) == "members apgd (5 steps) and square (EoT-2)"


def test_equal_efforts_are_folded_and_a_transfer_makes_no_query(tmp_path: Path) -> None:
    none = calls(0, 0)
    transfers = [
        apgd(d, "transfer", 0.8, attack="transfer", effort=TRANSFER, network_calls=none)
        for d in ("a", "both")
    ]
    owns = [make("a", "eot", 0.9), make("a", "dwbox", 0.5)]
    longs = [
        apgd("both", "long", 0.7, network_calls=calls(7, 3)),
        apgd("a", "long", 0.7, network_calls=calls(8, 3)),
    ]
    save(tmp_path, *matrix(), *owns, *longs, *transfers)
    write_leaderboards(tmp_path, tmp_path / "out")
    text = (tmp_path / "out" / f"{TRACK}-attacks.md").read_text()
    table, effort = text.split("## Effort")
    assert effort.count("| transfer | hidden |") == 1
    assert "| a, both: no query, but 20 gradients of none |" in effort
    assert "| a: 8 + 3; both: 7 + 3 |" in effort
    assert "{" not in effort
    assert table.count("(no query)") == 2
    assert "(0x)" not in text


def test_everything_is_the_same_again(tmp_path: Path) -> None:
    ta = attacked("ta", 0.25, "torchattacks", effort=PGD, network_calls=calls(300, 100))
    save(tmp_path, *matrix(), ta, square(0.1))
    place(tmp_path, swept())
    paths = write_leaderboards(tmp_path, tmp_path / "out")
    before = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in write_leaderboards(tmp_path, tmp_path / "out")] == before
    text = (tmp_path / "out" / f"{TRACK}-attacks.md").read_text()
    assert all(ord(character) < 128 for character in text)
    for block in text.split("\n\n"):
        if block.startswith("|"):
            assert len({line.count(" | ") for line in block.splitlines()}) == 1
