"""Gradual noise scheduling: several short purifications in a row, little noise before much.

Lee and Kim 2023 (arXiv 2303.09051), section 5. Each stage diffuses to its level and samples back to
0 by the generalised DDIM of Song et al. 2021 (equations 12 and 16), nothing clipped: eta = 1 is
ancestral sampling with the posterior's variance, eta = 0 the deterministic DDIM. The published
defense decides by a majority of 10 such runs, which is a matter of the entry (`votes`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dbp_bench import memory
from dbp_bench.defense import Denoiser
from dbp_bench.errors import BadEntry
from dbp_bench.noise import FORWARD, REVERSE, Noise, Site
from dbp_bench.purifiers.schedule import (
    Diffusion,
    Schedule,
    predict,
    times,
    to_diffusion,
    to_images,
)


@dataclass(frozen=True, slots=True)
class Stage:
    """One noise level, and how often it is purified from there."""

    t_star: int
    steps: int
    """Network calls from there to level 0."""
    times: int


@dataclass(frozen=True)
class Gradual:
    """The `stages`, one after the other, each from what the one before left."""

    denoiser: Denoiser
    stages: Sequence[Stage]
    eta: float
    clamp_output: bool
    schedule: Schedule = Schedule()

    @property
    def sites(self) -> frozenset[Site]:
        """Forward and, where a step adds noise, reverse: the step to level 0 never does."""
        noisy = self.eta > 0 and any(stage.steps > 1 for stage in self.stages)
        return frozenset({FORWARD, REVERSE} if noisy else {FORWARD})

    @property
    def calls(self) -> int:
        """Network calls of one purification."""
        return sum(stage.steps * stage.times for stage in self.stages)

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        """Purified images ``(b, c, h, w)`` for `images` ``(b, c, h, w)`` in [0, 1]."""
        table = self.schedule.signal()
        z = to_diffusion(images)
        runs = [stage for stage in self.stages for _ in range(stage.times)]
        call = 0
        for run, stage in enumerate(runs):
            forward = Diffusion(table, z, noise.normal(FORWARD, run, z))
            z = forward(stage.t_star)
            for t, s in self.schedule.grid(stage.t_star, stage.steps):

                def reverse(z: Tensor, call: int = call, t: int = t, s: int = s) -> Tensor:
                    a_t, a_s = table[t], table[s]
                    sigma = self.eta * ((1 - a_t / a_s) * (1 - a_s) / (1 - a_t)) ** 0.5
                    eps = predict(self.denoiser, z, times(t, z)).noise
                    x0 = (z - (1 - a_t) ** 0.5 * eps) / a_t**0.5
                    lower: Tensor = a_s**0.5 * x0 + (1 - a_s - sigma**2) ** 0.5 * eps
                    return lower + sigma * noise.normal(REVERSE, call, z) if sigma else lower

                z = memory.step(reverse, z, level=s, forward=forward)
                call += 1
        return to_images(z, self.clamp_output)


def gradual(
    denoiser: Denoiser, *, stages: list[dict[str, int]], eta: float, clamp_output: bool
) -> Gradual:
    """Build :class:`Gradual` from an entry's options.

    Each of the `stages` is a table of `t_star`, `steps` and `times`.

    Raises:
        BadEntry: An option is out of range; or the steps of a stage do not divide its level, where
            the published grid would begin below the level of the noise.
    """
    if not stages:
        raise BadEntry("stages: there is none.")
    if not 0 <= eta <= 1:
        raise BadEntry(f"eta: {eta} is not in 0 ... 1.")
    keys = ("t_star", "steps", "times")
    for number, table in enumerate(stages, start=1):
        if sorted(table) != sorted(keys):
            raise BadEntry(f"stages: number {number} is {table}; it takes {', '.join(keys)}.")
        stage = Stage(**table)
        Schedule().grid(stage.t_star, stage.steps)
        if stage.t_star % stage.steps:
            raise BadEntry(
                f"stages: number {number}: steps: {stage.steps} does not divide t_star = "
                f"{stage.t_star}."
            )
        if stage.times < 1:
            raise BadEntry(f"stages: number {number}: times: {stage.times} is not positive.")
    return Gradual(denoiser, [Stage(**table) for table in stages], eta, clamp_output)
