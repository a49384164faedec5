"""`make gpu`: what a stage found outlives it, packages come from wheels; all is rehearsed."""

import json
import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import requires
from pathlib import Path

import pytest

from speed import gpu
from speed.gpu import Outcome, Report, Stage


def stage(name: str, code: str, seconds: float = 60) -> Stage:
    return Stage(name, f"About {name}.", [sys.executable, "-S", "-c", code], seconds)


def ran(out: Path, *stages: Stage, seconds: float = 60) -> tuple[bool, dict[str, Outcome], str]:
    report = Report(out)
    passed = gpu.run(stages, report, seconds, dict(os.environ))
    written = json.loads((out / "report.json").read_text())
    assert [each["said"] for each in written["stages"]] == [each.said for each in report.stages]
    return passed, {each.name: each for each in report.stages}, (out / "summary.md").read_text()


def test_a_stage_that_is_cut_or_fails_takes_nothing_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows are in the report, its processes are ended, and the next stages run."""
    monkeypatch.setattr(gpu, "LEAST", 0)
    found = tmp_path / "slow.json"
    slow = f"""
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
pathlib.Path({str(found)!r}).write_text('{{"rows": [{{"child": %d, "share": 0.25}}]}}' % child.pid)
print("half way", flush=True)
time.sleep(60)
"""
    passed, stages, summary = ran(
        tmp_path,
        stage("slow", slow, 1.5),
        stage("wrong", "print('so far'); raise SystemExit('no such device')"),
        stage("right", "print('all is well')"),
        Stage("idle", "About idle.", [], 60, "no images"),
    )
    assert not passed
    assert {name: each.said for name, each in stages.items()} == {
        "slow": "cut after 2 s",
        "wrong": "failed",
        "right": "passed",
        "idle": "skipped: no images",
    }
    assert stages["slow"].tail == ["half way"]
    assert sorted(stages["wrong"].tail) == ["no such device", "so far"]
    assert stages["right"].tail == []
    assert "| 0.25 |" in summary
    assert "no such device" in summary
    child = stages["slow"].found["rows"][0]["child"]
    state = Path(f"/proc/{child}/stat")
    assert not state.is_file() or ") Z " in state.read_text()
    assert "all is well" in (tmp_path / "log.txt").read_text()


def test_a_stage_for_which_no_time_is_left_is_skipped(tmp_path: Path) -> None:
    passed, stages, _ = ran(tmp_path, stage("late", "raise SystemExit(1)"), seconds=gpu.LEAST - 1)
    assert passed
    assert stages["late"].said == "skipped: no time is left"


# ------------------------------------------------------------------------------------- packages


def wheel(folder: Path, name: str, *requirements: str) -> Path:
    path = folder / f"{name}-1.0-py3-none-any.whl"
    lines = ["Metadata-Version: 2.1", *(f"Requires-Dist: {each}" for each in requirements)]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}-1.0.dist-info/METADATA", "\n".join(lines))
    return path


def test_a_wheel_brings_those_that_it_needs(tmp_path: Path) -> None:
    a = wheel(tmp_path, "a_one", "B.two>=2", "numpy", 'c; extra == "all"')
    b = wheel(tmp_path, "b_two", "a-one")
    c = wheel(tmp_path, "c")
    assert gpu.wheels_of(["A-One", "elsewhere"], tmp_path) == [a, b]
    assert gpu.wheels_of(["c"], tmp_path) == [c]


def test_what_is_missing_or_too_old() -> None:
    wanted = {"pytest": (9,), "numpy": (99, 1), "no-such-package": (), "torch": (2, 6)}
    assert gpu.missing(wanted) == ["numpy", "no-such-package"]


def test_every_package_that_is_needed_is_carried() -> None:
    """With all that it needs in turn, but torch, NumPy, and what the network alone needs."""
    carried = {gpu._key(name) for name in (*gpu.LIGHT, *gpu.HEAVY)}
    absent = {gpu._key(name) for name in (*gpu.PRESENT, "hf-xet")}
    assert {gpu._key(name) for name in gpu.needed()} <= carried | absent
    for name in carried:
        for each in requires(name) or []:
            needed, _, marker = each.partition(";")
            if not re.search("extra|python_version <|platform_system|sys_platform", marker):
                assert gpu._key(re.split(r"[^\w.-]", needed)[0]) in carried | absent, each
    pins = (gpu.TOP / "requirements" / "constraints.txt").read_text()
    pinned = {gpu._key(line.partition("==")[0]) for line in pins.splitlines()}
    assert carried <= pinned


# ------------------------------------------------------------------------------------ the whole


@pytest.mark.slow
def test_the_rehearsal_passes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "speed.gpu", "--rehearse", "--out", str(tmp_path)]
    done = subprocess.run(
        command, cwd=gpu.TOP / "benchmark", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + (tmp_path / "summary.md").read_text()
    report = json.loads((tmp_path / "report.json").read_text())
    stages = {each["name"]: each for each in report["stages"]}
    assert list(stages) == ["packages", "machine", "tests", "equality", "speed", "training"]
    assert all(each["said"] == "passed" for each in list(stages.values())[1:])
    assert all(row["same digest"] for row in stages["equality"]["found"]["outcomes"])
    assert [row["updates"] for row in stages["training"]["found"]["recipes"]] == [4, 4, 4]
    assert len(next(iter(stages["speed"]["found"].values()))) == 6
    assert len(list(tmp_path.iterdir())) <= 8
