"""Certify a defense: resolve what is asked, count votes, store, resume. Writes certificates.

Votes are stored in `.work/` below the folder of results every few seconds and after each group of
images, so that a run that is killed and started again counts what is missing and writes the same
file, byte for byte.
"""

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor

from dbp_bench import __version__, data
from dbp_bench.certificate import (
    SCHEMA,
    Certificate,
    Votes,
    certificate_path,
    label_of,
    votes_digest,
)
from dbp_bench.certification import (
    Counts,
    Smoothing,
    check_classes,
    check_votes,
    count,
    group_size,
    is_smoothing,
    largest_pass,
)
from dbp_bench.data import DataSet
from dbp_bench.defense import Defense
from dbp_bench.entries import outside
from dbp_bench.entries.registry import Registry
from dbp_bench.entries.subject import Subject
from dbp_bench.errors import BadEntry, BadRequest, NotConforming
from dbp_bench.memory import free_bytes
from dbp_bench.provenance import full_float32, provenance
from dbp_bench.purifiers.denoised_smoothing import least_step, noise_of
from dbp_bench.purifiers.schedule import LINEAR
from dbp_bench.result import Arithmetic
from dbp_bench.runs.estimate import forward_bytes
from dbp_bench.runs.execute import Progress
from dbp_bench.runs.job import names_of, refuse_other_request
from dbp_bench.runs.pieces import Pieces, State, read_request, work_folder, write_request
from dbp_bench.writing import locked

SECONDS: Final = 10.0
"""Time between two writes of unfinished work."""
LARGEST: Final = {"cpu": 4096, "cuda": 65536}
"""Votes in a pass, at most: more don't make it faster."""
PROBED: Final = 2
"""Images on which it is tried whether the forward noise is the smoothing noise."""
_RECORDED: Final = ("track", "defense", "sigma", "n0", "n", "seed", "sites", "options")
"""The fields of a job's identity that a certificate has under the same names."""


@dataclass(frozen=True, slots=True)
class CertificateJob:
    """Everything that decides the votes, except the arithmetic of the machine."""

    subject: Subject
    """The defense, with its noise level at that of the Gaussian noise."""
    smoothing: Smoothing
    seed: int
    device: str
    track_ids: list[int]
    """All images of the track."""
    examples: int
    max_batch: int | None
    """Votes in one pass; None: as many as memory allows, or as what is there was begun with."""
    given: Mapping[str, Any] = field(default_factory=dict)
    """Options that were set against the entry."""
    code: Mapping[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Its name in messages."""
        return f"{self.subject.name} / sigma {self.smoothing.sigma:g}"

    @property
    def votes(self) -> int:
        """Votes of one image."""
        return self.smoothing.n0 + self.smoothing.n

    def path(self, out: Path) -> Path:
        """The path of the certificate, below the folder `out`."""
        label = label_of(self.smoothing.sigma, self.smoothing.n, self.given)
        track, defense = self.subject.track.name, self.subject.name
        return certificate_path(out, track, defense, label, seed=self.seed)

    def identity(self, max_batch: int) -> dict[str, Any]:
        """The fields that must be equal for votes to be continued; images can be added.

        Raises:
            BadWeights: A checkpoint isn't in the cache.
        """
        return {
            "dbp_bench": __version__,
            "schema": SCHEMA,
            "track": self.subject.track.name,
            "defense": self.subject.name,
            "sigma": self.smoothing.sigma,
            "n0": self.smoothing.n0,
            "n": self.smoothing.n,
            "seed": self.seed,
            "sites": self.subject.sites,
            "options": self.subject.setting.recorded,
            "weights": self.subject.weights(),
            **({"code": dict(self.code)} if self.code else {}),
            "device": self.device,
            "max_batch": max_batch,
        }

    def defense(self) -> Defense:
        """The defense, on the job's device.

        Raises:
            BadRequest: It can't be built at this noise level.
        """
        try:
            return self.subject.defense(device=self.device)
        except BadEntry as error:
            raise BadRequest(f"--sigma {self.smoothing.sigma:g} makes of {error}") from None

    def labels(self, images: DataSet) -> list[int]:
        """The labels of the images that are asked for.

        Raises:
            BadRequest: They are the first of a list that is sorted by class.
        """
        labels = images.labels_of(self.track_ids)
        check_classes(labels[: self.examples], labels)
        return labels[: self.examples]

    def doubt(self) -> str | None:
        """A warning where the whole list of the track is of few of the data set's classes."""
        labels, classes = self.subject.data().labels_of(self.track_ids), self.subject.facts.classes
        try:
            check_classes(labels, range(classes))
        except BadRequest:
            return (
                f"the {len(labels)} images of {self.subject.track.name} are of {len({*labels})} of "
                f"{classes} classes: certified accuracy is that of these classes alone."
            )
        return None


# ----------------------------------------------------------------------------------- what is asked


def plan(
    registry: Registry,
    track: str,
    defenses: Sequence[str],
    sigmas: Sequence[float],
    *,
    n0: int,
    n: int,
    seed: int,
    device: str,
    examples: int | None = None,
    max_batch: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> list[CertificateJob]:
    """All jobs of the product of `defenses` and `sigmas`, resolved.

    Args:
        registry: All entries.
        track: Name of the track.
        defenses: Names of defenses; "all" stands for every one that has a setting for the track.
        sigmas: Sizes of the Gaussian noise, in pixel units.
        n0: Votes that choose an image's class.
        n: Fresh votes that bound its probability.
        seed: It decides every draw.
        device: "cpu" or "cuda".
        examples: The first images of the track only.
        max_batch: Votes in one pass, at most.
        options: Options of the defense, set against its entry: they go before what a sigma sets.

    Raises:
        BadRequest: A number can't be right, or a sigma is beyond the schedule.
        UnknownName: No entry has one of the names.
    """
    for name, value in (("max-batch", max_batch), ("examples", examples)):
        if value is not None and value < 1:
            raise BadRequest(f"--{name} {value}: must be 1 or more.")
    if not 0 <= seed < 2**63:
        raise BadRequest(f"--seed {seed}: must be in 0 ... 2^63 - 1.")
    by_label: dict[str, float] = {}
    for sigma in sigmas:
        label = label_of(sigma, n, {})
        if by_label.setdefault(label, sigma) != sigma:
            raise BadRequest(
                f"--sigma {by_label[label]},{sigma}: both would be {label}; paths have six digits."
            )
    registry.track(track)
    names = names_of("--defense", defenses, registry.defenses)
    given, jobs = dict(options or {}), []
    for defense in registry.defenses_of(track) if names == ["all"] else names:
        own = registry.subject(defense, track)
        for sigma in sigmas:
            smoothing = Smoothing(sigma, n0, n)
            subject = at_level(own, sigma, given)
            ids = subject.ids()
            jobs.append(
                CertificateJob(
                    subject=subject,
                    smoothing=smoothing,
                    seed=seed,
                    device=device,
                    track_ids=ids,
                    examples=len(data.first(ids, examples)),
                    max_batch=max_batch,
                    given=given,
                    code=outside.code(subject.code(), registry.folders),
                )
            )
    return jobs


def at_level(subject: Subject, sigma: float, given: Mapping[str, Any]) -> Subject:
    """`subject` at the noise level of Gaussian noise of size `sigma`, with the options `given`.

    The option that its purifier says is its noise level is set to it (:data:`NoiseOption`), in the
    units of that option; `t_star`, of the purifier or of the one that it wraps, to the first level
    that has as much noise, and `steps` with it (:func:`levels`). A defense without either is left
    as it is.

    Raises:
        BadRequest: No level has as much, or the defense has no option of a name that is given.
    """
    setting, inner = subject.setting, subject.setting.inner
    name, scale = getattr(subject.factory(), "noise_option", ("t_star", None))
    if "sigma" in given and (name == "sigma" or "sigma" not in setting.replaceable):
        raise BadRequest("--set sigma: --sigma sets it.")
    level: dict[str, Any] = {}
    if name in setting.replaceable and name not in given:
        options = {**setting.replaceable, **given}
        level = levels(sigma, options, given) if scale is None else {name: scale * sigma}
    if inner is not None and name not in setting.options:
        inner, level = inner.model_copy(update={"options": {**inner.options, **level}}), {}
    options = {**setting.options, **level}
    votes = given.get("votes", setting.votes)
    if isinstance(votes, bool) or not isinstance(votes, int) or votes < 1:
        raise BadRequest(f"--set votes={votes}: a whole number from 1.")
    options |= {name: value for name, value in given.items() if name != "votes"}
    changed: dict[str, Any] = {"options": options, "inner": inner, "votes": votes}
    if votes == 1:
        changed["decision"] = "majority"  # the same as any other
    return replace(subject, setting=setting.model_copy(update=changed))


def levels(
    sigma: float,
    options: Mapping[str, Any] = MappingProxyType({}),
    given: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, int]:
    """The first `t_star` at which noise is at least `sigma`, in pixels, and `steps` that fit it.

    At a level of the linear schedule it is ``sqrt((1 - a) / a) / 2`` for a signal of a. Of the
    `options` of a purifier, a `respaced` chain has fewer levels. A `published_grid` starts one
    level above `t_star`, a multiple of its `steps`: as many as keep their length, or those that are
    `given`. Other grids keep the number of their steps, where there are as many levels.

    Raises:
        BadRequest: There is none.
    """
    own, steps, respaced = (options.get(name) for name in ("t_star", "steps", "respaced"))
    try:
        level = least_step("linear-1000", sigma) + 1
        chain = LINEAR.respaced(respaced) if isinstance(respaced, int) else None
    except BadEntry as error:
        raise BadRequest(f"--{error}") from None
    if chain is not None:
        level = next(i for i, known in enumerate(chain) if known >= level)
    if not isinstance(steps, int) or steps < 1:
        return {"t_star": level}  # none, or refused where the purifier is built
    if chain is None and options.get("published_grid") is True:
        if "steps" in given:
            return {"t_star": -(-(level - 1) // steps) * steps}
        length = max(1, own // steps) if isinstance(own, int) else 1
        steps = -(-(level - 1) // length)
        return {"t_star": steps * length, "steps": steps}
    return {"t_star": level} | ({} if "steps" in given else {"steps": min(steps, level)})


def forward_noise(defense: Defense, images: Tensor, sigma: float) -> float | None:
    """The size of the defense's forward noise where that is smoothing noise of at least `sigma`.

    Its purifier says so (`smoothing_sigma`), or has a `t_star` or a `sigma_max` whose noise it may
    be; whether it is, is tried on `images`.

    Raises:
        NotConforming: The purifier says that it is, and it isn't.
    """
    purifier, sizes = defense.purifier, list[float]()
    stated = getattr(purifier, "smoothing_sigma", None)
    if stated is not None:
        sizes = [float(stated)]
    elif isinstance(level := getattr(purifier, "t_star", None), int):
        signal = LINEAR.signal()
        # A purifier with the published grid starts one level higher.
        sizes = [noise_of(signal[t]) for t in (level, level + 1) if 0 < t < len(signal)]
    elif isinstance(level := getattr(purifier, "sigma_max", None), int | float):
        sizes = [level / 2]
    found = next((size for size in sizes if is_smoothing(defense, images, size)), None)
    if stated is not None and found is None:
        raise NotConforming(
            f"its purifier says that its forward noise smooths images with {stated:g}, but it "
            "takes more of an image than the noisy one."
        )
    return found if found is not None and found >= sigma else None


# ------------------------------------------------------------------------------------ what is done


def certify(
    job: CertificateJob,
    out: Path,
    *,
    resume: bool = True,
    wait: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Count the votes of `job`, or what is missing of them, and write them below `out`.

    Args:
        job: The job to run.
        out: The folder of results.
        resume: Continue what is there. Otherwise it is thrown away first.
        wait: True to wait until another command that is at work on it is done.
        progress: Told how far the job is, in votes.

    Returns:
        The path of the certificate.

    Raises:
        BadRequest: `out` holds another request under this name.
        Busy: Another command is at work on it.
        NotConforming: The votes of the defense aren't independent.
        AttackFailed: The defense gave numbers that can't be used.
    """
    # Checkpoints that must be fetched first are missed here, before anything is deleted.
    job.subject.weights()
    path = job.path(out)
    folder = work_folder(path, out)
    with locked(folder, what="run of this job", wait=wait):
        if not resume:
            shutil.rmtree(folder, ignore_errors=True)
            path.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        held = Certificate.read(path) if path.is_file() else None
        begun = identity_of(held) if held else read_request(folder)
        groups = list(folder.glob("group-*"))
        if not held and not groups:
            begun = None
        max_batch = _max_batch(job, begun)
        identity = job.identity(max_batch)
        if begun is not None:
            refuse_other_request(identity, begun, path if held else folder)
        else:
            for group in groups:
                group.unlink()
        if held and held.covers(job.examples):
            return path
        images = job.subject.data(verified=True)
        labels = job.labels(images)
        ids, size = job.track_ids[: job.examples], group_size(job.smoothing, max_batch)
        pieces = Pieces.read(
            folder,
            identity,
            [ids[i : i + size] for i in range(0, len(ids), size)],
            examples=job.examples,
            attacks=0,
            draws=0,
        )
        write_request(folder, identity)
        full_float32()
        defense = job.defense()
        size_of_own = _probe(job, images.select(job.track_ids[:PROBED])[0], max_batch)
        nfe = _count(pieces, job, defense, images, max_batch, size_of_own is None, progress)
        _assemble(job, identity, pieces, images, labels, size_of_own, nfe).write(path)
    return path


def _probe(job: CertificateJob, images: Tensor, max_batch: int) -> float | None:
    """The size of the forward noise where it smooths; refuses votes that aren't independent.

    In float64, in which rounding can't be taken for a difference, and on half as many votes as a
    pass of the run has, which take as much memory.
    """
    exact = job.subject.defense(device=job.device, dtype=torch.float64)
    few = images.to(job.device, torch.float64)
    pass_size = largest_pass(job.smoothing, job.examples, max_batch)
    check_votes(exact, few[:1], pass_size // 2)
    return forward_noise(exact, few, job.smoothing.sigma)


def is_complete(job: CertificateJob, out: Path) -> bool:
    """Tell whether `out` holds a certificate for all that `job` asks for."""
    path = job.path(out)
    if not path.is_file():
        return False
    held = Certificate.read(path)
    begun = identity_of(held)
    return begun == job.identity(job.max_batch or held.arithmetic.max_batch) and held.covers(
        job.examples
    )


def identity_of(held: Certificate) -> dict[str, Any]:
    """The identity of the job that wrote `held`."""
    code = held.provenance.code
    return {
        "dbp_bench": held.provenance.dbp_bench,
        "schema": held.schema_version,
        **{name: getattr(held, name) for name in _RECORDED},
        "weights": held.provenance.weights,
        **({"code": code} if code else {}),
        "device": held.arithmetic.device,
        "max_batch": held.arithmetic.max_batch,
    }


def _max_batch(job: CertificateJob, begun: Mapping[str, Any] | None) -> int:
    """Votes in one pass: as asked, as begun, or as many as half of the memory takes."""
    if job.max_batch is not None:
        return job.max_batch
    if begun is not None and isinstance(held := begun.get("max_batch"), int) and held > 0:
        return held
    return fitting(job.device, forward_bytes(job.subject, job.device))


def fitting(device: str, image_bytes: int) -> int:
    """The power of two of images that half of the free memory takes, at most the largest."""
    room = free_bytes(torch.device(device)) // 2 // max(1, image_bytes)
    return min(LARGEST[torch.device(device).type], 1 << max(0, room.bit_length() - 1))


def _count(
    pieces: Pieces,
    job: CertificateJob,
    defense: Defense,
    images: DataSet,
    max_batch: int,
    added: bool,
    progress: Progress | None,
) -> int:
    """Count the votes that are missing, and store them; gives the NFE of one vote."""
    progress = progress or Progress()
    classes = job.subject.facts.classes
    held = [
        _counts(state, len(ids), classes, job.smoothing)
        for state, ids in zip(pieces.states, pieces.groups, strict=True)
    ]
    missing = [
        len(ids) * (job.votes - sum(counts.done.values()))
        for counts, ids in zip(held, pieces.groups, strict=True)
    ]
    progress.start(sum(missing))
    for index, (counts, ids) in enumerate(zip(held, pieces.groups, strict=True)):
        if not missing[index]:
            continue
        group, _ = images.select(ids)
        # The evaluations of the denoiser for all votes, those of earlier runs included.
        earlier = int(pieces.states[index]["nfe_in_all"]) if any(counts.done.values()) else 0
        before, written = defense.counter.images, time.monotonic()
        for counted in count(
            defense.classes,
            group.to(job.device),
            ids,
            job.smoothing,
            classes=classes,
            seed=job.seed,
            max_batch=max_batch,
            added=added,
            counts=counts,
            tick=progress.tick,
        ):
            if time.monotonic() - written < SECONDS and not _is_done(counted, job.smoothing):
                continue
            pieces.states[index] = _state(counted, earlier + defense.counter.images - before)
            pieces.write(index)
            written = time.monotonic()
    in_all = sum(int(state["nfe_in_all"]) for state in pieces.states)
    return round(in_all / (job.votes * sum(map(len, pieces.groups))))


def _is_done(counts: Counts, smoothing: Smoothing) -> bool:
    return counts.done == {"selection": smoothing.n0, "estimation": smoothing.n}


def _state(counts: Counts, nfe: int) -> State:
    """The counts of a group as its file holds them."""
    return {
        "selection": counts.selection.clone(),
        "estimation": counts.estimation.clone(),
        "done": torch.tensor([counts.done["selection"], counts.done["estimation"]]),
        "nfe_in_all": torch.tensor(nfe),
    }


def _counts(state: State, images: int, classes: int, smoothing: Smoothing) -> Counts:
    """The counts in a file; nothing where it isn't sound, whoever wrote it."""
    none = Counts.none(images, classes)
    try:
        tables = (state["selection"], state["estimation"])
        done = [int(number) for number in state["done"]]
        nfe = int(state["nfe_in_all"])
    except (KeyError, TypeError, ValueError, RuntimeError):
        return none
    most = (smoothing.n0, smoothing.n)
    if len(done) != 2 or nfe < 0 or any(not 0 <= d <= m for d, m in zip(done, most, strict=True)):
        return none
    for table, votes in zip(tables, done, strict=True):
        if (table.shape, table.dtype) != (none.selection.shape, torch.int64):
            return none
        if bool((table < 0).any()) or bool((table.sum(1) > votes).any()):
            return none
    return Counts(tables[0], tables[1], {"selection": done[0], "estimation": done[1]})


def _assemble(
    job: CertificateJob,
    identity: dict[str, Any],
    pieces: Pieces,
    images: DataSet,
    labels: list[int],
    size: float | None,
    nfe: int,
) -> Certificate:
    """The certificate of a job whose votes are all counted."""
    ids = job.track_ids[: job.examples]
    tables = {
        phase: torch.cat([state[phase] for state in pieces.states]).tolist()
        for phase in ("selection", "estimation")
    }
    votes = Votes(**tables)
    entries = {"track": job.subject.track.sha256, "defense": job.subject.entry.sha256}
    return Certificate(
        schema=SCHEMA,
        **{name: identity[name] for name in _RECORDED},
        noise="added" if size is None else "forward",
        size=job.smoothing.sigma if size is None else size,
        overrides=sorted(job.given),
        classes=job.subject.facts.classes,
        ids=ids,
        labels=labels,
        votes=votes,
        nfe=nfe,
        arithmetic=Arithmetic(
            device=torch.device(job.device).type,  # type: ignore[arg-type]
            dtype="float32",
            batch_size=group_size(job.smoothing, identity["max_batch"]),
            max_batch=identity["max_batch"],
        ),
        provenance=provenance(
            {**identity, "attack": "", "effort": {}}, entries, images.digest(ids)
        ),
        digest=votes_digest(ids, labels, votes),
    )
