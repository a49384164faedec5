"""Robustness against the share of the noise that is fresh, from DW-box to stochastic white-box."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import sqrt
from typing import Annotated

import torch
from pydantic import AfterValidator
from torch import Tensor

from dbp_bench.analyses.options import Allowance, Count, Known, Searched
from dbp_bench.analyses.target import NOTHING, Found, Target, Tensors, fresh, joined, mean
from dbp_bench.attacks.standard import Standard
from dbp_bench.defense import Purifier, parts
from dbp_bench.evaluation import Group
from dbp_bench.noise import Noise, OpaqueNoise, Site
from dbp_bench.reporting.statistics import Bootstrap, Replicates

AXES = ("k",)
EXAMPLES = 60

STATEMENT = """\
Every noise is sqrt(1 - k^2) known + k fresh. The known part is one victim draw, which the attack is
shown; it guesses the fresh part, and evaluation draws it anew. k = 0 is DW-box, k = 1 the
stochastic white-box. Mean over known draws, fresh draws and images.

accuracy: under the standard attack at that k. accuracy-gain: accuracy minus that at the smallest k,
paired over images.

robustness-loss R(k) = E L(f(x + d)) - E L(f(x)), with the cross-entropy L and the d of PGD with EoT
at that k, which maximises L; the standard attack stops where an image is wrong. clean-loss is the
second term, adversarial-loss the first.

The decomposition of the loss and the mixing were published without formulas: the definition is
ours."""


def _shares(values: tuple[float, ...]) -> tuple[float, ...]:
    if not values or list(values) != sorted({*values}) or values[0] < 0 or values[-1] > 1:
        raise ValueError("must be increasing numbers in [0, 1]")
    return values


class Options(Searched):
    """Budget, shares of fresh noise, known draws, and evaluation draws."""

    budget: Allowance = 200
    eot: Count = 5
    levels: Annotated[tuple[float, ...], AfterValidator(_shares)] = (0, 0.25, 0.5, 0.75, 1)
    known: Known = 3
    fresh: Count = 6


@dataclass(frozen=True, slots=True)
class Mixed:
    """``sqrt(1 - k^2) known + k fresh``, standard normal at every `k` in [0, 1].

    The known part is drawn at the purifier's own sites, the fresh part at others, so that it can be
    hidden where they are shown. At k = 0 and k = 1 there is one part, at the purifier's own sites.
    """

    noise: Noise
    k: float

    def normal(self, site: Site, step: int, like: Tensor) -> Tensor:
        """Standard normal noise like `like`."""
        own = self.noise.normal(site, step, like)
        if self.k in (0, 1):
            return own
        return sqrt(1 - self.k**2) * own + self.k * self.noise.normal(beside(site), step, like)


def beside(site: Site) -> Site:
    """The site of the fresh part of the noise of `site`."""
    return Site(f"{site} (fresh)")


@dataclass(frozen=True, slots=True)
class PartlyFresh:
    """A purifier whose noise is mixed with a share `k` of fresh noise, in [0, 1]."""

    purifier: Purifier
    k: float

    @property
    def sites(self) -> frozenset[Site]:
        """The purifier's own sites, and those of the fresh part."""
        own = self.purifier.sites
        return own if self.k in (0, 1) else own | {beside(site) for site in own}

    def shared(self, images: Tensor, noise: Noise) -> Tensor:
        """The state ``(b, c, h, w)`` that votes share, for `images` in [0, 1]."""
        return parts(self.purifier)[0](images, OpaqueNoise(Mixed(noise, self.k)))

    def single(self, state: Tensor, noise: Noise) -> Tensor:
        """Purified images ``(b, c, h, w)`` for what votes share."""
        return parts(self.purifier)[1](state, OpaqueNoise(Mixed(noise, self.k)))

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        """Purified `images` ``(b, c, h, w)`` in [0, 1]."""
        return self.single(self.shared(images, noise), noise)


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
        The images of the standard attack, 1 where they and the clean ones are right, else 0; and
        losses ``(b, draws)`` of the clean images and those of PGD, all on evaluation draws.
    """
    of = target.defense
    purifier = PartlyFresh(of.purifier, k)
    defense = of.around(purifier, of.policy)
    known = of.sites if k < 1 else NOTHING
    mixed = replace(target, defense=defense, fixed=known, draw=draw)
    images = mixed.attacked(group, Standard(options.budget), known, draw)
    of_pgd = mixed.attacked(group, options.pgd(options.eot), known, draw)
    draws = fresh(options.fresh)
    return {
        "images": images,
        "of-pgd": of_pgd,
        "clean-right": mixed.correct(group.images, group, draws),
        "right": mixed.correct(images, group, draws),
        "clean-loss": mixed.losses(group.images, group, draws).double(),
        "loss": mixed.losses(of_pgd, group, draws).double(),
    }
