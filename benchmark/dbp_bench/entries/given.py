"""Objects in place of entries: a purifier, a classifier and images that a script has at hand."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar
from weakref import finalize

import torch
from torch import Tensor, nn

from dbp_bench.data import DataSet
from dbp_bench.data.catalog import Facts
from dbp_bench.data.readers import Source
from dbp_bench.declaration import Strict
from dbp_bench.defense import Defense, Identity, Purifier
from dbp_bench.entries.build import Builder
from dbp_bench.entries.defense import BASE, UNPURIFIED, DefenseEntry, Setting
from dbp_bench.entries.fields import Entry, NetworkRef, check_eps
from dbp_bench.entries.registry import Registry
from dbp_bench.entries.subject import Subject
from dbp_bench.entries.track import OwnImages, Track
from dbp_bench.errors import BadRequest, NotConforming, did_you_mean
from dbp_bench.memory import Policy
from dbp_bench.noise import Noise, Site, Tape
from dbp_bench.taped import Taped
from dbp_bench.taped.guards import named
from dbp_bench.taped.purifier import freeze, run
from dbp_bench.threat import Attack, Norm

Classifier = Callable[[Tensor], Tensor]
"""Logits ``(b, k)`` for images ``(b, c, h, w)`` in [0, 1]; a torch module or a function."""

_SCRIPT = Path("<script>")
"""Stands where messages name an entry's file."""
_BATCH, _MAX_BATCH = 64, 256
FEW = 4
"""Images on which objects are tried."""

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
    classifier: nn.Module
    held: DataSet
    digests: Mapping[str, str]
    """A digest for each object, by role; the same for objects that do the same."""
    home: str
    """The device that the objects are on."""
    networks: Sequence[nn.Module] = field(default=(), repr=False)
    """The denoising networks, whose calls are counted."""

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
        """The digest of each object, by role."""
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
        device: "torch.device | str" = "cpu",  # noqa: ARG002
        dtype: torch.dtype | None = None,
        policy: Policy = "auto",
        options: Mapping[str, Any] | None = None,
        votes: int | None = None,
    ) -> Defense:
        """The defense; in float64 it is the same objects, whose weights are widened as they go.

        Raises:
            BadRequest: Other options or votes are asked for.
        """
        if options or votes:
            raise BadRequest(f"{self.name}: a defense that a script gives has no options.")
        wide = dtype == torch.float64 and not isinstance(self.purifier, Taped)
        purifier = _Wide(self.purifier) if wide else self.purifier
        defense = Defense(purifier, self.classifier, (), policy, classes=self.facts.classes)
        _count_calls(defense, self.networks)
        return defense


@dataclass(frozen=True)
class _Wide:
    """A purifier in float64, whose networks stay in float32."""

    inner: Purifier

    @property
    def sites(self) -> frozenset[Site]:
        """The sites at which it draws."""
        return self.inner.sites

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        """Purified images."""
        return run(lambda given: self.inner(given, noise), images, noise, None, alone=False)


class _Classifier(nn.Module):
    """A classifier, module or function, which takes float64 too where its weights are float32."""

    def __init__(self, function: Classifier) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Any:
        if images.dtype != torch.float64:
            return self.function(images)
        return run(self._logits, images, Tape.make(0, "script", [0]), None, alone=False)

    def _logits(self, images: Tensor) -> Tensor:
        answer: Any = self.function(images)
        answer = answer.get("logits") if isinstance(answer, Mapping) else answer
        logits: Tensor = getattr(answer, "logits", answer)
        return logits


def base_of(
    classifier: Classifier, images: Tensor, labels: Tensor, norm: Norm, eps: float
) -> Given:
    """The base classifier on images that were given.

    Raises:
        BadRequest: Images, labels or logits have another form or range than they must.
    """
    try:
        check_eps(norm, eps)
    except ValueError as error:
        raise BadRequest(str(error)) from None
    images, labels = _checked_images(images), _checked_labels(labels, images)
    module = _Classifier(classifier)
    logits = _checked_logits(module, images)
    n, classes = len(images), logits.shape[1]
    if classes < 2:
        raise BadRequest("classifier: it gives one logit for each image: give one for each class.")
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
        module,
        held,
        {"classifier": digest},
        _home(images.device),
    )


def _home(device: torch.device) -> str:
    """The name of the device for a run, which takes the current GPU where there are several.

    Raises:
        BadRequest: It is another GPU.
    """
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        raise BadRequest(
            f"the images are on {device}, and the current GPU is another: call "
            f"torch.cuda.set_device({device.index}) first."
        )
    return device.type


def given_on(base: Subject, name: str, purifier: Purifier, device: str) -> Given:
    """The defense called `name`, of `purifier` and the classifier of `base`, on its images.

    A purifier that gives logits is a whole defense: no classifier follows it.

    Raises:
        NotConforming: The purifier stops, or returns something else than it must.
    """
    few = base.data().select(base.ids()[:FEW])[0].to(device)
    tape = Tape.make(0, "script", range(len(few)))
    with _watched() as calls, named(), torch.no_grad():
        purified: object = purifier(few.clone(), tape)
    if not isinstance(purified, Tensor) or (purified.dim() != 2 and purified.shape != few.shape):
        what = tuple(purified.shape) if isinstance(purified, Tensor) else type(purified).__name__
        raise NotConforming(
            f"the purifier returns {what} for images {tuple(few.shape)}: it must return images of "
            "that shape, or logits (b, k) where it is a whole defense."
        )
    if purified.dtype != few.dtype or purified.device != few.device:
        raise NotConforming(
            f"the purifier returns {purified.dtype} on {purified.device} for {few.dtype} on "
            f"{few.device}: it must return the type and device that came in."
        )
    for call in calls:
        freeze(call.module)
    digests = {role: found for role, found in base.weights().items() if found is not None}
    is_whole = purified.dim() == 2
    return _subject(
        name,
        base.track,
        purifier,
        nn.Identity() if is_whole else _Classifier(base.defense(device=device).classifier),
        base.data(),
        {**digests, "purifier": fingerprint(purified)},
        device,
        _denoisers(calls, getattr(purifier, "module", purifier)),
    )


def fingerprint(values: Tensor) -> str:
    """The sha256 of numbers that an object gave: it stands for what the object does."""
    return sha256(values.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()


def _subject(
    name: str,
    track: Entry[Track],
    purifier: Purifier,
    classifier: nn.Module,
    held: DataSet,
    digests: Mapping[str, str],
    home: str,
    networks: Sequence[nn.Module] = (),
) -> Given:
    setting = Setting(tracks=[track.name], options={}, networks={})
    entry = DefenseEntry(
        title="The base classifier" if name == BASE else f"{name}, given by a script",
        kind="control" if name == BASE else "defense",
        paper=None,
        factory=UNPURIFIED if name == BASE else "script:purifier",
        sites=sorted(purifier.sites),
        settings=[setting],
    )
    declared = Declared(name, _SCRIPT / name, entry)
    made = (purifier, classifier, held, digests, home, networks)
    return Given(track, declared, setting, Builder(), *made)


# ---------------------------------------------------------------------- the calls that are counted


@dataclass(frozen=True)
class _Call:
    """A call of a torch module."""

    module: nn.Module
    inside: tuple[nn.Module, ...]
    """The modules whose calls were running, outermost first."""
    denoises: bool
    """True if it maps images, and another tensor such as a time, to something of their size."""


@contextmanager
def _watched() -> Iterator[list[_Call]]:
    """The calls of torch modules that are made inside."""
    calls: list[_Call] = []
    running: list[nn.Module] = []

    def enter(module: nn.Module, _: Any) -> None:
        running.append(module)

    def leave(module: nn.Module, args: Any, given: Any, out: Any) -> None:
        running.pop()
        tensors = [t for t in (*args, *given.values()) if isinstance(t, Tensor)]
        out = getattr(out, "sample", out)
        out = out[0] if isinstance(out, tuple) and out else out
        denoises = (
            len(tensors) > 1
            and isinstance(out, Tensor)
            and tensors[0].dim() == out.dim() == 4
            and tensors[0].shape[2:] == out.shape[2:]
        )
        calls.append(_Call(module, tuple(running), denoises))

    hooks = nn.modules.module
    handles = (
        hooks.register_module_forward_pre_hook(enter),
        hooks.register_module_forward_hook(leave, with_kwargs=True),
    )
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _denoisers(calls: Sequence[_Call], whole: object) -> list[nn.Module]:
    """The denoising networks among the modules that the purifier `whole` called.

    They take a time beside the images. Where none does, the only module that is called is one; of
    several, nobody can tell, and the calls of the purifier itself are counted.
    """
    all_of_them = {call.module for call in calls if call.denoises}
    found = {c.module for c in calls if c.denoises and all_of_them.isdisjoint(c.inside)}
    if not found:
        found = {c.module for c in calls if c.module is not whole and {*c.inside} <= {whole}}
    if len(found) > 1 and not all_of_them:
        found = set()
    return list(found) or [c.module for c in calls if c.module is whole][:1]


def _count_calls(defense: Defense, networks: Sequence[nn.Module]) -> None:
    """Count calls of the `networks` for as long as the `defense` lives."""
    counter = defense.counter

    def count(_: nn.Module, args: Any, given: Any) -> None:
        counter.add(len(next(t for t in (*args, *given.values()) if isinstance(t, Tensor))))

    for network in networks:
        finalize(defense, network.register_forward_pre_hook(count, with_kwargs=True).remove)


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
                f"attack: {name} has no method {missing[0]}; see dbp_bench.Attack for all."
            )
        if isinstance(self.given, type):
            raise BadRequest(f"attack: {name} is a class: give an object, {self.given.__name__}().")
        known = [each.name for each in fields(self.given)] if is_dataclass(self.given) else []
        for option in options:
            if option not in known:
                raise BadRequest(
                    f"options: {name} has no field {option!r}.{did_you_mean(option, known)}"
                )
        try:
            attack: Attack = replace(self.given, **options) if options else self.given
        except (TypeError, ValueError) as error:
            raise BadRequest(f"options: {name}: {error}") from None
        return attack


def _name_of(attack: object) -> str:
    """The dotted path of an attack's class."""
    kind = attack if isinstance(attack, type) else type(attack)
    return f"{kind.__module__}:{kind.__qualname__.rpartition('.')[2]}"


# ----------------------------------------------------------------------------- what is checked


def _checked_images(images: Tensor) -> Tensor:
    form = f"{tuple(getattr(images, 'shape', ()))} {getattr(images, 'dtype', type(images))}"
    if not isinstance(images, Tensor) or images.dim() != 4 or not images.is_floating_point():
        raise BadRequest(
            f"images: {form}: give a float tensor (n, c, h, w) in [0, 1], such as "
            "torch.from_numpy(array).permute(0, 3, 1, 2) / 255."
        )
    if not images.numel():
        raise BadRequest("images: there is none.")
    if images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
        raise BadRequest(f"images: {form}: channels come second; give images.permute(0, 3, 1, 2).")
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):
        remedy = "Normalise inside the purifier and the classifier, not before."
        if low >= 0 and high > 2:
            remedy = "Divide by 255."
        if not (low - low == high - high == 0):
            remedy = "Leave out what is not finite."
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
def _checked_logits(classifier: nn.Module, images: Tensor) -> Tensor:
    few = images[:FEW]
    classifier.eval()
    try:
        with named():
            return Defense(Identity(), classifier).logits(few, Tape.make(0, "script", [0]))
    except NotConforming as error:
        raise BadRequest(str(error).replace("the module", "the classifier", 1)) from None
