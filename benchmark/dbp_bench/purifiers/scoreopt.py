"""ScoreOpt-N: optimisation of a noisy image (Zhang et al. 2023, arXiv 2307.04333).

The image is noised once, to level t. Adam then moves the noisy image z until the noise that the
denoiser sees in it, ``(z - D(z; t)) / t``, is the noise n that was added: its loss is the mean over
pixels of ``((z - D(z; t)) / t - n)^2``. The result is denoised in one step. As in LM each image has
a loss of its own, where the published code averages over the batch too, and the gradient is of
second order.

ScoreOpt-O, which moves the image itself, is :class:`dbp_bench.purifiers.lm.LM`: at a level t drawn
from t0 - 0.1 ... t0 + 0.1 its loss is the same. The published code draws one level for a whole
batch; here each image has its own.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dbp_bench.defense import NoiseOption
from dbp_bench.noise import FORWARD, Noise, Site
from dbp_bench.purifiers.edm import SigmaDenoiser
from dbp_bench.purifiers.lm import minimised, refuse_search, squares
from dbp_bench.purifiers.schedule import to_diffusion, to_images
from dbp_bench.purifiers.sigma import AtSigma, Predicts, refuse_levels


@dataclass(frozen=True)
class ScoreOptN:
    """Noise to level `sigma`, `steps` steps of Adam on the noisy image, one denoising step."""

    denoiser: SigmaDenoiser
    predicts: Predicts
    """What the denoiser gives; see :data:`dbp_bench.purifiers.sigma.Predicts`."""
    sigma: float
    steps: int
    """The NFE are one more."""
    rate: float
    """Adam's learning rate, in [-1, 1] units."""
    clamp_output: bool

    sites: ClassVar[frozenset[Site]] = frozenset({FORWARD})
    noise_option: ClassVar[NoiseOption] = ("sigma", 2.0)

    def __post_init__(self) -> None:
        """Refuse options that are out of range."""
        refuse_levels(self.sigma, self.sigma, self.predicts)
        refuse_search(self.steps, self.rate)

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        """Purified images ``(b, c, h, w)`` for `images` ``(b, c, h, w)`` in [0, 1]."""
        x = to_diffusion(images)
        fresh = noise.normal(FORWARD, 0, x)
        levels = torch.full((len(x),), self.sigma, dtype=x.dtype, device=x.device)
        denoise = AtSigma(self.denoiser, self.predicts)

        def loss(i: int, z: Tensor) -> Tensor:  # noqa: ARG001
            return squares((z - denoise(z, levels)) / self.sigma - fresh)

        z = minimised(loss, x + self.sigma * fresh, self.steps, self.rate)
        return to_images(denoise(z, levels), self.clamp_output)
