"""The analyses, by the names that the command line gives them: each is a module beside this one."""

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

from dbp_bench.errors import UnknownName, did_you_mean

if TYPE_CHECKING:
    from dbp_bench.analyses.options import Options
    from dbp_bench.analyses.record import Row
    from dbp_bench.analyses.store import Pieces
    from dbp_bench.analyses.target import Target

NAMES = ("trajectory", "landscape", "eot-curve", "stochasticity", "immobilise", "efficacy")


class Analysis(Protocol):
    """What the module of an analysis holds."""

    Options: type["Options"]
    AXES: Sequence[str]
    STATEMENT: Sequence[str]
    EXAMPLES: int
    """Images, where no other number is asked for."""

    def measure(self, target: "Target", options: Any, pieces: "Pieces") -> "list[Row]":
        """The rows of one defense."""


def find(name: str) -> Analysis:
    """The analysis called `name`.

    Raises:
        UnknownName: There is none.
    """
    if name not in NAMES:
        raise UnknownName(f"no analysis {name!r}.{did_you_mean(name, NAMES)}")
    module = import_module(f"dbp_bench.analyses.{name.replace('-', '_')}")
    return cast(Analysis, module)
