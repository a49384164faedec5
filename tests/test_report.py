import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from conftest import Command
from dbp_bench.entries.registry import Registry
from dbp_bench.errors import BadResult, NotComparable
from dbp_bench.reporting import rendering
from dbp_bench.reporting.badge import Compared, Verification
from dbp_bench.reporting.columns import derived
from dbp_bench.reporting.frames import read_csv, to_csv
from dbp_bench.reporting.leaderboard import Leaderboard, Row, leaderboard
from dbp_bench.reporting.pool import accuracies
from dbp_bench.reporting.records import load
from dbp_bench.reporting.report import outcomes_csv, write_leaderboards
from dbp_bench.reporting.sanity import doubts
from dbp_bench.reporting.statistics import Bootstrap
from dbp_bench.reporting.tables import leaderboard_markdown, rows_frame
from dbp_bench.result import Result, result_path
from dbp_bench.weights.files import digest
from records import (
    BOTH,
    IMAGES,
    TRACK,
    attacked,
    make,
    matrix,
    outcomes,
    save,
    signed,
    table,
)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    folder = tmp_path / "entries"
    (folder / "tracks").mkdir(parents=True)
    (folder / "tracks" / f"{TRACK}.yaml").write_text(
        "title: A toy | of 5 % & _more_\n"
        "data: toy\nsplit: test\n"
        f"classifier: {{network: 'a:b', file: c.safetensors, sha256: '{'0' * 64}'}}\n"
        "norm: linf\neps: 0.15\nbatch_size: 20\nmax_batch: 200\n"
        "demonstration: true\nnote: Made by hand.\n"
    )
    return Registry([folder])


def values(board: Leaderboard, defense: str) -> dict[str, float | None]:
    row = next(row for row in board.rows if row.defense == defense)
    return {
        key: None if estimate is None else round(estimate.value, 10)
        for key, estimate in row.estimates.items()
    }


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a report of the matrix, with no registry of its own."""
    folder = tmp_path_factory.mktemp("matrix")
    write_leaderboards(save(folder / "results", *matrix()), folder / "out")
    return folder / "out"


def results_table(folder: Path) -> Any:
    return table(folder / f"{TRACK}-results.csv", "defense", "threat", "attack")


def read_csv_text(text: str) -> Any:
    return pd.read_csv(io.StringIO(text), keep_default_na=False, na_values=[""]).set_index(
        "defense"
    )


def board_of(folder: Path, *results: Result, **options: Any) -> Leaderboard:
    return leaderboard(load(save(folder, *results)), **options)


def row_of(board: Leaderboard, defense: str) -> Row:
    return next(row for row in board.rows if row.defense == defense)


# --- Decomposition --------------------------------------------------------------------------------

SPLIT = ("base", "hidden", "forward_known", "reverse_known", "all_known")


def test_the_papers_numbers() -> None:
    """DDPM on CIFAR-10 in the paper that introduced DW-box, on a classifier that keeps nothing."""
    constant = [np.full(3, x) for x in (0.0, 47.27, 45.41, 35.25, 16.80)]
    found = derived(dict(zip(SPLIT, constant, strict=True)))
    parts = {key: float(x[0]) for key, x in found.items() if x is not None}
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
    parts = derived(dict(zip(SPLIT, quantities, strict=True)))
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
        "base": 0.05,
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

    none = values(board, "none")
    columns = ("hidden", "forward_known", "reverse_known", "all_known")
    assert {none[key] for key in columns} == {0.05}
    assert (none["purification"], none["stochasticity"]) == (0, 0)
    assert (none["share"], none["fresh"], none["null"]) == (None, None, None)


@pytest.mark.parametrize("threat", ["dwbox", "dw-fwd"])
def test_deterministic_defense_is_served_by_any_threat(tmp_path: Path, threat: str) -> None:
    results = [r for r in matrix() if r.defense != "none"]
    board = board_of(tmp_path, *results, make("none", threat, 0.05, sites=()))
    assert values(board, "both")["base"] == 0.05
    assert row_of(board, "none").served_by["hidden"] == threat


def test_its_own_result_comes_first(tmp_path: Path) -> None:
    forward = ["forward"]
    board = board_of(tmp_path, *matrix(), make("ddim-like", "dw-fwd", 0.225, sites=forward))
    assert values(board, "ddim-like")["forward_known"] == 0.225
    assert "forward_known" not in row_of(board, "ddim-like").served_by


def test_another_effort_does_not_serve(tmp_path: Path) -> None:
    """A stronger attack of one's own has its own row."""
    strong = attacked("both", "strong", 0.1, attack="standard", effort={"budget": 2000})
    results = [r for r in matrix() if (r.defense, r.threat) != ("both", "eot")]
    board = board_of(tmp_path, *results, strong)
    assert values(board, "both")["hidden"] is None
    write_leaderboards(tmp_path, tmp_path / "out")
    assert results_table(tmp_path / "out").loc[("both", "eot", "strong"), "robust"] == 0.1


@pytest.mark.parametrize(
    ("missing", "blank"),
    [
        ("none", {"base", "purification", "share"}),
        ("eot", {"hidden", "stochasticity", "share", "stochasticity_forward"}),
        ("dw-fwd", {"forward_known", "stochasticity_forward", "stochasticity_reverse"}),
        ("dw-rev", {"reverse_known", "stochasticity_forward", "stochasticity_reverse"}),
        ("dwbox", {"all_known", "fresh", "purification", "stochasticity", "share"}),
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
    row = read_csv_text(to_csv(rows_frame(board))).loc["both"]
    for key in blank:
        assert row[[key, f"{key}_lo", f"{key}_hi"]].isna().all()


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
    result = results_table(tmp_path / "out").loc["both", "eot", "standard"]
    assert (result["seeds"], result["draws"]) == ("0 1", 8)
    assert (result["gradient_evaluations"], result["forward_evaluations"]) == (200, 0)
    assert len(result["sha256"].split()) == len(result["digest"].split()) == 2


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
    assert "the null attack changes 32 of 160 outcomes" in flag
    assert row_of(board_of(tmp_path / "good", *matrix()), "both").flags == []
    one = [r for r in matrix() if r.threat != "null"] + [make("both", "null", 39 / 40)]
    (flag,) = row_of(board_of(tmp_path / "one", *one), "both").flags
    assert "the null attack changes 4 of 160 outcomes" in flag


def test_other_flags(tmp_path: Path) -> None:
    # The last four are wrong: they may have retired before a gradient was taken.
    zero = [True] * 7 + [False] * 29 + [True] * 4
    known = make("odd", "dwbox", 0.9, draws=1, zero_gradient=zero)
    flags = row_of(board_of(tmp_path, make("odd", "eot", 0.2), known), "odd").flags
    assert [flag.split(":")[0] for flag in flags] == [
        "no gradient, or none but zero, at any step on 7 of 40 images, which stay right (DW-box)",
        "knowing the draws did not help the attack",
        "fewer than 3 known draws",
    ]


def test_accuracies_of_one_result() -> None:
    found = accuracies(make("both", "dwbox", 0.25, clean=1, fresh=0.5))
    assert (found.clean.value, found.clean.high, round(found.clean.low, 4)) == (1, 1, 0.9119)
    assert found.robust.value == 0.25
    assert found.robust.low < 0.25 < found.robust.high
    assert found.fresh is not None
    assert found.fresh.value == 0.5
    assert accuracies(make("both", "eot", 0.25)).fresh is None


def test_mean_is_over_images_and_draws() -> None:
    robust = [[i % 2 == 0, True, False, False] for i in range(IMAGES)]
    assert accuracies(make("both", "eot", robust)).robust.value == 0.375


# --- Votes, worst cases, several attacks ----------------------------------------------------------


def test_one_draw_votes_and_worst_cases(tmp_path: Path) -> None:
    """Half of the images right at 3 of 4 draws, the others at 1."""
    robust = [[True, i < 20, i < 20, False] for i in range(IMAGES)]
    results = [r for r in matrix() if (r.defense, r.threat) != ("both", "eot")]
    save(tmp_path, *results, make("both", "eot", robust))
    write_leaderboards(tmp_path, tmp_path / "out")
    rows = table(tmp_path / "out" / f"{TRACK}-draws.csv", "defense", "images_of")
    row = rows.loc["both", "hidden"]
    assert (row["threat"], row["attack"]) == ("eot", "standard")
    assert (row["draws"], row["plurality_of"]) == (4, 3)
    keys = ["mean", "plurality", "worst_3", "worst_all"]
    assert row[keys].tolist() == [0.5, 0.5, 0.125, 0]
    for key in keys[:3]:
        assert row[f"{key}_lo"] < row[key] < row[f"{key}_hi"]
    assert rows.loc["both"].loc[["clean", "null"], "worst_all"].tolist() == [1, 1]
    none = rows.loc["none", "hidden"]
    assert none[["draws", "plurality_of"]].isna().all()
    assert none[keys].tolist() == [0.05] * 4
    assert ("ddim-like", "null") not in rows.index

    results_ = results_table(tmp_path / "out")
    assert results_.loc[("both", "eot", "standard"), ["worst_3", "plurality_of"]].tolist() == [
        0.125,
        3,
    ]
    known = results_.loc["both", "dwbox", "standard"]
    assert known[["worst_3", "worst_all_of"]].tolist() == [0.25, 3]
    assert known[["plurality", "plurality_of"]].isna().all()


def test_a_vote_is_over_classes(tmp_path: Path) -> None:
    """Two of five draws are right: the label wins where the wrong ones say three other classes."""
    right = make("both", "eot", [[True, True, False, False, False]] * IMAGES, draws=5)
    record = right.model_dump(by_alias=True)
    for i, row in enumerate(record["predicted"]["adversarial"]):
        label = record["labels"][i]
        others = [1, 2, 3] if i < 10 else [1, 1, 1] if i < 30 else [1, 1, 2]
        row[2:] = [(label + shift) % 10 for shift in others]
    tally = row_of(board_of(tmp_path, signed(record)), "both").tallies["hidden"][1]
    assert tally.votes == 5
    vote = tally.estimates["plurality"]
    assert vote is not None
    assert vote.value == 10 / IMAGES


def test_a_vote_is_blank_where_a_class_was_not_recorded(tmp_path: Path) -> None:
    record = make("both", "eot", 0.65).model_dump(by_alias=True)
    record["predicted"]["adversarial"][-1][0] = -2
    tallies = row_of(board_of(tmp_path, signed(record)), "both").tallies
    assert tallies["hidden"][1].estimates["plurality"] is None
    assert tallies["hidden"][1].estimates["worst_3"] is not None
    assert tallies["clean"][1].estimates["plurality"] is not None


def test_null_attack_that_changes_votes_only_is_flagged(tmp_path: Path) -> None:
    """The mean of the null attack is that of clean images, but outcomes are others."""
    clean = [[i % 2 == 0] * 4 for i in range(IMAGES)]
    robust = [[draw % 2 == 0 for draw in range(4)] for _ in range(IMAGES)]
    bad = make("both", "null", robust, clean=clean)
    (flag,) = row_of(board_of(tmp_path, bad), "both").flags
    assert "the null attack changes 80 of 160 outcomes" in flag


def test_null_attack_that_changes_one_wrong_class_is_flagged(tmp_path: Path) -> None:
    """Noise of a defense's own changes outcomes that no accuracy shows."""
    classes = make("both", "null", 0.5, clean=0.5)
    table = classes.model_dump(by_alias=True)
    row = next(i for i, right in enumerate(classes.right("adversarial")) if not right[0])
    table["predicted"]["adversarial"][row][0] += 1
    (flag,) = row_of(board_of(tmp_path, signed(table)), "both").flags
    assert "the null attack changes 1 of 160 outcomes" in flag
    (doubt,) = doubts(signed(table))
    assert doubt == flag


def test_parts_below_zero_are_said_and_their_share_is_blank(tmp_path: Path) -> None:
    base = make("none", "eot", 0.5, draws=1, sites=[])

    def row(hidden: float, known: float, at: str) -> Row:
        results = make("odd", "eot", hidden), make("odd", "dwbox", known)
        return row_of(board_of(tmp_path / at, base, *results), "odd")

    below = row(0.9, 0.2, "below")
    (flag,) = below.flags
    assert flag.startswith("purification P is negative (-30.0 [")
    assert (below.estimates["share"], below.estimates["purification"] is None) == (None, False)
    (flag,) = row(0.9, 0.475, "near").flags
    assert flag.startswith("purification P is below 0, within its interval (-2.5 [")
    (flag,) = row(0.7, 0.725, "hiding").flags
    assert flag.startswith("stochasticity S is below 0, within its interval (-2.5 [")
    good = row(0.9, 0.7, "good")
    assert good.flags == []
    assert good.estimates["share"] is not None


def test_saturated_losses_are_a_doubt() -> None:
    zero = [True] * 30 + [False] * 10
    (doubt,) = doubts(make("both", "eot", 0.9, zero_gradient=zero))
    assert doubt.startswith("no gradient, or none but zero, at any step on 30 of 40 images")
    assert doubts(make("both", "eot", 0.9)) == []


def test_other_attacks_leave_the_leaderboard_alone(tmp_path: Path) -> None:
    """Whatever their effort, budget, draws and seeds; they can raise flags, and serve no column."""
    changed = [r for r in matrix() if (r.defense, r.threat) != ("both", "dw-rev")]
    write_leaderboards(save(tmp_path / "one", *changed), tmp_path / "before")
    others = [
        attacked("both", "apgd", 0.6),
        attacked("both", "few", 0.5, draws=2),
        attacked("both", "large", 0.1, eps=1.0),
        attacked("ddim-like", "apgd", 0.5, sites=["forward"], seed=1, effort={"steps": 5}),
        attacked(
            "both", "same", 0.5, knows=["reverse"], attack="standard", effort=changed[1].effort
        ),
        make("both", "their-threat", 0.5),
    ]
    write_leaderboards(save(tmp_path / "two", *changed, *others), tmp_path / "after")
    before, after = (table(tmp_path / at / f"{TRACK}.csv", "defense") for at in ("before", "after"))
    filled = [frame.astype(object).where(frame.notna(), "") for frame in (before, after)]
    differs = filled[0] != filled[1]
    assert {column: list(after.index[rows]) for column, rows in differs.items() if rows.any()} == {
        "checks": ["both"],
        "flags": ["both"],
        "tests": ["both", "ddim-like"],
    }
    names = [f"{TRACK}{end}" for end in (".md", ".tex", "-draws.csv")]
    parts = (
        ("## Details", "## What"),
        (r"\bottomrule", r"\begin{minipage}"),
        ("defense", "no end"),
    )
    for name, (start, end) in zip(names, parts, strict=True):
        texts = [(tmp_path / at / name).read_text() for at in ("before", "after")]
        shown = [text.partition(start)[2].partition(end)[0] for text in texts]
        assert shown[0] == shown[1]
    assert not (tmp_path / "before" / f"{TRACK}-attacks.csv").exists()
    assert results_table(tmp_path / "after").loc[("both", "eot", "large"), "robust"] == 0.1
    attacks = attacks_of(tmp_path / "after")
    assert set(attacks.index.droplevel(["threat", "attack"])) == {
        ("both", "none"),
        ("both", "all but forward"),
        ("ddim-like", "none"),
    }
    assert ("both", "none", "their-threat", "standard") in attacks.index
    assert "large" not in attacks.index.get_level_values("attack")


def attacks_of(folder: Path) -> Any:
    return table(folder / f"{TRACK}-attacks.csv", "defense", "knows", "threat", "attack")


def worst_cases(folder: Path) -> Any:
    """The worst case of each defense and knowledge, and of how many draws it is."""
    frame = attacks_of(folder)[["worst_case", "worst_case_draws"]]
    return frame.groupby(["defense", "knows"]).agg(
        lambda column: column.iloc[0] if column.nunique(dropna=False) == 1 else "not the same"
    )


def test_attacks_side_by_side(tmp_path: Path) -> None:
    """Attacks that succeed on different images: the worst case is below each of them."""
    last = [[i >= 10] * 3 for i in range(IMAGES)]
    others = [
        attacked("both", "apgd", [[i >= 20] * 4 for i in range(IMAGES)]),
        attacked("both", "apgd", last, knows=list(BOTH), evaluations=(50, 3)),
    ]
    results = [r for r in matrix() if r.threat not in ("eot", "dwbox") or r.defense != "both"]
    results += [make("both", "eot", 0.65), make("both", "dwbox", 0.5)]
    save(tmp_path / "results", *results, *others)
    paths = write_leaderboards(tmp_path / "results", tmp_path)
    ends = ("-optimality.csv", "-attacks.csv", "-attacks.svg", "-attacks.pdf", "-attacks.md")
    assert [path.name for path in paths[-5:]] == [f"{TRACK}{end}" for end in ends]
    before = [path.read_bytes() for path in paths]
    write_leaderboards(tmp_path / "results", tmp_path)
    assert [path.read_bytes() for path in paths] == before

    rows = attacks_of(tmp_path)
    # Right under eot: images below 26; under apgd: from 20 on.
    assert rows.loc["both", "none"]["robust"].to_dict() == {
        ("eot", "standard"): 0.65,
        ("eot", "apgd"): 0.5,
    }
    apgd = rows.loc["both", "none", "eot", "apgd"]
    assert apgd["worst_case"] == 0.15
    assert apgd["worst_case_lo"] < 0.15 < apgd["worst_case_hi"]
    assert (apgd["worst_case_draws"], apgd["ratio"], apgd["own"]) == (4, 2.5, False)
    assert (apgd["gradient_evaluations"], apgd["forward_evaluations"]) == (500, 0)
    assert json.loads(apgd["effort"])["steps"] == 50
    known = rows.loc["both", "all", "dwbox", "apgd"]
    assert (known["worst_case"], known["forward_evaluations"]) == (0.25, 3)

    text = (tmp_path / f"{TRACK}-attacks.md").read_text()
    assert "## Attacks that know no draw" in text
    assert "## Attacks that know all draws" in text
    assert "| eot | apgd | apgd, 50 steps, EoT-10, gradient exact | both: 500 + 0 |" in text
    assert "| eot | apgd | 50.0 [" in text
    assert "(2.5x) |" in text
    for start in (i for i, line in enumerate(text.splitlines()) if line.startswith("| Threat")):
        block = text.splitlines()[start:]
        assert len({line.count(" | ") for line in block[: block.index("")]}) == 1
    assert all(ord(character) < 128 for character in text)


def test_worst_case_of_hidden_draws_is_judged_on_others(tmp_path: Path) -> None:
    """Each attack is right where the other isn't: the minimum of each draw would be 0."""
    first, second = ([[draw % 2 == i for draw in range(4)]] * IMAGES for i in (0, 1))
    save(tmp_path, make("both", "eot", first), attacked("both", "apgd", second))
    write_leaderboards(tmp_path, tmp_path / "out")
    assert worst_cases(tmp_path / "out").loc[("both", "none"), "worst_case"] == 1


def test_worst_case_is_over_draws_in_common(tmp_path: Path) -> None:
    few = attacked("both", "few", outcomes(0.5, 2), draws=2)
    one = attacked("ddim-like", "one", outcomes(0.5, 1), draws=1, sites=["forward"])
    save(tmp_path, *matrix(), few, one)
    write_leaderboards(tmp_path, tmp_path / "out")
    rows = worst_cases(tmp_path / "out")
    assert rows.loc["both", "none"].tolist() == [0.5, 2]
    assert rows.loc[("ddim-like", "none"), "worst_case_draws"] == 1
    assert pd.isna(rows.loc[("ddim-like", "none"), "worst_case"])


def test_no_worst_case_where_some_noise_is_known(tmp_path: Path) -> None:
    """One image for each draw, whose other noise is left to chance: a minimum would be too low."""
    save(tmp_path, *matrix(), attacked("both", "apgd", 0.3, knows=["forward"]))
    write_leaderboards(tmp_path, tmp_path / "out")
    rows = attacks_of(tmp_path / "out").loc["both", "forward"]
    assert rows["robust"].to_dict() == {("dw-fwd", "standard"): 0.6, ("dw-fwd", "apgd"): 0.3}
    assert rows["worst_case"].isna().all()


def test_attacks_on_a_deterministic_defense_know_all(tmp_path: Path) -> None:
    other = attacked("none", "square", outcomes(0.025, 1), attack="square", sites=[], draws=1)
    save(tmp_path, *matrix(), other)
    write_leaderboards(tmp_path, tmp_path / "out")
    rows = worst_cases(tmp_path / "out")
    assert list(rows.index) == [("none", "all")]
    assert rows.loc[("none", "all"), "worst_case"] == 0.025


# --- The protocol ---------------------------------------------------------------------------------


def threat_entry(folder: Path, name: str, knows: str, budget: int = 200) -> None:
    (folder / "attacks" / "threats").mkdir(parents=True, exist_ok=True)
    (folder / "attacks" / "threats" / f"{name}.yaml").write_text(
        f"title: Another threat model\nknows: {knows}\nattack: standard\ngradient: exact\n"
        f"effort: {{budget: {budget}}}\n"
        "draws: 4\neps: null\nprotocol: true\n"
    )


def test_a_new_threat_model_of_the_protocol_appears_without_another_edit(
    tmp_path: Path, registry: Registry
) -> None:
    """One with another budget, and one that knows what none of the others does."""
    threat_entry(registry.folders[0], "twice", "none", budget=400)
    threat_entry(registry.folders[0], "reverse-only", "[reverse]")
    registry = Registry(registry.folders)
    sites = ["forward", "guidance", "reverse"]
    results = [
        make("new", "eot", 0.5, sites=sites),
        make("new", "twice", 0.4, sites=sites, effort={"budget": 400}),
        make("new", "reverse-only", 0.3, sites=sites, knows=["reverse"]),
    ]
    save(tmp_path / "results", *results)
    write_leaderboards(tmp_path / "results", tmp_path, registry=registry)
    row = table(tmp_path / f"{TRACK}.csv", "defense").loc["new"]
    assert row[["hidden", "twice", "reverse-only"]].tolist() == [0.5, 0.4, 0.3]
    text = (tmp_path / f"{TRACK}.md").read_text()
    assert "| reverse-only | twice |" in text
    assert "- twice: Another threat model." in text
    assert not (tmp_path / f"{TRACK}-attacks.csv").exists()
    # To the package's own protocol, they are other attacks.
    write_leaderboards(tmp_path / "results", tmp_path / "own")
    assert "twice" not in table(tmp_path / "own" / f"{TRACK}.csv", "defense").columns
    assert ("new", "none", "twice", "standard") in attacks_of(tmp_path / "own").index


def test_what_the_protocol_says_equal_must_be_equal(tmp_path: Path, registry: Registry) -> None:
    """A threat model may differ from the others in what its entry says differs, and no more."""
    threat_entry(registry.folders[0], "twice", "none", budget=400)
    registry = Registry(registry.folders)
    own = make("both", "twice", 0.4, effort={"budget": 400}, gradient="bpda")
    save(tmp_path / "results", *matrix(), own)
    with pytest.raises(NotComparable, match=r"gradient exact and bpda"):
        write_leaderboards(tmp_path / "results", tmp_path, registry=registry)


# --- Refusals -------------------------------------------------------------------------------------


def other(**changes: Any) -> Result:
    return make("other", "eot", 0.5, **changes)


ARITHMETIC = {"device": "cpu", "dtype": "float64", "batch_size": 20, "max_batch": 200}


@pytest.mark.parametrize(
    ("result", "field"),
    [
        (other(norm="l2"), "norm linf and l2"),
        (other(eps=8 / 255), "eps 0.15 and 0.03"),
        (other(ids=list(range(16))), r"ids \(40 and 16\)"),
        (other(ids=list(range(1, 41))), r"ids \(40 in both, not the same\)"),
        (other(labels=[0] * IMAGES), "labels"),
        (other(arithmetic=ARITHMETIC), "arithmetic.dtype float32 and float64"),
        (other(effort={"budget": 50}), "effort.budget 200 and 50"),
        (other(effort={"restarts": 5}), "effort.restarts missing and 5"),
        (other(gradient="bpda"), "gradient exact and bpda"),
        (make("both", "strong", 0.5, nfe=10), "evaluations.nfe 20 and 10"),
        (other(draws=1), r"draws \(4 and 1\)"),
        (make("other", "dw-fwd", 0.5, effort={"budget": 1}), "effort.budget 200 and 1"),
        (make("other", "null", 0.5, effort={"budget": 4}), "effort.budget 2 and 4"),
        (make("none", "dwbox", 0.1, sites=(), effort={"budget": 1}), "effort.budget 200 and 1"),
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
    assert f"{result.defense}/{result.threat}/standard/seed-0.json" in message
    assert not (tmp_path / "out").exists()


def test_a_threat_with_a_budget_of_its_own_is_refused(tmp_path: Path) -> None:
    """The forward noise known at a budget of 20, and nothing known at 200, as once published.

    The difference would compare the attacks' strength, not what they know.
    """
    results = [r for r in matrix() if r.threat != "dw-fwd"]
    save(tmp_path, *results, make("both", "dw-fwd", 0.6, effort={"budget": 20}))
    with pytest.raises(NotComparable, match=r"effort\.budget 200 and 20|effort\.budget 20 and 200"):
        leaderboard(load(tmp_path))


def test_fewer_known_or_fresh_draws_are_refused(tmp_path: Path) -> None:
    few = make("ddim-like", "dwbox", 0.2, sites=["forward"], fresh_draws=1)
    save(tmp_path, *matrix(), few)
    with pytest.raises(NotComparable, match="fresh draws 4 and 1"):
        leaderboard(load(tmp_path))


def test_idle_eot_is_no_difference(tmp_path: Path) -> None:
    """A deterministic defense, or one with all draws known, may record any EoT or none."""
    effort = {"budget": 200, "eot": 1}
    known = make("both", "dwbox", 0.25).model_dump(by_alias=True) | {"effort": effort}
    results = [r for r in matrix() if (r.defense, r.threat) != ("both", "dwbox")]
    board = board_of(tmp_path, *results, signed(known))
    assert values(board, "both")["all_known"] == 0.25
    assert board.reference is not None
    assert board.reference.effort == {"budget": 200}


def test_a_seed_for_some_settings_only_is_refused(tmp_path: Path) -> None:
    save(tmp_path, *matrix(), make("both", "eot", 0.6, seed=1))
    with pytest.raises(
        NotComparable, match=r"both/eot/standard/seed-1\.json.*seeds 0, 1 for 'eot', 0"
    ):
        leaderboard(load(tmp_path))


def test_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(BadResult, match=r"no results.*dbp-bench run"):
        load(tmp_path / "nowhere")
    save(tmp_path, *matrix())
    with pytest.raises(BadResult, match=f"on track 'toy-lind'. Did you mean '{TRACK}'"):
        write_leaderboards(tmp_path, tmp_path / "out", "toy-lind")


def test_a_file_that_is_not_where_it_belongs(tmp_path: Path) -> None:
    make("both", "eot", 0.5).write(
        result_path(tmp_path, TRACK, "both", "dwbox", "standard", seed=0)
    )
    with pytest.raises(BadResult, match=r"not where it belongs.*both/eot/standard/seed-0\.json"):
        load(tmp_path)


def test_files_beside_results_are_left_alone(tmp_path: Path) -> None:
    save(tmp_path, *matrix())
    (tmp_path / TRACK / "both" / "eot" / "standard" / "seed-0.cost.json").write_text("{}")
    save(tmp_path / "sweeps" / "eps-1", make("both", "eot", 0.0, eps=1.0))
    save(tmp_path / ".work", make("both", "eot", 0.0, eps=1.0))
    assert len(load(tmp_path)) == len(matrix())


# --- Where results come from ----------------------------------------------------------------------


def test_several_folders_and_files(tmp_path: Path) -> None:
    first, *rest = matrix()
    file = first.path(save(tmp_path / "a", first))
    found = load([file, save(tmp_path / "b", *rest[:3]), save(tmp_path / "c", *rest[3:])])
    assert len(found) == len(matrix())
    assert found[0].name == f"{TRACK}/none/eot/standard/seed-0.json"
    moved = file.rename(tmp_path / "anywhere.json")
    assert load([moved])[0].name == found[0].name


def test_a_setting_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    folders = [save(tmp_path / name, make("both", "eot", 0.5)) for name in "ab"]
    with pytest.raises(BadResult, match="move one of them away") as refused:
        load(folders)
    assert "\n" not in str(refused.value)
    assert all(str(folder) in str(refused.value) for folder in folders)
    with pytest.raises(BadResult, match="move one of them away"):
        load([folders[0], make("both", "eot", 0.5).path(folders[0])])


def test_a_result_of_schema_1_lies_where_it_did(tmp_path: Path) -> None:
    old = Path(__file__).parent / "results" / "schema-1-known.json"
    path = tmp_path / "digits-linf" / "ddim" / "dwbox" / "seed-0.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(old.read_bytes())
    (record,) = load(tmp_path)
    assert record.name == "digits-linf/ddim/dwbox/seed-0.json"
    assert record.defense_folder == tmp_path / "digits-linf" / "ddim"
    new = record.result.path(tmp_path)
    record.result.write(new)
    with pytest.raises(BadResult, match="move one of them away"):
        load(tmp_path)
    path.unlink()
    assert load(tmp_path)[0].defense_folder == tmp_path / "digits-linf" / "ddim"


# --- Files ----------------------------------------------------------------------------------------


def test_files_follow_from_results(tmp_path: Path, registry: Registry) -> None:
    save(tmp_path / "results", *matrix())
    out = tmp_path / "out"
    paths = write_leaderboards(tmp_path / "results", out, registry=registry)
    ends = (".html", ".csv", "-draws.csv", "-convergence.csv", "-results.csv", ".md", ".tex")
    names = [f"{TRACK}{end}" for end in ends]
    assert [path.name for path in paths] == names
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    before = [path.read_bytes() for path in paths]
    write_leaderboards(tmp_path / "results", out, TRACK, registry=registry)
    assert [path.read_bytes() for path in paths] == before


def test_csv_files_of_the_matrix(reported: Path) -> None:
    rows = table(reported / f"{TRACK}.csv", "defense")
    assert list(rows.index) == ["both", "ddim-like", "none"]
    assert rows.loc["both", ["share", "base"]].tolist() == [0.666667, 0.05]
    assert rows["served_by"].fillna("").to_dict() | {"none": ""} == {
        "both": "",
        "ddim-like": "forward_known=dwbox reverse_known=eot",
        "none": "",
    }
    assert f"{TRACK}/both/dwbox/standard/seed-0.json" in rows.loc["both", "results"].split()
    results = results_table(reported)
    assert len(results) == len(matrix())
    assert results["knows"].loc["both"].to_dict() == {
        ("dw-fwd", "standard"): "forward",
        ("dw-rev", "standard"): "all but forward",
        ("dwbox", "standard"): "all",
        ("eot", "standard"): "none",
        ("null", "standard"): "none",
    }
    assert results.loc[("none", "eot", "standard"), "knows"] == "all"
    assert results.loc[("both", "dwbox", "standard"), "fresh"] == 0.75
    assert pd.isna(results.loc[("both", "eot", "standard"), "fresh"])


def test_a_threat_model_called_null_survives_a_csv_file(reported: Path) -> None:
    path = reported / f"{TRACK}-results.csv"
    assert "null" in read_csv(path)["threat"].tolist()
    # As pandas reads by itself, it is a name, too, and no row is lost in groups.
    frame = pd.read_csv(path)
    assert "'null'" in frame["threat"].tolist()
    assert sum(frame.groupby("threat").size()) == len(frame)


@pytest.mark.parametrize("name", ["null", "NA", "nan", "None", "n/a", "NULL", "<NA>"])
def test_names_that_pandas_takes_for_missing_survive(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.csv"
    path.write_text(to_csv(pd.DataFrame({"threat": [name, "eot", None], "n": [1, 2, 3]})))
    assert pd.read_csv(path)["threat"].tolist()[:2] == [f"'{name}'", "eot"]
    assert pd.read_csv(path)["threat"].isna().tolist() == [False, False, True]
    assert read_csv(path)["threat"].tolist()[:2] == [name, "eot"]


def test_markdown_says_what_it_means(tmp_path: Path, registry: Registry) -> None:
    save(tmp_path / "results", *matrix())
    write_leaderboards(tmp_path / "results", tmp_path, registry=registry)
    text = (tmp_path / f"{TRACK}.md").read_text()
    lines = text.splitlines()
    assert lines[0] == r"# A toy \| of 5 % & \_more\_"
    assert "never compare them with CIFAR-10" in lines[2].replace("Never", "never")
    assert "upper bound" in text
    assert "standard, budget 200, gradient exact; linf, eps = 0.15; 40 images" in text
    assert "evaluated on 4 draws" in text
    assert "Known draws: 3" in text
    assert "not the track's own" not in text
    cells = [line.strip("|").split(" | ") for line in lines if line.startswith("| 1-2 | both")]
    assert [len(row) for row in cells] == [12, 8, 10, 10, 10, 10, 8, 8, 8]
    assert cells[0][2] == "100.0<br><sub>[91.2, 100.0]</sub>"
    assert cells[0][4].startswith("65.0<br><sub>[")
    # Every row of a table has as many cells as its head.
    for start in (
        i for i, line in enumerate(lines) if line.startswith(("|  | Defense", "|  | <sub>Defense"))
    ):
        block = lines[start : lines.index("", start)]
        assert len({line.count(" | ") for line in block}) == 1
    ddim = next(line for line in lines if "ddim-like" in line)
    assert ddim.count("=<br>") == 2
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
    rows = [line for line in tex.splitlines() if line.startswith("1-2 & both")]
    assert [row.count(" & ") + 1 for row in rows] == [12, 8, 10, 8]
    assert r"A toy | of 5 \% \& \_more\_" in tex
    assert "upper bound" in tex


def test_outcomes_as_one_table(tmp_path: Path) -> None:
    odd = make("both", "dw-fwd", 0.5).model_dump(by_alias=True)
    odd["predicted"]["adversarial"][-1][-1] = -2
    results = [make("both", "eot", 0.65), make("both", "dwbox", 0.25, fresh=0.75), signed(odd)]
    save(tmp_path / "results", *results)
    paths = [record.path for record in load(tmp_path / "results")]
    outcomes_csv(paths, tmp_path / "outcomes.csv")
    rows = table(tmp_path / "outcomes.csv", "threat")
    assert len(rows) == sum(len(r.ids) * len(r.draws) for r in results)
    known = rows.loc["dwbox"]
    assert known["image"].tolist()[:4] == [0, 0, 0, 1]
    assert known["draw"].tolist()[:4] == [0, 1, 2, 0]
    assert known["robust"].mean() == 0.25
    assert ((known["adversarial"] == known["label"]) == known["robust"].astype(bool)).all()
    assert known["fresh"].mean() == 0.75
    assert rows.loc["eot", "fresh"].isna().all()
    assert rows.loc["dw-fwd", "adversarial"].isna().sum() == 1
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


def test_a_report_needs_no_torch_and_one_result_no_pandas() -> None:
    code = (
        "import sys, dbp_bench.reporting.pool, dbp_bench.reporting.sanity; "
        "print({'torch', 'pandas', 'matplotlib'} & set(sys.modules)); "
        "import dbp_bench.reporting.report; print({'torch'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split("\n") == ["set()", "set()", ""]


# --- What others verified ------------------------------------------------------------------------


def test_a_row_carries_its_badge(tmp_path: Path) -> None:
    save(tmp_path, *matrix(), make("none", "eot", 0.0, sites=()))
    folder = tmp_path / TRACK / "both"
    files = sorted(folder.glob("*/*/seed-*.json"))
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
    assert rows_frame(board).set_index("defense")["badge"].to_dict() == badges
    assert "- replayed: both.\n" in leaderboard_markdown(board)
    files[0].write_text(files[0].read_text() + "\n")
    assert {row.badge for row in leaderboard(load(tmp_path)).rows} == {"self-reported"}


def test_several_folders_of_results(command: Command, tmp_path: Path) -> None:
    results = matrix()
    save(tmp_path / "a", *results[:5])
    save(tmp_path / "b", *results[5:])
    both = ("--results", tmp_path / "a", "--results", tmp_path / "b")
    said = command("report", *both, "--out", tmp_path / "split")
    assert (said.code, said.err) == (0, "")
    whole = ("--results", save(tmp_path / "c", *results), "--out", tmp_path / "whole")
    assert command("report", *whole).code == 0
    split = {path.name: path.read_bytes() for path in (tmp_path / "split").iterdir()}
    assert split == {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    pair = ("both/dwbox", "ddim-like/dwbox", "--track", "toy-linf")
    assert command("compare", *pair, *both).code == 0
    said = command("compare", *pair, "--results", tmp_path / "a")
    assert said.code == 2
    assert "'ddim-like'" in said.err
