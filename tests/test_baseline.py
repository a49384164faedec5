"""One's own row beside the committed results of its track."""

import csv
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from dbp_bench.reporting import baseline
from dbp_bench.result import Result

if TYPE_CHECKING:
    from conftest import Command

TOP = Path(__file__).parents[1]
SETTINGS = ("eot", "dwbox", "null")


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Results of a defense called mine, which does as ddpm does, in two folders."""
    monkeypatch.chdir(tmp_path)
    for threat in SETTINGS:
        path = TOP / f"results/digits-linf/ddpm/{threat}/standard/seed-0.json"
        result = Result.read(path).model_copy(update={"defense": "mine"})
        where = result.path(tmp_path / ("second" if threat == "dwbox" else "first"))
        where.parent.mkdir(parents=True)
        result.write(where)
    return tmp_path


def rows(path: Path) -> dict[str, dict[str, str]]:
    with path.open() as file:
        return {row["defense"]: row for row in csv.DictReader(file)}


def test_a_row_beside_the_committed_ones(mine: Path, command: "Command") -> None:
    own = ("report", "--results", "first", "--results", "second")
    assert command(*own, "--out", "alone").code == 0
    alone = rows(mine / "alone/digits-linf.csv")
    assert [*alone] == ["mine"]
    said = command(*own, "--baseline")
    assert said.code == 0, said.err
    both = rows(mine / "leaderboards/digits-linf.csv")
    committed = rows(TOP / "leaderboards/digits-linf.csv")
    assert {*both} == {"mine", *committed}
    for column in ("clean", "base", "hidden", "all_known", "purification", "share"):
        assert both["mine"][column] == committed["ddpm"][column] != ""
    assert alone["mine"]["base"] == alone["mine"]["purification"] == ""
    assert {p.name for p in (mine / "leaderboards").glob("cifar*")} == set()


def test_ones_own_result_of_a_setting_takes_its_place(mine: Path, command: "Command") -> None:
    everything = ("report", "--results", TOP / "results", "--track", "digits-linf", "--baseline")
    assert command(*everything, "--out", "again").code == 0
    for name in ("digits-linf.csv", "digits-linf-sweeps.csv"):
        assert (mine / "again" / name).read_bytes() == (TOP / "leaderboards" / name).read_bytes()


def test_outcomes_of_both(mine: Path, command: "Command") -> None:
    said = command("report", "--results", "first", "--baseline", "--outcomes", "all.csv")
    assert said.code == 0, said.err
    text = Path("all.csv").read_text()
    assert ",mine,eot," in text
    assert ",addt,eot," in text


def test_where_there_is_no_baseline(
    mine: Path, command: "Command", monkeypatch: pytest.MonkeyPatch
) -> None:
    path = mine / "first/digits-linf/mine/null/standard/seed-0.json"
    result = Result.read(path).model_copy(update={"track": "own"})
    where = result.path(mine / "third")
    where.parent.mkdir(parents=True)
    result.write(where)
    said = command("report", "--results", "third", "--baseline")
    assert said.code == 2
    assert "no committed results on own. There are some on cifar10-jpeg-linf, " in said.err
    monkeypatch.setattr(baseline, "__file__", str(mine / "a/b/c/d/baseline.py"))
    said = command("report", "--results", "first", "--baseline")
    assert said.code == 2
    assert "--results CHECKOUT/results, beside your own" in said.err
    assert not Path("leaderboards").exists()
