"""A defense on a track, resolved: everything that is needed to build it and to read its images."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbp_bench import data
from dbp_bench.data.catalog import Facts
from dbp_bench.entries.build import Builder
from dbp_bench.entries.defense import DefenseEntry, Setting, Surrogate
from dbp_bench.entries.fields import AnyRef, CheckpointRef, Entry, NetworkRef, sha256_if_there
from dbp_bench.entries.track import OwnImages, Track
from dbp_bench.errors import BadEntry, BadRequest
from dbp_bench.weights import store

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dbp_bench.data import DataSet
    from dbp_bench.defense import Defense
    from dbp_bench.memory import Policy
    from dbp_bench.taped import Taped
    from dbp_bench.threat import Budget


_PROBED = 5
"""Images on which a module that draws by itself is probed."""


@dataclass(frozen=True)
class Subject:
    """A defense on a track; nothing is looked up by name any more."""

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
        """The sites at which the defense draws noise, sorted."""
        return sorted(self.entry.entry.sites)

    @property
    def surrogate(self) -> Surrogate:
        """The stand-in that ``gradient: declared-surrogate`` differentiates.

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

    def refuse_bpda(self) -> None:
        """Refuse the identity's gradient where no image is purified.

        Raises:
            BadRequest: The defense gives logits, and BPDA needs a purified image.
        """
        if self.setting.classifies is not None:
            other = " or declared-surrogate" if self.setting.surrogate else ""
            raise BadRequest(
                f"gradient: bpda, but {self.name} gives logits and no purified image: take "
                f"exact{other}."
            )

    @property
    def facts(self) -> Facts:
        """The facts of the track's data set."""
        return self.track.entry.facts(self.track.name)

    def ids(self) -> list[int]:
        """The ids of all images of the track, in order.

        Raises:
            BadEntry: The track's data set or split isn't there.
        """
        try:
            return data.split_ids(self.facts, self.track.entry.split)
        except BadEntry as error:
            raise BadEntry(f"{self.track.path}: {error}") from None

    def factory(self) -> Callable[..., Any]:
        """The class, or function of another package, that makes the purifier. Nothing is built.

        Raises:
            BadEntry: It cannot be imported, or isn't trusted.
        """
        path = self.entry.path
        return self.builder.find(self.entry.entry.factory, path, "purifiers", path)

    def data(self, *, verified: bool = False) -> "DataSet":
        """The track's images and labels; `verified` checks that the split is there, in order."""
        track, place = self.track.entry, self.builder.data
        if place is None and isinstance(track.data, OwnImages):
            place = self.track.path.parent.parent / track.data.path
        return data.load_data(self.facts, place, track.split if verified else None)

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

    def code(self) -> list[tuple[str, Path]]:
        """The dotted paths that the entries name for this track, each with its entry."""
        own, track = self.entry.path, self.track.path
        networks = [(self.track.entry.classifier, track)]
        networks += [(ref, own) for ref in self.setting.refs.values()]
        paths = [(ref.network, path) for ref, path in networks if isinstance(ref, NetworkRef)]
        inner = [] if self.setting.inner is None else [(self.setting.inner.factory, own)]
        return [(self.entry.entry.factory, own), *inner, *paths]

    def checkpoints(self) -> list[str]:
        """The checkpoints that a run needs, the track's classifier among them."""
        refs = dict.fromkeys([*self.setting.refs.values(), self.track.entry.classifier])
        return [ref.checkpoint for ref in refs if isinstance(ref, CheckpointRef)]

    def uncached(self) -> list[str]:
        """The checkpoints that it is built from and that aren't in the cache."""
        refs: list[AnyRef] = list(self.setting.networks.values())
        if self.setting.classifies is None:
            refs.append(self._classifier[0])
        names = [ref.checkpoint for ref in refs if isinstance(ref, CheckpointRef)]
        return [name for name in names if not store.has(name)]

    def with_random_weights(self) -> "Subject":
        """The same subject, whose checkpoints that aren't in the cache get random weights."""
        return replace(self, builder=replace(self.builder, random_weights=True))

    @property
    def _classifier(self) -> tuple[AnyRef, Path]:
        """The classifier behind the purifier, and the entry that names it."""
        if self.setting.classifier is not None:
            return self.setting.classifier, self.entry.path
        return self.track.entry.classifier, self.track.path

    def base_classifier(self, device: "torch.device | str" = "cpu") -> "nn.Module":
        """The classifier behind the purifier, or the track's where there is none behind it."""
        return self.builder.network(*self._classifier).to(device).eval()

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

        Some of the entry's `options` (see :attr:`Setting.replaceable`), and its `votes`, can be
        replaced by others.

        Raises:
            BadEntry: The factory doesn't take an option or a network of the entry, or needs
                another; or code of another package is named and isn't trusted.
            BadWeights: A file is missing or isn't the one that the entry means.
        """
        import torch
        from torch import nn

        from dbp_bench.defense import Defense
        from dbp_bench.purifiers.resize import Resized

        dtype, setting, path = dtype or torch.float32, self.setting, self.entry.path
        networks = {
            key: self.builder.network(ref, path).to(device, dtype)
            for key, ref in setting.networks.items()
        }
        given, changed = dict[str, Any](networks), dict(options or {})
        if (inner := setting.inner) is not None:
            its = {name: changed.pop(name) for name in {*changed} - {*setting.options}}
            wrapped = {**networks, **inner.options, **its}
            given = {"inner": self.builder.call(inner.factory, path, "purifiers", wrapped)}
        arguments = {**given, **setting.options, **changed}
        purifier = self.builder.call(self.entry.entry.factory, path, "purifiers", arguments)
        if not hasattr(purifier, "sites"):
            purifier = self._taped(purifier, device, dtype)
        sites = getattr(purifier, "sites", None)
        if sites != frozenset(self.entry.entry.sites):
            raise BadEntry(
                f"{path}: sites: {self.sites}, but the purifier declares "
                f"{sorted(sites) if isinstance(sites, frozenset) else sites}."
            )
        classifier: nn.Module = nn.Identity()
        if setting.classifies is None:
            classifier = self.builder.network(*self._classifier).to(device, dtype)
        if setting.resize is not None:
            if hasattr(purifier, "smoothing_sigma"):
                raise BadEntry(
                    f"{path}: resize: {setting.resize}, but a certificate is about noise in the "
                    "track's own pixels; leave it out."
                )
            purifier = Resized(purifier, setting.resize)
        votes, classes = votes or setting.votes, self.facts.classes
        return Defense(
            purifier, classifier, networks.values(), policy, votes, classes, setting.decision
        )

    def _taped(self, module: Any, device: "torch.device | str", dtype: "torch.dtype") -> "Taped":
        """A module that draws by itself, under a tape; it is probed on images of uniform noise.

        Raises:
            NotConforming: Its draws can't be told apart.
        """
        import torch
        from torch import nn

        from dbp_bench.noise import Site, Tape
        from dbp_bench.taped import Taped

        if isinstance(module, nn.Module):
            module.eval().to(device, dtype)
        taped = Taped(module, self.setting.lines)
        few = torch.empty(_PROBED, *self.facts.shape, device=device, dtype=dtype)
        taped.probe(Tape.make(0, "probe images", range(_PROBED)).uniform(Site("pixels"), 0, few))
        return taped

    def searched(
        self,
        evaluated: "Defense",
        gradient: str,
        *,
        device: "torch.device | str" = "cpu",
        dtype: "torch.dtype | None" = None,
        policy: "Policy" = "auto",
    ) -> "Defense":
        """The defense that an attack with this `gradient` differentiates for the `evaluated` one.

        The same object where the gradient is exact; the purifier with the identity's gradient for
        BPDA (Athalye et al. 2018); the purifier with fewer steps for a surrogate, or as its entry
        declares.

        Raises:
            BadRequest: The entry declares no surrogate; or BPDA of what purifies no image.
        """
        from dbp_bench.defense import StraightThrough

        if gradient == "bpda":
            self.refuse_bpda()
            return evaluated.around(StraightThrough(evaluated.purifier), policy)
        build = partial(self.defense, device=device, dtype=dtype, policy=policy)
        if gradient.startswith("surrogate:"):
            return build(options={"steps": int(gradient.partition(":")[2])})
        if gradient == "declared-surrogate":
            return build(options=self.surrogate.options, votes=self.surrogate.votes)
        return evaluated
