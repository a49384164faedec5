"""Errors that a user can mend. Each message is one line that says what would do."""

import re
from collections.abc import Iterable
from difflib import get_close_matches

LONGEST = 2000
"""The most characters of a message: some of it comes from files that others wrote."""

# Control characters but newline and tab, half characters, and those that turn the direction.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def plain(text: str) -> str:
    r"""`text` as a terminal may show it: control characters are spelled out, such as ``\x1b``."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def brief(value: object, longest: int = 120) -> str:
    """The text of `value` in Python, cut where it is long."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # deeply nested, or a number of too many digits
        return f"a {type(value).__name__} that is too large to show"
    return text if len(text) <= longest else f"{text[:longest]}..."


class DbpError(Exception):
    """Base of every error that is shown as one line, without a traceback.

    The message is cut where it is long, and holds no control characters.
    """

    def __init__(self, message: object = "") -> None:
        text = plain(str(message))
        super().__init__(text if len(text) <= LONGEST else f"{text[:LONGEST]}...")


class UnknownName(DbpError):
    """No entry has this name."""


class BadEntry(DbpError):
    """An entry file does not say what it must."""


class BadRequest(DbpError):
    """The options of a run cannot be right, or contradict what the output folder holds."""


class BadWeights(DbpError):
    """A weights or data file is missing, damaged, not the one asked for, or unsafe to read."""


class BadData(DbpError):
    """A data set is missing or damaged, or isn't the one asked for."""


class BadResult(DbpError):
    """A result file cannot be read as a result."""


class NotComparable(DbpError):
    """Two results may not be subtracted, compared or ranked together."""


class AttackFailed(DbpError):
    """An attack or a defense gave numbers that cannot be used (NaN, no gradient, wrong shape)."""


class ZeroGradient(AttackFailed):
    """The gradient of every image was zero at every step: the defense masks it."""


class NotConforming(DbpError):
    """A defense breaks a rule that every defense must keep."""


MANY = 8
"""The most names that a hint lists in full."""


def did_you_mean(name: str, known: Iterable[str], listed_by: str = "") -> str:
    """A hint for a mistyped `name`: the nearest of `known`, and all of them where they are few.

    Where they are many, the command that lists them is said instead (`listed_by`), if there is one.
    """
    names = sorted(known)
    close = get_close_matches(name, names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    if len(names) <= MANY:
        return f"{hint} Known: {', '.join(names) if names else 'none'}."
    if listed_by:
        return f"{hint} `{listed_by}` lists them."
    return hint or f" Known: {', '.join(names[:MANY])} and {len(names) - MANY} more."


# ---------------------------------------------------------------------- in somebody's own code

LIBRARIES = frozenset(
    "IPython PIL _pytest autoattack click huggingface_hub httpx jinja2 joblib markupsafe "  # noqa: SIM905
    "matplotlib numpy pandas pkg_resources pluggy pyarrow pyautoattack pydantic pydantic_core "
    "pytest requests rich robustbench safetensors scipy setuptools shellingham skimage sklearn "
    "sympy timm torch torchattacks torchvision tqdm typer urllib3 xdist yaml diffusers".split()
)
"""Top-level packages that dbp-bench, or an extra of it, brings along."""


BESIDE = "_beside_entries_"
"""The prefix of the names under which modules that lie beside entries are loaded."""


def words_of(error: BaseException) -> str:
    """The message of an `error` that anybody raised; nothing where it can't be asked for it.

    Modules have the names in it that their files have.
    """
    try:
        return re.sub(rf"{BESIDE}\d+_", "", str(error))
    except Exception:
        return ""


def place_of(error: BaseException) -> str | None:
    """File and line of the last call in somebody's own code that led to `error`; None if none did.

    Their own is what belongs neither to this package, nor to Python, nor to a library.
    """
    from pathlib import Path
    from sysconfig import get_path
    from traceback import walk_tb

    ours, python = Path(__file__).parent, Path(get_path("stdlib"))
    place = None
    for frame, line in walk_tb(error.__traceback__):
        path = Path(frame.f_code.co_filename)
        parts = path.parts
        packages = next((i for i, p in enumerate(parts) if p.endswith("-packages")), None)
        if not path.is_file() or path.is_relative_to(ours):
            continue
        if packages is not None:
            if Path(parts[packages + 1]).stem in LIBRARIES:
                continue
        elif path.is_relative_to(python):
            continue
        place = f"{path}:{line}"
    return place_of(error.__cause__) if place is None and error.__cause__ else place
