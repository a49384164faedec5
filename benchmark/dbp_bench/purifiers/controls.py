"""Controls: what noise alone and one denoising step do, so that the columns can be believed."""

from dataclasses import dataclass

from torch import Tensor

from dbp_bench.defense import Denoiser, Identity
from dbp_bench.noise import FORWARD, Noise, Site
from dbp_bench.purifiers.schedule import Schedule, predict, times, to_diffusion, to_images


def none() -> Identity:
    """The bare classifier."""
    return Identity()


@dataclass(frozen=True)
class NoiseOnly:
    """Forward noise to level `t_star`, scaled back, no denoiser: stochasticity and nothing else."""

    t_star: int
    clamp_output: bool
    schedule: Schedule = Schedule()
    sites: frozenset[Site] = frozenset({FORWARD})

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        """Noisy images ``(b, c, h, w)`` for `images` ``(b, c, h, w)`` in [0, 1]."""
        signal = self.schedule.signal()[self.t_star]
        z = to_diffusion(images)
        z = z + ((1 - signal) / signal) ** 0.5 * noise.normal(FORWARD, 0, z)
        return to_images(z, self.clamp_output)


@dataclass(frozen=True)
class OneShot:
    """Forward noise to level `t_star`, then one denoising step (Ho et al. 2020, equation 15)."""

    denoiser: Denoiser
    t_star: int
    clamp_output: bool
    schedule: Schedule = Schedule()
    sites: frozenset[Site] = frozenset({FORWARD})

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        """Denoised images ``(b, c, h, w)`` for `images` ``(b, c, h, w)`` in [0, 1]."""
        signal = self.schedule.signal()[self.t_star]
        z = to_diffusion(images)
        z = signal**0.5 * z + (1 - signal) ** 0.5 * noise.normal(FORWARD, 0, z)
        eps = predict(self.denoiser, z, times(self.t_star, z)).noise
        return to_images((z - (1 - signal) ** 0.5 * eps) / signal**0.5, self.clamp_output)


def noise_only(*, t_star: int, clamp_output: bool) -> NoiseOnly:
    """Build :class:`NoiseOnly` from an entry's options."""
    Schedule().grid(t_star, 1)
    return NoiseOnly(t_star, clamp_output)


def one_shot(denoiser: Denoiser, *, t_star: int, clamp_output: bool) -> OneShot:
    """Build :class:`OneShot` from an entry's options."""
    Schedule().grid(t_star, 1)
    return OneShot(denoiser, t_star, clamp_output)
