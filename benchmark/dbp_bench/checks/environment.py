"""The state of an installation: versions, devices, and a tiny golden case that is run again.

The case has three parts. Draws of noise must be bit-exact everywhere. The files that ship must be
those that the entries mean. A short attack must give the stored numbers, within a tolerance, since
the sums inside a network are rounded in another order on another machine; whether they are equal to
the last bit is told, and decides nothing.

``python -m dbp_bench.checks.environment --write`` makes the stored numbers again.
"""

import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dbp_bench import __version__, attacks, evaluation, extras
from dbp_bench.data.catalog import CATALOG
from dbp_bench.entries.fields import NetworkRef
from dbp_bench.entries.registry import Registry
from dbp_bench.entries.subject import Subject
from dbp_bench.errors import DbpError
from dbp_bench.evaluation import Group
from dbp_bench.noise import FORWARD, VICTIM, Tape
from dbp_bench.provenance import device_name, full_float32
from dbp_bench.result import write_atomically
from dbp_bench.weights import files as weight_files
from dbp_bench.weights import places as weight_places

GOLDEN = weight_places.ASSETS / "golden.json"
"""The numbers that the case must give."""

DEFENSE, TRACK, EXAMPLES, SEED = "ddpm", "digits-linf", 8, 0
EFFORT = {
    "steps": 5,
    "step_size": 0.25,
    "eot": 1,
    "loss": "margin",
    "random_start": False,
    "restarts": 1,
}

TOLERANCES = {"cpu": 1e-3, "cuda": 0.1}
"""Largest errors of the logits, which are about 10 in size. Rounding moves them by 5e-6 from one
processor to another; on an NVIDIA H200 they stayed within the tolerance."""


def examine() -> dict[str, Any]:
    """The findings: versions, devices, extras and the golden case; JSON-able."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cuda = torch.cuda.is_available()
    names = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count() if cuda else 0))]
    start = time.perf_counter()
    faults, notes = _golden(names[:2])
    golden = {
        "ok": not faults,
        "detail": "; ".join(faults or notes),
        "seconds": round(time.perf_counter() - start, 2),
    }
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    return {
        "ok": golden["ok"],
        "dbp_bench": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": {"version": torch.__version__, "build": build},
        "devices": [f"{name}: {device_name(name)}" for name in names],
        "device_warnings": [" ".join(str(warning.message).split()) for warning in caught],
        "threads": {"torch": torch.get_num_threads(), "cores": _cores()},
        "extras": [found._asdict() for found in extras.status()],
        "golden": golden,
    }


def render(findings: Mapping[str, Any]) -> str:
    """`findings` of :func:`examine` for people."""
    torch_, threads, golden = findings["torch"], findings["threads"], findings["golden"]
    lines = [
        ("dbp-bench", findings["dbp_bench"]),
        ("Python", f"{findings['python']}, {findings['platform']}"),
        ("torch", f"{torch_['version']}, {torch_['build']} build"),
        *(("device", device) for device in findings["devices"]),
        *(("warning", warning) for warning in findings["device_warnings"]),
        ("threads", f"{threads['torch']} for torch, {threads['cores']} cores to run on"),
    ]
    for extra in findings["extras"]:
        version = f" {extra['version']}" if extra["version"] else ""
        hint = f": {extra['hint']}" if extra["hint"] else ""
        lines.append(("extra", f"{extra['name']}{version} {extra['state']}{hint}"))
    verdict = "pass" if golden["ok"] else "FAIL"
    lines.append(("golden case", f"{verdict} ({golden['seconds']:g} s): {golden['detail']}"))
    return "\n".join(f"{name:<12} {text}" for name, text in lines)


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# -------------------------------------------------------------------------- the golden case


class _Wrong(DbpError):
    """A part of the golden case gives other numbers than the stored ones."""


def _golden(devices: Sequence[str]) -> tuple[list[str], list[str]]:
    """The faults of the golden case, and what is to be said of its parts that pass."""
    faults: list[str] = []
    notes: list[str] = []

    def passes(name: str, part: Callable[..., str], *given: Any) -> bool:
        try:
            notes.append(f"{name}: {part(*given)}")
            return True
        except DbpError as error:
            faults.append(f"{name}: {str(error).rstrip('.')}")
        except OSError as error:
            faults.append(f"{name}: {error.filename} can't be read ({error.strerror})")
        # A device that is listed need not work.
        except (RuntimeError, KeyError, TypeError) as error:
            said = " ".join(str(error).split()).rstrip(".")
            faults.append(f"{name}: {type(error).__name__}: {said}")
        return False

    try:
        golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
        stored = {key: golden[key] for key in ("draws", "case", "made_by", "attack")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"stored numbers: {GOLDEN} can't be read ({error}). Install dbp-bench again"], []
    for device in devices:
        passes(f"draws on {device}", _draws, device, stored["draws"])
    if passes("files", _files):
        for device in devices:
            passes(f"attack on {device}", _attack, device, stored)
    return faults, notes


def _draws(device: str, stored: Mapping[str, str]) -> str:
    found = _draw_digests(device)
    wrong = [kind for kind in found if found[kind] != stored.get(kind)]
    if wrong:
        raise _Wrong(f"{' and '.join(wrong)} noise isn't the stored one")
    return "bit-equal"


def _draw_digests(device: str) -> dict[str, str]:
    """The sha256 of some draws as little-endian float32, by distribution."""
    tape = Tape.make(SEED, VICTIM, [0, 1, 1796, 2**40], draw=3)
    like = torch.empty(4, 1, 8, 8, device=device)
    draws = {
        "normal": tape.normal(FORWARD, 7, like),
        "uniform": tape.uniform(FORWARD, 7, like),
    }
    return {
        kind: sha256(values.cpu().numpy().astype("<f4").tobytes()).hexdigest()
        for kind, values in draws.items()
    }


def _files() -> str:
    """Every file that ships, against the sha256 that an entry or the catalog of data sets gives."""
    wanted = {
        weight_places.ASSETS / f"{name}.safetensors": facts.shipped
        for name, facts in CATALOG.items()
        if facts.shipped
    }
    for path, file, digest in _declared(Registry()):
        wanted[weight_places.find(file, [path.parent, path.parent.parent])] = digest
    for path, digest in wanted.items():
        weight_files.verify(path, digest)
    return f"{len(wanted)} as declared"


def _declared(registry: Registry) -> Iterable[tuple[Path, str, str]]:
    """Entry, file and sha256 of every network whose file ships with an entry."""
    for name in registry.tracks:
        track = registry.track(name)
        if isinstance(track.entry.classifier, NetworkRef):
            yield track.path, track.entry.classifier.file, track.entry.classifier.sha256
    for name in registry.defenses:
        defense = registry.defense(name)
        for setting in defense.entry.settings:
            for ref in setting.refs.values():
                if isinstance(ref, NetworkRef):
                    yield defense.path, ref.file, ref.sha256


def _attack(device: str, stored: Mapping[str, Any]) -> str:
    """The attack again, against the stored logits."""
    subject = Registry().subject(DEFENSE, TRACK)
    if _case(subject) != stored["case"]:
        write = "python -m dbp_bench.checks.environment --write"
        raise _Wrong(f"the entry {DEFENSE} or {TRACK} was edited; {write} stores it anew")
    found = _run(subject, device)
    gaps, tolerance = [], TOLERANCES[torch.device(device).type]
    for kind in ("clean", "adversarial"):
        want = torch.tensor(stored["attack"][kind])
        if want.shape != found[kind].shape:
            raise _Wrong(f"the stored {kind} logits are of another shape")
        gaps.append(float((found[kind] - want).abs().max()))
        if not gaps[-1] <= tolerance:
            raise _Wrong(
                f"{kind} logits are off by {gaps[-1]:.2g} ({tolerance:g} is allowed) from those of "
                f"torch {stored['made_by']['torch']}"
            )
    if found["right"].tolist() != stored["attack"]["right"]:
        raise _Wrong("another image is classified correctly than in the stored outcomes")
    return f"equal within {max(gaps):.1g}, not to the last bit" if any(gaps) else "bit-equal"


def _case(subject: Subject) -> dict[str, Any]:
    """Everything that decides the numbers of the case."""
    track = subject.track
    return {
        "defense": subject.name,
        "track": track.name,
        "eps": track.entry.eps,
        "options": subject.setting.options,
        "weights": [ref.sha256 for ref in subject.setting.networks.values()]
        + [track.entry.classifier.sha256],
        "examples": EXAMPLES,
        "seed": SEED,
        "effort": EFFORT,
    }


def _run(subject: Subject, device: str) -> dict[str, Tensor]:
    """Logits ``(b, k)`` of clean and adversarial images, and outcomes ``(2, b)``, on the CPU.

    Every draw is known to the attacker (DW-box).
    """
    full_float32()
    ids = subject.ids()[:EXAMPLES]
    images, labels = subject.data().select(ids)
    group = Group(images.to(device), labels.to(device), ids)
    built = subject.defense(device=device, policy="none")
    found = evaluation.attack(
        built,
        attacks.make("pgd", EFFORT),
        group,
        subject.budget(),
        built.sites,
        seed=SEED,
        victim_draw=0,
        max_batch=EXAMPLES,
    )
    tape = Tape.make(SEED, VICTIM, ids)
    with torch.no_grad():
        clean, adversarial = (built.logits(x, tape).cpu() for x in (group.images, found.images))
    right = torch.stack([clean.argmax(1) == labels, adversarial.argmax(1) == labels])
    return {"clean": clean, "adversarial": adversarial, "right": right}


def write_golden(path: Path = GOLDEN) -> None:
    """Run the case, and store its numbers at `path`."""
    subject = Registry().subject(DEFENSE, TRACK)
    found = _run(subject, "cpu")
    golden = {
        "about": "Numbers that `dbp-bench check --environment` computes again. "
        "Made by `python -m dbp_bench.checks.environment --write`.",
        "made_by": {"torch": torch.__version__, "device": "cpu", "machine": platform.machine()},
        "draws": _draw_digests("cpu"),
        "case": _case(subject),
        "attack": {kind: values.tolist() for kind, values in found.items()},
    }
    write_atomically(path, json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python -m dbp_bench.checks.environment --write")
    write_golden()
