"""Few steps of EDM's sampler with a dial for its noise, in the spirit of Purify++ (Zhang 2023).

Purify++ (arXiv 2310.18762) has three ingredients: the forward noise of EDM, which leaves the image
unscaled; a simulation of few steps, of Heun's kind; and randomness that is controlled, as a mixture
of the probability-flow ODE with Langevin dynamics. That much is public; neither its step counts nor
its mixture are. Chosen here: algorithm 2 of Karras et al. 2022, the sampler of
:class:`dbp_bench.purifiers.edm.EDM`, whose new noise before each step is one of Langevin dynamics.
The dial is `langevin`: 0 is the ODE alone, 1 the most that the algorithm takes, where the variance
of the noise doubles before each step. Networks that predict the noise of a variance-preserving
chain serve beside EDM's (see :mod:`dbp_bench.purifiers.sigma`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import sqrt
from typing import ClassVar

from torch import Tensor

from dbp_bench.defense import NoiseOption
from dbp_bench.errors import BadEntry
from dbp_bench.noise import Noise, Site
from dbp_bench.purifiers.edm import EDM, Solver
from dbp_bench.purifiers.sigma import AtSigma, Predicts, refuse_levels

MOST = sqrt(2) - 1
"""The largest share by which algorithm 2 lets a noise level grow (its line 4)."""


@dataclass(frozen=True)
class PurifyPlus:
    """Noise to level `sigma_max`, then `steps` steps down with `langevin` of the noise there is."""

    denoiser: Callable[..., Tensor]
    predicts: Predicts
    """What the denoiser gives: the image at a noise level, or the noise at a step of the chain."""
    sigma_max: float
    sigma_min: float
    rho: float
    steps: int
    solver: Solver
    langevin: float
    """The share of Langevin dynamics, from 0 (the ODE) to 1 (the most that algorithm 2 takes)."""
    clamp_output: bool
    _sampler: EDM = field(init=False, repr=False, compare=False)

    noise_option: ClassVar[NoiseOption] = ("sigma_max", 2.0)

    def __post_init__(self) -> None:
        """Refuse options that are out of range."""
        if not 0 <= self.langevin <= 1:
            raise BadEntry(f"langevin: {self.langevin} is not in 0 ... 1.")
        growth = self.langevin * MOST
        sampler = EDM(
            AtSigma(self.denoiser, self.predicts),
            sigma_max=self.sigma_max,
            sigma_min=self.sigma_min,
            rho=self.rho,
            steps=self.steps,
            solver=self.solver,
            clamp_output=self.clamp_output,
            s_churn=growth * self.steps,
        )
        refuse_levels(self.sigma_min, self.sigma_max * (1 + growth), self.predicts)
        object.__setattr__(self, "_sampler", sampler)

    @property
    def sites(self) -> frozenset[Site]:
        """The forward site and, with Langevin dynamics, the reverse site."""
        return self._sampler.sites

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        """Purified images ``(b, c, h, w)`` for `images` ``(b, c, h, w)`` in [0, 1]."""
        return self._sampler(images, noise)
