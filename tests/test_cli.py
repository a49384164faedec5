import csv
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from dbp_bench import __version__
from dbp_bench.entries.registry import Registry
from dbp_bench.result import Result, json_schema
from own_entries import folder, toy_defense

if TYPE_CHECKING:
    from conftest import Command

FIXTURE = Path(__file__).parent / "results/schema-1-known.json"
SMALL = ["--steps", "1", "--eot", "2", "--examples", "4", "--batch-size", "4"]
RUN = ["run", "--defense", "ddim", "--threat", "dwbox", *SMALL]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands write below the working directory by default."""
    monkeypatch.chdir(tmp_path)


# ------------------------------------------------------------------------------ what there is


def test_version_and_help(command: "Command") -> None:
    assert command("--version") == (0, f"dbp-bench {__version__}\n", "")
    said = command("--help")
    assert said.code == 0
    for verb in ("run", "list", "describe", "plan", "check", "train", "report"):
        assert verb in said.out


def test_list(command: "Command") -> None:
    registry = Registry()
    everything = json.loads(command("list", "--json").out)
    assert {kind: set(names) for kind, names in everything.items()} == {
        "defenses": set(registry.defenses),
        "threats": set(registry.threats),
        "tracks": set(registry.tracks),
    }
    said = command("list")
    assert said.err == ""
    for names in everything.values():
        for name, title in names.items():
            assert any(line.split(None, 1) == [name, title] for line in said.out.splitlines())
    assert json.loads(command("list", "tracks", "--json").out) == {"tracks": everything["tracks"]}
    assert "threats" not in command("list", "defenses").out


def test_list_of_ones_own(command: "Command", tmp_path: Path) -> None:
    folder(tmp_path, defenses={"mine": toy_defense("nowhere:make", [])})
    assert "mine" in json.loads(command("list", "--json", "--entries", tmp_path).out)["defenses"]


def test_list_is_quick_and_imports_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['dbp-bench', 'list']\n"
        "from dbp_bench.cli import main\n"
        "main.__globals__['app'](standalone_mode=False)\n"
        "heavy = {'torch', 'numpy', 'pandas', 'safetensors'} & set(sys.modules)\n"
        "sys.exit(f'imported: {sorted(heavy)}' if heavy else 0)\n"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "digits-linf" in done.stdout
    # Half a second is promised; a busy machine gets some more.
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("name", ["addt", "dwbox", "digits-linf"])
def test_describe(command: "Command", name: str) -> None:
    said = command("describe", name)
    assert said.code == 0
    head, _, text = said.out.partition("\n")
    path = Path(head.removeprefix("# ").split("  (sha256")[0])
    assert path.stem == name
    assert text == path.read_text()


def test_schema(command: "Command") -> None:
    assert json.loads(command("schema").out) == json_schema()


# ---------------------------------------------------------------------------------------- run


def test_run_says_the_default_track_and_where_the_file_is(
    command: "Command", tmp_path: Path
) -> None:
    said = command(*RUN)
    assert (said.code, said.err) == (0, "")
    lines = said.out.splitlines()
    assert lines[0].startswith("track    digits-linf  (the default track): ")
    assert "a demonstration: never compare" in lines[1]
    assert lines[-1] == "results/digits-linf/ddim/dwbox/seed-0.json"
    assert (tmp_path / lines[-1]).is_file()
    assert "the default track" not in command(*RUN, "--track", "digits-linf").out


def test_run_quiet(command: "Command", tmp_path: Path) -> None:
    assert command(*RUN, "--quiet") == (0, "", "")
    assert (tmp_path / "results/digits-linf/ddim/dwbox/seed-0.json").is_file()
    assert command(*RUN, "-q") == (0, "", "")


def test_run_json(command: "Command") -> None:
    said = command(*RUN, "--json")
    assert said.err == ""
    (row,) = json.loads(said.out)
    result = Result.read(Path(row["file"]))
    assert (row["defense"], row["threat"]) == ("ddim", "dwbox")
    assert (row["images"], row["draws"]) == (4, 3)
    assert row["robust"]["value"] == sum(map(sum, result.robust)) / 12
    assert row["clean"]["low"] <= row["clean"]["value"] <= row["clean"]["high"]


def test_run_of_a_setting_that_has_another_name(command: "Command", tmp_path: Path) -> None:
    said = command("run", "--defense", "ddim", "--threat", "dw-fwd,dwbox", *SMALL)
    assert "ddim / dw-fwd: the same setting as dwbox" in said.out
    assert [p.parent.name for p in tmp_path.glob("results/*/*/*/seed-0.json")] == ["dwbox"]
    later = command("run", "--defense", "ddim", "--threat", "dw-fwd", *SMALL, "--json")
    assert [row["threat"] for row in json.loads(later.out)] == ["dwbox"]
    # Its images were never saved, so it is run where they are asked for.
    saved = ["run", "--defense", "ddim", "--threat", "dw-fwd", *SMALL, "--save-adversarial"]
    assert command(*saved).code == 0
    assert len(list(tmp_path.glob("results/*/*/dw-fwd/adversarial-*"))) == 1


def test_overrides_are_in_the_result(command: "Command", tmp_path: Path) -> None:
    options = ["--eps", "8/255", "--loss", "margin", "--restarts", "2", "--random-start"]
    assert command(*RUN, *options, "--step-size", "0.5", "--seed", "7", "-q").code == 0
    result = Result.read(tmp_path / "results/digits-linf/ddim/dwbox/seed-7.json")
    assert result.eps == 8 / 255
    given = {
        "steps": 1,
        "eot": 2,
        "step_size": 0.5,
        "loss": "margin",
        "restarts": 2,
        "random_start": True,
    }
    assert result.effort.items() >= given.items()
    assert result.overrides == sorted([*given, "eps", "batch_size"])


def test_judge(command: "Command", tmp_path: Path) -> None:
    assert command(*RUN, "--save-adversarial", "-q").code == 0
    file = tmp_path / "results/digits-linf/ddim/dwbox/adversarial-seed-0.safetensors"
    said = command("judge", file, "--draws", "2")
    assert (said.code, said.err) == (0, "")
    assert "3 x 4 images inside linf 0.2 and [0, 1]" in said.out
    table = json.loads(command("judge", file, "--draws", "3", "--json").out)
    result = Result.read(file.with_name("seed-0.json"))
    assert table["ids"] == result.ids
    assert result.fresh is not None
    hits = sum(right for image in result.fresh for draw in image for right in draw)
    assert table["value"] == pytest.approx(hits / (4 * 3 * 3))


# --------------------------------------------------------------------------------------- plan


@pytest.mark.parametrize("verb", [["plan"], ["run", "--dry-run"]])
def test_plan(command: "Command", tmp_path: Path, verb: list[str]) -> None:
    names = ["--defense", "ddim,none", "--threat", "dw-fwd,dwbox,eot", *SMALL]
    said = command(*verb, *names)
    assert (said.code, said.err) == (0, "")
    assert "(the default track)" in said.out
    assert "= dwbox" in said.out
    assert "linf eps 0.2, seed 0, cpu; groups of 4 images" in said.out
    table = json.loads(command(*verb, *names, "--json", "--seed", "3", "--eps", "0.1").out)
    jobs = {(row["defense"], row["threat"]): row for row in table["jobs"]}
    assert len(jobs) == 6
    assert {row["seed"] for row in jobs.values()} == {3}
    assert {row["eps"] for row in jobs.values()} == {0.1}
    assert jobs["ddim", "dw-fwd"]["same_setting_as"] == "dwbox"
    assert jobs["ddim", "dw-fwd"]["cost"] is None
    # 4 images: 3 attacks of 1 step, 3 x 5 verdicts, 10 network calls each.
    assert jobs["ddim", "dwbox"]["cost"]["calls"] == 10 * 4 * (3 + 15)
    assert not (tmp_path / "results").exists()


def test_plan_counts_what_is_left(command: "Command") -> None:
    assert command(*RUN, "-q").code == 0
    options = ["--defense", "ddim", "--threat", "dwbox", *SMALL, "--json"]
    assert json.loads(command("plan", *options).out)["seconds"] == 0
    assert json.loads(command("plan", *options, "--seed", "1").out)["seconds"] > 0


# ------------------------------------------------------------------------------------ results


def test_export(command: "Command", tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    assert command("export", FIXTURE, "--out", out) == (0, "", "")
    rows = list(csv.DictReader(out.read_text().splitlines()))
    result = Result.read(FIXTURE)
    assert len(rows) == len(result.ids) * len(result.draws)


def test_report(command: "Command", tmp_path: Path) -> None:
    assert command("run", "--defense", "none,ddim", "--threat", "eot,dwbox,null", *SMALL).code == 0
    said = command("report")
    assert (said.code, said.err) == (0, "")
    for line in said.out.splitlines():
        assert (tmp_path / line).is_file()
    assert command("report", "--quiet") == (0, "", "")


# ---------------------------------------------------------------------------------- mistakes

NO_TRUST = ["--entries", "mine"]


def entries(where: Path) -> None:
    threat = yaml.safe_load(Registry().threats["eot"].read_text())
    track = yaml.safe_load(Registry().tracks["digits-linf"].read_text())
    defense = toy_defense("dbp_bench.purifiers.controls:NoiseOnly", ["forward"], t_star=100)
    folder(
        where / "mine",
        defenses={"foreign": toy_defense("elsewhere:make", []), "half": defense},
        attacks={"yes": threat | {"eps": False}, "seven": threat | {"eps": 8}},
        tracks={"no-weights": track | {"classifier": track["classifier"] | {"sha256": "0" * 64}}},
    )
    folder(where / "taken", defenses={"ddim": defense})
    (where / "empty").mkdir()
    (where / "file").write_text("")
    (where / "broken.json").write_text("{")
    shutil.copy(FIXTURE, where / "seed-0.json")
    (where / "adversarial-seed-0.safetensors").write_text("nothing")


DDIM = ["run", "--defense", "ddim", "--threat", "dwbox", "--examples", "4"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "--defense", "adt", "--threat", "eot"], "no defense 'adt'. Did you mean 'addt'?"),
        (["run", "--defense", "ddim", "--threat", "eto"], "no threat 'eto'. Did you mean 'eot'?"),
        ([*DDIM, "--track", "digit-linf"], "no track 'digit-linf'. Did you mean 'digits-linf'?"),
        (["run", "--defense", "", "--threat", "eot"], "--defense: names nothing."),
        (["run", "--defense", "all,ddim", "--threat", "eot"], "either all or names"),
        ([*DDIM, "--examples", "0"], "--examples 0: this track has 1 to 360 images"),
        ([*DDIM, "--examples", "400"], "--examples 400"),
        ([*DDIM, "--draws", "2"], "--draws 2: dwbox needs at least 3 known draws"),
        ([*DDIM, "--draws", "-1"], "--draws -1: must be 1 or more"),
        ([*DDIM, "--steps", "0"], "steps: input should be greater than or equal to 1"),
        ([*DDIM, "--eot", "-3"], "eot: input should be"),
        ([*DDIM, "--step-size", "nan"], "step_size: input should be"),
        ([*DDIM, "--step-size", "inf"], "step_size: input should be"),
        ([*DDIM, "--loss", "cee"], "loss: input should be 'ce', 'margin', 'dlr', 'ce-targeted'"),
        ([*DDIM, "--restarts", "3"], "restarts: more than 1 needs random_start"),
        ([*DDIM, "--eps", "8"], "Did you mean 8/255?"),
        ([*DDIM, "--eps=-0.1"], "a radius cannot be negative"),
        ([*DDIM, "--eps", "nan"], "--eps 'nan': not a number such as 0.2 or 8/255"),
        ([*DDIM, "--eps", "inf"], "not a number"),
        ([*DDIM, "--eps", "1e400"], "not a number"),
        ([*DDIM, "--eps", "8/0"], "not a number"),
        ([*DDIM, "--eps", "no"], "not a number"),
        ([*DDIM, "--seed", "-1"], "--seed -1"),
        ([*DDIM, "--batch-size", "0"], "--batch-size 0"),
        ([*DDIM, "--rows", "0"], "--rows 0"),
        ([*DDIM, "--device", "tpu"], "--device 'tpu': auto, cpu or cuda"),
        ([*DDIM, "--checkpointing", "all"], "--checkpointing 'all': auto, none or step"),
        ([*DDIM, "--out", "file"], "file"),
        ([*DDIM, "--entries", "nowhere"], "no folder defenses/, attacks/ or tracks/ in it"),
        ([*DDIM, "--entries", "empty"], "no folder defenses/, attacks/ or tracks/ in it"),
        ([*DDIM, "--entries", "taken"], "the name is taken by"),
        (["run", "--defense", "foreign", "--threat", "eot", *NO_TRUST], "Add --trust-code"),
        (["run", "--defense", "half", "--threat", "eot", *NO_TRUST], "'clamp_output'. It takes:"),
        (["run", "--defense", "ddim", "--threat", "yes", *NO_TRUST], "eps: input should be a"),
        (["run", "--defense", "ddim", "--threat", "seven", *NO_TRUST], "Did you mean 8/255?"),
        (["run", "--defense", "ddim", "--threat", "all", *NO_TRUST], "eps: "),
        (
            ["run", "--defense", "all", "--threat", "eot", "--track", "no-weights", *NO_TRUST],
            "no defense has a setting for track 'no-weights'",
        ),
        (["plan", "--defense", "adt"], "no defense 'adt'"),
        (["plan", "--eps", "8"], "Did you mean 8/255?"),
        (["list", "defences"], "no list 'defences'. Did you mean 'defenses'?"),
        (["list", "--entries", "nowhere"], "no folder"),
        (["describe", "adt"], "no entry 'adt'. Did you mean 'addt'?"),
        (["judge", "nowhere.safetensors"], "no such file"),
        (["judge", "adversarial-seed-0.safetensors"], "adversarial-seed-0.safetensors"),
        (["judge", "seed-0.json"], "not a file of adversarial images beside its result"),
        (["judge", "seed-0.json", "--draws", "0"], "--draws 0: must be 1 or more"),
        (["export", "broken.json", "--out", "x.csv"], "broken.json: not a JSON file"),
        (["export", "nowhere.json", "--out", "x.csv"], "nowhere.json: no such file"),
        (["export", "seed-0.json", "--out", "file/x.csv"], "file"),
        (["report", "--sort", "best"], "--sort 'best': hidden or known"),
        (["report", "--results", "nowhere"], "nowhere"),
        (["check", "adt"], "no defense 'adt'"),
        (["train", "adt"], "no recipe 'adt'. Did you mean 'addt'?"),
        (["train", "all", "--track", "cifar"], "--track cifar"),
    ],
)
def test_mistake(command: "Command", tmp_path: Path, arguments: list[str], says: str) -> None:
    entries(tmp_path)
    said = command(*arguments)
    assert said.err.startswith("dbp-bench: ")
    assert says in said.err
    assert len(said.err.splitlines()) == 1
    assert said.code == 2
    assert "results" not in {path.name for path in tmp_path.glob("results/*/*")}


@pytest.mark.parametrize(
    "arguments",
    [["run"], ["run", "--defence", "ddim"], ["rum"], ["list", "--jsn"], [*RUN, "--steps", "two"]],
)
def test_unknown_option(command: "Command", arguments: list[str]) -> None:
    said = command(*arguments)
    assert said.code == 2
    assert "Traceback" not in said.err
    assert said.out == ""


def test_wrong_weights(command: "Command", tmp_path: Path) -> None:
    defense = yaml.safe_load(Registry().defenses["ddim"].read_text())
    defense["settings"][0]["networks"]["denoiser"]["sha256"] = "0" * 64
    folder(tmp_path / "mine", defenses={"mine": defense})
    options = ["run", "--defense", "mine", "--threat", "eot", "--entries", "mine", *SMALL]
    said = command(*options)
    assert said.code == 2
    assert "the entry says 0000000000000000...: the file is damaged" in said.err
    assert len(said.err.splitlines()) == 1


def test_another_request(command: "Command") -> None:
    assert command(*RUN, "-q").code == 0
    said = command(*RUN, "--eps", "0.1")
    assert said.code == 2
    assert "holds another request: eps is 0.2 there, 0.1 asked." in said.err
    assert command(*RUN, "--eps", "0.1", "--no-resume", "-q") == (0, "", "")


def test_interrupted(command: "Command", monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dbp_bench.runs.execute.execute", stop)
    said = command(*RUN, "-q")
    assert said.code == 130
    assert said.err == "dbp-bench: stopped. The same command continues where this one was.\n"
