"""Consistency purification: noise to level t*, and one call back to the clean image.

A consistency model maps any state of a probability-flow path to the path's end, the clean image
(Song et al. 2023, arXiv 2303.01469). Here it is a network that predicts noise, read as

    f(z, t) = z / sqrt(a_t) - sqrt(1 - a_t) / sqrt(a_t) * network(z, t)

so that their condition at the boundary, f(z, 0) = z, holds whatever the weights, since a_0 = 1
(their equation 5 with c_skip = 1 / sqrt(a_t) and c_out = -sqrt(1 - a_t) / sqrt(a_t)), and so that a
distillation (:mod:`dbp_bench.training.consistency`) starts from the one-step estimate of its
teacher. Purification with it: Li et al. 2024, arXiv 2407.00623.
"""

from dataclasses import dataclass

from torch import Tensor

from dbp_bench import memory
from dbp_bench.defense import Denoiser
from dbp_bench.noise import FORWARD, REVERSE, Noise, Site
from dbp_bench.purifiers.schedule import LINEAR, Diffusion, denoise, to_diffusion, to_images


@dataclass(frozen=True)
class Consistency:
    """Noise to level `t_star`, and the end of the path there; again from lower levels if asked.

    With several `steps`, the image is noised anew, to evenly spaced lower levels, and mapped back
    (Song et al. 2023, algorithm 1). The NFE is `steps`.
    """

    denoiser: Denoiser
    t_star: int
    steps: int
    clamp_output: bool

    def __post_init__(self) -> None:
        """Refuse `t_star` and `steps` that give no grid."""
        LINEAR.grid(self.t_star, self.steps)

    @property
    def sites(self) -> frozenset[Site]:
        """The forward site and, with several steps, the reverse site."""
        return frozenset({FORWARD, REVERSE} if self.steps > 1 else {FORWARD})

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        """Purified images ``(b, c, h, w)`` for `images` ``(b, c, h, w)`` in [0, 1]."""
        x, a = to_diffusion(images), LINEAR.signal()
        forward = Diffusion(a, x, noise.normal(FORWARD, 0, x))

        def reverse(i: int, t: int, s: int, z: Tensor) -> Tensor:
            # Lines 1 and 5: the end of the path.
            x0, _ = denoise(self.denoiser, z, t, clip=False)
            if s == 0:
                return x0
            # Line 4: new noise, to the next level.
            lower: Tensor = a[s] ** 0.5 * x0 + (1 - a[s]) ** 0.5 * noise.normal(REVERSE, i, z)
            return lower

        grid = LINEAR.grid(self.t_star, self.steps)
        z = memory.descend(reverse, forward(self.t_star), grid, forward=forward)
        return to_images(z, self.clamp_output)
