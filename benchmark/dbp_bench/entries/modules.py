"""Loads modules that lie beside entries, by their paths and under names of their own.

Nothing is put on ``sys.path``: modules of one name in two folders don't meet, an older copy that is
installed doesn't come first, and a module called ``types`` doesn't hide Python's. Modules of one
folder import one another by their plain names, as if they were installed.
"""

import builtins
import sys
from collections.abc import Mapping, Sequence
from hashlib import sha256
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

from dbp_bench.entries import outside
from dbp_bench.entries.outside import Source
from dbp_bench.errors import BESIDE, LIBRARIES

_NUMBERS = count()
_KNOWN = sys.stdlib_module_names | LIBRARIES


class _Folder(MetaPathFinder):
    """The modules of one folder that were asked for, with what these import there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.prefix = f"{BESIDE}{next(_NUMBERS)}_"
        """The beginning of their names in ``sys.modules``."""
        self.files: dict[Path, str] = {}
        """The sha256 of each file that may be run."""

    def key(self, name: str, importer: str = "") -> str:
        """The full name of the module that `importer` calls `name`, of this folder or another.

        Raises:
            ImportError: It lies in this folder, but wasn't found in the text of what imports it.
        """
        top = name.partition(".")[0]
        # A module that is called like one of Python's own, or like torch, means that, not itself.
        itself = importer == self.prefix + top and top in _KNOWN
        tops = {file.relative_to(self.folder).parts[0].removesuffix(".py") for file in self.files}
        known = top in tops or top in _KNOWN
        if top and not known and outside.is_in(top, self.folder):
            # No import statement names it: it isn't in the hash, and another could be taken for it.
            raise ImportError(
                f"{top} lies in {self.folder}, but is only named at run time: write `import {top}`",
                name=top,
            )
        return self.prefix + name if top in tops and not itself else name

    def importing(
        self,
        name: str,
        globals: Mapping[str, Any] | None = None,
        locals: Mapping[str, Any] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        """The statement ``import`` in these modules."""
        if level == 0:
            name = self.key(name, str((globals or {}).get("__name__", "")))
        found = builtins.__import__(name, globals, locals, fromlist or (), level)
        return self._importlib(found) if found.__name__ == "importlib" else found

    def _importlib(self, real: ModuleType) -> ModuleType:
        """Python's importlib, whose ``import_module`` finds these modules, too."""
        shown = ModuleType("importlib", real.__doc__)
        shown.__dict__.update(vars(real))

        def by_name(name: str, package: str | None = None) -> ModuleType:
            return import_module(self.key(name), package)

        shown.__dict__["import_module"] = by_name
        return shown

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        """Find a module of this folder; all others are for others to find."""
        if not fullname.startswith(self.prefix):
            return None
        name = fullname.removeprefix(self.prefix)
        place = self.folder.joinpath(*name.split("."))
        for file in (place / "__init__.py", place.with_name(f"{place.name}.py")):
            if file in self.files:
                loader = _Loader(fullname, str(file), self)
                return spec_from_file_location(fullname, file, loader=loader)
        if not any(file.is_relative_to(place) for file in self.files):
            raise ModuleNotFoundError(f"No module named {name!r}", name=fullname)
        spec = ModuleSpec(fullname, None, is_package=True)
        spec.submodule_search_locations = [str(place)]
        return spec


class _Loader(SourceFileLoader):
    """Runs a source file as it was when its digest was taken; never what was compiled before."""

    def __init__(self, fullname: str, path: str, folder: _Folder) -> None:
        super().__init__(fullname, path)
        self._folder = folder

    def get_code(self, fullname: str) -> Any:  # noqa: ARG002
        raw = self.get_data(self.path)
        if sha256(raw).hexdigest() != self._folder.files[Path(self.path)]:
            raise ImportError(f"{self.path} was changed while it was loaded")
        return self.source_to_code(raw, self.path)

    def exec_module(self, module: ModuleType) -> None:
        own = {**vars(builtins), "__import__": self._folder.importing}
        module.__dict__["__builtins__"] = own
        super().exec_module(module)


_FOLDERS: dict[Path, _Folder] = {}


def load(module: str, folder: Path, source: Source) -> ModuleType:
    """The module called `module` in `folder`, whose top-level module has this `source`.

    What was loaded from files that have changed since is loaded again.

    Raises:
        ImportError: It can't be imported.
    """
    files = {path: sha256(path.read_bytes()).hexdigest() for path in source.files.values()}
    held = _FOLDERS.get(folder)
    if held is None or any(held.files.get(path, new) != new for path, new in files.items()):
        held = _FOLDERS[folder] = _Folder(folder)
        sys.meta_path.insert(0, held)
    held.files |= files
    return import_module(held.prefix + module)
