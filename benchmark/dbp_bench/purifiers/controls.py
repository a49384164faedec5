"""Controls: noise alone and one denoising step, to read the columns of purifiers against."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dbp_bench.defense import Denoiser, Identity
from dbp_bench.noise import FORWARD, Noise, Site
from dbp_bench.purifiers.schedule import LINEAR, Diffusion, denoise, to_diffusion, to_images


class Unpurified(Identity):
    """The base classifier alone."""


@dataclass(frozen=True)
class NoiseOnly:
    """Forward noise to level `t_star`, scaled back, no denoiser: stochasticity and nothing else."""

    t_star: int
    clamp_output: bool

    sites: ClassVar[frozenset[Site]] = frozenset({FORWARD})

    def __post_init__(self) -> None:
        """Refuse a level that is none."""
        LINEAR.grid(self.t_star, 1)

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        """Noisy images ``(b, c, h, w)`` for `images` ``(b, c, h, w)`` in [0, 1]."""
        a_t = LINEAR.signal()[self.t_star]
        z = to_diffusion(images)
        z = z + ((1 - a_t) / a_t) ** 0.5 * noise.normal(FORWARD, 0, z)
        return to_images(z, self.clamp_output)


@dataclass(frozen=True)
class OneShot:
    """Forward noise to level `t_star`, then one denoising step (Ho et al. 2020, equation 15)."""

    denoiser: Denoiser
    t_star: int
    clamp_output: bool

    sites: ClassVar[frozenset[Site]] = frozenset({FORWARD})

    def __post_init__(self) -> None:
        """Refuse a level that is none."""
        LINEAR.grid(self.t_star, 1)

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        """Denoised images ``(b, c, h, w)`` for `images` ``(b, c, h, w)`` in [0, 1]."""
        x = to_diffusion(images)
        z = Diffusion(LINEAR.signal(), x, noise.normal(FORWARD, 0, x))(self.t_star)
        x0, _ = denoise(self.denoiser, z, self.t_star, clip=False)
        return to_images(x0, self.clamp_output)
