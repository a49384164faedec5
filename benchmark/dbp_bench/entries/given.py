"""Objects in place of entries: a purifier, a classifier and images that a script has at hand."""

import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor, nn

from dbp_bench.data import DataSet
from dbp_bench.data.catalog import Facts
from dbp_bench.data.readers import Source
from dbp_bench.declaration import Strict
from dbp_bench.defense import Defense, Identity, Purifier
from dbp_bench.entries.build import Builder
from dbp_bench.entries.defense import BASE, DefenseEntry, Setting
from dbp_bench.entries.fields import Entry, NetworkRef, check_eps
from dbp_bench.entries.registry import Registry
from dbp_bench.entries.subject import Subject
from dbp_bench.entries.track import OwnImages, Track
from dbp_bench.errors import BadRequest
from dbp_bench.memory import Policy
from dbp_bench.noise import Tape
from dbp_bench.taped import Taped
from dbp_bench.threat import Attack, Norm

Classifier = Callable[[Tensor], Tensor]
"""Logits ``(b, k)`` for images ``(b, c, h, w)`` in [0, 1]; a torch module or a function."""

_SCRIPT = Path("<script>")
"""Stands where messages name an entry's file."""
_BATCH, _MAX_BATCH = 64, 256

T = TypeVar("T")
E = TypeVar("E", bound=Strict)


@dataclass(frozen=True)
class Declared(Entry[E]):
    """A declaration that no file holds."""

    @property
    def sha256(self) -> str:
        """The sha256 of the declaration as JSON."""
        return sha256(self.entry.model_dump_json().encode()).hexdigest()


@dataclass(frozen=True)
class Given(Subject):
    """A defense made of objects, on a track or on images that were given."""

    purifier: Purifier
    classifier: Classifier
    held: DataSet
    digests: Mapping[str, str]
    """What stands for the objects, by role; the same for objects that do the same."""
    home: str
    """The device that the objects are on."""

    @property
    def facts(self) -> Facts:
        """The facts of the images."""
        return self.held.facts

    def data(self, *, verified: bool = False) -> DataSet:
        """The images and labels."""
        if verified and not self.facts.own:
            self.held.verify(self.track.entry.split)
        return self.held

    def weights(self, *, planned: bool = False) -> dict[str, str | None]:  # noqa: ARG002
        """What stands for each object."""
        return dict(self.digests)

    def code(self) -> list[tuple[str, Path]]:
        """None: the objects are there already."""
        return []

    def uncached(self) -> list[str]:
        """None: the objects have their weights."""
        return []

    def with_random_weights(self) -> "Given":
        """The same: the objects have their weights."""
        return self

    def defense(
        self,
        *,
        device: "torch.device | str" = "cpu",
        dtype: torch.dtype | None = None,
        policy: Policy = "auto",
        options: Mapping[str, Any] | None = None,
        votes: int | None = None,
    ) -> Defense:
        """The defense; in another precision, a copy of it.

        Raises:
            BadRequest: Other options or votes are asked for, or another device than the objects'.
        """
        if options or votes:
            raise BadRequest(f"{self.name}: a defense that a script gives has no options.")
        if torch.device(device).type != self.home:
            raise BadRequest(
                f"device={str(device)!r}, but the purifier and the classifier were tried on "
                f"{self.home}: move them, and give that device."
            )
        purifier, classifier = self.purifier, self.classifier
        if dtype not in (None, torch.float32):
            purifier, classifier = _as_type(purifier, dtype), _as_type(classifier, dtype)
        module = classifier if isinstance(classifier, nn.Module) else _Function(classifier)
        defense = Defense(purifier, module, (), policy, classes=self.facts.classes)
        for network in _modules(purifier):
            network.register_forward_pre_hook(defense.count)
        return defense


def _as_it_is(logits: Tensor) -> Tensor:
    return logits


class _Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Classifier) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Tensor:
        return self.function(images)


def base_of(
    classifier: Classifier, images: Tensor, labels: Tensor, norm: Norm, eps: float
) -> Given:
    """The base classifier on images that were given.

    Raises:
        BadRequest: Images, labels or logits have another form or range than they must.
    """
    if norm not in get_args(Norm):
        raise BadRequest(f"norm={norm!r}: linf, l2 or l1.")
    try:
        check_eps(norm, eps)
    except ValueError as error:
        raise BadRequest(str(error)) from None
    images, labels = _checked_images(images), _checked_labels(labels, images)
    logits = _checked_logits(classifier, images)
    n, classes = len(images), logits.shape[1]
    if int(labels.max()) >= classes:
        raise BadRequest(
            f"labels: {int(labels.max())} is there, but the classifier tells {classes} classes "
            f"apart: 0 ... {classes - 1}."
        )
    channels, height, width = images.shape[1:]
    pixels = images.cpu().permute(0, 2, 3, 1).numpy()
    source = Source(_SCRIPT, labels.cpu().numpy(), pixels.__getitem__)
    facts = Facts("script", classes, (channels, height, width), n, 0, levels=1, own=True)
    held = DataSet(facts, None, {"test": source})
    digest = fingerprint(logits)
    track = Track(
        title="Images that a script gave",
        data=OwnImages(
            path="-",
            sha256=held.pixel_digest(range(n)),
            images=n,
            shape=[channels, height, width],
            classes=[str(label) for label in range(classes)],
        ),
        split="all",
        classifier=NetworkRef(network="script:classifier", file="-", sha256=digest),
        norm=norm,
        eps=eps,
        batch_size=min(_BATCH, n),
        max_batch=_MAX_BATCH,
        demonstration=False,
        note="Images that a script gave.",
    )
    where = f"script-{sha256(track.model_dump_json().encode()).hexdigest()[:8]}"
    return _subject(
        BASE,
        Declared(where, _SCRIPT, track),
        Identity(),
        classifier,
        held,
        {"classifier": digest},
        images.device.type,
    )


def given_on(base: Subject, name: str, purifier: Purifier, device: str) -> Given:
    """The defense called `name`, of `purifier` and the classifier of `base`, on its images.

    A purifier that gives logits is a whole defense: no classifier follows it.
    """
    if isinstance(base, Given):
        classifier = base.classifier
    else:
        classifier = base.defense(device=device).classifier
    few = base.data().select(base.ids()[:FEW])[0].to(device)
    tape = Tape.make(0, "script", range(len(few)))
    with torch.no_grad():
        purified = purifier(few.clone(), tape)
    if purified.dim() == 2:
        classifier = _as_it_is
    digests = {role: found for role, found in base.weights().items() if found is not None}
    return _subject(
        name,
        base.track,
        purifier,
        classifier,
        base.data(),
        {**digests, "purifier": fingerprint(purified)},
        device,
    )


FEW = 4
"""Images on which objects are tried."""


def fingerprint(values: Tensor) -> str:
    """The sha256 of numbers that an object gave: it stands for what the object does."""
    return sha256(values.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()


def _subject(
    name: str,
    track: Entry[Track],
    purifier: Purifier,
    classifier: Classifier,
    held: DataSet,
    digests: Mapping[str, str],
    home: str,
) -> Given:
    record = purifier.record if isinstance(purifier, Taped) else None
    options = {} if record is None else {"taped": json.loads(record.to_json())}
    setting = Setting(tracks=[track.name], options=options, networks={})
    entry = DefenseEntry(
        title="The base classifier" if name == BASE else f"{name}, given by a script",
        kind="control" if name == BASE else "defense",
        paper=None,
        factory="script:purifier",
        sites=sorted(purifier.sites),
        settings=[setting],
    )
    declared = Declared(name, _SCRIPT / name, entry)
    return Given(track, declared, setting, Builder(), purifier, classifier, held, digests, home)


class ScriptRegistry(Registry):
    """The package's entries, and objects in place of some.

    Args:
        own: The package's entries.
        subjects: Defenses made of objects, by name.
        attack: The name of an attack, or an attack; None for the threat models' own.
    """

    def __init__(
        self, own: Registry, subjects: Mapping[str, Subject], attack: "str | Attack | None"
    ) -> None:
        super().__init__(own.folders, data=own.builder.data)
        self.subjects = subjects
        self.attack_name: str | None = attack if isinstance(attack, str) else None
        if attack is not None and not isinstance(attack, str):
            self.attack_name = _name_of(attack)
            self.builder = _WithAttack(self.builder.folders, data=own.builder.data, given=attack)
        track = next(iter(subjects.values())).track
        self.tracks = {**own.tracks, track.name: track.path}
        self.defenses = {**own.defenses, **dict.fromkeys(subjects, _SCRIPT)}
        self._track = track

    def subject(self, defense: str, track: str) -> Subject:
        """The defense called `defense` on `track`."""
        if track == self._track.name and defense in self.subjects:
            return self.subjects[defense]
        return super().subject(defense, track)

    def track(self, name: str) -> Entry[Track]:
        """The track called `name`."""
        return self._track if name == self._track.name else super().track(name)

    def defense(self, name: str) -> Entry[DefenseEntry]:
        """The defense called `name`."""
        return self.subjects[name].entry if name in self.subjects else super().defense(name)


@dataclass(frozen=True)
class _WithAttack(Builder):
    """A builder that is given an attack."""

    given: Any = None

    def attack(
        self, name: str, options: Mapping[str, Any], where: str, entry: Path | None = None
    ) -> Attack:
        """The attack that was given, with other `options` where there are some."""
        if name != _name_of(self.given):
            return super().attack(name, options, where, entry)
        missing = [m for m in ("__call__", "evaluations", "unfit") if not hasattr(self.given, m)]
        if missing:
            raise BadRequest(
                f"attack: {name} has no method {missing[0]}; `dbp-bench new attack` writes one "
                "that has all."
            )
        attack: Attack = replace(self.given, **options) if options else self.given
        return attack


def _name_of(attack: object) -> str:
    """The dotted path of an attack's class."""
    kind = type(attack)
    return f"{kind.__module__}:{kind.__qualname__.rpartition('.')[2]}"


# ----------------------------------------------------------------------------- what is checked


def _checked_images(images: Tensor) -> Tensor:
    form = f"{tuple(getattr(images, 'shape', ()))} {getattr(images, 'dtype', type(images))}"
    if not isinstance(images, Tensor) or images.dim() != 4 or not images.is_floating_point():
        raise BadRequest(
            f"images: {form}: give a float tensor (n, c, h, w) in [0, 1], such as "
            "torch.from_numpy(array).permute(0, 3, 1, 2) / 255."
        )
    if not len(images):
        raise BadRequest("images: there is none.")
    if images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
        raise BadRequest(f"images: {form}: channels come second; give images.permute(0, 3, 1, 2).")
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):
        remedy = "Normalise inside the purifier and the classifier, not before."
        if low >= 0 and high > 2:
            remedy = "Divide by 255."
        raise BadRequest(f"images: in {low:.3g} ... {high:.3g}, where [0, 1] is wanted. {remedy}")
    return images.detach().float()


def _checked_labels(labels: Tensor, images: Tensor) -> Tensor:
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise BadRequest("labels: give whole numbers (n,), such as torch.tensor([3, 8, 8]).")
    if labels.shape != (len(images),):
        raise BadRequest(
            f"labels: {tuple(labels.shape)} for {len(images)} images: give ({len(images)},)."
        )
    if int(labels.min()) < 0:
        raise BadRequest(f"labels: {int(labels.min())} is there; the first class is 0.")
    return labels.long()


@torch.no_grad()
def _checked_logits(classifier: Classifier, images: Tensor) -> Tensor:
    few = images[:FEW]
    if isinstance(classifier, nn.Module):
        classifier.eval()
    try:
        logits = Defense(Identity(), _Function(classifier)).logits(few, Tape.make(0, "script", [0]))
    except (RuntimeError, ValueError, TypeError) as error:
        raise BadRequest(
            f"classifier: it fails on the images: {' '.join(str(error).split())[:300]}"
        ) from None
    return logits


def _as_type(value: T, dtype: torch.dtype) -> T:
    """A copy in another precision, of modules and of objects that hold modules."""
    made = deepcopy(value)
    inner = getattr(made, "module", made)
    for module in [inner] if isinstance(inner, nn.Module) else _modules(inner):
        module.to(dtype)
    return made


def _modules(purifier: object) -> list[nn.Module]:
    """The networks of a purifier: the parts of a module, or the modules that an object holds."""
    inner = getattr(purifier, "module", purifier)
    if isinstance(inner, nn.Module):
        return list(inner.children()) or [inner]
    return [
        value for value in getattr(inner, "__dict__", {}).values() if isinstance(value, nn.Module)
    ]
