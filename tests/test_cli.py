import csv
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import typer.main
import yaml
from rich.text import Text

from dbp_bench import __version__, attacks
from dbp_bench.cli import moved
from dbp_bench.cli.app import application
from dbp_bench.defense import Defense
from dbp_bench.entries.registry import Registry
from dbp_bench.entries.subject import Subject
from dbp_bench.result import Result
from own_entries import folder, toy_defense

if TYPE_CHECKING:
    from conftest import Command

FIXTURE = Path(__file__).parent / "results/schema-2-known.json"
SMALL = ["--budget", "4", "--examples", "4", "--batch-size", "4"]
RUN = ["run", "--defense", "oneshot", "--threat", "dwbox", *SMALL]
OF_RUN = "results/digits-linf/oneshot/dwbox/standard"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands write below the working directory by default."""
    monkeypatch.chdir(tmp_path)


# ------------------------------------------------------------------------------ what there is


VERBS = {
    "Evaluate": ["list", "run", "certify", "train", "weights"],
    "Report": ["report", "compare"],
    "Diagnose": ["check", "sweep", "tune", "analyze"],
    "Share": ["submit", "verify", "new"],
}


def test_version_and_help(command: "Command") -> None:
    assert command("--version") == (0, f"dbp-bench {__version__}\n", "")
    said = command("--help")
    assert said.code == 0
    order = [word for group, verbs in VERBS.items() for word in (group, *verbs)]
    assert re.findall(r"^(?:╭─|│) (\w+) ", said.out, re.MULTILINE) == ["Options", *order]


def test_without_a_command_the_help_is_shown(command: "Command") -> None:
    said = command()
    assert (said.code, said.err) == (2, "")
    assert "Usage: dbp-bench" in said.out


def every_command(one: Any = None, name: str = "") -> Iterator[tuple[str, Any]]:
    """Name and object of each command, those of groups too."""
    one = one or typer.main.get_command(application())
    for child, inner in getattr(one, "commands", {}).items():
        yield f"{name} {child}".strip(), inner
        yield from every_command(inner, f"{name} {child}".strip())


def test_help_says_all_that_is_written() -> None:
    """Brackets in a help text are markup to the terminal, and would be swallowed, or end it."""
    for name, one in every_command():
        for text in (one.help, *(getattr(each, "help", None) for each in one.params)):
            assert Text.from_markup(text or "").plain == (text or ""), name


@pytest.mark.parametrize("name", [name for name, one in every_command() if not one.hidden])
def test_help_fits_80_columns(
    command: "Command", monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    said = command(*name.split(), "--help")
    assert (said.code, said.err) == (0, "")
    assert max(map(len, said.out.splitlines())) <= 80
    assert "…" not in said.out


def test_list(command: "Command") -> None:
    registry = Registry()
    everything = json.loads(command("list", "--json").out)
    assert {kind: set(names) for kind, names in everything.items()} == {
        "defenses": set(registry.defenses),
        "threats": set(registry.threats),
        "attacks": {*registry.settings, *attacks.names()},
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


def test_list_imports_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['dbp-bench', 'list']\n"
        "from dbp_bench.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "heavy = {'torch', 'numpy', 'pandas', 'matplotlib', 'safetensors'} & set(sys.modules)\n"
        "sys.exit(f'imported: {sorted(heavy)}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "digits-linf" in done.stdout


@pytest.mark.parametrize("name", ["addt", "dwbox", "ensemble-known", "digits-linf"])
def test_list_shows_an_entry(command: "Command", name: str) -> None:
    said = command("list", name)
    assert said.code == 0
    head, _, text = said.out.partition("\n")
    path = Path(head.removeprefix("# ").split("  (sha256")[0])
    assert path.stem == name
    assert text == path.read_text()


# ---------------------------------------------------------------------------------------- run


def test_run_says_the_default_track_and_where_the_file_is(
    command: "Command", tmp_path: Path
) -> None:
    said = command(*RUN)
    assert (said.code, said.err) == (0, "")
    lines = said.out.splitlines()
    assert lines[0].startswith("track    digits-linf  (the default track): ")
    assert "a demonstration: never compare" in lines[1]
    assert lines[-1] == f"{OF_RUN}/seed-0.json"
    assert (tmp_path / lines[-1]).is_file()
    assert "the default track" not in command(*RUN, "--track", "digits-linf").out


def test_run_quiet(command: "Command", tmp_path: Path) -> None:
    assert command(*RUN, "--quiet") == (0, "", "")
    assert (tmp_path / OF_RUN / "seed-0.json").is_file()
    assert command(*RUN, "-q") == (0, "", "")


def test_run_json(command: "Command") -> None:
    said = command(*RUN, "--json")
    assert said.err == ""
    (row,) = json.loads(said.out)
    result = Result.read(Path(row["file"]))
    assert (row["defense"], row["threat"], row["attack"]) == ("oneshot", "dwbox", "standard")
    assert (row["images"], row["draws"]) == (4, 3)
    assert row["robust"]["value"] == result.right("adversarial").mean()
    assert row["fresh"]["value"] == result.right("fresh").mean()
    assert row["clean"]["low"] <= row["clean"]["value"] <= row["clean"]["high"]


def test_run_of_a_setting_that_has_another_name(command: "Command", tmp_path: Path) -> None:
    said = command("run", "--defense", "oneshot", "--threat", "dw-fwd,dwbox", *SMALL)
    says = "oneshot / dw-fwd: the same setting as dwbox, since oneshot draws noise at forward alone"
    assert says in said.out
    assert [p.parts[-3] for p in tmp_path.glob("results/*/*/*/*/seed-0.json")] == ["dwbox"]
    later = command("run", "--defense", "oneshot", "--threat", "dw-fwd", *SMALL, "--json")
    assert [row["threat"] for row in json.loads(later.out)] == ["dwbox"]
    # Its images were never saved, so it is run where they are asked for.
    saved = ["run", "--defense", "oneshot", "--threat", "dw-fwd", *SMALL, "--save-adversarial"]
    assert command(*saved).code == 0
    assert len(list(tmp_path.glob("results/*/*/dw-fwd/standard/adversarial-*"))) == 1


def test_overrides_are_in_the_result(command: "Command", tmp_path: Path) -> None:
    given = {"steps": 1, "step_size": 0.5, "loss": "margin", "restarts": 2, "random_start": True}
    sets = [part for name, v in given.items() for part in ("--set", f"{name}={json.dumps(v)}")]
    options = ["--eps", "8/255", "--seed", "7", "--gradient", "bpda", "--max-batch", "8", "-q"]
    asked = ["run", "--defense", "oneshot", "--threat", "dwbox", "--attack", "pgd", *SMALL[2:]]
    assert command(*asked, *sets, *options).code == 0
    result = Result.read(tmp_path / OF_RUN.replace("standard", "pgd") / "seed-7.json")
    assert result.eps == 8 / 255
    assert result.effort.items() >= {"eot": 10, **given}.items()
    assert result.gradient == "bpda"
    assert result.arithmetic.max_batch == 8
    named = [*given, "eps", "batch_size", "gradient", "max_batch"]
    assert result.overrides == sorted(named)


def test_another_attack_at_the_same_knowledge(command: "Command", tmp_path: Path) -> None:
    said = command(*RUN, "--attack", "square", "--set", "n_queries=3")
    assert said.code == 2, "budget is no option of square"
    small = ["--examples", "2", "--batch-size", "2", "--set", "n_queries=3"]
    names = ["run", "--defense", "oneshot", "--threat", "dwbox", "--attack", "square"]
    said = command(*names, *small)
    assert (said.code, said.err) == (0, "")
    assert "square" in said.out
    path = tmp_path / "results/digits-linf/oneshot/dwbox/square/seed-0.json"
    assert said.out.splitlines()[-1] == str(path.relative_to(tmp_path))
    assert Result.read(path).knows == ["forward"]


def test_saved_images_are_evaluated_again(command: "Command", tmp_path: Path) -> None:
    assert command(*RUN, "--save-adversarial", "-q").code == 0
    file = tmp_path / OF_RUN / "adversarial-seed-0.safetensors"
    said = command("verify", file, "--draws", "2")
    assert (said.code, said.err) == (0, "")
    assert "3 x 4 images inside linf 0.2 and [0, 1]" in said.out
    table = json.loads(command("verify", file, "--draws", "3", "--json").out)
    result = Result.read(file.with_name("seed-0.json"))
    assert table["ids"] == result.ids
    # The first fresh draws are those of the result.
    assert table["value"] == pytest.approx(result.right("fresh").mean())


# --------------------------------------------------------------------------------------- plan

PLAN = ["run", "--dry-run"]


def test_plan(command: "Command", tmp_path: Path) -> None:
    names = ["--defense", "ddim,none", "--threat", "dw-fwd,dwbox,eot", *SMALL]
    said = command(*PLAN, *names)
    assert (said.code, said.err) == (0, "")
    assert "(the default track)" in said.out
    assert "= dwbox" in said.out
    assert "linf eps 0.2, seed 0, cpu; groups of 4 images" in said.out
    table = json.loads(command(*PLAN, *names, "--json", "--seed", "3", "--eps", "0.1").out)
    jobs = {(row["defense"], row["threat"]): row for row in table["jobs"]}
    assert len(jobs) == 6
    assert {row["seed"] for row in jobs.values()} == {3}
    assert {row["eps"] for row in jobs.values()} == {0.1}
    assert jobs["ddim", "dw-fwd"]["same_setting_as"] == "dwbox"
    assert jobs["ddim", "dw-fwd"]["cost"] is None
    # 4 images: 3 attacks of 1 step, 3 x 5 evaluations, an NFE of 10 each.
    assert jobs["ddim", "dwbox"]["cost"]["nfe"] == 10 * 4 * (3 * (4 + 2 + 6) + 15)
    assert not (tmp_path / "results").exists()


def test_a_plan_of_what_has_no_room(command: "Command", monkeypatch: pytest.MonkeyPatch) -> None:
    """One line for each defense, which says what would do."""
    monkeypatch.setattr("dbp_bench.memory.free_bytes", lambda _: 2**16)
    monkeypatch.setattr("dbp_bench.runs.estimate._PROBES", {})
    said = command(*PLAN, "--defense", "ddpm", "--threat", "eot,dw-fwd,dw-rev", *SMALL)
    (line,) = [line for line in said.out.splitlines() if "does not fit" in line]
    fits = re.fullmatch(
        r"ddpm \(eot, dw-fwd, dw-rev\) does not fit: "
        r"0 MiB are free on cpu\. Try --max-batch (\d+)\.",
        line,
    )
    assert fits is not None
    assert 1 <= int(fits[1]) < 8  # 4 images, 2 samples each


def test_a_plan_of_what_is_there(command: "Command") -> None:
    names = ["--defense", "none", "--threat", "dwbox", *SMALL]
    assert "all there" not in command(*PLAN, *names).out
    assert command("run", *names).code == 0
    assert "all there" in command(*PLAN, *names).out


def test_a_plan_in_80_columns(command: "Command", monkeypatch: pytest.MonkeyPatch) -> None:
    """One line for each job, and each attack with its options once, below."""
    monkeypatch.setenv("COLUMNS", "80")
    said = command(*PLAN, "--defense", "noise-only,none", "--threat", "dwbox,eot", *SMALL)
    lines = [line.rstrip() for line in said.out.splitlines()]
    assert max(map(len, lines)) <= 80
    heads = [line.split()[:5] for line in lines if line.startswith(("noise-only ", "none "))]
    assert heads == [
        ["noise-only", "eot", "nothing", "4", "9"],
        ["noise-only", "dwbox", "all", "4", "3"],
        ["none", "eot", "nothing", "4", "1"],
        ["none", "dwbox", "nothing", "4", "1"],
    ]
    assert sum(line.startswith("attack ") for line in lines) == 1
    assert "attack   standard: budget=4; gradient exact" in said.out


def test_plan_counts_what_is_left(command: "Command") -> None:
    assert command(*RUN, "-q").code == 0
    options = ["--defense", "oneshot", "--threat", "dwbox", *SMALL, "--json"]
    assert json.loads(command(*PLAN, *options).out)["seconds"] == 0
    assert json.loads(command(*PLAN, *options, "--seed", "1").out)["seconds"] > 0


# ------------------------------------------------------------------------------------ results


def test_outcomes_as_csv(command: "Command", tmp_path: Path) -> None:
    result = Result.read(FIXTURE)
    result.write(result.path(tmp_path / "results"))
    out = tmp_path / "out.csv"
    said = command("report", "--outcomes", out)
    assert (said.code, said.err) == (0, "")
    assert said.out == f"{out}\n"
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert len(rows) >= len(result.ids) * len(result.draws)


def test_report(command: "Command", tmp_path: Path) -> None:
    assert (
        command("run", "--defense", "none,oneshot", "--threat", "eot,dwbox,null", *SMALL).code == 0
    )
    said = command("report")
    assert (said.code, said.err) == (0, "")
    for line in said.out.splitlines():
        assert (tmp_path / line).is_file()
    assert command("report", "--quiet") == (0, "", "")


# ------------------------------------------------------------------------ numbers that say nothing


def test_saturated_losses_are_said_where_the_number_is(
    command: "Command", monkeypatch: pytest.MonkeyPatch
) -> None:
    build = Subject.defense

    def saturated(self: Subject, **keywords: Any) -> Defense:
        built = build(self, **keywords)
        inner = built.classifier.forward
        built.classifier.forward = lambda images: 1e4 * inner(images)
        return built

    monkeypatch.setattr(Subject, "defense", saturated)
    ask = [
        "run",
        "--defense",
        "none",
        "--threat",
        "eot",
        *SMALL,
        "--examples",
        "60",
        "--batch-size",
        "60",
    ]
    said = command(*ask)
    assert "] *" in said.out
    assert "of 60 images, which stay right" in said.out
    (row,) = json.loads(command(*ask, "--json").out)
    assert any("no gradient, or none but zero" in doubt for doubt in row["doubts"])


# --------------------------------------------------------------------------- brackets are no markup


def test_brackets_are_text(command: "Command", tmp_path: Path) -> None:
    track = yaml.safe_load(Registry().tracks["digits-linf"].read_text())
    title = "[bold]Digits[/] :smile: [/nothing]"
    none = toy_defense(Registry().defense("none").entry.factory, [])
    none["settings"][0]["tracks"] = ["mine"]
    mine = folder(
        tmp_path / "[red]mine[/red]",
        tracks={"mine": track | {"title": title}},
        defenses={"toy": none},
    )
    ask = ["run", "--defense", "toy", "--track", "mine", "--entries", mine, *SMALL]
    out = tmp_path / "[blue]out[/x]"
    ask += ["--out", out]
    said = command(*ask, "--threat", "eot")
    assert (said.code, said.err) == (0, "")
    assert title in said.out
    assert said.out.splitlines()[-1] == str(out / "mine/toy/eot/standard/seed-0.json")
    same = command(*ask, "--threat", "eot,dwbox")
    assert f"see {out}" in same.out
    assert title in command("list", "tracks", "--entries", mine).out
    assert title in command(*ask, "--threat", "eot", "--dry-run").out
    swept = ["sweep", "toy", "--threat", "eot", "--track", "mine", "--over", "budget=3"]
    small = ["--examples", "2", "--batch-size", "2", "--set", "budget=2", "--black-box", "none"]
    assert command(*swept, *small, "--entries", mine, "--out", out).code == 0


# ---------------------------------------------------------------------------------- mistakes

NO_TRUST = ["--entries", "mine"]


def entries(where: Path) -> None:
    threat = yaml.safe_load(Registry().threats["eot"].read_text())
    track = yaml.safe_load(Registry().tracks["digits-linf"].read_text())
    defense = toy_defense("dbp_bench.purifiers.controls:NoiseOnly", ["forward"], t_star=100)
    pusher = toy_defense("dbp_bench.cli.submit:submit", [], defense="ddim")
    folder(
        where / "mine",
        defenses={
            "foreign": toy_defense("elsewhere:make", []),
            "half": defense,
            "pusher": pusher,
        },
        threats={"yes": threat | {"eps": False}, "seven": threat | {"eps": 8}},
        tracks={"no-weights": track | {"classifier": track["classifier"] | {"sha256": "0" * 64}}},
    )
    folder(where / "taken", defenses={"ddim": defense})
    (where / "empty").mkdir()
    (where / "file").write_text("")
    (where / "broken.json").write_text("{")
    shutil.copy(FIXTURE, where / "seed-0.json")


DDIM = ["run", "--defense", "ddim", "--threat", "dwbox", "--examples", "4"]
PGD = ["--attack", "pgd"]
LISTED = "`dbp-bench list {}` lists them."


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["run", "--defense", "adt", "--threat", "eot"],
            f"no defense 'adt'. Did you mean 'addt'? {LISTED.format('defenses')}",
        ),
        (["run", "--defense", "ddim", "--threat", "eto"], "no threat 'eto'. Did you mean 'eot'?"),
        (
            [*DDIM, "--attack", "apdg"],
            f"no attack 'apdg'. Did you mean 'apgd'? {LISTED.format('attacks')}",
        ),
        ([*DDIM, "--attack", "mine:Attack"], "is code from outside dbp-bench. Add --trust-code"),
        ([*DDIM, "--track", "digit-linf"], "no track 'digit-linf'. Did you mean 'digits-linf'?"),
        (["run", "--defense", "", "--threat", "eot"], "--defense: names nothing."),
        (["run", "--defense", "all,ddim", "--threat", "eot"], "either all or names"),
        ([*DDIM, "--examples", "0"], "--examples 0: this track has 1 to 360 images"),
        ([*DDIM, "--examples", "400"], "--examples 400"),
        ([*DDIM, "--draws", "2"], "--draws 2: dwbox needs at least 3 known draws"),
        ([*DDIM, "--draws", "-1"], "--draws -1: must be 1 or more"),
        ([*DDIM, "--set", "steps"], "--set 'steps': write it as steps=50."),
        (
            [*DDIM, *PGD, "--set", "stepz=3"],
            "with --set stepz: pgd: stepz: is unknown. Did you mean 'steps'?",
        ),
        (
            [*DDIM, *PGD, "--set", "steps=0"],
            "with --set steps: pgd: steps: input should be greater than or",
        ),
        ([*DDIM, *PGD, "--set", "eot=-3"], "eot: input should be"),
        ([*DDIM, *PGD, "--set", "step-size=.nan"], "step_size: input should be"),
        ([*DDIM, *PGD, "--set", "step_size=inf"], "step_size: input should be"),
        (
            [*DDIM, *PGD, "--set", "loss=cee"],
            "loss: input should be 'ce', 'margin', 'dlr', 'ce-targeted'",
        ),
        ([*DDIM, *PGD, "--set", "restarts=3"], "restarts: more than 1 needs random_start"),
        ([*DDIM, *PGD, "--budget", "3"], "pgd: budget: is unknown. Known: eot, loss, "),
        ([*DDIM, "--budget", "0"], "standard: budget: input should be greater than or equal to 1"),
        ([*DDIM, "--budget", "3", "--set", "budget=4"], "--set gives a budget, too. Give one."),
        ([*DDIM, "--gradient", "bpad"], "--gradient 'bpad': exact, bpda, declared-surrogate, or"),
        ([*DDIM, "--eps", "8"], "Did you mean 8/255?"),
        ([*DDIM, "--eps=-0.1"], "a radius cannot be negative"),
        ([*DDIM, "--eps", "nan"], "--eps 'nan': not a number such as 0.2 or 8/255"),
        ([*DDIM, "--eps", "inf"], "not a number"),
        ([*DDIM, "--eps", "1e400"], "not a number"),
        ([*DDIM, "--eps", "8/0"], "not a number"),
        ([*DDIM, "--eps", "no"], "not a number"),
        ([*DDIM, "--seed", "-1"], "--seed -1"),
        ([*DDIM, "--batch-size", "0"], "--batch-size 0"),
        ([*DDIM, "--max-batch", "0"], "--max-batch 0"),
        ([*DDIM, "--device", "tpu"], "--device 'tpu': auto, cpu or cuda"),
        ([*DDIM, "--checkpointing", "all"], "--checkpointing 'all': auto, none or step"),
        ([*DDIM, "--out", "file"], "file"),
        ([*DDIM, "--entries", "nowhere"], "no folder defenses/, attacks/threats/, "),
        ([*DDIM, "--entries", "empty"], "no folder defenses/, attacks/threats/, "),
        ([*DDIM, "--entries", "taken"], "the name is taken by"),
        (["run", "--defense", "foreign", "--threat", "eot", *NO_TRUST], "Add --trust-code"),
        (
            ["run", "--defense", "half", "--threat", "eot", *NO_TRUST],
            "'clamp_output' is missing.",
        ),
        (
            ["run", "--defense", "pusher", "--threat", "eot", *NO_TRUST, "--trust-code"],
            "dbp_bench.cli.submit:submit is not in dbp_bench.purifiers.",
        ),
        (["run", "--defense", "ddim", "--threat", "yes", *NO_TRUST], "eps: input should be a"),
        (["run", "--defense", "ddim", "--threat", "seven", *NO_TRUST], "Did you mean 8/255?"),
        (["run", "--defense", "ddim", "--threat", "all", *NO_TRUST], "eps: "),
        (
            ["run", "--defense", "all", "--threat", "eot", "--track", "no-weights", *NO_TRUST],
            "the entry says 0000000000000000",
        ),
        ([*DDIM, "--dry-run", "--eps", "8"], "Did you mean 8/255?"),
        (["list", "defences"], "no entry 'defences'. Did you mean 'defenses'? `dbp-bench list`"),
        (["list", "adt"], "no entry 'adt'. Did you mean 'addt'? `dbp-bench list` lists them."),
        (["list", "--entries", "nowhere"], "no folder"),
        (["verify", "nowhere.safetensors"], "nowhere.safetensors"),
        (["verify", "seed-0.safetensors"], "not a file of adversarial images beside its result"),
        (["verify", "seed-0.safetensors", "--draws", "0"], "--draws 0: must be 1 or more"),
        (["verify", "broken.json"], "broken.json: not a JSON file"),
        (["verify", "nowhere.json"], "nowhere.json: no such file"),
        (["report", "--sort", "best"], "--sort 'best': hidden or known"),
        (["report", "--results", "nowhere"], "nowhere"),
        (["check"], "name a defense, or all; or add --environment."),
        (["check", "adt"], "no defense 'adt'"),
        (["train", "adt"], "no recipe 'adt'. Did you mean 'addt'?"),
        (["train", "all", "--track", "cifar"], "--track cifar"),
        # What the parser refuses.
        (["rum"], "no such command 'rum'. Did you mean 'run'? `dbp-bench --help` tells more."),
        (["run"], "run: missing option '--defense'. `dbp-bench run --help` tells more."),
        (
            ["run", "--defence", "ddim"],
            "run: no option '--defence'. Did you mean '--defense'? `dbp-bench run --help` lists",
        ),
        (["list", "--jsn"], "list: no option '--jsn'. Did you mean '--json'?"),
        ([*DDIM, "--examples", "two"], "run: invalid value for '--examples'"),
        (["list", "tracks", "threats"], "list: got unexpected extra argument"),
        (["weights", "fetsch"], "weights: no such command 'fetsch'. Did you mean 'fetch'?"),
        ([*DDIM, "--seed"], "option '--seed' requires an argument."),
    ],
)
def test_mistake(command: "Command", tmp_path: Path, arguments: list[str], says: str) -> None:
    entries(tmp_path)
    said = command(*arguments)
    assert said.err.startswith("dbp-bench: ")
    assert says in said.err
    assert len(said.err.splitlines()) == 1
    assert len(said.err) < 400, "a dump of names"
    assert said.code == 2
    assert "results" not in {path.name for path in tmp_path.glob("results/*/*")}


@pytest.mark.parametrize("verb", moved.COMMANDS)
def test_an_old_command_says_the_new_one(command: "Command", verb: str) -> None:
    for arguments in ([], ["--help"], ["ddim", "--out", "x", "-q", "--", "more"]):
        said = command(verb, *arguments)
        assert (said.code, said.out) == (2, "")
        assert said.err == f"dbp-bench: {moved.COMMANDS[verb]}\n"
        assert verb in said.err


@pytest.mark.parametrize("option", moved.OPTIONS)
def test_an_old_option_says_the_new_one(command: "Command", option: str) -> None:
    for arguments in ([option, "3"], [f"{option}=3"]):
        said = command(*DDIM, *arguments)
        assert (said.code, said.out) == (2, "")
        assert said.err == f"dbp-bench: {moved.OPTIONS[option]}\n"
        assert option in said.err


@pytest.mark.parametrize(
    ("twice", "says"),
    [
        (("--seed", "0", "--seed", "1"), "--seed: given twice, and only one would count."),
        (("--defense", "addt"), "--defense: given twice, and only one would count."),
        (("--out", "a", "--out", "b"), "--out: given twice, and only one would count."),
    ],
)
def test_an_option_that_would_be_ignored(
    command: "Command", twice: tuple[str, ...], says: str
) -> None:
    said = command("run", "--defense", "none", "--threat", "eot", *twice, "--dry-run")
    assert (said.code, said.err) == (2, f"dbp-bench: {says}\n")
    again = ("--examples", "3", "--examples", "2", "--set", "budget=3", "--set", "budget=2")
    assert command("run", "--defense", "none", "--threat", "eot", *again, "--dry-run").code == 0
    assert command("submit", "none", "--results", "a", "--results", "b").err.startswith(
        "dbp-bench: --results: given twice"
    )


def test_a_place_of_data_that_a_plan_would_ignore(command: "Command", tmp_path: Path) -> None:
    asked = ("--defense", "none", "--threat", "eot", "--data", tmp_path, "--dry-run")
    said = command("run", *asked)
    assert said.code == 2
    assert "the images of data set 'digits' come with the package" in said.err


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
