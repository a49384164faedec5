"""Committed results, leaderboards and README belong together, and can be made anew."""

from pathlib import Path

import numpy as np
import pytest

from dbp_bench.entries.registry import Registry
from dbp_bench.reporting.protocol import shipped
from dbp_bench.reporting.records import Record, load
from dbp_bench.reporting.report import write_leaderboards
from dbp_bench.reporting.statistics import Bootstrap
from dbp_bench.result import Result
from dbp_bench.runs.execute import execute
from dbp_bench.runs.job import Overrides, identity_of, plan, resolve

TOP = Path(__file__).parents[1]
RESULTS, LEADERBOARDS = TOP / "results", TOP / "leaderboards"
TRACK = "digits-linf"


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return load(RESULTS)


@pytest.fixture(scope="module")
def matrix(records: list[Record]) -> dict[tuple[str, str], Result]:
    """By defense and threat model, what the protocol measured on the digits."""
    results = [record.result for record in records if record.result.track == TRACK]
    return {(r.defense, r.threat): r for r in results if shipped().holds(r) and r.seed == 0}


def test_the_leaderboards_follow_from_the_results(tmp_path: Path) -> None:
    written = write_leaderboards(RESULTS, tmp_path)
    want = {path.name for path in LEADERBOARDS.iterdir() if path.name != "README.md"}
    assert {path.name for path in written} == want
    for path in written:
        assert path.read_bytes() == (LEADERBOARDS / path.name).read_bytes(), path.name


def test_the_readme_shows_the_leaderboard() -> None:
    shown = (TOP / "README.md").read_text().split("<!-- leaderboard -->")[1]
    tables = [
        block
        for block in (LEADERBOARDS / f"{TRACK}.md").read_text().split("\n\n")
        if block.startswith("|")
    ]
    assert tables[0] in shown


def test_the_whole_matrix_is_there_and_belongs_to_the_entries(
    matrix: dict[tuple[str, str], Result],
) -> None:
    jobs = plan(Registry(), TRACK, ["all"], ["all"], seed=0, device="cpu", overrides=Overrides())
    missing = []
    for item in jobs:
        job = item.job
        if item.instead is not None:
            continue
        result = matrix.get((job.subject.name, job.threat.name))
        if result is None:
            missing.append(job.label)
            continue
        held, asked = identity_of(result), job.identity()
        if not result.classes_recorded:
            # Of schema 1: options that came or went since say what was fixed before.
            shared = held["options"].keys() & asked["options"].keys()
            for each in (held, asked):
                each["options"] = {key: each["options"][key] for key in shared}
        assert held == asked, job.label
        assert result.ids == job.track_ids
        assert not result.provenance.dirty
    assert missing == []


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_further_seeds_belong_to_the_entries(records: list[Record], seed: int) -> None:
    """They are of some defenses alone; each of these has every threat model that it needs."""
    held = [r.result for r in records if r.result.track == TRACK and r.result.seed == seed]
    shown = {(r.defense, r.threat): r for r in held if shipped().holds(r)}
    defenses = sorted({defense for defense, _ in shown})
    assert defenses
    jobs = plan(
        Registry(), TRACK, defenses, ["all"], seed=seed, device="cpu", overrides=Overrides()
    )
    for job in (item.job for item in jobs if item.instead is None):
        result = shown[job.subject.name, job.threat.name]
        assert identity_of(result) == job.identity(), job.label
        assert result.ids == job.track_ids
        assert not result.provenance.dirty


def test_addt_gains_under_the_dw_box(matrix: dict[tuple[str, str], Result]) -> None:
    """The paired difference to ddpm, on the same images and draws, is above zero."""
    ddpm, addt = matrix["ddpm", "dwbox"], matrix["addt", "dwbox"]
    assert (ddpm.ids, ddpm.draws, ddpm.effort) == (addt.ids, addt.draws, addt.effort)
    bootstrap = Bootstrap(len(ddpm.ids))
    right = [
        bootstrap.mean(r.right("adversarial").sum(1).tolist(), len(r.draws)) for r in (addt, ddpm)
    ]
    assert bootstrap.estimate(right[0] - right[1]).low > 0


def test_the_null_attack_gives_exactly_the_clean_outcomes(records: list[Record]) -> None:
    results = [record.result for record in records if record.result.threat == shipped().null]
    assert results
    for result in results:
        assert result.predicted.adversarial == result.predicted.clean, result.defense


@pytest.mark.parametrize(("defense", "threat"), [("ddpm", "eot"), ("noise-only", "dwbox")])
def test_a_part_of_the_matrix_again(
    defense: str, threat: str, tmp_path: Path, matrix: dict[tuple[str, str], Result]
) -> None:
    """Equal on the same kind of machine; elsewhere rounding may change a few outcomes."""
    job = resolve(
        Registry(),
        *(TRACK, defense, threat),
        seed=0,
        device="cpu",
        overrides=Overrides(examples=60),
    )
    got, want = Result.read(execute(job, tmp_path)), matrix[defense, threat]
    for mine, theirs in (
        (got.right("clean"), want.right("clean")),
        (got.right("adversarial"), want.right("adversarial")),
    ):
        assert np.mean(mine != theirs[:60]) <= 0.02


def test_result_files_are_as_the_record_writes_them(records: list[Record]) -> None:
    for record in records:
        text = record.path.read_text()
        if not text.startswith('{\n "schema": 1'):
            assert record.result.to_json() == text, record.path
