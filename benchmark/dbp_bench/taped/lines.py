"""The lines of somebody's source that lead to a draw, innermost first."""

import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from sysconfig import get_path
from types import CodeType
from typing import Literal, NamedTuple

import numpy as np
import torch

import dbp_bench

Whose = Literal["own", "library", "machinery"]


class Place(NamedTuple):
    """The lines of source that lead to a draw. Two draws of one place are drawn alike."""

    lines: tuple[str, ...]
    """``file.py:line``, innermost first. Lines of the author's own code; where there is none,
    the innermost line of each file of the libraries that were called."""
    inside: str = ""
    """The line of a library that draws, where it isn't the first of `lines`."""

    def __str__(self) -> str:
        """The line that a user would look at."""
        return self.lines[0]


def place_of_draw(ends: frozenset[CodeType]) -> Place:
    """The place of the draw that is made now, up to the call of a function of code in `ends`."""
    frames = list(_frames(ends))
    own = tuple(dict.fromkeys(line for whose, _, line in frames if whose == "own"))
    inside = frames[0][2] if frames else ""
    if own:
        return Place(own, "" if inside == own[0] else inside)
    # Libraries recurse as deep as it takes (trees of noise): one line of each file stands for it.
    files: dict[str, str] = {}
    for _, file, line in frames:
        files.setdefault(file, line)
    return Place(tuple(files.values()) or ("torch",))


def _frames(ends: frozenset[CodeType]) -> Iterator[tuple[Whose, str, str]]:
    frame = sys._getframe(2)
    while frame is not None and frame.f_code not in ends:
        whose, name = file_of(frame.f_code.co_filename)
        if whose != "machinery":
            yield whose, name, f"{name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]


_PACKAGES = (dbp_bench.__file__, torch.__file__, np.__file__)
_MACHINERY = tuple(f"{Path(file).parent}/" for file in _PACKAGES)


@lru_cache(maxsize=4096)
def file_of(path: str) -> tuple[Whose, str]:
    """Whose a file is, and its short name, the same on every machine."""
    generated = path.startswith("<") and not path.startswith(("<stdin", "<ipython"))
    if generated or path.startswith(_MACHINERY):
        return "machinery", path
    parts = Path(path).parts
    for i, part in enumerate(parts):
        if part.endswith("-packages"):
            return "library", "/".join(parts[i + 1 :])
    if path.startswith(get_path("stdlib")):
        return "machinery", path
    return "own", parts[-1] if parts else path
