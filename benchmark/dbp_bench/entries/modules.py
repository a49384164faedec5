"""Loads modules that lie beside entries, by their paths and under keys of their own.

Nothing is put on ``sys.path``: modules of one name in two folders don't meet, an older copy that is
installed doesn't come first, and a module called ``types`` doesn't hide Python's. Modules of one
folder import one another by their plain names, as if they were installed.
"""

import builtins
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

from dbp_bench.entries.outside import Source

_KEY = "_beside_entries_"
_NUMBERS = count()


@dataclass
class _Beside:
    """The modules of one folder that were asked for, with what these import there."""

    folder: Path
    key: str
    """The package in ``sys.modules`` below which they are."""
    files: dict[str, str] = field(default_factory=dict)
    """The sha256 of each file that may be run, by its path in the folder."""

    @property
    def tops(self) -> set[str]:
        return {name.partition("/")[0].removesuffix(".py") for name in self.files}

    def importing(
        self,
        name: str,
        globals: Mapping[str, Any] | None = None,
        locals: Mapping[str, Any] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        """The statement ``import`` in these modules."""
        importer = str((globals or {}).get("__name__", ""))
        if level:
            package = str((globals or {}).get("__package__") or "")
            if level > package.count("."):
                raise ImportError("attempted relative import beyond top-level package")
            return builtins.__import__(name, globals, locals, fromlist or (), level)
        top = name.partition(".")[0]
        if name == "importlib" or (top == "importlib" and not fromlist):
            return self._importlib(builtins.__import__(name, globals, locals, (), 0))
        # A module that is called like one of Python's own means that one, not itself.
        itself = importer == f"{self.key}.{top}" and f"{top}.py" in self.files
        if top not in self.tops or (itself and top in sys.stdlib_module_names):
            return builtins.__import__(name, globals, locals, fromlist or (), 0)
        if fromlist:
            return builtins.__import__(f"{self.key}.{name}", globals, locals, fromlist, 0)
        import_module(f"{self.key}.{name}")
        return sys.modules[f"{self.key}.{top}"]

    def _importlib(self, real: ModuleType) -> ModuleType:
        """Python's importlib, whose ``import_module`` finds these modules, too."""
        shown = ModuleType("importlib", real.__doc__)
        shown.__dict__.update(vars(real))
        shown.__dict__["import_module"] = self._by_name
        return shown

    def _by_name(self, name: str, package: str | None = None) -> ModuleType:
        if name.partition(".")[0] in self.tops:
            return import_module(f"{self.key}.{name}")
        return import_module(name, package)


_FOLDERS: dict[Path, _Beside] = {}
_BY_KEY: dict[str, _Beside] = {}


def load(module: str, folder: Path, source: Source) -> ModuleType:
    """The module called `module` in `folder`, whose top-level module has this `source`.

    What was loaded from files that have changed since is loaded again.

    Raises:
        ImportError: It can't be imported; the message has no keys.
    """
    files = {name: sha256(path.read_bytes()).hexdigest() for name, path in source.files.items()}
    held = _FOLDERS.get(folder)
    if held is None or any(held.files.get(name, new) != new for name, new in files.items()):
        held = _Beside(folder, f"{_KEY}{next(_NUMBERS)}")
        _FOLDERS[folder] = _BY_KEY[held.key] = held
        root = ModuleType(held.key)
        root.__path__ = [str(folder)]
        sys.modules[held.key] = root
    held.files |= files
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    try:
        return import_module(f"{held.key}.{module}")
    except ImportError as error:
        told = ImportError(str(error).replace(f"{held.key}.", ""))
        raise told.with_traceback(error.__traceback__) from error


class _Finder(MetaPathFinder):
    """Finds what lies below a key; all else is for others to find."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        key, _, name = fullname.partition(".")
        beside = _BY_KEY.get(key)
        if beside is None or not name:
            return None
        relative = name.replace(".", "/")
        for file, is_package in ((f"{relative}/__init__.py", True), (f"{relative}.py", False)):
            if file in beside.files:
                place = beside.folder / file
                return spec_from_file_location(
                    fullname,
                    place,
                    loader=_Loader(fullname, str(place), beside.files[file], beside),
                    submodule_search_locations=[str(place.parent)] if is_package else None,
                )
        if any(file.startswith(f"{relative}/") for file in beside.files):
            spec = ModuleSpec(fullname, None, is_package=True)
            spec.submodule_search_locations = [str(beside.folder / relative)]
            return spec
        raise ModuleNotFoundError(f"No module named {name!r}", name=fullname)


class _Loader(SourceFileLoader):
    """Runs a source file as it was when its digest was taken; never what was compiled before."""

    def __init__(self, fullname: str, path: str, digest: str, beside: _Beside) -> None:
        super().__init__(fullname, path)
        self._digest, self._beside = digest, beside

    def get_code(self, fullname: str) -> Any:  # noqa: ARG002
        raw = self.get_data(self.path)
        if sha256(raw).hexdigest() != self._digest:
            raise ImportError(f"{self.path} was changed while it was loaded")
        return self.source_to_code(raw, self.path)

    def exec_module(self, module: ModuleType) -> None:
        own = {**vars(builtins), "__import__": self._beside.importing}
        module.__dict__["__builtins__"] = own
        super().exec_module(module)
