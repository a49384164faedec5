"""Values that several kinds of entries hold: names, numbers, networks, and the entry itself."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    Tag,
    field_validator,
)

from dbp_bench.declaration import Number, Strict
from dbp_bench.errors import UnknownName, brief
from dbp_bench.weights import catalog, files, store

NAME = r"^[a-z0-9][a-z0-9.-]*$"
DOTTED_PATH = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"


def _json(options: dict[str, Any]) -> dict[str, Any]:
    """Refuse what a result cannot hold, before anything is computed."""
    try:
        json.dumps(options, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise ValueError(
            f"{brief(options)} is not made of finite numbers, strings, true, false and lists"
        ) from None
    return options


def _distinct(names: list[str]) -> list[str]:
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ValueError(f"{name!r} stands twice")
    return names


Eps = Annotated[Number, Field(ge=0, le=1e3)]
Name = Annotated[str, Field(pattern=NAME)]
Names = Annotated[list[Name], AfterValidator(_distinct)]
Options = Annotated[dict[str, Any], AfterValidator(_json)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
DottedPath = Annotated[str, Field(pattern=DOTTED_PATH)]


class NetworkRef(Strict):
    """A network and the file that its weights are in."""

    network: DottedPath
    """``module:callable`` that builds the network, without arguments."""
    file: str
    """A safetensors file beside the entry, or one that ships with the package."""
    sha256: Sha256


class CheckpointRef(Strict):
    """A published network, taken from the cache of checkpoints."""

    checkpoint: str
    """A name of the catalog, or ``robustbench:<dataset>/<threat>/<model>``, or ``timm:<model>``."""

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
        """The sha256 of the weights in the cache.

        Raises:
            BadWeights: They aren't there; the message gives the command that brings them there.
        """
        return store.read(self.checkpoint).sha256


AnyRef = NetworkRef | CheckpointRef


def sha256_if_there(ref: AnyRef) -> str | None:
    """The sha256 of the weights of `ref`; None where they are a checkpoint that isn't cached."""
    there = isinstance(ref, NetworkRef) or store.has(ref.checkpoint)
    return ref.sha256 if there else None


def _kind_of_ref(value: Any) -> str:
    named = "checkpoint" in value if isinstance(value, dict) else hasattr(value, "checkpoint")
    return "<checkpoint>" if named else "<file>"


AnyNetwork = Annotated[
    Annotated[NetworkRef, Tag("<file>")] | Annotated[CheckpointRef, Tag("<checkpoint>")],
    Discriminator(_kind_of_ref),
]


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


E = TypeVar("E", bound=Strict)


@dataclass(frozen=True)
class Entry(Generic[E]):
    """A declaration, its name, and the file it was read from."""

    name: str
    path: Path
    entry: E

    @property
    def sha256(self) -> str:
        """The sha256 of the file."""
        return files.digest(self.path)
