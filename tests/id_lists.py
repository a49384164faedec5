"""How the frozen lists of ids were made: the rules, and the writer of ``assets/ids``.

A list is written once and never again; the tests know that it follows from its rule.
"""

from collections import defaultdict
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from dbp_bench.data import facts_of, split_ids, splits

STRATIFIED = 512
"""Images of `stratified-512`. Half of the 95 % interval of an accuracy of 50 % is 4.3 points; most
published evaluations of purification have as many, and an attack of each takes GPU-hours."""

FIRST = 1024
"""Images of `first-1024`, as many as the published numbers of ADDT have."""

_PER_LINE = 16


def stratified(name: str, labels: Sequence[int], ids: Sequence[int], count: int) -> list[int]:
    """`count` of `ids` by rounds: each takes the next image, in order, of every class in turn.

    The classes take turns in the order of the sha256 of ``name/label``, since labels can be sorted
    by meaning: the first 512 of ImageNet are mostly animals.

    Args:
        name: The data set's name.
        labels: The label of each id.
        ids: The ids to choose from, in order.
        count: The number of ids to choose.
    """
    queues: dict[int, list[int]] = defaultdict(list)
    for i in reversed(ids):
        queues[labels[i]].append(i)
    turns = sorted(queues, key=lambda label: sha256(f"{name}/{label}".encode()).digest())
    chosen: list[int] = []
    while len(chosen) < count and any(queues.values()):
        chosen += [queues[label].pop() for label in turns if queues[label]]
    return chosen[:count]


def write_lists(name: str, labels: Sequence[int], folder: Path) -> list[Path]:
    """Write the frozen lists of a data set from its labels, by id."""
    facts = facts_of(name)
    made: dict[str, tuple[list[int], str]] = {}
    if name == "digits":
        turn = stratified(name, labels, split_ids("digits", "train"), 180)
        made["validation"] = (turn, _DIGITS_RULE)
    else:
        test = range(facts.test)
        order = "" if facts.train else _FIRST_NUMBERS
        made["first-1024"] = (list(test[:FIRST]), _FIRST_RULE + order)
        chosen = stratified(name, labels, test, STRATIFIED)
        made["stratified-512"] = (chosen, _STRATIFIED_RULE)
        if facts.train:
            rest: Sequence[int] = range(facts.test, facts.test + facts.train)
            rule = _VALIDATION_RULE
        else:
            taken = {*test[:FIRST], *chosen}
            rest, rule = [i for i in test if i not in taken], _HELD_OUT_RULE
        made["validation"] = (stratified(name, labels, rest, STRATIFIED), rule)
    paths = []
    for split, (ids, rule) in made.items():
        head = [f"{name}, split {split}: ids of {len(ids)} images", *rule.strip().splitlines()]
        lines = [f"# {line}" for line in head]
        lines.append(f"{splits.LABELS}{splits.digest_of([labels[i] for i in ids])}")
        lines += [
            " ".join(map(str, ids[start : start + _PER_LINE]))
            for start in range(0, len(ids), _PER_LINE)
        ]
        path = folder / f"{name}-{split}.txt"
        path.write_text("\n".join(lines) + "\n", encoding="ascii")
        paths.append(path)
    return paths


_TURNS = """
In rounds: each takes the next image, in the published order, of every class; the classes take turns
in the order of the sha256 of "<data set>/<label>". The first N of them are therefore balanced too.
"""

_FIRST_RULE = """
Rule: the first 1024 test images in the published order, as the published numbers of ADDT have.
For comparison with those. The classes are not equally many.
"""

_FIRST_NUMBERS = """
By the number in the file name. Code of the same authors takes them from folders sorted by class,
which are 21 classes only; which of the two their numbers on ImageNet used isn't published.
""".lstrip()

_STRATIFIED_RULE = f"""
Rule: 512 test images, stratified by class.{_TURNS.rstrip()}
Why 512: half of the 95 % interval of an accuracy of 50 % is then 4.3 points; most published
evaluations of purification have as many; one attack on each takes hours on a GPU.
"""

_VALIDATION_RULE = f"""
Rule: 512 training images, stratified by class; an id is the number of test images plus the number
of the training image.{_TURNS.rstrip()}
For choosing hyper-parameters, instead of test images. Published networks were trained on these
images: compare settings on them, but report no accuracy.
"""

_HELD_OUT_RULE = f"""
Rule: 512 images that neither first-1024 nor stratified-512 has, stratified by class.
{_TURNS.strip()}
For choosing hyper-parameters, instead of those. They are of the published validation images, not of
the training images: networks have not seen them, and no one needs 138 GB for 512 images.
"""

_DIGITS_RULE = f"""
Rule: 180 training images, stratified by class.{_TURNS.rstrip()}
For choosing hyper-parameters, instead of test images. The networks of this package were trained on
these images: compare settings on them, but report no accuracy.
"""
