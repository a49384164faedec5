"""Robustness against the share of the noise that is fresh, from DW-box to stochastic white-box."""

from functools import partial
from typing import Annotated

import torch
from pydantic import AfterValidator

from dbp_bench.analyses.mixing import partly_known
from dbp_bench.analyses.options import Count, Known, Searched
from dbp_bench.analyses.record import Row, row
from dbp_bench.analyses.store import Pieces, Tensors
from dbp_bench.analyses.target import (
    Target,
    attacked,
    correct,
    fresh,
    losses,
    mean,
    pgd,
)
from dbp_bench.attacks.pgd import PGD
from dbp_bench.evaluate import Group
from dbp_bench.noise import VICTIM, Site, Tape
from dbp_bench.reporting.statistics import Bootstrap, Replicates

AXES = ("k",)
EXAMPLES = 60

STATEMENT = (
    (
        "Every noise is sqrt(1 - k^2) known + k fresh. The known part is one victim draw, which "
        "the attack is shown; it guesses the fresh part, and evaluation draws it anew. k = 0 "
        "is DW-box, k = 1 the stochastic white-box. Mean over known draws, fresh draws and "
        "images."
    ),
    (
        "robustness-loss R(k) = E L(f(x + d)) - E L(f(x)), with the cross-entropy L and the d "
        "of PGD with EoT at that k; clean-loss is the second term, adversarial-loss the first. "
        "accuracy-gain: accuracy minus that at the smallest k, paired over images."
    ),
    (
        "The decomposition of the loss and the mixing were published without formulas: the "
        "definition is ours."
    ),
)


def _shares(values: tuple[float, ...]) -> tuple[float, ...]:
    if not values or list(values) != sorted({*values}) or values[0] < 0 or values[-1] > 1:
        raise ValueError("must be increasing numbers in [0, 1]")
    return values


class Options(Searched):
    """Shares of fresh noise, known draws, and evaluation draws."""

    levels: Annotated[tuple[float, ...], AfterValidator(_shares)] = (0, 0.2, 0.4, 0.6, 0.8, 1)
    known: Known = 3
    fresh: Count = 6


def measure(target: Target, options: Options, pieces: Pieces) -> list[Row]:
    """The rows of one defense."""
    search = pgd(options)
    rows, resamples = [], Bootstrap.of(target.images)
    first: Replicates | None = None
    for k in options.levels:
        parts = [
            [
                pieces(
                    f"group {number} k {k:g} draw {d}",
                    partial(mixed_run, target, group, search, k, d, options.fresh),
                )
                for d in range(options.known)
            ]
            for number, group in enumerate(target.groups)
        ]
        found = {
            key: mean(
                torch.cat([torch.stack([p[key] for p in group]).mean((0, 2)) for group in parts])
            )
            for key in ("clean-right", "right", "clean-loss", "loss")
        }
        first = found["right"] if first is None else first
        quantities = {
            "accuracy": found["right"],
            "accuracy-gain": found["right"] - first,
            "clean-accuracy": found["clean-right"],
            "clean-loss": found["clean-loss"],
            "adversarial-loss": found["loss"],
            "robustness-loss": found["loss"] - found["clean-loss"],
        }
        rows += [
            row(target.name, "", (k,), quantity, resamples.estimate(value))
            for quantity, value in quantities.items()
        ]
    return rows


def mixed_run(
    target: Target, group: Group, search: PGD, k: float, draw: int, number: int
) -> Tensors:
    """Attack and evaluate with a share `k` of fresh noise and the rest known, at victim `draw`.

    Returns:
        The adversarial images, and for the clean images and for them, whether they are right, and
        their losses ``(b, number)``, on evaluation draws.
    """
    known = Tape.make(target.seed, VICTIM, group.ids, draw)
    defense = partly_known(target.defense, known, k)
    images = attacked(target, group, search, frozenset[Site](), draw, defense)
    draws = fresh(number)
    return {
        "images": images,
        "clean-right": correct(target, group.images, group, draws, defense).double(),
        "right": correct(target, images, group, draws, defense).double(),
        "clean-loss": losses(target, group.images, group, draws, defense).double(),
        "loss": losses(target, images, group, draws, defense).double(),
    }
