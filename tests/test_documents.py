"""Every command that a document shows is run here, as it is or shortened, or is excepted below."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

import dbp_bench.data
from dbp_bench.entries import outside
from dbp_bench.networks.digits import DigitsCNN
from dbp_bench.result import Conformance
from speed.__main__ import parsed

if TYPE_CHECKING:
    from conftest import Command

TOP = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path
    for form in ("*.md", "docs/*.md", "*/README.md", "*/*/README.md")
    for path in TOP.glob(form)
)

SMALL = "--examples 2 --batch-size 2"
SHORT = f"{SMALL} --budget 2 --out out"
PLAN = "--dry-run --max-batch 20"
DDPM = "dbp-bench run --defense ddpm"
PLACES = {
    "<name>": "ddim",
    "<track>": "digits-linf",
    "FILE": "results/digits-linf/none/eot/standard/seed-0.json",
}

SHORTENED = {
    "dbp-bench list": "",
    "dbp-bench list <name>": "",
    "dbp-bench list <track>": "",
    "dbp-bench run --defense addt --threat dwbox": SHORT,
    "dbp-bench run --defense all --threat all": f"{SHORT} {PLAN}",
    "dbp-bench run --defense <name> --threat all --dry-run": "--max-batch 20",
    "dbp-bench run --defense ddpm --threat all --dry-run": "--max-batch 20",
    "dbp-bench run --defense ddpm --threat eot --budget 400": SHORT,
    f"{DDPM} --threat eot --gradient surrogate:5 --out surrogate-5": f"{SMALL} --budget 2",
    "dbp-bench run --defense lm,coup,scoreopt-o,scoreopt-n --threat eot --attack bpda": SHORT,
    "dbp-bench run --defense rdc-lm,flow --threat eot --attack declared-surrogate": SHORT,
    "dbp-bench run --defense ddpm --threat pgd20-eot": f"{SMALL} --set steps=1 --out out",
    "dbp-bench run --defense ddpm --threat dwbox --attack apgd": f"{SMALL} --set steps=2 --out out",
    "dbp-bench run --defense ddpm --threat dwbox --attack apgd --set steps=50": (
        f"{SMALL} --set steps=2 --out out"
    ),
    "dbp-bench run --defense ddpm --threat eot --attack ensemble-hidden": f"{SMALL} {PLAN}",
    f"{DDPM} --threat eot --attack stadv-published": f"{SMALL} {PLAN}",
    f"{DDPM} --threat dwbox --attack my_module:MyAttack --entries FOLDER --trust-code": (
        f"{SMALL} --out out"
    ),
    "dbp-bench certify --defense densepure --sigma 0.25,0.5,1.0": (
        "--examples 2 --n0 5 --n 20 --out out"
    ),
    "dbp-bench certify --defense densepure --sigma 0.25 --n 100000 --dry-run": "",
    "dbp-bench report": "",
    "dbp-bench compare addt/dwbox ddpm/dwbox": "",
    "dbp-bench check ddpm": "",
    "dbp-bench check lm --gradients": "",
    "dbp-bench check <name>": "",
    "dbp-bench sweep ddpm --threat eot --over budget=400": (
        f"{SMALL} --draws 1 --black-box none --out out"
    ),
    "dbp-bench tune ddpm --over t_star=50,100,150": f"{SMALL} --draws 1 --budget 2 --out out",
    "dbp-bench tune ddpm --track digits-linf --over t_star=50,75,100,150 --over steps=5,10": (
        f"{SMALL} --draws 1 --budget 2 --out out"
    ),
    "dbp-bench analyze landscape --defense ddpm,addt": (
        "--examples 2 --points 3 --steps 1 --eot 1 --no-figure --out out"
    ),
    "dbp-bench analyze immobilise --defense ddpm,addt": (
        "--examples 2 --budget 2 --known 3 --draws 1 --fresh 1 --no-figure --out out"
    ),
    "dbp-bench verify FILE": "",
    "dbp-bench verify FILE --pictures": "",
    "dbp-bench weights list": "",
    "dbp-bench weights verify": "",
    "dbp-bench train addt": "--updates 1 --batch-size 2 --quiet",
    "dbp-bench train addt --hold-out --set lambda_unit=0.1 --set lambda_max=0.5": (
        "--updates 1 --batch-size 2 --quiet"
    ),
    "dbp-bench train all --hold-out": "--updates 1 --batch-size 2 --quiet",
}
"""Commands, and what is added to make them fast."""

MINE = "--threat all --save-adversarial --entries my_defense --trust-code"
OF_AN_AUTHOR = (
    "dbp-bench new defense my_defense",
    "dbp-bench check my-defense --entries my_defense --trust-code",
    f"dbp-bench run --defense my-defense {MINE}",
    "dbp-bench submit my-defense --entries my_defense",
    "dbp-bench verify BUNDLE ... --into results",
)
"""The commands that the author of a defense runs, in order."""

DIGITS = "--network dbp_bench.networks.digits:DigitsCNN"
OF_OWN_FILES = {
    "dbp-bench weights convert model.pt " + DIGITS + " --to mine.safetensors": "",
    "dbp-bench new track my-images --images images.npz": "",
    "dbp-bench run --defense none --threat null --track my-images --entries my-images": SHORT,
    "dbp-bench run --defense ddpm --threat all --track my-images --entries my-images": (
        f"{SHORT} {PLAN}"
    ),
    f"dbp-bench new track my-other --images images.npz {DIGITS} --weights mine.safetensors "
    "--eps 0.2": "",
    "dbp-bench new attack my_attack": "",
    f"{DDPM} --threat eot,dwbox --attack my_attack:MomentumPGD --entries my_attack "
    "--trust-code": f"{SMALL} --set steps=1 --out out --draws 8",
    "dbp-bench report --results mine --baseline": "",
}
"""The commands for images, weights and an attack of one's own, in order, with added options."""

OF_THE_EXAMPLE = (
    "dbp-bench list defenses",
    "dbp-bench check example-heat --trust-code",
    "dbp-bench run --defense example-heat --threat all --save-adversarial --trust-code",
    "dbp-bench submit example-heat",
)
"""The same of the package in examples/, whose installation .ci/run tests."""

CIFAR = "needs the images of CIFAR-10; test_training_runs trains on images that are made up"
EXTRA = "needs an optional package; tests marked `extras` attack with it"
EXCEPTED = {
    "dbp-bench run --defense ddpm --threat dwbox --attack torchattacks:PGD --set steps=20": EXTRA,
    "dbp-bench run --defense ddpm --threat dwbox --attack autoattack:standard": EXTRA,
    "dbp-bench run --defense diffpure --threat eot,dwbox --track cifar10-linf --dry-run": (
        "times networks of published size, minutes on a CPU; test_real_tracks plans this track"
    ),
    "dbp-bench run --defense diffpure --threat eot,dwbox --track cifar10-linf --device cuda": (
        "needs a GPU and weights; test_real_tracks runs this track with small networks"
    ),
    "dbp-bench run --defense all --threat all --track cifar10-jpeg-linf-4 --examples 256 "
    "--batch-size 256 --max-batch 256 --device cuda --data PLACE": (
        "needs a GPU and the images of CIFAR-10"
    ),
    "dbp-bench sweep all --threat all --over budget=400 --black-box none": (
        "takes an hour; test_sweep sweeps several settings at once"
    ),
    "dbp-bench tune ddpm --track cifar10-jpeg-linf --over t_star=50,75,100,150 --over steps=5,10 "
    "--clean 80 --budget 50 --examples 128 --weights WEIGHTS --data PLACE": CIFAR,
    "dbp-bench train RECIPE --track TRACK": CIFAR,
    "dbp-bench train classifier --track cifar10": CIFAR,
    "dbp-bench train addt --track cifar10 --init cifar10-ddpm-ema": CIFAR,
    "dbp-bench train addt --track cifar10 --network ddpmpp --init cifar10-ddpmpp-deep-vp": CIFAR,
    "dbp-bench train addt --track cifar10 --network edm": CIFAR,
    "dbp-bench train addt --track cifar10-linf": CIFAR,
    "dbp-bench train adbm --track cifar10 --network ddpmpp --init cifar10-ddpmpp-deep-vp": CIFAR,
    "dbp-bench train flow --track cifar10": CIFAR,
    "dbp-bench train consistency --track cifar10 --init cifar10-ddpm-ema": CIFAR,
    "torchrun --nproc-per-node 4 --no-python dbp-bench train addt --track cifar10 --precision bf16 "
    "--channels-last --compile": CIFAR,
    "dbp-bench weights fetch NAME": "needs the network; test_weights_fetch has a server",
    "dbp-bench weights fetch cifar10-wrn-28-10": "needs the network; the same",
    "dbp-bench weights fetch cifar10-ddpmpp-deep-vp": "needs the network; the same",
    "dbp-bench weights fetch --defense diffpure --track cifar10-linf": "the same",
    "dbp-bench weights convert NAME --from FILE": "needs a published file; test_weights_convert",
    "dbp-bench weights convert cifar10-wrn-28-10-meliketoy --from wrn.pt": "the same",
    "pip install .": "needs the network; .ci/run installs",
    'pip install ".[data]"': "needs the network",
    'pip install "dbp-bench[data]"': "needs the network",
    'pip install "dbp-bench[diffusers]"': "needs the network; .ci/run installs",
    "pip install dbp-bench .": "needs the network; .ci/run installs",
    "pip install torch": "needs the network",
    "pytest -m gpu": "a marker, and pytest is strict about those",
    "pytest -m slow": "the same",
    ". .venv/bin/activate": "the shell's",
    ".venv/bin/pre-commit install": "writes a hook into the checkout",
}
"""Commands that aren't run, and why."""

WORDS = {
    f"dbp-bench {verb}"
    for verb in ("analyze", "certify", "compare", "new track", "run", "sweep", "train", "tune")
}
"""Names of commands in a sentence."""

START = r"(?:dbp-bench|make|OMP_NUM_THREADS=1 python|python|pip|pytest|torchrun|\.venv/bin/\w)"


def commands(text: str) -> Iterator[str]:
    """The commands in a document: in blocks of code, and in code within sentences."""
    fences = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    blocks = [
        *re.findall(rf"^ {{4}} *({START}.*)$", text, re.MULTILINE),
        *"".join(fences).split("\n"),
    ]
    for line in blocks:
        if re.match(START, line):
            for command in re.split(r"\s+#", line)[0].split("&&"):
                yield command.strip()
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for code in re.findall(r"`([^`]+)`", prose):
        if re.match(rf"{START}[\w-]* ", code):
            yield " ".join(code.split())


ALL = sorted({command for path in DOCUMENTS for command in commands(path.read_text())})
OWN = [command for command in ALL if re.match("dbp-bench|torchrun|pip |pytest|[.]", command)]


def test_every_command_is_run_or_excepted() -> None:
    known = {*SHORTENED, *OF_AN_AUTHOR, *OF_OWN_FILES, *OF_THE_EXAMPLE, *EXCEPTED, *WORDS}
    assert set(OWN) - known == set(), "shown by a document, and neither run nor excepted"
    assert known - set(OWN) == set(), "shown by no document any more"
    assert len(OWN) > 50


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a few of the committed results, and an attack of one's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("DBP_BENCH_CACHE", str(tmp_path / "cache"))
    # Made by every run, and tested elsewhere.
    none = Conformance(checks={}, gradient=None)
    monkeypatch.setattr("dbp_bench.runs.execute.record", lambda *_: none)
    for defense in ("none", "ddpm", "addt"):
        folder = Path("results/digits-linf") / defense
        for path in (TOP / folder).glob("*/*/seed-0.json"):
            (tmp_path / path.relative_to(TOP)).parent.mkdir(parents=True)
            shutil.copy(path, tmp_path / path.relative_to(TOP))


@pytest.fixture
def _few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """A track of 8 images, and code that counts as released."""
    ids = dbp_bench.data.split_ids("digits", "test")[:8]
    monkeypatch.setattr(dbp_bench.data, "split_ids", lambda *_: list(ids))
    monkeypatch.setattr("dbp_bench.provenance._git", lambda: (None, None))
    none = Conformance(checks={}, gradient=None)
    monkeypatch.setattr("dbp_bench.submission.again.record", lambda *_: none)


def arguments(command: str) -> list[str]:
    for name, value in PLACES.items():
        command = command.replace(name, value)
    program, *rest = shlex.split(command)
    assert program == "dbp-bench"
    return rest


@pytest.mark.parametrize("shown", SHORTENED)
def test_a_command(command: "Command", shown: str) -> None:
    if "MyAttack" in shown:
        # The attack of CONTRIBUTING, as it stands there.
        text = (TOP / "CONTRIBUTING.md").read_text()
        code = text[text.index("    from dataclasses import dataclass") :]
        code = code[: code.index("\n\nA **threat model**")]
        Path("FOLDER").mkdir()
        lines = [line.removeprefix("    ") for line in code.splitlines()]
        Path("FOLDER/my_module.py").write_text("\n".join(lines).replace("SignStep", "MyAttack"))
    said = command(*arguments(shown), *SHORTENED[shown].split())
    assert (said.code, said.err) == (0, "")


@pytest.mark.usefixtures("_few_images")
def test_what_an_author_runs(command: "Command") -> None:
    for shown in OF_AN_AUTHOR:
        asked = shown.replace("BUNDLE ...", "digits-linf-my-defense.zip --replay --trust-code")
        said = command(*arguments(asked))
        assert said.code == 0, said


def test_what_is_done_with_files_of_ones_own(
    command: "Command", monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = dbp_bench.data.digits().select(range(64))
    pixels = (255 * images[:, 0]).round().to(torch.uint8)
    np.savez("images.npz", images=pixels.numpy(), labels=labels.numpy())
    torch.save({"state_dict": DigitsCNN().state_dict(), "epoch": 1}, "model.pt")
    shutil.copytree("results/digits-linf/ddpm", "mine/digits-linf/ddpm")
    monkeypatch.setattr("dbp_bench.reporting.baseline.committed", lambda: Path("results"))
    for shown, more in OF_OWN_FILES.items():
        said = command(*arguments(shown), *more.split())
        assert (said.code, said.err) == (0, ""), shown


@pytest.mark.usefixtures("_few_images")
def test_what_the_author_of_the_example_runs(
    command: "Command", monkeypatch: pytest.MonkeyPatch
) -> None:
    source = TOP / "examples/dbp-bench-example-defense/src"
    monkeypatch.syspath_prepend(source)
    monkeypatch.setattr(outside, "entry_folders", lambda: [source / "dbp_bench_example/entries"])
    for shown in OF_THE_EXAMPLE:
        said = command(*arguments(shown))
        assert said.code == 0, said


@pytest.mark.parametrize("shown", [command for command in ALL if command.startswith("make ")])
def test_a_target(shown: str) -> None:
    """Each target is there; what it would do is only printed."""
    done = subprocess.run(
        ["make", "--dry-run", *shown.split()[1:]],
        cwd=TOP,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("shown", [each for each in ALL if re.match("python|OMP_", each)])
def test_a_measurement_of_speed_or_a_script(shown: str) -> None:
    """Its arguments are taken; test_speed measures."""
    _, _, rest = shown.partition("python ")
    if rest.startswith("-c"):
        text = (TOP / "docs/real-images.md").read_text()
        both = text[text.index(rest) :].split("\n    dbp-bench")[0]
        compile(shlex.split(both.replace("\\\n", ""))[1], "real-images.md", "exec")
        return
    assert rest.startswith(("-m speed", "benchmark/speed"))
    assert parsed(shlex.split(rest.removeprefix("-m "))[1:]).subjects
