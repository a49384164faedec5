"""The images of a split, in order: by a rule, or from a list that is frozen as text.

A list in ``assets/ids`` is the same for everyone, and is checked against the labels of the images
it is used with: a copy of the data in another order is refused. Nothing here imports torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

from dbp_bench.data.catalog import facts_of
from dbp_bench.errors import BadEntry, did_you_mean
from dbp_bench.weights.places import ASSETS

LISTS = ASSETS / "ids"

_LISTED = ("first-1024", "stratified-512", "validation")
LABELS = "# sha256 of the labels: "
"""The line of a list that has their digest begins so."""


@dataclass(frozen=True, slots=True)
class Frozen:
    """A list of ids, and a digest that shows whether images are in the published order."""

    ids: list[int]
    labels: str
    """The sha256 of the labels of the ids, in their order, separated by commas."""


def split_ids(name: str, split: str) -> list[int]:
    """The ids of a split, in order.

    Raises:
        BadEntry: There is no such data set or split.
    """
    facts, known = facts_of(name), split_names(name)
    if split not in known:
        raise BadEntry(f"data set {name!r} has no split {split!r}.{did_you_mean(split, known)}")
    if (listed := frozen(name, split)) is not None:
        return listed.ids
    if name == "digits":
        from safetensors.numpy import load_file

        return [int(i) for i in load_file(ASSETS / "digits.safetensors")[f"{split}_ids"]]
    if split == "test":
        return list(range(facts.test))
    held_out = set(split_ids(name, "validation"))
    return [i for i in range(facts.test, facts.test + facts.train) if i not in held_out]


def split_names(name: str) -> list[str]:
    """The splits of the data set called `name`."""
    rules = ["test", "train"] if facts_of(name).train else ["test"]
    listed = [s for s in _LISTED if (LISTS / f"{name}-{s}.txt").is_file()]
    return sorted([*rules, *listed])


def frozen(name: str, split: str) -> Frozen | None:
    """The list that defines a split; None where a rule does."""
    path = LISTS / f"{name}-{split}.txt"
    if not path.is_file():
        return None
    lines = path.read_text(encoding="ascii").splitlines()
    digest = next(line for line in lines if line.startswith(LABELS)).removeprefix(LABELS)
    return Frozen([int(i) for line in lines if line[:1] != "#" for i in line.split()], digest)


def digest_of(labels: Sequence[int]) -> str:
    """The sha256 of a list of labels or ids, separated by commas."""
    return sha256(",".join(map(str, labels)).encode()).hexdigest()
