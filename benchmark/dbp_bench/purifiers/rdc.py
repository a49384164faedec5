"""RDC: classification by a conditional diffusion model (Chen et al. 2024, arXiv 2305.15241).

The logit of class y is minus the loss of the denoiser that is told y, summed over noise levels:
``- sum_k w(s_k) ds mean_pixels (D(z + s_k n_k; s_k, y) - z)^2`` (equation 7), z in [-1, 1]. The
noise of a level is shared by all classes, as where the authors evaluate: most of it cancels in the
difference of two logits. A robust diffusion classifier maximises the likelihood of the image first
(LM; section 3.3).

This is a whole defense: it gives logits, and no classifier follows it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from math import exp, log, pi, sqrt
from typing import Any, Literal

import torch
from torch import Tensor

from dbp_bench import memory
from dbp_bench.defense import Purifier, StraightThrough
from dbp_bench.errors import BadEntry, words_of
from dbp_bench.noise import Noise, Site
from dbp_bench.purifiers.edm import SigmaDenoiser
from dbp_bench.purifiers.lm import LM, squares
from dbp_bench.purifiers.schedule import refuse_count, to_diffusion
from dbp_bench.purifiers.sigma import AtSigma, Predicts, refuse_levels

LOSSES = Site("losses")
"""The site at which the noise of the losses is drawn, one step for each level."""

Weighting = Literal["training", "released", "likelihood"]
"""The weight of a level: that of EDM's training; the same with the density of the authors' code,
whose exponent is multiplied by P_std^2 where it should be divided; or that with which the sum over
pixels is the log-likelihood itself."""

_P_MEAN, _P_STD, _SIGMA_DATA = -1.2, 1.2, 0.5
"""The log-normal levels of EDM, and its standard deviation of images (Karras et al. 2022)."""


@dataclass(frozen=True)
class RDC:
    """The diffusion classifier at `levels` levels, of the image or of a likelier one.

    The levels begin at `sigma_min` and are evenly spaced below `sigma_max`. A purification takes
    `levels` x `classes` NFE, and the steps of LM.
    """

    conditional: Callable[[Tensor, Tensor, Tensor], Tensor]
    """The class-conditional network: called with images, levels ``(b,)`` and labels ``(b,)``."""
    classes: int
    predicts: Predicts
    """What the networks give; see :data:`dbp_bench.purifiers.sigma.Predicts`."""
    sigma_min: float
    sigma_max: float
    levels: int
    weighting: Weighting
    """See :data:`Weighting`."""
    lm: dict[str, Any] | None = None
    """The other options of :class:`~dbp_bench.purifiers.lm.LM`; null to classify the image as it
    is."""
    lm_gradient: Literal["exact", "identity"] | None = None
    """The gradient of LM: its own or, as the authors attack it, the identity's."""
    denoiser: SigmaDenoiser | None = None
    """LM's network, which is told no class."""

    def __post_init__(self) -> None:
        """Refuse options that are out of range, or make no difference."""
        refuse_levels(self.sigma_min, self.sigma_max, self.predicts)
        if self.sigma_min == self.sigma_max:
            raise BadEntry(f"sigma_min: {self.sigma_min} is sigma_max: there is no level below.")
        refuse_count("levels", self.levels)
        if self.classes < 2:
            raise BadEntry(f"classes: {self.classes} is not two or more.")
        given = {"lm": self.lm, "lm_gradient": self.lm_gradient, "denoiser": self.denoiser}
        if missing := [name for name, value in given.items() if value is None]:
            if len(missing) < len(given):
                raise BadEntry(f"{', '.join(given)} go together; missing: {', '.join(missing)}.")
        else:
            _ = self.maximiser

    @property
    def maximiser(self) -> Purifier | None:
        """What makes the image likelier before it is classified; None for nothing."""
        if self.lm is None or self.denoiser is None:
            return None
        try:
            _refuse_types(self.lm)
            lm = LM(denoiser=self.denoiser, predicts=self.predicts, **self.lm)
        except (BadEntry, TypeError) as error:
            raise BadEntry(f"lm: {words_of(error)}") from None
        return StraightThrough(lm) if self.lm_gradient == "identity" else lm

    @property
    def sites(self) -> frozenset[Site]:
        """The site losses, and those of LM."""
        return frozenset({LOSSES} | (self.maximiser.sites if self.maximiser else set()))

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        """Logits ``(b, classes)`` for `images` ``(b, c, h, w)`` in [0, 1]."""
        denoise = AtSigma(self.conditional, self.predicts)
        width = (self.sigma_max - self.sigma_min) / self.levels

        def reverse(k: int, _left: int, _below: int, logits: Tensor, z: Tensor) -> Tensor:
            sigma = self.sigma_min + k * width
            noised = z + sigma * noise.normal(LOSSES, k, z)
            level = torch.full((len(z),), sigma, dtype=z.dtype, device=z.device)
            labels = torch.arange(self.classes, device=z.device).expand(len(z), -1)
            each = [squares(denoise(noised, level, labels[:, y]) - z) for y in range(self.classes)]
            return logits - width * self.weight(sigma, z[0].numel()) * torch.stack(each, 1)

        maximiser = self.maximiser
        z = to_diffusion(images if maximiser is None else maximiser(images, noise))
        grid = [(k, k - 1) for k in range(self.levels, 0, -1)]
        return memory.descend(reverse, z.new_zeros(len(z), self.classes), grid, z)

    def weight(self, sigma: float, pixels: int) -> float:
        """The weight of the mean squared error at the level `sigma`, of so many `pixels`."""
        if self.weighting == "likelihood":
            return pixels / sigma**3
        away = (log(sigma) - _P_MEAN) ** 2 / 2
        away = away / _P_STD**2 if self.weighting == "training" else away * _P_STD**2
        density = exp(-away) / (sigma * _P_STD * sqrt(2 * pi))
        return density * (sigma**2 + _SIGMA_DATA**2) / (sigma * _SIGMA_DATA) ** 2


def _refuse_types(options: Mapping[str, Any]) -> None:
    """Refuse values of LM's `options` that aren't of the type of their field.

    They stand in a table, whose values an entry doesn't check.
    """
    kinds = {field.name: field.type for field in fields(LM)}
    for name, value in options.items():
        kind = kinds.get(name)
        fits = type(value) is kind or (kind is float and type(value) is int)
        if kind in _TYPES and not fits:
            raise BadEntry(f"{name}: {value!r} is {_TYPES[kind]}.")


_TYPES: dict[Any, str] = {
    int: "no integer",
    float: "no number",
    bool: "neither true nor false",
}
