"""DiffPure: purification by the reverse VP-SDE, or its ODE (Nie et al. 2022, equations 3 to 7).

Solved by Euler's method and differentiated exactly through the discrete solver. The published code
integrates an adjoint SDE instead, whose gradient differs from that of the solver it attacks.

Published runs differ from the plain grid in small things, which are options here: the step that the
network is told, where the last step ends and whether it adds noise, and which signal the forward
noise has.
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
    Diffusion,
    Schedule,
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


def _beta(t: float) -> float:
    return BETA_MIN + (BETA_MAX - BETA_MIN) * t


def _forward(schedule: Schedule, kind: Forward) -> tuple[float, ...]:
    """The signal at every level."""
    if kind == "discrete":
        return schedule.signal()
    return tuple(continuous_signal(t / schedule.levels) for t in range(schedule.levels + 1))


def _score(denoiser: Denoiser, z: Tensor, level: int, levels: int, label: Label) -> Tensor:
    """Of the marginal at `level`; the network predicts noise, the signal is the VP-SDE's."""
    if label == "step":
        t = times(level, z)
    elif label == "adm":
        t = times(level + 1, z)
    else:
        told = (levels - 1) * level / levels
        t = torch.full((len(z),), told, dtype=z.dtype, device=z.device)
    spread = 1 - continuous_signal(level / levels)
    score: Tensor = -predict(denoiser, z, t).noise / spread**0.5
    return score


@dataclass(frozen=True)
class DiffPure:
    """Reverse VP-SDE from t*/T to 0 in `steps` Euler-Maruyama steps on an integer grid.

    With f = -beta(t) z / 2 and g^2 = beta(t), beta(t) = 0.1 + 19.9 t, a step back by dt is
    ``z - dt * (f - g^2 score) + sqrt(g^2 dt) * noise``; score = -eps / sqrt(1 - signal(t)), with
    the continuous-time signal. The last step returns its mean, unless `last_noise` is set, and ends
    at time `t_end`.
    """

    denoiser: Denoiser
    t_star: int
    steps: int
    clamp_output: bool
    schedule: Schedule = Schedule()
    sites: frozenset[Site] = frozenset({FORWARD, REVERSE})
    label: Label = "step"
    forward: Forward = "discrete"
    t_end: float = 0.0
    last_noise: bool = False

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        """Purified images ``(b, c, h, w)`` for `images` ``(b, c, h, w)`` in [0, 1]."""
        source, levels = to_diffusion(images), self.schedule.levels
        signal = _forward(self.schedule, self.forward)
        forward = Diffusion(signal, source, noise.normal(FORWARD, 0, source))
        z = forward(self.t_star)
        for i, (level, to) in enumerate(self.schedule.grid(self.t_star, self.steps)):

            def reverse(z: Tensor, i: int = i, level: int = level, to: int = to) -> Tensor:
                dt = (level - to) / levels - (0.0 if to else self.t_end)
                beta = _beta(level / levels)
                score = _score(self.denoiser, z, level, levels, self.label)
                mean: Tensor = z + dt * (0.5 * beta * z + beta * score)
                size: float = (beta * dt) ** 0.5
                if not to and not self.last_noise:
                    return mean
                return mean + size * noise.normal(REVERSE, i, z)

            z = memory.step(reverse, z, level=to, forward=forward)
        return to_images(z, self.clamp_output)


@dataclass(frozen=True)
class DiffPureODE:
    """The probability-flow ODE dz/dt = f - g^2 score / 2 from t*/T to `t_end` in Euler steps.

    Song et al. 2021, equation 13; f, g, the score and the grid are those of :class:`DiffPure`. The
    only noise is the forward noise.
    """

    denoiser: Denoiser
    t_star: int
    steps: int
    clamp_output: bool
    label: Label
    forward: Forward
    t_end: float
    schedule: Schedule = Schedule()
    sites: frozenset[Site] = frozenset({FORWARD})

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        """Purified images ``(b, c, h, w)`` for `images` ``(b, c, h, w)`` in [0, 1]."""
        source, levels = to_diffusion(images), self.schedule.levels
        signal = _forward(self.schedule, self.forward)
        forward = Diffusion(signal, source, noise.normal(FORWARD, 0, source))
        z = forward(self.t_star)
        for level, to in self.schedule.grid(self.t_star, self.steps):

            def reverse(z: Tensor, level: int = level, to: int = to) -> Tensor:
                dt = (level - to) / levels - (0.0 if to else self.t_end)
                beta = _beta(level / levels)
                score = _score(self.denoiser, z, level, levels, self.label)
                return z + dt * (0.5 * beta * z + 0.5 * beta * score)

            z = memory.step(reverse, z, level=to, forward=forward)
        return to_images(z, self.clamp_output)


def diffpure(
    denoiser: Denoiser,
    *,
    t_star: int,
    steps: int,
    clamp_output: bool,
    label: Label = "step",
    forward: Forward = "discrete",
    t_end: float = 0.0,
    last_noise: bool = False,
) -> DiffPure:
    """Build :class:`DiffPure` from an entry's options.

    The published runs take as many steps as levels, end at ``t_end = 1e-5`` with noise, and tell
    the network `score-sde` labels (CIFAR-10) or `adm` labels (ImageNet).

    Raises:
        BadEntry: An option is out of range.
    """
    _check(t_star, steps, t_end)
    return DiffPure(
        denoiser,
        t_star,
        steps,
        clamp_output,
        label=label,
        forward=forward,
        t_end=t_end,
        last_noise=last_noise,
    )


def diffpure_ode(
    denoiser: Denoiser,
    *,
    t_star: int,
    steps: int,
    clamp_output: bool,
    label: Label = "step",
    forward: Forward = "discrete",
    t_end: float = 0.0,
) -> DiffPureODE:
    """Build :class:`DiffPureODE` from an entry's options; published runs end at 1e-5 too.

    Raises:
        BadEntry: An option is out of range.
    """
    _check(t_star, steps, t_end)
    return DiffPureODE(denoiser, t_star, steps, clamp_output, label, forward, t_end)


def _check(t_star: int, steps: int, t_end: float) -> None:
    schedule = Schedule()
    last, _ = schedule.grid(t_star, steps)[-1]
    if not 0 <= t_end < last / schedule.levels:
        raise BadEntry(
            f"t_end: {t_end} is not in 0 ... {last / schedule.levels}, where the last step begins."
        )
