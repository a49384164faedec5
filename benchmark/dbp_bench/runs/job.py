"""A job: one defense under one threat model and attack on one track for one seed, all resolved.

Names, entries, options and weights are resolved once; from then on the job builds what is needed.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbp_bench import __version__, attacks, data
from dbp_bench.entries import outside
from dbp_bench.entries.defense import BASE, UNPURIFIED
from dbp_bench.entries.fields import Entry, check_eps
from dbp_bench.entries.registry import Registry
from dbp_bench.entries.subject import Subject
from dbp_bench.entries.threat import GRADIENT, KNOWN_DRAWS, AttackSetting, Threat, is_outside
from dbp_bench.entries.track import Track
from dbp_bench.errors import BadEntry, BadRequest, UnknownName, brief, did_you_mean
from dbp_bench.result import Result, attack_label, result_path, searched_effort

if TYPE_CHECKING:
    import torch

    from dbp_bench.checks.record import Approach
    from dbp_bench.data import DataSet
    from dbp_bench.defense import Defense
    from dbp_bench.evaluation import Group
    from dbp_bench.memory import Policy
    from dbp_bench.threat import Attack, Bound, Budget, Evaluations, OwnBound, Setup


@dataclass(frozen=True, slots=True)
class Overrides:
    """The options that a user set against the entries; None leaves the entry's."""

    effort: dict[str, Any] = field(default_factory=dict)
    """Options of the attack."""
    gradient: str | None = None
    eps: float | None = None
    draws: int | None = None
    examples: int | None = None
    batch_size: int | None = None
    max_batch: int | None = None

    def names(self) -> list[str]:
        """The fields that change what is measured."""
        single = ("gradient", "eps", "draws", "batch_size", "max_batch")
        return sorted([*self.effort, *(n for n in single if getattr(self, n) is not None)])


@dataclass(frozen=True, slots=True)
class Search:
    """The attack of a job, with its options."""

    attack: "Attack"
    name: str
    """Such as ``pgd``, ``torchattacks:PGD`` or ``my_package.module:MyAttack``."""
    path: Path
    """The entry that names it, or the option ``--attack``."""
    setting: Entry[AttackSetting] | None
    """The named setting that it was asked for by."""
    effort: dict[str, Any]
    """All options, with their values."""
    gradient: str | None
    """The kind of gradient that it follows, if any (:data:`dbp_bench.entries.threat.Gradient`)."""

    @property
    def label(self) -> str:
        """Its name in paths and tables."""
        return attack_label(self.name, self.setting.name if self.setting else None)


@dataclass(frozen=True, slots=True)
class Job:
    """Everything that decides the outcomes, except the arithmetic of the machine."""

    subject: Subject
    threat: Entry[Threat]
    search: Search
    sources: Mapping[str, Subject]
    """Other defenses that the attack searches in or measures by, by name."""
    seed: int
    device: str
    norm: str
    """The track's norm, or that of the attack's own bound."""
    eps: float
    """The size of the budget, or of the attack's own bound."""
    knows: list[str]
    draws: int
    track_ids: list[int]
    """All images of the track: groups are cut from these, whatever number is asked for."""
    examples: int
    batch_size: int
    max_batch: int
    overrides: list[str]
    code: dict[str, str] = field(default_factory=dict)
    """sha256 of the code outside dbp-bench that the entries name, by top-level module."""

    # ------------------------------------------------------------------------- what it builds

    def defense(
        self, *, policy: "Policy" = "auto", dtype: "torch.dtype | None" = None
    ) -> "Defense":
        """The defense that is evaluated, on the job's device."""
        return self.subject.defense(device=self.device, policy=policy, dtype=dtype)

    def built(
        self, dtype: "torch.dtype | None" = None, policy: "Policy" = "auto"
    ) -> "tuple[Defense, Defense]":
        """The defense that is evaluated, and what the attack differentiates in its place.

        Often the two are the same object.
        """
        defense = self.defense(policy=policy, dtype=dtype)
        gradient = self.search.gradient or "exact"
        return defense, self.subject.searched(
            defense, gradient, device=self.device, policy=policy, dtype=dtype
        )

    def other_defenses(self, *, policy: "Policy" = "auto") -> dict[str, "Defense"]:
        """The other defenses that the attack searches in or measures by, by name."""
        return {
            name: subject.defense(device=self.device, policy=policy)
            for name, subject in self.sources.items()
        }

    def data(self) -> "DataSet":
        """The track's images and labels, after a check that they are there, in order."""
        return self.subject.data(verified=True)

    def budget(self) -> "Budget":
        """The ball around each image that the attack searches; the track's, if it has a bound."""
        return self.subject.budget(None if self._own_bound else self.eps)

    def bound(self) -> "Bound":
        """What the images of the attack are held to: its own bound if it has one, or the ball.

        Raises:
            BadRequest: The classifier that measures the distance has other layers.
        """
        from dbp_bench.perceptual import Perceptual

        own = self._own_bound
        if isinstance(own, Perceptual):
            return own.by(self.other_defenses()[own.network].classifier)
        return own or self.budget()

    @property
    def _own_bound(self) -> "OwnBound | None":
        from dbp_bench.threat import own_bound

        return own_bound(self.search.attack)

    def attack(self) -> "Attack":
        """The attack."""
        return self.search.attack

    def first_images(self, data: "DataSet") -> "Group":
        """The first images of the track, on which the defense's conformance is checked."""
        from dbp_bench.evaluation import Group

        ids = self.track_ids[: max(2, self.batch_size)]
        images, labels = data.select(ids)
        return Group(images.to(self.device), labels.to(self.device), ids)

    @property
    def approach(self) -> "Approach":
        """Everything that decides the conformance record of the defense."""
        from dbp_bench.checks.record import Approach
        from dbp_bench.noise import Site

        return Approach(
            defense=(self.subject.track.path, self.subject.entry.path, self.device),
            knows=frozenset(Site(site) for site in self.knows),
            gradient=self.search.gradient,
            loss=str(self.search.effort.get("loss")),
            samples=self.samples,
            batch_size=self.batch_size,
            max_batch=self.max_batch,
            seed=self.seed,
        )

    # ------------------------------------------------------------------------- what it counts

    @property
    def label(self) -> str:
        """Its name in messages: defense, threat and, where it is not the threat's own, attack."""
        own = self.search.name == self.threat.entry.attack and self.search.setting is None
        return f"{self.subject.name} / {self.threat.name}{'' if own else f' / {self.search.label}'}"

    @property
    def sites(self) -> list[str]:
        """The sites at which the defense draws noise, sorted."""
        return self.subject.sites

    @property
    def groups(self) -> list[list[int]]:
        """Ids of each group of images to evaluate, whole groups even where fewer are asked for."""
        size = self.batch_size
        return [self.track_ids[i : i + size] for i in range(0, self.examples, size)]

    @property
    def attacks(self) -> int:
        """The number of attacks on each image: one, or one for each known draw."""
        return self.draws if self.knows else 1

    @property
    def samples(self) -> int:
        """EoT samples that are computed at once: one where nothing is hidden."""
        return 1 if self.knows == self.sites else int(self.search.effort.get("eot", 1))

    @property
    def setup(self) -> "Setup":
        """Everything but the attack's options that decides its number of evaluations."""
        gradient = self.search.gradient or "exact"
        return _setup(self.subject, self.knows, self.eps, self.sources, gradient)

    @property
    def evaluations(self) -> "Evaluations":
        """The evaluations that one attack takes of one image."""
        return self.search.attack.evaluations(self.setup)

    @property
    def gradient_evaluations(self) -> int:
        """The gradient evaluations of the whole job, padding included."""
        return sum(map(len, self.groups)) * self.attacks * self.evaluations.gradient

    @property
    def surrogate(self) -> dict[str, Any] | None:
        """The declared surrogate, where the attack differentiates it in place of the defense."""
        if self.search.gradient != "declared-surrogate":
            return None
        return self.subject.surrogate.model_dump()

    # --------------------------------------------------------------------- what identifies it

    def path(self, out: Path) -> Path:
        """The path of the result, below the folder `out`."""
        track, defense = self.subject.track.name, self.subject.name
        return result_path(out, track, defense, self.threat.name, self.search.label, seed=self.seed)

    def identity(self, *, planned: bool = False) -> dict[str, Any]:
        """The fields that must be equal for results to be continued; images and draws can be added.

        Where it is only `planned`, the sha256 of a checkpoint that isn't in the cache is None.

        Raises:
            BadWeights: A checkpoint isn't in the cache, and it isn't only planned.
        """
        weights = self.subject.weights(planned=planned)
        for name, source in self.sources.items():
            found = source.weights(planned=planned)
            weights |= {f"{name}.{role}": v for role, v in found.items() if role != "classifier"}
        return {
            "dbp_bench": __version__,
            "track": self.subject.track.name,
            "defense": self.subject.name,
            "threat": self.threat.name,
            "attack": self.search.name,
            "setting": self.search.setting.name if self.search.setting else None,
            "seed": self.seed,
            "norm": self.norm,
            "eps": self.eps,
            "sites": self.sites,
            "knows": self.knows,
            "effort": self.search.effort,
            "gradient": self.search.gradient,
            "options": self.subject.setting.recorded,
            **({} if self.surrogate is None else {"surrogate": self.surrogate}),
            "weights": weights,
            **({"code": self.code} if self.code else {}),
            "device": self.device,
            "batch_size": self.batch_size,
            "max_batch": self.max_batch,
        }

    def entry_digests(self) -> dict[str, str]:
        """The sha256 of the entry files."""
        setting = self.search.setting
        return {
            "track": self.subject.track.sha256,
            "defense": self.subject.entry.sha256,
            "threat": self.threat.sha256,
            **({} if setting is None else {"attack": setting.sha256}),
            **{f"source.{name}": s.entry.sha256 for name, s in self.sources.items()},
        }

    def same_setting(self, other: "Job") -> bool:
        """Tell whether `other` measures all of this, under another threat's name."""
        mine, its = (_measured(job.identity(planned=True)) for job in (self, other))
        return mine == its and other.draws >= self.draws and other.examples >= self.examples

    def measured_elsewhere(self, out: Path) -> Path | None:
        """A result in `out` for the same setting, under another threat's name."""
        own = self.path(out)
        for path in sorted(own.parents[2].glob(f"*/{self.search.label}/{own.name}")):
            if path == own:
                continue
            held = Result.read(path)
            same = _measured(identity_of(held)) == _measured(self.identity())
            if same and held.covers(self.examples, self.draws):
                return path
        return None


def _measured(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The part of an `identity` that decides outcomes: not the threat's name, nor idle options."""
    effort = searched_effort(identity["effort"], identity["knows"], identity["sites"])
    return {**identity, "threat": "", "effort": effort}


def identity_of(result: Result) -> dict[str, Any]:
    """The identity of the job that wrote `result`."""
    names = ("track", "defense", "threat", "attack", "setting", "seed", "norm", "eps")
    keys = (*names, "sites", "knows", "effort", "gradient", "options")
    return {
        "dbp_bench": result.provenance.dbp_bench,
        **{key: getattr(result, key) for key in keys},
        **({} if result.surrogate is None else {"surrogate": result.surrogate}),
        "weights": result.provenance.weights,
        **({"code": result.provenance.code} if result.provenance.code else {}),
        "device": result.arithmetic.device,
        "batch_size": result.arithmetic.batch_size,
        "max_batch": result.arithmetic.max_batch,
    }


def refuse_other_request(asked: Mapping[str, Any], held: Mapping[str, Any], where: Path) -> None:
    """Refuse to continue what was asked differently.

    Raises:
        BadRequest: It was; the message names the fields that differ.
    """
    fields = list(_differences(asked, held))
    if fields:
        raise BadRequest(
            f"{where} holds another request: {'; '.join(fields)}. Choose another --out, or replace "
            "it with --no-resume."
        )


def _differences(
    asked: Mapping[str, Any], held: Mapping[str, Any], within: str = ""
) -> Iterator[str]:
    """The fields that are asked for and not held; of a table, the keys that differ."""
    for key in dict.fromkeys([*asked, *(held if within else ())]):
        mine, theirs = asked.get(key), held.get(key)
        if mine == theirs:
            continue
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            yield from _differences(mine, theirs, f"{within}{key}.")
        else:
            yield f"{within}{key} is {_shown(theirs)} there, {_shown(mine)} asked"


def _shown(value: object) -> str:
    """A value as people write it."""
    if isinstance(value, str):
        return value if len(value) < 64 else f"{value[:16]}..."
    if isinstance(value, Mapping | list):
        return brief(value)
    return "not given" if value is None else json.dumps(value, default=str)


def _declared(threat: Threat) -> dict[str, Any]:
    """The values of an entry that can be set against it."""
    return {**threat.effort, "eps": threat.eps, "gradient": threat.gradient}


def why_same(job: Job, other: Threat | None) -> str:
    """Say why `job` measures what the threat model `other` does; None: its entry isn't there."""
    noise = f"noise at {', '.join(job.sites)} alone" if job.sites else "no noise"
    mine = job.threat.entry
    if other is None or not job.sites or mine.knows != other.knows:
        return f"{job.subject.name} draws {noise}"
    if job.search.name not in (mine.attack, other.attack) or job.search.setting is not None:
        return f"--attack {job.search.label} takes the place of both"
    if mine.attack != other.attack:
        return f"their attacks are both {job.search.label}"
    declared, its = _declared(mine), _declared(other)
    values = {**job.search.effort, "eps": job.eps, "gradient": job.search.gradient}
    causes = [
        f"--{name} {_shown(values[name])}"
        if name in ("eps", "gradient")
        else f"--set {name}={_shown(values[name])}"
        for name in job.overrides
        if declared.get(name) != its.get(name)
    ]
    if not causes:
        return "their entries say the same"
    return f"{' and '.join(causes)} make{'' if len(causes) > 1 else 's'} them equal"


# ------------------------------------------------------------------------------------- resolving


def resolve(
    registry: Registry,
    track: str,
    defense: str,
    threat: str,
    *,
    attack: str | None = None,
    seed: int,
    device: str,
    overrides: Overrides,
) -> Job:
    """The job that these names and options mean.

    Args:
        registry: All entries.
        track: Name of the track.
        defense: Name of the defense.
        threat: Name of the threat model.
        attack: An attack, or a named setting of one, in place of the threat's own.
        seed: It decides every draw.
        device: The device that the job runs on: "cpu" or "cuda".
        overrides: Options set against the entries.

    Raises:
        UnknownName: No entry has one of the names.
        BadEntry: An entry doesn't say what it must.
        BadRequest: An option can't be right, or the attack doesn't fit.
    """
    subject, threat_entry = registry.subject(defense, track), registry.threat(threat)
    declared, place = threat_entry.entry, subject.track.entry
    # The null attack stays one, whatever radius the others take.
    eps = declared.eps if overrides.eps is None or declared.eps == 0 else overrides.eps
    eps = place.eps if eps is None else eps
    if eps < 0:
        raise BadRequest(f"--eps {eps:g}: a radius cannot be negative.")
    try:
        check_eps(place.norm, eps)
    except ValueError as error:
        raise BadRequest(f"--{error}") from None
    for name in ("draws", "batch_size", "max_batch"):
        value = getattr(overrides, name)
        if value is not None and value < 1:
            raise BadRequest(f"--{name.replace('_', '-')} {value}: must be 1 or more.")
    if not 0 <= seed < 2**63:
        raise BadRequest(f"--seed {seed}: must be in 0 ... 2^63 - 1.")
    knows = declared.sites(subject.sites)
    draws = overrides.draws or declared.draws
    if knows and draws < KNOWN_DRAWS:
        raise BadRequest(
            f"--draws {draws}: {threat} needs at least {KNOWN_DRAWS} known draws; one draw is one "
            "trajectory."
        )
    unknown = declared.named_sites - set(subject.sites)
    if unknown and (unknown := unknown - registry.sites):
        name = min(unknown)
        raise BadEntry(
            f"{threat_entry.path}: knows: no defense draws noise at {name!r}."
            f"{did_you_mean(name, registry.sites)}"
        )
    ids = subject.ids()
    search, sources = _search(registry, subject, threat_entry, attack, overrides, knows, eps)
    norm, eps = _limits(search, place, eps)
    dotted = [*subject.code(), *(path for s in sources.values() for path in s.code())]
    if is_outside(search.name):
        dotted.append((search.name, search.path))
    return Job(
        subject=subject,
        threat=threat_entry,
        search=search,
        sources=sources,
        seed=seed,
        device=device,
        norm=norm,
        eps=eps,
        knows=knows,
        # Without noise every draw is the same.
        draws=draws if subject.sites else 1,
        track_ids=ids,
        examples=len(data.first(ids, overrides.examples)),
        batch_size=overrides.batch_size or place.batch_size,
        max_batch=overrides.max_batch or place.max_batch,
        overrides=overrides.names(),
        code=outside.code(dotted, registry.folders),
    )


def _search(
    registry: Registry,
    subject: Subject,
    threat: Entry[Threat],
    attack: str | None,
    overrides: Overrides,
    knows: list[str],
    eps: float,
) -> tuple[Search, dict[str, Subject]]:
    """The attack that is asked for, and the other defenses that it searches in or measures by.

    Raises:
        BadRequest: It doesn't fit what is known, the norm or the classes; or an option is wrong.
        UnknownName: There is no such attack.
    """
    settings, setting = registry.settings, None
    if attack is not None:
        registry.check_name("attacks/settings", attack)
        if attack in settings and attack != threat.entry.attack:
            setting = registry.setting(attack)
    if setting is not None or attack in (None, threat.entry.attack):
        by = setting or threat
        name, effort, gradient = by.entry.attack, by.entry.effort, by.entry.gradient
        path = by.path
    else:
        name, effort, gradient, path = str(attack), {}, "exact", Path("--attack")
        _check_attack(name, settings)
    where = f"{path} with --set {', '.join(overrides.effort)}" if overrides.effort else str(path)
    gradient = overrides.gradient or gradient
    if not re.match(GRADIENT, gradient):
        raise BadRequest(
            f"--gradient {gradient!r}: exact, bpda, declared-surrogate, or surrogate:N with the "
            "number of steps."
        )
    made = registry.builder.attack(name, {**effort, **overrides.effort}, where, path)
    if gradient == "declared-surrogate":
        _ = subject.surrogate
    if gradient == "bpda":
        subject.refuse_bpda()
    if gradient.startswith("surrogate:") and "steps" not in subject.setting.replaceable:
        raise BadRequest(
            f"gradient: {gradient}, but {subject.name} has no option `steps`: take exact."
        )
    searched, measure = getattr(made, "sources", ()), _measure(made)
    sources = {
        source: registry.subject(source, subject.track.name) for source in (*searched, *measure)
    }
    for source in measure:
        if sources[source].entry.entry.factory != UNPURIFIED:
            raise BadRequest(
                f"network: {source} has a purifier, and only a classifier measures: take {BASE}, "
                "or an entry of a classifier alone."
            )
    setup = _setup(subject, knows, eps, sources, gradient)
    unfit = made.unfit(setup)
    if unfit is not None:
        raise BadRequest(f"{subject.name} / {threat.name} / {name}: {unfit}.")
    try:
        effort = attacks.described(name, made)
    except ValueError as error:
        raise BadEntry(f"{where}: {error}.") from None
    # An attack that searches in other defenses asks the one under attack for no gradient.
    follows = made.evaluations(setup).gradient > 0 and not searched
    if gradient != "exact" and not follows:
        raise BadRequest(f"gradient: {gradient}, but {name} follows no gradient of {subject.name}.")
    return Search(made, name, path, setting, effort, gradient if follows else None), sources


def _measure(attack: "Attack") -> tuple[str, ...]:
    """The defense whose classifier measures the own bound of an `attack`, if one does."""
    from dbp_bench.threat import own_bound

    network = getattr(own_bound(attack), "network", "")
    return (network,) if network else ()


class _OwnBound(BadRequest):
    """An attack keeps a bound of its own, and another size is asked for."""


def _limits(search: Search, track: Track, eps: float) -> tuple[str, float]:
    """The norm and size of the budget, or those of the attack's own bound.

    Args:
        search: The attack.
        track: The track.
        eps: The size of the budget that is asked for.

    Raises:
        _OwnBound: The attack has its own bound, and another size than the track's is asked for.
    """
    from dbp_bench.threat import own_bound

    own = own_bound(search.attack)
    if own is None:
        return track.norm, eps
    if eps not in (track.eps, own.eps):
        raise _OwnBound(
            f"eps: {eps:g} in {track.norm} is no limit of {search.name}, which keeps a bound of "
            f"its own, {own.norm} {own.eps:g}, among its options."
        )
    return own.norm, own.eps


def _check_attack(name: str, settings: Iterable[str]) -> None:
    if is_outside(name):
        return
    try:
        attacks.check_name(name)
    except UnknownName:
        hint = did_you_mean(name, [*attacks.names(), *settings], "dbp-bench list attacks")
        raise UnknownName(
            f"no attack {name!r}.{hint} One of your own is named as package.module:Class."
        ) from None


def _setup(
    subject: Subject,
    knows: list[str],
    eps: float,
    sources: Mapping[str, Subject],
    gradient: str,
) -> "Setup":
    from dbp_bench.threat import Setup

    track = subject.track.entry
    return Setup(
        hidden=knows != subject.sites,
        norm=track.norm,
        eps=eps,
        classes=subject.facts.classes,
        sources={name: bool(source.sites) for name, source in sources.items()},
        gradient=gradient,
    )


def bases(registry: Registry, track: str, defenses: Iterable[str]) -> list[str]:
    """The classifiers alone that `defenses` protect on `track`, as defenses themselves.

    A defense with a classifier of its own has none where no entry is that classifier alone.
    """
    found: list[str] = []
    for name in defenses:
        setting = registry.subject(name, track).setting
        own = setting.classifier
        if setting.classifies is not None:
            continue
        if own is None:
            found.append(BASE)
            continue
        for other in registry.defenses_of(track):
            subject = registry.subject(other, track)
            if subject.entry.entry.factory == UNPURIFIED and subject.setting.classifier == own:
                found.append(other)
                break
    return list(dict.fromkeys(found))


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
    attack: str | None = None,
    seed: int,
    device: str,
    overrides: Overrides,
) -> list[Planned]:
    """All jobs of the product, those that measure one setting only once.

    A name "all" stands for every defense that has a setting for the track, or for every threat
    of the protocol, but for the null attack where an attack has its own bound. A job that cannot
    run is refused here, before any other has begun.
    """
    registry.track(track)
    names = names_of("--defense", defenses, registry.defenses)
    if "all" in names:
        registry.check_names("defenses")
        names = registry.defenses_of(track)
    threat_names = names_of("--threat", threats, registry.threats)
    protocol = "all" in threat_names
    if protocol:
        registry.check_names("attacks/threats")
        threat_names = registry.protocol
    one = partial(resolve, attack=attack, seed=seed, device=device, overrides=overrides)
    planned: list[Planned] = []
    for defense in names:
        jobs, done = list[Job](), list[Job]()
        for threat in threat_names:
            try:
                jobs.append(one(registry, track, defense, threat))
            except _OwnBound:
                if not (protocol and registry.threat(threat).entry.eps == 0):
                    raise
        for job in sorted(jobs, key=_by_generality):
            twin = next((other for other in done if job.same_setting(other)), None)
            planned.append(Planned(job, twin))
            if twin is None:
                done.append(job)
    return planned


def names_of(option: str, asked: Sequence[str], known: Iterable[str]) -> list[str]:
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
    return job.eps == 0, order, -int(job.search.effort.get("eot", 1)), job.threat.name
