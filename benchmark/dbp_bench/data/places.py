"""Finding the files of a data set: in a place that the user names, or on the Hugging Face Hub."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from dbp_bench.data.catalog import CATALOG, Facts, Hub
from dbp_bench.data.readers import (
    Binary,
    Npz,
    Parquet,
    Source,
    class_folders,
    flat_imagenet,
    need,
)
from dbp_bench.errors import BadData
from dbp_bench.weights.download import NoDownload, from_hub

VARIABLE = "DBP_BENCH_DATA"
"""The environment variable that stands for ``--data``."""

_WORDS = {"test": re.compile(r"(test|val|validation)(?![a-z])"), "train": re.compile("train")}
_BATCH = re.compile(r"(data_batch_\d|test_batch|test|train)")
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
    said = "--data"
    if place is None and (set_to := os.environ.get(VARIABLE)):
        place, said = Path(set_to), VARIABLE
    if place is not None:
        place = Path(os.path.expanduser(place))  # noqa: PTH111 - that of pathlib can raise
        if not place.exists():
            raise BadData(f"{said} {place}: no such file or folder.")
        return _open(_own(place, facts), facts, part, said)
    if facts.hub is None:
        raise BadData(
            f"data set {facts.name!r} is not on this machine. Give --data PATH (or {VARIABLE}): "
            f"{_FORMS}."
        )
    return Parquet([_fetch(facts, facts.hub, part)], facts)


def _own(place: Path, facts: Facts) -> Path:
    """The part of `place` for this data set, where `place` is a folder for several."""
    names = [facts.name, f"{facts.name}.parquet", f"{facts.name}.npz"]
    return next((place / name for name in names if (place / name).exists()), place)


def _open(root: Path, facts: Facts, part: str, said: str) -> Source:
    for source in _candidates(root, facts, part):
        if source is not None:
            return source
    which = {"test": "test", "train": "training"}[part]
    raise BadData(
        f"{said} {root}: no {which} images of {facts.name} there. It reads {_FORMS}; with folders "
        f"or files called {facts.name} and {part} where there are several."
    )


def _candidates(root: Path, facts: Facts, part: str) -> Iterable[Source | None]:
    """The images that each format finds there, in order of preference; tried one by one."""
    files = [root] if root.is_file() else _files(root)
    mine = [path for path in files if _part(path, root) == part]
    parquet = [path for path in mine if path.suffix == ".parquet"]
    if parquet:
        yield Parquet(parquet, facts)
    arrays = [path for path in files if path.suffix == ".npz"]
    if len(arrays) > 1:
        arrays = [path for path in arrays if _part(path, root) == part]
    if len(arrays) > 1:
        raise BadData(f"{root}: {len(arrays)} npz files: name one with --data.")
    if arrays:
        yield Npz(arrays[0], part)
    by_name = {path.name: path for path in files}
    wanted = facts.binary[part == "train"]
    batches = [by_name[name] for name in wanted if name in by_name]
    if batches and len(batches) < len(wanted):
        missing = next(name for name in wanted if name not in by_name)
        raise BadData(f"{root}: {missing} is missing.")
    if batches:
        yield Binary(batches, facts)
    if root.is_dir() and (part == "test" or facts.train):
        words = {"test": ("test", "val", "validation", "."), "train": ("train",)}[part]
        folders = [root / word for word in words if (root / word).is_dir()]
        for folder in folders:
            yield class_folders(folder, facts)
            if facts.name == "imagenet":
                yield flat_imagenet(folder, facts)
    _refuse_pickles(files)


def _files(root: Path) -> list[Path]:
    """Files in `root` and in its folders, but for folders of other data sets."""
    keep = {".parquet", ".npz", ".bin", ""}
    found = [path for pattern in ("*", "*/*") for path in root.glob(pattern)]
    return sorted(
        path
        for path in found
        if path.suffix in keep and path.parent.name not in _others(root) and path.is_file()
    )


def _others(root: Path) -> set[str]:
    """Names of data sets, but for that of `root` itself."""
    return set(CATALOG) - {root.name}


def _part(path: Path, root: Path) -> str:
    """The part, test or train, that the name of a file or of a folder above it says; else test."""
    below = path.relative_to(root).parts if path != root else (path.name,)
    for name in reversed(below):
        for part, word in _WORDS.items():
            if word.match(name.lower()):
                return part
    return "test"


def _refuse_pickles(files: Iterable[Path]) -> None:
    for path in files:
        if path.suffix in (".pkl", ".pickle", ".pt", "") and _BATCH.fullmatch(path.stem):
            raise BadData(
                f"{path}: the Python version of CIFAR is a pickle, which can run code when it is "
                "read: refused. Give the binary version (cifar-10-binary.tar.gz or "
                "cifar-100-binary.tar.gz of the same page, unpacked), parquet or npz."
            )


def _fetch(facts: Facts, hub: Hub, part: str) -> Path:
    """The parquet file in the cache of huggingface_hub, downloaded if it isn't there."""
    need("pyarrow.parquet", f"data set {facts.name!r}: reading parquet")
    name = hub.test if part == "test" else hub.train
    try:
        return from_hub(hub.repository, [name], hub.revision, "dataset")
    except NoDownload as error:
        raise BadData(
            f"data set {facts.name!r} is not on this machine, and {error}. Give --data PATH (or "
            f"{VARIABLE}): {_FORMS}; or, with a network, run again."
        ) from None
