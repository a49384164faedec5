"""EDM purification: noise up to sigma_max, then the samplers of Karras et al. 2022.

The noise isn't scaled down with the image: z = image + sigma * noise, in diffusion space [-1, 1].
The sampler follows the probability-flow ODE dz/dsigma = (z - D(z; sigma)) / sigma on a grid of
noise levels (equation 5), without new noise (algorithm 1) or with some at each step (algorithm 2).
"""

import itertools
from dataclasses import dataclass
from math import sqrt
from typing import Literal, Protocol

import torch
from torch import Tensor

from dbp_bench import memory
from dbp_bench.errors import BadEntry
from dbp_bench.noise import FORWARD, REVERSE, Noise, Site
from dbp_bench.purifiers.schedule import to_diffusion, to_images

Solver = Literal["heun", "euler"]
"""Of second order, two network calls for each step but the last; or of first, one call."""


class SigmaDenoiser(Protocol):
    """A network that denoises: the expected image, given the noisy one and the noise level."""

    def __call__(self, z: Tensor, sigma: Tensor) -> Tensor:
        """Denoised images, like `z` ``(b, c, h, w)`` in [-1, 1], at noise levels ``(b,)``."""
        ...


@dataclass(frozen=True, slots=True)
class Churn:
    """New noise at each step (Karras et al. 2022, algorithm 2, lines 4 to 6)."""

    s_churn: float
    """How much, over all steps; 0 for none."""
    s_min: float = 0.0
    s_max: float = float("inf")
    """Only at noise levels in s_min ... s_max."""
    s_noise: float = 1.0
    """Standard deviation of the noise."""

    def growth(self, sigma: float, steps: int) -> float:
        """By which share of itself the noise level `sigma` grows before its step."""
        if not self.s_min <= sigma <= self.s_max:
            return 0.0
        return min(self.s_churn / steps, sqrt(2) - 1)


@dataclass(frozen=True)
class EDM:
    """Noise to level `sigma_max`, then `steps` steps down to 0, from the lowest level in one."""

    denoiser: SigmaDenoiser
    sigma_max: float
    sigma_min: float
    rho: float
    steps: int
    churn: Churn
    solver: Solver
    clamp_output: bool

    @property
    def sites(self) -> frozenset[Site]:
        """Forward and, where a step has new noise, reverse."""
        grown = (self.churn.growth(sigma, self.steps) > 0 for sigma, _ in self.grid())
        return frozenset({FORWARD, REVERSE} if any(grown) else {FORWARD})

    def grid(self) -> list[tuple[float, float]]:
        """Pairs (from, to) of noise levels (equation 5), evenly spaced in sigma^(1/rho)."""
        high, low = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        last = max(self.steps - 1, 1)
        levels = [(high + i / last * (low - high)) ** self.rho for i in range(1, self.steps)]
        return list(itertools.pairwise([self.sigma_max, *levels, 0.0]))

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        """Purified images ``(b, c, h, w)`` for `images` ``(b, c, h, w)`` in [0, 1]."""
        source = to_diffusion(images)
        fresh, pairs = noise.normal(FORWARD, 0, source), self.grid()

        def forward(left: int) -> Tensor:
            """The forward process at the noise level from which `left` steps lead to 0."""
            return source + (pairs[-left][0] if left else 0.0) * fresh

        z = forward(self.steps)
        for i, (sigma, to) in enumerate(pairs):

            def reverse(z: Tensor, i: int = i, sigma: float = sigma, to: float = to) -> Tensor:
                growth = self.churn.growth(sigma, self.steps)
                if growth:
                    grown = sigma + growth * sigma
                    size = sqrt(grown**2 - sigma**2) * self.churn.s_noise
                    z, sigma = z + size * noise.normal(REVERSE, i, z), grown
                slope = self._slope(z, sigma)
                ahead: Tensor = z + (to - sigma) * slope
                if self.solver == "euler" or not to:
                    return ahead
                return z + (to - sigma) * (0.5 * slope + 0.5 * self._slope(ahead, to))

            z = memory.step(reverse, z, level=self.steps - 1 - i, forward=forward)
        return to_images(z, self.clamp_output)

    def _slope(self, z: Tensor, sigma: float) -> Tensor:
        """Of the probability-flow ODE in sigma."""
        levels = torch.full((len(z),), sigma, dtype=z.dtype, device=z.device)
        return (z - self.denoiser(z, levels)) / sigma


def edm_ode(
    denoiser: SigmaDenoiser,
    *,
    sigma_max: float,
    sigma_min: float,
    rho: float,
    steps: int,
    solver: Solver,
    clamp_output: bool,
) -> EDM:
    """Build :class:`EDM` without new noise from an entry's options.

    Raises:
        BadEntry: An option is out of range.
    """
    churn = Churn(0.0)
    return _checked(
        EDM(denoiser, sigma_max, sigma_min, rho, steps, churn, solver, clamp_output=clamp_output)
    )


def edm_sde(
    denoiser: SigmaDenoiser,
    *,
    sigma_max: float,
    sigma_min: float,
    rho: float,
    steps: int,
    s_churn: float,
    s_min: float,
    s_max: float,
    s_noise: float,
    solver: Solver,
    clamp_output: bool,
) -> EDM:
    """Build :class:`EDM` with new noise from an entry's options.

    Raises:
        BadEntry: An option is out of range, or no step has new noise.
    """
    churn = Churn(s_churn, s_min, s_max, s_noise)
    if s_noise <= 0:
        raise BadEntry(f"s_noise: {s_noise} is not positive.")
    purifier = _checked(
        EDM(denoiser, sigma_max, sigma_min, rho, steps, churn, solver, clamp_output=clamp_output)
    )
    if REVERSE not in purifier.sites:
        raise BadEntry(
            f"s_churn: {s_churn} at levels {s_min} ... {s_max} adds noise at no step; use edm_ode."
        )
    return purifier


def _checked(purifier: EDM) -> EDM:
    if purifier.steps < 1:
        raise BadEntry(f"steps: {purifier.steps} is not positive.")
    if purifier.rho <= 0:
        raise BadEntry(f"rho: {purifier.rho} is not positive.")
    if not 0 < purifier.sigma_min < purifier.sigma_max:
        raise BadEntry(
            f"sigma_min: {purifier.sigma_min} is not above 0 and below sigma_max = "
            f"{purifier.sigma_max}."
        )
    return purifier
