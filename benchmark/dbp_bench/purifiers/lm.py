"""LM: likelihood maximisation at inference (Chen et al. 2024, arXiv 2305.15241, section 3).

The image is moved by a few steps of Adam down the loss that its denoiser was trained on, which
bounds its negative log-likelihood: the mean over pixels of ``(D(z + sigma n; sigma) - z)^2``, at a
level sigma and noise n that each step draws anew. z is in [-1, 1].

The published code breaks two rules of this benchmark. It averages the loss over the batch too,
which Adam almost undoes; here each image has a loss of its own. It seeds the global generator at
each call, so that its noise is always the same; here every draw is the tape's. Its projection to a
ball of radius 200 in [-1, 1] units, wider than the pixel box of CIFAR, is left out.

The gradient of this defense is of second order, through every step of Adam. Published attacks take
the identity's in its place (``--gradient bpda``). Near a pixel whose slope is 0 Adam's first step
jumps from ``+rate`` to ``-rate``; elsewhere it is flat, so that little but the identity is left of
the gradient where a single step is taken.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from typing import ClassVar

import torch
from torch import Tensor

from dbp_bench import memory
from dbp_bench.errors import BadEntry
from dbp_bench.noise import FORWARD, Noise, Site
from dbp_bench.purifiers.edm import SigmaDenoiser
from dbp_bench.purifiers.schedule import refuse_count, to_diffusion, to_images
from dbp_bench.purifiers.sigma import AtSigma, Predicts, per_image, refuse_levels
from dbp_bench.taped.operations import uniform

LEVEL = Site("level")
"""The site at which an image's noise level is drawn."""

BETAS, EPSILON = (0.9, 0.999), 1e-8
"""The constants of Adam (Kingma and Ba 2015, algorithm 1)."""

Loss = Callable[[int, Tensor], Tensor]
"""The losses ``(b,)`` of images ``(b, c, h, w)`` at a step, each image's of itself alone."""


@dataclass(frozen=True)
class LM:
    """`steps` steps of Adam up the likelihood, at levels uniform in `sigma_min` ... `sigma_max`.

    ScoreOpt-O (Zhang et al. 2023) is the same, at other settings.
    """

    denoiser: SigmaDenoiser
    predicts: Predicts
    """What the denoiser gives; see :data:`dbp_bench.purifiers.sigma.Predicts`."""
    sigma_min: float
    sigma_max: float
    steps: int
    rate: float
    """Adam's learning rate, in [-1, 1] units."""
    clamp_output: bool

    sites: ClassVar[frozenset[Site]] = frozenset({FORWARD, LEVEL})

    def __post_init__(self) -> None:
        """Refuse options that are out of range, or make no difference."""
        refuse_levels(self.sigma_min, self.sigma_max, self.predicts)
        if self.sigma_min == self.sigma_max:
            raise BadEntry(f"sigma_min: {self.sigma_min} is sigma_max: no level is drawn.")
        refuse_search(self.steps, self.rate)

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        """Likelier images ``(b, c, h, w)`` for `images` ``(b, c, h, w)`` in [0, 1]."""
        denoise = AtSigma(self.denoiser, self.predicts)

        def loss(i: int, z: Tensor) -> Tensor:
            share = uniform(noise.normal(LEVEL, i, z.new_empty(len(z), 2))).to(z)
            sigma = self.sigma_min + (self.sigma_max - self.sigma_min) * share
            noised = z + per_image(sigma) * noise.normal(FORWARD, i, z)
            return squares(denoise(noised, sigma) - z)

        z = minimised(loss, to_diffusion(images), self.steps, self.rate)
        return to_images(z, self.clamp_output)


def squares(errors: Tensor) -> Tensor:
    """The mean ``(b,)`` of the squares of each image's `errors` ``(b, c, h, w)``."""
    return errors.square().flatten(1).mean(1)


def refuse_search(steps: int, rate: float) -> None:
    """Refuse a number of steps, or a learning rate, that can't be right.

    Raises:
        BadEntry: One isn't positive, or the rate is infinite, or there are too many steps.
    """
    refuse_count("steps", steps)
    if not (isfinite(rate) and rate > 0):
        raise BadEntry(f"rate: {rate} is not positive and finite.")


def minimised(loss: Loss, z: Tensor, steps: int, rate: float) -> Tensor:
    """The images `z` ``(b, c, h, w)`` after `steps` of Adam down the `loss`; differentiable."""

    def reverse(
        i: int, _left: int, _below: int, state: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        z, mean, square = state
        g = slope(lambda x: loss(i, x), z)
        mean = BETAS[0] * mean + (1 - BETAS[0]) * g
        square = BETAS[1] * square + (1 - BETAS[1]) * g * g
        # Moments without the bias of their start at 0. A slope of 0 has no derivative in the root.
        ahead = mean / (1 - BETAS[0] ** (i + 1))
        size = (square / (1 - BETAS[1] ** (i + 1))).clamp(min=1e-30).sqrt()
        return z - rate * ahead / (size + EPSILON), mean, square

    grid = itertools.pairwise(range(steps, -1, -1))
    return memory.descend(reverse, (z, torch.zeros_like(z), torch.zeros_like(z)), grid)[0]


def slope(losses: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """The gradient ``(b, c, h, w)`` in `z` of each image's loss, itself differentiable in `z`.

    Its own graph is built where none is wanted too: torch takes other formulas for a gradient that
    is to be differentiated, and what is attacked must be what is evaluated, to the last bit.
    """
    wanted = torch.is_grad_enabled() and z.requires_grad
    with torch.enable_grad():
        x = z.view_as(z) if wanted else z.detach().requires_grad_()
        (found,) = torch.autograd.grad(losses(x).sum(), x, create_graph=True)
    return found if wanted else found.detach()
