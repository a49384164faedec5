"""Finds what lies outside this package without running it: folders of entries, and source code.

Nothing here imports what it names: a module is looked up beside the entry that names it, then where
the import system would find it, and its source is read as text.
"""

import ast
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.machinery import ModuleSpec
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path

from dbp_bench.errors import BadEntry

GROUP = "dbp_bench.entries"
"""Entry points of installed packages: ``package:folder``, a folder of entries in the package."""

OWN = "dbp_bench"
_LARGEST = 4 << 20
"""The most bytes that a source file may have."""


# ---------------------------------------------------------------------------- folders of entries


def entry_folders() -> list[Path]:
    """The folders of entries that installed packages expose; none of their code runs.

    Raises:
        BadEntry: A package names a folder that isn't there.
    """
    points = sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value))
    return list(dict.fromkeys(_folder(point) for point in points))


def _folder(point: EntryPoint) -> Path:
    package, _, folder = point.value.partition(":")
    parts = [part.strip() for part in (*package.split(".")[1:], *folder.split("."))]
    for place in _places(package.split(".")[0].strip()):
        path = place.joinpath(*(part for part in parts if part)).resolve()
        if path.is_dir() and path.is_relative_to(place.resolve()):
            return path
    owner = point.dist.name if point.dist else point.name
    raise BadEntry(
        f"{owner}: its entry point {point.name} = {point.value} ({GROUP}) leads to no folder. "
        f"Install {owner} again, or uninstall it."
    )


def _places(top: str) -> list[Path]:
    """The folders of the top-level package called `top`, if it is installed."""
    spec = _spec(top)
    return [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []


def _spec(top: str) -> ModuleSpec | None:
    """The module spec by which the import system would load `top`; None if it finds none."""
    try:
        return find_spec(top)
    except (ImportError, ValueError):
        return None


# ----------------------------------------------------------------------------------- source code


@dataclass(frozen=True, slots=True)
class Source:
    """The source files that a top-level module, or package, is made of."""

    top: str
    files: Mapping[str, Path]
    """The files, each under the path that it is imported from, such as ``package/module.py``."""

    @property
    def sha256(self) -> str:
        """The sha256 of all files and their names."""
        total = sha256()
        for name, path in sorted(self.files.items()):
            total.update(f"{name}\n{sha256(path.read_bytes()).hexdigest()}\n".encode())
        return total.hexdigest()


def code(dotted: Iterable[tuple[str, Path]], folders: Sequence[Path]) -> dict[str, str]:
    """The sha256 of the code outside this package that `dotted` paths name, by top-level module.

    Each path comes with the entry that names it. Where two entries mean modules of one name in two
    folders, one sha256 stands for both. Modules that can't be found are left out: importing them
    fails with a message of its own.
    """
    found: dict[str, set[str]] = {}
    for path, entry in dotted:
        for top in tops([path]):
            if each := source(top, places(entry, folders)):
                found.setdefault(top, set()).add(each.sha256)
    return {
        top: min(each) if len(each) == 1 else sha256("\n".join(sorted(each)).encode()).hexdigest()
        for top, each in sorted(found.items())
    }


def tops(dotted: Iterable[str]) -> list[str]:
    """The top-level modules outside this package, of paths such as ``package.module:name``."""
    return sorted({path.partition(":")[0].split(".")[0] for path in dotted} - {OWN})


def places(entry: Path, folders: Sequence[Path]) -> list[Path | None]:
    """The places of modules that `entry` names: its own folder, then the other `folders`.

    What the command line names has no folder of its own, which is None then.
    """
    own = {"defenses": 1, "tracks": 1, "threats": 2, "settings": 2}.get(entry.parent.name)
    return list(dict.fromkeys([None if own is None else entry.resolve().parents[own], *folders]))


def beside(top: str, places: Sequence[Path | None]) -> Path | None:
    """The one of the `places` of an entry that has the module or package called `top`, if any.

    The first is the entry's own folder and comes first; among the others none does.

    Raises:
        BadEntry: Several others have it.
    """
    having = [place for place in places if place and is_in(top, place)]
    if len(having) > 1 and having[0] != places[0]:
        raise BadEntry(
            f"module {top!r} is in {' and in '.join(map(str, having))}: leave out one of these "
            "--entries, or rename it in one."
        )
    return having[0] if having else None


def source(top: str, places: Sequence[Path | None], *, installed: bool = True) -> Source | None:
    """The source of the module or package called `top`; None where there is none.

    Args:
        top: Without dots.
        places: The folders to look in (see :func:`places`), before installed packages. A module
            there is taken with those beside it that it imports.
        installed: True if installed packages count.
    """
    if folder := beside(top, places):
        return Source(top, _with_imports(top, folder))
    if installed and (found := _installed(top)) is not None:
        name, path = found
        return Source(top, dict(_files(path, name)))
    return None


def _installed(top: str) -> tuple[str, Path] | None:
    """Name and path of the file or folder that would be imported as `top`."""
    for place in _places(top):
        return top, place
    spec = _spec(top)
    if spec and spec.origin and Path(spec.origin).suffix == ".py":
        return f"{top}.py", Path(spec.origin)
    return None


def is_in(top: str, folder: Path) -> bool:
    """True if `folder` has a module or package called `top`."""
    return top != OWN and any(_files_of(top, folder))


def _with_imports(top: str, folder: Path) -> dict[str, Path]:
    """The files of `top` in `folder`, and of all modules there that these import."""
    files: dict[str, Path] = {}
    open_tops, seen = [top], {OWN}
    while open_tops:
        name = open_tops.pop()
        if name in seen:
            continue
        seen.add(name)
        found = dict(_files_of(name, folder))
        files |= found
        for file in found.values():
            open_tops += _imported(file)
    return files


def _files_of(top: str, folder: Path) -> Iterator[tuple[str, Path]]:
    """The files of a package or module in `folder`; a folder of Python files is a package, too."""
    package, module = folder / top, folder / f"{top}.py"
    if module.is_file() and not (package / "__init__.py").is_file():
        return _files(module, top)
    return _files(package, top) if package.is_dir() else iter(())


def _files(path: Path, name: str) -> Iterator[tuple[str, Path]]:
    """The Python files below `path`, or `path` itself, by the path they are imported from."""
    if path.is_file():
        yield path.name, path
        return
    for file in sorted(path.rglob("*.py")):
        inside = file.relative_to(path)
        if not any(part.startswith(".") for part in inside.parts) and file.is_file():
            yield f"{name}/{inside.as_posix()}", file


def _imported(path: Path) -> Iterator[str]:
    """The top-level modules that a file imports, as far as its text says so."""
    if path.stat().st_size > _LARGEST:
        raise BadEntry(f"{path}: more than {_LARGEST >> 20} MiB of source code.")
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return  # importing it says so
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]
