"""Purification guided by a classifier's confidence, in the spirit of COUP (Zhang et al. 2024).

Classifier-confidence guided purification (arXiv 2408.05900) adds to the score, in the drift of the
reverse VP-SDE, the gradient of the classifier's confidence at the noisy state:

    score(z) + weight * grad_z log max_y p(y | z)

That form is public. Chosen here: the classifier sees ``(z + 1) / 2``, the noisy state as an image,
neither scaled up nor clamped; the `weight` is the same at every level, and no published one is
known; the rest is DiffPure's sampler (see :class:`dbp_bench.purifiers.vpsde.DiffPure`), which is
handed a network whose predicted noise has the guidance in it, as in classifier guidance (Dhariwal
and Nichol 2021, algorithm 2).

The purification is differentiated exactly, through the guidance too: that takes second derivatives
of the classifier.
"""

from dataclasses import dataclass, field
from math import isfinite

import torch
from torch import Tensor, nn

from dbp_bench.defense import Denoiser
from dbp_bench.errors import BadEntry
from dbp_bench.noise import Noise, Site
from dbp_bench.purifiers.schedule import LINEAR, predict
from dbp_bench.purifiers.vpsde import DiffPure, Label, continuous_signal


def confidence_gradient(guide: nn.Module, z: Tensor) -> Tensor:
    """Gradient in `z` of the log-probability of each image's likeliest class; ``(b, c, h, w)``.

    `guide` gives logits ``(b, k)`` for images ``(b, c, h, w)`` in [0, 1]; `z` is in [-1, 1] space.
    The result carries a gradient where `z` does.
    """
    further = torch.is_grad_enabled() and z.requires_grad
    with torch.enable_grad():
        x = z if further else z.detach().requires_grad_()
        confidence = guide((x + 1) / 2).log_softmax(1).amax(1)
        (gradient,) = torch.autograd.grad(confidence.sum(), x, create_graph=further)
    return gradient


@dataclass(frozen=True)
class Guided:
    """A network whose predicted noise is that of the score plus `weight` times the guidance."""

    denoiser: Denoiser
    guide: nn.Module
    weight: float
    label: Label

    def __call__(self, z: Tensor, t: Tensor) -> Tensor:
        """Predicted noise ``(b, c, h, w)`` for `z` ``(b, c, h, w)``, with the guidance in it.

        `t` ``(b,)`` is what DiffPure tells its network: one number, in the units of `label`.
        """
        told = float(t[0])
        level = told + 1 if self.label == "step" else told
        if self.label == "score-sde":
            level = told * LINEAR.levels / (LINEAR.levels - 1)
        # score = -noise / size, so that the guidance enters the noise as -size times itself.
        size = (1 - continuous_signal(level / LINEAR.levels)) ** 0.5
        said = predict(self.denoiser, z, t).noise
        guided: Tensor = said - size * self.weight * confidence_gradient(self.guide, z)
        return guided


@dataclass(frozen=True)
class COUP:
    """DiffPure's reverse VP-SDE, guided by the confidence of a classifier."""

    denoiser: Denoiser
    guide: nn.Module
    """The classifier whose confidence guides: logits ``(b, k)`` for images ``(b, c, h, w)`` in
    [0, 1]. Its calls count as NFE."""
    weight: float
    """The weight of the guidance, which the paper calls lambda; positive."""
    t_star: int
    steps: int
    clamp_output: bool
    label: Label = "step"
    t_end: float = 0.0
    last_noise: bool = False
    _sampler: DiffPure = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse options that are out of range, or make no difference."""
        if not (isfinite(self.weight) and self.weight > 0):
            raise BadEntry(f"weight: {self.weight} is not positive; diffpure has no guidance.")
        sampler = DiffPure(
            Guided(self.denoiser, self.guide, self.weight, self.label),
            t_star=self.t_star,
            steps=self.steps,
            clamp_output=self.clamp_output,
            label=self.label,
            t_end=self.t_end,
            last_noise=self.last_noise,
        )
        object.__setattr__(self, "_sampler", sampler)

    @property
    def sites(self) -> frozenset[Site]:
        """The sites forward and reverse."""
        return self._sampler.sites

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        """Purified images ``(b, c, h, w)`` for `images` ``(b, c, h, w)`` in [0, 1]."""
        return self._sampler(images, noise)
