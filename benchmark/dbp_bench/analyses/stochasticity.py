"""Robustness against the share of the noise that is fresh, from DW-box to stochastic white-box."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import sqrt
from typing import Annotated

import torch
from pydantic import AfterValidator
from torch import Tensor

from dbp_bench.analyses.options import Count, Known, Searched
from dbp_bench.analyses.target import Found, Target, Tensors, fresh, joined, mean
from dbp_bench.defense import Defense, Purifier
from dbp_bench.evaluation import Group
from dbp_bench.noise import VICTIM, Noise, OpaqueNoise, Site, Tape, same_vote
from dbp_bench.reporting.statistics import Bootstrap, Replicates

AXES = ("k",)
EXAMPLES = 60

STATEMENT = """\
Every noise is sqrt(1 - k^2) known + k fresh. The known part is one victim draw, which the attack is
shown; it guesses the fresh part, and evaluation draws it anew. k = 0 is DW-box, k = 1 the
stochastic white-box. Mean over known draws, fresh draws and images.

robustness-loss R(k) = E L(f(x + d)) - E L(f(x)), with the cross-entropy L and the d of PGD with EoT
at that k; clean-loss is the second term, adversarial-loss the first. accuracy-gain: accuracy minus
that at the smallest k, paired over images.

The decomposition of the loss and the mixing were published without formulas: the definition is
ours."""


def _shares(values: tuple[float, ...]) -> tuple[float, ...]:
    if not values or list(values) != sorted({*values}) or values[0] < 0 or values[-1] > 1:
        raise ValueError("must be increasing numbers in [0, 1]")
    return values


class Options(Searched):
    """Shares of fresh noise, known draws, and evaluation draws."""

    levels: Annotated[tuple[float, ...], AfterValidator(_shares)] = (0, 0.2, 0.4, 0.6, 0.8, 1)
    known: Known = 3
    fresh: Count = 6


@dataclass(frozen=True, slots=True)
class Mixed:
    """``sqrt(1 - k^2) known + k fresh``, standard normal at every `k` in [0, 1]."""

    known: Noise
    fresh: Noise
    k: float

    def normal(self, site: Site, step: int, like: Tensor) -> Tensor:
        """Standard normal noise like `like`; exactly one of the two at k = 0 and k = 1."""
        if self.k == 0:
            return self.known.normal(site, step, like)
        if self.k == 1:
            return self.fresh.normal(site, step, like)
        known, fresh = (part.normal(site, step, like) for part in (self.known, self.fresh))
        return sqrt(1 - self.k**2) * known + self.k * fresh


@dataclass(frozen=True, slots=True)
class PartlyKnown:
    """A purifier whose noise is mixed from a draw that is part of it and the noise it is given.

    Only the fresh part is random: whoever attacks this purifier with nothing known knows the fixed
    part, as part of the defense, and guesses the rest. At k = 0 nothing is drawn at any site.

    Args:
        purifier: The purifier that is made partly known.
        known: The draw, one row per image.
        k: Share of the fresh noise, in [0, 1].
    """

    purifier: Purifier
    known: Tape
    k: float

    @property
    def sites(self) -> frozenset[Site]:
        """The sites at which fresh noise is drawn."""
        return frozenset() if self.k == 0 else self.purifier.sites

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        """Purified `images` ``(n, c, h, w)`` in [0, 1]: each image of the tape n / rows times.

        Raises:
            ValueError: There are not as many of each.
        """
        n, rows = len(images), len(self.known.ids)
        # A single image only asks how much memory it takes.
        if n % rows and n != 1:
            raise ValueError(f"{n} images for {rows} known draws.")
        known = same_vote(noise, self.known[torch.arange(n) * rows // n])
        return self.purifier(images, OpaqueNoise(Mixed(known, noise, self.k)))


def partly_known(defense: Defense, known: Tape, k: float) -> Defense:
    """`defense` with a share `k` of its noise fresh and the rest fixed at the draw `known`."""
    purifier = PartlyKnown(defense.purifier, known, k)
    return Defense(purifier, defense.classifier, (), defense.policy, defense.votes, defense.k)


def measure(target: Target, options: Options) -> Iterator[Found]:
    """The numbers of one defense."""
    interval = Bootstrap.of(target.images).estimate
    first: Replicates | None = None
    for k in options.levels:
        each = [
            joined(target.each(f"k {k:g} draw {d}", partial(mixed_run, target, options, k, d)))
            for d in range(options.known)
        ]
        right, clean_right, loss, clean_loss = (
            mean(torch.stack([run[key] for run in each]).mean((0, 2)))
            for key in ("right", "clean-right", "loss", "clean-loss")
        )
        first = right if first is None else first
        quantities = {
            "accuracy": right,
            "accuracy-gain": right - first,
            "clean-accuracy": clean_right,
            "clean-loss": clean_loss,
            "adversarial-loss": loss,
            "robustness-loss": loss - clean_loss,
        }
        for quantity, value in quantities.items():
            yield "", (k,), quantity, interval(value)


def mixed_run(target: Target, options: Options, k: float, draw: int, group: Group) -> Tensors:
    """Attack and evaluate with a share `k` of fresh noise and the rest known, at victim `draw`.

    Returns:
        The adversarial images; and for the clean images and for them, 1 where they are right, else
        0, and their losses ``(b, draws)``, on evaluation draws.
    """
    known = Tape.make(target.seed, VICTIM, group.ids, draw)
    mixed = replace(target, defense=partly_known(target.defense, known, k))
    images = mixed.attacked(group, options.pgd(options.eot), frozenset(), draw)
    draws = fresh(options.fresh)
    return {
        "images": images,
        "clean-right": mixed.correct(group.images, group, draws),
        "right": mixed.correct(images, group, draws),
        "clean-loss": mixed.losses(group.images, group, draws).double(),
        "loss": mixed.losses(images, group, draws).double(),
    }
