"""``make gpu``: everything that a GPU is to be asked, in one command of under nine minutes.

It needs a Python that has torch and NumPy, and no network: other packages that are missing are
installed from a folder of wheels, which ``--fetch`` fills on a machine that has a network. Each
stage is a process of its own with a time limit, and what is known is written as it comes, so that
a stage that fails or is cut takes nothing with it. This file needs the standard library alone.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

TOP = Path(__file__).parents[2]
SECONDS = 520
"""All stages together."""
LEAST = 20
"""A stage that has fewer seconds left is skipped."""

PRESENT = ("torch", "numpy")
"""Packages that must be there already; a wheel of torch alone has hundreds of megabytes."""
LIGHT = (
    *("annotated-doc", "annotated-types", "anyio", "click", "execnet", "filelock", "fsspec"),
    *("h11", "httpcore2", "httpx2", "huggingface_hub", "idna", "iniconfig", "Jinja2"),
    *("markdown-it-py", "MarkupSafe", "mdurl", "packaging", "pluggy", "pydantic"),
    *("pydantic_core", "Pygments", "pytest", "pytest-xdist", "PyYAML"),
    *("rich", "safetensors", "shellingham", "tqdm", "truststore", "typer"),
    *("typing-extensions", "typing-inspection"),
)
"""Packages of which wheels are carried: 9 MB."""
HEAVY = (
    *("contourpy", "cycler", "fonttools", "kiwisolver", "matplotlib", "pandas", "pillow"),
    *("pyparsing", "python-dateutil", "scipy", "tzdata"),
)
"""The same, where matplotlib, pandas, Pillow and SciPy may be missing: 72 MB more."""
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014")


# ------------------------------------------------------------------------------------ packages


def needed(project: Path = TOP / "pyproject.toml") -> dict[str, tuple[int, ...]]:
    """The least version of each package that is imported, those of tests among them, by name."""
    declared = tomllib.loads(project.read_text(encoding="utf-8"))
    tests = [each for each in declared["dependency-groups"]["dev"] if each.startswith("pytest")]
    found = {}
    for requirement in declared["project"]["dependencies"] + tests:
        name, _, least = requirement.partition(">=")
        found[name] = _numbers(least)
    return found


def missing(wanted: dict[str, tuple[int, ...]]) -> list[str]:
    """The packages that aren't installed, or are older than they must be."""
    return [name for name, least in wanted.items() if not _is_there(name, least)]


def _is_there(name: str, least: tuple[int, ...]) -> bool:
    try:
        return _numbers(version(name)) >= least
    except PackageNotFoundError:
        return False


def wheels_of(names: Sequence[str], folder: Path) -> list[Path]:
    """The wheels in `folder` of these packages and of what they need in turn."""
    held = {_key(path.name.split("-")[0]): path for path in sorted(folder.glob("*.whl"))}
    found: dict[str, Path] = {}
    todo = [_key(name) for name in names]
    while todo:
        name = todo.pop()
        if name in held and name not in found:
            found[name] = held[name]
            todo += _needs(held[name])
    return list(found.values())


def _needs(wheel: Path) -> Iterator[str]:
    """The packages that a wheel needs, but for those of its extras."""
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        for line in archive.read(metadata).decode().splitlines():
            if line.startswith("Requires-Dist: ") and "extra ==" not in line:
                yield _key(re.split(r"[^\w.-]", line.removeprefix("Requires-Dist: "))[0])


def _key(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.match(r"[\d.]*", text)[0].split(".") if number)  # type: ignore[index]


def fetch(folder: Path, python: str, light: bool) -> None:
    """Download the wheels, in the versions that the tests ran with, for a `python` on Linux."""
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"),
        *("--python-version", python, "--implementation", "cp"),
        *(f"--platform={platform}_x86_64" for platform in PLATFORMS),
        *("--constraint", str(TOP / "requirements" / "constraints.txt")),
        *("--dest", str(folder)),
    ]
    subprocess.run([*command, *LIGHT, *(() if light else HEAVY)], check=True)
    size = sum(path.stat().st_size for path in folder.glob("*.whl"))
    print(f"{folder}: {size / 1e6:.1f} MB")


# -------------------------------------------------------------------------------------- stages


@dataclass(frozen=True)
class Stage:
    """A stage: a command, which may write what it finds to ``<out>/<name>.json`` as it goes."""

    name: str
    about: str
    command: list[str]
    seconds: float
    """The most that it may take."""
    skipped: str = ""
    """The reason why it isn't run."""


@dataclass
class Outcome:
    """The outcome of a stage."""

    name: str
    about: str
    said: str = "running"
    """passed, failed, cut, or skipped; with the reason."""
    seconds: float = 0.0
    tail: list[str] = field(default_factory=list)
    """The last lines that it printed, if it didn't pass."""
    found: Any = None


@dataclass
class Report:
    """The report, written anew whenever there is more of it."""

    out: Path
    started: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    stages: list[Outcome] = field(default_factory=list)

    @property
    def machine(self) -> dict[str, Any]:
        """The machine, as the first stage found it."""
        found = next((one.found for one in self.stages if one.name == "machine"), None)
        return found or {}

    def write(self) -> None:
        """Write ``report.json`` and ``summary.md``."""
        for outcome in self.stages:
            with suppress(OSError, ValueError):
                outcome.found = json.loads((self.out / f"{outcome.name}.json").read_text())
        table = {
            "started": self.started,
            "machine": self.machine,
            "stages": [asdict(outcome) for outcome in self.stages],
        }
        (self.out / "report.json").write_text(json.dumps(table, indent=1) + "\n")
        (self.out / "summary.md").write_text(self.summary())

    def summary(self) -> str:
        """The report in Markdown."""
        about = ", ".join(f"{key} {value}" for key, value in self.machine.items())
        lines = [f"# {self.machine.get('device', 'Device not known')}", "", about, "", self.started]
        lines += ["", "| stage | outcome | seconds |", "| :-- | :-- | --: |"]
        lines += [f"| {s.name} | {s.said} | {s.seconds:.0f} |" for s in self.stages]
        for stage in self.stages:
            lines += ["", f"## {stage.name}", "", stage.about]
            if stage.name != "machine" and isinstance(stage.found, dict):
                for title, rows in stage.found.items():
                    lines += ["", f"**{title}**", "", *_table(rows)]
            if stage.tail:
                lines += ["", "```", *stage.tail, "```"]
        return "\n".join(lines) + "\n"


def _table(found: Any) -> list[str]:
    """Rows as a table of Markdown; anything else as a line."""
    if not (isinstance(found, list) and found and isinstance(found[0], dict)):
        return [f"{found}"]
    columns = list(dict.fromkeys(key for row in found for key in row))
    lines = [f"| {' | '.join(columns)} |", f"|{' :-- |' * len(columns)}"]
    return lines + [f"| {' | '.join(_cell(row.get(key)) for key in columns)} |" for row in found]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value).replace("|", "/").replace("\n", " ")


def run(
    stages: Sequence[Stage], report: Report, seconds: float, environment: dict[str, str]
) -> bool:
    """Run `stages` one after another in `seconds`; return whether none failed or was cut."""
    end = time.monotonic() + seconds
    for stage in stages:
        outcome = Outcome(stage.name, stage.about)
        report.stages.append(outcome)
        limit = min(stage.seconds, end - time.monotonic())
        if stage.skipped or limit < LEAST:
            outcome.said = f"skipped: {stage.skipped or 'no time is left'}"
        else:
            report.write()
            print(f"{stage.name}: {limit:.0f} s at most", flush=True)
            _run_one(stage, outcome, report, limit, environment)
        print(f"{stage.name}: {outcome.said}, {outcome.seconds:.0f} s", flush=True)
        report.write()
    return not any(outcome.said.startswith(("failed", "cut")) for outcome in report.stages)


def _run_one(
    stage: Stage, outcome: Outcome, report: Report, limit: float, environment: dict[str, str]
) -> None:
    start = time.monotonic()
    with (report.out / "log.txt").open("ab+") as log:
        log.write(f"\n=== {stage.name}: {' '.join(stage.command)}\n".encode())
        log.flush()
        begin = log.tell()
        process = subprocess.Popen(
            stage.command,
            cwd=TOP,
            env={**environment, "SECONDS_LEFT": f"{limit:.0f}"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
            outcome.said = "failed" if code else "passed"
        except subprocess.TimeoutExpired:
            outcome.said = f"cut after {limit:.0f} s"
        finally:
            _end(process)
            outcome.seconds = round(time.monotonic() - start, 1)
            log.seek(begin)
            said = log.read().decode(errors="replace").splitlines()
            if outcome.said != "passed":
                outcome.tail = [line[:200] for line in said[-25:]]
                report.write()


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a process and all that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(3)


# ----------------------------------------------------------------------------------- the command


def planned(asked: argparse.Namespace, site: Path, scratch: Path) -> list[Stage]:
    """The stages, in order: what is cheap and decides about the others comes first."""
    wanted = needed()
    absent = missing(wanted)
    wheels = wheels_of([name for name in absent if name not in PRESENT], asked.wheels)
    held = {_key(path.name.split("-")[0]) for path in wheels}
    lacking = [name for name in absent if _key(name) not in held]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    install = [*pip, "--no-compile", "--upgrade", "--target", str(site), *map(str, wheels)]
    marked = [
        str(path.relative_to(TOP))
        for path in sorted((TOP / "tests").glob("test_*.py"))
        if "pytest.mark.gpu" in path.read_text(encoding="utf-8")
    ]
    if asked.rehearse:
        marked = ["tests/test_noise.py"]
    fits = "pytest-xdist" in held or _is_there("pytest-xdist", ())
    workers = ["--numprocesses", "6"] if fits and not asked.rehearse else []

    def stage(name: str, about: str, seconds: float, *more: str, skipped: str = "") -> Stage:
        command = [sys.executable, "-m", "speed.stages", name, str(asked.out / f"{name}.json")]
        command += ["--scratch", str(scratch), *(["--rehearse"] if asked.rehearse else []), *more]
        return Stage(name, about, command, seconds, skipped)

    data = [] if asked.data is None else ["--data", str(asked.data), "--data-set", asked.data_set]
    without = "" if data or asked.rehearse else "no images are given; --data names a folder of them"
    lacked = f"{', '.join(lacking)}: neither installed nor in {asked.wheels}; --fetch brings wheels"
    return [
        Stage(
            "packages",
            f"Installed from wheels: {', '.join(path.name for path in wheels) or 'nothing'}."
            + (f" Missing: {', '.join(lacking)}." if lacking else ""),
            install if not lacking else [sys.executable, "-c", f"raise SystemExit({lacked!r})"],
            40,
            "" if wheels or lacking else "nothing is missing",
        ),
        stage("machine", "The machine, and that everything can be imported.", 40),
        Stage(
            "tests",
            "The tests that need a GPU.",
            [
                *(sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider"),
                # A plugin that warns beside pytest-xdist, where it is installed.
                *("-p", "no:benchmark"),
                *("--durations", "5", *workers, *marked),
            ],
            95,
        ),
        stage(
            "equality",
            "Draws must be bit-equal to a processor's. Outcomes of the same jobs, here and on a "
            "processor of this machine, may differ by rounding: 2 % in each direction are allowed.",
            70,
        ),
        stage(
            "speed",
            "One attack step on networks of published size, as `python -m speed cifar10` takes it.",
            140,
        ),
        stage(
            "training",
            "Recipes at published size, in bf16 and channels last, for a share of the time left "
            "each: so many images per second, and what the weights then do on images held out.",
            SECONDS,
            *data,
            skipped=without,
        ),
    ]


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser("python -m speed.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=TOP / "build" / "gpu", help="a folder")
    parser.add_argument("--data", type=Path, help="images to train on: a file or a folder")
    parser.add_argument("--data-set", default="cifar10-jpeg", help="the name of that data set")
    parser.add_argument("--wheels", type=Path, default=TOP / "build" / "wheels", help="a folder")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all stages together")
    parser.add_argument("--rehearse", action="store_true", help="on a processor, at tiny sizes")
    parser.add_argument("--fetch", action="store_true", help="download wheels, and do nothing else")
    parser.add_argument("--light", action="store_true", help="--fetch: without the large ones")
    parser.add_argument("--python", default="3.12", help="--fetch: the version there")
    asked = parser.parse_args(arguments)
    for name in ("out", "data", "wheels"):
        path: Path | None = getattr(asked, name)
        setattr(asked, name, path and path.resolve())
    return asked


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all stages and write the report; the exit code is 1 where one failed or was cut."""
    asked = parsed(arguments)
    if asked.fetch:
        fetch(asked.wheels, asked.python, asked.light)
        return 0
    asked.out.mkdir(parents=True, exist_ok=True)
    for old in asked.out.iterdir():
        if old.suffix in (".json", ".md", ".txt"):
            old.unlink()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory() as scratch:
        site = Path(scratch) / "site"
        paths = [str(site), str(TOP / "benchmark"), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        }
        stages = planned(asked, site, Path(scratch))
        passed = run(stages, Report(asked.out), asked.seconds, environment)
    print(f"{asked.out / 'summary.md'}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
