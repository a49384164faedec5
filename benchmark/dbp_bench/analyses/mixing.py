"""A process whose noise is part known and part fresh, from DW-box to stochastic white-box."""

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from dbp_bench.defense import Defense, Purifier
from dbp_bench.noise import Noise, OpaqueNoise, Site, Tape, same_vote


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
        purifier: What is made partly known.
        known: The draw, one row per image.
        k: Share of the fresh noise, in [0, 1].
    """

    purifier: Purifier
    known: Tape
    k: float

    @property
    def sites(self) -> frozenset[Site]:
        """Where fresh noise is drawn."""
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
