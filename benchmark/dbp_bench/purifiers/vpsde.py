"""DiffPure: purification by the reverse VP-SDE, or its ODE (Nie et al. 2022, equations 3 to 7).

Solved by Euler's method and differentiated exactly through the discrete solver. The published code
integrates an adjoint SDE instead, whose gradient differs from that of the solver it attacks.

Published runs differ from the plain grid in small things, which are options here: the step that the
network is told, where the last step ends and whether it adds noise, and which signal the forward
noise has. They take as many steps as levels, end at ``t_end = 1e-5`` with noise, and tell the
network `score-sde` labels (CIFAR-10) or `adm` labels (ImageNet).
"""

from dataclasses import dataclass
from math import exp
from typing import Literal

import torch
from torch import Tensor

from dbp_bench import memory
from dbp_bench.defense import Denoiser
from dbp_bench.errors import BadEntry
from dbp_bench.noise import FORWARD, REVERSE, Noise, Site
from dbp_bench.purifiers.schedule import (
    LINEAR,
    Diffusion,
    predict,
    times,
    to_diffusion,
    to_images,
)

BETA_MIN, BETA_MAX = 0.1, 20.0

Label = Literal["step", "score-sde", "adm"]
"""The step that the network is told at level l of T: the 0-based ``l - 1``; ``(T - 1) l / T``, as
its continuous training has it (Song et al. 2021); or ``l``, DiffPure's for networks of ADM."""

Forward = Literal["discrete", "continuous"]
"""The signal of the forward noise: the discrete chain's, or the VP-SDE's own."""


def continuous_signal(t: float) -> float:
    """The signal of the VP-SDE at time t: exp(-integral of 0.1 + 19.9 t)."""
    return exp(-0.5 * (BETA_MAX - BETA_MIN) * t * t - BETA_MIN * t)


@dataclass(frozen=True)
class DiffPure:
    """The reverse VP-SDE from t*/T to `t_end` in `steps` Euler-Maruyama steps on an integer grid.

    With f = -beta(t) z / 2 and g^2 = beta(t), beta(t) = 0.1 + 19.9 t, a step back by dt is
    ``z - dt * (f - g^2 score) + sqrt(g^2 dt) * noise``; score = -eps / sqrt(1 - signal(t)), with
    the continuous-time signal. The last step returns its mean, unless `last_noise` is set.
    """

    denoiser: Denoiser
    t_star: int
    steps: int
    clamp_output: bool
    label: Label = "step"
    forward: Forward = "discrete"
    t_end: float = 0.0
    last_noise: bool = False
    ode: bool = False
    """The sampler follows the probability-flow ODE, dz/dt = f - g^2 score / 2 (Song et al. 2021,
    equation 13), whose only noise is the forward noise."""

    def __post_init__(self) -> None:
        """Refuse options that are out of range, or make no difference."""
        last, _ = LINEAR.grid(self.t_star, self.steps)[-1]
        if not 0 <= self.t_end < last / LINEAR.levels:
            raise BadEntry(
                f"t_end: {self.t_end} is not in 0 ... {last / LINEAR.levels}, where the last step "
                "begins."
            )
        if self.ode and self.last_noise:
            raise BadEntry("last_noise: the ODE adds no noise at any step; leave it out.")

    @property
    def sites(self) -> frozenset[Site]:
        """The forward site and, for the SDE, the reverse site."""
        return frozenset({FORWARD} if self.ode else {FORWARD, REVERSE})

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        """Purified images ``(b, c, h, w)`` for `images` ``(b, c, h, w)`` in [0, 1]."""
        x, levels = to_diffusion(images), LINEAR.levels
        signal = LINEAR.signal()
        if self.forward == "continuous":
            signal = tuple(continuous_signal(t / levels) for t in range(levels + 1))
        forward = Diffusion(signal, x, noise.normal(FORWARD, 0, x))

        def reverse(i: int, level: int, to: int, z: Tensor) -> Tensor:
            dt = (level - to) / levels - (0.0 if to else self.t_end)
            beta = BETA_MIN + (BETA_MAX - BETA_MIN) * (level / levels)
            score = self._score(z, level)
            # The drift, backwards: -f + g^2 score; for the ODE with half the score.
            share = 0.5 if self.ode else 1.0
            mean: Tensor = z + dt * (0.5 * beta * z + share * beta * score)
            if self.ode or not (to or self.last_noise):
                return mean
            # The diffusion: g sqrt(dt) times standard noise.
            size: float = (beta * dt) ** 0.5
            return mean + size * noise.normal(REVERSE, i, z)

        grid = LINEAR.grid(self.t_star, self.steps)
        z = memory.descend(reverse, forward(self.t_star), grid, forward=forward)
        return to_images(z, self.clamp_output)

    def _score(self, z: Tensor, level: int) -> Tensor:
        """The score of z's marginal at `level`, by the predicted noise and the VP-SDE's signal."""
        if self.label == "score-sde":
            told = (LINEAR.levels - 1) * level / LINEAR.levels
            t = torch.full((len(z),), told, dtype=z.dtype, device=z.device)
        else:
            t = times(level if self.label == "step" else level + 1, z)
        spread = 1 - continuous_signal(level / LINEAR.levels)
        score: Tensor = -predict(self.denoiser, z, t).noise / spread**0.5
        return score
