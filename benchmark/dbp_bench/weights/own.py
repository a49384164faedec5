"""Weights of one's own: the state of a network, found in a file of torch and written for an entry.

Training code nests a state dict under ``state_dict``, ``model``, ``net`` or ``ema``, puts
``module.`` before each name, and stores an optimizer beside it. The part of the file that fills the
network is found by the names of the network's own state.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dbp_bench.errors import BadRequest, BadWeights
from dbp_bench.weights import files, formats
from dbp_bench.writing import replacing

_COUNTER = "num_batches_tracked"
"""A buffer of batch normalisation that old files lack; nothing reads it in eval mode."""


@dataclass(frozen=True)
class Found:
    """The state of a network, and what else there was."""

    state: dict[str, Tensor]
    prefix: str
    """The prefix of each name in the file, such as ``state_dict.module.``."""
    dropped: list[str]
    """Names of what the network doesn't take; what lies deep in it is named by its top."""
    added: list[str]
    """Counters of batch normalisation that were missing."""


def find(path: Path, network: nn.Module, prefix: str | None = None) -> Found:
    """Find the state of `network` in the file at `path`, in which nothing is run.

    Args:
        path: A file of ``torch.save``, old or new, or of safetensors.
        network: Gives the names and shapes.
        prefix: What stands before each name, where the file holds several such states.

    Raises:
        BadRequest: The file holds several, or none with this `prefix`.
        BadWeights: It can't be read without running code, or is of another architecture.
    """
    held = dict(_flat(formats.read(path).values))
    tensors = {name for name, value in held.items() if isinstance(value, Tensor)}
    state = network.state_dict()
    if not state:
        raise BadWeights(f"{path}: {type(network).__name__} has no weights.")
    wanted = [name for name in state if not name.endswith(_COUNTER)]
    probe = wanted[0]
    places = [
        name.removesuffix(probe) for name in tensors if name == probe or name.endswith(f".{probe}")
    ]
    whole = sorted(each for each in places if all(f"{each}{name}" in tensors for name in wanted))
    if prefix is not None:
        if prefix not in places:
            raise BadRequest(
                f"--prefix {prefix!r}: {path} has {', '.join(sorted(map(repr, places))) or 'none'}."
            )
        whole = [prefix]
    if len(whole) > 1:
        raise BadRequest(
            f"{path}: holds such a network {len(whole)} times. Add --prefix with one of: "
            f"{', '.join(whole)}."
        )
    # Where none is whole, the first that there is says in the message what is missing.
    start = [*whole, *sorted(places), _common(tensors)][0]
    inside = {name[len(start) :]: name for name in tensors if name.startswith(start)}
    parts = {name.partition(".")[0] for name in state}
    # Another layer of a part that the network has is no accident: it is another architecture.
    mine = {n: held[full] for n, full in inside.items() if n.partition(".")[0] in parts}
    added = [name for name in state if name.endswith(_COUNTER) and name not in mine]
    mine |= {name: torch.zeros((), dtype=torch.int64) for name in added}
    files.check_fit(network, mine, path)
    for name, value in mine.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise BadWeights(f"{path}: {name} holds NaN or infinity: damaged, or diverged.")
    rest = set(held) - {inside[name] for name in mine if name in inside}
    return Found(mine, start, _named(rest, start), added)


def save(found: Found, to: Path, *, force: bool = False) -> str:
    """Write the state to the safetensors file `to`; its sha256.

    Raises:
        BadRequest: It isn't called so, or is there and `force` is false.
    """
    from safetensors.torch import save_file

    if to.suffix != ".safetensors":
        raise BadRequest(f"--to {to}: call it {to.with_suffix('.safetensors').name}.")
    if to.exists() and not force:
        raise BadRequest(f"--to {to}: it is there already. Add --force to replace it.")
    with replacing(to) as temporary:
        # Copies, since tensors that share memory can't be saved.
        save_file({name: v.contiguous().clone() for name, v in found.state.items()}, temporary)
        temporary.chmod(0o644)
    return files.digest(to)


def _flat(values: Mapping[str, Any], before: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """All values in nested tables, by their names joined with dots."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value and depth < 20:
            yield from _flat(value, f"{before}{key}.", depth + 1)
        else:
            yield f"{before}{key}", value


def _common(names: set[str]) -> str:
    """The tables and wrappers that all `names` lie in."""
    for start in ("state_dict.", "model_state_dict.", "model.", "net.", "module."):
        if names and all(name.startswith(start) for name in names):
            return start + _common({name.removeprefix(start) for name in names})
    return ""


def _named(rest: set[str], start: str) -> list[str]:
    """The tops of what is left: beside the network's state by one part, within it by two."""
    tops: dict[str, int] = {}
    for name in sorted(rest):
        inner = name.removeprefix(start).partition(".")[0]
        top = f"{start}{inner}" if start and name.startswith(start) else name.partition(".")[0]
        tops[top] = tops.get(top, 0) + 1
    return [top if count == 1 else f"{top} ({count} values)" for top, count in tops.items()]
