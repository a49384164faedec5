"""Run one job: cut it into groups, execute, store, resume. The only writer of results.

A finished piece of work (an attack, the evaluation at a draw) is stored atomically in `.work/`
below the folder of results, so that a run killed at any moment and started again computes only what
is missing and writes the same result file, byte for byte.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from dbp_bench import evaluate
from dbp_bench.checks.record import Memo, record
from dbp_bench.data import DataSet
from dbp_bench.declaration import parse_json
from dbp_bench.defense import Defense
from dbp_bench.errors import BadRequest
from dbp_bench.evaluate import FRESH, Group
from dbp_bench.memory import Policy
from dbp_bench.noise import Site
from dbp_bench.result import (
    Arithmetic,
    EvaluationCounts,
    Predicted,
    Result,
    outcome_digest,
)
from dbp_bench.runs.job import Job, identity_of, refuse_other_request
from dbp_bench.runs.provenance import provenance
from dbp_bench.runs.saved import adversarial_path, is_inside, pack
from dbp_bench.threat import Attack, Budget, Tick, ignore
from dbp_bench.writing import locked, write_atomically

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
_DIGEST = "digest"
"""The key of a group's metadata under which :func:`_digest` stands."""


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
    def read(cls, path: Path, request: str) -> "_State":
        """The state in a file, of this `request`.

        It is empty where there is no file, none that can be read, or one that this program didn't
        write as it is: its digest is another.
        """
        state = cls()
        if not path.is_file():
            return state
        try:
            with safe_open(path, "pt") as file:
                stated = (file.metadata() or {}).get(_DIGEST)
            tensors = load_file(path)
            if stated != _digest(request, path.name, tensors):
                return state
            for name, value in tensors.items():
                kind, _, number = name.partition("/")
                if kind in (*_BY_ATTACK, *_BY_DRAW):
                    getattr(state, kind)[int(number)] = value
                elif kind in _COUNTS:
                    setattr(state, kind, int(value))
                else:
                    return cls()
        except (SafetensorError, OSError, LookupError, TypeError, ValueError, RuntimeError):
            return cls()
        return state

    def write(self, path: Path, request: str) -> None:
        tensors = {
            f"{kind}/{number}": value.contiguous()
            for kind in (*_BY_ATTACK, *_BY_DRAW)
            for number, value in getattr(self, kind).items()
        }
        counts = {kind: torch.tensor(getattr(self, kind)) for kind in _COUNTS}
        tensors |= counts
        metadata = {_DIGEST: _digest(request, path.name, tensors)}
        write_atomically(path, save(tensors, metadata))

    def is_sound(self, job: Job, images: Tensor) -> bool:
        """Whether all that is known fits a group of these clean `images`, and the job's budget."""
        ball, size = job.budget(), len(images)
        return all(
            found.shape == images.shape
            and found.dtype == images.dtype
            and is_inside(ball, found, images)
            for found in self.images.values()
        ) and all(
            len(value) == size
            for kind in (*_BY_ATTACK, *_BY_DRAW)
            for value in getattr(self, kind).values()
        )


def _digest(request: str, name: str, tensors: Mapping[str, Tensor]) -> str:
    """sha256 over a piece of work, its place, and the `request` that it answers."""
    total = sha256(f"{request}\n{name}\n".encode())
    for key, value in sorted(tensors.items()):
        total.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        total.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def execute(
    job: Job,
    out: Path,
    *,
    policy: Policy = "auto",
    resume: bool = True,
    save_adversarial: bool = False,
    wait: bool = False,
    progress: Progress | None = None,
    memo: Memo | None = None,
) -> Path:
    """Run `job`, or what is missing of it, and write its result below `out`.

    Args:
        job: What to measure.
        out: The folder of results.
        policy: Gradient checkpointing; doesn't change a bit of the result.
        resume: Continue what is there. Otherwise it is thrown away first.
        save_adversarial: Also write the adversarial images, as safetensors.
        wait: Until another command that is at work on it is done.
        progress: Told how far the job is.
        memo: What the conformance records of this command share.

    Returns:
        The path of the result file.

    Raises:
        BadRequest: `out` holds another request under this name, or holds more images but fewer
            draws, or the other way round.
        Busy: Another command is at work on it.
        AttackFailed: The attack or the defense gave numbers that can't be used.
    """
    # Checkpoints that must be fetched first are missed here, before anything is deleted.
    path, identity = job.path(out), job.identity()
    work, saved = _work_folder(path, out), adversarial_path(path)
    with locked(work, what="run of this job", wait=wait):
        work.mkdir(parents=True, exist_ok=True)
        if not resume:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            for old in (path, saved):
                old.unlink(missing_ok=True)
        held = _held(path, work, identity, job.examples, job.draws)
        if held and _covers(held, job.examples, job.draws):
            if saved.is_file() or not save_adversarial:
                return path
            # The images of all that the result holds, however few are asked for.
            job = replace(
                job, examples=len(held.ids), draws=len(held.draws), overrides=held.overrides
            )
        write_atomically(work / "request.json", json.dumps(identity, indent=1))
        data = job.data()
        # Reads every image once: a damaged one is found before anything is attacked.
        digest = data.digest(job.track_ids[: job.examples])
        pieces = _Pieces.read(job, work)
        _complete(pieces, job, data, policy, progress or Progress())
        result = _assemble(job, identity, pieces, data, digest, memo)
        if save_adversarial or saved.is_file():
            write_atomically(saved, pack(job, pieces.images()))
        result.write(path)
    return path


def is_complete(job: Job, out: Path) -> bool:
    """Whether `out` holds a result for all that `job` asks for."""
    path = job.path(out)
    if not path.is_file():
        return False
    held = Result.read(path)
    return identity_of(held) == job.identity() and _covers(held, job.examples, job.draws)


def missing_gradients(job: Job, out: Path) -> int:
    """Gradient evaluations that `job` has still to take, for an estimate."""
    if is_complete(job, out):
        return 0
    work = _work_folder(job.path(out), out)
    if _request(work) != job.identity():
        return job.gradient_evaluations
    return _Pieces.read(job, work).attacks_missing * job.evaluations.gradient


def _held(
    path: Path, work: Path, identity: dict[str, Any], examples: int, draws: int
) -> Result | None:
    """The result at `path`, if any; refuses one, or unfinished work, of another request."""
    held = Result.read(path) if path.is_file() else None
    if held:
        refuse_other_request(identity, identity_of(held), path)
        larger = len(held.ids) > examples or len(held.draws) > draws
        if larger and not _covers(held, examples, draws):
            raise BadRequest(
                f"{path} holds {len(held.ids)} images x {len(held.draws)} draws: ask for at least "
                f"as many of both, not {examples} x {draws}, or choose another --out."
            )
    request, groups = _request(work), list(work.glob("group-*"))
    if request is not None and groups:
        refuse_other_request(identity, request, work)
    else:
        # Work whose request isn't known can't be continued; a request alone is no work, such as
        # that of an entry that could not be built and was mended since.
        for group in groups:
            group.unlink()
    return held


def _request(work: Path) -> dict[str, Any] | None:
    """The request that the unfinished work answers; None where that can't be read."""
    try:
        request = parse_json((work / "request.json").read_text())
    except (OSError, ValueError):
        return None
    return request if isinstance(request, dict) else None


def _covers(held: Result, examples: int, draws: int) -> bool:
    return len(held.ids) >= examples and len(held.draws) >= draws


def _work_folder(path: Path, out: Path) -> Path:
    return out / ".work" / path.relative_to(out).with_suffix("")


# ------------------------------------------------------------------------------ pieces of work


@dataclass(frozen=True, slots=True)
class _Pieces:
    """The work of a job, by group of images: what is done and what is missing."""

    folder: Path
    request: str
    groups: list[list[int]]
    examples: int
    attacks: int
    draws: int
    states: list[_State]

    @classmethod
    def read(cls, job: Job, folder: Path) -> "_Pieces":
        """Those of `job` in its `folder` of unfinished work."""
        groups, request = job.groups, json.dumps(job.identity(planned=True), sort_keys=True)
        paths = [_group_path(folder, index) for index in range(len(groups))]
        states = [_State.read(path, request) for path in paths]
        return cls(folder, request, groups, job.examples, job.attacks, job.draws, states)

    @property
    def attacks_missing(self) -> int:
        """How many attacks on one image are still to be made."""
        return sum(
            len(ids)
            for ids, state in zip(self.groups, self.states, strict=True)
            for attack in range(self.attacks)
            if attack not in state.images
        )

    def missing(self, state: _State) -> Iterator[tuple[str, int]]:
        """What is missing of a group, in order: attacks, and evaluations at victim draws."""
        for draw in range(self.draws):
            if draw < self.attacks and draw not in state.images:
                yield "attack", draw
            if draw not in state.adversarial:
                yield "evaluate", draw

    def columns(self, kind: str) -> list[Any]:
        """One row per image of the job, one column per draw or attack."""
        numbers = range(self.attacks if kind in _BY_ATTACK else self.draws)
        groups = [torch.stack([getattr(s, kind)[n] for n in numbers], dim=1) for s in self.states]
        rows: list[Any] = torch.cat(groups)[: self.examples].tolist()
        return rows

    def totals(self, kind: str) -> Tensor:
        """A number for each image of the job, over all attacks."""
        numbers = range(self.attacks)
        groups = [torch.stack([getattr(s, kind)[n] for n in numbers]).sum(0) for s in self.states]
        return torch.cat(groups)[: self.examples]

    def images(self) -> Tensor:
        """All adversarial images ``(attacks, n, c, h, w)``."""
        numbers = range(self.attacks)
        return torch.cat([torch.stack([s.images[n] for n in numbers]) for s in self.states], dim=1)


def _group_path(work: Path, index: int) -> Path:
    return work / f"group-{index:05d}.safetensors"


def _complete(pieces: _Pieces, job: Job, data: DataSet, policy: Policy, progress: Progress) -> None:
    """Do what is missing, and store each piece as soon as it is done."""
    for index, (ids, state) in enumerate(zip(pieces.groups, pieces.states, strict=True)):
        if state.images and not state.is_sound(job, data.select(ids)[0]):
            pieces.states[index] = _State()  # whoever wrote it: it is computed again
    progress.start(pieces.attacks_missing * job.evaluations.gradient)
    run: _Run | None = None
    for index, (ids, state) in enumerate(zip(pieces.groups, pieces.states, strict=True)):
        todo = list(pieces.missing(state))
        if not todo:
            continue
        run = run or _Run.of(job, policy, progress.tick)
        images, labels = data.select(ids)
        group = Group(images.to(run.device), labels.to(run.device), ids)
        for kind, number in todo:
            if kind == "attack":
                run.attack(number, group, state)
            else:
                run.evaluate(number, group, state)
            state.write(_group_path(pieces.folder, index), pieces.request)


@dataclass(frozen=True, slots=True)
class _Run:
    """The defense that is evaluated, the attack on it, and what the attack differentiates."""

    defense: Defense
    searched: Defense
    """The same object where the gradient is exact."""
    sources: dict[str, Defense]
    """Other defenses in which the attack searches."""
    method: Attack
    budget: Budget
    knows: frozenset[Site]
    seed: int
    max_batch: int
    device: torch.device
    tick: Tick

    @classmethod
    def of(cls, job: Job, policy: Policy, tick: Tick) -> "_Run":
        """Everything that `job` names, on its device."""
        # float32 means float32: no shortened products in convolutions.
        torch.backends.cudnn.allow_tf32 = False
        return cls(
            *job.built(policy=policy),
            job.other_defenses(policy=policy),
            job.attack(),
            job.budget(),
            frozenset(Site(site) for site in job.knows),
            job.seed,
            job.max_batch,
            torch.device(job.device),
            tick,
        )

    @property
    def calls(self) -> int:
        """Calls of the denoising networks so far; other defenses have a count of their own."""
        own = 0 if self.searched is self.defense else self.searched.counter.images
        return self.defense.counter.images + own

    def attack(self, number: int, group: Group, state: _State) -> None:
        """Attack the images of `group`, at victim draw `number` where draws are known."""
        before = self.calls
        found = evaluate.attack(
            self.searched,
            self.method,
            group,
            self.budget,
            self.knows,
            seed=self.seed,
            victim_draw=number,
            max_batch=self.max_batch,
            tick=self.tick,
            sources=self.sources,
        )
        evaluations = int((found.gradient + found.forward).sum())
        state.searched_nfe = (self.calls - before) // max(1, evaluations)
        state.images[number] = found.images.cpu()
        state.nonzero[number] = found.nonzero
        if found.verdict is not None:
            state.package[number] = found.verdict
        state.gradient[number], state.forward[number] = found.gradient, found.forward

    def evaluate(self, number: int, group: Group, state: _State) -> None:
        """Predict the classes of clean and adversarial images at victim draw `number`."""
        before = self.calls
        adversarial = state.images[number if self.knows else 0].to(group.images)
        evaluations = [(group.images, number), (adversarial, number)]
        if self.knows:
            evaluations += [(adversarial, FRESH + i) for i in range(FRESH_DRAWS)]
        classes = [
            evaluate.predict(self.defense, images, group.ids, seed=self.seed, draw=draw).cpu()
            for images, draw in evaluations
        ]
        state.clean[number], state.adversarial[number] = classes[:2]
        if self.knows:
            state.fresh[number] = torch.stack(classes[2:], dim=1)
        state.nfe = (self.calls - before) // (len(evaluations) * len(group.ids))


def _assemble(
    job: Job,
    identity: dict[str, Any],
    pieces: _Pieces,
    data: DataSet,
    digest: str,
    memo: Memo | None,
) -> Result:
    """The result of a job whose `pieces` are all there; `digest` is that of its images."""
    ids = job.track_ids[: pieces.examples]
    labels, draws = data.labels_of(ids), list(range(pieces.draws))
    predicted = Predicted(
        clean=pieces.columns("clean"),
        adversarial=pieces.columns("adversarial"),
        fresh=pieces.columns("fresh") if identity["knows"] else None,
    )
    follows = identity["gradient"] is not None
    return Result(
        schema=2,
        **{key: identity[key] for key in ("track", "defense", "threat", "attack", "setting")},
        **{key: identity[key] for key in ("seed", "norm", "eps", "sites", "knows")},
        **{key: identity[key] for key in ("effort", "gradient", "options")},
        surrogate=identity.get("surrogate"),
        overrides=job.overrides,
        ids=ids,
        labels=labels,
        draws=draws,
        predicted=predicted,
        zero_gradient=(pieces.totals("nonzero") == 0).tolist() if follows else None,
        package_robust=pieces.columns("package") if pieces.states[0].package else None,
        evaluations=EvaluationCounts(
            gradient=pieces.totals("gradient").tolist(),
            forward=pieces.totals("forward").tolist(),
            nfe=max(state.nfe for state in pieces.states),
            searched_nfe=max(state.searched_nfe for state in pieces.states),
        ),
        conformance=record(job.built, job.first_images(data), job.approach, memo),
        arithmetic=Arithmetic(
            device=torch.device(identity["device"]).type,  # type: ignore[arg-type]
            dtype="float32",
            batch_size=identity["batch_size"],
            max_batch=identity["max_batch"],
        ),
        provenance=provenance(job, digest),
        digest=outcome_digest(ids, labels, draws, predicted),
    )
