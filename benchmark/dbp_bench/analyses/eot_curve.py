"""Accuracy, and agreement with the gradient at the known draw, by the number of EoT samples."""

from collections.abc import Iterator
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import AfterValidator
from torch import Tensor
from torch.nn import functional

from dbp_bench.analyses.options import Allowance, Count, Known, Stepped
from dbp_bench.analyses.target import NOTHING, Found, Target, Tensors, guesses_of, joined, mean
from dbp_bench.attacks.standard import Standard
from dbp_bench.checks.gradients import cosines
from dbp_bench.evaluation import Group
from dbp_bench.noise import VICTIM, Site
from dbp_bench.reporting.statistics import Bootstrap, Replicates
from dbp_bench.threat import Method

AXES = ("eot",)
EXAMPLES = 60

SCALES = ("as taken", "unit length")
"""The gradients of single draws are averaged as an attack does, or each of length 1."""

STATEMENT = """\
accuracy of eot: PGD with N EoT samples a step and no draw known. accuracy of hidden, and of dwbox:
the standard attack with no draw known, and with every draw known, as in the leaderboard. Where no
draw is known, images are evaluated at several victim draws, else at the known one. above-dwbox:
accuracy minus that of dwbox, paired over images.

cosine: at the clean images, between the mean gradient of cross-entropy over N guesses and the
gradient at a known draw; mean over disjoint sets of guesses and over known draws, then over images.
`as taken`: the mean that EoT follows. `unit length`: each draw's gradient scaled to length 1 first,
so that no draw outweighs another. An image without a gradient is left out.

rho: the cosine of two single draws that fits rho / sqrt(rho + (1 - rho) / N) best in least squares
over N. The formula holds where draws scatter independently about a mean gradient, and is our
inference: the published figure doesn't define its similarity."""


def _increasing(values: tuple[int, ...]) -> tuple[int, ...]:
    if not values or list(values) != sorted({*values}) or values[0] < 1:
        raise ValueError("must be increasing numbers of 1 or more")
    return values


class Options(Stepped):
    """Numbers of EoT samples, budget, known draws, and evaluation draws where none is known."""

    counts: Annotated[tuple[int, ...], AfterValidator(_increasing)] = tuple(2**i for i in range(7))
    budget: Allowance = 200
    known: Known = 3
    draws: Count = 9


def measure(target: Target, options: Options) -> Iterator[Found]:
    """The numbers of one defense."""
    interval, standard = Bootstrap.of(target.images).estimate, Standard(options.budget)

    def outcomes(method: Method, knows: frozenset[Site], draws: int, group: Group) -> Tensors:
        return {"right": target.outcomes(group, method, knows, draws)[1]}

    def accuracy(name: str, *attack: Any) -> Replicates:
        return mean(joined(target.each(name, partial(outcomes, *attack)))["right"].mean(1))

    known = accuracy("dwbox", standard, target.defense.sites, options.known)
    yield "dwbox", (), "accuracy", interval(known)
    attacks: list[tuple[str, tuple[int, ...], Method]] = [("hidden", (), standard)]
    attacks += [("eot", (n,), options.pgd(n)) for n in options.counts]
    for series, at, method in attacks:
        right = accuracy(" ".join([series, *map(str, at)]), method, NOTHING, options.draws)
        yield series, at, "accuracy", interval(right)
        yield series, at, "above-dwbox", interval(right - known)
    found = joined(target.each("cosines", partial(_cosines, target, options)))
    for scale in SCALES:
        yield from _agreement(scale, found[scale], options.counts)


def _cosines(target: Target, options: Options, group: Group) -> Tensors:
    """Cosines ``(b, counts)`` of each image, mean over known draws and sets of guesses."""
    known = torch.cat([*target.gradients(group, VICTIM, options.known)], 1).flatten(2).double()
    counts, last, draw = options.counts, options.counts[-1], 0
    sets = [last // n for n in counts]
    sums = {(s, n): torch.zeros_like(known[:, 0]) for s in SCALES for n in counts}
    total = {s: known.new_zeros(len(known), len(counts)) for s in SCALES}
    for part in target.gradients(group, guesses_of(0), last):
        for raw in part.flatten(2).double().unbind(1):
            draw += 1
            for scale, one in zip(SCALES, (raw, functional.normalize(raw, eps=0)), strict=True):
                for i, n in enumerate(counts):
                    sums[scale, n] += one
                    if draw % n == 0 and draw <= sets[i] * n:
                        total[scale][:, i] += _with_each(sums[scale, n], known)
                        sums[scale, n] = torch.zeros_like(sums[scale, n])
    number = torch.tensor(sets, device=known.device)
    return {scale: total[scale] / number for scale in SCALES}


def _with_each(gradient: Tensor, known: Tensor) -> Tensor:
    """Mean cosine ``(b,)`` of `gradient` ``(b, d)`` with each of `known` ``(b, draws, d)``."""
    return torch.stack([cosines(gradient, each) for each in known.unbind(1)]).mean(0)


def similarity(rho: Replicates | float, n: Replicates | float) -> Replicates:
    """Expected cosine of the mean of `n` gradients with another one: mu + independent noise."""
    found: Replicates = rho / np.sqrt(rho + (1 - rho) / n)
    return found


def fit(cosine: Replicates, counts: Replicates) -> Replicates:
    """The rho of each row of `cosine` ``(replicates, counts)``, to a ten-thousandth."""
    candidates = np.arange(1, 10_000) / 10_000
    model = similarity(candidates[:, None], counts[None])
    # Resamples of few images repeat: each is fitted once.
    rows, place = np.unique(cosine, axis=0, return_inverse=True)
    # Squared distance, less what is the same for every candidate.
    distance = (model**2).sum(1)[None] - 2 * rows @ model.T
    best: Replicates = candidates[distance.argmin(1)][place.ravel()]
    return best


def _agreement(scale: str, cosine: Tensor, counts: tuple[int, ...]) -> Iterator[Found]:
    """The numbers of the cosines ``(n, counts)`` of one way to average."""
    kept = cosine[~cosine.isnan().any(1)]
    yield scale, (), "images-with-gradient", float(len(kept))
    if not len(kept):
        return
    interval, curves = Bootstrap.of(len(kept)).estimate, [mean(values) for values in kept.T]
    rho = fit(np.stack(curves, 1), np.array(counts, dtype=np.float64))
    yield scale, (), "rho", interval(rho)
    for n, curve in zip(counts, curves, strict=True):
        yield scale, (n,), "cosine", interval(curve)
        yield scale, (n,), "residual", interval(curve - similarity(rho, float(n)))
