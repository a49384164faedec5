"""Modules beside entries are found by path: each entry gets its own code, and no other."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dbp_bench.entries import outside
from dbp_bench.entries.registry import Registry
from dbp_bench.errors import BadEntry
from dbp_bench.runs.job import Job, Overrides, resolve
from own_entries import folder, toy_defense

MODULE = """{head}
from dataclasses import dataclass

@dataclass(frozen=True)
class Pure:
    sites: frozenset = frozenset()
    mark: float = {mark}
    def __call__(self, images, noise):
        return images + self.mark

def build():
    return Pure()
"""


def write(path: Path, mark: str, head: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(MODULE.format(mark=mark, head=head))
    return path


def entry(top: Path, name: str, factory: str) -> Path:
    return folder(top, defenses={name: toy_defense(factory, [])})


def job(name: str, *folders: Path, **more: Any) -> Job:
    return resolve(
        *(Registry(folders, trust_code=True), "digits-linf", name, "eot"),
        seed=0,
        device="cpu",
        overrides=Overrides(examples=2),
        **more,
    )


def mark(asked: Job) -> float:
    """The number that tells which code runs."""
    purifier: Any = asked.defense().purifier
    images = torch.zeros(1, 1, 8, 8)
    return round(float(purifier(images, None).max()), 3)


def test_modules_of_one_name_in_two_folders(tmp_path: Path) -> None:
    for number in "12":
        top = entry(tmp_path / number, f"d{number}", "same:build")
        write(top / "same.py", f"0.{number}")
    both = tmp_path / "1", tmp_path / "2"
    for folders in (both, both[::-1]):
        found = {number: job(f"d{number}", *folders) for number in "12"}
        assert {number: mark(each) for number, each in found.items()} == {"1": 0.1, "2": 0.2}
        for number, each in found.items():
            alone = outside.source("same", [tmp_path / number])
            assert alone is not None
            assert each.code == {"same": alone.sha256}
    assert "same" not in sys.modules


def test_an_installed_copy_does_not_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "old/mine_here.py", "0.1", "raise RuntimeError")
    monkeypatch.syspath_prepend(tmp_path / "old")
    write(entry(tmp_path / "new", "mine", "mine_here:build") / "mine_here.py", "0.2")
    asked = job("mine", tmp_path / "new")
    assert mark(asked) == 0.2
    source = outside.source("mine_here", [tmp_path / "new"])
    assert source is not None
    assert asked.code == {"mine_here": source.sha256}


@pytest.mark.parametrize("name", ["types", "random", "code", "json", "torch", "builtins"])
def test_a_module_may_be_called_like_one_of_pythons(name: str, tmp_path: Path) -> None:
    both = name in ("random", "torch")
    head = f"import {name}; assert {name}.__file__ != __file__" if both else ""
    write(entry(tmp_path, "mine", f"{name}:build") / f"{name}.py", "0.3", head)
    before = sys.modules.get(name)
    asked = job("mine", tmp_path)
    assert mark(asked) == 0.3
    assert list(asked.code) == [name]
    assert sys.modules.get(name) is before


def test_modules_of_one_folder_import_one_another(tmp_path: Path) -> None:
    top = entry(tmp_path, "mine", "first.part:build")
    head = """
from . import own
import helper, second.inner as inner, second.inner
import importlib, importlib.util as util, json
from importlib import import_module
assert importlib.import_module("first.own") is own is import_module("first.own")
assert importlib.import_module(".own", __package__) is own
assert import_module("json") is json and util is importlib.util
from helper import value
from second import inner as again
from dbp_bench.noise import FORWARD
def later():
    import late
    return late.value
assert inner is again is second.inner and helper.value == value == 1 and own.value == 2
assert later() == 4
"""
    write(top / "first/part.py", "0.4", head)
    for name, text in {
        "first/__init__.py": "",
        "first/own.py": "from .deep.x import value",
        "first/deep/x.py": "import helper\nvalue = helper.value + 1",
        "helper.py": "value = 1",
        "second/inner.py": "from first.own import value",
        "late.py": "import inspect, sys\nvalue = 4\ninspect.getsource(sys.modules[__name__])",
    }.items():
        (top / name).parent.mkdir(exist_ok=True)
        (top / name).write_text(text)
    assert mark(job("mine", tmp_path)) == 0.4
    assert not list(tmp_path.rglob("__pycache__"))
    assert not {"first", "helper", "second", "late"} & set(sys.modules)


@pytest.mark.parametrize(
    "head", ["__import__('helper')", "import importlib\nimportlib.import_module('helper')"]
)
def test_what_ran_is_what_was_hashed(
    head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that no import statement names isn't in the hash, and none comes in its place."""
    top = entry(tmp_path, "mine", "first:build")
    write(top / "first.py", "0.1", head)
    (top / "helper.py").write_text("value = 1")
    (tmp_path / "old").mkdir()
    (tmp_path / "old/helper.py").write_text("value = 0")
    monkeypatch.syspath_prepend(tmp_path / "old")
    with pytest.raises(BadEntry, match=r"helper lies in .*: write `import helper`"):
        job("mine", tmp_path).defense()
    assert "helper" not in sys.modules


def test_a_changed_module_is_loaded_again(tmp_path: Path) -> None:
    path = write(entry(tmp_path, "mine", "changes:build") / "changes.py", "0.1")
    first = job("mine", tmp_path)
    assert mark(first) == 0.1
    write(path, "0.2")  # as long as before, within the clock's resolution
    second = job("mine", tmp_path)
    assert mark(second) == 0.2
    assert first.code != second.code


def test_a_module_in_another_folder_of_entries(tmp_path: Path) -> None:
    entry(tmp_path / "a", "mine", "elsewhere:build")
    write(tmp_path / "b/elsewhere.py", "0.1")
    assert mark(job("mine", tmp_path / "a", tmp_path / "b")) == 0.1
    write(tmp_path / "c/elsewhere.py", "0.2")
    with pytest.raises(BadEntry, match=r"'elsewhere' is in .*/b and in .*/c"):
        job("mine", tmp_path / "a", tmp_path / "b", tmp_path / "c")


def test_an_attack_of_the_command_line_in_two_folders(tmp_path: Path) -> None:
    """It has no entry, so that neither folder is its own."""
    for name in "ab":
        write(tmp_path / f"{name}/same.py", "0.1")
    for folders in (("a", "b"), ("b", "a")):
        with pytest.raises(BadEntry, match=r"'same' is in .* and in .*: leave out one"):
            job("none", *(tmp_path / name for name in folders), attack="same:build")


@pytest.mark.parametrize("head", ["from . import helper", "from .. import helper"])
def test_a_relative_import_that_leaves_the_package(head: str, tmp_path: Path) -> None:
    top = entry(tmp_path, "mine", "first:build")
    write(top / "first.py", "0.1", head)
    (top / "helper.py").write_text("value = 1")
    with pytest.raises(BadEntry, match="relative import"):
        job("mine", tmp_path).defense()


def test_a_folder_of_entries_is_no_package(tmp_path: Path) -> None:
    assert outside.source("defenses", [entry(tmp_path, "mine", "x:y")], installed=False) is None
    assert outside.source("dbp_bench", [Path(outside.__file__).parents[2]], installed=False) is None
