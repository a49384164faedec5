"""DDPM and DDIM purification: diffuse to level t*, then sample back on an integer grid.

Ho et al. 2020 (DDPM, equations 4, 6 and 7 on a strided chain) and Song et al. 2021 (DDIM, equation
12). The first denoising step is at the level of the forward noise; the last one ends at level 0.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from dbp_bench import memory
from dbp_bench.defense import Denoiser
from dbp_bench.noise import FORWARD, REVERSE, Noise, Site
from dbp_bench.purifiers.schedule import Schedule, times, to_diffusion, to_images

Variance = Literal["large", "small"]


@dataclass(frozen=True)
class Posterior:
    """One reverse step of the chain q(z_s | z_t, x0), t > s (Ho et al. 2020, equation 7).

    ``mean = x0_weight * x0 + z_weight * z_t``; `sigma` is the standard deviation of the noise that
    is added, `large` (beta of the strided chain) or `small` (the posterior's own).
    """

    t: int
    signal: float
    x0_weight: float
    z_weight: float
    sigma: float

    @classmethod
    def between(cls, schedule: Schedule, t: int, s: int, variance: Variance) -> "Posterior":
        """The step from level `t` to level `s`; the step to level 0 adds no noise."""
        table = schedule.signal()
        a_t, a_s = table[t], table[s]
        alpha = a_t / a_s
        beta = 1 - alpha
        spread = beta if variance == "large" else beta * (1 - a_s) / (1 - a_t)
        return cls(
            t=t,
            signal=a_t,
            x0_weight=a_s**0.5 * beta / (1 - a_t),
            z_weight=alpha**0.5 * (1 - a_s) / (1 - a_t),
            sigma=spread**0.5 if s > 0 else 0.0,
        )


def predict_x0(denoiser: Denoiser, z: Tensor, t: int, signal: float, clip: bool) -> Tensor:
    """The denoised image in [-1, 1] (Ho et al. 2020, equation 15), clipped on request."""
    eps = denoiser(z, times(t, z))
    x0: Tensor = (z - (1 - signal) ** 0.5 * eps) / signal**0.5
    return x0.clamp(-1, 1) if clip else x0


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

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        """Purified images ``(b, c, h, w)`` for `images` ``(b, c, h, w)`` in [0, 1]."""
        signal = self.schedule.signal()[self.t_star]
        z = to_diffusion(images)
        z = signal**0.5 * z + (1 - signal) ** 0.5 * noise.normal(FORWARD, 0, z)
        for i, (t, s) in enumerate(self.schedule.grid(self.t_star, self.steps)):
            law = Posterior.between(self.schedule, t, s, self.variance)

            def reverse(z: Tensor, i: int = i, law: Posterior = law) -> Tensor:
                x0 = predict_x0(self.denoiser, z, law.t, law.signal, self.clip_x0)
                mean = law.x0_weight * x0 + law.z_weight * z
                return mean + law.sigma * noise.normal(REVERSE, i, z) if law.sigma else mean

            z = memory.step(reverse, z)
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

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        """Purified images ``(b, c, h, w)`` for `images` ``(b, c, h, w)`` in [0, 1]."""
        table = self.schedule.signal()
        signal = table[self.t_star]
        z = to_diffusion(images)
        z = signal**0.5 * z + (1 - signal) ** 0.5 * noise.normal(FORWARD, 0, z)
        for t, s in self.schedule.grid(self.t_star, self.steps):

            def reverse(z: Tensor, t: int = t, s: int = s) -> Tensor:
                x0 = predict_x0(self.denoiser, z, t, table[t], self.clip_x0)
                eps = (z - table[t] ** 0.5 * x0) / (1 - table[t]) ** 0.5
                lower: Tensor = table[s] ** 0.5 * x0 + (1 - table[s]) ** 0.5 * eps
                return lower

            z = memory.step(reverse, z)
        return to_images(z, self.clamp_output)


def ddpm(
    denoiser: Denoiser,
    *,
    t_star: int,
    steps: int,
    variance: Variance,
    clip_x0: bool,
    clamp_output: bool,
) -> DDPM:
    """Build :class:`DDPM` from an entry's options."""
    Schedule().grid(t_star, steps)
    return DDPM(denoiser, t_star, steps, variance, clip_x0, clamp_output)


def ddim(denoiser: Denoiser, *, t_star: int, steps: int, clip_x0: bool, clamp_output: bool) -> DDIM:
    """Build :class:`DDIM` from an entry's options."""
    Schedule().grid(t_star, steps)
    return DDIM(denoiser, t_star, steps, clip_x0, clamp_output)
