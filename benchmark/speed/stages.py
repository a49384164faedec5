"""The stages of :mod:`speed.gpu` that need torch: ``python -m speed.stages NAME FILE``.

Each writes its FILE anew as soon as it knows more: a table by title, each a list of rows.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dbp_bench.data import load_data
from dbp_bench.networks.ho import HoUNet
from dbp_bench.networks.trial import wrn_10_2
from dbp_bench.noise import FORWARD, Tape, seeded
from dbp_bench.provenance import device_name
from dbp_bench.result import Kind, Result
from dbp_bench.runs.replay import compare
from dbp_bench.runs.saved import adversarial_path
from dbp_bench.training import recipes
from dbp_bench.training.loop import Options
from dbp_bench.training.run import run as train
from dbp_bench.writing import write_atomically
from speed import network
from speed.network import Pair, Setting
from speed.timing import Row


@dataclass(frozen=True)
class Asked:
    """The request of a stage."""

    file: Path
    scratch: Path
    rehearse: bool
    seconds: float
    data: Path | None
    data_set: str

    @property
    def device(self) -> str:
        """The device that is asked."""
        return "cpu" if self.rehearse else "cuda"

    def note(self, found: Any) -> None:
        """Write what is known so far."""
        write_atomically(self.file, json.dumps(found, indent=1) + "\n")


def machine(asked: Asked) -> None:
    """The device and the versions."""
    facts: Row = {
        "device": device_name(asked.device),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "cores": len(os.sched_getaffinity(0)),
    }
    if asked.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "capability": f"{properties.major}.{properties.minor}",
            "memory GiB": round(properties.total_memory / 2**30, 1),
            "CUDA": torch.version.cuda,
            "cuDNN": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        }
    asked.note(facts)


# ------------------------------------------------------------------------------------- equality

DEFENSES = ("ddpm", "addt", "gdmp", "ddim")
THREATS = ("eot", "dwbox")
IMAGES, BUDGET = 60, 100


def equality(asked: Asked) -> None:
    """Draws of noise, and outcomes of the same jobs, on the device and on a processor."""
    found: dict[str, list[Row]] = {"draws": draws(asked.device)}
    asked.note(found)
    if not all(row["bit-equal"] for row in found["draws"]):
        sys.exit("draws are not bit-equal to the processor's")
    names, threats = (("ddpm",), ("dwbox",)) if asked.rehearse else (DEFENSES, THREATS)
    images, budget = (4, 4) if asked.rehearse else (IMAGES, BUDGET)
    there, here = asked.scratch / "there", asked.scratch / "here"

    def job(threat: str, defense: str, device: str, out: Path) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-c", "from dbp_bench.cli import main; main()", "run", "--quiet"]
        command += ["--defense", defense, "--threat", threat, "--device", device, "--out", str(out)]
        command += ["--attack", "standard", "--set", f"budget={budget}", "--save-adversarial"]
        command += ["--examples", str(images)]
        return subprocess.Popen(command)

    rows = found["outcomes"] = []
    end, faults = time.monotonic() + asked.seconds - 10, list[str]()
    todo = [(threat, name) for threat in threats for name in names]
    # A process for each job, as many at once as there are cores.
    places = ((asked.device, there), ("cpu", here))
    waiting = [(*pair, *place) for pair in todo for place in places]
    jobs, cores = list[subprocess.Popen[bytes]](), len(os.sched_getaffinity(0))
    while todo and time.monotonic() < end:
        running = [process for process in jobs if process.poll() is None]
        starting = waiting[: cores - len(running)]
        jobs += [job(*each) for each in starting]
        del waiting[: len(starting)]
        for threat, name in list(todo):
            pattern = f"digits-linf/{name}/{threat}/**/seed-0.json"
            pair = [next(iter(out.glob(pattern)), None) for out in (there, here)]
            if pair[0] and pair[1]:
                row, fault = compared(pair[0], pair[1], asked.device)
                rows.append(row)
                faults += [f"{name}, {threat}: {fault}"] if fault else []
                todo.remove((threat, name))
                asked.note(found)
        if not running and not starting:
            break
        time.sleep(0.5)
    for process in jobs:
        process.terminate()
    left = [f"{name}, {threat}: no result" for threat, name in todo]
    if faults + left:
        sys.exit("\n".join(faults + left))


def draws(device: str) -> list[Row]:
    """Each kind of draw on the device, against the processor's."""
    tape = Tape.make(0, "victim", [0, 1, 1796, 2**40] * 64, draw=3)
    rows = []
    for dtype in (torch.float32, torch.float64):
        like = torch.empty(len(tape.ids), 3, 32, 32, dtype=dtype)
        kinds: dict[str, Callable[[Tensor], Tensor]] = {
            "normal": lambda like: tape.normal(FORWARD, 7, like),
            "uniform": lambda like: tape.uniform(FORWARD, 7, like),
            "kept": lambda like: tape.kept(FORWARD, 7, like, 0.9),
        }
        for kind, draw in kinds.items():
            wrong = int((draw(like.to(device)).cpu() != draw(like)).sum())
            rows.append(
                {
                    "draw": kind,
                    "type": str(dtype).removeprefix("torch."),
                    "numbers": like.numel(),
                    "different": wrong,
                    "bit-equal": wrong == 0,
                }
            )
    return rows


def compared(there: Path, here: Path, device: str) -> tuple[Row, str | None]:
    """A row about a result of the device and one of the processor, and what is wrong, if any."""
    far, near = Result.read(there), Result.read(here)
    kinds: list[Kind] = ["clean", "adversarial"]
    found = compare(near, {kind: torch.from_numpy(far.classes(kind)) for kind in kinds}, device)
    images = [load_file(adversarial_path(path))["images"] for path in (there, here)]
    apart = (images[0] - images[1]).abs().flatten(2).amax(2)
    checks = {} if far.conformance is None else far.conformance.checks
    failed = [f"{name}: {said}" for name, said in checks.items() if said != "pass"]
    row: Row = {"defense": far.defense, "threat": far.threat, "images": len(far.ids)}
    row["draws"] = len(far.draws)
    for kind in kinds:
        for where, result in (("there", far), ("here", near)):
            row[f"{kind} {where} %"] = 100 * float(result.right(kind).mean())
        row[f"{kind} lost, gained, other"] = (
            " ".join(str(count) for count in (found.kinds[kind].lost, found.kinds[kind].gained))
            + f" {found.kinds[kind].other}"
        )
    row["images that are bit-equal %"] = 100 * float((apart == 0).double().mean())
    row["largest distance"] = float(apart.max())
    row["same digest"] = far.digest == near.digest
    row["checks"] = "; ".join(failed) or "pass"
    return row, "; ".join(failed) or found.fault


# ---------------------------------------------------------------------------------------- speed


def speed(asked: Asked) -> None:
    """The table of :mod:`speed.network`, a contender at a time."""
    setting = Setting(64, 5, 3, compiles=True)
    if asked.rehearse:
        networks, whose = _tiny(), "tiny networks"
        setting = Setting(1, 1, 1, compiles=False)
    else:
        networks, whose = network.published()
    title = f"{whose}; {setting.images} images, {setting.steps} reverse steps, one draw each"
    network.measure(networks, asked.device, setting, lambda rows: asked.note({title: rows}))


def _tiny() -> Pair:
    with seeded(0):
        denoiser = HoUNet(8, (1, 2), blocks=1, attention=(1,), groups=4, dropout=0.0)
        return denoiser, wrn_10_2()


# ------------------------------------------------------------------------------------- training

SHARES = {"classifier": 0.35, "diffusion": 0.35, "addt": 0.3}
"""The recipes in order, and their shares of the time."""
TRIED, SKIPPED = 24, 8
"""Updates that tell the speed, and the first of them, which are slower."""
SHORT: dict[str, dict[str, Any]] = {
    "diffusion": {"average": 0.995, "ramp": 100},
    "addt": {"average": 0.99, "ramp": 20},
}
"""Settings in place of those for days of training."""


def training(asked: Asked) -> None:
    """Train for a share of the time each; the number of updates follows from a trial's speed."""
    end = time.monotonic() + asked.seconds - 5
    data = Held("digits", None) if asked.rehearse else Held(asked.data_set, asked.data)
    size = None if asked.rehearse else "published"
    options = Options(device=torch.device(asked.device), precision="bf16", channels_last=True)
    found: dict[str, list[Row]] = {"recipes": []}
    out, left = asked.scratch / "weights", 1.0
    print(f"{len(data.ids['train'])} images are read")
    for name, share in SHARES.items():
        seconds = (end - time.monotonic()) * share / left
        left -= share
        plan = recipes.recipe(name, data.name, size)
        fixed: dict[str, Any] = {"batch_size": 8} if asked.rehearse else SHORT.get(name, {})
        begin, tick = time.monotonic(), Ticks()

        def changed(updates: int, plan: Any = plan, fixed: Any = fixed) -> Any:
            return recipes.changed(plan, len(data.ids["train"]), iterations=updates, **fixed)

        tried = asked.scratch / "tried"
        tried.mkdir(exist_ok=True)
        for earlier in out.glob("*.safetensors"):
            (tried / earlier.name).write_bytes(earlier.read_bytes())
        train(changed(TRIED), data, tried, options, tick)  # type: ignore[arg-type]
        each = tick.each
        beside = time.monotonic() - begin - each * TRIED
        updates = 4 if asked.rehearse else int((seconds - 2 * beside) / each - TRIED)
        row: Row = {
            "recipe": name,
            "network": plan.variant.path,
            "batch": changed(TRIED).settings.batch_size,
            "images per s": changed(TRIED).settings.batch_size / each,
            "peak MiB": None,
        }
        if asked.device == "cuda":
            row["peak MiB"] = torch.cuda.max_memory_allocated() / 2**20
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        found["recipes"].append(row)
        asked.note(found)
        if updates < 1:
            sys.exit(f"{name}: {seconds:.0f} s are too short for an update more")
        made = train(changed(updates), data, out, replace(options, checkpoint_every=10**6), tick)  # type: ignore[arg-type]
        assert made is not None
        row |= {"updates": updates, "seconds": made.seconds, "loss": tick.note, **made.facts}
        asked.note(found)
        print(row)


class Held:
    """The images of a data set for training, decoded once."""

    def __init__(self, name: str, place: Path | None) -> None:
        data = load_data(name, place, None if place is None else "train")
        self.name, self.ids = name, data.ids
        kept = [id_ for split in ("train", "validation", "test") for id_ in data.ids.get(split, [])]
        if name != "digits":
            kept = [*data.ids["train"], *data.ids["validation"]]
        self._rows = {id_: row for row, id_ in enumerate(kept)}
        self._images, self._labels = data.select(kept)

    def select(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images ``(b, c, h, w)`` in [0, 1], and their labels."""
        rows = [self._rows[id_] for id_ in ids]
        return self._images[rows], self._labels[rows]


class Ticks:
    """Tells the seconds of an update from the calls after each of them."""

    def __init__(self) -> None:
        self.note = ""
        self._times: dict[int, float] = {}

    def __call__(self, update: int, _: int, note: str) -> None:
        """Note an update, after which the loss was read: the device has finished it."""
        self.note = note
        self._times.setdefault(update, time.monotonic())

    @property
    def each(self) -> float:
        """Seconds of one of the updates that were tried."""
        return (self._times[TRIED] - self._times[SKIPPED]) / (TRIED - SKIPPED)


STAGES = {each.__name__: each for each in (machine, equality, speed, training)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser("python -m speed.stages", description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("file", type=Path)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--data-set", default="cifar10-jpeg")
    given = parser.parse_args(arguments)
    seconds = float(os.environ.get("SECONDS_LEFT", "100"))
    STAGES[given.stage](
        Asked(given.file, given.scratch, given.rehearse, seconds, given.data, given.data_set)
    )


if __name__ == "__main__":
    main()
