"""Where a number comes from: code, packages, machine, entries and weights."""

import platform
import subprocess
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

from dbp_bench import __version__
from dbp_bench.result import Provenance
from dbp_bench.runs.job import Job


def provenance(job: Job, data: str) -> Provenance:
    """The provenance of what `job` computes here on the data set whose digest is `data`."""
    commit, dirty = _git()
    return Provenance(
        dbp_bench=__version__,
        commit=commit,
        dirty=dirty,
        packages={name: version(name) for name in _packages(job)},
        python=platform.python_version(),
        device_name=device_name(job.device),
        threads=torch.get_num_threads(),
        entries=job.entry_digests(),
        weights=job.identity()["weights"],
        data=data,
        code=job.code or None,
    )


def _packages(job: Job) -> list[str]:
    """Installed packages that the numbers depend on."""
    third_party = {"autoattack": "pyautoattack", "torchattacks": "torchattacks"}
    named = [
        package
        for name, package in third_party.items()
        if name in f"{job.search.name} {job.search.effort}"
    ]
    return ["torch", "numpy", "safetensors", *(name for name in named if find_spec(name))]


def device_name(device: str) -> str:
    """The name of the device, as it gives it itself."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _git() -> tuple[str | None, bool | None]:
    """Commit of the checkout that this code runs from, and whether code or entries differ."""
    top = Path(__file__).parents[3]
    if not (top / ".git").exists():
        return None, None
    try:
        commit = _output(top, "rev-parse", "HEAD").strip()
        changes = _output(top, "status", "--porcelain", "--", "benchmark", "defenses", "attacks")
    except (OSError, subprocess.CalledProcessError):
        return None, None
    return commit, bool(changes.strip())


def _output(top: Path, *arguments: str) -> str:
    command = ["git", "-C", str(top), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
