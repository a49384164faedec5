"""Commands killed at random moments: what is there is whole, and going on ends the same."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

MAIN = [sys.executable, "-c", "from dbp_bench.cli import main; main()"]
KILLS = int(os.environ.get("DBP_TEST_KILLS", "3"))
"""Kills of each command; DBP_TEST_KILLS takes another number."""

pytestmark = pytest.mark.slow


def process(where: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """``dbp-bench`` in the folder `where`."""
    return subprocess.Popen(
        [*MAIN, *arguments],
        cwd=where,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def finish(where: Path, *arguments: str) -> None:
    """Run the command to its end."""
    running = process(where, *arguments)
    _, said = running.communicate()
    assert running.returncode == 0, said.decode()


def contents(folder: Path) -> dict[str, str]:
    """The sha256 of each file that a command made, but for logs, which have times.

    What is hidden is unfinished work.
    """
    return {
        path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.suffix != ".jsonl"
        and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    }


def kill_and_go_on(
    tmp_path: Path,
    seed: int,
    arguments: list[str],
    *,
    prepare: Callable[[Path], None] = lambda _: None,
    check: Callable[[Path, dict[str, str]], None],
) -> None:
    """Kill a command :data:`KILLS` times, go on each time, and compare with one that was not.

    Args:
        tmp_path: Where it happens.
        seed: Decides the moments.
        arguments: The command.
        prepare: Puts into a folder what the command starts from.
        check: Looks at what a killed command left, given what it should be in the end.
    """
    moments = random.Random(seed)
    whole = tmp_path / "whole"
    whole.mkdir()
    prepare(whole)
    started = time.monotonic()
    finish(whole, *arguments)
    seconds = time.monotonic() - started
    wanted = contents(whole)
    killed = number = 0
    while killed < KILLS:
        number += 1
        here = tmp_path / str(number)
        here.mkdir()
        prepare(here)
        running = process(here, *arguments)
        # Most of the time is spent on imports: two of three kills are in the last third.
        least = 0.0 if killed % 3 == 0 else 0.6
        time.sleep(moments.uniform(least, 1.0) * seconds)
        running.send_signal(signal.SIGKILL)
        running.communicate()
        if running.returncode == -signal.SIGKILL:
            killed += 1
        else:
            seconds *= 0.8  # It ended before: the machine has become faster.
        check(here, wanted)
        finish(here, *arguments)
        assert contents(here) == wanted, f"kill {number}"
        shutil.rmtree(here)


def whole_files(here: Path, wanted: dict[str, str]) -> None:
    """Every file that is there is what it will be."""
    found = contents(here)
    assert {name: digest for name, digest in found.items() if wanted.get(name) != digest} == {}


SMALL = ["--budget", "8", "--batch-size", "20", "--seed", "0"]
RUN = ["run", "--defense", "oneshot", "--threat", "eot,dwbox", "--examples", "120", *SMALL]


def test_run(tmp_path: Path) -> None:
    kill_and_go_on(tmp_path, 1, [*RUN, "--save-adversarial"], check=whole_files)


def test_certify(tmp_path: Path) -> None:
    """Between groups of ten images, and between noise levels."""
    votes = ["--n0", "10", "--n", "1000", "--examples", "40", "--max-batch", "100"]
    arguments = ["certify", "--defense", "dds", "--sigma", "0.25,0.5", *votes]
    kill_and_go_on(tmp_path, 6, arguments, check=whole_files)


def test_verify(tmp_path: Path) -> None:
    """It changes nothing of what it verifies, and its scratch files are elsewhere."""

    def prepare(here: Path) -> None:
        if not (tmp_path / "made").is_dir():
            (tmp_path / "made").mkdir()
            finish(tmp_path / "made", *RUN)
        shutil.copytree(tmp_path / "made/results", here / "results")

    file = "results/digits-linf/oneshot/dwbox/standard/seed-0.json"
    arguments = ["verify", file, "--again", "--pictures"]
    kill_and_go_on(tmp_path, 2, arguments, prepare=prepare, check=whole_files)


def test_train(tmp_path: Path) -> None:
    arguments = ["train", "classifier", "--updates", "60", "--checkpoint-every", "5", "--quiet"]

    def check(here: Path, wanted: dict[str, str]) -> None:
        """Of the weights, all or nothing; the log grows."""
        found = contents(here)
        weights = [each for each in wanted if each.endswith(".safetensors")]
        assert weights
        for each in weights:
            assert found.get(each, wanted[each]) == wanted[each]

    kill_and_go_on(tmp_path, 3, arguments, check=check)


def test_report(tmp_path: Path) -> None:
    """Over the leaderboards of fewer results: all files are old, or all are new."""
    top = Path(__file__).parents[1] / "results/digits-linf"
    threats = ("null", "eot", "dwbox")

    def add(here: Path, defense: str) -> None:
        for threat in threats:
            path = f"{defense}/{threat}/standard/seed-0.json"
            if (top / path).is_file():
                to = here / "results/digits-linf" / path
                to.parent.mkdir(parents=True)
                shutil.copy(top / path, to)

    def prepare(here: Path) -> None:
        for defense in ("none", "ddim"):
            add(here, defense)
        if not (tmp_path / "before").is_dir():
            finish(here, "report")
            shutil.copytree(here / "leaderboards", tmp_path / "before")
        else:
            shutil.copytree(tmp_path / "before", here / "leaderboards")
        add(here, "oneshot")

    def check(here: Path, wanted: dict[str, str]) -> None:
        found = contents(here / "leaderboards")
        new = {
            name.removeprefix("leaderboards/"): digest
            for name, digest in wanted.items()
            if name.startswith("leaderboards/")
        }
        assert found in (contents(tmp_path / "before"), new), "half a set"

    kill_and_go_on(tmp_path, 4, ["report"], prepare=prepare, check=check)


def test_submit(tmp_path: Path) -> None:
    """The bundle is whole or not there; the one that it replaces is kept until then."""

    def prepare(here: Path) -> None:
        made = tmp_path / "made"
        if not made.is_dir():
            made.mkdir()
            finish(made, "new", "defense", "mine")
            own = ["--entries", "mine", "--trust-code", "--save-adversarial"]
            finish(made, "run", "--defense", "mine", "--threat", "all", *own)
        shutil.copytree(made / "mine", here / "mine")
        shutil.copytree(made / "results", here / "results")

    arguments = ["submit", "mine", "--entries", "mine", "--force"]
    kill_and_go_on(tmp_path, 5, arguments, prepare=prepare, check=whole_files)
