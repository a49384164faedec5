"""Files and folders are written whole or not at all; commands keep out of each other's way."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import Command
from dbp_bench.errors import BadRequest
from dbp_bench.writing import (
    Busy,
    locked,
    scratch_folder,
    sweep,
    write_atomically,
    write_together,
)

DEAD = 2**22 + 1
"""A process number that no process has."""

HALF = """
import os, signal, sys
from pathlib import Path
from dbp_bench import writing
at, count = int(sys.argv[2]), 0
def counted(function):
    def call(*arguments, **options):
        global count
        count += 1
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call
for name in ("fsync", "link"):
    setattr(os, name, counted(getattr(os, name)))
writing._exchange = counted(writing._exchange)
writing.shutil.rmtree = counted(writing.shutil.rmtree)
Path.mkdir = counted(Path.mkdir)
new = {f"{i}": "new" for i in range(3)} | {"deep/3": "new"}
writing.write_together(Path(sys.argv[1]), new, with_folders=True)
"""


def _contents(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


def test_a_folder_is_all_old_or_all_new_wherever_it_is_killed(tmp_path: Path) -> None:
    old = {**{f"{i}": "old" for i in range(3)}, "deep/3": "old", "deep/README.md": "stays"}
    seen = set()
    for at in range(1, 22):
        folder = tmp_path / "out"
        for name, text in old.items():
            write_atomically(folder / name, text)
        done = subprocess.run([sys.executable, "-c", HALF, str(folder), str(at)], check=False)
        found = _contents(folder)
        assert found.pop("deep/README.md") == "stays"
        assert len(set(found.values())) == 1, at
        seen.add((done.returncode, found["0"]))
    assert seen == {(-9, "old"), (-9, "new"), (0, "new")}
    write_together(folder, {"0": "last"}, with_folders=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "what was left is swept"


def test_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    write_together(tmp_path / "a/b", {"x": "1"})
    assert _contents(tmp_path / "a/b") == {"x": "1"}


@pytest.mark.parametrize("why", ["inside", "folders"])
def test_a_folder_that_is_not_swapped(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    (folder / "sub").mkdir(parents=True) if why == "folders" else folder.mkdir()
    if why == "inside":
        monkeypatch.chdir(folder)
    node = folder.stat().st_ino
    write_together(folder, {"x": "1"})
    assert (folder / "x").read_text() == "1"
    assert folder.stat().st_ino == node
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_without_an_exchange_each_file_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_together(tmp_path / "out", {"x": "old", "y": "stays"})
    monkeypatch.setattr("dbp_bench.writing._exchange", lambda *_: False)
    write_together(tmp_path / "out", {"x": "new"})
    assert _contents(tmp_path / "out") == {"x": "new", "y": "stays"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_killed_commands_left_is_swept(tmp_path: Path) -> None:
    path = tmp_path / "a[b].json"
    dead = [tmp_path / f".{path.name}.{DEAD}.tmp", tmp_path / f".{path.name}.{DEAD}.x.tmp"]
    alive = tmp_path / f".{path.name}.{os.getppid()}.tmp"
    other = tmp_path / f".b.json.{DEAD}.tmp"
    for left in (dead[0], alive, other):
        left.write_text("half")
    dead[1].mkdir()
    write_atomically(path, "whole")
    assert set(tmp_path.iterdir()) == {path, alive, other}
    sweep(tmp_path / "nothing")


def test_a_killed_start_of_a_defense_is_swept(command: Command, tmp_path: Path) -> None:
    (tmp_path / f".mine.{DEAD}.tmp").mkdir()
    assert command("new", "defense", "my_defense", "--out", tmp_path / "mine").code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_scratch_folders_of_killed_commands_are_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / f".kind.{DEAD}.abc.tmp/deep").mkdir(parents=True)
    with scratch_folder("kind") as folder:
        assert list(tmp_path.iterdir()) == [folder]
    assert not list(tmp_path.iterdir())


def test_a_full_disk_names_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dbp_bench.writing.os.fsync", full)
    writes: list[Callable[[Path], None]] = [
        lambda path: write_atomically(path, "x"),
        lambda path: write_together(path, {"a": "x"}),
    ]
    for number, write in enumerate(writes):
        with pytest.raises(OSError, match=f"No space left.*{number}'") as caught:
            write(tmp_path / f"{number}")
        assert caught.value.filename == str(tmp_path / f"{number}")
    assert not list(tmp_path.iterdir())


def test_a_lock_keeps_others_away(tmp_path: Path) -> None:
    with locked(tmp_path / "x", what="run"):
        with pytest.raises(Busy, match=r"x: another run is at work there\."):
            locked(tmp_path / "x", what="run").__enter__()
        with locked(tmp_path / "y", what="run"):
            pass
    with locked(tmp_path / "x", what="run"):
        pass
    assert issubclass(Busy, BadRequest)


# ------------------------------------------------------------------------------------- commands

RUN = ("run", "--defense", "none", "--examples", "2", "--draws", "3", "--budget", "2")


def test_two_trainings_into_one_folder(command: Command, tmp_path: Path) -> None:
    words = ("train", "classifier", "--updates", "1", "--batch-size", "2", "--out", tmp_path)
    with locked(tmp_path / ".train", what="training"):
        said = command(*words)
        assert said.code == 2
        assert said.err == f"dbp-bench: {tmp_path}/.train: another training is at work there.\n"
    assert not list(tmp_path.glob("*.safetensors"))


def test_two_runs_into_one_folder(tmp_path: Path) -> None:
    """The second takes the next free job, then waits for the first."""
    busy = tmp_path / ".work/digits-linf/none/null/standard/seed-0"
    words = [*RUN, "--threat", "null,eot", "--out", str(tmp_path)]
    code = "from dbp_bench.cli import main; main()"
    with locked(busy, what="run of this job"):
        second = subprocess.Popen(
            [sys.executable, "-c", code, *words], stdout=subprocess.PIPE, text=True
        )
        made = tmp_path / "digits-linf/none/eot/standard/seed-0.json"
        until = time.monotonic() + 120
        while not made.is_file() and time.monotonic() < until:
            time.sleep(0.1)
        assert made.is_file()
        assert second.poll() is None
    said, _ = second.communicate(timeout=120)
    assert second.returncode == 0
    assert "none / null: another command runs it; waiting for that one." in said
    assert (tmp_path / "digits-linf/none/null/standard/seed-0.json").is_file()


def test_a_run_whose_only_job_is_busy_says_so(command: Command, tmp_path: Path) -> None:
    busy = tmp_path / ".work/digits-linf/none/null/standard/seed-0"
    with locked(busy, what="run of this job"):
        said = command(*RUN, "--threat", "null", "--out", tmp_path)
    assert said.code == 2
    assert "another run of this job is at work there" in said.err


def test_a_killed_run_leaves_nothing_half_written(tmp_path: Path) -> None:
    words = [*RUN, "--threat", "eot", "--out", str(tmp_path)]
    code = "from dbp_bench.cli import main; main()"
    left = tmp_path / f"digits-linf/none/eot/standard/.seed-0.json.{DEAD}.tmp"
    left.parent.mkdir(parents=True)
    left.write_text("half")
    process = subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.DEVNULL)
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run([sys.executable, "-c", code, *words], check=True, stdout=subprocess.DEVNULL)
    assert not list(tmp_path.rglob("*.tmp"))
