"""The analyses, by the names that the command line gives them: each is a module beside this one."""

from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

from dbp_bench.errors import UnknownName, did_you_mean

if TYPE_CHECKING:
    from dbp_bench.analyses.options import Options
    from dbp_bench.analyses.record import Found
    from dbp_bench.analyses.target import Target

NAMES = ("trajectory", "landscape", "eot-curve", "stochasticity", "immobilise", "efficacy")


class Analysis(Protocol):
    """The module of an analysis."""

    Options: type["Options"]
    AXES: Sequence[str]
    EXAMPLES: int
    """Images, where no other number is asked for."""
    STATEMENT: str
    """The quantities that are measured and their definitions, in paragraphs."""

    def measure(self, target: "Target", options: Any) -> "Iterable[Found]":
        """The numbers of one defense."""


def find(name: str) -> Analysis:
    """The analysis called `name`.

    Raises:
        UnknownName: There is none.
    """
    if name not in NAMES:
        raise UnknownName(f"no analysis {name!r}.{did_you_mean(name, NAMES)}")
    module = import_module(f"dbp_bench.analyses.{name.replace('-', '_')}")
    return cast(Analysis, module)


def statement(analysis: Analysis) -> list[str]:
    """The paragraphs of an analysis's statement, each on one line."""
    return [" ".join(text.split()) for text in analysis.STATEMENT.split("\n\n")]
