"""Few steps of EDM's sampler with a dial for its noise, in the spirit of Purify++ (Zhang 2023).

Purify++ (arXiv 2310.18762) has three ingredients: the forward noise of EDM, which leaves the image
unscaled; a simulation of few steps, of Heun's kind; and randomness that is controlled, as a mixture
of the probability-flow ODE with Langevin dynamics. That much is public; neither its step counts nor
its mixture are. Chosen here: algorithm 2 of Karras et al. 2022, the sampler of
:class:`dbp_bench.purifiers.edm.EDM`, whose new noise before each step is one of Langevin dynamics.
The dial is `langevin`: 0 is the ODE alone, 1 the most that the algorithm takes, where the variance
of the noise doubles before each step.

EDM's networks give the image at a noise level. A network that predicts the noise at an integer step
of the variance-preserving chain serves too (`predicts: noise`): it is asked at the step whose ratio
of noise to signal is that level, between two steps in proportion to the logarithm of the ratio
(Karras et al. 2022, table 1: ``D(z; sigma) = z - sigma * noise(z / sqrt(1 + sigma^2))``).
"""

from bisect import bisect_left
from dataclasses import dataclass, field
from functools import cache
from math import log, sqrt
from typing import Any, Literal

import torch
from torch import Tensor

from dbp_bench.defense import Denoiser
from dbp_bench.errors import BadEntry
from dbp_bench.noise import Noise, Site
from dbp_bench.purifiers.edm import EDM, Solver
from dbp_bench.purifiers.schedule import LINEAR, predict

MOST = sqrt(2) - 1
"""The largest share by which algorithm 2 lets a noise level grow (its line 4)."""


@dataclass(frozen=True)
class FromNoise:
    """D(z; sigma), the expected image, by a `denoiser` that predicts noise at 0-based steps."""

    denoiser: Denoiser

    def __call__(self, z: Tensor, sigma: Tensor) -> Tensor:
        """Denoised images ``(b, c, h, w)``, like `z`, at noise levels ``(b,)``, all the same."""
        size = float(sigma[0])
        t = torch.full_like(sigma, step_of(size))
        denoised: Tensor = z - size * predict(self.denoiser, z / sqrt(1 + size**2), t).noise
        return denoised


def step_of(sigma: float) -> float:
    """The 0-based step, between two where need be, whose noise over its signal is `sigma`.

    Below that of the first step it is the first.
    """
    known = _log_ratios()
    i = bisect_left(known, log(sigma))
    if i == 0:
        return 0.0
    return i - 1 + (log(sigma) - known[i - 1]) / (known[i] - known[i - 1])


@cache
def _log_ratios() -> list[float]:
    """The logarithm of the ratio of noise to signal at each 0-based step, rising."""
    return [0.5 * log((1 - a) / a) for a in LINEAR.signal()[1:]]


@dataclass(frozen=True)
class PurifyPlus:
    """Noise to level `sigma_max`, then `steps` steps down with `langevin` of the noise there is."""

    denoiser: Any
    """See `predicts`."""
    predicts: Literal["image", "noise"]
    """What the network gives: the image at a noise level, as EDM's; or the noise at a step of the
    variance-preserving chain."""
    sigma_max: float
    sigma_min: float
    rho: float
    steps: int
    solver: Solver
    langevin: float
    """The share of Langevin dynamics, from 0 (the ODE) to 1 (the most that algorithm 2 takes)."""
    clamp_output: bool
    _sampler: EDM = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse options that are out of range."""
        if not 0 <= self.langevin <= 1:
            raise BadEntry(f"langevin: {self.langevin} is not in 0 ... 1.")
        sampler = EDM(
            FromNoise(self.denoiser) if self.predicts == "noise" else self.denoiser,
            sigma_max=self.sigma_max,
            sigma_min=self.sigma_min,
            rho=self.rho,
            steps=self.steps,
            solver=self.solver,
            clamp_output=self.clamp_output,
            s_churn=self.langevin * MOST * self.steps,
        )
        top = LINEAR.signal()[-1]
        most = sqrt((1 - top) / top)
        if self.predicts == "noise" and self.sigma_max * (1 + MOST) > most:
            raise BadEntry(f"sigma_max: {self.sigma_max} is above {most / (1 + MOST):.4g}.")
        object.__setattr__(self, "_sampler", sampler)

    @property
    def sites(self) -> frozenset[Site]:
        """The forward site and, with Langevin dynamics, the reverse site."""
        return self._sampler.sites

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        """Purified images ``(b, c, h, w)`` for `images` ``(b, c, h, w)`` in [0, 1]."""
        return self._sampler(images, noise)
