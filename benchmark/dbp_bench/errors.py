"""What goes wrong for reasons a user can mend. Each message is one line that says what would do."""

from collections.abc import Iterable
from difflib import get_close_matches


class DbpError(Exception):
    """Base of every error that is shown as one line, without a traceback."""


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
    """Results that may not be subtracted, compared or ranked together."""


class AttackFailed(DbpError):
    """An attack or a defense gave numbers that cannot be used (NaN, no gradient, wrong shape)."""


class ZeroGradient(AttackFailed):
    """The gradient of every image was zero at every step: the defense masks it."""


class NotConforming(DbpError):
    """A defense breaks a rule that every defense must keep."""


MANY = 8
"""More names than these are not all said."""


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
