"""Optional packages: whether they are there and sound, and loading them with a message that mends.

Some of them cannot be imported as they are published. What is missing is filled in while they are
imported, and taken away again.
"""

import importlib
import importlib.metadata
import importlib.util
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal, NamedTuple, NoReturn

from dbp_bench.errors import DbpError, did_you_mean

State = Literal["ready", "missing", "shadowed", "broken"]


class BadExtra(DbpError):
    """An optional package is missing, or isn't the one it should be."""


class Status(NamedTuple):
    """The state of an extra."""

    name: str
    version: str | None
    state: State
    hint: str
    """The remedy where it isn't ready; where it is, a remark or ""."""


@dataclass(frozen=True, slots=True)
class _Extra:
    """An extra of this package."""

    packages: tuple[str, ...]
    """Packages that can serve it, the preferred one first; each is imported by its name."""
    requirement: str
    """The package, for pip, that takes the place of a damaged one."""
    files: tuple[str, ...]
    """Files in a package, without which it is another one of the same name."""
    modules: tuple[str, ...] = ("",)
    """The modules that :func:`load_extra` returns; "" is the package itself."""
    marker: tuple[str, str] | None = None
    """A file, and a text in it that only the right version has."""
    install: str = ""
    """The command that installs it, where that isn't the usual one."""
    note: str = ""


_EXTRAS = {
    "autoattack": _Extra(
        packages=("autoattack", "pyautoattack"),
        requirement='"pyautoattack>=0.2,<0.3"',
        files=("autopgd_base.py", "fab_pt.py", "square.py"),
        modules=("autopgd_base", "fab_pt", "square"),
    ),
    "torchattacks": _Extra(
        packages=("torchattacks",),
        requirement="torchattacks==3.5.1",
        files=("attack.py", "attacks/pgd.py"),
        install=(
            "pip install scipy tqdm && pip install --no-deps torchattacks==3.5.1 "
            '("dbp-bench[torchattacks]" also works, but brings requests 2.25 of 2020)'
        ),
        note="its wheel holds an old copy of robustbench: give each an environment of its own",
    ),
    "robustbench": _Extra(
        packages=("robustbench",),
        requirement="robustbench==1.1.1",
        files=("__init__.py", "eval.py", "model_zoo/__init__.py"),
        modules=("", "model_zoo", "utils"),
        marker=("eval.py", "aa_state_path"),
        install='pip install "dbp-bench[robustbench]", in an environment without torchattacks',
        note=(
            "for its model zoo only: benchmark() needs an autoattack that pip can't get; its "
            "wheel also installs a top-level package called tests"
        ),
    ),
    "timm": _Extra(
        packages=("timm",),
        requirement="timm",
        files=("__init__.py", "models/__init__.py"),
        note="it keeps its weights in the cache of huggingface_hub",
    ),
    "diffusers": _Extra(
        packages=("diffusers",),
        requirement="diffusers",
        files=("__init__.py", "schedulers/__init__.py"),
        note="for pipelines as purifiers (dbp_bench.from_diffusers)",
    ),
}

EXTRAS = tuple(_EXTRAS)
"""The names of the extras."""

_REPAIR = "pip install --force-reinstall --no-deps"


def status() -> list[Status]:
    """The state of every extra; one that seems to be there is imported, to be sure."""
    found = []
    for name in EXTRAS:
        each, _ = _look(name)
        try:
            load_extra(name)
        except BadExtra as error:
            if each.state == "ready":
                hint = str(error).removeprefix(f"{name} {each.version or ''} ").rstrip(".")
                each = each._replace(state="broken", hint=hint)
        found.append(each)
    return found


def load_extra(name: str) -> Mapping[str, ModuleType]:
    """Import an extra; its modules by name.

    ``autoattack`` gives ``autopgd_base``, ``fab_pt`` and ``square``, whose classes are the same
    in `autoattack` and `pyautoattack`; ``torchattacks`` gives ``torchattacks``; ``robustbench``
    gives ``robustbench``, ``model_zoo`` and ``utils``, for the model zoo only; ``timm`` gives
    ``timm``; ``diffusers`` gives ``diffusers``.

    Raises:
        BadExtra: It is missing, another package shadows it, or it fails to import.
    """
    if name not in _EXTRAS:
        raise BadExtra(f"no extra {name!r}.{did_you_mean(name, EXTRAS)}")
    found, package = _look(name)
    if package is None:
        raise BadExtra(f"{name}: {found.hint}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _stubs(name):
                return {
                    module or name: importlib.import_module(f"{package}.{module}".strip("."))
                    for module in _EXTRAS[name].modules
                }
    except BadExtra:
        raise
    except Exception as error:  # whatever its modules raise while they are imported
        cause = str(error).strip().partition("\n")[0]
        raise BadExtra(
            f"{name} {found.version or ''} is installed but does not import ({cause}). "
            f"Try: {_REPAIR} {_EXTRAS[name].requirement}."
        ) from error


def _look(name: str) -> tuple[Status, str | None]:
    """The state of an extra, and the package that serves it where it is ready."""
    extra = _EXTRAS[name]
    install = extra.install or f'pip install "dbp-bench[{name}]"'
    found = Status(name, None, "missing", f"not installed. Install: {install}.")
    for package in extra.packages:
        folders = _folders(package)
        if not folders:
            continue
        version = _version(package)
        problem = _problem(extra, folders, version)
        if problem is None:
            return Status(name, version, "ready", extra.note), package
        mend = f"{_REPAIR} {extra.requirement}" if version else install
        problem = f"the package {package!r} in {', '.join(map(str, folders))} {problem}"
        found = Status(name, version, "shadowed", f"{problem}. Mend: {mend}.")
    return found, None


def _problem(extra: _Extra, folders: list[Path], version: str | None) -> str | None:
    """The fault of the package in `folders`; None where it is the right one."""
    lacking = [f for f in extra.files if not any((folder / f).is_file() for folder in folders)]
    if lacking:
        broken = "it is damaged" if version else "it is something else of that name"
        return f"has no {lacking[0]}: {broken}"
    if extra.marker is not None:
        file, text = extra.marker
        path = next(folder / file for folder in folders if (folder / file).is_file())
        if text not in path.read_text(encoding="utf-8", errors="replace"):
            return "is an old copy that the wheel of torchattacks carries"
    return None


def _folders(module: str) -> list[Path]:
    """The folders that a top-level module would be imported from."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return []
    if spec is None:
        return []
    places = spec.submodule_search_locations or ([spec.origin] if spec.origin else [])
    return [Path(place) for place in places]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# ------------------------------------------------- what the extras need in order to be imported

_WITH_TORCHVISION = frozenset({"robustbench", "timm", "torchattacks"})
"""The extras that import torchvision."""


@contextmanager
def _stubs(extra: str) -> Iterator[None]:
    """Let an extra import what may be missing or broken."""
    stubs = {
        name: stub
        for name, stub in (_robustbench_needs() if extra == "robustbench" else {}).items()
        if (top := name.partition(".")[0]) not in sys.modules
        and importlib.util.find_spec(top) is None
    }
    sys.modules.update(stubs)
    try:
        if extra in _WITH_TORCHVISION and importlib.util.find_spec("torchvision") is not None:
            _import_torchvision()
        yield
    finally:
        for name, stub in stubs.items():
            if sys.modules.get(name) is stub:
                del sys.modules[name]


def _robustbench_needs() -> dict[str, Any]:
    """Stand-ins for modules that robustbench imports, by name.

    ``pkg_resources`` left setuptools in version 82; robustbench uses one function of it. Of
    ``autoattack``, it needs names: pyautoattack takes other arguments than it gives.
    """

    def resource_filename(module: str, path: str) -> str:
        return str(Path(sys.modules[module].__file__ or "").parent / path)

    def refuse(*_: object, **__: object) -> NoReturn:
        raise BadExtra(
            "robustbench is loaded for its model zoo only: its benchmark() needs the original "
            "autoattack, which no package index has. Attack with dbp-bench run."
        )

    return {
        "pkg_resources": SimpleNamespace(resource_filename=resource_filename),
        "autoattack": SimpleNamespace(AutoAttack=refuse),
        "autoattack.state": SimpleNamespace(EvaluationState=refuse),
    }


_libraries: list[object] = []
"""Operators are forgotten with the library that defined them."""


def _import_torchvision() -> None:
    """Import torchvision, even where its compiled operators are of another build than torch.

    The package index has a torchvision that is built for CUDA. Beside a CPU build of torch its
    operators can't be loaded, and it fails to import for want of those that it describes (nms,
    qnms). No model of the zoo calls them; declared without an implementation, they let the import
    through.
    """
    import torch

    library: Any = torch.library  # its classes have no annotations
    known: set[str] = set()
    while True:
        try:
            importlib.import_module("torchvision")
            return
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if missing is None or missing[1] in known:
                raise
            known.add(missing[1])
            fragment = library.Library("torchvision", "FRAGMENT")
            fragment.define(f"{missing[1]}(Tensor dets, Tensor scores, float iou) -> Tensor")
            _libraries.append(fragment)
