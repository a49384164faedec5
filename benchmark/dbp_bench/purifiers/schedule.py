"""Noise levels of a variance-preserving diffusion, addressed by integers.

A level t counts noising steps: t = 0 is the clean image, t = T pure noise. Networks are trained on
0-based steps, so the network that denoises level t is called at step t - 1.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from dbp_bench.errors import BadEntry


@dataclass(frozen=True, slots=True)
class Schedule:
    """Linear betas (Ho et al. 2020): ``linspace(beta_first, beta_last, levels)``."""

    levels: int = 1000
    beta_first: float = 1e-4
    beta_last: float = 2e-2

    def signal(self) -> tuple[float, ...]:
        """The products of (1 - beta) for levels 0 ... T; the first is 1."""
        betas = torch.linspace(self.beta_first, self.beta_last, self.levels, dtype=torch.float64)
        return (1.0, *torch.cumprod(1 - betas, 0).tolist())

    def grid(self, t_star: int, steps: int) -> list[tuple[int, int]]:
        """`steps` pairs (from, to) of integer levels from `t_star` down to 0, evenly spaced.

        Raises:
            BadEntry: `t_star` is not a level above 0, or `steps` is not in 1 ... `t_star`.
        """
        if not 1 <= t_star <= self.levels:
            raise BadEntry(f"t_star: {t_star} is not in 1 ... {self.levels} (the model's levels).")
        if not 1 <= steps <= t_star:
            raise BadEntry(f"steps: {steps} is not in 1 ... t_star = {t_star}.")
        levels = [(t_star * (steps - i) + steps // 2) // steps for i in range(steps + 1)]
        return list(itertools.pairwise(levels))


def times(level: int, like: Tensor) -> Tensor:
    """The network's 0-based step ``(b,)`` at `level`."""
    return torch.full((len(like),), float(level - 1), dtype=like.dtype, device=like.device)


def to_diffusion(images: Tensor) -> Tensor:
    """From [0, 1] to diffusion space [-1, 1]."""
    return 2 * images - 1


def to_images(z: Tensor, clamp: bool) -> Tensor:
    """From diffusion space to [0, 1]; outside, clamped (zero gradient there) or left as it is."""
    images = (z + 1) / 2
    return images.clamp(0, 1) if clamp else images
