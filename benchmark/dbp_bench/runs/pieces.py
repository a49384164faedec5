"""Unfinished work: the finished pieces of a job, stored so that only what is missing is computed.

A piece is an attack on a group of images, or the evaluation of a group at a draw. Each group has a
file, which is written anew, all of it or nothing, after every piece.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from dbp_bench.declaration import parse_json
from dbp_bench.threat import Bound, is_inside
from dbp_bench.writing import write_atomically

State = dict[str, Tensor]
"""The outcomes of one group so far, as its file holds them.

By attack N, which is the known draw, or 0 where no draw is known, one row for each image:

* ``images/N``: adversarial images;
* ``nonzero/N``: true where a gradient was not zero;
* ``gradient/N``, ``forward/N``: evaluations;
* ``package/N``: true where the attack itself calls the image robust, if it says.

By victim draw N: ``clean/N``, ``adversarial/N`` and, where draws are known, ``fresh/N`` are
predicted classes. ``nfe`` and ``searched_nfe`` are those of one purification by the defense, and by
what the attack searched in.
"""

_BY_DRAW = ("clean", "adversarial", "fresh")
_DIGEST = "digest"
"""The key of a group's metadata under which :func:`_digest` stands."""
_REQUEST = "request.json"


def is_sound(state: State, bound: Bound, clean: Tensor) -> bool:
    """Tell whether all that is known fits a group of these `clean` images, and the bound."""
    for key, value in state.items():
        if "/" not in key:
            fits = value.numel() == 1
        elif key.startswith("images/"):
            fits = (value.shape, value.dtype) == (clean.shape, clean.dtype)
            fits = fits and is_inside(bound, value, clean)
        else:
            fits = value.shape[:1] == clean.shape[:1]
        if not fits:
            return False
    return True


def _read(path: Path, request: str) -> State:
    """The state in a file, of this `request`.

    It is empty where there is no file, none that can be read, or one that this program didn't write
    as it is: its digest is another.
    """
    try:
        with safe_open(path, "pt") as file:
            stated = (file.metadata() or {}).get(_DIGEST)
        state = load_file(path)
    except (SafetensorError, OSError, ValueError, RuntimeError):
        return {}
    return state if stated == _digest(request, path.name, state) else {}


def _digest(request: str, name: str, state: State) -> str:
    """sha256 over a piece of work, its place, and the `request` that it answers."""
    total = sha256(f"{request}\n{name}\n".encode())
    for key, value in sorted(state.items()):
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
            folder: The folder of its unfinished work.
            identity: The identity of the job; work on another request doesn't count.
            groups: Ids of the images of each group.
            examples: Images that are asked for; the last group may have more.
            attacks: Attacks on each image.
            draws: Draws at which each image is evaluated.
        """
        request = json.dumps(identity, sort_keys=True)
        states = [_read(_path(folder, index), request) for index in range(len(groups))]
        return cls(folder, request, groups, examples, attacks, draws, states)

    def write(self, index: int) -> None:
        """Store what is done of the group with this `index`."""
        path = _path(self.folder, index)
        state = {key: value.contiguous() for key, value in self.states[index].items()}
        digest = _digest(self.request, path.name, state)
        write_atomically(path, save(state, {_DIGEST: digest}))

    @property
    def attacks_missing(self) -> int:
        """The number of attacks on one image that are still to be made."""
        return sum(
            len(ids)
            for ids, state in zip(self.groups, self.states, strict=True)
            for attack in range(self.attacks)
            if f"images/{attack}" not in state
        )

    def missing(self, state: State) -> Iterator[tuple[str, int]]:
        """The pieces that a group lacks, in order: attacks, and evaluations at victim draws."""
        for draw in range(self.draws):
            if draw < self.attacks and f"images/{draw}" not in state:
                yield "attack", draw
            if f"adversarial/{draw}" not in state:
                yield "evaluate", draw

    def rows(self, kind: str) -> Tensor:
        """The values of a `kind`: one row per image, one column per draw or attack."""
        numbers = range(self.draws if kind in _BY_DRAW else self.attacks)
        groups = [torch.stack([s[f"{kind}/{n}"] for n in numbers], dim=1) for s in self.states]
        return torch.cat(groups)[: self.examples]

    def most(self, kind: str) -> int:
        """The largest count of a `kind` in any group."""
        return max(int(state[kind]) for state in self.states)


def _path(folder: Path, index: int) -> Path:
    return folder / f"group-{index:05d}.safetensors"
