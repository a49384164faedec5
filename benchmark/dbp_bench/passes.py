"""How many passes an attack takes of one image: known beforehand, or bounded from above.

Where images finish early (at known draws), or are never looked at again once they were wrong (in
other packages), only a bound can be given. The counts of other packages are read from their loops
(pyautoattack 0.2, torchattacks 3.5).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any, NamedTuple


class Setup(NamedTuple):
    """What decides the number of passes, beside the effort."""

    hidden: bool
    """Whether the attacker must guess a draw."""
    norm: str = "linf"
    eps: float = 0.0
    classes: int = 10


@dataclass(frozen=True, slots=True)
class Passes:
    """Of one attack on one image, through what it searches in."""

    gradients: int
    """With a gradient."""
    looks: int
    """Without."""
    exact: bool
    """Whether it takes so many; at most so many otherwise."""

    def __add__(self, other: "Passes") -> "Passes":
        """Of two attacks in turn."""
        both = self.exact and other.exact
        return Passes(self.gradients + other.gradients, self.looks + other.looks, both)


def phases(norm: str, steps: int) -> int:
    """How many searches one run of APGD is made of: an l1 ball is reached from larger ones."""
    return 3 if norm == "l1" and 2 * ceil(0.3 * steps) < steps else 1


def of_autoattack(version: str, steps: int, queries: int, eot: int, setup: Setup) -> Passes:
    """Of a `version` of AutoAttack, at most.

    Every search looks at the images first; APGD takes a gradient where it starts, too; each target
    of APGD and FAB takes a look, FAB another before and after; one draw judges each search.
    """
    if version == "rand":
        return Passes(2 * (eot if setup.hidden else 1) * (steps + 1), 1 + 2 * 2, exact=False)
    l1 = setup.norm == "l1"
    others = max(setup.classes - 1, 1)
    restarts, targets, goals = (
        (5, min(5, others), min(9, others)) if l1 else (1, *[min(9, others)] * 2)
    )
    run = steps + (3 if l1 else 1)
    looks = {
        "verdicts": 1 + 4,
        "apgd-ce": 1,
        "apgd-t": 1 + targets,
        "fab-t": 1 + goals * (3 + steps),
        "square": 3 + queries,
    }
    return Passes((restarts + targets) * run + goals * steps, sum(looks.values()), exact=False)


def of_torchattacks(name: str, options: Mapping[str, Any], setup: Setup) -> Passes:
    """Of an attack of torchattacks, which doesn't know whether draws are hidden."""

    def option(key: str) -> int:
        """Of the `options`, which are only checked when a run is planned."""
        value = options.get(key, 1)
        return value if isinstance(value, int) else 1

    steps, restarts = option("steps"), option("n_restarts")
    if name == "BIM" and steps == 0:  # it takes as many as the radius has grey levels
        steps = int(min(setup.eps * 255 + 4, 1.25 * setup.eps * 255))
    if name == "APGD":
        return Passes(restarts * option("eot_iter") * (steps + 1), 1, exact=False)
    if name == "Square":
        return Passes(0, 1 + restarts * (2 + option("n_queries")), exact=False)
    if name == "FAB":
        targeted = bool(options.get("multi_targeted"))
        runs = restarts * (setup.classes - 1 if targeted else 1)
        return Passes(runs * steps, 2 + runs * (2 + targeted + steps), exact=False)
    each = {
        "EOTPGD": option("eot_iter"),
        "UPGD": option("eot_iter"),
        "SINIFGSM": option("m"),
        "VMIFGSM": 1 + option("N"),
        "VNIFGSM": 1 + option("N"),
        "PIFGSM": option("num_iter_set"),
        "PIFGSMPP": option("num_iter_set"),
    }
    return Passes(steps * each.get(name, 1), int(name == "TPGD"), exact=True)
