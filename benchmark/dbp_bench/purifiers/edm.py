"""EDM purification: noise up to sigma_max, then the samplers of Karras et al. 2022.

The noise isn't scaled down with the image: z = image + sigma * noise, in diffusion space [-1, 1].
The sampler follows the probability-flow ODE dz/dsigma = (z - D(z; sigma)) / sigma on a grid of
noise levels (equation 5), without new noise (algorithm 1) or with some at each step (algorithm 2).
"""

import itertools
from dataclasses import dataclass
from math import inf, sqrt
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from dbp_bench import memory
from dbp_bench.defense import NoiseOption
from dbp_bench.errors import BadEntry
from dbp_bench.noise import FORWARD, REVERSE, Noise, Site
from dbp_bench.purifiers.schedule import refuse_count, to_diffusion, to_images

Solver = Literal["heun", "euler"]
"""`heun` is of second order: each step but the last adds 2 to the NFE. `euler` is of first order:
each step adds 1."""


class SigmaDenoiser(Protocol):
    """A network that denoises: the expected image, given the noisy one and the noise level."""

    def __call__(self, z: Tensor, sigma: Tensor) -> Tensor:
        """Denoised images, like `z` ``(b, c, h, w)`` in [-1, 1], at noise levels ``(b,)``."""
        ...


@dataclass(frozen=True)
class EDM:
    """Noise to level `sigma_max`, then `steps` steps down to 0, from the lowest level in one."""

    denoiser: SigmaDenoiser
    sigma_max: float
    sigma_min: float
    rho: float
    steps: int
    solver: Solver
    clamp_output: bool
    s_churn: float = 0.0
    """The amount of new noise over all steps (algorithm 2); 0 for none (algorithm 1)."""
    s_min: float = 0.0
    s_max: float = inf
    """New noise is added only at noise levels in s_min ... s_max."""
    s_noise: float = 1.0
    """Standard deviation of the new noise."""

    noise_option: ClassVar[NoiseOption] = ("sigma_max", 2.0)

    def __post_init__(self) -> None:
        """Refuse options that are out of range, or make no difference."""
        if self.s_noise <= 0:
            raise BadEntry(f"s_noise: {self.s_noise} is not positive.")
        refuse_count("steps", self.steps)
        if self.rho <= 0:
            raise BadEntry(f"rho: {self.rho} is not positive.")
        if not 0 < self.sigma_min < self.sigma_max:
            raise BadEntry(
                f"sigma_min: {self.sigma_min} is not above 0 and below sigma_max = "
                f"{self.sigma_max}."
            )
        churned = (self.s_churn, self.s_min, self.s_max, self.s_noise) != (0.0, 0.0, inf, 1.0)
        if churned and REVERSE not in self.sites:
            raise BadEntry(
                f"s_churn: {self.s_churn} at levels {self.s_min} ... {self.s_max} adds noise at no "
                "step; leave out s_churn, s_min, s_max and s_noise."
            )

    @property
    def sites(self) -> frozenset[Site]:
        """The forward site and, where a step has new noise, the reverse site."""
        churned = any(self.gamma(sigma) > 0 for sigma in self.levels()[1:])
        return frozenset({FORWARD, REVERSE} if churned else {FORWARD})

    def levels(self) -> list[float]:
        """The noise level from which k steps lead to 0, for k = 0 ... `steps` (equation 5)."""
        high, low = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        last = max(self.steps - 1, 1)
        below = [(high + i / last * (low - high)) ** self.rho for i in range(1, self.steps)]
        return [0.0, *reversed(below), self.sigma_max]

    def gamma(self, sigma: float) -> float:
        """The share of itself by which the noise level `sigma` grows before its step."""
        if not self.s_min <= sigma <= self.s_max:
            return 0.0
        return min(self.s_churn / self.steps, sqrt(2) - 1)

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        """Purified images ``(b, c, h, w)`` for `images` ``(b, c, h, w)`` in [0, 1]."""
        x, sigmas = to_diffusion(images), self.levels()
        fresh = noise.normal(FORWARD, 0, x)

        def forward(left: int) -> Tensor:
            """The forward process at the noise level from which `left` steps lead to 0."""
            return x + sigmas[left] * fresh

        def reverse(i: int, left: int, below: int, z: Tensor) -> Tensor:
            sigma, to = sigmas[left], sigmas[below]
            # Algorithm 2, lines 4 to 6: new noise raises the level a little.
            if gamma := self.gamma(sigma):
                raised = sigma + gamma * sigma
                size = sqrt(raised**2 - sigma**2) * self.s_noise
                z, sigma = z + size * noise.normal(REVERSE, i, z), raised
            # Lines 7 and 8: an Euler step along the slope there.
            slope = self._slope(z, sigma)
            ahead: Tensor = z + (to - sigma) * slope
            if self.solver == "euler" or to == 0:
                return ahead
            # Lines 10 and 11: Heun's correction, by the mean of the slopes at both ends.
            return z + (to - sigma) * (0.5 * slope + 0.5 * self._slope(ahead, to))

        grid = itertools.pairwise(range(self.steps, -1, -1))
        z = memory.descend(reverse, forward(self.steps), grid, forward=forward)
        return to_images(z, self.clamp_output)

    def _slope(self, z: Tensor, sigma: float) -> Tensor:
        """The slope of the probability-flow ODE in sigma (equations 1 and 3)."""
        levels = torch.full((len(z),), sigma, dtype=z.dtype, device=z.device)
        return (z - self.denoiser(z, levels)) / sigma
