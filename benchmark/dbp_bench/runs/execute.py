"""Run one job: cut it into groups, execute, store, resume. The only writer of results.

A finished piece of work (an attack, a verdict) is stored atomically in `.work/` below the folder of
results, so that a run killed at any moment and started again computes only what is missing and
writes the same result file, byte for byte.
"""

import fcntl
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from dbp_bench import attacks, evaluate
from dbp_bench.checks import gradients
from dbp_bench.data import DataSet, load_data
from dbp_bench.defense import Defense
from dbp_bench.entries.registry import Registry
from dbp_bench.errors import BadRequest
from dbp_bench.evaluate import FRESH, Group
from dbp_bench.memory import Policy
from dbp_bench.noise import Site
from dbp_bench.result import (
    SCHEMA,
    Arithmetic,
    GradientCheck,
    NetworkCalls,
    Result,
    write_atomically,
)
from dbp_bench.runs.job import (
    Job,
    identity_of,
    refuse_other_request,
)
from dbp_bench.runs.provenance import provenance
from dbp_bench.runs.saved import adversarial_path, budget_of, pack
from dbp_bench.threat import Tick, ignore

FRESH_DRAWS = 3
"""Fresh draws that judge each image made for a known draw."""


@dataclass(slots=True)
class Progress:
    """Where a job's progress goes."""

    start: Tick = ignore
    """Called once with the number of image gradients that are still to be taken."""
    tick: Tick = ignore
    """Called with the number of image gradients just taken."""


_BY_NUMBER = (
    *("adversarial", "nonzero", "gradients", "looks", "package", "clean", "robust", "fresh"),
)


@dataclass(slots=True)
class _State:
    """What is known of one group. Saved after every piece of work."""

    adversarial: dict[int, Tensor] = field(default_factory=dict)
    """By attack: the known draw, or 0 where no draw is known."""
    nonzero: dict[int, Tensor] = field(default_factory=dict)
    """By attack, for each image: whether a gradient wasn't zero."""
    gradients: dict[int, Tensor] = field(default_factory=dict)
    """By attack, for each image: network calls that a backward pass followed."""
    looks: dict[int, Tensor] = field(default_factory=dict)
    """By attack, for each image: the attack's other network calls."""
    package: dict[int, Tensor] = field(default_factory=dict)
    """By attack, for each image: robust, as the attack itself would have it, if it says."""
    clean: dict[int, Tensor] = field(default_factory=dict)
    """By victim draw."""
    robust: dict[int, Tensor] = field(default_factory=dict)
    fresh: dict[int, Tensor] = field(default_factory=dict)
    """By known draw: ``(b, FRESH_DRAWS)``."""
    judging_calls: int = 0
    judged: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0

    @classmethod
    def read(cls, path: Path) -> "_State":
        """The state in a file; an empty one where there is no file, or none that can be read."""
        state = cls()
        if not path.is_file():
            return state
        try:
            tensors = load_file(path)
            for name, value in tensors.items():
                kind, _, number = name.partition("/")
                if number:
                    getattr(state, kind)[int(number)] = value
                else:
                    setattr(state, kind, value.item())
        except (SafetensorError, OSError, AttributeError, ValueError, RuntimeError):
            return cls()
        return state

    def write(self, path: Path) -> None:
        tensors = {
            f"{kind}/{number}": value.contiguous()
            for kind in _BY_NUMBER
            for number, value in getattr(self, kind).items()
        }
        for kind in ("judging_calls", "judged", "seconds", "peak_bytes"):
            value = getattr(self, kind)
            dtype = torch.float64 if kind == "seconds" else torch.int64
            tensors[kind] = torch.tensor(value, dtype=dtype)
        write_atomically(path, save(tensors))


def execute(
    job: Job,
    registry: Registry,
    out: Path,
    *,
    policy: Policy = "auto",
    resume: bool = True,
    save_adversarial: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Run `job`, or what is missing of it, and write its result below `out`.

    Args:
        job: What to measure.
        registry: Where its entries come from.
        out: The folder of results.
        policy: Gradient checkpointing; doesn't change a bit of the result.
        resume: Continue what is there. Otherwise it is thrown away first.
        save_adversarial: Also write the adversarial images, as safetensors.
        progress: Told how far the job is.

    Returns:
        The path of the result file.

    Raises:
        BadRequest: `out` holds another request under this name, or is being written, or holds
            more images but fewer draws, or the other way round.
        AttackFailed: The attack or the defense gave numbers that can't be used.
    """
    path = job.path(out)
    work = out / ".work" / path.relative_to(out).with_suffix("")
    progress = progress or Progress()
    job.identity()  # checkpoints that must be fetched first are missed before anything is deleted
    with locked(work):
        if not resume:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            for old in (path, adversarial_path(path), runtime_path(path)):
                old.unlink(missing_ok=True)
        held = _held(job, path, work)
        saved = adversarial_path(path)
        if held and _covers(held, job):
            if saved.is_file() or not save_adversarial:
                return path
            # The images of all that the result holds, however few are asked for.
            job = replace(
                job, examples=len(held.ids), draws=len(held.draws), overrides=held.overrides
            )
        write_atomically(work / "request.json", json.dumps(job.identity(), indent=1))
        data = load_data(job.track.entry.data, registry.data, job.track.entry.split)
        # Reads every image once: a damaged one is found before anything is attacked.
        digest = data.digest(job.track_ids[: job.examples])
        states = _work(job, registry, data, work, policy, progress)
        result = _assemble(job, data, digest, states, gradients.quick(job, registry))
        if save_adversarial or saved.is_file():
            write_atomically(saved, pack(job, _adversarial(job, states)))
        write_atomically(runtime_path(path), _runtime(states, policy))
        result.write(path)
    return path


def runtime_path(result: Path) -> Path:
    """Where the times and the memory of a result's run lie; they differ from run to run."""
    return result.with_name(f"runtime-{result.stem}.json")


def is_complete(job: Job, out: Path) -> bool:
    """Whether `out` holds a result for all that `job` asks for."""
    path = job.path(out)
    held = Result.read(path) if path.is_file() else None
    return held is not None and identity_of(held) == job.identity() and _covers(held, job)


def missing_gradients(job: Job, out: Path) -> int:
    """Image gradients that `job` has still to take, for an estimate."""
    path = job.path(out)
    if is_complete(job, out):
        return 0
    work = out / ".work" / path.relative_to(out).with_suffix("")
    if _request(work) != job.identity():
        return job.gradients
    return _missing(job, [_State.read(_group_path(work, i)) for i in range(len(job.groups))])


def _missing(job: Job, states: list[_State]) -> int:
    """Image gradients that are still to be taken."""
    return sum(
        len(ids) * job.passes.gradients
        for ids, state in zip(job.groups, states, strict=True)
        for attack in range(job.attacks)
        if attack not in state.adversarial
    )


def _held(job: Job, path: Path, work: Path) -> Result | None:
    """The result at `path`, if any; refuses one, or unfinished work, of another request."""
    held = Result.read(path) if path.is_file() else None
    if held:
        refuse_other_request(job.identity(), identity_of(held), path)
        if not _covers(held, job) and (len(held.ids) > job.examples or len(held.draws) > job.draws):
            raise BadRequest(
                f"{path} holds {len(held.ids)} images x {len(held.draws)} draws: ask for at least "
                f"as many of both, not {job.examples} x {job.draws}, or choose another --out."
            )
    request = _request(work)
    if request is not None:
        refuse_other_request(job.identity(), request, work)
    else:
        # Work whose request isn't known can't be continued.
        for group in work.glob("group-*"):
            group.unlink()
    return held


def _request(work: Path) -> dict[str, Any] | None:
    """The request that the unfinished work answers; None where that can't be read."""
    try:
        request = json.loads((work / "request.json").read_text())
    except (OSError, ValueError):
        return None
    return request if isinstance(request, dict) else None


def _covers(held: Result, job: Job) -> bool:
    return len(held.ids) >= job.examples and len(held.draws) >= job.draws


def _group_path(work: Path, index: int) -> Path:
    return work / f"group-{index:05d}.safetensors"


def _work(
    job: Job, registry: Registry, data: DataSet, work: Path, policy: Policy, progress: Progress
) -> list[_State]:
    device = torch.device(job.device)
    states = [_State.read(_group_path(work, index)) for index in range(len(job.groups))]
    progress.start(_missing(job, states))
    target: _Target | None = None
    for index, (ids, state) in enumerate(zip(job.groups, states, strict=True)):
        todo = list(_pieces(job, state))
        if not todo:
            continue
        target = target or _Target.build(job, registry, policy)
        images, labels = data.select(ids)
        group = Group(images.to(device), labels.to(device), ids)
        for piece in todo:
            _execute(piece, job, target, group, state, progress)
            state.write(_group_path(work, index))
    return states


def _pieces(job: Job, state: _State) -> Iterator[tuple[str, int]]:
    """What has still to be done for a group, in order: attacks, and verdicts on victim draws."""
    for draw in range(job.draws):
        if draw < job.attacks and draw not in state.adversarial:
            yield "attack", draw
        if draw not in state.robust:
            yield "judge", draw


@dataclass(frozen=True, slots=True)
class _Target:
    """The defense that judges, and what the attack differentiates in its place."""

    defense: Defense
    searched: Defense
    source: Defense | None = None
    """Another defense, in which a transfer attack searches."""

    @classmethod
    def build(cls, job: Job, registry: Registry, policy: Policy) -> "_Target":
        """Both on the job's device; the same object where the gradient is exact."""
        device = torch.device(job.device)
        # float32 means float32: no shortened products in convolutions.
        torch.backends.cudnn.allow_tf32 = False
        defense = registry.build_defense(job.defense, job.track, device=device, policy=policy)
        searched = gradients.differentiated(
            registry, job.defense, job.track, defense, job.effort, device=device, policy=policy
        )
        source = None
        if job.source is not None:
            source = registry.build_defense(job.source, job.track, device=device, policy=policy)
        return cls(defense, searched, source)

    @property
    def calls(self) -> int:
        """Network calls so far."""
        own = 0 if self.searched is self.defense else self.searched.counter.images
        return self.defense.counter.images + own


def _execute(
    piece: tuple[str, int],
    job: Job,
    target: _Target,
    group: Group,
    state: _State,
    progress: Progress,
) -> None:
    kind, number = piece
    start = time.perf_counter()
    if group.images.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    if kind == "attack":
        _attack(number, job, target, group, state, progress)
    else:
        _judge(number, job, target, group, state)
    state.seconds += time.perf_counter() - start
    if group.images.is_cuda:
        state.peak_bytes = max(state.peak_bytes, torch.cuda.max_memory_allocated())


def _attack(
    number: int, job: Job, target: _Target, group: Group, state: _State, progress: Progress
) -> None:
    before = target.calls
    found = evaluate.attack(
        target.searched,
        attacks.build(job.threat.entry.attack, job.effort, target.source),
        group,
        budget_of(job),
        frozenset(Site(site) for site in job.knows),
        seed=job.seed,
        victim_draw=number,
        rows=job.rows,
        tick=progress.tick,
    )
    passes = int((found.gradients + found.looks).sum())
    calls = (target.calls - before) // max(1, passes)
    state.adversarial[number] = found.images.cpu()
    state.nonzero[number] = found.nonzero
    if found.verdict is not None:
        state.package[number] = found.verdict
    state.gradients[number], state.looks[number] = found.gradients * calls, found.looks * calls


def _judge(number: int, job: Job, target: _Target, group: Group, state: _State) -> None:
    before = target.calls
    adversarial = state.adversarial[number if job.knows else 0].to(group.images)
    looks = [(group.images, number), (adversarial, number)]
    if job.knows:
        looks += [(adversarial, FRESH + i) for i in range(FRESH_DRAWS)]
    right = [
        evaluate.judge(target.defense, images, group, seed=job.seed, draw=draw).cpu()
        for images, draw in looks
    ]
    state.clean[number], state.robust[number] = right[:2]
    if job.knows:
        state.fresh[number] = torch.stack(right[2:], dim=1)
    state.judging_calls += target.calls - before
    state.judged += len(looks) * len(group.ids)


def _assemble(
    job: Job, data: DataSet, digest: str, states: list[_State], check: GradientCheck | None
) -> Result:
    draws, attacked = range(job.draws), range(job.attacks)

    def columns(kind: str) -> list[Any]:
        """One row per image of the job, one column per draw."""
        numbers = attacked if kind == "package" else draws
        groups = [torch.stack([getattr(s, kind)[d] for d in numbers], dim=1) for s in states]
        rows: list[Any] = torch.cat(groups)[: job.examples].tolist()
        return rows

    def total(kind: str) -> Tensor:
        """Of each image of the job, over all attacks."""
        groups = [torch.stack([getattr(s, kind)[a] for a in attacked]).sum(0) for s in states]
        return torch.cat(groups)[: job.examples]

    ids = job.track_ids[: job.examples]
    per_purification = sum(s.judging_calls for s in states) // sum(s.judged for s in states)
    verdicts = job.draws * (2 + (FRESH_DRAWS if job.knows else 0)) * job.examples
    gradients = total("gradients")
    return Result(
        schema=SCHEMA,
        track=job.track.name,
        defense=job.defense.name,
        threat=job.threat.name,
        seed=job.seed,
        norm=job.track.entry.norm,
        eps=job.eps,
        sites=job.sites,
        knows=job.knows,
        attack=job.threat.entry.attack,
        effort=job.effort,
        options=job.options,
        surrogate=job.surrogate,
        overrides=job.overrides,
        ids=ids,
        labels=data.labels_of(ids),
        draws=list(draws),
        clean=columns("clean"),
        robust=columns("robust"),
        fresh=columns("fresh") if job.knows else None,
        zero_gradient=(total("nonzero") == 0).tolist() if "gradient" in job.effort else None,
        package_robust=columns("package") if states[0].package else None,
        gradient_check=check,
        network_calls=NetworkCalls(
            per_purification=per_purification,
            gradient=int(gradients.sum()),
            judging=int(total("looks").sum()) + per_purification * verdicts,
        ),
        arithmetic=Arithmetic(
            device=torch.device(job.device).type,  # type: ignore[arg-type]
            dtype="float32",
            batch_size=job.batch_size,
            rows=job.rows,
        ),
        provenance=provenance(job, digest),
    )


def _adversarial(job: Job, states: list[_State]) -> Tensor:
    """``(attacks, n, c, h, w)``."""
    attacked = range(job.attacks)
    return torch.cat([torch.stack([s.adversarial[a] for a in attacked]) for s in states], dim=1)


def _runtime(states: list[_State], policy: Policy) -> str:
    record = {
        "seconds": round(sum(s.seconds for s in states), 3),
        "peak_device_bytes": max(s.peak_bytes for s in states) or None,
        "checkpointing": policy,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    return json.dumps(record, indent=1) + "\n"


@contextmanager
def locked(work: Path) -> Iterator[None]:
    """Keep a second run of the same job away.

    Raises:
        BadRequest: There is one already.
    """
    work.mkdir(parents=True, exist_ok=True)
    # Beside the folder, not in it: --no-resume removes the folder.
    with work.with_name(f"{work.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BadRequest(f"{work}: another run of this job is at work there.") from None
        yield
