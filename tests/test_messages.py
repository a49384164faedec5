"""What a command says when something of the user's own goes wrong: once, and where."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml

from dbp_bench.entries.registry import Registry
from dbp_bench.errors import LONGEST
from dbp_bench.result import Result
from own_entries import folder, toy_defense

if TYPE_CHECKING:
    from conftest import Command, Said

SMALL = ["--budget", "4", "--examples", "4", "--batch-size", "4"]
NO_BOX = ["--black-box", "none", "--draws", "1", "--set", "budget=2"]
MAIN = [sys.executable, "-c", "from dbp_bench.cli import main; main()"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Commands write below the working directory, and modules are forgotten again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if "toy_of_a_user" in name:
            del sys.modules[name]


MODULE = """
import os
import subprocess
import sys
from dataclasses import dataclass
import torch
from dbp_bench.noise import FORWARD

@dataclass
class Mine:
    sites: frozenset = frozenset({FORWARD})

    def __call__(self, images, noise):
        x = images + 0.1 * noise.normal(FORWARD, 0, images)
        BODY
        return x.clamp(0, 1)
"""


def write(body: str, where: Path = Path("mine"), module: str = MODULE) -> tuple[str, int]:
    """A defense called `mine` whose purifier does `body`; the file, and the line of the `body`."""
    folder(where, defenses={"mine": toy_defense("toy_of_a_user:Mine", ["forward"])})
    text = dedent(module).replace("BODY", body)
    path = where / "toy_of_a_user.py"
    path.write_text(text)
    line = next((i for i, one in enumerate(text.splitlines(), 1) if body and body in one), 0)
    return str(path.resolve()), line


OWN = ["--entries", "mine", "--trust-code"]
RUN = ["run", "--defense", "mine", "--threat", "eot", *SMALL, *OWN]


def one_line(said: "Said", code: int) -> str:
    """The only line that `said` has."""
    assert said.code == code, said
    assert said.err.startswith("dbp-bench: ")
    assert len(said.err.splitlines()) == 1
    return said.err


# ------------------------------------------------------------------ somebody's own code raises


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("raise RuntimeError('first\\nsecond')", "RuntimeError: first second"),
        ("x = x @ torch.zeros(3, 7)", "RuntimeError: "),
        ("x = self.nothing", "AttributeError: 'Mine' object has no attribute 'nothing'"),
        ("x = {}['key']", "KeyError: 'key'"),
        ("open('nowhere')", "FileNotFoundError: "),
        ("import nowhere_at_all", "ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("assert False", "AssertionError"),
        ("sys.exit(0)", "ends the process (exit 0)"),
        ("sys.exit()", "ends the process (exit 0)"),
        ("import typer; raise typer.Exit(0)", "Exit"),
        ("import typer; raise typer.BadParameter('x')", "BadParameter"),
        ("raise GeneratorExit", "GeneratorExit"),
        ("raise BaseExceptionGroup('several', [GeneratorExit()])", "BaseExceptionGroup: several"),
        ("raise BrokenPipeError", "BrokenPipeError"),
        ("raise type('E', (ValueError,), {'__str__': lambda self: 1 / 0})", "E"),
        ("raise type('E', (RuntimeError,), {'__str__': None})", "E"),
    ],
)
@pytest.mark.parametrize("verb", ["run", "dry-run", "check"])
def test_an_exception_keeps_its_file_and_line(
    command: "Command", verb: str, body: str, says: str
) -> None:
    file, line = write(body)
    if verb == "check":
        said = command("check", "mine", *OWN)
        if "sys.exit" not in body and "GeneratorExit" not in body:
            assert said.code == 1
            assert f"({file}:{line})" in said.out
            assert "Traceback" not in said.out + said.err
            return
    else:
        said = command(*RUN, *(["--dry-run"] if verb == "dry-run" else []))
    message = one_line(said, 3)
    assert f"{file}:{line}: {says}" in message


@pytest.mark.parametrize(
    ("module", "says"),
    [
        ("import nowhere_at_all", "No module named 'nowhere_at_all' ({file}:1)"),
        ("\ntorch = 1\ntorch.nothing", "no attribute 'nothing' ({file}:3)"),
        ("\n\nx = (", "toy_of_a_user.py, line 3"),
        ("x = 1", ": module 'toy_of_a_user' has no attribute 'Mine'"),
        ("\nraise ValueError('no')", "{file}:2: ValueError: no"),
    ],
)
def test_an_exception_while_a_module_is_imported(
    command: "Command", module: str, says: str
) -> None:
    file, _ = write("", module=module)
    said = command(*RUN)
    assert says.format(file=file) in one_line(said, 3 if "ValueError" in says else 2)


def test_an_exception_of_a_constructor(command: "Command") -> None:
    file, line = write(
        "raise ValueError('level must be 0 or more')",
        module="class Mine:\n    def __init__(self):\n        BODY\n",
    )
    assert f"level must be 0 or more ({file}:{line})" in one_line(command(*RUN), 2)


def test_an_exception_of_an_attack(command: "Command") -> None:
    write("")
    Path("mine/toy_of_a_user_attack.py").write_text(
        dedent(
            """
            from dataclasses import dataclass
            from dbp_bench.threat import Evaluations

            @dataclass(frozen=True)
            class Attack:
                def __call__(self, view, images, labels, budget):
                    return images[7, 7, 7, 7, 7]

                def evaluations(self, setup):
                    return Evaluations(gradient=0, forward=0, exact=True)

                def unfit(self, setup):
                    return None
            """
        )
    )
    asked = ["--attack", "toy_of_a_user_attack:Attack", "--examples", "2", "--batch-size", "2"]
    said = command("run", "--defense", "none", "--threat", "eot", *asked, *OWN)
    assert "toy_of_a_user_attack.py:8: IndexError: " in one_line(said, 3)


def test_a_message_is_cut(command: "Command") -> None:
    write("raise ValueError('x' * 10**6)")
    assert len(one_line(command(*RUN), 3)) < LONGEST + 10


@pytest.mark.parametrize("body", ["return x.half()", "return x[:, :, :4]"])
def test_what_is_returned_makes_our_code_raise(command: "Command", body: str) -> None:
    write(body)
    message = one_line(command(*RUN), 3)
    assert "Error: " in message or "purified" in message
    assert "Traceback" not in message


@pytest.mark.parametrize(
    ("body", "form"),
    [
        ("return x[:1]", "(1, 1, 8, 8)"),
        ("return None", "NoneType"),
        ("return x.tolist()", "list"),
    ],
)
def test_purified_images_of_another_form(command: "Command", body: str, form: str) -> None:
    write(body)
    message = one_line(command(*RUN), 3)
    assert message.startswith("dbp-bench: mine / eot: purified images are ")
    assert form in message


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("images.clamp_(0, 1)", "the purifier changes its input in place"),
        ("x = x + noise.normal('hidden', 0, x)", "it draws at [hidden] without declaring so"),
    ],
)
def test_a_rule_that_is_broken_while_running_is_a_failure_of_the_defense(
    command: "Command", body: str, says: str
) -> None:
    write(body)
    assert one_line(command(*RUN), 3).startswith(f"dbp-bench: mine / eot: {says}")


@pytest.mark.parametrize(
    "raised",
    [
        "raise MemoryError",
        "raise torch.OutOfMemoryError('CUDA out of memory')",
        "raise RuntimeError('[enforce fail] DefaultCPUAllocator: can\\'t allocate memory')",
    ],
)
def test_out_of_memory_says_what_would_do(command: "Command", raised: str) -> None:
    write(raised)
    message = one_line(command(*RUN), 3)
    assert "out of memory. Give a smaller --max-batch or --batch-size, or take" in message


# ------------------------------------------------------------------------------- JSON is JSON


PRINTS = (
    "print('one')",
    "sys.stdout.write('two')",
    "os.write(1, b'three')",
    "subprocess.run(['echo', 'four'], check=True)",
)


def test_json_is_json_when_a_defense_prints() -> None:
    """However it prints, and also where a process does that it starts."""
    write("; ".join(PRINTS))
    done = as_a_process(*RUN, "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)[0]["defense"] == "mine"
    for word in ("one", "two", "three", "four"):
        assert word in done.stderr


@pytest.mark.parametrize("verb", ["check", "dry-run", "verify", "sweep"])
def test_other_commands_give_json_too(command: "Command", verb: str) -> None:
    write("print('loading')")
    if verb == "verify":
        assert command(*RUN).code == 0
    asked = {
        "check": ["check", "mine"],
        "dry-run": ["run", "--defense", "mine", "--threat", "eot", *SMALL, "--dry-run"],
        "verify": ["verify", "results/digits-linf/mine/eot/standard/seed-0.json"],
        "sweep": ["sweep", "mine", "--threat", "eot", "--over", "budget=3", *SMALL[2:], *NO_BOX],
    }[verb]
    said = command(*asked, *OWN, "--json")
    assert json.loads(said.out), said
    # What is verified runs in a process of its own, whose standard error isn't captured here.
    assert ("loading" in said.err) == (verb != "verify")


# -------------------------------------------------------------------------- where a command runs


def as_a_process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``dbp-bench`` in a process of its own, without a home folder."""
    kept = {name: value for name, value in os.environ.items() if name != "HOME"}
    return subprocess.run(
        [*MAIN, *arguments],
        capture_output=True,
        env={**kept, "OMP_NUM_THREADS": "1", **environment},
        check=False,
        encoding=environment.get("PYTHONIOENCODING", "utf-8"),
    )


HOMELESS = """
import os, pwd
def nobody(uid): raise KeyError(uid)
pwd.getpwuid = nobody
"""


def test_without_a_home_folder(tmp_path: Path) -> None:
    """A user without an entry in the list of users, as in many containers."""
    (tmp_path / "sitecustomize.py").write_text(HOMELESS)
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    plan = ["run", "--defense", "ddim", "--threat", "dwbox", "--dry-run", *SMALL]
    done = as_a_process(*plan, PYTHONPATH=path)
    assert (done.returncode, done.stderr) == (0, "")
    real = ["run", "--defense", "diffpure", "--threat", "dwbox", "--track", "cifar10-linf"]
    for asked in (["weights", "list"], [*real, "--dry-run"]):
        done = as_a_process(*asked, PYTHONPATH=path)
        assert done.returncode == 2
        assert done.stderr.startswith("dbp-bench: weights are kept in the home folder, and there")
        assert "set DBP_BENCH_CACHE" in done.stderr
    done = as_a_process("weights", "list", PYTHONPATH=path, DBP_BENCH_CACHE=str(tmp_path))
    assert done.returncode == 0


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_a_terminal_of_few_characters(encoding: str, tmp_path: Path) -> None:
    entry = yaml.safe_load(Registry().defenses["none"].read_text()) | {"title": "naïve → 净化"}
    folder(tmp_path / "mine", defenses={"mine": entry})
    for asked in (["run", "--help"], ["list", "--entries", "mine"]):
        done = as_a_process(*asked, PYTHONIOENCODING=encoding)
        assert (done.returncode, done.stderr) == (0, "")
    assert "\\u2192" in done.stdout


@pytest.mark.parametrize("option", ["--data=~/nowhere", "--out=~/nowhere.zip", "--entries=~/no"])
def test_a_home_folder_after_an_equals_sign(
    command: "Command", monkeypatch: pytest.MonkeyPatch, tmp_path: Path, option: str
) -> None:
    """Shells put it in only where a word begins with it."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    asked = ["run", "--defense", "none", "--threat", "null", "--track", "cifar10-jpeg-linf"]
    if "out" in option:
        asked = ["submit", "none", "--results", "results"]
    message = one_line(command(*asked, option), 2)
    if "out" not in option:
        assert str(tmp_path / "home" / "no") in message
    assert not Path("~").exists()


def test_a_home_folder_in_the_environment(
    command: "Command", monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DBP_BENCH_DATA", "~/nowhere")
    asked = ["run", "--defense", "none", "--threat", "null", "--track", "cifar10-jpeg-linf"]
    message = one_line(command(*asked), 2)
    assert f"DBP_BENCH_DATA {tmp_path / 'home/nowhere'}: no such file or folder" in message


SAYS_WHEN_IT_STARTS = """
import signal
from dbp_bench.cli import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # A job in the background ignores it.
handle = signal.signal

def told(number, handler):
    print("ready", flush=True)
    return handle(number, handler)

signal.signal = told
main()
"""
"""A command that prints a line as soon as it catches signals, which is the first it does."""


@pytest.mark.parametrize("moment", [0.0, 0.03, 0.1, 0.3])
def test_stopped_in_the_first_moments(moment: float) -> None:
    """From where our first line runs, however much is still to be imported."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            SAYS_WHEN_IT_STARTS,
            "run",
            "--defense",
            "addt",
            "--threat",
            "dwbox",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(moment)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said == "dbp-bench: stopped. The same command continues where this one was.\n"


# ------------------------------------------------------------------------------------- checks


def faults(said: "Said") -> dict[str, str]:
    """Verdict and fault of each check that did not pass, by title."""
    rows = [line.split(": ", 2) for line in said.out.splitlines() if not line.startswith("pass")]
    return {title: f"{head.split()[0]} {fault}" for head, title, fault in rows}


REPLAYS = "replays exactly, and leaves global generators alone"
GRADIENT = "gradient agrees with finite differences"
OUTPUT = "output in [0, 1], of the input's shape and type"
BATCH = "does not mix images in a batch"


def test_one_cause_is_named_once(command: "Command") -> None:
    write("x = x + 0.01 * torch.randn_like(x)")
    said = command("check", "mine", *OWN)
    found = faults(said)
    assert said.code == 1
    failed = [title for title, fault in found.items() if fault.startswith("FAIL")]
    assert failed == [REPLAYS]
    others = {"step checkpointing is exact", BATCH, GRADIENT}
    assert set(found) - {REPLAYS} == others
    assert {found[each] for each in others} == {f"---- not tested, since it fails: {REPLAYS}"}


@pytest.mark.parametrize("body", ["x = x * float('nan')", "x = x / 0"])
def test_output_that_is_not_finite_is_named_once(command: "Command", body: str) -> None:
    write(body + "; return x")
    found = faults(command("check", "mine", *OWN))
    assert found.pop(OUTPUT).startswith("FAIL purified images are not finite")
    assert len(found) == 8
    assert set(found.values()) == {f"---- not tested, since it fails: {OUTPUT}"}


@pytest.mark.parametrize(
    "body", ["images.clamp_(0, 1)", "return x.half()", "return x[:1]", "return None"]
)
def test_output_of_another_form_is_named_once(command: "Command", body: str) -> None:
    write(body)
    found = faults(command("check", "mine", *OWN))
    assert found.pop(OUTPUT).startswith("FAIL ")
    assert len(found) == 8
    assert set(found.values()) == {f"---- not tested, since it fails: {OUTPUT}"}


def test_nan_in_float64_alone(command: "Command") -> None:
    write("x = x * float('nan') if x.dtype == torch.float64 else x")
    said = command("check", "mine", *OWN)
    assert "atol" not in said.out
    assert faults(said)[BATCH].startswith("FAIL ")


@pytest.mark.parametrize(
    ("body", "dtype"),
    [
        ("x = torch.nn.functional.conv2d(x.half(), torch.ones(1, 1, 1, 1).half()).to(x)", None),
        ("x = torch.nn.functional.conv2d(x, torch.ones(1, 1, 1, 1))", "float64"),
        ("x = (x.flatten(1) @ torch.eye(64, dtype=torch.float32)).view_as(x)", "float64"),
    ],
)
def test_a_purifier_of_one_precision(command: "Command", body: str, dtype: str | None) -> None:
    file, line = write(body)
    found = faults(command("check", "mine", *OWN))
    if dtype is None:  # rounding to half precision is seen as what it is
        assert "arithmetic below float64" in found[GRADIENT]
        return
    fault = f"FAIL it doesn't run in float64 ({file}:{line}), in which gradients are compared: "
    assert found[BATCH].startswith(fault)
    assert "images.dtype" in found[BATCH]
    assert found[GRADIENT] == f"---- not tested, since it fails: {BATCH}"


# ------------------------------------------------------------------------------------ entries


def test_all_faults_of_an_entry_are_said(command: "Command") -> None:
    entry = toy_defense("dbp_bench.purifiers.controls:NoiseOnly", ["forward"])
    folder(Path("mine"), defenses={"mine": entry | {"kind": "x", "title": 3, "one": 1, "two": 2}})
    del entry["paper"]
    message = one_line(command(*RUN), 2)
    for key in ("title: ", "kind: ", "one: ", "two: "):
        assert key in message


def test_all_faults_of_the_options_are_said(command: "Command") -> None:
    options: dict[str, Any] = {"t_star": "x", "clamp_output": "yes", "one": 1, "two": 2}
    entry = toy_defense("dbp_bench.purifiers.controls:NoiseOnly", ["forward"], **options)
    folder(Path("mine"), defenses={"mine": entry})
    message = one_line(command(*RUN), 2)
    for fault in ("'one' is unknown", "'two' is unknown", "options.t_star", "options.clamp_output"):
        assert fault in message
    entry["settings"][0]["options"] = {}
    folder(Path("mine"), defenses={"mine": entry})
    message = one_line(command(*RUN), 2)
    assert "'t_star' is missing, 'clamp_output' is missing. It takes: " in message


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("defenses/Mine.yaml", "the file name is the entry's name"),
        ("defenses/mine too.yaml", "the file name is the entry's name"),
        ("defenses/all.yaml", "the file name is the entry's name"),
        ("defenses/other.yml", "rename it to other.yaml"),
        ("defenses/ddim.yaml", "the name is taken by"),
        ("attacks/threats/Eot.yaml", "the file name is the entry's name"),
        ("attacks/settings/pgd.yaml", "the name is taken by the attack pgd"),
        ("attacks/strong.yaml", "move it to attacks/threats/"),
        ("tracks/Mine.yaml", "the file name is the entry's name"),
    ],
)
def test_a_misnamed_file_stops_no_other_command(command: "Command", file: str, says: str) -> None:
    path, name = Path("mine") / file, Path(file).stem
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("title: x\n")
    Path("mine/defenses").mkdir(exist_ok=True)
    own = ["--entries", "mine"]

    def run(**given: str) -> "Said":
        asked = {"defense": "none", "threat": "null"} | given
        return command("run", *(f"--{key}={value}" for key, value in asked.items()), *SMALL, *own)

    assert run().code == 0
    assert command("list", "addt", *own).code == 0
    said = command("list", *own)
    assert says in said.err
    assert "addt" in said.out
    # The one that is meant is named, and so is one that would be left out of all.
    option = {"defenses": "defense", "tracks": "track"}.get(file.split("/")[0], "threat")
    if "settings" in file:
        option = "attack"
    if name != "all":
        assert says in one_line(run(**{option: name}), 2)
    if option in ("defense", "threat"):
        assert says in one_line(run(**{option: "all"}), 2)


def test_an_entry_that_cannot_be_read_stops_no_list(command: "Command") -> None:
    folder(Path("mine"), defenses={"mine": {"title": "Half"}})
    said = command("list", "--entries", "mine")
    assert said.code == 0
    assert "mine/defenses/mine.yaml: kind: is missing" in said.out
    assert command("list", "ddim", "--entries", "mine").code == 0


# -------------------------------------------------------------------- what is there, and asked


def test_two_threats_that_an_override_makes_equal(command: "Command") -> None:
    both = "whitebox,pgd20-eot"
    asked = ["run", "--defense", "addt", "--threat", both, "--dry-run", "--json"]
    jobs = json.loads(command(*asked, "--set", "eot=2").out)["jobs"]
    assert [job["same_setting_as"] for job in jobs].count(None) == 1
    small = ["--examples", "2", "--batch-size", "2", "--set", "steps=1", "--set", "eot=2"]
    said = command("run", "--defense", "oneshot", "--threat", both, *small)
    assert "since --set eot=2 makes them equal. Not run twice" in said.out
    assert "draws noise" not in said.out
    later = command("run", "--defense", "oneshot", "--threat", "whitebox", *small)
    assert "since --set eot=2 makes them equal. Not run twice" in later.out
    square = ["--attack", "square", "--set", "n_queries=2", *small[:4]]
    said = command("run", "--defense", "oneshot", "--threat", both, *square)
    assert "since --attack square takes the place of both" in said.out
    said = command("run", "--defense", "none", "--threat", both, *small)
    assert "since none draws no noise" in said.out
    said = command("run", "--defense", "oneshot", "--threat", "dw-fwd,dwbox", *SMALL)
    assert "since oneshot draws noise at forward alone" in said.out
    pgd = ["--attack", "pgd", "--set", "steps=2", *small[:4]]
    assert command("run", "--defense", "oneshot", "--threat", "eot", *pgd).code == 0
    said = command("run", "--defense", "oneshot", "--threat", "pgd20-eot", *pgd[2:])
    assert "the same setting as eot, since their attacks are both pgd. Not run twice" in said.out


ONESHOT = ["run", "--defense", "oneshot", "--threat", "dwbox", "--budget", "2"]


def test_fewer_images_than_there_are(command: "Command") -> None:
    assert command(*ONESHOT, *SMALL[2:], "-q").code == 0
    said = command(*ONESHOT, "--batch-size", "4", "--examples", "2")
    assert "oneshot / dwbox: 2 images x 3 draws asked; the row below is of all that is" in said.out
    assert "there, 4 images x 3 draws." in said.out.replace("\n", " ")
    assert "asked" not in command(*ONESHOT, *SMALL[2:]).out


def test_no_resume_keeps_a_larger_result(
    command: "Command", monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path("results/digits-linf/oneshot/dwbox/standard/seed-0.json")
    assert command(*ONESHOT, *SMALL[2:], "-q").code == 0
    before = path.read_bytes()
    again = [*ONESHOT, "--batch-size", "4", "--examples", "2", "--no-resume"]
    message = one_line(command(*again), 2)
    assert f"would replace {path}, of 4 images x 3 draws, by 2 images x 3 draws." in message
    assert path.read_bytes() == before
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("typer.confirm", lambda *_, **__: False)
    assert command(*again).code == 2
    assert path.read_bytes() == before
    monkeypatch.setattr("typer.confirm", lambda *_, **__: True)
    assert command(*again).code == 0
    assert len(Result.read(path).ids) == 2


def test_a_changed_option_is_one_readable_difference(command: "Command") -> None:
    assert command(*ONESHOT, *SMALL[2:], "-q").code == 0
    said = command(*ONESHOT[:-1], "3", *SMALL[2:])
    message = one_line(said, 2)
    assert "holds another request: effort.budget is 2 there, 3 asked." in message
    assert "{" not in message


# ---------------------------------------------------------------------------- made again, compared


def test_a_result_is_made_again(command: "Command", tmp_path: Path) -> None:
    path = Path("results/digits-linf/oneshot/dwbox/standard/seed-0.json")
    small = ["--budget", "2", "--examples", "6", "--batch-size", "4"]
    assert command("run", "--defense", "oneshot", "--threat", "dwbox", *small, "-q").code == 0
    before = path.read_bytes()
    said = command("verify", path, "--again")
    assert (said.code, said.err) == (0, "")
    assert "outcomes of all 6 images are as stated." in said.out
    digest = Result.read(path).digest
    assert f"digest of the outcomes {digest[:16]}...: equal" in said.out
    table = json.loads(command("verify", path, "--again", "--json").out)
    assert table["digest"] == table["stated_digest"] == digest
    part = json.loads(command("verify", path, "--again", "--examples", "2", "--json").out)
    assert (part["images"], part["digest"], part["fault"]) == (4, None, None)
    assert "the first 4 images" in command("verify", path).out
    message = one_line(command("verify", path, "--again", "--examples", "7"), 2)
    assert "--examples 7: this result has 1 to 6 images." in message
    assert path.read_bytes() == before
    assert not list(tmp_path.glob("results/**/adversarial*"))


def test_a_result_that_is_not_made_again(command: "Command") -> None:
    path = Path("results/digits-linf/oneshot/dwbox/standard/seed-0.json")
    small = ["--budget", "2", "--examples", "6", "--batch-size", "4"]
    assert command("run", "--defense", "oneshot", "--threat", "dwbox", *small, "-q").code == 0
    result = Result.read(path)
    table = [list(row) for row in result.predicted.adversarial]
    table[5][0] = (table[5][0] + 1) % 10  # of the last group
    predicted = result.predicted.model_copy(update={"adversarial": table})
    from dbp_bench.result import outcome_digest

    digest = outcome_digest(result.ids, result.labels, result.draws, predicted)
    result.model_copy(update={"predicted": predicted, "digest": digest}).write(path)
    assert command("verify", path).code == 0, "of the first group nothing was changed"
    said = command("verify", path, "--again")
    assert said.code == 1
    assert "FAIL  computed again, 1 of 18 adversarial outcomes" in said.out
    assert f"digest of the outcomes {digest[:16]}...: " in said.out
    assert "equal" not in said.out


def test_torch_knows_how_types_are_told_apart() -> None:
    """The words that the message about float64 looks for."""
    from dbp_bench.checks.conformance import _DTYPES

    with pytest.raises(RuntimeError, match=_DTYPES):
        torch.nn.functional.conv2d(torch.ones(1, 1, 2, 2).double(), torch.ones(1, 1, 1, 1))
