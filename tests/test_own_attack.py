"""An attack of one's own, as `dbp-bench new attack` writes it."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from dbp_bench.result import Result

if TYPE_CHECKING:
    from conftest import Command


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


SMALL = "--examples 6 --batch-size 6 --draws 8 --set steps=3 --set eot=2"


def test_the_new_attack_runs_by_the_command_that_is_shown(command: "Command") -> None:
    said = command("new", "attack", "my_attack")
    assert said.code == 0, said.err
    assert len(Path("my_attack/my_attack.py").read_text().splitlines()) < 50
    shown = next(line for line in said.out.splitlines() if line.startswith("Next: "))
    _, program, *rest = shlex.split(shown)
    assert program == "dbp-bench"
    said = command(*rest, *SMALL.split())
    assert said.code == 0, said.err
    own = {}
    for threat, evaluations in (("eot", 3 * 2), ("dwbox", 3 * 8)):
        (path,) = Path(f"results/digits-linf/ddpm/{threat}").rglob("seed-0.json")
        result = Result.read(path)
        assert result.attack == "my_attack:MomentumPGD"
        assert result.effort == {"steps": 3, "step_size": 0.1, "momentum": 0.75, "eot": 2}
        assert result.evaluations.gradient == 6 * [evaluations]
        own[threat] = result.right("adversarial").mean()
    assert own["dwbox"] <= own["eot"] <= 1


def test_on_the_base_classifier_it_is_about_as_strong_as_pgd(command: "Command") -> None:
    assert command("new", "attack", "mine").code == 0
    run = ("run", "--defense", "none", "--threat", "eot", "--examples", "60", "--out")
    attack = ("--attack", "mine:MomentumPGD", "--entries", "mine", "--trust-code")
    assert command(*run, "mine-results", *attack).code == 0
    assert command(*run, "theirs").code == 0
    rates = [
        Result.read(next(Path(place).rglob("seed-0.json"))).right("adversarial").mean()
        for place in ("mine-results", "theirs")
    ]
    assert abs(rates[0] - rates[1]) <= 2 / 60


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("pgd", "there is an attack of that name"),
        ("My-Attack", "lower-case letters"),
        ("json", "a word of Python, or a module"),
        ("torch", "an installed package is called torch"),
    ],
)
def test_names_that_are_refused(name: str, says: str, command: "Command") -> None:
    said = command("new", "attack", name)
    assert said.code == 2
    assert says in said.err
    assert not Path(name).exists()
    Path("there").mkdir()
    Path("there/file").touch()
    said = command("new", "attack", "fine", "--out", "there")
    assert "there exists. Choose another --out" in said.err


def test_it_says_where_it_does_not_fit(command: "Command") -> None:
    assert command("new", "attack", "mine").code == 0
    attack = ("--attack", "mine:MomentumPGD", "--entries", "mine")
    run = ("run", "--defense", "none", "--threat", "eot", "--examples", "6", *attack)
    assert "Add --trust-code" in command(*run).err
    said = command(*run, "--trust-code", "--set", "momentun=1")
    assert "momentun" in said.err
    assert said.err.count("\n") == 1
