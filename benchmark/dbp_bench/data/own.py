"""Images of one's own: what a track must declare of them, read from the files themselves."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dbp_bench.data import DataSet, split_ids
from dbp_bench.data.catalog import Facts
from dbp_bench.data.places import FORMS_OF_OWN, class_roots, open_part, table_files
from dbp_bench.data.readers import class_folders, npz_shape, parquet_head, shape_of
from dbp_bench.errors import BadData, BadRequest

_ANY = 1 << 40
"""More images than there are, while they aren't counted yet."""


@dataclass(frozen=True)
class Described:
    """Labelled images, and what a track must declare of them."""

    shape: tuple[int, int, int]
    """``(c, h, w)``."""
    images: int
    """The number of images."""
    classes: list[str]
    """Their names, in the order of their labels; numbers where there are none."""
    split: str
    """``all``, or ``first-N``."""
    sha256: str
    """The digest of the pixels and labels of the split."""


def describe(
    name: str,
    place: Path,
    *,
    first: int | None = None,
    classes: Sequence[str] = (),
    at_least: int = 0,
) -> Described:
    """Describe the images at `place`, all of whose split are decoded.

    Args:
        name: The track's name, for messages.
        place: An npz file, a parquet file or a folder of them, or a folder of class folders.
        first: Take only the first so many; None takes all.
        classes: Names of the classes in the order of their labels, where the files have none.
        at_least: How many classes there are, where more than the labels show.

    Raises:
        BadData: There are no images, or one can't be read, has another size, or no label.
        BadExtra: A package that reads them is missing.
        BadRequest: There are not so many images or classes.
    """
    if not place.exists():
        raise BadData(f"--images {place}: no such file or folder.")
    shape, named = _looked_at(place)
    given = [*classes] or named
    labels = open_part(_facts(name, shape, len(given), _ANY), "test", place).labels
    count = len(labels)
    if not count:
        raise BadData(f"{place}: no images in it.")
    if (low := int(labels.min())) < 0:
        raise BadData(f"{place}: image {int(labels.argmin())} has label {low}: count from 0.")
    found = int(labels.max()) + 1
    if given and found > len(given):
        raise BadRequest(f"{place}: a label is {found - 1}, and there are {len(given)} names.")
    if first is not None and not 1 <= first <= count:
        raise BadRequest(f"--first {first}: there are {count} images.")
    names = given or [str(label) for label in range(max(found, at_least))]
    if len(names) < 2:
        raise BadData(f"{place}: one class only; a classifier tells two or more apart.")
    if len(set(names)) < len(names):
        raise BadRequest("--classes: a name stands there twice.")
    split = "all" if first is None else f"first-{first}"
    facts = _facts(name, shape, len(names), count)
    digest = DataSet(facts, place).pixel_digest(split_ids(facts, split))
    return Described(shape, count, names, split, digest)


def _facts(name: str, shape: tuple[int, int, int], classes: int, images: int) -> Facts:
    return Facts(name, max(classes, 1), shape, test=images, train=0, own=True)


def _looked_at(place: Path) -> tuple[tuple[int, int, int], list[str]]:
    """The shape of the images and the names of their classes, where the files have some.

    Raises:
        BadData: There are no images, or the first one can't be read.
    """
    files = [place] if place.is_file() else table_files(place)
    tables = [path for path in files if path.suffix == ".parquet"]
    if tables:
        first, names = parquet_head(tables[0])
        return shape_of(first, str(tables[0])), names
    arrays = [path for path in files if path.suffix == ".npz"]
    if arrays:
        return npz_shape(arrays[0]), []
    for root in class_roots(place):
        if folders := class_folders(root):
            image = min(folders, key=lambda path: (path.name, folders[path]))
            return shape_of(image.read_bytes(), str(image)), sorted({*folders.values()})
    raise BadData(f"--images {place}: no images there. It reads {FORMS_OF_OWN}.")
