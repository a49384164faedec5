import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dbp_bench.entries.registry import Registry
from dbp_bench.errors import BadResult, NotComparable
from dbp_bench.reporting import rendering
from dbp_bench.reporting.badge import Compared, Verification
from dbp_bench.reporting.leaderboard import Leaderboard, Row, decompose, leaderboard
from dbp_bench.reporting.records import load
from dbp_bench.reporting.report import accuracies, outcomes_csv, write_leaderboards
from dbp_bench.reporting.statistics import Bootstrap, Estimate
from dbp_bench.reporting.tables import to_csv, to_markdown
from dbp_bench.result import Result, result_path
from dbp_bench.weights.files import digest
from records import BOTH, IMAGES, TRACK, apgd, attacks_table, make, matrix, outcomes, save


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    folder = tmp_path / "entries"
    (folder / "tracks").mkdir(parents=True)
    (folder / "tracks" / f"{TRACK}.yaml").write_text(
        "title: A toy | of 5 % & _more_\n"
        "data: toy\nsplit: test\n"
        f"classifier: {{network: 'a:b', file: c.safetensors, sha256: '{'0' * 64}'}}\n"
        "norm: linf\neps: 0.15\nbatch_size: 20\nrows: 200\n"
        "demonstration: true\nnote: Made by hand.\n"
    )
    return Registry([folder])


def values(board: Leaderboard, defense: str) -> dict[str, float | None]:
    row = next(row for row in board.rows if row.defense == defense)
    return {
        key: None if estimate is None else round(estimate.value, 10)
        for key, estimate in row.estimates.items()
    }


def table(path: Path) -> dict[str, dict[str, str]]:
    with path.open(newline="") as file:
        return {
            f"{row['defense']}/{row['threat']}" if "threat" in row else row["defense"]: row
            for row in csv.DictReader(file)
        }


def board_of(folder: Path, *results: Result, **options: Any) -> Leaderboard:
    return leaderboard(load(save(folder, *results)), **options)


def row_of(board: Leaderboard, defense: str) -> Row:
    return next(row for row in board.rows if row.defense == defense)


# --- Decomposition --------------------------------------------------------------------------------


def test_the_papers_numbers() -> None:
    """DDPM on CIFAR-10 in the paper that introduced DW-box, on a classifier that keeps nothing."""
    constant = [np.full(3, x) for x in (0.0, 47.27, 45.41, 35.25, 16.80)]
    parts = {key: float(x[0]) for key, x in decompose(*constant).items() if x is not None}
    assert parts == pytest.approx(
        {
            "purification": 16.80,
            "stochasticity": 30.47,
            "share": 0.6446,
            "stochasticity_forward": 10.155,
            "stochasticity_reverse": 20.315,
        },
        abs=1e-4,
    )


def test_parts_add_up_in_every_resample() -> None:
    rng = np.random.default_rng(0)
    bootstrap = Bootstrap(50)
    quantities = [bootstrap.mean(rng.integers(0, 4, 50), 3) for _ in range(5)]
    zero, hidden, _, _, known = quantities
    parts = decompose(*quantities)
    purification, s = parts["purification"], parts["stochasticity"]
    forward, reverse = parts["stochasticity_forward"], parts["stochasticity_reverse"]
    assert purification is not None
    assert s is not None
    assert forward is not None
    assert reverse is not None
    assert np.allclose(purification + zero + s, hidden)
    assert np.allclose(forward + reverse, s)
    assert np.allclose(hidden - known, s)


def test_every_number_of_a_row(tmp_path: Path) -> None:
    board = board_of(tmp_path, *matrix())
    assert values(board, "both") == {
        "clean": 1.0,
        "undefended": 0.05,
        "hidden": 0.65,
        "forward_known": 0.6,
        "reverse_known": 0.5,
        "all_known": 0.25,
        "purification": 0.2,
        "stochasticity": 0.4,
        "share": round(0.4 / 0.6, 10),
        "stochasticity_forward": 0.15,
        "stochasticity_reverse": 0.25,
        "fresh": 0.75,
        "whitebox": 0.7,
        "null": 1.0,
    }


def test_one_result_serves_all_settings_that_are_the_same(tmp_path: Path) -> None:
    board = board_of(tmp_path, *matrix())
    ddim = values(board, "ddim-like")
    assert (ddim["forward_known"], ddim["reverse_known"]) == (0.2, 0.55)
    assert row_of(board, "ddim-like").served_by == {
        "forward_known": "dwbox",
        "reverse_known": "eot",
    }
    assert (ddim["stochasticity_forward"], ddim["stochasticity_reverse"]) == (0.35, 0)
    assert ddim["whitebox"] is None

    none = values(board, "none")
    columns = ("hidden", "forward_known", "reverse_known", "all_known", "whitebox")
    assert {none[key] for key in columns} == {0.05}
    assert (none["purification"], none["stochasticity"]) == (0, 0)
    assert (none["share"], none["fresh"], none["null"]) == (None, None, None)


@pytest.mark.parametrize("threat", ["dwbox", "whitebox"])
def test_deterministic_defense_is_served_by_any_threat(tmp_path: Path, threat: str) -> None:
    results = [r for r in matrix() if r.defense != "none"]
    board = board_of(tmp_path, *results, make("none", threat, 0.05, sites=()))
    assert values(board, "both")["undefended"] == 0.05
    assert row_of(board, "none").served_by["hidden"] == threat


def test_its_own_result_comes_first(tmp_path: Path) -> None:
    forward = ["forward"]
    board = board_of(tmp_path, *matrix(), make("ddim-like", "dw-fwd", 0.225, sites=forward))
    assert values(board, "ddim-like")["forward_known"] == 0.225
    assert "forward_known" not in row_of(board, "ddim-like").served_by


def test_another_effort_does_not_serve(tmp_path: Path) -> None:
    """EoT counts wherever a draw is hidden; a stronger attack of one's own has its own row."""
    strong = make("both", "strong", 0.1, effort={"eot": 100})
    results = [r for r in matrix() if (r.defense, r.threat) != ("both", "eot")]
    board = board_of(tmp_path, *results, strong)
    assert values(board, "both")["hidden"] is None
    write_leaderboards(tmp_path, tmp_path / "out")
    assert table(tmp_path / "out" / f"{TRACK}-settings.csv")["both/strong"]["robust"] == "0.1"


@pytest.mark.parametrize(
    ("missing", "blank"),
    [
        ("none", {"undefended", "purification", "share"}),
        ("eot", {"hidden", "stochasticity", "share", "stochasticity_forward"}),
        ("dw-fwd", {"forward_known", "stochasticity_forward", "stochasticity_reverse"}),
        ("dw-rev", {"reverse_known", "stochasticity_forward", "stochasticity_reverse"}),
        ("dwbox", {"all_known", "fresh", "purification", "stochasticity", "share"}),
        ("whitebox", {"whitebox"}),
        ("null", {"null"}),
    ],
)
def test_not_measured_is_blank(tmp_path: Path, missing: str, blank: set[str]) -> None:
    left = [
        r for r in matrix() if r.defense != missing and (r.defense != "both" or r.threat != missing)
    ]
    board = board_of(tmp_path, *left)
    for key in blank:
        assert values(board, "both")[key] is None
    if missing != "eot":
        assert values(board, "both")["clean"] == 1.0
    write_leaderboards(tmp_path, tmp_path / "out")
    row = table(tmp_path / "out" / f"{TRACK}.csv")["both"]
    for key in blank:
        assert [row[key], row[f"{key}_lo"], row[f"{key}_hi"]] == ["", "", ""]


def test_share_of_what_may_be_nothing_is_blank(tmp_path: Path) -> None:
    board = board_of(
        tmp_path,
        make("none", "eot", 0.05, sites=()),
        make("weak", "eot", 0.075),
        make("weak", "dwbox", 0.05),
    )
    assert values(board, "weak")["stochasticity"] == 0.025
    assert values(board, "weak")["share"] is None


def test_seeds_are_pooled_along_the_draws(tmp_path: Path) -> None:
    second = [
        make(r.defense, r.threat, 0.25 if r.defense == "both" else 0.05, sites=r.sites, seed=1)
        for r in matrix()
    ]
    board = board_of(tmp_path, *matrix(), *second)
    assert values(board, "both")["hidden"] == 0.45
    row = row_of(board, "both")
    assert (row.hidden_draws, row.known_draws, row.fresh_draws) == (8, 6, 4)
    write_leaderboards(tmp_path, tmp_path / "out")
    settings = table(tmp_path / "out" / f"{TRACK}-settings.csv")["both/eot"]
    assert settings["seeds"] == "0 1"
    assert settings["draws"] == "8"
    assert settings["gradient_calls"] == "16000"
    assert len(settings["sha256"].split()) == 2


def test_intervals_are_paired(tmp_path: Path) -> None:
    """A gain on exactly the same images, 40 % of them: no wider than a gain against 0."""
    board = board_of(tmp_path, *matrix())
    row = row_of(board, "both").estimates["stochasticity"]
    bootstrap = Bootstrap(IMAGES)
    gained = [int(10 <= i < 26) for i in range(IMAGES)]
    expected = bootstrap.estimate(bootstrap.mean(gained, 1))
    assert row is not None
    assert [row.value, row.low, row.high] == pytest.approx(
        [expected.value, expected.low, expected.high]
    )


# --- Rank, flags, one result ----------------------------------------------------------------------


def test_rank_by_hidden_or_by_known(tmp_path: Path) -> None:
    a = [make("a", "eot", 0.7), make("a", "dwbox", 0.2)]
    b = [make("b", "eot", 0.5), make("b", "dwbox", 0.4)]
    part = make("part", "whitebox", 0.9)
    control = make("none", "eot", 0.95, sites=())
    save(tmp_path, *a, *b, part, control)
    by_hidden = leaderboard(load(tmp_path))
    by_known = leaderboard(load(tmp_path), sort="known")
    assert [(row.rank and str(row.rank), row.defense) for row in by_hidden.rows] == [
        ("1", "a"),
        ("2", "b"),
        (None, "part"),
        (None, "none"),
    ]
    assert [row.defense for row in by_known.rows] == ["b", "a", "part", "none"]
    assert by_hidden.rows[-1].kind == "control"


def test_null_attack_that_does_something_is_flagged(tmp_path: Path) -> None:
    bad = [r for r in matrix() if r.threat != "null"] + [make("both", "null", 0.8)]
    (flag,) = row_of(board_of(tmp_path / "bad", *bad), "both").flags
    assert "null attack" in flag
    assert "-20.0 [" in flag
    assert row_of(board_of(tmp_path / "good", *matrix()), "both").flags == []
    one = [r for r in matrix() if r.threat != "null"] + [make("both", "null", 39 / 40)]
    assert row_of(board_of(tmp_path / "one", *one), "both").flags == []


def test_other_flags(tmp_path: Path) -> None:
    # The last four are wrong: they may have retired before a gradient was taken.
    zero = [True] * 7 + [False] * 29 + [True] * 4
    known = make("odd", "dwbox", 0.9, draws=1, zero_gradient=zero)
    flags = row_of(board_of(tmp_path, make("odd", "eot", 0.2), known), "odd").flags
    assert [flag.split(":")[0] for flag in flags] == [
        "knowing the draws did not help the attack",
        (
            "no gradient, or none but zero, at any step on 7 of 40 images, which stay right "
            "(all known)"
        ),
        "fewer than 3 known draws",
    ]


def test_accuracies_of_one_result() -> None:
    found = accuracies(make("both", "dwbox", 0.25, clean=1, fresh=0.5))
    assert found.clean == Estimate(1, 1, 1)
    assert found.robust.value == 0.25
    assert found.robust.low < 0.25 < found.robust.high
    assert found.fresh is not None
    assert found.fresh.value == 0.5
    assert accuracies(make("both", "eot", 0.25)).fresh is None


def test_mean_is_over_images_and_draws() -> None:
    robust = [[i % 2 == 0, True, False, False] for i in range(IMAGES)]
    assert accuracies(make("both", "eot", robust)).robust.value == 0.375


# --- Votes, worst cases, several attacks ----------------------------------------------------------


def draws_table(folder: Path) -> dict[tuple[str, str], dict[str, str]]:
    with (folder / f"{TRACK}-draws.csv").open(newline="") as file:
        return {(row["defense"], row["images_of"]): row for row in csv.DictReader(file)}


def test_one_draw_votes_and_worst_cases(tmp_path: Path) -> None:
    """Half of the images right at 3 of 4 draws, the others at 1."""
    robust = [[True, i < 20, i < 20, False] for i in range(IMAGES)]
    results = [r for r in matrix() if (r.defense, r.threat) != ("both", "eot")]
    save(tmp_path, *results, make("both", "eot", robust))
    write_leaderboards(tmp_path, tmp_path / "out")
    rows = draws_table(tmp_path / "out")
    row = rows["both", "hidden"]
    assert (row["threat"], row["draws"], row["majority_of"]) == ("eot", "4", "3")
    assert float(row["mean"]) == 0.5
    assert float(row["majority"]) == 0.5
    assert float(row["worst_3"]) == 0.125
    assert float(row["worst_all"]) == 0
    for key in ("mean", "majority", "worst_3"):
        assert float(row[f"{key}_lo"]) < float(row[key]) < float(row[f"{key}_hi"])
    assert {rows["both", key]["worst_all"] for key in ("clean", "null")} == {"1.0"}
    none = rows["none", "hidden"]
    assert (none["draws"], none["majority_of"]) == ("", "")
    assert {none[key] for key in ("mean", "majority", "worst_3", "worst_all")} == {"0.05"}
    assert ("ddim-like", "null") not in rows

    settings = table(tmp_path / "out" / f"{TRACK}-settings.csv")
    assert settings["both/eot"]["worst_3"] == "0.125"
    assert settings["both/eot"]["majority_of"] == "3"
    known = settings["both/dwbox"]
    assert (known["worst_3"], known["worst_all_of"], known["majority"]) == ("0.25", "3", "")


def test_null_attack_that_changes_votes_only_is_flagged(tmp_path: Path) -> None:
    """The mean of the null attack is that of clean images, but no image is sure any more."""
    clean = [[i % 2 == 0] * 4 for i in range(IMAGES)]
    robust = [[draw % 2 == 0 for draw in range(4)] for _ in range(IMAGES)]
    bad = make("both", "null", robust).model_dump(by_alias=True) | {"clean": clean}
    (flag,) = row_of(board_of(tmp_path, Result.model_validate(bad)), "both").flags
    assert "null attack" in flag
    assert "worst of 4 -50.0 [" in flag
    assert "worst of 3 -50.0 [" in flag
    assert "one draw" not in flag


def test_other_attacks_leave_the_leaderboard_alone(tmp_path: Path) -> None:
    """Whatever their effort, budget, draws and seeds; they can raise flags, and serve no column."""
    changed = [r for r in matrix() if (r.defense, r.threat) != ("both", "dw-rev")]
    write_leaderboards(save(tmp_path / "one", *changed), tmp_path / "before")
    others = [
        apgd("both", "apgd", 0.6),
        apgd("both", "few", 0.5, draws=2),
        apgd("both", "large", 0.1, eps=1.0),
        apgd("ddim-like", "apgd", 0.5, sites=["forward"], seed=1, effort={"steps": 5}),
        apgd("both", "same", 0.5, knows=["reverse"], attack="pgd", effort=changed[1].effort),
    ]
    write_leaderboards(save(tmp_path / "two", *changed, *others), tmp_path / "after")
    before, after = (table(tmp_path / at / f"{TRACK}.csv") for at in ("before", "after"))
    for defense, row in after.items():
        flags, checks = row.pop("flags"), row.pop("checks")
        assert (flags != before[defense].pop("flags")) == (defense == "both")
        ran = defense in ("both", "ddim-like")
        assert (checks != before[defense].pop("checks")) == ran
    assert after == before
    names = [f"{TRACK}{end}" for end in (".md", ".tex", "-draws.csv")]
    for name, end in zip(names, ("## Flags", r"\begin{minipage}", "no end"), strict=True):
        texts = [(tmp_path / at / name).read_text() for at in ("before", "after")]
        texts[0] = texts[0].partition("## Looked for")[0]
        assert texts[0].partition(end)[0] == texts[1].partition(end)[0]
    assert not (tmp_path / "before" / f"{TRACK}-attacks.csv").exists()
    settings = table(tmp_path / "after" / f"{TRACK}-settings.csv")
    assert settings["both/large"]["robust"] == "0.1"
    attacks = attacks_table(tmp_path / "after")
    assert list(attacks) == [("both", "hidden"), ("ddim-like", "hidden")]
    assert "large" not in attacks["both", "hidden"]


def test_attacks_side_by_side(tmp_path: Path) -> None:
    """Attacks that succeed on different images: the worst case is below each of them."""
    last = [[i >= 10] * 3 for i in range(IMAGES)]
    others = [
        apgd("both", "apgd", [[i >= 20] * 4 for i in range(IMAGES)]),
        apgd("both", "apgd-known", last, knows=list(BOTH), looks=400),
    ]
    results = [r for r in matrix() if r.threat not in ("eot", "dwbox") or r.defense != "both"]
    results += [make("both", "eot", 0.65), make("both", "dwbox", 0.5)]
    save(tmp_path / "results", *results, *others)
    paths = write_leaderboards(tmp_path / "results", tmp_path)
    assert [path.name for path in paths[-2:]] == [f"{TRACK}-attacks.csv", f"{TRACK}-attacks.md"]
    before = [path.read_bytes() for path in paths]
    write_leaderboards(tmp_path / "results", tmp_path)
    assert [path.read_bytes() for path in paths] == before

    rows = attacks_table(tmp_path)
    assert list(rows) == [("both", "hidden"), ("both", "known")]
    hidden, known = rows.values()
    # Right under eot: images below 26; under whitebox: below 28; under apgd: from 20 on.
    assert [hidden[key] for key in ("eot", "whitebox", "apgd", "apgd-known")] == [
        "0.65",
        "0.7",
        "0.5",
        "",
    ]
    assert hidden["worst_case"] == "0.15"
    assert float(hidden["worst_case_lo"]) < 0.15 < float(hidden["worst_case_hi"])
    assert (hidden["draws"], hidden["equal_calls"]) == ("4", "False")
    assert (hidden["apgd_attack"], hidden["apgd_gradient_calls"]) == ("apgd", "500.0")
    assert json.loads(hidden["apgd_effort"])["steps"] == 50
    assert known["worst_case"] == "0.25"
    assert known["whitebox"] == ""
    assert float(known["apgd-known_other_calls"]) == pytest.approx(400 / IMAGES / 3)

    text = (tmp_path / f"{TRACK}-attacks.md").read_text()
    assert "## All draws hidden" in text
    assert "## All draws known" in text
    assert "apgd | 50 steps, EoT-10 | both: 500 + 0 |" in text
    assert "x)" in text.split("## Effort")[0]
    for start in (i for i, line in enumerate(text.splitlines()) if line.startswith("| Defense")):
        block = text.splitlines()[start:]
        assert len({line.count(" | ") for line in block[: block.index("")]}) == 1
    assert all(ord(character) < 128 for character in text)


def test_worst_case_of_hidden_draws_is_judged_on_others(tmp_path: Path) -> None:
    """Each attack is right where the other isn't: the minimum of each draw would be 0."""
    first, second = ([[draw % 2 == i for draw in range(4)]] * IMAGES for i in (0, 1))
    save(tmp_path, make("both", "eot", first), apgd("both", "apgd", second))
    write_leaderboards(tmp_path, tmp_path / "out")
    assert attacks_table(tmp_path / "out")["both", "hidden"]["worst_case"] == "1.0"


def test_worst_case_is_over_draws_in_common(tmp_path: Path) -> None:
    few = apgd("both", "few", outcomes(0.5, 2), draws=2)
    one = apgd("ddim-like", "one", outcomes(0.5, 1), draws=1, sites=["forward"])
    save(tmp_path, *matrix(), few, one)
    write_leaderboards(tmp_path, tmp_path / "out")
    rows = attacks_table(tmp_path / "out")
    assert (rows["both", "hidden"]["draws"], rows["both", "hidden"]["worst_case"]) == ("2", "0.5")
    assert rows["ddim-like", "hidden"]["draws"] == "1"
    assert rows["ddim-like", "hidden"]["worst_case"] == ""


def test_attacks_on_a_deterministic_defense_know_all(tmp_path: Path) -> None:
    other = apgd("none", "square", outcomes(0.025, 1), sites=[], draws=1)
    save(tmp_path, *matrix(), other)
    write_leaderboards(tmp_path, tmp_path / "out")
    rows = attacks_table(tmp_path / "out")
    assert list(rows) == [("none", "known")]
    assert rows["none", "known"]["worst_case"] == "0.025"


# --- Refusals -------------------------------------------------------------------------------------


def other(**changes: Any) -> Result:
    return make("other", "eot", 0.5, **changes)


ARITHMETIC = {"device": "cpu", "dtype": "float64", "batch_size": 20, "rows": 200}


@pytest.mark.parametrize(
    ("result", "field"),
    [
        (other(norm="l2"), "norm linf and l2"),
        (other(eps=8 / 255), "eps 0.15 and 0.03"),
        (other(ids=list(range(16))), r"ids \(40 and 16\)"),
        (other(ids=list(range(1, 41))), r"ids \(40 in both, not the same\)"),
        (other(labels=[0] * IMAGES), "labels"),
        (other(arithmetic=ARITHMETIC), "arithmetic.dtype float32 and float64"),
        (other(effort={"eot": 1}), "effort.eot 10 and 1"),
        (other(effort={"steps": 50}), "effort.steps 20 and 50"),
        (other(effort={"restarts": 5}), "effort.restarts missing and 5"),
        (other(attack="apgd"), "attack pgd and apgd"),
        (other(draws=1), r"draws \(4 and 1\)"),
        (make("other", "dw-fwd", 0.5, effort={"eot": 1}), "effort.eot 10 and 1"),
        (make("other", "dwbox", 0.5, effort={"step_size": 0.5}), "effort.step_size"),
        (make("other", "whitebox", 0.5, effort={"eot": 2}), "effort.eot 1 and 2"),
        (make("other", "null", 0.5, effort={"steps": 1}), "effort.steps 20 and 1"),
        (make("none", "dwbox", 0.1, sites=(), effort={"steps": 1}), "effort.steps 20 and 1"),
        (make("both", "strong", 0.5, options={"t_star": 50}), "options.t_star missing and 50"),
        (make("both", "strong", 0.5, sites=["forward"]), "sites"),
    ],
)
def test_two_protocols_are_refused(tmp_path: Path, result: Result, field: str) -> None:
    save(tmp_path, *matrix(), result)
    with pytest.raises(NotComparable, match=field) as refused:
        write_leaderboards(tmp_path, tmp_path / "out")
    message = str(refused.value)
    assert "\n" not in message
    assert message.count("seed-0.json") == 2
    assert f"{result.defense}/{result.threat}/seed-0.json" in message
    assert not (tmp_path / "out").exists()


def test_whitebox_alone_with_other_steps_is_refused(tmp_path: Path) -> None:
    results = [r for r in matrix() if r.threat != "whitebox"]
    save(tmp_path, *results, make("both", "whitebox", 0.6, effort={"steps": 50}))
    with pytest.raises(NotComparable, match=r"effort\.steps 20 and 50"):
        leaderboard(load(tmp_path))


def test_a_threat_with_an_eot_of_its_own_is_refused(tmp_path: Path) -> None:
    """The forward noise known at EoT 1 everywhere, and nothing known at EoT 10, as once published.

    The difference would compare the attacks' strength, not what they know.
    """
    results = [r for r in matrix() if r.threat != "dw-fwd"]
    save(tmp_path, *results, make("both", "dw-fwd", 0.6, effort={"eot": 1}))
    with pytest.raises(NotComparable, match=r"effort\.eot 10 and 1|effort\.eot 1 and 10"):
        leaderboard(load(tmp_path))


def test_fewer_known_or_fresh_draws_are_refused(tmp_path: Path) -> None:
    record = make("ddim-like", "dwbox", 0.2, sites=["forward"]).model_dump(by_alias=True)
    record["fresh"] = [[[True]] * 3] * IMAGES
    save(tmp_path, *matrix(), Result.model_validate(record))
    with pytest.raises(NotComparable, match="fresh draws 4 and 1"):
        leaderboard(load(tmp_path))


def test_idle_eot_is_no_difference(tmp_path: Path) -> None:
    """A deterministic defense, or one with all draws known, may record any EoT or none."""
    effort = {"steps": 20, "step_size": 0.25}
    known = make("both", "dwbox", 0.25).model_dump(by_alias=True) | {"effort": effort}
    results = [r for r in matrix() if (r.defense, r.threat) != ("both", "dwbox")]
    board = board_of(tmp_path, *results, Result.model_validate(known))
    assert values(board, "both")["all_known"] == 0.25
    assert board.effort == effort | {"eot": 10}


def test_a_seed_for_some_settings_only_is_refused(tmp_path: Path) -> None:
    save(tmp_path, *matrix(), make("both", "eot", 0.6, seed=1))
    with pytest.raises(NotComparable, match=r"both/eot/seed-1\.json.*seeds 0, 1 for 'eot', 0"):
        leaderboard(load(tmp_path))


def test_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(BadResult, match=r"no results.*dbp-bench run"):
        load(tmp_path / "nowhere")
    save(tmp_path, *matrix())
    with pytest.raises(BadResult, match=f"on track 'toy-lind'. Did you mean '{TRACK}'"):
        write_leaderboards(tmp_path, tmp_path / "out", "toy-lind")


def test_a_file_that_is_not_where_it_belongs(tmp_path: Path) -> None:
    make("both", "eot", 0.5).write(result_path(tmp_path, TRACK, "both", "dwbox", 0))
    with pytest.raises(BadResult, match=r"not where it belongs.*both/eot/seed-0\.json"):
        load(tmp_path)


def test_ragged_fresh_draws(tmp_path: Path) -> None:
    record = make("both", "dwbox", 0.2).model_dump(by_alias=True)
    record["fresh"][3][1] = [True]
    path = result_path(tmp_path, TRACK, "both", "dwbox", 0)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(record))
    with pytest.raises(BadResult, match="fresh"):
        load(tmp_path)


def test_files_beside_results_are_left_alone(tmp_path: Path) -> None:
    save(tmp_path, *matrix())
    (tmp_path / TRACK / "both" / "eot" / "seed-0.cost.json").write_text("{}")
    assert len(load(tmp_path)) == len(matrix())


# --- Files ----------------------------------------------------------------------------------------


def test_files_follow_from_results(tmp_path: Path, registry: Registry) -> None:
    save(tmp_path / "results", *matrix())
    out = tmp_path / "out"
    paths = write_leaderboards(tmp_path / "results", out, registry=registry)
    ends = (".html", ".csv", ".md", ".tex", "-draws.csv", "-settings.csv")
    names = [f"{TRACK}{end}" for end in ends]
    assert [path.name for path in paths] == names
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    before = [path.read_bytes() for path in paths]
    write_leaderboards(tmp_path / "results", out, TRACK, registry=registry)
    assert [path.read_bytes() for path in paths] == before

    rows = table(out / f"{TRACK}.csv")
    assert list(rows) == ["both", "ddim-like", "none"]
    assert rows["both"]["share"] == "0.666667"
    assert rows["both"]["undefended"] == "0.05"
    assert rows["both"]["served_by"] == ""
    assert rows["ddim-like"]["served_by"] == "forward_known=dwbox reverse_known=eot"
    assert f"{TRACK}/both/dwbox/seed-0.json" in rows["both"]["results"].split()
    settings = table(out / f"{TRACK}-settings.csv")
    assert len(settings) == len(matrix())
    assert settings["both/dwbox"]["knows"] == "forward reverse"
    assert settings["both/dwbox"]["fresh"] == "0.75"
    assert settings["both/eot"]["fresh"] == ""


def test_markdown_says_what_it_means(tmp_path: Path, registry: Registry) -> None:
    save(tmp_path / "results", *matrix())
    write_leaderboards(tmp_path / "results", tmp_path, registry=registry)
    text = (tmp_path / f"{TRACK}.md").read_text()
    lines = text.splitlines()
    assert lines[0] == r"# A toy \| of 5 % & \_more\_"
    assert "never compare them with CIFAR-10" in lines[2].replace("Never", "never")
    assert "upper bound" in text
    assert "pgd, 20 steps, step size 0.25 eps, EoT-10; linf, eps = 0.15; 40 images" in text
    assert "judged on 4 draws" in text
    assert "Known draws: 3" in text
    assert "White-box, EoT-1" in text
    assert "not the track's own" not in text
    cells = [line.strip("|").split(" | ") for line in lines if line.startswith("| 1 | both")]
    assert [len(row) for row in cells] == [7, 8, 7, 8, 8, 8]
    assert cells[0][2] == "100.0 [100.0, 100.0]"
    assert cells[0][3].startswith("65.0 [")
    # Every row of a table has as many cells as its head.
    for start in (i for i, line in enumerate(lines) if line.startswith("|  | Defense")):
        block = lines[start : lines.index("", start)]
        assert len({line.count(" | ") for line in block}) == 1
    ddim = next(line for line in lines if "ddim-like" in line)
    assert ddim.count("] =") == 2
    assert "| none *(control)* |" in text
    assert all(ord(character) < 128 for character in text)


def test_markdown_says_where_eps_is_not_the_tracks(tmp_path: Path, registry: Registry) -> None:
    save(tmp_path / "results", make("both", "eot", 0.5, eps=8 / 255))
    write_leaderboards(tmp_path / "results", tmp_path, registry=registry)
    text = (tmp_path / f"{TRACK}.md").read_text()
    assert "linf, eps = 8/255 (not the track's own linf, 0.15)" in text


def test_names_are_escaped(tmp_path: Path) -> None:
    save(tmp_path / "results", make("a_b|*c*&%$#{~^", "eot", 0.5))
    write_leaderboards(tmp_path / "results", tmp_path)
    assert r"| a\_b\|\*c\*&%$\#{\~^ |" in (tmp_path / f"{TRACK}.md").read_text()
    tex = (tmp_path / f"{TRACK}.tex").read_text()
    assert r"a\_b|*c*\&\%\$\#\{\textasciitilde{}\textasciicircum{} &" in tex


def test_latex_is_balanced(tmp_path: Path, registry: Registry) -> None:
    save(tmp_path / "results", *matrix())
    write_leaderboards(tmp_path / "results", tmp_path, registry=registry)
    tex = (tmp_path / f"{TRACK}.tex").read_text()
    bare = tex.replace(r"\{", "").replace(r"\}", "")
    assert bare.count("{") == bare.count("}")
    for rule in ("toprule", "bottomrule"):
        assert tex.count(f"\\{rule}") == 4
    for environment in ("table*", "tabular", "minipage"):
        begins = tex.count(rf"\begin{{{environment}}}")
        assert begins == tex.count(rf"\end{{{environment}}}") > 0
    rows = [line for line in tex.splitlines() if line.startswith("1 & both")]
    assert [row.count(" & ") + 1 for row in rows] == [7, 8, 5, 8]
    assert r"A toy | of 5 \% \& \_more\_" in tex
    assert "upper bound" in tex


def test_outcomes_as_one_table(tmp_path: Path) -> None:
    save(tmp_path / "results", *matrix())
    paths = [record.path for record in load(tmp_path / "results")]
    outcomes_csv(paths, tmp_path / "outcomes.csv")
    with (tmp_path / "outcomes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(len(r.ids) * len(r.draws) for r in matrix())
    known = [row for row in rows if (row["defense"], row["threat"]) == ("both", "dwbox")]
    assert [row["image"] for row in known[:4]] == ["0", "0", "0", "1"]
    assert [row["draw"] for row in known[:4]] == ["0", "1", "2", "0"]
    assert sum(int(row["robust"]) for row in known) == 0.25 * len(known)
    assert known[0]["fresh"] == "1"
    hidden = [row for row in rows if row["threat"] == "eot"]
    assert {row["fresh"] for row in hidden} == {""}
    with pytest.raises(BadResult, match="no result files"):
        outcomes_csv([], tmp_path / "outcomes.csv")


def test_reads_eps_as_it_is_written() -> None:
    assert [rendering.shown_eps(eps) for eps in (0.15, 0.2, 8 / 255, 0.5, 1 / 3)] == [
        "0.15",
        "0.2",
        "8/255",
        "0.5",
        "85/255",
    ]


def test_needs_neither_torch_nor_pandas() -> None:
    code = "import sys, dbp_bench.reporting.report; print({'torch', 'pandas'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


# --- What others verified ------------------------------------------------------------------------


def test_a_row_carries_its_badge(tmp_path: Path) -> None:
    save(tmp_path, *matrix(), make("none", "eot", 0.0, sites=()))
    folder = tmp_path / TRACK / "both"
    files = sorted(folder.glob("*/seed-*.json"))
    verification = Verification(
        schema=1,
        level="replayed",
        dbp_bench="0.1.0",
        bundle="0" * 64,
        track=TRACK,
        defense="both",
        checks=["hashes"],
        replay=Compared(outcomes=9, differing=0, allowed=0),
        attack=None,
        share=None,
        device_name="a machine",
        files={f.relative_to(folder).as_posix(): digest(f) for f in files},
    )
    verification.write(folder)
    board = leaderboard(load(tmp_path))
    badges = {row.defense: row.badge for row in board.rows}
    assert badges["both"] == "replayed"
    assert badges["none"] == "self-reported"
    table = list(csv.DictReader(io.StringIO(to_csv(board))))
    assert {row["defense"]: row["badge"] for row in table} == badges
    assert "- replayed: both.\n" in to_markdown(board)
    files[0].write_text(files[0].read_text() + "\n")
    assert {row.badge for row in leaderboard(load(tmp_path)).rows} == {"self-reported"}
