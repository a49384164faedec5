"""Starts something of your own: a defense, an attack, or a track of your own images.

What is written passes the checks as it is.
"""

import keyword
import re
import sys
from collections.abc import Container, Mapping
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import Final

from dbp_bench import attacks
from dbp_bench.entries.registry import Registry
from dbp_bench.errors import BadRequest
from dbp_bench.writing import write_together

TEMPLATE: Final = Path(__file__).parent / "template"
_FILES: Final = {
    "entry.yaml": "defenses/{entry}.yaml",
    "module.py": "{module}.py",
    "README.md": "README.md",
}


def names(name: str, taken: Container[str], what: str) -> tuple[str, str]:
    """The names of an entry and its module, such as my-defense and my_defense.

    Raises:
        BadRequest: It can't be both, or is `taken` by another of `what` it is.
    """
    entry, module = name.replace("_", "-"), name.replace("-", "_")
    if not re.fullmatch(r"[a-z][a-z0-9]*([_-][a-z0-9]+)*", name) or len(name) > 60:
        raise BadRequest(
            f"{name[:80]!r}: give lower-case letters, digits and single underscores or dashes, "
            "starting with a letter, such as my_defense."
        )
    if entry == "all" or entry in taken:
        raise BadRequest(f"{name!r}: there is {what} of that name. Choose another one.")
    if keyword.iskeyword(module) or module in sys.stdlib_module_names:
        raise BadRequest(f"{name!r}: a word of Python, or a module of its library. Choose another.")
    if find_spec(module) is not None:
        raise BadRequest(f"{name!r}: an installed package is called {module}. Choose another name.")
    return entry, module


def new_defense(name: str, out: Path | None, registry: Registry) -> list[Path]:
    """Write the folder of a new defense; all of it or nothing.

    Returns:
        The files.

    Raises:
        BadRequest: The name can't be taken, or the folder is there.
    """
    entry, module = names(name, registry.defenses, "a defense")
    out = out or Path(name)
    return _write(out, _FILES, {"entry": entry, "module": module, "folder": out.as_posix()})


def new_attack(name: str, out: Path | None) -> tuple[Path, str]:
    """Write a folder with the module of a new attack.

    Returns:
        The module, and the name that ``--attack`` takes, such as ``my_attack:MomentumPGD``.

    Raises:
        BadRequest: The name can't be taken, or the folder is there.
    """
    _, module = names(name, attacks.names(), "an attack")
    (path,) = _write(out or Path(name), {"attack.py": "{module}.py"}, {"module": module})
    return path, f"{module}:MomentumPGD"


def _write(out: Path, files: Mapping[str, str], words: Mapping[str, str]) -> list[Path]:
    """Write the templates `files`, filled in with `words`, into the new folder `out`."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadRequest(f"{out} exists. Choose another --out, or move it away.")
    made: dict[str, str | bytes] = {
        target.format(**words): Template((TEMPLATE / source).read_text("utf-8")).substitute(words)
        for source, target in files.items()
    }
    write_together(out, made, with_folders=True)
    return sorted(out / name for name in made)
