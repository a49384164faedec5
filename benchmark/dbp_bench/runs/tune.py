"""Choosing a defense's settings on validation images, by a rule (docs/choices.md)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from dbp_bench.declaration import value_of
from dbp_bench.entries.fields import AnyRef, NetworkRef
from dbp_bench.entries.subject import Subject
from dbp_bench.errors import BadRequest, did_you_mean
from dbp_bench.reporting.pool import Pool
from dbp_bench.reporting.statistics import Estimate
from dbp_bench.result import Result
from dbp_bench.runs.job import Job
from dbp_bench.weights import files


@dataclass(frozen=True, slots=True)
class Candidate:
    """A setting of a defense, and the job that measures it."""

    options: dict[str, Any]
    """The options that are chosen, with their values here."""
    job: Job
    own: bool
    """True for the setting that the defense's entry has."""

    @property
    def label(self) -> str:
        """Its options in words, which are the name of its folder, too."""
        return ",".join(f"{name}={value}" for name, value in self.options.items())


@dataclass(frozen=True, slots=True)
class Tried:
    """A candidate and what it reached."""

    candidate: Candidate
    clean: Estimate
    robust: Estimate
    gain: Estimate | None
    """The robust accuracy minus that of the entry's own setting, paired by image; None for the
    latter."""
    nfe: int
    """Calls of the denoiser for one purification."""
    fit: bool
    """False where the clean accuracy is too low."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The verdict of the rule on the candidates of a defense."""

    tried: list[Tried]
    best: Tried
    """The candidate of highest robust accuracy among those whose clean accuracy does; where none
    does, that of the highest clean accuracy."""
    chosen: Tried
    """The entry's own, unless the best is told apart from it or its clean accuracy doesn't do."""


def parse(text: str) -> tuple[str, list[Any]]:
    """Option and values of, for example, ``t_star=50,100``.

    Raises:
        BadRequest: The text names no option, or no value.
    """
    name, equals, listed = text.partition("=")
    values = [value_of(part.strip()) for part in listed.split(",") if part.strip()]
    if not equals or not name.strip() or not values:
        raise BadRequest(f"--over {text!r}: write it as t_star=50,100,150.")
    return name.strip().replace("-", "_"), values


def candidates(
    own: Job, grid: Mapping[str, Sequence[Any]], weights: Path | None = None
) -> list[Candidate]:
    """The entry's own setting, then all others of the `grid`.

    Args:
        own: The job of the defense as its entry has it, on validation images.
        grid: The values of each option.
        weights: A folder with files of weights that take the place of the entries' of that name.

    Raises:
        BadRequest: The defense has no such option, or `weights` has none of its files.
    """
    options = own.subject.setting.options
    for name in grid:
        if name not in options:
            hint = did_you_mean(name, options)
            raise BadRequest(f"--over {name}: {own.subject.name} has no such option.{hint}")
    if not grid:
        raise BadRequest("--over names nothing. Write it as t_star=50,100,150.")
    if weights is not None:
        own = replace(own, subject=with_weights(own.subject, weights))
    mine = {name: options[name] for name in grid}
    others = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    found = [Candidate(mine, own, own=True)]
    for each in others:
        setting = own.subject.setting.model_copy(update={"options": {**options, **each}})
        job = replace(own, subject=replace(own.subject, setting=setting))
        if all(each != known.options for known in found):
            found.append(Candidate(each, job, own=False))
    return found


def with_weights(subject: Subject, folder: Path) -> Subject:
    """The `subject`, whose networks have the weights in `folder` where a file has the same name.

    Raises:
        BadRequest: None has.
    """
    taken: list[str] = []

    def other(ref: AnyRef) -> AnyRef:
        if not isinstance(ref, NetworkRef) or not (folder / ref.file).is_file():
            return ref
        taken.append(ref.file)
        return ref.model_copy(update={"sha256": files.digest(folder / ref.file)})

    track, setting = subject.track.entry, subject.setting
    classifier = other(track.classifier)
    networks = {role: other(ref) for role, ref in setting.networks.items()}
    if not taken:
        refs = [track.classifier, *setting.networks.values()]
        names = [ref.file for ref in refs if isinstance(ref, NetworkRef)]
        raise BadRequest(f"--weights {folder}: none of {', '.join(names)} is there.")
    changed = track.model_copy(update={"classifier": classifier})
    return replace(
        subject,
        track=replace(subject.track, entry=changed),
        setting=setting.model_copy(update={"networks": networks}),
        builder=replace(subject.builder, weights=(folder.resolve(),)),
    )


@torch.no_grad()
def base_accuracy(job: Job) -> float:
    """The share of the job's images that the classifier alone gets right."""
    classifier, data, right = job.subject.base_classifier(job.device), job.data(), 0
    for start in range(0, job.examples, job.batch_size):
        images, labels = data.select(job.track_ids[: job.examples][start : start + job.batch_size])
        right += int((classifier(images.to(job.device)).argmax(1).cpu() == labels).sum())
    return right / job.examples


def choose(tried: Sequence[Candidate], results: Sequence[Result], least_clean: float) -> Choice:
    """Apply the rule to candidates, of which the first is the entry's own, and their `results`."""
    pools = [Pool.of(result) for result in results]
    rows = [
        Tried(
            candidate,
            pool.clean.estimate,
            pool.robust.estimate,
            None if candidate.own else pool.robust.above(pools[0].robust),
            pool.any.evaluations.nfe,
            _fits(pool.clean.estimate, candidate.own, least_clean),
        )
        for candidate, pool in zip(tried, pools, strict=True)
    ]
    own, fit = rows[0], [row for row in rows if row.fit]
    if not fit:
        best = max(rows, key=lambda row: row.clean.value)
        return Choice(rows, best, best)
    best = min(fit, key=lambda row: (-row.robust.value, row.nfe, not row.candidate.own))
    clear = best.gain is not None and best.gain.low > 0
    return Choice(rows, best, own if own.fit and not clear else best)


def _fits(clean: Estimate, own: bool, least_clean: float) -> bool:
    """The entry's own setting is too low where its interval says so, others where they are."""
    return (clean.high if own else clean.value) >= least_clean


def run(
    tried: Sequence[Candidate],
    out: Path,
    execute: Callable[[Job, Path], Path],
    share: float,
) -> Choice:
    """Measure all candidates below `out`, and choose.

    Args:
        tried: The candidates, the entry's own first.
        out: The folder of results.
        execute: Runs a job below a folder and gives the path of its result.
        share: The least clean accuracy, relative to that of the classifier alone.
    """
    least_clean = share * base_accuracy(tried[0].job)
    results = [Result.read(execute(each.job, out / "tuning" / each.label)) for each in tried]
    return choose(tried, results, least_clean)


def to_table(choice: Choice) -> list[dict[str, Any]]:
    """The candidates as a table that JSON can hold, for scripts."""
    return [
        {
            "options": row.candidate.options,
            "own": row.candidate.own,
            "clean": asdict(row.clean),
            "robust": asdict(row.robust),
            "gain": None if row.gain is None else asdict(row.gain),
            "nfe": row.nfe,
            "fit": row.fit,
            "best": row is choice.best,
            "chosen": row is choice.chosen,
        }
        for row in choice.tried
    ]
