"""A defense: the purifier, its networks and options on each track."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from dbp_bench.declaration import Strict
from dbp_bench.entries.fields import AnyNetwork, AnyRef, DottedPath, Name, Names, Options
from dbp_bench.errors import did_you_mean

OWN_CLASSIFIER = "defense.classifier"
"""The role of a defense's own classifier in results, beside that of the track, "classifier"."""

BASE = "none"
"""The defense without a purifier: the base classifier of each track."""
UNPURIFIED = "dbp_bench.purifiers.controls:Unpurified"
"""The factory of what is a classifier alone: it leaves images as they are."""


class Surrogate(Strict):
    """The program that the authors of a defense attacked in place of the one that they score.

    It is another program: fewer steps, coarser levels, one purification in place of several. An
    attack with ``gradient: declared-surrogate`` searches in it, and its images are evaluated by the
    defense, as published.
    """

    options: Options = Field(min_length=1)
    """Options of the defense, or of what it wraps, that are others here."""
    votes: int = Field(default=1, ge=1)
    """Purifications of each image."""


class Inner(Strict):
    """The purifier that the defense's own wraps."""

    factory: DottedPath
    """``module:Class``; it takes all networks of the setting."""
    options: Options


class Setting(Strict):
    """The set-up of a defense on some tracks."""

    tracks: Names = Field(min_length=1)
    options: Options
    """Options of the factory: the fields of its class."""
    networks: dict[str, AnyNetwork]
    """The networks that the factory takes, by argument name."""
    inner: Inner | None = None
    """The purifier that a factory such as SSNI wraps, as its argument ``inner``; the networks are
    then those of the wrapped one. May be left out."""
    votes: int = Field(default=1, ge=1)
    """Independent purifications of each image, whose majority decides. May be left out."""
    decision: Literal["majority", "first", "mean"] = "majority"
    """The rule by which several votes decide: a majority, where a tie names no class; the same, but
    that a tie names the class of the earliest vote (`first`); or the largest mean probability. May
    be left out."""
    resize: int | None = Field(default=None, ge=1)
    """The side of the square images that the purifier takes; null for the track's own. May be left
    out."""
    surrogate: Surrogate | None = None
    """The program that attacks with ``gradient: declared-surrogate`` search in. May be left out."""
    lines: dict[str, Name] = Field(default_factory=dict)
    """By ``file.py:line`` the site of what is drawn there, for a torch module that draws by itself
    (see :class:`dbp_bench.Taped`). May be left out."""
    classifier: AnyNetwork | None = None
    """The classifier in place of the track's, for models that are robust by their training. May be
    left out."""
    classifies: str | None = None
    """The one of `networks` by which the factory's class classifies: it gives logits, no classifier
    follows, and results record this network as the defense's own. May be left out."""

    @property
    def refs(self) -> dict[str, AnyRef]:
        """Every network of the set-up, by the name under which a result records its weights."""
        own = self.classifier
        if self.classifies is not None:
            own = self.networks[self.classifies]
        return {**self.networks, **({} if own is None else {OWN_CLASSIFIER: own})}

    @property
    def replaceable(self) -> dict[str, Any]:
        """The options that a surrogate may have others of: its own, and those of what it wraps."""
        return {**(self.inner.options if self.inner else {}), **self.options}

    @model_validator(mode="after")
    def _one_value_each(self) -> Self:
        for name in self.networks:
            if name == "classifier":
                raise ValueError("networks: 'classifier' is the track's; give it another name")
            if name in self.options:
                raise ValueError(f"{name!r} is both an option and a network")
        if self.classifies is not None:
            if self.classifies not in self.networks:
                hint = did_you_mean(self.classifies, self.networks).rstrip(".")
                raise ValueError(f"classifies: no network {self.classifies!r}.{hint}")
            for name in ("classifier", "resize"):
                if getattr(self, name) is not None:
                    raise ValueError(f"classifies and {name} don't go together")
        for name in ("votes", "decision", "resize", "inner"):
            if name in self.options:
                raise ValueError(f"options: {name}: stands beside options, not among them")
        if self.decision != "majority" and self.votes == 1:
            raise ValueError(f"decision: {self.decision} makes no difference to one vote")
        for name in self.surrogate.options if self.surrogate else ():
            if name not in self.replaceable:
                hint = did_you_mean(name, self.replaceable).rstrip(".")
                raise ValueError(f"surrogate.options: no option {name!r}.{hint}")
        return self

    @property
    def recorded(self) -> dict[str, Any]:
        """The set-up as a result has it: options; inner, votes and resize where there are any."""
        more: dict[str, Any] = {} if self.inner is None else {"inner": self.inner.model_dump()}
        more |= {"votes": self.votes} if self.votes > 1 else {}
        if self.decision != "majority":
            more["decision"] = self.decision
        return {**self.options, **more, **({"resize": self.resize} if self.resize else {})}


class DefenseEntry(Strict):
    """A purifier, and its setting on each track."""

    title: str
    kind: Literal["control", "defense"]
    paper: str | None
    factory: DottedPath
    """``module:Class``; called with the networks and the options, it gives a purifier."""
    sites: Names
    """The sites at which it draws noise; ``[]`` for a deterministic one."""
    settings: list[Setting] = Field(min_length=1)

    @model_validator(mode="after")
    def _one_setting_each(self) -> Self:
        tracks = [track for setting in self.settings for track in setting.tracks]
        for track in tracks:
            if tracks.count(track) > 1:
                raise ValueError(f"settings: track {track!r} has two")
        return self

    def setting(self, track: str, like: str | None = None) -> Setting | None:
        """The setting for `track`, or else for the one that it is `like`; None: there is none.

        The base classifier of a track needs no setting of its own there.
        """
        named = (s for name in (track, like) for s in self.settings if name in s.tracks)
        base = (s for s in self.settings if self.factory == UNPURIFIED and s.classifier is None)
        return next(named, None) or next(base, None)

    @property
    def tracks(self) -> list[str]:
        """All tracks that it has a setting for."""
        return [track for setting in self.settings for track in setting.tracks]
