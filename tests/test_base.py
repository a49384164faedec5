"""Each defense is compared with the classifier that it protects, which is evaluated along."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from safetensors.torch import save_file

from dbp_bench.entries.registry import Registry
from dbp_bench.networks.digits import DigitsCNN
from dbp_bench.reporting.leaderboard import Leaderboard, Row, leaderboard
from dbp_bench.reporting.records import load
from dbp_bench.reporting.tables import leaderboard_markdown
from dbp_bench.result import Conformance, Result
from dbp_bench.runs.job import bases
from dbp_bench.weights.files import digest
from records import make, matrix, save

if TYPE_CHECKING:
    from conftest import Command

SMALL = ("--examples", "4", "--batch-size", "4", "--draws", "8", "--budget", "2")
UNPURIFIED = "dbp_bench.purifiers.controls:Unpurified"


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Entries of a classifier of one's own, alone and behind a purifier, and of another one."""
    monkeypatch.chdir(tmp_path)
    none = Conformance(checks={}, gradient=None)
    monkeypatch.setattr("dbp_bench.runs.execute.record", lambda *_: none)
    folder = tmp_path / "mine"
    (folder / "defenses").mkdir(parents=True)
    refs = []
    for name in ("a", "b"):
        save_file(DigitsCNN().state_dict(), folder / f"{name}.safetensors")
        refs.append(
            {
                "network": "dbp_bench.networks.digits:DigitsCNN",
                "file": f"{name}.safetensors",
                "sha256": digest(folder / f"{name}.safetensors"),
            }
        )
    entry: dict[str, Any] = {"title": "t", "kind": "defense", "paper": None}
    noise = {"factory": "dbp_bench.purifiers.controls:NoiseOnly", "sites": ["forward"]}
    options = {"t_star": 100, "clamp_output": False}
    kinds: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, str]]] = {
        "robust": ({"factory": UNPURIFIED, "sites": []}, {}, refs[0]),
        "noisy": (noise, options, refs[0]),
        "lonely": (noise, options, refs[1]),
    }
    for name, (made, given, ref) in kinds.items():
        setting = {"tracks": ["digits-linf"], "options": given, "networks": {}, "classifier": ref}
        text = yaml.safe_dump({**entry, **made, "settings": [setting]})
        (folder / f"defenses/{name}.yaml").write_text(text)
    return folder


def test_whom_each_defense_protects(own: Path) -> None:
    registry = Registry([own])

    def of(*names: str) -> list[str]:
        return bases(registry, "digits-linf", names)

    assert of("ddpm", "addt", "none") == ["none"]
    assert of("noisy") == of("robust") == ["robust"]
    assert of("lonely") == []
    assert of("ddpm", "noisy") == ["none", "robust"]


def test_the_base_classifier_is_run_along_once(own: Path, command: "Command") -> None:
    run = ("run", "--defense", "oneshot", "--threat", "all", *SMALL)
    dry = json.loads(command(*run, "--dry-run", "--json").out)
    assert [job["threat"] for job in dry["jobs"] if job["defense"] == "none"] == ["eot", "null"]
    said = command(*run)
    assert said.code == 0, said.err
    assert "none: run along, once, as the zero of the scale (R_0)" in said.out
    path = Path("results/digits-linf/none/eot/standard/seed-0.json")
    stamp = path.stat().st_mtime_ns
    said = command("run", "--defense", "noise-only", "--threat", "all", *SMALL)
    assert said.code == 0, said.err
    assert "none" not in said.out
    assert path.stat().st_mtime_ns == stamp
    # More images are asked for: they are added to its result, too.
    said = command("run", "--defense", "oneshot", "--threat", "all", "--examples", "8", *SMALL[2:])
    assert said.code == 0, said.err
    assert len(Result.read(path).ids) == 8


def test_single_threats_and_other_requests_leave_it_alone(own: Path, command: "Command") -> None:
    assert command("run", "--defense", "oneshot", "--threat", "eot", *SMALL).code == 0
    assert not Path("results/digits-linf/none").exists()
    eot = ("run", "--defense", "none", "--threat", "eot,null")
    assert command(*eot, *SMALL[:-1], "4").code == 0
    said = command("run", "--defense", "oneshot", "--threat", "all", *SMALL)
    assert said.code == 0, said.err
    held = Result.read(Path("results/digits-linf/none/eot/standard/seed-0.json"))
    assert held.effort["budget"] == 4


def test_where_it_can_t_be_run_along_that_is_said(own: Path, command: "Command") -> None:
    run = ("run", "--defense", "ddim", "--threat", "all", "--gradient", "surrogate:2", *SMALL)
    said = command(*run, "--dry-run")
    assert said.code == 0, said.err
    assert "none: not run along as the base classifier." in said.out


def test_a_classifier_of_ones_own_is_its_zero(own: Path, command: "Command") -> None:
    run = ("run", "--threat", "all", *SMALL, "--entries", "mine", "--defense")
    said = command(*run, "noisy,lonely")
    assert said.code == 0, said.err
    assert "robust: run along" in said.out
    assert not Path("results/digits-linf/none").exists()
    assert command("run", "--defense", "none,oneshot", "--threat", "all", *SMALL).code == 0
    board = leaderboard(load(Path("results")), Registry([own]))
    zeros = {r.defense: r.base.any.defense if r.base else None for r in board.rows}
    assert zeros == {
        "none": "none",
        "oneshot": "none",
        "robust": "robust",
        "noisy": "robust",
        "lonely": None,
    }
    lonely = row(board, "lonely").estimates
    assert lonely["base"] is lonely["purification"] is lonely["share"] is None
    assert lonely["stochasticity"] is not None
    assert "blank where it was not measured alone" in leaderboard_markdown(board)
    # Without the entries, nobody knows that `robust` is a classifier alone.
    assert row(leaderboard(load(Path("results"))), "noisy").base is None
    assert command("report", "--entries", "mine").code == 0


def row(board: Leaderboard, defense: str) -> Row:
    return next(row for row in board.rows if row.defense == defense)


def test_the_track_s_zero_is_for_those_with_its_classifier(tmp_path: Path) -> None:
    save(tmp_path, *matrix())
    for result in (make("other", "eot", 0.5), make("other", "dwbox", 0.3)):
        weights = {**result.provenance.weights, "defense.classifier": "f" * 64}
        provenance = result.provenance.model_copy(update={"weights": weights})
        save(tmp_path, result.model_copy(update={"provenance": provenance}))
    board = leaderboard(load(tmp_path))
    assert row(board, "both").estimates["base"] is not None
    assert row(board, "other").estimates["base"] is None
    assert row(board, "other").estimates["hidden"] is not None
