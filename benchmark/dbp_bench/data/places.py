"""Finding the files of a data set: in a place that the user names, or on the Hugging Face Hub."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from dbp_bench.data.catalog import CATALOG, Facts
from dbp_bench.data.readers import (
    Source,
    binary,
    folder,
    need,
    npz,
    parquet,
    shipped,
)
from dbp_bench.errors import BadData
from dbp_bench.weights.download import NoDownload, from_hub

VARIABLE = "DBP_BENCH_DATA"
"""The environment variable that stands for ``--data``."""

_WORDS = {"test": re.compile(r"(test|val|validation)(?![a-z])"), "train": re.compile("train")}
_BATCH = re.compile(r"(data_batch_\d|test_batch|test|train)")
FORMS_OF_OWN = ".parquet, .npz, or a folder of images for each class"
_FORMS = ".parquet, .npz, the binary version of CIFAR, or a folder of images for each class"


def open_part(facts: Facts, part: str, place: Path | None) -> Source:
    """The test or training images of a data set.

    Args:
        facts: The data set's facts.
        part: "test" or "train".
        place: A file, a folder, or a folder with one for each data set; None for the one that the
            environment variable names, or else the hub.

    Raises:
        BadData: They are not there, or can't be read.
        BadExtra: A package that reads them is missing.
    """
    if facts.shipped:
        return shipped(facts)
    said = "--data"
    if place is None and (set_to := os.environ.get(VARIABLE)):
        place, said = Path(set_to), VARIABLE
    if place is not None:
        place = Path(os.path.expanduser(place))  # noqa: PTH111 - that of pathlib can raise
        if not place.exists():
            raise BadData(f"{said} {place}: no such file or folder.")
        # A folder for several data sets has a part for each.
        names = [facts.name, f"{facts.name}.parquet", f"{facts.name}.npz"]
        root = next((place / name for name in names if (place / name).exists()), place)
        found = (source for source in _candidates(root, facts, part) if source is not None)
        if (source := next(found, None)) is not None:
            return source
        which = {"test": "test", "train": "training"}[part]
        raise BadData(
            f"{said} {root}: no {which} images of {facts.name} there. It reads {_FORMS}; with "
            f"folders or files called {facts.name} and {part} where there are several."
        )
    missing = f"data set {facts.name!r} is not on this machine"
    remedy = f"Give --data PATH (or {VARIABLE}): {_FORMS}"
    if facts.hub is None:
        raise BadData(f"{missing}. {remedy}.")
    need("pyarrow.parquet", f"data set {facts.name!r}: reading parquet")
    try:
        file = from_hub(facts.hub.repository, [facts.hub.file(part)], facts.hub.revision, "dataset")
    except NoDownload as error:
        raise BadData(f"{missing}, and {error}. {remedy}; or, with a network, run again.") from None
    return parquet([file], facts)


def _candidates(root: Path, facts: Facts, part: str) -> Iterable[Source | None]:
    """The images that each format finds there, in order of preference; tried one by one."""
    files = [root] if root.is_file() else table_files(root)
    # All images of one's own are to be attacked, whatever their files are called.
    mine = [path for path in files if facts.own or _part(path, root) == part]
    tables = [path for path in mine if path.suffix == ".parquet"]
    if tables:
        yield parquet(tables, facts)
    arrays = [path for path in files if path.suffix == ".npz"]
    if len(arrays) > 1:
        arrays = [path for path in arrays if path in mine]
    if len(arrays) > 1:
        raise BadData(f"{root}: {len(arrays)} npz files: name one with --data.")
    if arrays:
        yield npz(arrays[0], part, facts)
    by_name = {path.name: path for path in files}
    wanted = facts.binary[part == "train"]
    missing = [name for name in wanted if name not in by_name]
    if len(missing) < len(wanted):
        if missing:
            raise BadData(f"{root}: {missing[0]} is missing.")
        yield binary([by_name[name] for name in wanted], facts)
    if root.is_dir() and (part == "test" or facts.train):
        for inner in class_roots(root) if part == "test" else [root / "train"]:
            if inner.is_dir():
                yield folder(inner, facts)
    for path in files:
        if path.suffix in (".pkl", ".pickle", ".pt", "") and _BATCH.fullmatch(path.stem):
            raise BadData(
                f"{path}: the Python version of CIFAR is a pickle, which can run code when it is "
                "read: refused. Give the binary version (cifar-10-binary.tar.gz or "
                "cifar-100-binary.tar.gz of the same page, unpacked), parquet or npz."
            )


def class_roots(root: Path) -> list[Path]:
    """The folders in which the folders of classes of test images can be."""
    return [root / word for word in ("test", "val", "validation", ".") if (root / word).is_dir()]


def table_files(root: Path) -> list[Path]:
    """Files of many images, in `root` and its folders, but for folders of other data sets."""
    others = set(CATALOG) - {root.name}
    return sorted(
        path
        for pattern in ("*", "*/*")
        for path in root.glob(pattern)
        if path.suffix in (".parquet", ".npz", ".bin", "")
        and path.parent.name not in others
        and path.is_file()
    )


def _part(path: Path, root: Path) -> str:
    """The part, test or train, that the name of a file or of a folder above it says; else test."""
    below = path.relative_to(root).parts if path != root else (path.name,)
    for name in reversed(below):
        for part, word in _WORDS.items():
            if word.match(name.lower()):
                return part
    return "test"
