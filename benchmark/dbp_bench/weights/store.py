"""The cache of converted checkpoints: a safetensors file and a record beside it, by name."""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from dbp_bench import __version__
from dbp_bench.declaration import Strict, parse_json, read_json
from dbp_bench.errors import BadResult, BadWeights, UnknownName
from dbp_bench.weights import catalog, files, places
from dbp_bench.writing import replacing, write_atomically

if TYPE_CHECKING:
    from torch import Tensor


class Record(Strict):
    """The origin of a checkpoint in the cache, and the digest that it must have."""

    name: str
    network: str | None
    layout: str | None
    source_sha256: str | None
    """The digest of the file that was converted; null for a model of a package."""
    source_size: int | None
    published: bool | None
    """True if that file has the published digest; null where none is known."""
    sha256: str
    """The digest of the safetensors file; of a model of a package, that its state would make."""
    licence: str
    dbp_bench: str


def folder() -> Path:
    """The folder of converted checkpoints."""
    return places.cache() / "weights"


def file(name: str) -> Path:
    """The file of the weights of `name`; a package keeps its models elsewhere."""
    return folder() / f"{stem(name)}.safetensors"


def record_file(name: str) -> Path:
    return folder() / f"{stem(name)}.json"


def has(name: str) -> bool:
    """True if `name` is in the cache, sound or not."""
    return record_file(name).is_file()


def read(name: str) -> Record:
    """The record of `name`.

    Raises:
        BadWeights: It isn't in the cache; the message gives the command that brings it there.
        UnknownName: There is no such checkpoint.
    """
    path = record_file(name)
    if not path.is_file():
        raise BadWeights(f"{name} is not in the cache ({folder()}). {how_to_get(name)}.")
    try:
        record = read_json(path, Record, "a record")
    except BadResult as error:
        raise BadWeights(f"{error} {how_to_get(name)}.") from None
    if record.name != name:
        raise BadWeights(f"{path}: the record of {record.name}, not of {name}. {how_to_get(name)}.")
    return record


def how_to_get(name: str) -> str:
    """The command that brings `name` into the cache."""
    source = catalog.find(name).source
    if isinstance(source, catalog.ByHand):
        return f"Get {source.what}; then: {convert_command(name)}"
    if isinstance(source, catalog.Zoo):
        return f"Run: dbp-bench weights fetch {name}"
    return f"Run: dbp-bench weights fetch {name}; or, with a local file: {convert_command(name)}"


def convert_command(name: str) -> str:
    return f"dbp-bench weights convert {name} --from FILE"


def verified(name: str) -> Path:
    """The weights of `name`, whose sha256 is the recorded one.

    Raises:
        BadWeights: They are missing or damaged.
    """
    record, path = read(name), file(name)
    if not path.is_file():
        raise BadWeights(f"{path} is missing, but not its record. {how_to_get(name)}.")
    files.verify(path, record.sha256, "its record says", how_to_get(name))
    return path


def put(name: str, tensors: "Mapping[str, Tensor]") -> str:
    """Write the weights of `name`, equal bytes for equal tensors, and drop its record; the sha256.

    Raises:
        OSError: The disk is full, or the folder can't be written.
    """
    from safetensors.torch import save_file

    with replacing(file(name)) as temporary:
        save_file(dict(tensors), temporary)
        temporary.chmod(0o644)  # safetensors writes for its owner alone; a cache may be shared
        sha256 = files.digest(temporary)
        # First the record: without it the weights count as missing, whatever happens between.
        record_file(name).unlink(missing_ok=True)
    return sha256


def write(
    name: str, sha256: str, source: Path | None = None, published: bool | None = None
) -> Record:
    """Write the record of the checkpoint `name`, by which it becomes usable.

    Args:
        name: The checkpoint's name.
        sha256: The digest that its weights must have.
        source: The file that was converted, if one was.
        published: True if that is the published file; None where that isn't known.
    """
    entry = catalog.find(name)
    record = Record(
        name=name,
        network=entry.network,
        layout=entry.layout,
        source_sha256=None if source is None else files.digest(source),
        source_size=None if source is None else source.stat().st_size,
        published=published,
        sha256=sha256,
        licence=entry.licence.name,
        dbp_bench=__version__,
    )
    write_atomically(record_file(name), json.dumps(record.model_dump(), indent=1) + "\n")
    return record


def names() -> list[str]:
    """Names in the cache: those of the catalog in its order, then models of packages."""
    found = [name for name in catalog.entries() if has(name)]
    for path in sorted(folder().glob("zoo-*.json")):
        # What names no model, or another file's, is no record.
        with suppress(ValueError, KeyError, TypeError, UnknownName):
            name = str(parse_json(path.read_text(encoding="utf-8"))["name"])
            catalog.find(name)
            if record_file(name) == path:
                found.append(name)
    return found


def strangers() -> list[Path]:
    """Files in the cache that belong to no checkpoint: unreadable records, left-over weights."""
    known = {path for name in names() for path in (file(name), record_file(name))}
    return sorted(p for p in folder().glob("*") if p.is_file() and p not in known)


def stem(name: str) -> str:
    """The name of the files of the checkpoint `name`, without a suffix."""
    return name if ":" not in name else "zoo-" + re.sub(r"[:/]", "-", name)
