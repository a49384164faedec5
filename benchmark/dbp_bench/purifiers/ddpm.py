"""DDPM and DDIM purification: diffuse to level t*, then sample back on an integer grid.

Ho et al. 2020 (DDPM, equations 4, 6 and 7 on a strided chain) and Song et al. 2021 (DDIM, equation
12). The first denoising step is at the level of the forward noise; the last one ends at level 0.
The scripts published with ADDT go one level higher (`published_grid`), and DDIM's steps there keep
the network's own noise where the image was clipped (`consistent_noise: false`).
"""

from dataclasses import dataclass
from math import log
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dbp_bench import memory
from dbp_bench.defense import Denoiser
from dbp_bench.errors import BadEntry
from dbp_bench.noise import FORWARD, REVERSE, Noise, Site
from dbp_bench.purifiers.schedule import (
    Diffusion,
    Schedule,
    predict,
    times,
    to_diffusion,
    to_images,
)

Variance = Literal["large", "small", "learned"]


@dataclass(frozen=True)
class Posterior:
    """One reverse step of the chain q(z_s | z_t, x0), t > s (Ho et al. 2020, equation 7).

    ``mean = x0_weight * x0 + z_weight * z_t``; `sigma` is the standard deviation of the noise that
    is added, `large` (beta of the strided chain) or `small` (the posterior's own). A `learned` one
    is in between, where the network says (Nichol and Dhariwal 2021, equation 15); see `deviation`.
    """

    t: int
    signal: float
    x0_weight: float
    z_weight: float
    sigma: float
    """0 for the step to level 0; the largest, where it is learned."""
    bounds: tuple[float, float] | None = None
    """Logarithms of the least and the largest variance, where it is learned."""

    @classmethod
    def between(cls, schedule: Schedule, t: int, s: int, variance: Variance) -> "Posterior":
        """The step from level `t` to level `s`; the step to level 0 adds no noise."""
        table = schedule.signal()
        a_t, a_s = table[t], table[s]
        alpha = a_t / a_s
        beta = 1 - alpha
        small = beta * (1 - a_s) / (1 - a_t)
        spread = small if variance == "small" else beta
        return cls(
            t=t,
            signal=a_t,
            x0_weight=a_s**0.5 * beta / (1 - a_t),
            z_weight=alpha**0.5 * (1 - a_s) / (1 - a_t),
            sigma=spread**0.5 if s > 0 else 0.0,
            bounds=(log(small), log(beta)) if variance == "learned" and s > 0 else None,
        )

    def deviation(self, share: Tensor | None) -> float | Tensor:
        """Of the noise; for a learned variance, by what the network says: `share`, -1 to 1.

        Raises:
            BadEntry: The variance is learned and the network doesn't say.
        """
        if self.bounds is None:
            return self.sigma
        if share is None:
            raise BadEntry("variance: learned, but the denoiser predicts none; use large or small.")
        low, high = self.bounds
        return torch.exp(0.25 * ((1 - share) * low + (1 + share) * high))


class Denoised(NamedTuple):
    """What a network says of a noisy image, as an image."""

    x0: Tensor
    """In [-1, 1] (Ho et al. 2020, equation 15), clipped on request."""
    noise: Tensor
    """As predicted."""
    share: Tensor | None
    """See :meth:`Posterior.deviation`."""


def denoise(denoiser: Denoiser, z: Tensor, t: int, signal: float, clip: bool) -> Denoised:
    """What `denoiser` says of `z` ``(b, c, h, w)`` at level `t`."""
    eps, share = predict(denoiser, z, times(t, z))
    x0: Tensor = (z - (1 - signal) ** 0.5 * eps) / signal**0.5
    return Denoised(x0.clamp(-1, 1) if clip else x0, eps, share)


def _pairs(schedule: Schedule, t_star: int, steps: int, published: bool) -> list[tuple[int, int]]:
    """The grid of levels, (from, to)."""
    return (schedule.published_grid if published else schedule.grid)(t_star, steps)


@dataclass(frozen=True)
class DDPM:
    """Ancestral sampling: noise at the forward step and at every reverse step but the last."""

    denoiser: Denoiser
    t_star: int
    steps: int
    variance: Variance
    clip_x0: bool
    clamp_output: bool
    schedule: Schedule = Schedule()
    sites: frozenset[Site] = frozenset({FORWARD, REVERSE})
    published_grid: bool = False
    """See :meth:`Schedule.published_grid`."""

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        """Purified images ``(b, c, h, w)`` for `images` ``(b, c, h, w)`` in [0, 1]."""
        source = to_diffusion(images)
        forward = Diffusion(self.schedule.signal(), source, noise.normal(FORWARD, 0, source))
        pairs = _pairs(self.schedule, self.t_star, self.steps, self.published_grid)
        z = forward(pairs[0][0])
        for i, (t, s) in enumerate(pairs):
            law = Posterior.between(self.schedule, t, s, self.variance)

            def reverse(z: Tensor, i: int = i, law: Posterior = law) -> Tensor:
                x0, _, share = denoise(self.denoiser, z, law.t, law.signal, self.clip_x0)
                mean: Tensor = law.x0_weight * x0 + law.z_weight * z
                if not law.sigma:
                    return mean
                return mean + law.deviation(share) * noise.normal(REVERSE, i, z)

            z = memory.step(reverse, z, level=s, forward=forward)
        return to_images(z, self.clamp_output)


@dataclass(frozen=True)
class DDIM:
    """Deterministic sampling (eta = 0): the only noise is the forward noise."""

    denoiser: Denoiser
    t_star: int
    steps: int
    clip_x0: bool
    clamp_output: bool
    schedule: Schedule = Schedule()
    sites: frozenset[Site] = frozenset({FORWARD})
    published_grid: bool = False
    """See :meth:`Schedule.published_grid`."""
    consistent_noise: bool = True
    """Whether the noise that is kept is that between z and the clipped image; else the network's
    own. The same where nothing is clipped."""

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        """Purified images ``(b, c, h, w)`` for `images` ``(b, c, h, w)`` in [0, 1]."""
        table = self.schedule.signal()
        source = to_diffusion(images)
        forward = Diffusion(table, source, noise.normal(FORWARD, 0, source))
        pairs = _pairs(self.schedule, self.t_star, self.steps, self.published_grid)
        z = forward(pairs[0][0])
        for t, s in pairs:

            def reverse(z: Tensor, t: int = t, s: int = s) -> Tensor:
                x0, eps, _ = denoise(self.denoiser, z, t, table[t], self.clip_x0)
                if self.consistent_noise:
                    eps = (z - table[t] ** 0.5 * x0) / (1 - table[t]) ** 0.5
                lower: Tensor = table[s] ** 0.5 * x0 + (1 - table[s]) ** 0.5 * eps
                return lower

            z = memory.step(reverse, z, level=s, forward=forward)
        return to_images(z, self.clamp_output)


def ddpm(
    denoiser: Denoiser,
    *,
    t_star: int,
    steps: int,
    variance: Variance,
    clip_x0: bool,
    clamp_output: bool,
    published_grid: bool = False,
) -> DDPM:
    """Build :class:`DDPM` from an entry's options."""
    _pairs(Schedule(), t_star, steps, published_grid)
    return DDPM(
        denoiser, t_star, steps, variance, clip_x0, clamp_output, published_grid=published_grid
    )


def ddim(
    denoiser: Denoiser,
    *,
    t_star: int,
    steps: int,
    clip_x0: bool,
    clamp_output: bool,
    published_grid: bool = False,
    consistent_noise: bool = True,
) -> DDIM:
    """Build :class:`DDIM` from an entry's options.

    Raises:
        BadEntry: An option is out of range, or makes no difference.
    """
    _pairs(Schedule(), t_star, steps, published_grid)
    if not (consistent_noise or clip_x0):
        raise BadEntry("consistent_noise: false makes no difference without clip_x0; leave it out.")
    return DDIM(
        denoiser,
        t_star,
        steps,
        clip_x0,
        clamp_output,
        published_grid=published_grid,
        consistent_noise=consistent_noise,
    )
