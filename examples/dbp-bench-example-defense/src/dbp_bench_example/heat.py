"""Noise, then noisy steps of the heat equation: a purifier with two sites, and no network."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad

from dbp_bench.noise import FORWARD, REVERSE, Noise, Site


def laplacian(images: Tensor) -> Tensor:
    """Of `images` (b, c, h, w), by the four neighbours; the border is repeated."""
    wide = pad(images, (1, 1, 1, 1), mode="replicate")
    around = wide[..., 2:, 1:-1] + wide[..., :-2, 1:-1] + wide[..., 1:-1, 2:] + wide[..., 1:-1, :-2]
    return around - 4 * images


@dataclass(frozen=True)
class Heat:
    """Noise of `level`, then `steps` of size `rate`, each with noise of `level` / 4."""

    level: float
    steps: int
    rate: float
    sites: frozenset[Site] = frozenset({FORWARD, REVERSE})

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        """Purified images (b, c, h, w) in [0, 1] for `images` (b, c, h, w) in [0, 1]."""
        z = images + self.level * noise.normal(FORWARD, 0, images)
        for step in range(self.steps):
            z = z + self.rate * laplacian(z)
            z = z + self.level / 4 * noise.normal(REVERSE, step, z)
        return z.clamp(0, 1)


def build(*, level: float, steps: int, rate: float) -> Heat:
    """The purifier, from the options of the entry; what can't be right is a ValueError."""
    if level < 0 or steps < 1:
        raise ValueError(f"level {level:g} must be 0 or more, steps {steps} 1 or more")
    if not 0 < rate <= 0.25:
        raise ValueError(f"rate {rate:g}: the steps are unstable above 0.25")
    return Heat(level, steps, rate)
