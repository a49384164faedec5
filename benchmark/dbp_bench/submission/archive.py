"""A bundle as a zip archive: written so that equal contents give equal bytes, opened without trust.

Files in a bundle are stored, not compressed: so the archive's bytes don't depend on a compressor,
and no archive unpacks to more than its own size.
"""

import errno
import json
import shutil
import stat
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from struct import error as StructError
from typing import Any, Final, Literal

from pydantic import Field, ValidationError

from dbp_bench.declaration import Strict, explain, parse_json
from dbp_bench.entries.fields import Name, Sha256
from dbp_bench.errors import BadRequest, DbpError
from dbp_bench.weights.files import digest
from dbp_bench.writing import naming, scratch_folder

MANIFEST: Final = "manifest.json"
LARGEST: Final = 8 << 30
"""The most bytes that a bundle may have."""
MOST_FILES: Final = 2000
_MANIFEST_LARGEST: Final = 4 << 20
_EPOCH: Final = (1980, 1, 1, 0, 0, 0)


_UNSOUND: Final = (
    *(zipfile.BadZipFile, EOFError, LookupError),
    *(OverflowError, RuntimeError, StructError, ValueError),
)
"""The errors that zipfile raises for an archive that is damaged."""


class Refused(DbpError):
    """A bundle that isn't what it must be; the message is the reason."""


class FileFacts(Strict):
    """The sha256 and the size of a file in a bundle."""

    sha256: Sha256
    bytes: int = Field(ge=0)


class Summary(Strict):
    """The accuracies that a bundle states for one threat model, over all its seeds."""

    images: int
    draws: int
    clean: float
    robust: float


class Manifest(Strict):
    """The contents of a bundle, as it states them: the file manifest.json in it."""

    schema_version: Literal[1] = Field(alias="schema")
    dbp_bench: str
    track: Name
    defense: Name
    environment: dict[str, str]
    summary: dict[str, Summary]
    """Accuracies by threat model."""
    files: dict[str, FileFacts]
    """Every file of the bundle but this one, by path."""

    def to_json(self) -> str:
        """The text of the file."""
        return json.dumps(self.model_dump(mode="json", by_alias=True), indent=1) + "\n"


def facts(path: Path) -> FileFacts:
    """The facts of the file at `path`."""
    return FileFacts(sha256=digest(path), bytes=path.stat().st_size)


def write(path: Path, manifest: Manifest, files: Mapping[str, Path]) -> None:
    """Write a bundle with these `files`, given by their paths in it."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(_info(MANIFEST), manifest.to_json())
        for name, source in sorted(files.items()):
            big = source.stat().st_size > 1 << 30
            with (
                source.open("rb") as file,
                archive.open(_info(name), "w", force_zip64=big) as target,
            ):
                shutil.copyfileobj(file, target, 1 << 20)


def _info(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, _EPOCH)
    info.create_system = 3
    info.external_attr = (stat.S_IFREG | 0o644) << 16
    return info


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened bundle: a folder of files whose hashes are those of its manifest."""

    folder: Path
    manifest: Manifest
    sha256: str

    @property
    def files(self) -> list[str]:
        """The paths of its files, sorted."""
        return sorted(self.manifest.files)


@contextmanager
def opened(path: Path) -> Iterator[Bundle]:
    """Unpack the bundle at `path` into a folder that is removed afterwards, and run nothing of it.

    Raises:
        BadRequest: There is no such file.
        Refused: It isn't a bundle, could do harm, or isn't what its manifest says.
    """
    if not path.is_file():
        raise BadRequest(f"{path}: no such file. `dbp-bench submit` makes a bundle.")
    size = path.stat().st_size
    if size > LARGEST:
        raise Refused(f"{size / 1e9:.1f} GB, more than the {LARGEST / 1e9:.1f} GB of a bundle.")
    with scratch_folder("dbp-bundle") as folder:
        try:
            with naming(folder), zipfile.ZipFile(path) as archive:
                infos = _safe(archive.infolist(), size)
                for info in infos:
                    target = folder / info.filename
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with archive.open(info) as source, target.open("xb") as file:
                        shutil.copyfileobj(source, file, 1 << 20)
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            raise Refused("a path in it is both a file and a folder.") from None
        except (*_UNSOUND, OSError) as error:
            if isinstance(error, OSError) and error.errno != errno.EINVAL:
                raise  # of the disk that it is unpacked to
            raise Refused(f"not a sound zip archive ({error}).") from None
        manifest = _manifest(folder / MANIFEST)
        _check_hashes(folder, manifest, {info.filename for info in infos} - {MANIFEST})
        yield Bundle(folder, manifest, digest(path))


def _safe(infos: list[zipfile.ZipInfo], size: int) -> list[zipfile.ZipInfo]:
    """Refuse an archive that would write outside its folder, or unpack to more than its size."""
    if len(infos) > MOST_FILES:
        raise Refused(f"{len(infos)} files, more than {MOST_FILES}.")
    names: set[str] = set()
    for info in infos:
        name = info.orig_filename
        if not safe_path(name):
            raise Refused(f"{name[:80]!r}: a path that leaves the bundle's folder, or isn't plain.")
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG):
            raise Refused(f"{name}: a link or a special file, not a plain one.")
        if info.flag_bits & 1:
            raise Refused(f"{name}: encrypted.")
        if info.compress_type != zipfile.ZIP_STORED:
            raise Refused(
                f"{name}: compressed; a bundle stores its files as they are. Make it with "
                "`dbp-bench submit`."
            )
        if name.casefold() in names:
            raise Refused(f"{name}: is in it twice.")
        names.add(name.casefold())
    if sum(info.file_size for info in infos) > size:
        raise Refused("its files overlap: they are larger than the archive.")
    return infos


def safe_path(name: str) -> bool:
    """True for a plain relative path of printable ASCII that stays inside its folder."""
    path = PurePosixPath(name)
    return (
        0 < len(name) <= 400
        and name.isascii()
        and name.isprintable()
        and not set(name) & set('\\:*?"<>|')
        and not path.is_absolute()
        and path.as_posix() == name
        and all(part not in (".", "..") and not part.startswith(".") for part in path.parts)
    )


def _manifest(path: Path) -> Manifest:
    if not path.is_file() or path.stat().st_size > _MANIFEST_LARGEST:
        raise Refused(f"no {MANIFEST} in it, or one that is too large.")
    try:
        table: Any = parse_json(path.read_bytes())
    except ValueError as error:
        raise Refused(f"{MANIFEST}: not JSON ({error}).") from None
    try:
        return Manifest.model_validate(table)
    except ValidationError as error:
        raise Refused(f"{MANIFEST}: {explain(error, Manifest)}") from None


def _check_hashes(folder: Path, manifest: Manifest, there: set[str]) -> None:
    listed = set(manifest.files)
    for name in sorted(listed ^ there):
        where = "listed but not there" if name in listed else "there but not listed"
        raise Refused(f"{name}: {where}: the bundle was edited. Make it again.")
    for name, stated in sorted(manifest.files.items()):
        if facts(folder / name) != stated:
            raise Refused(
                f"{name}: its sha256 isn't the one in {MANIFEST}: edited by hand after the bundle "
                "was made. Make it again with `dbp-bench submit`."
            )
