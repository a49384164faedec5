"""DDPM and DDIM purification: diffuse to level t*, then sample back on an integer grid.

Ho et al. 2020 (DDPM, equations 4, 6 and 7 on a strided chain) and Song et al. 2021 (DDIM, equation
12). The first denoising step is at the level of the forward noise; the last one ends at level 0.
The scripts published with ADDT go one level higher (`published_grid`), and DDIM's steps there keep
the network's own noise where the image was clipped (`consistent_noise: false`).
"""

from dataclasses import dataclass
from math import log
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dbp_bench import memory
from dbp_bench.defense import Denoiser
from dbp_bench.errors import BadEntry
from dbp_bench.noise import FORWARD, REVERSE, Noise, Site
from dbp_bench.purifiers.schedule import LINEAR, Diffusion, denoise, to_diffusion, to_images

Variance = Literal["large", "small", "learned"]


@dataclass(frozen=True)
class Posterior:
    """One reverse step of the chain q(z_s | z_t, x0), t > s (Ho et al. 2020, equation 7).

    ``mean = x0_weight * x0 + z_weight * z_t``; `sigma` is the standard deviation of the noise that
    is added, `large` (beta of the strided chain) or `small` (the posterior's own). A `learned` one
    is in between, where the network says (Nichol and Dhariwal 2021, equation 15); see `deviation`.
    """

    x0_weight: float
    z_weight: float
    sigma: float
    """The noise's standard deviation: 0 for the step to level 0, the largest if it is learned."""
    bounds: tuple[float, float] | None = None
    """Logarithms of the least and the largest variance, where it is learned."""

    @classmethod
    def between(cls, t: int, s: int, variance: Variance) -> "Posterior":
        """The step from level `t` to level `s`; the step to level 0 adds no noise."""
        a_t, a_s = LINEAR.signal()[t], LINEAR.signal()[s]
        alpha = a_t / a_s
        beta = 1 - alpha
        small = beta * (1 - a_s) / (1 - a_t)
        spread = small if variance == "small" else beta
        return cls(
            x0_weight=a_s**0.5 * beta / (1 - a_t),
            z_weight=alpha**0.5 * (1 - a_s) / (1 - a_t),
            sigma=spread**0.5 if s > 0 else 0.0,
            bounds=(log(small), log(beta)) if variance == "learned" and s > 0 else None,
        )

    def mean(self, x0: Tensor, z: Tensor) -> Tensor:
        """The mean ``(b, c, h, w)`` of z_s, given the image `x0` and the state `z` at level t."""
        return self.x0_weight * x0 + self.z_weight * z

    def deviation(self, share: Tensor | None) -> float | Tensor:
        """The standard deviation of the noise.

        Args:
            share: The place of a learned variance between its bounds, from -1 to 1; None where the
                network doesn't predict it.

        Raises:
            BadEntry: The variance is learned and the network doesn't say.
        """
        if self.bounds is None:
            return self.sigma
        if share is None:
            raise BadEntry("variance: learned, but the denoiser predicts none; use large or small.")
        low, high = self.bounds
        return torch.exp(0.25 * ((1 - share) * low + (1 + share) * high))


@dataclass(frozen=True)
class DDPM:
    """Ancestral sampling: noise at the forward step and at every reverse step but the last."""

    denoiser: Denoiser
    t_star: int
    steps: int
    variance: Variance
    clip_x0: bool
    clamp_output: bool
    published_grid: bool = False
    """See :meth:`Schedule.grid`."""

    sites: ClassVar[frozenset[Site]] = frozenset({FORWARD, REVERSE})

    def __post_init__(self) -> None:
        """Refuse `t_star` and `steps` that give no grid."""
        LINEAR.grid(self.t_star, self.steps, published=self.published_grid)

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        """Purified images ``(b, c, h, w)`` for `images` ``(b, c, h, w)`` in [0, 1]."""
        x = to_diffusion(images)
        grid = LINEAR.grid(self.t_star, self.steps, published=self.published_grid)
        # Equation 4: the state at any level, with one draw of noise.
        forward = Diffusion(LINEAR.signal(), x, noise.normal(FORWARD, 0, x))

        def reverse(i: int, t: int, s: int, z: Tensor) -> Tensor:
            # Equation 15: the image that the predicted noise stands for.
            x0, said = denoise(self.denoiser, z, t, clip=self.clip_x0)
            # Equation 7: the mean of z_s.
            law = Posterior.between(t, s, self.variance)
            mean = law.mean(x0, z)
            if s == 0:
                return mean
            # Algorithm 2, lines 3 and 4: noise, but in the last step.
            return mean + law.deviation(said.share) * noise.normal(REVERSE, i, z)

        z = memory.descend(reverse, forward(grid[0][0]), grid, forward=forward)
        return to_images(z, self.clamp_output)


@dataclass(frozen=True)
class DDIM:
    """Deterministic sampling (eta = 0): the only noise is the forward noise."""

    denoiser: Denoiser
    t_star: int
    steps: int
    clip_x0: bool
    clamp_output: bool
    published_grid: bool = False
    """See :meth:`Schedule.grid`."""
    consistent_noise: bool = True
    """The noise that is kept is that between z and the clipped image; if false, the network's own.
    They are the same where nothing is clipped."""

    sites: ClassVar[frozenset[Site]] = frozenset({FORWARD})

    def __post_init__(self) -> None:
        """Refuse options that are out of range, or make no difference."""
        LINEAR.grid(self.t_star, self.steps, published=self.published_grid)
        if not (self.consistent_noise or self.clip_x0):
            raise BadEntry(
                "consistent_noise: false makes no difference without clip_x0; leave it out."
            )

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        """Purified images ``(b, c, h, w)`` for `images` ``(b, c, h, w)`` in [0, 1]."""
        x, a = to_diffusion(images), LINEAR.signal()
        grid = LINEAR.grid(self.t_star, self.steps, published=self.published_grid)
        forward = Diffusion(a, x, noise.normal(FORWARD, 0, x))

        def reverse(_i: int, t: int, s: int, z: Tensor) -> Tensor:
            # The predicted image, first term of equation 12.
            x0, said = denoise(self.denoiser, z, t, clip=self.clip_x0)
            eps = said.noise
            if self.consistent_noise:
                # The noise that leads from that image to z.
                eps = (z - a[t] ** 0.5 * x0) / (1 - a[t]) ** 0.5
            # Equation 12 with sigma = 0: that image with that noise, at the lower level.
            lower: Tensor = a[s] ** 0.5 * x0 + (1 - a[s]) ** 0.5 * eps
            return lower

        z = memory.descend(reverse, forward(grid[0][0]), grid, forward=forward)
        return to_images(z, self.clamp_output)
