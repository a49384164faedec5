"""Run one job: cut it into groups, execute, store, resume. The only writer of results.

A finished piece of work (an attack, the evaluation at a draw) is stored atomically in `.work/`
below the folder of results, so that a run killed at any moment and started again computes only what
is missing and writes the same result file, byte for byte.
"""

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from dbp_bench import evaluate
from dbp_bench.checks.record import record
from dbp_bench.data import DataSet
from dbp_bench.defense import Defense
from dbp_bench.errors import BadRequest
from dbp_bench.evaluate import FRESH, Group
from dbp_bench.memory import Policy
from dbp_bench.noise import Site
from dbp_bench.result import (
    Arithmetic,
    Conformance,
    EvaluationCounts,
    Predicted,
    Result,
    outcome_digest,
    write_atomically,
)
from dbp_bench.runs.job import Job, identity_of, refuse_other_request
from dbp_bench.runs.provenance import provenance
from dbp_bench.runs.saved import adversarial_path, pack
from dbp_bench.threat import Tick, ignore

FRESH_DRAWS = 3
"""Fresh draws that evaluate each image made for a known draw."""


@dataclass(slots=True)
class Progress:
    """Where a job's progress goes."""

    start: Tick = ignore
    """Called once with the number of gradient evaluations that are still to be taken."""
    tick: Tick = ignore
    """Called with the number of gradient evaluations just taken."""


_BY_ATTACK = ("images", "nonzero", "gradient", "forward", "package")
_BY_DRAW = ("clean", "adversarial", "fresh")
_COUNTS = ("nfe", "searched_nfe")


@dataclass(slots=True)
class _State:
    """What is known of one group. It is saved after every piece of work."""

    images: dict[int, Tensor] = field(default_factory=dict)
    """Adversarial images, by attack: the known draw, or 0 where no draw is known."""
    nonzero: dict[int, Tensor] = field(default_factory=dict)
    """By attack, for each image: whether a gradient was not zero."""
    gradient: dict[int, Tensor] = field(default_factory=dict)
    """By attack, for each image: gradient evaluations."""
    forward: dict[int, Tensor] = field(default_factory=dict)
    """By attack, for each image: forward evaluations."""
    package: dict[int, Tensor] = field(default_factory=dict)
    """By attack, for each image: whether the attack itself calls it robust, if it says."""
    clean: dict[int, Tensor] = field(default_factory=dict)
    """By victim draw: predicted classes of the clean images."""
    adversarial: dict[int, Tensor] = field(default_factory=dict)
    """By victim draw: predicted classes of the adversarial images."""
    fresh: dict[int, Tensor] = field(default_factory=dict)
    """By known draw: predicted classes ``(b, FRESH_DRAWS)``."""
    nfe: int = 0
    """Calls of the denoising networks in one purification by the defense."""
    searched_nfe: int = 0
    """The same of what the attack searched in."""

    @classmethod
    def read(cls, path: Path) -> "_State":
        """The state in a file; an empty one where there is no file, or none that can be read."""
        state = cls()
        if not path.is_file():
            return state
        try:
            for name, value in load_file(path).items():
                kind, _, number = name.partition("/")
                if kind in (*_BY_ATTACK, *_BY_DRAW):
                    getattr(state, kind)[int(number)] = value
                elif kind in _COUNTS:
                    setattr(state, kind, int(value))
                else:
                    return cls()
        except (SafetensorError, OSError, ValueError, RuntimeError):
            return cls()
        return state

    def write(self, path: Path) -> None:
        tensors = {
            f"{kind}/{number}": value.contiguous()
            for kind in (*_BY_ATTACK, *_BY_DRAW)
            for number, value in getattr(self, kind).items()
        }
        counts = {kind: torch.tensor(getattr(self, kind)) for kind in _COUNTS}
        write_atomically(path, save({**tensors, **counts}))


def execute(
    job: Job,
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
    work = _work_folder(job, out)
    progress = progress or Progress()
    job.identity()  # checkpoints that must be fetched first are missed before anything is deleted
    with locked(work):
        if not resume:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            for old in (path, adversarial_path(path)):
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
        data = job.data()
        # Reads every image once: a damaged one is found before anything is attacked.
        digest = data.digest(job.track_ids[: job.examples])
        states = _work(job, data, work, policy, progress)
        result = _assemble(job, data, digest, states, record(job))
        if save_adversarial or saved.is_file():
            write_atomically(saved, pack(job, _adversarial(job, states)))
        result.write(path)
    return path


def is_complete(job: Job, out: Path) -> bool:
    """Whether `out` holds a result for all that `job` asks for."""
    path = job.path(out)
    held = Result.read(path) if path.is_file() else None
    return held is not None and identity_of(held) == job.identity() and _covers(held, job)


def missing_gradients(job: Job, out: Path) -> int:
    """Gradient evaluations that `job` has still to take, for an estimate."""
    if is_complete(job, out):
        return 0
    work = _work_folder(job, out)
    if _request(work) != job.identity():
        return job.gradient_evaluations
    return _missing(job, [_State.read(_group_path(work, i)) for i in range(len(job.groups))])


def _missing(job: Job, states: list[_State]) -> int:
    """Gradient evaluations that are still to be taken."""
    return sum(
        len(ids) * job.evaluations.gradient
        for ids, state in zip(job.groups, states, strict=True)
        for attack in range(job.attacks)
        if attack not in state.images
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


def _work_folder(job: Job, out: Path) -> Path:
    return out / ".work" / job.path(out).relative_to(out).with_suffix("")


def _group_path(work: Path, index: int) -> Path:
    return work / f"group-{index:05d}.safetensors"


def _work(job: Job, data: DataSet, work: Path, policy: Policy, progress: Progress) -> list[_State]:
    device = torch.device(job.device)
    states = [_State.read(_group_path(work, index)) for index in range(len(job.groups))]
    progress.start(_missing(job, states))
    target: _Target | None = None
    for index, (ids, state) in enumerate(zip(job.groups, states, strict=True)):
        todo = list(_pieces(job, state))
        if not todo:
            continue
        target = target or _Target.build(job, policy)
        images, labels = data.select(ids)
        group = Group(images.to(device), labels.to(device), ids)
        for kind, number in todo:
            if kind == "attack":
                _attack(number, job, target, group, state, progress)
            else:
                _evaluate(number, job, target, group, state)
            state.write(_group_path(work, index))
    return states


def _pieces(job: Job, state: _State) -> Iterator[tuple[str, int]]:
    """What has still to be done for a group, in order: attacks, and evaluations at victim draws."""
    for draw in range(job.draws):
        if draw < job.attacks and draw not in state.images:
            yield "attack", draw
        if draw not in state.adversarial:
            yield "evaluate", draw


@dataclass(frozen=True, slots=True)
class _Target:
    """The defense that is evaluated, and what the attack differentiates in its place."""

    defense: Defense
    searched: Defense
    sources: dict[str, Defense]
    """Other defenses in which the attack searches."""

    @classmethod
    def build(cls, job: Job, policy: Policy) -> "_Target":
        """All on the job's device; the same object where the gradient is exact."""
        # float32 means float32: no shortened products in convolutions.
        torch.backends.cudnn.allow_tf32 = False
        defense = job.defense(policy=policy)
        return cls(defense, job.searched(defense, policy=policy), job.other_defenses(policy=policy))

    @property
    def calls(self) -> int:
        """Calls of the denoising networks so far; other defenses have a count of their own."""
        own = 0 if self.searched is self.defense else self.searched.counter.images
        return self.defense.counter.images + own


def _attack(
    number: int, job: Job, target: _Target, group: Group, state: _State, progress: Progress
) -> None:
    before = target.calls
    found = evaluate.attack(
        target.searched,
        job.attack(),
        group,
        job.budget(),
        frozenset(Site(site) for site in job.knows),
        seed=job.seed,
        victim_draw=number,
        max_batch=job.max_batch,
        tick=progress.tick,
        sources=target.sources,
    )
    evaluations = int((found.gradient + found.forward).sum())
    state.searched_nfe = (target.calls - before) // max(1, evaluations)
    state.images[number] = found.images.cpu()
    state.nonzero[number] = found.nonzero
    if found.verdict is not None:
        state.package[number] = found.verdict
    state.gradient[number], state.forward[number] = found.gradient, found.forward


def _evaluate(number: int, job: Job, target: _Target, group: Group, state: _State) -> None:
    before = target.defense.counter.images
    adversarial = state.images[number if job.knows else 0].to(group.images)
    evaluations = [(group.images, number), (adversarial, number)]
    if job.knows:
        evaluations += [(adversarial, FRESH + i) for i in range(FRESH_DRAWS)]
    classes = [
        evaluate.predict(target.defense, images, group.ids, seed=job.seed, draw=draw).cpu()
        for images, draw in evaluations
    ]
    state.clean[number], state.adversarial[number] = classes[:2]
    if job.knows:
        state.fresh[number] = torch.stack(classes[2:], dim=1)
    calls = target.defense.counter.images - before
    state.nfe = calls // (len(evaluations) * len(group.ids))


def _assemble(
    job: Job, data: DataSet, digest: str, states: list[_State], checked: Conformance
) -> Result:
    draws, attacked = range(job.draws), range(job.attacks)

    def columns(kind: str) -> list[Any]:
        """One row per image of the job, one column per draw or attack."""
        numbers = attacked if kind in _BY_ATTACK else draws
        groups = [torch.stack([getattr(s, kind)[d] for d in numbers], dim=1) for s in states]
        rows: list[Any] = torch.cat(groups)[: job.examples].tolist()
        return rows

    def totals(kind: str) -> Tensor:
        """A number for each image of the job, over all attacks."""
        groups = [torch.stack([getattr(s, kind)[a] for a in attacked]).sum(0) for s in states]
        return torch.cat(groups)[: job.examples]

    ids = job.track_ids[: job.examples]
    labels = data.labels_of(ids)
    predicted = Predicted(
        clean=columns("clean"),
        adversarial=columns("adversarial"),
        fresh=columns("fresh") if job.knows else None,
    )
    follows = job.search.gradient is not None
    identity = job.identity()
    return Result(
        schema=2,
        **{key: identity[key] for key in ("track", "defense", "threat", "attack", "setting")},
        **{key: identity[key] for key in ("seed", "norm", "eps", "sites", "knows")},
        **{key: identity[key] for key in ("effort", "gradient", "options")},
        surrogate=job.surrogate,
        overrides=job.overrides,
        ids=ids,
        labels=labels,
        draws=list(draws),
        predicted=predicted,
        zero_gradient=(totals("nonzero") == 0).tolist() if follows else None,
        package_robust=columns("package") if states[0].package else None,
        evaluations=EvaluationCounts(
            gradient=totals("gradient").tolist(),
            forward=totals("forward").tolist(),
            nfe=max(state.nfe for state in states),
            searched_nfe=max(state.searched_nfe for state in states),
        ),
        conformance=checked,
        arithmetic=Arithmetic(
            device=torch.device(job.device).type,  # type: ignore[arg-type]
            dtype="float32",
            batch_size=job.batch_size,
            max_batch=job.max_batch,
        ),
        provenance=provenance(job, digest),
        digest=outcome_digest(ids, labels, list(draws), predicted),
    )


def _adversarial(job: Job, states: list[_State]) -> Tensor:
    """``(attacks, n, c, h, w)``."""
    attacked = range(job.attacks)
    return torch.cat([torch.stack([s.images[a] for a in attacked]) for s in states], dim=1)


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
