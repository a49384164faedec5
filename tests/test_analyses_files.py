"""What analyses write: resumed, refused where asked differently, the same bytes each time."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.text import Text

from dbp_bench.analyses import analyse as module
from dbp_bench.analyses import catalog
from dbp_bench.analyses.analyse import Pieces, analyse
from dbp_bench.analyses.figures import STYLE, WIDTH, draw, drawn, shown_names
from dbp_bench.analyses.options import Searched, parse
from dbp_bench.analyses.record import FIGURES, Record, record_path, row
from dbp_bench.entries.registry import Registry
from dbp_bench.errors import BadRequest, BadResult, UnknownName
from dbp_bench.reporting.plotting import styled
from dbp_bench.reporting.records import load
from dbp_bench.reporting.statistics import Estimate
from dbp_bench.result import Result

SMALL: dict[str, dict[str, Any]] = {
    "trajectory": {"steps": 2, "runs": 1, "fresh": 2, "eot": 2},
    "landscape": {"steps": 1, "eot": 1, "points": 2, "known": 3, "fresh": 1},
    "eot-curve": {"steps": 1, "counts": [1, 2], "budget": 2, "draws": 1},
    "stochasticity": {"steps": 1, "eot": 1, "budget": 2, "levels": [0, 1], "fresh": 1},
    "immobilise": {"budget": 2, "draws": 1, "fresh": 1},
    "efficacy": {"sets": 3, "fresh": 1},
}


def run(name: str, out: Path, **changes: Any) -> Path:
    options = {
        "seed": 0,
        "device": "cpu",
        "out": out,
        "examples": 2,
        "options": SMALL[name],
        **changes,
    }
    defenses = options.pop("defenses", ["oneshot"])
    return analyse(name, Registry(), "digits-linf", defenses, **options)


@pytest.mark.parametrize("name", SMALL)
def test_each_writes_its_numbers_and_its_figure(name: str, tmp_path: Path) -> None:
    path = run(name, tmp_path)
    assert path == tmp_path / "digits-linf" / "analyses" / name / "oneshot.json"
    record = Record.read(path)
    assert record.to_json() == path.read_text()
    assert len(record.images) == 2
    assert record.provenance["oneshot"].weights
    assert {r.defense for r in record.rows} == {"oneshot"}
    for r in record.rows:
        assert (r.low is None) == (r.high is None)
        assert r.low is None or r.high is None or r.low <= r.value + 1e-9
        assert len(r.at) <= len(record.axes)
    table = path.with_suffix(".csv").read_text().splitlines()
    assert table[0].split(",")[-4:] == ["quantity", "value", "low", "high"]
    assert len(table) == 1 + len(record.rows)
    first = [p.read_bytes() for p in draw(path)]
    assert first[0].startswith(b"<?xml")
    assert first[1].startswith(b"\x89PNG")
    assert first[2].startswith(b"%PDF")
    if name == "immobilise":
        assert [p.read_bytes() for p in draw(path)] == first


def test_an_interrupted_analysis_continues_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    whole = run("immobilise", tmp_path / "whole")
    made: list[str] = []

    def stop(name: str) -> None:
        made.append(name)
        if len(made) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("immobilise", tmp_path / "part", say=stop)
    path = record_path(tmp_path / "part", "digits-linf", "immobilise", ["oneshot"])
    assert not path.exists()
    assert not path.with_suffix(".csv").exists()
    again: list[str] = []
    assert run("immobilise", tmp_path / "part", say=again.append) == path
    assert again == made[1:]
    assert path.read_bytes() == whole.read_bytes()
    assert path.with_suffix(".csv").read_bytes() == whole.with_suffix(".csv").read_bytes()
    run("immobilise", tmp_path / "part", say=again.append)
    assert again == made[1:]


def test_another_request_is_refused_and_can_be_forced(tmp_path: Path) -> None:
    path = run("immobilise", tmp_path)
    before = path.read_bytes()
    with pytest.raises(BadRequest, match="another request: seed is 0 there, 1 asked"):
        run("immobilise", tmp_path, seed=1)
    with pytest.raises(BadRequest, match="another request: options"):
        run("immobilise", tmp_path, options={**SMALL["immobilise"], "budget": 3})
    assert path.read_bytes() == before
    run("immobilise", tmp_path, seed=1, resume=False)
    assert Record.read(path).request["seed"] == 1


def test_pieces_of_another_request_are_refused_too(tmp_path: Path) -> None:
    def stop(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("efficacy", tmp_path, say=stop)
    with pytest.raises(BadRequest, match="another request: seed"):
        run("efficacy", tmp_path, seed=3)


def test_damaged_pieces_are_made_again_and_unknown_ones_thrown_away(tmp_path: Path) -> None:
    import torch

    said: list[str] = []
    pieces = Pieces(tmp_path, {"seed": 0}, said.append)
    made = {"x": torch.arange(3)}
    for _ in range(2):
        assert torch.equal(pieces("a b", lambda: made)["x"], made["x"])
    assert said == ["a b"]
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(b"half")
    assert torch.equal(pieces("a b", lambda: made)["x"], made["x"])
    assert said == ["a b", "a b"]
    (tmp_path / "request.json").write_text("{")
    Pieces(tmp_path, {"seed": 0}, said.append)
    assert not list(tmp_path.glob("*.safetensors"))


def test_what_cannot_be_right_is_refused_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "Pieces", lambda *_: pytest.fail("computed"))
    with pytest.raises(UnknownName, match=r"no analysis 'landscap'\. Did you mean 'landscape'"):
        analyse("landscap", Registry(), "digits-linf", ["ddpm"], seed=0, device="cpu", out=tmp_path)
    with pytest.raises(BadRequest, match="--runs: analysis 'efficacy' takes no such option"):
        run("efficacy", tmp_path, options={"runs": 3})
    with pytest.raises(BadRequest, match="none: it draws no noise"):
        run("efficacy", tmp_path, defenses=["ddpm", "none"])
    with pytest.raises(BadRequest, match="names nothing"):
        run("efficacy", tmp_path, defenses=[])
    with pytest.raises(BadRequest, match="known"):
        run("landscape", tmp_path, options={"known": 1})
    with pytest.raises(BadRequest, match="increasing numbers in"):
        run("stochasticity", tmp_path, options={"levels": [0, 2]})
    with pytest.raises(BadRequest, match="increasing numbers of 1 or more"):
        run("eot-curve", tmp_path, options={"counts": [4, 2]})
    assert not list(tmp_path.rglob("*.json"))


def test_options_are_named_as_the_command_line_names_them() -> None:
    with pytest.raises(BadRequest, match="it takes --steps, --step-size, --eot"):
        parse(Searched, "toy", {"sets": 2})
    assert parse(Searched, "toy", {"step_size": 0.5}).model_dump() == {
        "steps": 20,
        "step_size": 0.5,
        "eot": 10,
    }


def test_a_file_that_is_no_record_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"schema": 1}))
    with pytest.raises(BadResult, match=r"x\.json: not a record of an analysis"):
        Record.read(path)


def test_rows_round_and_keep_what_is_exact_without_interval() -> None:
    found = row("d", "s", (0.1 + 0.2,), "q", Estimate(1 / 3, -1e-10, 2e-7 / 3))
    assert str(found.low) == "0.0"
    assert tuple(found) == ("d", "s", (0.3,), "q", 0.333333, 0.0, 6.7e-08)
    assert row("d", "s", (), "q", 2.0)[-2:] == (None, None)


def test_reports_do_not_take_analyses_for_results(tmp_path: Path) -> None:
    run("immobilise", tmp_path)
    with pytest.raises(BadResult, match="no results"):
        load(tmp_path)


def test_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dbp_bench.cli import main

    def command(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["dbp-bench", "analyze", *words, "--out", str(tmp_path)])
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0)

    asked = ("--defense", "oneshot", "--examples", "2", "--device", "cpu", "--no-figure")
    small = ("--steps", "1", "--eot", "1", "--budget", "2", "--levels", "0,1", "--fresh", "1")
    assert command("stochasticity", *asked, *small) == 0
    shown = capsys.readouterr().out
    assert "robustness-loss" in shown
    path = record_path(tmp_path, "digits-linf", "stochasticity", ["oneshot"])
    assert Record.read(path).request["options"]["levels"] == [0.0, 1.0]
    assert not path.with_suffix(".svg").exists()
    assert command("stochasticity", *asked, "--levels", "0,x") == 2
    assert "--levels '0,x': write numbers" in capsys.readouterr().err
    assert command("stochasticity", *asked, "--points", "3") == 2
    assert "--points: analysis 'stochasticity' takes no such option" in capsys.readouterr().err
    assert command("stochastic", *asked) == 2
    assert "Did you mean 'stochasticity'" in capsys.readouterr().err


RESULTS = Path(__file__).parents[1] / "results"


@pytest.mark.parametrize("name", SMALL)
def test_what_is_committed_can_be_read_and_says_what_it_is(name: str) -> None:
    path = record_path(RESULTS, "digits-linf", name, ["ddpm", "addt"])
    record = Record.read(path)
    assert (record.analysis, record.track) == (name, "digits-linf")
    assert record.to_json() == path.read_text()
    assert record.to_csv() == path.with_suffix(".csv").read_text()
    parse(catalog.find(name).Options, name, record.request["options"])
    assert record.statement == catalog.statement(catalog.find(name))
    for suffix in FIGURES:
        assert path.with_suffix(suffix).is_file()
    check_figure(record, ["DDPM", "ADDT-finetuned DDPM"])


def check_figure(record: Record, names: list[str]) -> None:
    """It is one column wide, names the defenses, and says its images in text that can be read."""
    with styled(STYLE):
        figure = drawn(record)
        figure.draw_without_rendering()
    assert figure.get_figwidth() == WIDTH
    texts = [t for t in figure.findobj(Text) if isinstance(t, Text) and t.get_text()]
    said = {text.get_text() for text in texts}
    assert set(names) <= said
    assert any(f" {len(record.images)} images" in " ".join(text.split()) for text in said)
    assert min(float(text.get_fontsize()) for text in texts) >= 8
    # All that is drawn lies on the page.
    box, height = figure.get_tightbbox(), figure.get_figheight()
    assert min(box.x0, box.y0, WIDTH - box.x1, height - box.y1) > -0.01


def test_defenses_are_shown_by_what_their_titles_say_first(tmp_path: Path) -> None:
    record = Record.read(run("immobilise", tmp_path))
    check_figure(record, ["Forward noise"])
    names = {"a": "GDMP, guided by SSIM", "b": "GDMP, by MSE", "c": "DDIM purification, eta = 0"}
    titled = record.model_copy(update={"defenses": [*"abcd"], "titles": names})
    assert shown_names(titled) == ["GDMP (a)", "GDMP (b)", "DDIM", "d"]


@pytest.mark.parametrize("defense", ["ddpm", "addt"])
def test_committed_analyses_agree_with_the_committed_results(defense: str) -> None:
    """The same images, draws and attack, in groups of another size: the same but for an outcome."""
    lattice, mixed, curve = (
        Record.read(record_path(RESULTS, "digits-linf", name, ["ddpm", "addt"]))
        for name in ("immobilise", "stochasticity", "eot-curve")
    )
    (known,) = [r for r in mixed.select(defense, "accuracy") if r.at == (0.0,)]
    (dwbox,) = lattice.select(defense, "accuracy", "forward+reverse")
    assert known.value == dwbox.value
    for line, series in (("dwbox", "forward+reverse"), ("hidden", "nothing")):
        assert (
            curve.select(defense, "accuracy", line)[0][-3:]
            == (lattice.select(defense, "accuracy", series)[0][-3:])
        )
    threats = {
        "nothing": "eot",
        "forward": "dw-fwd",
        "reverse": "dw-rev",
        "forward+reverse": "dwbox",
    }
    for series, threat in threats.items():
        result = Result.read(
            RESULTS / "digits-linf" / defense / threat / "standard" / "seed-0.json"
        )
        assert result.ids[: len(lattice.images)] == lattice.images
        want = float(result.right("adversarial")[: len(lattice.images)].mean())
        (measured,) = lattice.select(defense, "accuracy", series)
        assert measured.value == pytest.approx(want, abs=0.01), series
