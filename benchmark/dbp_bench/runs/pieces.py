"""Unfinished work: the finished pieces of a job, stored so that only what is missing is computed.

A piece is an attack on a group of images, or the evaluation of a group at a draw. Each group has a
file, which is written anew, all of it or nothing, after every piece.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from dbp_bench.declaration import parse_json
from dbp_bench.threat import Budget, is_inside
from dbp_bench.writing import write_atomically

_BY_ATTACK = ("images", "nonzero", "gradient", "forward", "package")
_BY_DRAW = ("clean", "adversarial", "fresh")
_COUNTS = ("nfe", "searched_nfe")
_DIGEST = "digest"
"""The key of a group's metadata under which :func:`_digest` stands."""
_REQUEST = "request.json"


@dataclass(slots=True)
class State:
    """The outcomes of one group so far. They are saved after every piece of work."""

    images: dict[int, Tensor] = field(default_factory=dict)
    """Adversarial images, by attack: the known draw, or 0 where no draw is known."""
    nonzero: dict[int, Tensor] = field(default_factory=dict)
    """By attack, for each image: true where a gradient was not zero."""
    gradient: dict[int, Tensor] = field(default_factory=dict)
    """By attack, for each image: gradient evaluations."""
    forward: dict[int, Tensor] = field(default_factory=dict)
    """By attack, for each image: forward evaluations."""
    package: dict[int, Tensor] = field(default_factory=dict)
    """By attack, for each image: true where the attack itself calls it robust, if it says."""
    clean: dict[int, Tensor] = field(default_factory=dict)
    """By victim draw: predicted classes of the clean images."""
    adversarial: dict[int, Tensor] = field(default_factory=dict)
    """By victim draw: predicted classes of the adversarial images."""
    fresh: dict[int, Tensor] = field(default_factory=dict)
    """By known draw: predicted classes ``(b, FRESH_DRAWS)``."""
    nfe: int = 0
    """Calls of the denoising networks in one purification by the defense."""
    searched_nfe: int = 0
    """The same of what the attack searched in."""

    @classmethod
    def read(cls, path: Path, request: str) -> "State":
        """The state in a file, of this `request`.

        It is empty where there is no file, none that can be read, or one that this program didn't
        write as it is: its digest is another.
        """
        state = cls()
        if not path.is_file():
            return state
        try:
            with safe_open(path, "pt") as file:
                stated = (file.metadata() or {}).get(_DIGEST)
            tensors = load_file(path)
            if stated != _digest(request, path.name, tensors):
                return state
            for name, value in tensors.items():
                kind, _, number = name.partition("/")
                if kind in (*_BY_ATTACK, *_BY_DRAW):
                    getattr(state, kind)[int(number)] = value
                elif kind in _COUNTS:
                    setattr(state, kind, int(value))
                else:
                    return cls()
        except (SafetensorError, OSError, LookupError, TypeError, ValueError, RuntimeError):
            return cls()
        return state

    def write(self, path: Path, request: str) -> None:
        tensors = {
            f"{kind}/{number}": value.contiguous()
            for kind in (*_BY_ATTACK, *_BY_DRAW)
            for number, value in getattr(self, kind).items()
        }
        counts = {kind: torch.tensor(getattr(self, kind)) for kind in _COUNTS}
        tensors |= counts
        metadata = {_DIGEST: _digest(request, path.name, tensors)}
        write_atomically(path, save(tensors, metadata))

    def is_sound(self, budget: Budget, clean: Tensor) -> bool:
        """Tell whether all that is known fits a group of these `clean` images, and the budget."""
        return all(
            found.shape == clean.shape
            and found.dtype == clean.dtype
            and is_inside(budget, found, clean)
            for found in self.images.values()
        ) and all(
            len(value) == len(clean)
            for kind in (*_BY_ATTACK, *_BY_DRAW)
            for value in getattr(self, kind).values()
        )


def _digest(request: str, name: str, tensors: Mapping[str, Tensor]) -> str:
    """sha256 over a piece of work, its place, and the `request` that it answers."""
    total = sha256(f"{request}\n{name}\n".encode())
    for key, value in sorted(tensors.items()):
        total.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        total.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def work_folder(path: Path, out: Path) -> Path:
    """The folder of the unfinished work of the result at `path`, below the folder `out`."""
    return out / ".work" / path.relative_to(out).with_suffix("")


def read_request(folder: Path) -> dict[str, Any] | None:
    """The request that the unfinished work in `folder` answers; None where that can't be read."""
    try:
        request = parse_json((folder / _REQUEST).read_text())
    except (OSError, ValueError):
        return None
    return request if isinstance(request, dict) else None


def write_request(folder: Path, identity: Mapping[str, Any]) -> None:
    """Say that the work in `folder` answers the request with this `identity`."""
    write_atomically(folder / _REQUEST, json.dumps(identity, indent=1))


@dataclass(frozen=True, slots=True)
class Pieces:
    """The work of a job, by group of images: what is done and what is missing."""

    folder: Path
    request: str
    groups: list[list[int]]
    examples: int
    attacks: int
    draws: int
    states: list[State]

    @classmethod
    def read(
        cls,
        folder: Path,
        identity: Mapping[str, Any],
        groups: list[list[int]],
        *,
        examples: int,
        attacks: int,
        draws: int,
    ) -> "Pieces":
        """Read what is done of a job.

        Args:
            folder: Where its unfinished work is.
            identity: That of the job: what answers another request isn't done.
            groups: Ids of the images of each group.
            examples: Images that are asked for; the last group may have more.
            attacks: Attacks on each image.
            draws: Draws at which each image is evaluated.
        """
        request = json.dumps(identity, sort_keys=True)
        states = [State.read(_path(folder, index), request) for index in range(len(groups))]
        return cls(folder, request, groups, examples, attacks, draws, states)

    def write(self, index: int) -> None:
        """Store what is done of the group with this `index`."""
        self.states[index].write(_path(self.folder, index), self.request)

    @property
    def attacks_missing(self) -> int:
        """The number of attacks on one image that are still to be made."""
        return sum(
            len(ids)
            for ids, state in zip(self.groups, self.states, strict=True)
            for attack in range(self.attacks)
            if attack not in state.images
        )

    def missing(self, state: State) -> Iterator[tuple[str, int]]:
        """The pieces that a group lacks, in order: attacks, and evaluations at victim draws."""
        for draw in range(self.draws):
            if draw < self.attacks and draw not in state.images:
                yield "attack", draw
            if draw not in state.adversarial:
                yield "evaluate", draw

    def columns(self, kind: str) -> list[Any]:
        """One row per image of the job, one column per draw or attack."""
        numbers = range(self.attacks if kind in _BY_ATTACK else self.draws)
        groups = [torch.stack([getattr(s, kind)[n] for n in numbers], dim=1) for s in self.states]
        rows: list[Any] = torch.cat(groups)[: self.examples].tolist()
        return rows

    def totals(self, kind: str) -> Tensor:
        """A number for each image of the job, over all attacks."""
        numbers = range(self.attacks)
        groups = [torch.stack([getattr(s, kind)[n] for n in numbers]).sum(0) for s in self.states]
        return torch.cat(groups)[: self.examples]

    def images(self) -> Tensor:
        """All adversarial images ``(attacks, n, c, h, w)``."""
        numbers = range(self.attacks)
        return torch.cat([torch.stack([s.images[n] for n in numbers]) for s in self.states], dim=1)


def _path(folder: Path, index: int) -> Path:
    return folder / f"group-{index:05d}.safetensors"
