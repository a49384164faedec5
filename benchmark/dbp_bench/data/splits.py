"""The images of a split, in order: by a rule, or from a list that is frozen as text.

A list in ``assets/ids`` is the same for everyone, and is checked against the labels of the images
it is used with: a copy of the data in another order is refused. Nothing here imports torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

from dbp_bench.data.catalog import Facts, facts_of
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


def split_ids(data: Facts | str, split: str) -> list[int]:
    """The ids of a split, in order.

    Raises:
        BadEntry: There is no such data set or split.
    """
    facts = facts_of(data)
    name = facts.name
    if facts.own:
        return list(range(_first_of_own(facts, split)))
    known = split_names(facts)
    if split not in known:
        raise BadEntry(f"data set {name!r} has no split {split!r}.{did_you_mean(split, known)}")
    if (listed := frozen(facts, split)) is not None:
        return listed.ids
    if name == "digits":
        from safetensors.numpy import load_file

        return [int(i) for i in load_file(ASSETS / "digits.safetensors")[f"{split}_ids"]]
    if split == "test":
        return list(range(facts.test))
    held_out = set(split_ids(facts, "validation"))
    return [i for i in range(facts.test, facts.test + facts.train) if i not in held_out]


def split_names(data: Facts | str) -> list[str]:
    """The splits of a data set."""
    facts = facts_of(data)
    if facts.own:
        return ["all"]
    rules = ["test", "train"] if facts.train else ["test"]
    listed = [s for s in _LISTED if (LISTS / f"{facts.name}-{s}.txt").is_file()]
    return sorted([*rules, *listed])


def _first_of_own(facts: Facts, split: str) -> int:
    """The number of images of a split of one's own images: ``all``, or ``first-N``."""
    count = split.removeprefix("first-")
    if split == "all":
        return facts.test
    if count != split and count.isdecimal() and 1 <= int(count) <= facts.test:
        return int(count)
    raise BadEntry(
        f"split: {split!r}, but images of one's own have the split all, or first-N with N in "
        f"1 ... {facts.test}."
    )


def frozen(data: Facts | str, split: str) -> Frozen | None:
    """The list that defines a split; None where a rule does."""
    facts = facts_of(data)
    path = LISTS / f"{facts.name}-{split}.txt"
    if facts.own or not path.is_file():
        return None
    lines = path.read_text(encoding="ascii").splitlines()
    digest = next(line for line in lines if line.startswith(LABELS)).removeprefix(LABELS)
    return Frozen([int(i) for line in lines if line[:1] != "#" for i in line.split()], digest)


def digest_of(labels: Sequence[int]) -> str:
    """The sha256 of a list of labels or ids, separated by commas."""
    return sha256(",".join(map(str, labels)).encode()).hexdigest()
