"""The functions that a script calls: they evaluate any torch module, or purifier, from Python.

``dbp_bench.evaluate`` and its relatives are here. They build the same jobs that ``dbp-bench run``
builds, from objects in place of names, and run them with the same code.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import torch
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from torch import Tensor, nn

from dbp_bench import certification
from dbp_bench.certificate import ALPHA, Certified, certified, check_alpha
from dbp_bench.checks.conformance import IMAGES, check_sites, check_subject
from dbp_bench.checks.record import Memo
from dbp_bench.declaration import Strict, explain
from dbp_bench.defense import Defense, Identity, Purifier
from dbp_bench.entries.defense import BASE
from dbp_bench.entries.fields import NAME, Eps
from dbp_bench.entries.given import FEW, Classifier, Given, ScriptRegistry, base_of, given_on
from dbp_bench.entries.registry import Registry
from dbp_bench.entries.subject import Subject
from dbp_bench.errors import BadRequest, DbpError
from dbp_bench.provenance import full_float32
from dbp_bench.runs.certify import forward_noise
from dbp_bench.runs.execute import execute
from dbp_bench.runs.job import Job, Overrides, plan, why_same
from dbp_bench.runs.progress import progress_of_count, progress_of_job
from dbp_bench.taped import Taped
from dbp_bench.threat import Attack, Norm
from dbp_bench.weights import places

if TYPE_CHECKING:
    from dbp_bench.reporting.script import Report


def _name(name: str) -> str:
    if not re.match(NAME, name) or name in ("all", BASE):
        raise ValueError(
            f"{name!r}: give lower-case letters, digits, dots and dashes, not {BASE} or all"
        )
    return name


def _place(place: object) -> Path:
    if not isinstance(place, str | PathLike):
        raise ValueError(f"{place!r}: give the path of a file or folder")
    return Path(place)


Name = Annotated[str, AfterValidator(_name)]
Place = Annotated[Path, BeforeValidator(_place)]
"""A path, or its text."""
Count = Annotated[int, Field(ge=1)]


class _Asked(Strict):
    """The arguments of :func:`evaluate` and its relatives, but for objects."""

    name: Name = "mine"
    norm: Norm | None = None
    eps: Eps | None = None
    threats: list[str] | None = None
    options: dict[str, Any] | None = None
    track: str | None = None
    sites: dict[str, Name] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    draws: Count | None = None
    examples: Count | None = None
    batch_size: Count | None = None
    max_batch: Count | None = None
    device: Literal["cpu", "cuda"] | None = None
    data: Place | None = None
    out: Place | None = None
    entries: list[Place] = Field(default_factory=list)

    @classmethod
    def of(cls, **given: Any) -> "_Asked":
        """The arguments, of the types that they must have.

        Raises:
            BadRequest: One can't be right.
        """
        plain = {
            # Numbers of NumPy and of torch are numbers.
            key: value.item() if getattr(value, "ndim", None) == 0 else value
            for key, value in given.items()
        }
        try:
            return cls(**plain)
        except ValidationError as error:
            raise BadRequest(explain(error, cls)) from None


_OPTION = re.compile(
    r"(?<!\S)--(data|draws|examples|batch-size|max-batch|seed|set|attack|threat|eps|out|no-resume"
    r"|trust-code|sigma|n0|n|alpha)\b"
)
_ARGUMENTS = {
    "set": "options",
    "threat": "threats",
    "no-resume": "resume=False",
    "trust-code": "trust_code=True",
}


@contextmanager
def _in_arguments() -> Iterator[None]:
    """Errors name the arguments of a function where they would name options of a command."""
    try:
        yield
    except DbpError as error:
        parts = str(error).split("`")  # Every second part is a command.
        parts[::2] = [
            _OPTION.sub(lambda found: _ARGUMENTS.get(found[1], found[1].replace("-", "_")), part)
            for part in parts[::2]
        ]
        raise type(error)("`".join(parts)) from error.__cause__


@_in_arguments()
def evaluate(
    purifier: Purifier | Callable[[Tensor], Tensor],
    classifier: Classifier | None = None,
    images: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    norm: Norm | None = None,
    eps: float | None = None,
    threats: Sequence[str] = ("eot", "dwbox"),
    attack: "str | Attack | None" = None,
    options: Mapping[str, Any] | None = None,
    track: str | None = None,
    data: str | Path | None = None,
    examples: int | None = None,
    name: str = "mine",
    sites: Mapping[str, str] | None = None,
    seed: int = 0,
    draws: int | None = None,
    batch_size: int | None = None,
    max_batch: int | None = None,
    device: str | None = None,
    out: str | Path | None = None,
    resume: bool = True,
    entries: Sequence[str | Path] = (),
    trust_code: bool = False,
    quiet: bool = False,
) -> "Report":
    """Attack a purification defense, and the classifier that it protects, under threat models.

    A torch module or function that draws by itself (``torch.randn_like`` somewhere inside) is run
    under a tape, without a change to it: see :class:`dbp_bench.Taped`. It is probed first, and
    refused where its draws can't be told apart. No weight gets a gradient, and the classifier is
    put in eval mode. Called again with the same arguments, the evaluation continues where it was
    stopped.

    Args:
        purifier: Maps images ``(b, c, h, w)`` in [0, 1] to purified images; or a
            :class:`dbp_bench.Purifier`; or a whole defense, which maps images to logits ``(b, k)``.
        classifier: The base classifier: it maps images in [0, 1] to logits ``(b, k)``. It is
            evaluated too, without the purifier.
        images: ``(n, c, h, w)`` in [0, 1].
        labels: ``(n,)``, whole numbers in 0 ... k - 1.
        norm: The norm of the perturbation: linf, l2 or l1.
        eps: Its largest size, in [0, 1] pixel units: 8/255, not 8.
        threats: Names of threat models: what the attacker knows, and the attack by default.
        attack: In place of the threats' own: a name, or an object like :class:`dbp_bench.Attack`.
        options: Options of the attack, by name.
        track: A track of the package in place of `classifier`, `images`, `labels` and `norm`:
            results stand beside the others of the track.
        data: Where the data set of `track` is; see ``dbp-bench run --help``.
        examples: The first N images only.
        name: The defense's name in tables: lower-case letters, digits, dots and dashes.
        sites: By ``file.py:line`` the site of what a module draws there; see
            :class:`dbp_bench.Taped`.
        seed: It decides every draw: a whole number.
        draws: Draws that evaluate each image, in place of the threats' own number.
        batch_size: Images evaluated together.
        max_batch: Images x EoT samples in one pass through the networks, at most.
        device: With a `track`, "cpu" or "cuda". Otherwise it is the one that the images are on.
        out: The folder of results; a cache, if not given.
        resume: Whether what is there is continued, and not replaced.
        entries: Folders with entries of your own, such as tracks and threat models.
        trust_code: Whether code that an entry names outside this package may run.
        quiet: Whether no progress is shown.

    Returns:
        A table that prints itself, with intervals, and the results behind it.

    Raises:
        BadRequest: An argument can't be right.
        NotConforming: The purifier can't be evaluated as it is; the message says why.
        AttackFailed: The attack or the defense gave numbers that can't be used.
    """
    from rich.console import Console

    from dbp_bench.reporting.script import Report

    asked = _Asked.of(
        name=name,
        norm=norm,
        eps=eps,
        threats=_listed(threats),
        options=dict(options) if isinstance(options, Mapping) else options,
        track=track,
        sites=sites,
        seed=seed,
        draws=draws,
        examples=examples,
        batch_size=batch_size,
        max_batch=max_batch,
        device=None if device is None else str(device).partition(":")[0],
        data=data,
        out=out,
        entries=_listed(entries),
    )
    own = Registry(asked.entries, trust_code=trust_code, data=asked.data)
    base: Subject
    home: str
    if asked.track is not None:
        objects = {"classifier": classifier, "images": images, "labels": labels, "norm": norm}
        doubled = [key for key, value in objects.items() if value is not None]
        if doubled:
            raise BadRequest(
                f"{doubled[0]}: track {track!r} has its own; leave out one of the two."
            )
        base, home = own.subject(BASE, asked.track), asked.device or "cpu"
        _check_seen(home)
    else:
        base = _base(classifier, images, labels, asked.norm, asked.eps)
        home = base.home
        if asked.device not in (None, home):
            raise BadRequest(
                f"device={device!r}, but the images are on {home}: move images, classifier and "
                "purifier, and leave out the device."
            )
    few = base.data().select(base.ids()[:FEW])[0].to(home)
    mine = given_on(base, asked.name, _as_purifier(purifier, few, asked.sites), home)
    if not isinstance(mine.purifier, Taped):
        check_sites(mine.defense(), few)
    registry = ScriptRegistry(own, {BASE: base, asked.name: mine}, attack)
    planned = plan(
        registry,
        base.track.name,
        [asked.name, BASE],
        asked.threats or [],
        attack=registry.attack_name,
        seed=asked.seed,
        device=home,
        overrides=Overrides(
            effort=asked.options or {},
            eps=asked.eps,
            draws=asked.draws,
            examples=asked.examples,
            batch_size=asked.batch_size,
            max_batch=asked.max_batch,
        ),
    )
    console, memo = Console(stderr=True, quiet=quiet, markup=False), Memo()
    paths = []
    for job in (item.job for item in planned if item.instead is None):
        with progress_of_job(console, job) as progress:
            folder = asked.out or _cache_of(job)
            paths.append(execute(job, folder, resume=resume, progress=progress, memo=memo))
    same = {
        item.job.threat.name: (
            item.instead.threat.name,
            why_same(item.job, item.instead.threat.entry),
        )
        for item in planned
        if item.instead is not None and item.job.subject.name == asked.name
    }
    return Report.of(asked.name, paths, registry, same)


@_in_arguments()
def certify(
    purifier: Purifier | Callable[[Tensor], Tensor] | None,
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    sigma: float,
    n0: int = 100,
    n: int = 1000,
    alpha: float = ALPHA,
    sites: Mapping[str, str] | None = None,
    seed: int = 0,
    max_batch: int = 1024,
    quiet: bool = False,
) -> Certified:
    """Certify a defense by randomised smoothing (Cohen et al. 2019); see ``dbp-bench certify``.

    Gaussian noise is added to the images that the purifier is given, unless its own forward noise
    is of at least that size in pixels and all that it takes of an image is the noisy one: it says
    so in an attribute `smoothing_sigma`, or has a `t_star` or `sigma_max` of such noise, and is
    tried. Nothing is stored.

    Args:
        purifier: See :func:`evaluate`; None for a classifier alone.
        classifier: The base classifier: logits ``(b, k)`` for images, which noise takes out of
            [0, 1].
        images: ``(m, c, h, w)`` in [0, 1].
        labels: ``(m,)``.
        sigma: Standard deviation of the noise, in [0, 1] pixel units.
        n0: Votes that choose the class of an image.
        n: Fresh votes that bound its probability.
        alpha: The failure probability of a certificate.
        sites: See :func:`evaluate`.
        seed: It decides every draw.
        max_batch: Votes in one pass, at most.
        quiet: Whether no progress is shown.

    Returns:
        The certified class and l2 radius of each image.

    Raises:
        BadRequest: An argument can't be right.
        NotConforming: The votes of the defense aren't independent.
        AttackFailed: The defense gave numbers that can't be used.
    """
    from rich.console import Console

    asked = _Asked.of(sites=sites, seed=seed, max_batch=max_batch)
    smoothing = certification.Smoothing(float(sigma), n0, n)
    check_alpha(alpha)
    base = base_of(classifier, images, labels, "l2", 0.0)
    few, home = base.data().select(base.ids()[:FEW])[0].to(base.home), base.home
    made = Identity() if purifier is None else _as_purifier(purifier, few, asked.sites)
    subject = given_on(base, "mine", made, home)
    defense = subject.defense()
    if not isinstance(subject.purifier, Taped):
        check_sites(defense, few)
    full_float32()
    pass_size = certification.largest_pass(smoothing, len(base.ids()), max_batch)
    certification.check_votes(defense, few[:1], pass_size)
    added = forward_noise(defense, few, smoothing.sigma) is None
    ids, console = base.ids(), Console(stderr=True, quiet=quiet, markup=False)
    size = certification.group_size(smoothing, max_batch)
    parts: list[certification.Counts] = []
    with progress_of_count(console, "certificate", "votes") as progress:
        progress.start(len(ids) * (n0 + n))
        for start in range(0, len(ids), size):
            group = ids[start : start + size]
            *_, last = certification.count(
                defense.classes,
                base.data().select(group)[0].to(home),
                group,
                smoothing,
                classes=subject.facts.classes,
                seed=seed,
                max_batch=max_batch,
                added=added,
                tick=progress.tick,
            )
            parts.append(last)
    selection, estimation = (
        torch.cat([getattr(each, phase) for each in parts]).numpy()
        for phase in ("selection", "estimation")
    )
    right = base.data().labels_of(ids)
    return certified(selection, estimation, right, n=n, sigma=smoothing.sigma, alpha=alpha)


def _check_seen(device: str) -> None:
    """Refuse a GPU where there is none."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise BadRequest(f"device={device!r}: this torch sees no GPU.")


def _listed(names: object) -> object:
    """One name or several as a list."""
    if isinstance(names, str) or not isinstance(names, Iterable):
        return [names]
    return list(names)


def _cache_of(job: Job) -> Path:
    """A folder of its own for each request: what is asked otherwise never meets it."""
    digest = sha256(json.dumps(job.identity(), sort_keys=True).encode()).hexdigest()
    return places.cache() / "scripts" / digest[:16]


def _base(
    classifier: Classifier | None = None,
    images: Tensor | None = None,
    labels: Tensor | None = None,
    norm: Norm | None = None,
    eps: float | None = None,
) -> Given:
    """The base classifier on the images.

    Raises:
        BadRequest: Something is not given.
    """
    if classifier is None or images is None or labels is None or norm is None or eps is None:
        raise BadRequest(
            "evaluate needs a classifier, images, labels, a norm and an eps, or a track that has "
            "them: track='digits-linf'."
        )
    return base_of(classifier, images, labels, norm, eps)


def _as_purifier(
    purifier: Purifier | Callable[[Tensor], Tensor],
    few: Tensor,
    sites: Mapping[str, str] | None,
) -> Purifier:
    """The purifier itself, or a module under a tape, which is probed on a `few` images.

    Raises:
        BadRequest: Sites are given for a purifier that says its own.
        NotConforming: The module's draws can't be told apart.
    """
    found = None if isinstance(purifier, Taped) else getattr(purifier, "sites", None)
    if found is None and not isinstance(purifier, Taped):
        taped = Taped(cast(Callable[[Tensor], Tensor], purifier), sites)
        taped.probe(few)
        return taped
    if sites is not None:
        raise BadRequest("sites: this purifier says itself where it draws.")
    if found is not None and not isinstance(found, frozenset):
        raise BadRequest(f"the purifier's sites are a {type(found).__name__}: give a frozenset.")
    if isinstance(purifier, Taped) and purifier.unprobed:
        purifier.probe(few)
    return cast(Purifier, purifier)


@dataclass(frozen=True)
class Checked:
    """The findings of :func:`check`; they print as one line for each test."""

    faults: Mapping[str, str | None]
    """By test, why the defense fails it; None where it passes."""
    trace: str
    """The lines at which a module under a tape draws; empty for another purifier."""

    @property
    def passed(self) -> bool:
        """True if no test failed."""
        return not any(self.faults.values())

    def __str__(self) -> str:
        """A line for each test, and the trace."""
        lines = [
            f"FAIL  {title}: {fault}" if fault else f"pass  {title}"
            for title, fault in self.faults.items()
        ]
        return "\n".join([*lines, *(["", self.trace] if self.trace else [])])


@_in_arguments()
def check(
    purifier: Purifier | Callable[[Tensor], Tensor],
    classifier: Classifier,
    images: Tensor,
    *,
    sites: Mapping[str, str] | None = None,
) -> Checked:
    """Test a purifier against the rules that every defense must keep.

    Args:
        purifier: See :func:`evaluate`.
        classifier: The base classifier.
        images: A few images ``(n, c, h, w)`` in [0, 1].
        sites: See :func:`evaluate`.

    Raises:
        BadRequest: An argument can't be right.
        NotConforming: A module's draws can't be told apart.
    """
    asked, few = _Asked.of(sites=sites), images[:IMAGES]
    labels = torch.zeros(len(few), dtype=torch.int64)
    base = base_of(classifier, few, labels, "linf", 0.0)
    made = _as_purifier(purifier, few, asked.sites)
    subject = given_on(base, "mine", made, base.home)
    trace = str(made.record) if isinstance(made, Taped) else ""
    return Checked(dict(check_subject(subject)), trace)


@_in_arguments()
def load_defense(
    name: str,
    track: str,
    *,
    device: str = "cpu",
    entries: Sequence[str | Path] = (),
    trust_code: bool = False,
) -> Defense:
    """The defense called `name` as it is set up on `track`, with its weights.

    Its ``purifier`` and ``classifier`` can be given to :func:`evaluate`.

    Args:
        name: See ``dbp-bench list defenses``.
        track: See ``dbp-bench list tracks``.
        device: "cpu" or "cuda".
        entries: Folders with entries of your own.
        trust_code: Whether code that an entry names outside this package may run.

    Raises:
        BadRequest: There is no GPU.
        UnknownName: There is no such defense or track.
        BadEntry: The entry can't be built.
        BadWeights: Weights are missing; the message gives the command that fetches them.
    """
    _check_seen(device)
    asked = _Asked.of(entries=_listed(entries))
    registry = Registry(asked.entries, trust_code=trust_code)
    return registry.subject(name, track).defense(device=device)


@dataclass(frozen=True)
class LoadedTrack:
    """A track: images, labels, the base classifier and the budget."""

    name: str
    norm: Norm
    eps: float
    """In [0, 1] pixel units."""
    subject: Subject

    @cached_property
    def _pairs(self) -> tuple[Tensor, Tensor]:
        with _in_arguments():
            return self.subject.data(verified=True).select(self.subject.ids())

    @property
    def images(self) -> Tensor:
        """``(n, c, h, w)``, float32 in [0, 1]."""
        return self._pairs[0]

    @property
    def labels(self) -> Tensor:
        """``(n,)``, int64."""
        return self._pairs[1]

    @cached_property
    def classifier(self) -> nn.Module:
        """The base classifier: logits ``(b, k)`` for images in [0, 1]."""
        return self.subject.defense().classifier


@_in_arguments()
def load_track(
    name: str, *, data: str | Path | None = None, entries: Sequence[str | Path] = ()
) -> LoadedTrack:
    """The track called `name`; images and classifier are read when they are asked for.

    Args:
        name: See ``dbp-bench list tracks``.
        data: Where data sets are: a file or a folder; see ``dbp-bench run --help``.
        entries: Folders with entries of your own.

    Raises:
        UnknownName: There is no such track.
    """
    asked = _Asked.of(data=data, entries=_listed(entries))
    registry = Registry(asked.entries, data=asked.data)
    entry = registry.track(name).entry
    return LoadedTrack(name, entry.norm, float(entry.eps), registry.subject(BASE, name))
