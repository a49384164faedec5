"""Committed results, leaderboards and README belong together, and can be made anew."""

import json
from pathlib import Path

import numpy as np
import pytest

from dbp_bench.entries.registry import Registry
from dbp_bench.reporting.report import write_leaderboards
from dbp_bench.reporting.statistics import Bootstrap
from dbp_bench.result import Result
from dbp_bench.runs.execute import execute
from dbp_bench.runs.job import Overrides, identity_of, plan, resolve

TOP = Path(__file__).parents[1]
RESULTS, LEADERBOARDS = TOP / "results", TOP / "leaderboards"
TRACK = "digits-linf"


def committed(defense: str, threat: str) -> Result:
    return Result.read(RESULTS / TRACK / defense / threat / "seed-0.json")


def test_the_leaderboards_follow_from_the_results(tmp_path: Path) -> None:
    written = write_leaderboards(RESULTS, tmp_path)
    want = {path.name for path in LEADERBOARDS.iterdir() if path.name != "README.md"}
    assert {path.name for path in written} == want
    for path in written:
        assert path.read_text() == (LEADERBOARDS / path.name).read_text(), path.name


def test_the_readme_shows_the_leaderboard() -> None:
    shown = (TOP / "README.md").read_text().split("<!-- leaderboard -->")[1]
    tables = [
        block
        for block in (LEADERBOARDS / f"{TRACK}.md").read_text().split("\n\n")
        if block.startswith("|")
    ]
    assert tables[0] in shown
    assert tables[1] in shown


def test_the_whole_matrix_is_there_and_belongs_to_the_entries() -> None:
    jobs = plan(Registry(), TRACK, ["all"], ["all"], seed=0, device="cpu", overrides=Overrides())
    protocol = {"eot", "whitebox", "dw-fwd", "dw-rev", "dwbox", "null"}
    missing = []
    for item in jobs:
        if item.instead is not None or item.job.threat.name not in protocol:
            continue
        path = item.job.path(RESULTS)
        if not path.is_file():
            missing.append(item.job.label)
            continue
        result = Result.read(path)
        assert identity_of(result) == item.job.identity(), item.job.label
        assert result.ids == item.job.track_ids
        assert not result.provenance.dirty
    assert not missing


def test_addt_gains_under_the_dw_box() -> None:
    """The paired difference to ddpm, on the same images and draws, is above zero."""
    ddpm, addt = committed("ddpm", "dwbox"), committed("addt", "dwbox")
    assert (ddpm.ids, ddpm.draws, ddpm.effort) == (addt.ids, addt.draws, addt.effort)
    bootstrap = Bootstrap(len(ddpm.ids))
    right = [bootstrap.mean([sum(row) for row in r.robust], len(r.draws)) for r in (addt, ddpm)]
    assert bootstrap.estimate(right[0] - right[1]).low > 0


def test_the_null_attack_gives_exactly_the_clean_outcomes() -> None:
    results = [Result.read(path) for path in sorted(RESULTS.glob("*/*/null/seed-*.json"))]
    assert results
    for result in results:
        assert result.robust == result.clean, result.defense


@pytest.mark.parametrize(("defense", "threat"), [("ddpm", "dwbox"), ("noise-only", "whitebox")])
def test_a_part_of_the_matrix_again(defense: str, threat: str, tmp_path: Path) -> None:
    """Equal on the same kind of machine; elsewhere rounding may change a few outcomes."""
    want = committed(defense, threat)
    job = resolve(
        Registry(),
        TRACK,
        defense,
        threat,
        seed=0,
        device="cpu",
        overrides=Overrides(examples=60),
    )
    got = Result.read(execute(job, Registry(), tmp_path))
    for kind in ("clean", "robust"):
        mine, theirs = np.array(getattr(got, kind)), np.array(getattr(want, kind))[:60]
        assert np.mean(mine != theirs) <= 0.02, kind


def test_result_files_are_as_the_record_writes_them() -> None:
    for path in sorted(RESULTS.glob("*/*/*/seed-*.json")):
        assert Result.read(path).to_json() == path.read_text(), path
        json.loads((path.parent / f"runtime-{path.name}").read_text())
