"""Accuracy where the draws of each subset of the sites are known: it tells which noise protects."""

from collections.abc import Iterator
from functools import partial
from itertools import chain, combinations

import torch

from dbp_bench.analyses import options as base
from dbp_bench.analyses.options import Allowance, Count, Known
from dbp_bench.analyses.target import Found, Target, Tensors, fresh, joined, mean
from dbp_bench.attacks.standard import Standard
from dbp_bench.evaluation import Group
from dbp_bench.noise import Site
from dbp_bench.reporting.statistics import Bootstrap

AXES = ("sites",)
EXAMPLES = 60

NOTHING = "nothing"

STATEMENT = """\
accuracy: the standard attack is shown the victim's draws at the sites of the series and guesses
elsewhere; evaluated at the victim's own draw, which is fresh at the sites not shown. Where nothing
is known, every evaluation draw is fresh.

accuracy-fresh: the same adversarial images on draws that no attack was shown at any site.

fall: accuracy with nothing known minus this one, paired over images. `sites`: how many are
known."""


class Options(base.Options):
    """Budget, known draws, evaluation draws where none is known, and evaluation draws elsewhere."""

    budget: Allowance = 200
    known: Known = 3
    draws: Count = 9
    fresh: Count = 3


def subsets(sites: frozenset[Site]) -> list[frozenset[Site]]:
    """All subsets of `sites`, small ones first."""
    sizes = range(len(sites) + 1)
    return [
        frozenset(c) for c in chain.from_iterable(combinations(sorted(sites), n) for n in sizes)
    ]


def called(known: frozenset[Site]) -> str:
    """The name of a subset's series."""
    return "+".join(sorted(known)) or NOTHING


def measure(target: Target, options: Options) -> Iterator[Found]:
    """The numbers of one defense."""
    interval, hidden = Bootstrap.of(target.images).estimate, None
    for known in subsets(target.defense.sites):
        series = called(known)
        found = joined(target.each(series, partial(outcomes, target, options, known)))
        right, others = (mean(found[key].mean(1)) for key in ("robust", "fresh"))
        hidden = right if hidden is None else hidden
        yield series, (len(known),), "accuracy", interval(right)
        yield series, (len(known),), "accuracy-fresh", interval(others)
        yield series, (len(known),), "fall", interval(hidden - right)


def outcomes(target: Target, options: Options, known: frozenset[Site], group: Group) -> Tensors:
    """1 where images are right, else 0 ``(b, draws)``: at the draws of a run, and at fresh ones."""
    draws = options.known if known else options.draws
    images, right = target.outcomes(group, Standard(options.budget), known, draws)
    new = [target.correct(found, group, fresh(options.fresh)) for found in images]
    return {"robust": right, "fresh": torch.cat(new, 1)}
