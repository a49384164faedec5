"""DiffPure: purification by the reverse VP-SDE (Nie et al. 2022, equations 3 to 7).

Solved by Euler-Maruyama and differentiated exactly through the discrete solver. The published code
integrates an adjoint SDE instead, whose gradient differs from that of the solver it attacks.
"""

from dataclasses import dataclass
from math import exp

from torch import Tensor

from dbp_bench import memory
from dbp_bench.defense import Denoiser
from dbp_bench.noise import FORWARD, REVERSE, Noise, Site
from dbp_bench.purifiers.schedule import Schedule, times, to_diffusion, to_images

BETA_MIN, BETA_MAX = 0.1, 20.0


@dataclass(frozen=True)
class DiffPure:
    """Reverse VP-SDE from t*/T to 0 in `steps` Euler-Maruyama steps on an integer grid.

    With f = -beta(t) z / 2 and g^2 = beta(t), beta(t) = 0.1 + 19.9 t, a step back by dt is
    ``z - dt * (f - g^2 score) + sqrt(g^2 dt) * noise``; score = -eps / sqrt(1 - signal(t)), with
    the continuous-time signal. The last step returns its mean.
    """

    denoiser: Denoiser
    t_star: int
    steps: int
    clamp_output: bool
    schedule: Schedule = Schedule()
    sites: frozenset[Site] = frozenset({FORWARD, REVERSE})

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        """Purified images ``(b, c, h, w)`` for `images` ``(b, c, h, w)`` in [0, 1]."""
        signal = self.schedule.signal()[self.t_star]
        z = to_diffusion(images)
        z = signal**0.5 * z + (1 - signal) ** 0.5 * noise.normal(FORWARD, 0, z)
        for i, (level, to) in enumerate(self.schedule.grid(self.t_star, self.steps)):

            def reverse(z: Tensor, i: int = i, level: int = level, to: int = to) -> Tensor:
                t, dt = level / self.schedule.levels, (level - to) / self.schedule.levels
                beta = BETA_MIN + (BETA_MAX - BETA_MIN) * t
                spread = 1 - exp(-0.5 * (BETA_MAX - BETA_MIN) * t * t - BETA_MIN * t)
                score = -self.denoiser(z, times(level, z)) / spread**0.5
                mean: Tensor = z + dt * (0.5 * beta * z + beta * score)
                size: float = (beta * dt) ** 0.5
                return mean + size * noise.normal(REVERSE, i, z) if to else mean

            z = memory.step(reverse, z)
        return to_images(z, self.clamp_output)


def diffpure(denoiser: Denoiser, *, t_star: int, steps: int, clamp_output: bool) -> DiffPure:
    """Build :class:`DiffPure` from an entry's options."""
    Schedule().grid(t_star, steps)
    return DiffPure(denoiser, t_star, steps, clamp_output)
