"""From an entry to the objects it declares: networks, purifiers, defenses, attacks.

Only what is registered may be named: classes in ``dbp_bench.purifiers``, ``dbp_bench.networks`` and
``dbp_bench.attacks``, and code from outside this package where the user trusts it.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from pydantic import TypeAdapter, ValidationError

from dbp_bench import attacks, data
from dbp_bench.declaration import explain, number_of
from dbp_bench.entries.defense import DefenseEntry, Setting, Surrogate
from dbp_bench.entries.fields import AnyRef, CheckpointRef, Entry, NetworkRef, sha256_if_there
from dbp_bench.entries.threat import is_outside
from dbp_bench.entries.track import Track
from dbp_bench.errors import BadEntry, BadRequest
from dbp_bench.weights import files, store

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dbp_bench.data import DataSet
    from dbp_bench.defense import Defense
    from dbp_bench.memory import Policy
    from dbp_bench.threat import Attack, Budget

Kind = Literal["purifiers", "networks", "attacks"]
"""What an entry may name: classes of the sub-package of this name."""


@dataclass(frozen=True)
class Builder:
    """Builds what entries name.

    Args:
        folders: The user's folders of entries, beside which modules may lie.
        trust_code: Whether code outside this package may run.
        data: Where the user says that data sets are.
        random_weights: Names of checkpoints that aren't in the cache and were given random weights;
            None where that is not allowed.
    """

    folders: tuple[Path, ...] = ()
    trust_code: bool = False
    data: Path | None = None
    random_weights: list[str] | None = None

    def network(self, ref: AnyRef, path: Path) -> "nn.Module":
        """The network that `ref`, in the entry at `path`, declares, with its weights verified.

        Raises:
            BadEntry: It cannot be built.
            BadWeights: A file is missing or isn't the one that the entry means.
        """
        if isinstance(ref, CheckpointRef):
            from dbp_bench.weights.build import blank, build

            if self.random_weights is not None and not store.has(ref.checkpoint):
                self.random_weights.append(ref.checkpoint)
                return blank(ref.checkpoint)
            return build(ref.checkpoint)
        file = files.find(ref.file, [path.parent, path.parent.parent])
        files.verify(file, ref.sha256)
        network: nn.Module = self.call(ref.network, path, "networks", {})
        files.fill(network, files.load(file), file)
        return network

    def attack(self, name: str, options: Mapping[str, Any], where: str) -> "Attack":
        """The attack called `name`, or that a dotted path names, with these `options`.

        Args:
            name: Such as ``pgd``, ``torchattacks:PGD`` or ``my_package.module:MyAttack``.
            options: Its fields.
            where: Where they are from, for messages.

        Raises:
            BadEntry: An option is unknown or wrong, or its code isn't trusted or isn't an attack.
        """
        if is_outside(name):
            attack = self.call(name, Path(where), "attacks", options)
        else:
            try:
                attack = attacks.make(name, options)
            except ValueError as error:
                raise BadEntry(f"{where}: {name}: {str(error).rstrip('.')}.") from None
        for method in ("__call__", "evaluations", "unfit"):
            if not callable(getattr(attack, method, None)):
                raise BadEntry(f"{where}: {name} is not an attack: it has no method {method}.")
        found: Attack = attack
        return found

    def call(self, dotted: str, path: Path, kind: Kind, arguments: Mapping[str, Any]) -> Any:
        """What the class or function that `dotted` names gives for these `arguments`.

        Raises:
            BadEntry: It cannot be imported or isn't trusted, or an argument is unknown or wrong.
        """
        function = self._import(dotted, path, kind)
        signature = inspect.signature(function)
        try:
            signature.bind(**arguments)
        except TypeError as error:
            takes = ", ".join(signature.parameters)
            raise BadEntry(f"{path}: {dotted}: {error}. It takes: {takes}.") from None
        given = _typed(function, arguments, path)
        try:
            return function(**given)
        except ValidationError as error:
            raise BadEntry(f"{path}: {dotted}: {explain(error, function)}") from None  # type: ignore[arg-type]
        except (BadEntry, TypeError, ValueError, KeyError) as error:
            raise BadEntry(f"{path}: {dotted}: {' '.join(str(error).split())}") from None

    def _import(self, dotted: str, path: Path, kind: Kind) -> Callable[..., Any]:
        module, _, attribute = dotted.partition(":")
        if module.split(".")[0] == "dbp_bench":
            # Any other function of the package could be called with arguments that do harm.
            if not module.startswith(f"dbp_bench.{kind}."):
                raise BadEntry(f"{path}: {dotted} is not in dbp_bench.{kind}.")
        elif not self.trust_code:
            close = get_close_matches(module, attacks.names(), n=1) if kind == "attacks" else []
            hint = f" Or did you mean '{close[0]}:{attribute}'?" if close else ""
            raise BadEntry(
                f"{path}: {dotted} is code from outside dbp-bench. Add --trust-code to run "
                f"it.{hint}"
            )
        else:
            _make_importable(self.folders)
        try:
            found: Callable[..., Any] = getattr(import_module(module), attribute)
        except (ImportError, AttributeError, SyntaxError) as error:
            raise BadEntry(f"{path}: {dotted} cannot be imported: {error}.") from None
        if not callable(found):
            raise BadEntry(f"{path}: {dotted} is not a function or a class.")
        home = getattr(found, "__module__", None) or ""
        if module.split(".")[0] == "dbp_bench" and home != module:
            # Something that a module here happens to import.
            raise BadEntry(f"{path}: {dotted} is not defined there, but in {home}.")
        return found


def _typed(
    function: Callable[..., Any], arguments: Mapping[str, Any], path: Path
) -> dict[str, Any]:
    """The `arguments`, of the types that the function's annotations say.

    Raises:
        BadEntry: One is not; the message names it.
    """
    home: Any = function
    if isinstance(function, type):
        home = function.__init__  # type: ignore[misc]
    try:
        hints = get_type_hints(home, include_extras=True)
    except (NameError, TypeError):
        return dict(arguments)
    given = dict(arguments)
    for name, value in arguments.items():
        if name not in hints or not isinstance(value, str | int | float | list | dict | None):
            continue
        text = number_of(value) if hints[name] is float else value
        try:
            TypeAdapter(hints[name]).validate_python(text, strict=True)
        except ValidationError as error:
            message = error.errors()[0]["msg"]
            raise BadEntry(
                f"{path}: options.{name}: {message[0].lower()}{message[1:]}, not {value!r}."
            ) from None
        given[name] = text
    return given


def _make_importable(folders: tuple[Path, ...]) -> None:
    """Let modules that lie beside a user's entries be imported."""
    import sys

    for folder in folders:
        if str(folder) not in sys.path:
            sys.path.append(str(folder))


@dataclass(frozen=True)
class Subject:
    """A defense on a track: all that is needed to build it and to read its images."""

    track: Entry[Track]
    entry: Entry[DefenseEntry]
    setting: Setting
    builder: Builder = field(repr=False)

    @property
    def name(self) -> str:
        """The defense's name."""
        return self.entry.name

    @property
    def sites(self) -> list[str]:
        """Where the defense draws noise, sorted."""
        return sorted(self.entry.entry.sites)

    @property
    def surrogate(self) -> Surrogate:
        """What ``gradient: declared-surrogate`` differentiates in place of the defense.

        Raises:
            BadRequest: The entry declares nothing.
        """
        if self.setting.surrogate is None:
            raise BadRequest(
                f"gradient: declared-surrogate, but {self.entry.path} declares none for "
                f"{self.track.name!r}. Take exact, or add `surrogate: {{options: ...}}` to its "
                "setting."
            )
        return self.setting.surrogate

    def ids(self) -> list[int]:
        """The ids of all images of the track, in order.

        Raises:
            BadEntry: The track's data set or split isn't there.
        """
        try:
            return data.split_ids(self.track.entry.data, self.track.entry.split)
        except BadEntry as error:
            raise BadEntry(f"{self.track.path}: {error}") from None

    def data(self, *, verified: bool = False) -> "DataSet":
        """The track's images and labels; `verified` checks that the split is there, in order."""
        track = self.track.entry
        return data.load_data(track.data, self.builder.data, track.split if verified else None)

    def budget(self, eps: float | None = None) -> "Budget":
        """The ball around each image, of the track's radius or another."""
        from dbp_bench.threat import budget

        return budget(self.track.entry.norm, self.track.entry.eps if eps is None else eps)

    def weights(self, *, planned: bool = False) -> dict[str, str | None]:
        """The sha256 of each network's weights, by role.

        Where a run is only `planned`, that of a checkpoint that isn't in the cache is None.

        Raises:
            BadWeights: A checkpoint isn't in the cache, and it isn't only planned.
        """
        refs = {
            "classifier": self.track.entry.classifier,
            **dict(sorted(self.setting.refs.items())),
        }
        return {role: sha256_if_there(r) if planned else r.sha256 for role, r in refs.items()}

    def code(self) -> list[str]:
        """The dotted paths that the entries name for this track."""
        networks = [self.track.entry.classifier, *self.setting.refs.values()]
        paths = [ref.network for ref in networks if isinstance(ref, NetworkRef)]
        return [self.entry.entry.factory, *paths]

    def with_random_weights(self) -> "Subject":
        """The same, where checkpoints that aren't in the cache get random weights."""
        return replace(self, builder=replace(self.builder, random_weights=[]))

    def defense(
        self,
        *,
        device: "torch.device | str" = "cpu",
        dtype: "torch.dtype | None" = None,
        policy: "Policy" = "auto",
        options: Mapping[str, Any] | None = None,
        votes: int | None = None,
    ) -> "Defense":
        """The defense with its weights verified, on `device`.

        Some of the entry's `options`, and its `votes`, can be replaced by others.

        Raises:
            BadEntry: The factory doesn't take an option or a network of the entry, or needs
                another; or code of another package is named and isn't trusted.
            BadWeights: A file is missing or isn't the one that the entry means.
        """
        import torch

        from dbp_bench.defense import Defense
        from dbp_bench.purifiers.resize import Resized

        dtype, setting, path = dtype or torch.float32, self.setting, self.entry.path
        networks = {
            key: self.builder.network(ref, path).to(device, dtype)
            for key, ref in setting.networks.items()
        }
        arguments = {**networks, **setting.options, **(options or {})}
        purifier = self.builder.call(self.entry.entry.factory, path, "purifiers", arguments)
        sites = getattr(purifier, "sites", None)
        if sites != frozenset(self.entry.entry.sites):
            raise BadEntry(
                f"{path}: sites: {self.sites}, but the purifier declares "
                f"{sorted(sites) if isinstance(sites, frozenset) else sites}."
            )
        ref, where = self.track.entry.classifier, self.track.path
        if setting.classifier is not None:
            ref, where = setting.classifier, path
        classifier = self.builder.network(ref, where).to(device, dtype)
        if setting.resize is not None:
            purifier = Resized(purifier, setting.resize)
        return Defense(purifier, classifier, networks.values(), policy, votes or setting.votes)

    def searched(
        self,
        evaluated: "Defense",
        gradient: str,
        *,
        device: "torch.device | str" = "cpu",
        dtype: "torch.dtype | None" = None,
        policy: "Policy" = "auto",
    ) -> "Defense":
        """What an attack with this `gradient` differentiates in place of the `evaluated` defense.

        The same object where the gradient is exact; the purifier with the identity's gradient for
        BPDA (Athalye et al. 2018); the purifier with fewer steps for a surrogate, or as its entry
        declares.

        Raises:
            BadRequest: The entry declares no surrogate.
        """
        from dbp_bench.defense import Defense, StraightThrough

        if gradient == "bpda":
            purifier = StraightThrough(evaluated.purifier)
            return Defense(purifier, evaluated.classifier, (), policy, evaluated.votes)
        if gradient.startswith("surrogate:"):
            shorter = {"steps": int(gradient.partition(":")[2])}
            return self.defense(device=device, dtype=dtype, policy=policy, options=shorter)
        if gradient == "declared-surrogate":
            declared = self.surrogate
            return self.defense(
                device=device,
                dtype=dtype,
                policy=policy,
                options=declared.options,
                votes=declared.votes,
            )
        return evaluated
