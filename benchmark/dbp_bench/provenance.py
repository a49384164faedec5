"""Says where a number comes from: code, packages, machine, entries and weights."""

import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from dbp_bench import __version__
from dbp_bench.result import Provenance


def provenance(identity: Mapping[str, Any], entries: dict[str, str], data: str) -> Provenance:
    """The provenance of what a job computes here.

    Args:
        identity: The identity of the job.
        entries: The sha256 of its entry files.
        data: The digest of its images.
    """
    commit, dirty = _git()
    return Provenance(
        dbp_bench=__version__,
        commit=commit,
        dirty=dirty,
        packages={name: version(name) for name in _packages(identity)},
        python=platform.python_version(),
        device_name=device_name(identity["device"]),
        threads=torch.get_num_threads(),
        entries=entries,
        weights=identity["weights"],
        data=data,
        code=identity.get("code"),
    )


def _packages(identity: Mapping[str, Any]) -> list[str]:
    """Installed packages that the numbers depend on."""
    third_party = {"autoattack": "pyautoattack", "torchattacks": "torchattacks"}
    named = [
        package
        for name, package in third_party.items()
        if name in f"{identity['attack']} {identity['effort']}"
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


def full_float32() -> None:
    """Let float32 mean float32 in this process, whatever was set before.

    On a GPU, no product is shortened to ten bits (TF32), in convolutions or elsewhere, and cuDNN
    adds in an order that is the same each time.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True


def _git() -> tuple[str | None, bool | None]:
    """Commit of the checkout that this code runs from, and whether code or entries differ."""
    top = Path(__file__).parents[2]
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
