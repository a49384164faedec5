"""DPM-Solver++ 2M purification (Lu et al. 2022, arXiv 2211.01095, algorithm 2).

Diffuse to level t*, then follow the probability-flow ODE back on an integer grid. Its time is
lambda = log(alpha / sigma), half the logarithm of the signal-to-noise ratio, where alpha =
sqrt(a_t) and sigma = sqrt(1 - a_t). A step holds one image still, and is exact for the rest. In
DDIM, which is of first order, that is the image predicted where the step begins; here it is what a
line through the last two predictions gives for the middle of the step, which makes second order.

At level 0 lambda is infinite, and a step there has no middle. So the last step is of first order,
and ends at the image predicted where it begins, as in published implementations whose last sigma is
0 (`lower_order_final`). The first step is of first order for want of an earlier prediction.
"""

from dataclasses import dataclass
from math import expm1, log
from typing import ClassVar

from torch import Tensor

from dbp_bench import memory
from dbp_bench.defense import Denoiser
from dbp_bench.noise import FORWARD, Noise, Site
from dbp_bench.purifiers.schedule import LINEAR, Diffusion, denoise, to_diffusion, to_images


@dataclass(frozen=True)
class DPMSolver:
    """The multistep sampler: one NFE for each step, no noise but the forward noise."""

    denoiser: Denoiser
    t_star: int
    steps: int
    clip_x0: bool
    clamp_output: bool

    sites: ClassVar[frozenset[Site]] = frozenset({FORWARD})

    def __post_init__(self) -> None:
        """Refuse `t_star` and `steps` that give no grid."""
        LINEAR.grid(self.t_star, self.steps)

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        """Purified images ``(b, c, h, w)`` for `images` ``(b, c, h, w)`` in [0, 1]."""
        x, a = to_diffusion(images), LINEAR.signal()
        grid = LINEAR.grid(self.t_star, self.steps)
        forward = Diffusion(a, x, noise.normal(FORWARD, 0, x))

        def reverse(i: int, t: int, s: int, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            z, *before = state
            # Lines 3, 5 and 10: the image predicted at level t, which the next step needs too.
            x0, _ = denoise(self.denoiser, z, t, clip=self.clip_x0)
            if s == 0:
                return (x0,)
            h = _lambda(a[s]) - _lambda(a[t])
            image = x0
            if before:
                # Lines 7 and 8: the image in the middle, from the last two predictions.
                r = (_lambda(a[t]) - _lambda(a[grid[i - 1][0]])) / h
                image = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * before[0]
            # Line 9, and line 4 in the first step, with alpha and sigma at both levels.
            ratio, alpha = ((1 - a[s]) / (1 - a[t])) ** 0.5, a[s] ** 0.5
            return ratio * z - alpha * expm1(-h) * image, x0

        z, *_ = memory.descend(reverse, (forward(self.t_star),), grid, forward=forward)
        return to_images(z, self.clamp_output)


def _lambda(signal: float) -> float:
    """Half the logarithm of the signal-to-noise ratio."""
    return log(signal / (1 - signal)) / 2
