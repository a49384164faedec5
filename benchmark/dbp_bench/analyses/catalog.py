"""The analyses, by the names that the command line gives them: each is a module beside this one."""

from importlib import import_module
from types import ModuleType

from dbp_bench.errors import UnknownName, did_you_mean

NAMES = ("trajectory", "landscape", "eot-curve", "stochasticity", "immobilise", "efficacy")


def find(name: str) -> ModuleType:
    """The analysis called `name`.

    Returns:
        A module with ``Options``, a class of :class:`.options.Options`; ``AXES``, the names of the
        places of its numbers; ``EXAMPLES``, the images where no other number is asked for;
        ``STATEMENT``, the definitions of its quantities, in paragraphs; and ``measure(target,
        options)``, which yields the numbers of one defense, each a :data:`.target.Found`.

    Raises:
        UnknownName: There is none.
    """
    if name not in NAMES:
        raise UnknownName(f"no analysis {name!r}.{did_you_mean(name, NAMES)}")
    return import_module(f"dbp_bench.analyses.{name.replace('-', '_')}")


def statement(analysis: ModuleType) -> list[str]:
    """The paragraphs of an analysis's statement, each on one line."""
    return [" ".join(text.split()) for text in analysis.STATEMENT.split("\n\n")]
