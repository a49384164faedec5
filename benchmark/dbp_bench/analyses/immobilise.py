"""Which noise protects: accuracy where the draws of each subset of the sites are known."""

from functools import partial
from itertools import combinations

import torch

from dbp_bench.analyses.options import Count, Known, Searched
from dbp_bench.analyses.record import Row, row
from dbp_bench.analyses.store import Pieces, Tensors
from dbp_bench.analyses.target import (
    Target,
    attacked,
    correct,
    fresh,
    mean,
    pgd,
)
from dbp_bench.attacks.pgd import PGD
from dbp_bench.evaluate import Group
from dbp_bench.noise import Site
from dbp_bench.reporting.statistics import Bootstrap

AXES = ("sites",)
EXAMPLES = 60

NOTHING = "nothing"

STATEMENT = (
    (
        "accuracy: PGD is shown the victim's draws at the sites of the series and guesses "
        "elsewhere; evaluated at the victim's own draw, which is fresh at the sites not shown. "
        "Where nothing is known, every evaluation draw is fresh."
    ),
    ("accuracy-fresh: the same adversarial images on draws that no attack was shown at any site."),
    (
        "fall: accuracy with nothing known minus this one, paired over images. `sites`: how "
        "many are known."
    ),
)


class Options(Searched):
    """Known draws, evaluation draws where none is known, and evaluation draws elsewhere."""

    known: Known = 3
    draws: Count = 9
    fresh: Count = 3


def subsets(sites: frozenset[Site]) -> list[frozenset[Site]]:
    """All of them, small ones first."""
    ordered = sorted(sites)
    return [
        frozenset(chosen)
        for size in range(len(ordered) + 1)
        for chosen in combinations(ordered, size)
    ]


def called(known: frozenset[Site]) -> str:
    """The name of a subset's series."""
    return "+".join(sorted(known)) or NOTHING


def measure(target: Target, options: Options, pieces: Pieces) -> list[Row]:
    """The rows of one defense."""
    search = pgd(options)
    resamples = Bootstrap.of(target.images)
    rows, hidden = [], None
    for known in subsets(target.sites):
        name = called(known)
        parts = [
            pieces(
                f"group {number} {name}",
                partial(outcomes, target, group, search, known, options),
            )
            for number, group in enumerate(target.groups)
        ]
        right = {k: mean(torch.cat([p[k] for p in parts]).mean(1)) for k in parts[0]}
        hidden = right["robust"] if hidden is None else hidden
        quantities = {
            "accuracy": right["robust"],
            "accuracy-fresh": right["fresh"],
            "fall": hidden - right["robust"],
        }
        rows += [
            row(target.name, name, (len(known),), quantity, resamples.estimate(value))
            for quantity, value in quantities.items()
        ]
    return rows


def outcomes(
    target: Target, group: Group, search: PGD, known: frozenset[Site], options: Options
) -> Tensors:
    """Whether each image is right ``(b, draws)``: at the draws of a run, and on fresh ones."""
    if not known:
        images = attacked(target, group, search, known, 0)
        robust = correct(target, images, group, range(options.draws))
        others = correct(target, images, group, fresh(options.fresh))
        return {"robust": robust.double(), "fresh": others.double()}
    own, new = [], []
    for draw in range(options.known):
        images = attacked(target, group, search, known, draw)
        own.append(correct(target, images, group, [draw]))
        new.append(correct(target, images, group, fresh(options.fresh)))
    return {"robust": torch.cat(own, 1).double(), "fresh": torch.cat(new, 1).double()}
