"""What a job would cost: network calls counted, time and memory measured on a small piece of it."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from dbp_bench import evaluate, memory
from dbp_bench.attacks.objectives import cross_entropy
from dbp_bench.data import stand_in
from dbp_bench.evaluate import Group
from dbp_bench.job import Job
from dbp_bench.memory import Policy
from dbp_bench.noise import ATTACKER, VICTIM, Site, Tape
from dbp_bench.registry import Registry
from dbp_bench.run import FRESH_DRAWS, is_complete, missing_gradients
from dbp_bench.threat import AttackerView


@dataclass(frozen=True, slots=True)
class Cost:
    """An estimate."""

    calls: int
    """Network calls, each image of a batch counted, forward only."""
    seconds: float
    """Of what is still to be done, on this device."""
    bytes: int
    """Activations and states kept for one backward pass."""
    by_step: bool
    """Whether gradients are checkpointed by step."""

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)


def estimate(job: Job, registry: Registry, out: Path, policy: Policy) -> Cost:
    """The cost of `job`, from one gradient and one verdict of its first group, each timed twice."""
    probe = _probe(job, registry, policy)
    images = sum(map(len, job.groups))
    verdicts = job.draws * (2 + (FRESH_DRAWS if job.knows else 0))
    looks = images * (verdicts + job.attacks * job.looks_per_attack)
    todo = missing_gradients(job, out)
    share = todo / job.gradients if job.gradients else float(not is_complete(job, out))
    seconds = todo * probe.per_gradient + share * looks * probe.per_verdict
    return Cost(
        calls=(job.gradients + looks) * probe.calls,
        seconds=seconds,
        bytes=probe.bytes,
        by_step=probe.by_step,
    )


@dataclass(frozen=True, slots=True)
class _Probe:
    calls: int
    per_gradient: float
    per_verdict: float
    bytes: int
    by_step: bool


_PROBES: dict[tuple[object, ...], _Probe] = {}


def _probe(job: Job, registry: Registry, policy: Policy) -> _Probe:
    rows = min(job.rows, job.batch_size * job.copies)
    key = (job.track.name, job.defense.name, job.device, job.batch_size, rows, policy)
    if key in _PROBES:
        return _PROBES[key]
    device = torch.device(job.device)
    defense = registry.build_defense(job.defense, job.track, device=device, policy=policy)
    ids = job.groups[0]
    images, labels = (part.to(device) for part in stand_in(job.track.entry.data, len(ids)))
    group = Group(images, labels, ids)
    evaluate.judge(defense, images, group, seed=job.seed, draw=0)
    calls = defense.counter.images // len(ids)
    per_row = defense.activation_bytes(images)
    full = per_row * rows
    by_step = policy == "step" or (policy == "auto" and full > memory.free_bytes(device) // 2)
    view = AttackerView(
        defense,
        frozenset(Site(site) for site in job.knows),
        Tape.make(job.seed, VICTIM, ids),
        Tape.make(job.seed, ATTACKER, ids),
        job.rows,
    )

    def gradient() -> None:
        draws = range(max(1, rows // len(ids)))
        view.gradient(images, labels, cross_entropy, draws)

    def verdict() -> None:
        evaluate.judge(defense, images, group, seed=job.seed, draw=0)

    _PROBES[key] = _Probe(
        calls=calls,
        per_gradient=_seconds(gradient, device) / max(rows, len(ids)),
        per_verdict=_seconds(verdict, device) / len(ids),
        bytes=full // max(1, calls) + rows * images[0].nbytes * calls if by_step else full,
        by_step=by_step,
    )
    return _PROBES[key]


def _seconds(function: Callable[[], None], device: torch.device) -> float:
    """The shorter of two timings."""
    times = []
    for _ in range(2):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)
