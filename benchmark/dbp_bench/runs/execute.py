"""Run one job: cut it into groups, execute, store, resume. The only writer of results.

A finished piece of work (an attack, the evaluation at a draw) is stored atomically in `.work/`
below the folder of results, so that a run killed at any moment and started again computes only what
is missing and writes the same result file, byte for byte.
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dbp_bench import evaluation
from dbp_bench.checks.record import Memo, record
from dbp_bench.data import DataSet
from dbp_bench.defense import Defense
from dbp_bench.errors import BadRequest
from dbp_bench.evaluation import FRESH, Group
from dbp_bench.memory import Policy
from dbp_bench.noise import Site
from dbp_bench.provenance import full_float32, provenance
from dbp_bench.result import (
    Arithmetic,
    Conformance,
    EvaluationCounts,
    Predicted,
    Result,
    outcome_digest,
)
from dbp_bench.runs.job import Job, identity_of, refuse_other_request
from dbp_bench.runs.pieces import Pieces, State, is_sound, read_request, work_folder, write_request
from dbp_bench.runs.saved import adversarial_path, write_saved
from dbp_bench.threat import Attack, Bound, Budget, Tick, ignore
from dbp_bench.writing import locked

FRESH_DRAWS = 3
"""Fresh draws that evaluate each image made for a known draw."""


@dataclass(slots=True)
class Progress:
    """The listeners that a job tells its progress."""

    start: Tick = ignore
    """Called once with the number of gradient evaluations that are still to be taken."""
    tick: Tick = ignore
    """Called with the number of gradient evaluations just taken."""


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
        job: The job to run.
        out: The folder of results.
        policy: Gradient checkpointing; doesn't change a bit of the result.
        resume: Continue what is there. Otherwise it is thrown away first.
        save_adversarial: Also write the adversarial images, as safetensors.
        wait: True to wait until another command that is at work on it is done.
        progress: Told how far the job is.
        memo: The conformance records that the runs of this command share.

    Returns:
        The path of the result file.

    Raises:
        BadRequest: `out` holds another request under this name, or holds more images but fewer
            draws, or the other way round.
        Busy: Another command is at work on it.
        AttackFailed: The attack or the defense gave numbers that can't be used.
    """
    # Checkpoints that must be fetched first are missed here, before anything is deleted.
    identity, entries, path = job.identity(), job.entry_digests(), job.path(out)
    folder, saved = work_folder(path, out), adversarial_path(path)
    with locked(folder, what="run of this job", wait=wait):
        if not resume:
            shutil.rmtree(folder, ignore_errors=True)
            for old in (path, saved):
                old.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        held = _held(path, folder, identity, job.examples, job.draws)
        if held and held.covers(job.examples, job.draws):
            if saved.is_file() or not save_adversarial:
                return path
            # The images of all that the result holds, however few are asked for.
            job = replace(
                job, examples=len(held.ids), draws=len(held.draws), overrides=held.overrides
            )
        data, ids = job.data(), job.track_ids[: job.examples]
        # Reads every image once: a damaged one is found before anything is attacked.
        digest = data.digest(ids)
        first = job.first_images(data)
        run = _Run.of(job, policy)
        pieces = _pieces(job, identity, folder)
        write_request(folder, identity)
        _complete(pieces, run, data, job.evaluations.gradient, progress or Progress())
        conformance = record(job.built, first, job.approach, memo)
        result = _assemble(identity, entries, job.overrides, pieces, data, digest, conformance)
        if save_adversarial or saved.is_file():
            write_saved(saved, identity, ids, pieces.rows("images").transpose(0, 1))
        result.write(path)
    return path


def is_complete(job: Job, out: Path) -> bool:
    """Tell whether `out` holds a result for all that `job` asks for."""
    path = job.path(out)
    if not path.is_file():
        return False
    held = Result.read(path)
    return identity_of(held) == job.identity() and held.covers(job.examples, job.draws)


def is_wanted(job: Job, out: Path) -> bool:
    """Tell whether `out` lacks a result of `job`, and none of another request is in its place."""
    path = job.path(out)
    if not path.is_file():
        return True
    held = Result.read(path)
    smaller = len(held.ids) <= job.examples and len(held.draws) <= job.draws
    same = identity_of(held) == job.identity(planned=True)
    return same and smaller and not held.covers(job.examples, job.draws)


def missing_gradients(job: Job, out: Path) -> int:
    """Gradient evaluations that `job` has still to take, for an estimate."""
    if is_complete(job, out):
        return 0
    folder, identity = work_folder(job.path(out), out), job.identity()
    if read_request(folder) != identity:
        return job.gradient_evaluations
    return _pieces(job, identity, folder).attacks_missing * job.evaluations.gradient


def _pieces(job: Job, identity: dict[str, Any], folder: Path) -> Pieces:
    """The pieces of `job` in its `folder` of unfinished work."""
    return Pieces.read(
        folder,
        identity,
        job.groups,
        examples=job.examples,
        attacks=job.attacks,
        draws=job.draws,
    )


def _held(
    path: Path, folder: Path, identity: dict[str, Any], examples: int, draws: int
) -> Result | None:
    """The result at `path`, if any; refuses one, or unfinished work, of another request."""
    held = Result.read(path) if path.is_file() else None
    if held:
        refuse_other_request(identity, identity_of(held), path)
        larger = len(held.ids) > examples or len(held.draws) > draws
        if larger and not held.covers(examples, draws):
            raise BadRequest(
                f"{path} holds {len(held.ids)} images x {len(held.draws)} draws: ask for at least "
                f"as many of both, not {examples} x {draws}, or choose another --out."
            )
    request, groups = read_request(folder), list(folder.glob("group-*"))
    if request is not None and groups:
        refuse_other_request(identity, request, folder)
    else:
        # Work whose request isn't known can't be continued; a request alone is no work, such as
        # that of an entry that could not be built and was mended since.
        for group in groups:
            group.unlink()
    return held


# --------------------------------------------------------------------------------- what is done


def _complete(
    pieces: Pieces, run: "_Run", data: DataSet, evaluations: int, progress: Progress
) -> None:
    """Do what is missing, and store each piece as soon as it is done.

    Args:
        pieces: The pieces that are done.
        run: The run that computes the others.
        data: The images.
        evaluations: Gradient evaluations that one attack takes of one image.
        progress: Told how far it is.
    """
    for index, (ids, state) in enumerate(zip(pieces.groups, pieces.states, strict=True)):
        if state and not is_sound(state, run.bound, data.select(ids)[0]):
            pieces.states[index] = {}  # whoever wrote it: it is computed again
    progress.start(pieces.attacks_missing * evaluations)
    for index, (ids, state) in enumerate(zip(pieces.groups, pieces.states, strict=True)):
        todo = list(pieces.missing(state))
        if not todo:
            continue
        images, labels = data.select(ids)
        group = Group(images.to(run.device), labels.to(run.device), ids)
        for kind, number in todo:
            if kind == "attack":
                run.attack(number, group, state, progress.tick)
            else:
                run.evaluate(number, group, state)
            pieces.write(index)


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
    bound: Bound
    """The budget, or the attack's own bound, to which the images are held."""
    knows: frozenset[Site]
    seed: int
    max_batch: int
    device: torch.device

    @classmethod
    def of(cls, job: Job, policy: Policy) -> "_Run":
        """Everything that `job` names, on its device."""
        full_float32()
        return cls(
            *job.built(policy=policy),
            job.other_defenses(policy=policy),
            job.attack(),
            job.budget(),
            job.bound(),
            frozenset(Site(site) for site in job.knows),
            job.seed,
            job.max_batch,
            torch.device(job.device),
        )

    @property
    def calls(self) -> int:
        """Calls of the denoising networks so far; other defenses have a count of their own."""
        own = 0 if self.searched is self.defense else self.searched.counter.images
        return self.defense.counter.images + own

    def attack(self, number: int, group: Group, state: State, tick: Tick) -> None:
        """Attack the images of `group`, at victim draw `number` where draws are known."""
        before = self.calls
        found = evaluation.attack(
            self.searched,
            self.method,
            group,
            self.budget,
            self.knows,
            seed=self.seed,
            victim_draw=number,
            max_batch=self.max_batch,
            tick=tick,
            sources=self.sources,
        )
        evaluations = int((found.gradient + found.forward).sum())
        state["searched_nfe"] = torch.tensor((self.calls - before) // max(1, evaluations))
        state[f"images/{number}"] = found.images.cpu()
        state[f"nonzero/{number}"] = found.nonzero
        if found.verdict is not None:
            state[f"package/{number}"] = found.verdict
        state[f"gradient/{number}"], state[f"forward/{number}"] = found.gradient, found.forward

    def evaluate(self, number: int, group: Group, state: State) -> None:
        """Predict the classes of clean and adversarial images at victim draw `number`."""
        before = self.calls
        adversarial = state[f"images/{number if self.knows else 0}"].to(group.images)
        evaluations = [(group.images, number), (adversarial, number)]
        if self.knows:
            evaluations += [(adversarial, FRESH + i) for i in range(FRESH_DRAWS)]
        classes = [
            evaluation.predict(self.defense, images, group.ids, seed=self.seed, draw=draw).cpu()
            for images, draw in evaluations
        ]
        state[f"clean/{number}"], state[f"adversarial/{number}"] = classes[:2]
        if self.knows:
            state[f"fresh/{number}"] = torch.stack(classes[2:], dim=1)
        nfe = (self.calls - before) // (len(evaluations) * len(group.ids))
        state["nfe"] = torch.tensor(nfe)


def _assemble(
    identity: dict[str, Any],
    entries: dict[str, str],
    overrides: list[str],
    pieces: Pieces,
    data: DataSet,
    digest: str,
    conformance: Conformance,
) -> Result:
    """The result of a job whose `pieces` are all there.

    Args:
        identity: The identity of the job.
        entries: The sha256 of its entry files.
        overrides: The options that were set against them.
        pieces: The pieces of the job.
        data: The images and labels.
        digest: The digest of the images.
        conformance: The conformance record of the defense.
    """
    ids = [id_ for group in pieces.groups for id_ in group][: pieces.examples]
    labels, draws = data.labels_of(ids), list(range(pieces.draws))
    predicted = Predicted(
        clean=pieces.rows("clean").tolist(),
        adversarial=pieces.rows("adversarial").tolist(),
        fresh=pieces.rows("fresh").tolist() if identity["knows"] else None,
    )
    follows = identity["gradient"] is not None
    return Result(
        schema=2,
        **{key: identity[key] for key in ("track", "defense", "threat", "attack", "setting")},
        **{key: identity[key] for key in ("seed", "norm", "eps", "sites", "knows")},
        **{key: identity[key] for key in ("effort", "gradient", "options")},
        surrogate=identity.get("surrogate"),
        overrides=overrides,
        ids=ids,
        labels=labels,
        draws=draws,
        predicted=predicted,
        zero_gradient=(~pieces.rows("nonzero").any(1)).tolist() if follows else None,
        package_robust=pieces.rows("package").tolist() if "package/0" in pieces.states[0] else None,
        evaluations=EvaluationCounts(
            gradient=pieces.rows("gradient").sum(1).tolist(),
            forward=pieces.rows("forward").sum(1).tolist(),
            nfe=pieces.most("nfe"),
            searched_nfe=pieces.most("searched_nfe"),
        ),
        conformance=conformance,
        arithmetic=Arithmetic(
            device=torch.device(identity["device"]).type,  # type: ignore[arg-type]
            dtype="float32",
            batch_size=identity["batch_size"],
            max_batch=identity["max_batch"],
        ),
        provenance=provenance(identity, entries, digest),
        digest=outcome_digest(ids, labels, draws, predicted),
    )
