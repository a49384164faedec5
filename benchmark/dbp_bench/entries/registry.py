"""Entries: what a YAML file in `defenses/`, `attacks/` or `tracks/` declares, and what it builds.

The file name is the name. Reading an entry imports nothing it names; only :func:`build_defense`
does, and code from outside this package only when the user trusts it.
"""

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, Self, TypeVar, get_type_hints

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from dbp_bench.declaration import Strict
from dbp_bench.declaration import explain as explain
from dbp_bench.declaration import read_yaml as read_yaml
from dbp_bench.entries import outside
from dbp_bench.errors import BadEntry, UnknownName, did_you_mean
from dbp_bench.passes import Passes, Setup, of_autoattack, of_torchattacks, phases
from dbp_bench.weights import catalog, store
from dbp_bench.weights import files as weight_files

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dbp_bench.defense import Defense
    from dbp_bench.memory import Policy

DEFAULT_TRACK = "digits-linf"

_NAME = r"^[a-z0-9][a-z0-9.-]*$"


def number(text: str) -> float:
    """The number that `text` writes: 0.2, 1e-3 or 8/255.

    Raises:
        ValueError: It writes none.
    """
    try:
        return float(Fraction(text.replace(" ", "")))
    except (ZeroDivisionError, OverflowError):
        raise ValueError(f"not a number: {text!r}") from None


def _number(value: object) -> object:
    """YAML reads 8/255 as a string; it is a number here."""
    if isinstance(value, str):
        try:
            return number(value)
        except ValueError:
            return value
    return value


def _json(options: dict[str, Any]) -> dict[str, Any]:
    """Refuse what a result cannot hold, before anything is computed."""
    try:
        json.dumps(options, allow_nan=False)
    except (TypeError, ValueError):
        raise ValueError(
            f"{options!r} is not made of finite numbers, strings, true, false and lists"
        ) from None
    return options


def _distinct(names: list[str]) -> list[str]:
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ValueError(f"{name!r} stands twice")
    return names


Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Eps = Annotated[Number, Field(ge=0, le=1e3)]
Name = Annotated[str, Field(pattern=_NAME)]
Names = Annotated[list[Name], AfterValidator(_distinct)]
Options = Annotated[dict[str, Any], AfterValidator(_json)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
DottedPath = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]


class NetworkRef(Strict):
    """A network and the file its weights are in."""

    network: DottedPath
    """``module:callable`` that builds the network, without arguments."""
    file: str
    """A safetensors file beside the entry, or one that ships with the package."""
    sha256: Sha256


class CheckpointRef(Strict):
    """A published network, taken from the cache of checkpoints."""

    checkpoint: str
    """In the catalog, or ``robustbench:<dataset>/<threat>/<model>``, or ``timm:<model>``."""

    @field_validator("checkpoint")
    @classmethod
    def _known(cls, name: str) -> str:
        try:
            catalog.find(name)
        except UnknownName as error:
            raise ValueError(str(error).rstrip(".")) from None
        return name

    @property
    def sha256(self) -> str:
        """Of the weights in the cache.

        Raises:
            BadWeights: They aren't there; the message gives the command that brings them there.
        """
        return store.read(self.checkpoint).sha256


def _kind_of_ref(value: Any) -> str:
    named = "checkpoint" in value if isinstance(value, dict) else hasattr(value, "checkpoint")
    return "<checkpoint>" if named else "<file>"


AnyNetwork = Annotated[
    Annotated[NetworkRef, Tag("<file>")] | Annotated[CheckpointRef, Tag("<checkpoint>")],
    Discriminator(_kind_of_ref),
]


class Track(Strict):
    """A data set, its frozen images, the classifier to protect, and the attacker's budget."""

    title: str
    data: str
    split: str
    classifier: AnyNetwork
    norm: Literal["linf", "l2", "l1"]
    eps: Eps
    """In [0, 1] pixel units: 8/255, not 8."""
    batch_size: int = Field(ge=1)
    """Images evaluated together: a fixed group, so that the arithmetic has a fixed shape."""
    rows: int = Field(ge=1)
    """Images x gradient draws in one pass through the networks, at most."""
    demonstration: bool
    """Whether its numbers stand for nothing but the method."""
    note: str

    @model_validator(mode="after")
    def _units(self) -> Self:
        check_eps(self.norm, self.eps)
        return self


OWN_CLASSIFIER = "defense.classifier"
"""Beside "classifier", which is the track's: its results are compared by that."""


class Surrogate(Strict):
    """What attacks may differentiate in place of a defense, where its authors say so."""

    options: Options = Field(min_length=1)
    """Options of the defense that are others here."""
    votes: int = Field(default=1, ge=1)
    """Purifications of each image."""


class Setting(Strict):
    """How a defense is set up on some tracks."""

    tracks: Names = Field(min_length=1)
    options: Options
    """Keyword arguments of the factory."""
    networks: dict[str, AnyNetwork]
    """The networks that the factory takes, by argument name."""
    votes: int = Field(default=1, ge=1)
    """Independent purifications of each image, whose majority decides. May be left out."""
    resize: int | None = Field(default=None, ge=1)
    """The side of the square images that the purifier takes; null for the track's own. May be left
    out."""
    surrogate: Surrogate | None = None
    """For attacks whose effort says ``gradient: declared-surrogate``. May be left out."""
    classifier: AnyNetwork | None = None
    """In place of the track's, for models that are robust by their training. May be left out."""

    @property
    def refs(self) -> "dict[str, NetworkRef | CheckpointRef]":
        """Every network of the set-up, by the name under which a result records its weights."""
        own = {} if self.classifier is None else {OWN_CLASSIFIER: self.classifier}
        return {**self.networks, **own}

    @model_validator(mode="after")
    def _one_value_each(self) -> Self:
        for name in self.networks:
            if name in self.options:
                raise ValueError(f"{name!r} is both an option and a network")
        for name in ("votes", "resize"):
            if name in self.options:
                raise ValueError(f"options: {name}: stands beside options, not among them")
        for name in self.surrogate.options if self.surrogate else ():
            if name not in self.options:
                hint = did_you_mean(name, self.options).rstrip(".")
                raise ValueError(f"surrogate.options: no option {name!r}.{hint}")
        return self

    @property
    def recorded(self) -> dict[str, Any]:
        """What a result says of the set-up: options, and votes and resize where there are any."""
        more = {"votes": self.votes} if self.votes > 1 else {}
        return {**self.options, **more, **({"resize": self.resize} if self.resize else {})}


class DefenseEntry(Strict):
    """A purifier."""

    title: str
    kind: Literal["control", "defense"]
    paper: str | None
    factory: DottedPath
    """``module:callable``; called with the networks and the options, returns a purifier."""
    sites: Names
    """Where it draws noise; ``[]`` for a deterministic one."""
    settings: list[Setting] = Field(min_length=1)

    @model_validator(mode="after")
    def _one_setting_each(self) -> Self:
        tracks = [track for setting in self.settings for track in setting.tracks]
        for track in tracks:
            if tracks.count(track) > 1:
                raise ValueError(f"settings: track {track!r} has two")
        return self

    def setting(self, track: str, name: str, path: str) -> Setting:
        """The setting for `track`.

        Raises:
            UnknownName: The defense has none.
        """
        found = [s for s in self.settings if track in s.tracks]
        if not found:
            known = [t for s in self.settings for t in s.tracks]
            raise UnknownName(
                f"{path}: defense {name!r} has no setting for track {track!r}."
                f"{did_you_mean(track, known)}"
            )
        return found[0]


class AllBut(Strict):
    """Every site but some."""

    all_but: Names = Field(alias="all-but")


class Effort(Strict):
    """How hard an attacker searches. What each attack takes is in :data:`EFFORTS`."""

    def passes(self, setup: Setup) -> Passes:
        """That an attack takes of one image, of all gradient draws."""
        raise NotImplementedError

    def misfit(self, setup: Setup) -> str | None:  # noqa: ARG002
        """Why it cannot run in this `setup`, and what would do; None where it can."""
        return None


def _aims(option: str, number: int, setup: Setup) -> str | None:
    """Why a targeted loss cannot aim at this `number` of classes."""
    wrong = setup.classes - 1
    if number <= wrong:
        return None
    return (
        f"{option}: {number} wrong classes to aim at, but there are {wrong}; give {wrong} at most"
    )


class GradientEffort(Effort):
    """What every attack that follows a gradient takes."""

    gradient: Literal["exact", "bpda", "surrogate", "declared-surrogate"]
    """Through the whole purifier; of the classifier at the purified image (Athalye et al. 2018);
    through a purifier with fewer steps than the one that is defended; or through the surrogate that
    the defense's entry declares."""
    surrogate_steps: int | None = Field(ge=1)
    """Of the surrogate; null elsewhere."""

    @model_validator(mode="after")
    def _surrogate(self) -> Self:
        if (self.gradient == "surrogate") != (self.surrogate_steps is not None):
            raise ValueError(
                "surrogate_steps: goes with gradient: surrogate, and is null elsewhere"
            )
        return self


class PGDEffort(GradientEffort):
    """Projected gradient descent with expectation over transformation."""

    steps: int = Field(ge=1)
    step_size: Number = Field(gt=0, le=10)
    """Relative to eps."""
    eot: int = Field(ge=1)
    """Gradient draws averaged per step."""
    loss: Literal["ce", "margin", "dlr", "ce-targeted", "margin-targeted", "dlr-targeted"]
    """With a targeted loss, each restart aims at another wrong class, the most likely first."""
    random_start: bool
    restarts: int = Field(ge=1)

    @property
    def _targeted(self) -> bool:
        return self.loss.endswith("-targeted")

    def passes(self, setup: Setup) -> Passes:
        """Steps of all restarts; looks compare the restarts, and order the targets."""
        draws = self.eot if setup.hidden else 1
        compared = self.restarts if self.restarts > 1 else 0
        looks = (compared + self._targeted) * draws
        return Passes(self.steps * self.restarts * draws, looks, exact=True)

    def misfit(self, setup: Setup) -> str | None:
        """Each restart of a targeted loss has a class of its own."""
        return _aims("restarts", self.restarts, setup) if self._targeted else None

    @model_validator(mode="after")
    def _restarts_differ(self) -> Self:
        if self.restarts > 1 and not (self.random_start or self._targeted):
            raise ValueError(
                "restarts: more than 1 needs random_start: true or a targeted loss, or all are "
                "the same"
            )
        return self


class LowFrequencyEffort(PGDEffort):
    """Projected gradient descent on the low frequencies of the perturbation."""

    band: Number = Field(gt=0, le=1)
    """Share of the frequencies that is kept, per axis."""


class DiffAttackEffort(PGDEffort):
    """Projected gradient descent on a loss to which a deviated reconstruction is added."""

    weight: Number = Field(ge=0, le=1e6)
    """Of the deviation; 0 is plain projected gradient descent."""
    levels: int | None = Field(ge=1)
    """Reverse steps whose states count, evenly spaced; null for all."""

    @model_validator(mode="after")
    def _states_have_gradients(self) -> Self:
        if self.gradient == "bpda":
            raise ValueError(
                "gradient: bpda has none inside the purifier, where the deviation is; give exact "
                "or surrogate"
            )
        return self


class SelectiveEffort(GradientEffort):
    """Gradient ascent that averages the draws which one direction can attack together."""

    steps: int = Field(ge=1)
    step_size: Number = Field(gt=0, le=10)
    """Relative to eps."""
    eot: int = Field(ge=1)
    """Gradient draws per step, of which some are chosen."""
    loss: Literal["ce", "margin", "dlr"]
    sharpness: Number = Field(ge=0, le=1e3)
    """How strictly draws are chosen; 0 is the plain mean."""
    rounds: int = Field(ge=1)
    """Of expectation maximisation, per step."""

    def passes(self, setup: Setup) -> Passes:
        """Steps."""
        return Passes(self.steps * (self.eot if setup.hidden else 1), 0, exact=True)


class APGDEffort(GradientEffort):
    """Auto-PGD, whose step sizes adapt to its progress."""

    steps: int = Field(ge=1)
    """Of each run."""
    eot: int = Field(ge=1)
    """Gradient draws averaged per step, and draws that compare iterates."""
    loss: Literal["ce", "margin", "dlr", "ce-targeted", "margin-targeted", "dlr-targeted"]
    rho: Number = Field(gt=0, lt=1)
    """The step size halves where less than this share of steps raised the loss."""
    random_start: bool
    restarts: int = Field(ge=1)
    """For each target."""
    targets: int | None = Field(ge=1)
    """Most likely wrong classes to aim at; null for a loss without target."""

    def passes(self, setup: Setup) -> Passes:
        """Steps of all runs; looks order the targets, and compare iterates and runs.

        Where every draw is known, the losses of the gradient passes are exact: only the last
        iterate is looked at, and misclassified images finish.
        """
        runs = self.restarts * min(self.targets or 1, max(setup.classes - 1, 1))
        searches = phases(setup.norm, self.steps)
        ordered = int(self.targets is not None)
        if not setup.hidden:
            return Passes(runs * self.steps, runs * searches + ordered, exact=False)
        compared = runs if runs > 1 else 0
        looks = runs * (self.steps + searches) + compared + ordered
        return Passes(runs * self.steps * self.eot, looks * self.eot, exact=True)

    def misfit(self, setup: Setup) -> str | None:
        """There is a class for each of the targets."""
        return _aims("targets", self.targets or 0, setup)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.restarts > 1 and not self.random_start:
            raise ValueError("restarts: more than 1 needs random_start: true, or all are the same")
        if self.loss.endswith("-targeted") != (self.targets is not None):
            raise ValueError("targets: goes with a targeted loss, and is null elsewhere")
        return self


class SquareEffort(Effort):
    """Random search in squares, by logits alone."""

    n_queries: int = Field(ge=1)
    """Candidates for each image."""
    p_init: Number = Field(gt=0, le=1)
    """Share of the pixels in the first squares."""
    eot: int = Field(ge=1)
    """Draws averaged per look; where draws are hidden, each candidate takes two looks."""

    def passes(self, setup: Setup) -> Passes:
        """Candidate and incumbent, and both ends; where draws are known, each candidate once."""
        if setup.hidden:
            return Passes(0, 2 * self.eot * (self.n_queries + 1), exact=True)
        return Passes(0, self.n_queries + 2, exact=False)

    def misfit(self, setup: Setup) -> str | None:
        """There is no l1 variant."""
        if setup.norm == "l1":
            return "square searches in linf and l2, not in l1: take pgd, apgd or autoattack"
        return None


class AutoAttackEffort(GradientEffort):
    """AutoAttack as published."""

    version: Literal["standard", "rand"]
    """For where every draw is known, or for where draws are hidden."""
    steps: int = Field(ge=1)
    """Of APGD and FAB; 100 as published."""
    queries: int = Field(ge=1)
    """Of Square, in standard; 5000 as published."""
    eot: int = Field(ge=1)
    """Gradient draws averaged per step in rand, 20 as published; 1 in standard."""

    def passes(self, setup: Setup) -> Passes:
        """Of an image that stays right to the end: 19 searches and Square in standard, 2 in rand.

        The package skips images that one draw of its own misclassifies.
        """
        return of_autoattack(self.version, self.steps, self.queries, self.eot, setup)

    def misfit(self, setup: Setup) -> str | None:
        """Standard takes one look for the truth."""
        if self.version == "standard" and setup.hidden:
            return (
                "version: standard takes the model for deterministic, but draws of this defense "
                "are hidden: take version: rand, or attack: ensemble"
            )
        return None

    @model_validator(mode="after")
    def _single_draw(self) -> Self:
        if self.version == "standard" and self.eot != 1:
            raise ValueError("eot: standard averages over nothing; give 1, or version: rand")
        return self


class TorchattacksEffort(GradientEffort):
    """An attack of torchattacks, by its class; for short, ``attack: torchattacks:PGD``."""

    name: str
    options: Options
    """All parameters of the class, but for those that dbp-bench fills in. Checked when a run is
    planned: an entry can be read without the package."""

    @field_validator("options")
    @classmethod
    def _numbers(cls, options: dict[str, Any]) -> dict[str, Any]:
        return {key: _number(value) for key, value in options.items()}

    def passes(self, setup: Setup) -> Passes:
        """By the loops of the class."""
        return of_torchattacks(self.name, self.options, setup)


_ALONE = ("ensemble", "transfer")
"""Attacks made of attacks, which are not put into one another."""


def _given(model: type[Effort], shared: Mapping[str, Any]) -> dict[str, Any]:
    """What an attack inside another is given; one that follows no gradient says all itself."""
    if not issubclass(model, GradientEffort):
        return {}
    return {key: value for key, value in shared.items() if key in model.model_fields}


def _inner(table: dict[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
    """An attack inside another: its name and its own effort, to which `shared` adds.

    Raises:
        ValueError: There is no such attack, or its effort isn't what it takes.
    """
    name = table.get("attack")
    known = [attack for attack in EFFORTS if attack not in _ALONE]
    if name not in known:
        hint = did_you_mean(str(name), known).rstrip(".")
        raise ValueError(f"no attack {name!r}.{hint}")
    model = EFFORTS[name]
    own = {key: value for key, value in table.items() if key != "attack"}
    given = _given(model, shared)
    for key in given.keys() & own.keys():
        raise ValueError(f"{name}: {key}: is the same for all; leave it out here")
    try:
        effort = model.model_validate({**own, **given})
    except ValidationError as error:
        raise ValueError(f"{name}: {explain(error, model)}".rstrip(".")) from None
    left = {key: value for key, value in effort.model_dump().items() if key not in given}
    return {"attack": name, **left}


def _effort(table: Mapping[str, Any], shared: Mapping[str, Any]) -> Effort:
    """Of an attack inside another."""
    model = EFFORTS[table["attack"]]
    own = {key: value for key, value in table.items() if key != "attack"}
    given = _given(model, shared)
    return model.model_validate({**own, **given})


class EnsembleEffort(GradientEffort):
    """Several attacks, of which the one that hurts an image most counts."""

    eot: int = Field(ge=1)
    """Of each member that follows a gradient."""
    compare: int = Field(ge=1)
    """Draws that choose among what the members found; no member sees them."""
    members: list[dict[str, Any]] = Field(min_length=1)
    """The attacks: name and effort, without what is the same for all."""

    @property
    def _shared(self) -> dict[str, Any]:
        keys = ("gradient", "surrogate_steps", "eot")
        return {key: getattr(self, key) for key in keys}

    @field_validator("members")
    @classmethod
    def _members(cls, members: list[dict[str, Any]], info: ValidationInfo) -> list[dict[str, Any]]:
        keys = ("gradient", "surrogate_steps", "eot")
        if any(key not in info.data for key in keys):
            return members  # another message says so
        return [_inner(member, {key: info.data[key] for key in keys}) for member in members]

    def passes(self, setup: Setup) -> Passes:
        """Of all members, and looks that choose among them; known draws finish images."""
        looks = (len(self.members) + 1) * (self.compare if setup.hidden else 1)
        members = [_effort(member, self._shared).passes(setup) for member in self.members]
        return sum(members, Passes(0, looks, exact=setup.hidden))

    def misfit(self, setup: Setup) -> str | None:
        """Of the first member that has one."""
        found = (_effort(member, self._shared).misfit(setup) for member in self.members)
        return next(filter(None, found), None)


_EXACT = {"gradient": "exact", "surrogate_steps": None}


class TransferEffort(Effort):
    """Images made against another defense, whose draws are hidden."""

    source: Name
    """The defense to attack in place of the victim."""
    search: dict[str, Any]
    """The attack on it: name and effort."""

    @field_validator("search")
    @classmethod
    def _search(cls, search: dict[str, Any]) -> dict[str, Any]:
        return _inner(search, _EXACT)

    def passes(self, setup: Setup) -> Passes:
        """Through the source, whose draws are `hidden` where it has any."""
        return _effort(self.search, _EXACT).passes(setup)

    def misfit(self, setup: Setup) -> str | None:
        """Of the search, in the source."""
        return _effort(self.search, _EXACT).misfit(setup)


EFFORTS: Mapping[str, type[Effort]] = {
    "pgd": PGDEffort,
    "apgd": APGDEffort,
    "lf": LowFrequencyEffort,
    "selective": SelectiveEffort,
    "diffattack": DiffAttackEffort,
    "square": SquareEffort,
    "autoattack": AutoAttackEffort,
    "torchattacks": TorchattacksEffort,
    "ensemble": EnsembleEffort,
    "transfer": TransferEffort,
}


KNOWN_DRAWS = 3
"""Known draws that each image is attacked at, at least."""


def _form(value: object) -> str | None:
    """In which form a threat says what is known, so that a mistake gets one message, not three."""
    if isinstance(value, AllBut) or (isinstance(value, dict) and set(value) == {"all-but"}):
        return "<but>"
    if isinstance(value, list):
        return "<sites>"
    return "<word>" if value in ("none", "all") else None


Knows = Annotated[
    Annotated[Literal["none", "all"], Tag("<word>")]
    | Annotated[Names, Tag("<sites>")]
    | Annotated[AllBut, Tag("<but>")],
    Discriminator(
        _form,
        custom_error_type="knows",
        custom_error_message="give none, all, sites such as [forward], or {all-but: [forward]}",
    ),
]


class Threat(Strict):
    """What an attacker knows, and how hard it searches."""

    title: str
    knows: Knows
    """Sites whose victim draws are shown."""
    attack: str
    effort: dict[str, Any]
    draws: int = Field(ge=1, le=10_000)
    """Fresh draws that judge an image; where draws are known, known draws, each attacked anew."""
    eps: Eps | None
    """``null``: the track's. 0: the null attack."""
    protocol: bool
    """Whether "all" means it: the threat models that a leaderboard is made of, at equal effort."""

    @model_validator(mode="before")
    @classmethod
    def _named_class(cls, table: Any) -> Any:
        """``attack: torchattacks:PGD`` is the attack torchattacks with the name PGD."""
        if not isinstance(table, dict) or not isinstance(table.get("attack"), str):
            return table
        attack, colon, name = table["attack"].partition(":")
        if attack != "torchattacks" or not colon or not isinstance(table.get("effort"), dict):
            return table
        return {**table, "attack": attack, "effort": {"name": name, **table["effort"]}}

    @model_validator(mode="after")
    def _known_attack(self) -> Self:
        if self.attack not in EFFORTS:
            hint = did_you_mean(self.attack, EFFORTS).rstrip(".")
            raise ValueError(f"attack: no attack {self.attack!r}.{hint}")
        model = EFFORTS[self.attack]
        try:
            model.model_validate(self.effort)
        except ValidationError as error:
            raise ValueError(f"effort.{explain(error, model)}".rstrip(".")) from None
        return self

    @model_validator(mode="after")
    def _enough_draws(self) -> Self:
        if self.knows != "none" and self.draws < KNOWN_DRAWS:
            raise ValueError(
                f"draws: {self.draws}, but at least {KNOWN_DRAWS} where draws are known; one draw "
                "is one trajectory"
            )
        return self

    @property
    def named_sites(self) -> set[str]:
        """The sites that `knows` spells out."""
        if isinstance(self.knows, AllBut):
            return set(self.knows.all_but)
        return set() if isinstance(self.knows, str) else set(self.knows)

    def sites(self, defense: Sequence[str]) -> list[str]:
        """The sites of a `defense` that this attacker knows, sorted."""
        if self.knows == "none":
            return []
        if self.knows == "all":
            return sorted(defense)
        if isinstance(self.knows, AllBut):
            return sorted(set(defense) - set(self.knows.all_but))
        return sorted(set(defense) & set(self.knows))


def check_eps(norm: str, eps: float) -> None:
    """Refuse a budget that must be in 0 ... 255 units.

    Raises:
        ValueError: It is.
    """
    if norm == "linf" and eps > 1:
        raise ValueError(
            f"eps: {eps:g} is more than the whole range of a pixel, which is [0, 1] here. "
            f"Did you mean {eps:g}/255?"
        )


E = TypeVar("E", Track, DefenseEntry, Threat)


@dataclass(frozen=True)
class Entry(Generic[E]):
    """A declaration, and the file it was read from."""

    name: str
    path: Path
    entry: E

    @property
    def sha256(self) -> str:
        """Of the file."""
        return weight_files.digest(self.path)


def _shipped() -> dict[str, Path]:
    """Where the package's own entries are: inside a wheel, or at the top of a checkout."""
    inside = Path(__file__).parent
    if (inside / "defenses").is_dir():
        return {kind: inside / kind for kind in ("defenses", "attacks", "tracks")}
    top = Path(__file__).parents[3]
    return {
        "defenses": top / "defenses",
        "attacks": top / "attacks",
        "tracks": top / "benchmark" / "tracks",
    }


class Registry:
    """All entries: the package's own, and those of the user's folders.

    Args:
        folders: Folders with `defenses/`, `attacks/` and `tracks/` of one's own.
        trust_code: Whether code that an entry names outside this package may run.
        data: Where the user says that data sets are; None for the environment variable or the hub.
        instead: Files of defenses, by name, that count in place of any of that name.

    Installed packages add folders of their own (see :mod:`dbp_bench.entries.outside`); to install
    one is not to trust it: its code runs with `trust_code` only.

    Raises:
        BadEntry: A folder isn't there or holds no entries, or a name is taken.
    """

    def __init__(
        self,
        folders: Sequence[Path] = (),
        *,
        trust_code: bool = False,
        data: Path | None = None,
        instead: Mapping[str, Path] | None = None,
    ) -> None:
        self.instead = dict(instead or {})
        self.folders = [folder.resolve() for folder in folders]
        self.trust_code = trust_code
        self.data = data
        self.made_up: list[str] | None = None
        """Checkpoints whose weights were made up; None where that isn't allowed."""
        kinds = ("defenses", "attacks", "tracks")
        for folder in self.folders:
            if not any((folder / kind).is_dir() for kind in kinds):
                raise BadEntry(f"{folder}: no folder defenses/, attacks/ or tracks/ in it.")

    def for_plans(self) -> "Registry":
        """These entries, with weights made up where the cache has none; `made_up` says which."""
        other = copy(self)
        other.made_up = []
        return other

    @cached_property
    def defenses(self) -> dict[str, Path]:
        """Name and file of every defense."""
        return self._files("defenses") | self.instead

    @cached_property
    def threats(self) -> dict[str, Path]:
        """Name and file of every threat model."""
        return self._files("attacks")

    @cached_property
    def tracks(self) -> dict[str, Path]:
        """Name and file of every track."""
        return self._files("tracks")

    @cached_property
    def sites(self) -> frozenset[str]:
        """The sites of all defenses."""
        return frozenset(site for name in self.defenses for site in self.defense(name).entry.sites)

    def defense(self, name: str) -> Entry[DefenseEntry]:
        """The defense called `name`."""
        return self._read("defense", name, self.defenses, DefenseEntry)

    def threat(self, name: str) -> Entry[Threat]:
        """The threat model called `name`."""
        return self._read("threat", name, self.threats, Threat)

    def track(self, name: str) -> Entry[Track]:
        """The track called `name`."""
        return self._read("track", name, self.tracks, Track)

    def _read(self, kind: str, name: str, files: Mapping[str, Path], model: type[E]) -> Entry[E]:
        if name not in files:
            raise UnknownName(f"no {kind} {name!r}.{did_you_mean(name, files)}")
        return Entry(name, files[name], read_yaml(files[name], model))

    def _files(self, kind: str) -> dict[str, Path]:
        found: dict[str, Path] = {}
        folders = dict.fromkeys([*outside.entry_folders(), *self.folders])
        for folder in [_shipped()[kind], *(folder / kind for folder in folders)]:
            for path in _entries(folder):
                if path.suffix != ".yaml":
                    raise BadEntry(f"{path}: rename it to {path.stem}.yaml.")
                if not re.match(_NAME, path.stem) or path.stem == "all":
                    raise BadEntry(
                        f"{path}: the file name is the entry's name: lower-case letters, digits, "
                        "dots and dashes, and not 'all'."
                    )
                if path.stem in found:
                    raise BadEntry(f"{path}: the name is taken by {found[path.stem]}.")
                found[path.stem] = path
        return found

    def build_network(self, ref: NetworkRef | CheckpointRef, path: Path) -> "nn.Module":
        """The network that `ref`, in the entry at `path`, declares, with its weights verified."""
        if isinstance(ref, CheckpointRef):
            from dbp_bench.weights.build import blank, build

            if self.made_up is not None and not store.has(ref.checkpoint):
                self.made_up.append(ref.checkpoint)
                return blank(ref.checkpoint)
            return build(ref.checkpoint)
        file = weight_files.find(ref.file, [path.parent, path.parent.parent])
        weight_files.verify(file, ref.sha256)
        network: nn.Module = self._call(ref.network, path, "network")
        weight_files.fill(network, weight_files.load(file), file)
        return network

    def build_defense(
        self,
        defense: Entry[DefenseEntry],
        track: Entry[Track],
        *,
        device: "torch.device | str" = "cpu",
        dtype: "torch.dtype | None" = None,
        policy: "Policy" = "auto",
        options: Mapping[str, Any] | None = None,
        votes: int | None = None,
    ) -> "Defense":
        """The defense on the track, its weights verified and on `device`.

        Some of the entry's `options`, and its `votes`, can be replaced by others.

        Raises:
            BadEntry: The factory doesn't take an option or a network of the entry, or needs
                another; or code of another package is named and isn't trusted.
            BadWeights: A file is missing or isn't the one that the entry means.
        """
        import torch

        from dbp_bench.defense import Defense
        from dbp_bench.purifiers.resize import Resized

        setting = defense.entry.setting(track.name, defense.name, str(defense.path))
        dtype = dtype or torch.float32
        networks = {
            key: self.build_network(ref, defense.path).to(device, dtype)
            for key, ref in setting.networks.items()
        }
        arguments = {**networks, **setting.options, **(options or {})}
        purifier = self._call(defense.entry.factory, defense.path, "factory", arguments)
        sites = getattr(purifier, "sites", None)
        if sites != frozenset(defense.entry.sites):
            raise BadEntry(
                f"{defense.path}: sites: {sorted(defense.entry.sites)}, but the purifier declares "
                f"{sorted(sites) if isinstance(sites, frozenset) else sites}."
            )
        ref, where = track.entry.classifier, track.path
        if setting.classifier is not None:
            ref, where = setting.classifier, defense.path
        classifier = self.build_network(ref, where).to(device, dtype)
        if setting.resize is not None:
            purifier = Resized(purifier, setting.resize)
        return Defense(purifier, classifier, networks.values(), policy, votes or setting.votes)

    def _call(
        self, dotted: str, path: Path, key: str, arguments: Mapping[str, Any] | None = None
    ) -> Any:
        function = self._import(dotted, path, key)
        arguments = arguments or {}
        try:
            inspect.signature(function).bind(**arguments)
        except TypeError as error:
            takes = ", ".join(inspect.signature(function).parameters)
            raise BadEntry(f"{path}: {dotted}: {error}. It takes: {takes}.") from None
        _check_types(function, arguments, path)
        try:
            return function(**arguments)
        except (BadEntry, TypeError, ValueError, KeyError) as error:
            raise BadEntry(f"{path}: {key} {dotted}: {error}") from None

    def _import(self, dotted: str, path: Path, key: str) -> Callable[..., Any]:
        module, _, attribute = dotted.partition(":")
        if module.split(".")[0] != "dbp_bench":
            if not self.trust_code:
                raise BadEntry(
                    f"{path}: {key}: {dotted} is code from outside dbp-bench. Add --trust-code to "
                    "run it."
                )
            _make_importable(self.folders)
        try:
            found: Callable[..., Any] = getattr(import_module(module), attribute)
        except (ImportError, AttributeError, SyntaxError) as error:
            raise BadEntry(f"{path}: {key}: {dotted} cannot be imported: {error}.") from None
        if not callable(found):
            raise BadEntry(f"{path}: {key}: {dotted} is not a function or a class.")
        home = getattr(found, "__module__", None) or ""
        if not self.trust_code and home.split(".")[0] != "dbp_bench":
            # A function of another package that a module here happens to import.
            raise BadEntry(f"{path}: {key}: {dotted} is not a part of dbp-bench, but of {home}.")
        return found


def _check_types(function: Callable[..., Any], arguments: Mapping[str, Any], path: Path) -> None:
    """Refuse options of another type than the function's annotations say.

    Raises:
        BadEntry: There is one; the message names it.
    """
    try:
        hints = get_type_hints(function)
    except (NameError, TypeError):
        return
    for name, value in arguments.items():
        if name not in hints or not isinstance(value, str | int | float | list | dict | None):
            continue
        try:
            TypeAdapter(hints[name]).validate_python(value, strict=True)
        except ValidationError as error:
            message = error.errors()[0]["msg"]
            raise BadEntry(
                f"{path}: options.{name}: {message[0].lower()}{message[1:]}, not {value!r}."
            ) from None


def _make_importable(folders: Sequence[Path]) -> None:
    """Let modules that lie beside a user's entries be imported."""
    import sys

    for folder in folders:
        if str(folder) not in sys.path:
            sys.path.append(str(folder))


def _entries(folder: Path) -> Iterator[Path]:
    """The entry files of a folder, sorted; hidden files are an editor's."""
    if folder.is_dir():
        for path in sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")]):
            if not path.name.startswith(".") and path.is_file():
                yield path
