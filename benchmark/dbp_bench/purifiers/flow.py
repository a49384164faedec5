"""FlowPure: purification along a flow from perturbed to clean images (arXiv 2505.13280).

The flow leads from perturbed images at time 0 to clean ones at time 1, on straight lines in the
mean: ``x_t = (1 - t) perturbed + t clean``, whose velocity a network has learnt
(:mod:`dbp_bench.training.flow`). Where the perturbation is Gaussian, purification begins at a time
t0 between the two, with as much noise as is left there; where the network was trained on attacked
images it begins at 0 without any noise, and is deterministic: knowing the draws is knowing nothing.
"""

import itertools
from dataclasses import dataclass
from math import isfinite
from typing import Protocol

import torch
from torch import Tensor

from dbp_bench import memory
from dbp_bench.errors import BadEntry
from dbp_bench.noise import FORWARD, Noise, Site
from dbp_bench.purifiers.schedule import refuse_count, to_diffusion, to_images

TIMES = 1000
"""A network is told this many times the flow's time, so that networks of diffusions serve."""


class Velocity(Protocol):
    """A network that predicts dz/dt of a flow in diffusion space [-1, 1]."""

    def __call__(self, z: Tensor, t: Tensor) -> Tensor:
        """Velocities, like `z` ``(b, c, h, w)``, at :data:`TIMES` times the time `t` ``(b,)``."""
        ...


@dataclass(frozen=True)
class FlowPure:
    """Noise of ``(1 - t0) sigma``, then `steps` Euler steps from time `t0` to 1: as many NFE."""

    velocity: Velocity
    sigma: float
    """Standard deviation of the noise at time 0, for images in [0, 1]; 0 for none."""
    t0: float
    """Where the flow is entered, from 0 and below 1."""
    steps: int
    clamp_output: bool

    def __post_init__(self) -> None:
        """Refuse options that are out of range."""
        if not (isfinite(self.sigma) and self.sigma >= 0):
            raise BadEntry(f"sigma: {self.sigma} is not 0 or more, and finite.")
        if not 0 <= self.t0 < 1:
            raise BadEntry(f"t0: {self.t0} is not from 0 and below 1.")
        refuse_count("steps", self.steps)

    @property
    def sites(self) -> frozenset[Site]:
        """The forward site; none without noise."""
        return frozenset({FORWARD} if self.sigma else ())

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        """Purified images ``(b, c, h, w)`` for `images` ``(b, c, h, w)`` in [0, 1]."""
        x = to_diffusion(images)
        fresh = 2 * self.sigma * noise.normal(FORWARD, 0, x) if self.sigma else None
        h = (1 - self.t0) / self.steps

        def forward(left: int) -> Tensor:
            """The perturbed image at the time from which `left` steps lead to 1."""
            return x if fresh is None else x + left * h * fresh

        def reverse(_i: int, left: int, _below: int, z: Tensor) -> Tensor:
            # Euler's step along the velocity at its beginning.
            t = torch.full((len(z),), TIMES * (1 - left * h), dtype=z.dtype, device=z.device)
            return z + h * self.velocity(z, t)

        grid = itertools.pairwise(range(self.steps, -1, -1))
        z = memory.descend(reverse, forward(self.steps), grid, forward=forward)
        return to_images(z, self.clamp_output)
