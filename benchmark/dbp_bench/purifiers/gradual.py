"""Gradual noise scheduling: several short purifications in a row, little noise before much.

Lee and Kim 2023 (arXiv 2303.09051), section 5. Each stage diffuses to its level and samples back to
0 by the generalised DDIM of Song et al. 2021 (equations 12 and 16), nothing clipped: eta = 1 is
ancestral sampling with the posterior's variance, eta = 0 the deterministic DDIM. The published
defense decides by a majority of 10 such runs, which is a matter of the entry (`votes`).
"""

from dataclasses import dataclass

from torch import Tensor

from dbp_bench import memory
from dbp_bench.defense import Denoiser
from dbp_bench.errors import BadEntry
from dbp_bench.noise import FORWARD, REVERSE, Noise, Site
from dbp_bench.purifiers.schedule import (
    LINEAR,
    Diffusion,
    denoise,
    refuse_count,
    to_diffusion,
    to_images,
)


@dataclass(frozen=True)
class Gradual:
    """The `stages` in a row, each of which purifies the output of the one before."""

    denoiser: Denoiser
    stages: list[dict[str, int]]
    """Each a table of `t_star`, its noise level; `steps`, the NFE from there to level 0; and
    `times`, how often it is run."""
    eta: float
    clamp_output: bool

    def __post_init__(self) -> None:
        """Refuse options that are out of range.

        The steps of a stage must divide its level: the published grid would begin below the level
        of the noise.
        """
        if not self.stages:
            raise BadEntry("stages: there is none.")
        if not 0 <= self.eta <= 1:
            raise BadEntry(f"eta: {self.eta} is not in 0 ... 1.")
        for number, stage in enumerate(self.stages, start=1):
            if stage.keys() != {"t_star", "steps", "times"}:
                raise BadEntry(
                    f"stages: number {number} is {stage}; it takes t_star, steps, times."
                )
            t_star, steps, times = stage["t_star"], stage["steps"], stage["times"]
            LINEAR.grid(t_star, steps)
            if t_star % steps:
                raise BadEntry(
                    f"stages: number {number}: steps: {steps} does not divide t_star = {t_star}."
                )
            refuse_count(f"stages: number {number}: times", times)

    @property
    def sites(self) -> frozenset[Site]:
        """The forward site and, where a step adds noise, the reverse site; last steps add none."""
        noisy = self.eta > 0 and any(stage["steps"] > 1 for stage in self.stages)
        return frozenset({FORWARD, REVERSE} if noisy else {FORWARD})

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        """Purified images ``(b, c, h, w)`` for `images` ``(b, c, h, w)`` in [0, 1]."""
        a = LINEAR.signal()

        def reverse(i: int, t: int, s: int, z: Tensor) -> Tensor:
            # Equation 16: how much of the noise is new; none at level 0.
            sigma = self.eta * ((1 - a[t] / a[s]) * (1 - a[s]) / (1 - a[t])) ** 0.5
            # Equation 12: the predicted image, with the predicted noise and the new one.
            x0, said = denoise(self.denoiser, z, t, clip=False)
            lower: Tensor = a[s] ** 0.5 * x0 + (1 - a[s] - sigma**2) ** 0.5 * said.noise
            return lower + sigma * noise.normal(REVERSE, i, z) if sigma else lower

        z = to_diffusion(images)
        runs = [stage for stage in self.stages for _ in range(stage["times"])]
        nfe = 0
        for run, stage in enumerate(runs):
            grid = LINEAR.grid(stage["t_star"], stage["steps"])
            # Noise to the level of the stage, then back to 0.
            forward = Diffusion(a, z, noise.normal(FORWARD, run, z))
            start = forward(stage["t_star"])
            z = memory.descend(reverse, start, grid, forward=forward, first=nfe)
            nfe += len(grid)
        return to_images(z, self.clamp_output)
