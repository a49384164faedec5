"""What more EoT samples buy: accuracy, and agreement with the gradient at the known draw."""

from functools import partial
from typing import Annotated

import numpy as np
import torch
from pydantic import AfterValidator
from torch import Tensor
from torch.nn import functional

from dbp_bench.analyses import options as base
from dbp_bench.analyses.options import Count, Known
from dbp_bench.analyses.record import Row, row
from dbp_bench.analyses.store import Pieces, Tensors
from dbp_bench.analyses.target import (
    Target,
    attacked,
    correct,
    estimate,
    fresh,
    gradients,
    guesses_of,
    mean,
)
from dbp_bench.attacks.pgd import PGD
from dbp_bench.checks.gradients import cosines
from dbp_bench.evaluate import Group
from dbp_bench.noise import VICTIM, Site
from dbp_bench.reporting.statistics import Bootstrap, Replicates

AXES = ("eot",)
EXAMPLES = 24

SCALES = ("as taken", "unit length")
"""How the gradients of single draws are averaged: as an attack does, or each of length 1."""

STATEMENT = (
    (
        "accuracy of eot: PGD with N EoT samples a step and no draw known, evaluated on fresh "
        "draws. accuracy of dwbox: every draw known, evaluated at that draw."
    ),
    (
        "cosine: at the clean images, between the mean gradient of cross-entropy over N guesses "
        "and the gradient at a known draw; mean over disjoint sets of guesses and over known "
        "draws, then over images. `as taken`: the mean that EoT follows. `unit length`: each "
        "draw's gradient scaled to length 1 first, so that no draw outweighs another. An image "
        "without a gradient is left out."
    ),
    (
        "rho: the cosine of two single draws that fits rho / sqrt(rho + (1 - rho) / N) best in "
        "least squares over N. The formula holds where draws scatter independently about a mean "
        "gradient, and is our inference: the published figure doesn't define its similarity."
    ),
)


def _increasing(values: tuple[int, ...]) -> tuple[int, ...]:
    if not values or list(values) != sorted({*values}) or values[0] < 1:
        raise ValueError("must be increasing numbers of 1 or more")
    return values


class Options(base.Options):
    """Numbers of EoT samples, known draws, and evaluation draws."""

    steps: Count = 10
    step_size: float = 0.25
    counts: Annotated[tuple[int, ...], AfterValidator(_increasing)] = tuple(2**i for i in range(10))
    known: Known = 3
    fresh: Count = 9


def measure(target: Target, options: Options, pieces: Pieces) -> list[Row]:
    """The rows of one defense."""
    parts = []
    for number, group in enumerate(target.groups):
        own = pieces.within(f"group {number}")
        part = own("cosines", partial(_cosines, target, group, options))
        known = partial(_known, target, group, options)
        part["dwbox"] = own("dwbox", known)["right"]
        for n in options.counts:
            work = partial(_hidden, target, group, options, n)
            part[f"eot {n}"] = own(f"eot {n}", work)["right"]
        parts.append(part)
    return _rows(target, options, {k: torch.cat([p[k] for p in parts]) for k in parts[0]})


def _search(options: Options, eot: int) -> PGD:
    return PGD(steps=options.steps, step_size=options.step_size, eot=eot)


def _hidden(target: Target, group: Group, options: Options, n: int) -> Tensors:
    images = attacked(target, group, _search(options, n), frozenset[Site](), 0)
    return {"right": correct(target, images, group, fresh(options.fresh)).double()}


def _known(target: Target, group: Group, options: Options) -> Tensors:
    right = []
    for draw in range(options.known):
        images = attacked(target, group, _search(options, 1), target.sites, draw)
        right.append(correct(target, images, group, [draw]))
    return {"right": torch.cat(right, 1).double()}


def _cosines(target: Target, group: Group, options: Options) -> Tensors:
    """Cosines ``(b, counts)`` of each image, mean over known draws and sets of guesses."""
    known = gradients(target, group, VICTIM, range(options.known)).flatten(2).double()
    counts, last = options.counts, options.counts[-1]
    sets = [last // n for n in counts]
    sums = {(s, n): torch.zeros_like(known[:, 0]) for s in SCALES for n in counts}
    total = {s: known.new_zeros(len(known), len(counts)) for s in SCALES}
    size = max(1, target.max_batch // len(known))
    for start in range(0, last, size):
        draws = range(start, min(last, start + size))
        raw = gradients(target, group, guesses_of(0), draws).flatten(2).double()
        for scale, each in zip(SCALES, (raw, functional.normalize(raw, dim=2, eps=0)), strict=True):
            for offset, draw in enumerate(draws):
                for i, n in enumerate(counts):
                    sums[scale, n] += each[:, offset]
                    if (draw + 1) % n == 0 and draw < sets[i] * n:
                        total[scale][:, i] += _with_each(sums[scale, n], known)
                        sums[scale, n] = torch.zeros_like(sums[scale, n])
    number = torch.tensor(sets, device=known.device)
    return {scale: total[scale] / number for scale in SCALES}


def _with_each(gradient: Tensor, known: Tensor) -> Tensor:
    """Mean cosine ``(b,)`` of `gradient` ``(b, d)`` with each of `known` ``(b, draws, d)``."""
    return torch.stack([cosines(gradient, known[:, d]) for d in range(known.shape[1])]).mean(0)


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


def _rows(target: Target, options: Options, found: Tensors) -> list[Row]:
    name, rows = target.name, []
    for n in options.counts:
        rows.append(row(name, "eot", (n,), "accuracy", estimate(found[f"eot {n}"].mean(1))))
    rows.append(row(name, "dwbox", (), "accuracy", estimate(found["dwbox"].mean(1))))
    for scale in SCALES:
        rows += _agreement(name, scale, found[scale], options.counts)
    return rows


def _agreement(name: str, scale: str, cosine: Tensor, counts: tuple[int, ...]) -> list[Row]:
    """The rows of the cosines ``(n, counts)`` of one way to average."""
    kept = cosine[~cosine.isnan().any(1)]
    rows = [row(name, scale, (), "images-with-gradient", float(len(kept)))]
    if not len(kept):
        return rows
    resamples = Bootstrap.of(len(kept))
    curves = [mean(kept[:, i]) for i in range(len(counts))]
    numbers = np.array(counts, dtype=np.float64)
    rho = fit(np.stack(curves, 1), numbers)
    rows.append(row(name, scale, (), "rho", resamples.estimate(rho)))
    for n, curve in zip(counts, curves, strict=True):
        rows.append(row(name, scale, (n,), "cosine", resamples.estimate(curve)))
        residual = curve - similarity(rho, float(n))
        rows.append(row(name, scale, (n,), "residual", resamples.estimate(residual)))
    return rows
