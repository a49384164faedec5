"""The analyses, by the names that the command line gives them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dbp_bench.analyses import (
    efficacy,
    eotcurve,
    immobilise,
    landscape,
    stochasticity,
    trajectory,
)
from dbp_bench.analyses.options import Options
from dbp_bench.analyses.record import Row


@dataclass(frozen=True, slots=True)
class Analysis:
    """How one analysis is done."""

    name: str
    options: type[Options]
    measure: Callable[..., list[Row]]
    """Of a target, options and pieces."""
    axes: tuple[str, ...]
    statement: tuple[str, ...]
    examples: int
    """Images, where no other number is asked for."""


def _of(name: str, module: Any, examples: int) -> Analysis:
    return Analysis(name, module.Options, module.measure, module.AXES, module.STATEMENT, examples)


ANALYSES: Mapping[str, Analysis] = {
    made.name: made
    for made in (
        _of("trajectory", trajectory, 3),
        _of("landscape", landscape, 60),
        _of("eot-curve", eotcurve, 24),
        _of("stochasticity", stochasticity, 60),
        _of("immobilise", immobilise, 60),
        _of("efficacy", efficacy, 60),
    )
}
