"""Noise, then noisy steps of the heat equation: a purifier with two sites, and no network."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import pad

from dbp_bench.noise import FORWARD, REVERSE, Noise, Site


def laplacian(images: Tensor) -> Tensor:
    """The Laplacian (b, c, h, w) of `images`, by the four neighbours; the border is repeated."""
    wide = pad(images, (1, 1, 1, 1), mode="replicate")
    around = wide[..., 2:, 1:-1] + wide[..., :-2, 1:-1] + wide[..., 1:-1, 2:] + wide[..., 1:-1, :-2]
    return around - 4 * images


@dataclass(frozen=True)
class Heat:
    """Noise of `level`, then `steps` Euler steps of size `rate`, each with noise of `level` / 4.

    The fields are the options of the entry.
    """

    level: float
    steps: int
    rate: float
    sites: ClassVar[frozenset[Site]] = frozenset({FORWARD, REVERSE})

    def __post_init__(self) -> None:
        """Refuse options that can't be right."""
        if self.level < 0 or self.steps < 1:
            raise ValueError(
                f"level {self.level:g} must be 0 or more, steps {self.steps} 1 or more"
            )
        if not 0 < self.rate <= 0.25:
            raise ValueError(f"rate {self.rate:g}: the steps are unstable above 0.25")

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        """Purified images (b, c, h, w) in [0, 1] for `images` (b, c, h, w) in [0, 1]."""
        z = images + self.level * noise.normal(FORWARD, 0, images)
        for step in range(self.steps):
            z = z + self.rate * laplacian(z)
            z = z + self.level / 4 * noise.normal(REVERSE, step, z)
        return z.clamp(0, 1)
