"""The places of weights: beside an entry, among what ships, and in the cache."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from dbp_bench.errors import BadRequest, BadWeights

ASSETS = Path(__file__).parents[1] / "assets"
"""Files that ship with the package."""


def cache() -> Path:
    """The folder of what was downloaded or converted: DBP_BENCH_CACHE, or ~/.cache/dbp-bench.

    Raises:
        BadRequest: There is no home folder.
    """
    try:
        return Path(os.environ.get("DBP_BENCH_CACHE") or "~/.cache/dbp-bench").expanduser()
    except RuntimeError:
        raise BadRequest(
            "weights are kept in the home folder, and there is none: set DBP_BENCH_CACHE to a "
            "folder."
        ) from None


def find(name: str, folders: Sequence[Path]) -> Path:
    """The file called `name` in the first of `folders` that has it, or among the assets.

    Raises:
        BadWeights: There is none, or `name` leaves its folder.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise BadWeights(f"weights file {name!r}: give a path inside the entry's own folder.")
    places = [*folders, ASSETS]
    for folder in places:
        if (folder / name).is_file():
            return folder / name
    looked = ", ".join(str(place) for place in places)
    raise BadWeights(f"no weights file {name!r}. Looked in: {looked}.")


def need_space(size: int) -> None:
    """Refuse to write `size` bytes to the cache where they don't fit.

    Raises:
        BadRequest: They don't.
    """
    folder = cache()
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if size > free:
        raise BadRequest(
            f"{folder}: {size / 1e6:,.0f} MB are needed, {free / 1e6:,.0f} MB are free. Make room, "
            "or set DBP_BENCH_CACHE to a folder on another disk."
        )
