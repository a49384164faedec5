"""A job: one defense under one threat model on one track for one seed, with every default filled.

Resolving one imports no torch, so that plans and refusals are quick.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dbp_bench import __version__, data
from dbp_bench.entries import outside
from dbp_bench.entries.registry import (
    EFFORTS,
    KNOWN_DRAWS,
    CheckpointRef,
    DefenseEntry,
    Effort,
    Entry,
    NetworkRef,
    Registry,
    Setting,
    Surrogate,
    Threat,
    Track,
    check_eps,
    explain,
)
from dbp_bench.errors import BadEntry, BadRequest, did_you_mean
from dbp_bench.passes import Passes, Setup
from dbp_bench.result import Result, result_path, searched_effort
from dbp_bench.weights import files as weight_files
from dbp_bench.weights import store


@dataclass(frozen=True, slots=True)
class Overrides:
    """What the user set against the entries; None leaves the entry's."""

    effort: dict[str, Any] = field(default_factory=dict)
    eps: float | None = None
    draws: int | None = None
    examples: int | None = None
    batch_size: int | None = None
    rows: int | None = None

    def names(self) -> list[str]:
        """The fields that change what is measured."""
        single = ("eps", "draws", "batch_size", "rows")
        return sorted([*self.effort, *(n for n in single if getattr(self, n) is not None)])


@dataclass(frozen=True, slots=True)
class Job:
    """All that decides the outcomes, except the arithmetic of the machine."""

    track: Entry[Track]
    defense: Entry[DefenseEntry]
    threat: Entry[Threat]
    setting: Setting
    seed: int
    device: str
    eps: float
    knows: list[str]
    effort: dict[str, Any]
    draws: int
    track_ids: list[int]
    """All images of the track: groups are cut from these, whatever number is asked for."""
    examples: int
    batch_size: int
    rows: int
    overrides: list[str]
    source: Entry[DefenseEntry] | None = None
    """The defense that a transfer attack searches in."""
    code: dict[str, str] = field(default_factory=dict)
    """sha256 of the code outside dbp-bench that the entries name, by top-level module."""

    @property
    def sites(self) -> list[str]:
        """Where the defense draws noise, sorted."""
        return sorted(self.defense.entry.sites)

    @property
    def label(self) -> str:
        """For messages."""
        return f"{self.defense.name} / {self.threat.name}"

    @property
    def groups(self) -> list[list[int]]:
        """Ids of each group of images to evaluate, whole groups even where fewer are asked for."""
        size = self.batch_size
        return [self.track_ids[i : i + size] for i in range(0, self.examples, size)]

    @property
    def attacks(self) -> int:
        """How often each image is attacked: once, or once for each known draw."""
        return self.draws if self.knows else 1

    @property
    def copies(self) -> int:
        """Gradient draws that are computed per step: one where nothing is hidden."""
        return 1 if self.knows == self.sites else int(self.effort.get("eot", 1))

    @property
    def _searched(self) -> tuple[Effort, Setup]:
        """The effort, and what it is spent on: of a transfer attack, its source."""
        hidden = self.knows != self.sites if self.source is None else bool(self.source.entry.sites)
        track = self.track.entry
        setup = Setup(hidden, track.norm, self.eps, data.facts_of(track.data).classes)
        return EFFORTS[self.threat.entry.attack].model_validate(self.effort), setup

    @property
    def passes(self) -> Passes:
        """That one attack takes of one image: of a transfer attack, through its source."""
        effort, setup = self._searched
        return effort.passes(setup)

    @property
    def misfit(self) -> str | None:
        """Why the attack cannot run on this defense and track, and what would do."""
        effort, setup = self._searched
        return effort.misfit(setup)

    @property
    def gradients(self) -> int:
        """Image gradients that the whole job takes, padding included."""
        images = sum(len(group) for group in self.groups)
        return images * self.attacks * self.passes.gradients

    @property
    def options(self) -> dict[str, Any]:
        """How the defense is set up, as recorded."""
        return self.setting.recorded

    @property
    def surrogate(self) -> dict[str, Any] | None:
        """What is differentiated in place of the defense, where the effort says so."""
        if self.effort.get("gradient") != "declared-surrogate":
            return None
        return declared_surrogate(self.defense, self.track.name).model_dump()

    def path(self, out: Path) -> Path:
        """Where the result goes, below the folder `out`."""
        return result_path(out, self.track.name, self.defense.name, self.threat.name, self.seed)

    def identity(self, *, planned: bool = False) -> dict[str, Any]:
        """What must be equal for results to be continued; images and draws can be added.

        Where it is only `planned`, the sha256 of a checkpoint that isn't in the cache is None.

        Raises:
            BadWeights: A checkpoint isn't in the cache, and it isn't only planned.
        """
        sha256 = _sha256_if_there if planned else _sha256
        networks = {k: sha256(ref) for k, ref in sorted(self.setting.refs.items())}
        if self.source is not None:
            setting = self.source.entry.setting(
                self.track.name, self.source.name, str(self.source.path)
            )
            for key, ref in sorted(setting.refs.items()):
                networks[f"source.{key}"] = sha256(ref)
        return {
            "dbp_bench": __version__,
            "track": self.track.name,
            "defense": self.defense.name,
            "threat": self.threat.name,
            "seed": self.seed,
            "norm": self.track.entry.norm,
            "eps": self.eps,
            "sites": self.sites,
            "knows": self.knows,
            "attack": self.threat.entry.attack,
            "effort": self.effort,
            "options": self.options,
            **({} if self.surrogate is None else {"surrogate": self.surrogate}),
            "weights": {"classifier": sha256(self.track.entry.classifier), **networks},
            **({"code": self.code} if self.code else {}),
            "device": self.device,
            "batch_size": self.batch_size,
            "rows": self.rows,
        }

    def same_setting(self, other: "Job") -> bool:
        """Whether `other` measures all of this, under another threat's name."""
        mine, its = (
            {
                **job.identity(planned=True),
                "threat": "",
                "effort": searched_effort(job.effort, job.knows, job.sites),
            }
            for job in (self, other)
        )
        return mine == its and other.draws >= self.draws and other.examples >= self.examples


def _sha256(ref: NetworkRef | CheckpointRef) -> str | None:
    return ref.sha256


def _sha256_if_there(ref: NetworkRef | CheckpointRef) -> str | None:
    there = isinstance(ref, NetworkRef) or store.has(ref.checkpoint)
    return ref.sha256 if there else None


def resolve(
    registry: Registry,
    track: str,
    defense: str,
    threat: str,
    *,
    seed: int,
    device: str,
    overrides: Overrides,
) -> Job:
    """The job that these names and options mean.

    Raises:
        UnknownName: No entry has one of the names.
        BadEntry: An entry doesn't say what it must.
        BadRequest: An option can't be right.
    """
    track_entry, defense_entry = registry.track(track), registry.defense(defense)
    threat_entry = registry.threat(threat)
    declared = threat_entry.entry
    effort = _effort(threat_entry, overrides)
    eps = declared.eps if overrides.eps is None else overrides.eps
    eps = track_entry.entry.eps if eps is None else eps
    if eps < 0:
        raise BadRequest(f"--eps {eps:g}: a radius cannot be negative.")
    try:
        check_eps(track_entry.entry.norm, eps)
    except ValueError as error:
        raise BadRequest(f"--{error}") from None
    for name, least in (("draws", 1), ("batch_size", 1), ("rows", 1)):
        value = getattr(overrides, name)
        if value is not None and value < least:
            raise BadRequest(f"--{name.replace('_', '-')} {value}: must be {least} or more.")
    if not 0 <= seed < 2**63:
        raise BadRequest(f"--seed {seed}: must be in 0 ... 2^63 - 1.")
    sites = defense_entry.entry.sites
    knows = declared.sites(sites)
    draws = overrides.draws or declared.draws
    if knows and draws < KNOWN_DRAWS:
        raise BadRequest(
            f"--draws {draws}: {threat} needs at least {KNOWN_DRAWS} known draws; one draw is one "
            "trajectory."
        )
    unheard = declared.named_sites - set(sites)
    if unheard and (unheard := unheard - registry.sites):
        name = min(unheard)
        raise BadEntry(
            f"{threat_entry.path}: knows: no defense draws noise at {name!r}."
            f"{did_you_mean(name, registry.sites)}"
        )
    if effort.get("gradient") == "declared-surrogate":
        declared_surrogate(defense_entry, track)
    try:
        ids = data.split_ids(track_entry.entry.data, track_entry.entry.split)
    except BadEntry as error:
        raise BadEntry(f"{track_entry.path}: {error}") from None
    setting = defense_entry.entry.setting(track, defense, str(defense_entry.path))
    source = _source(registry, effort, track)
    job = Job(
        track=track_entry,
        defense=defense_entry,
        threat=threat_entry,
        setting=setting,
        seed=seed,
        device=device,
        eps=eps,
        knows=knows,
        effort=effort,
        # Without noise every draw is the same.
        draws=draws if sites else 1,
        track_ids=ids,
        examples=len(data.first(ids, overrides.examples)),
        batch_size=overrides.batch_size or track_entry.entry.batch_size,
        rows=overrides.rows or track_entry.entry.rows,
        overrides=overrides.names(),
        source=source,
        code=outside.code(_dotted(track_entry, track, defense_entry, source), registry.folders),
    )
    if job.misfit is not None:
        raise BadRequest(f"{threat_entry.path}: {job.misfit}.")
    return job


def _dotted(track: Entry[Track], name: str, *defenses: Entry[DefenseEntry] | None) -> Iterator[str]:
    """The code that entries name for the track called `name`."""
    networks = [track.entry.classifier]
    for defense in filter(None, defenses):
        yield defense.entry.factory
        networks += defense.entry.setting(name, defense.name, str(defense.path)).refs.values()
    yield from (ref.network for ref in networks if isinstance(ref, NetworkRef))


def declared_surrogate(defense: Entry[DefenseEntry], track: str) -> Surrogate:
    """What attacks on `track` may differentiate in place of `defense`.

    Raises:
        BadRequest: The entry declares nothing.
    """
    surrogate = defense.entry.setting(track, defense.name, str(defense.path)).surrogate
    if surrogate is None:
        raise BadRequest(
            f"gradient: declared-surrogate, but {defense.path} declares none for {track!r}. Take "
            "exact, or add `surrogate: {options: ...}` to its setting."
        )
    return surrogate


def _source(registry: Registry, effort: dict[str, Any], track: str) -> Entry[DefenseEntry] | None:
    """The defense that an effort names as its source, with a setting for `track`."""
    if "source" not in effort:
        return None
    source = registry.defense(effort["source"])
    source.entry.setting(track, source.name, str(source.path))
    return source


def _effort(threat: Entry[Threat], overrides: Overrides) -> dict[str, Any]:
    model = EFFORTS[threat.entry.attack]
    for name in overrides.effort:
        if name not in model.model_fields:
            raise BadRequest(
                f"--{name.replace('_', '-')}: attack {threat.entry.attack!r} of threat "
                f"{threat.name!r} takes no such option; it takes "
                f"{', '.join(model.model_fields)}."
            )
    try:
        effort = model.model_validate({**threat.entry.effort, **overrides.effort})
    except ValidationError as error:
        raise BadRequest(f"{threat.name}: {explain(error, model)}") from None
    return effort.model_dump()


_BORROWED = {"autoattack", "torchattacks"}
"""Attacks of optional packages."""


def refuse_borrowed(job: Job) -> None:
    """Refuse a job whose attack is another package's and can't run, before anything is computed.

    Raises:
        BadEntry: The package has no such attack, or it takes other options.
        BadExtra: The package isn't there.
        AttackFailed: The attack doesn't search in the norm of the track.
    """
    parts = [*job.effort.get("members", []), job.effort.get("search", {})]
    if not _BORROWED & {job.threat.entry.attack, *(part.get("attack") for part in parts)}:
        return
    from dbp_bench import attacks, threat

    try:
        budget = threat.budget(job.track.entry.norm, job.eps)
        attacks.check(job.threat.entry.attack, job.effort, budget)
    except BadEntry as error:
        raise BadEntry(f"{job.threat.path}: {error}") from None


@dataclass(frozen=True, slots=True)
class Planned:
    """A job, or the job that measures the same thing and runs instead."""

    job: Job
    instead: Job | None


def plan(
    registry: Registry,
    track: str,
    defenses: Sequence[str],
    threats: Sequence[str],
    *,
    seed: int,
    device: str,
    overrides: Overrides,
) -> list[Planned]:
    """All jobs of the product, those that measure one setting only once.

    A name "all" stands for every defense that has a setting for the track, or for every threat
    of the protocol. A job that cannot run is refused here, before any other has begun.
    """
    registry.track(track)
    names = _names("--defense", defenses, registry.defenses)
    if "all" in names:
        entries = {name: registry.defense(name).entry for name in sorted(registry.defenses)}
        names = [n for n, e in entries.items() if any(track in s.tracks for s in e.settings)]
        if not names:
            raise BadRequest(f"--defense all: no defense has a setting for track {track!r}.")
    attacks = _names("--threat", threats, registry.threats)
    if "all" in attacks:
        attacks = [t for t in sorted(registry.threats) if registry.threat(t).entry.protocol]
    planned: list[Planned] = []
    for defense in names:
        jobs = [
            resolve(registry, track, defense, threat, seed=seed, device=device, overrides=overrides)
            for threat in attacks
        ]
        for job in jobs:
            refuse_borrowed(job)
        done: list[Job] = []
        for job in sorted(jobs, key=_by_generality):
            twin = next((other for other in done if job.same_setting(other)), None)
            planned.append(Planned(job, twin))
            if twin is None:
                done.append(job)
    return planned


def measured_elsewhere(job: Job, registry: Registry, out: Path) -> Job | None:
    """A threat under whose name `out` holds a result for the same setting as `job`."""
    for threat in registry.threats:
        path = result_path(out, job.track.name, job.defense.name, threat, job.seed)
        if threat == job.threat.name or not path.is_file():
            continue
        other = replace(job, threat=registry.threat(threat))
        result = Result.read(path)
        effort = searched_effort(job.effort, job.knows, job.sites)
        same = {**other.identity(), "effort": effort} == {
            **identity_of(result),
            "effort": searched_effort(result.effort, result.knows, result.sites),
        }
        if same and len(result.draws) >= job.draws and len(result.ids) >= job.examples:
            return other
    return None


def identity_of(result: Result) -> dict[str, Any]:
    """The identity of the job that wrote `result`."""
    return {
        "dbp_bench": result.provenance.dbp_bench,
        "track": result.track,
        "defense": result.defense,
        "threat": result.threat,
        "seed": result.seed,
        "norm": result.norm,
        "eps": result.eps,
        "sites": result.sites,
        "knows": result.knows,
        "attack": result.attack,
        "effort": result.effort,
        "options": result.options,
        **({} if result.surrogate is None else {"surrogate": result.surrogate}),
        "weights": result.provenance.weights,
        **({"code": result.provenance.code} if result.provenance.code else {}),
        "device": result.arithmetic.device,
        "batch_size": result.arithmetic.batch_size,
        "rows": result.arithmetic.rows,
    }


def refuse_other_request(asked: dict[str, Any], held: dict[str, Any], where: Path) -> None:
    """Refuse to continue what was asked differently.

    Raises:
        BadRequest: It was; the message names the fields that differ.
    """
    fields = [
        f"{key} is {held.get(key)!r} there, {value!r} asked"
        for key, value in asked.items()
        if held.get(key) != value
    ]
    if fields:
        raise BadRequest(
            f"{where} holds another request: {'; '.join(fields)}. Choose another --out, or replace "
            "it with --no-resume."
        )


def _names(option: str, asked: Sequence[str], known: Iterable[str]) -> list[str]:
    """The names `asked` for, each once.

    Raises:
        BadRequest: There is none, or "all" and others.
    """
    names = list(dict.fromkeys(asked))
    if not names:
        raise BadRequest(f"{option}: names nothing.{did_you_mean('', known)}")
    if "all" in names and len(names) > 1:
        raise BadRequest(f"{option} {','.join(names)}: either all or names.")
    return names


def _by_generality(job: Job) -> tuple[bool, int, int, str]:
    """The plainest name of a setting first: nothing known, everything known, then the rest."""
    knows = job.threat.entry.knows
    order = {"none": 0, "all": 1}.get(knows, 2) if isinstance(knows, str) else 2
    return job.eps == 0, order, -job.effort.get("eot", 1), job.threat.name


def weights_of(job: Job) -> dict[str, str]:
    """sha256 of every weights file that the entries name."""
    return dict(job.identity()["weights"])


def entry_digests(job: Job) -> dict[str, str]:
    """sha256 of the three entry files."""
    source = {} if job.source is None else {"source": weight_files.digest(job.source.path)}
    return {
        "track": weight_files.digest(job.track.path),
        "defense": weight_files.digest(job.defense.path),
        "threat": weight_files.digest(job.threat.path),
        **source,
    }
