"""Projected gradient descent on the low frequencies of the perturbation alone.

DiffBreak (arXiv 2411.16598) reports that a low-frequency attack is the strongest under majority
vote: purification removes high frequencies and keeps low ones. Its optimiser is another: it learns
a cascade of filters under a perceptual constraint, without an lp ball. Here a budget is kept, so
that the result compares with every other attack of a track and not with the published numbers.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import pi

import torch
from torch import Tensor

from dbp_bench.attacks.common.options import AnyLoss, Share, checked
from dbp_bench.attacks.pgd import PGD
from dbp_bench.noise import Tape
from dbp_bench.threat import AttackerView, Budget


@checked
class LowFrequency(PGD):
    """:class:`PGD` within a band of the discrete cosine transform.

    At each step the gradient is projected to the band, a step of steepest ascent in the norm of the
    budget follows, and the perturbation is projected to the band again. Projecting that to the
    budget comes last: in L2 it stays in the band but for the pixel box, in Linf the clip to the
    cube adds some higher frequencies. A random start is in the band as well.

    Args:
        band: Share of the frequencies that is kept, per axis, in (0, 1]; with 1 this is PGD. It is
            rounded to a number of coefficients, at least the constant one.
    """

    loss: AnyLoss = "margin"
    band: Share = 0.5

    def __call__(
        self, view: AttackerView, images: Tensor, labels: Tensor, budget: Budget
    ) -> Tensor:
        """Adversarial images ``(b, c, h, w)`` in the `budget`."""
        return self.search(view, images, labels, Banded(budget, self.band), view.gradient)


@dataclass(frozen=True, slots=True)
class Banded:
    """A `budget` whose perturbations are first projected into a `band` of frequencies."""

    budget: Budget
    band: float

    @property
    def eps(self) -> float:
        """The size of the ball of the budget."""
        return self.budget.eps

    def project(self, images: Tensor, clean: Tensor) -> Tensor:
        """The change of `images` brought into the band, then into the budget and [0, 1]."""
        if self.band < 1:
            images = clean + low_pass(images - clean, self.band)
        return self.budget.project(images, clean)

    def ascent(self, gradient: Tensor) -> Tensor:
        """Steepest ascent along the part of the `gradient` that is in the band."""
        return self.budget.ascent(low_pass(gradient, self.band))

    def size(self, perturbation: Tensor) -> Tensor:
        """The norm ``(b,)`` of each perturbation, that of the budget."""
        return self.budget.size(perturbation)

    def sample(self, like: Tensor, tape: Tape, step: int) -> Tensor:
        """A perturbation drawn from the whole budget; projecting it brings it into the band."""
        return self.budget.sample(like, tape, step)


def low_pass(images: Tensor, band: float) -> Tensor:
    """The nearest ``(b, c, h, w)`` to `images` that has no frequency above `band`.

    Args:
        images: Images, perturbations or gradients.
        band: Share of the frequencies that is kept, per axis, in (0, 1].
    """
    if band >= 1:
        return images
    rows, columns = (_band(size, band).to(images) for size in images.shape[2:])
    return rows @ images @ columns


@lru_cache(maxsize=64)
def _band(size: int, band: float) -> Tensor:
    """The projection ``(size, size)`` onto the lowest cosines of an axis, in float64."""
    kept = cosines(size)[: max(1, round(band * size))]
    return kept.T @ kept


def cosines(size: int) -> Tensor:
    """The orthonormal DCT-II ``(size, size)`` in float64, one frequency a row, lowest first."""
    position = torch.arange(size, dtype=torch.float64)
    waves: Tensor = (pi / size * position[:, None] * (position + 0.5)).cos() * (2 / size) ** 0.5
    waves[0] = (1 / size) ** 0.5
    return waves
