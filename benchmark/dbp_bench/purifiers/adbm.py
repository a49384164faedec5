"""ADBM: DDIM down a bridge from diffused adversarial images to clean ones (Li et al., ICLR 2025).

The sampler is DDIM (Song et al. 2021, equation 12, eta = 0) in few steps; what is new is the
training of the denoiser (arXiv 2408.00315; :mod:`dbp_bench.training.adbm`). As in the released code
the predicted image is clipped and the network's own noise is kept. That code differs from the
training in three small things, which `published` turns on: its table of betas begins at 1e-6, the
noise is that of one level more than the first step undoes, and the network is told a step's 0-based
number for what training calls 999 t.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dbp_bench import memory
from dbp_bench.defense import Denoiser
from dbp_bench.errors import BadEntry
from dbp_bench.noise import FORWARD, Noise, Site
from dbp_bench.purifiers.schedule import (
    LINEAR,
    Diffusion,
    Schedule,
    predict,
    times,
    to_diffusion,
    to_images,
)

_RELEASED = Schedule(beta_first=1e-6)


@dataclass(frozen=True)
class ADBM:
    """Noise to level `t_star`, then `steps` deterministic steps: the NFE is `steps`."""

    denoiser: Denoiser
    """A network that predicts the whole noise of the bridge, adversarial part and all."""
    t_star: int
    steps: int
    published: bool = False
    """What the released code does otherwise, for networks of
    :class:`~dbp_bench.networks.songunet.DDPMpp`; see the module."""

    sites: ClassVar[frozenset[Site]] = frozenset({FORWARD})

    def __post_init__(self) -> None:
        """Refuse `t_star` and `steps` that give no grid."""
        LINEAR.grid(self.t_star, self.steps)
        if self.published and self.t_star == LINEAR.levels:
            raise BadEntry(f"t_star: {self.t_star} has no level above it (published).")

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        """Purified images ``(b, c, h, w)`` for `images` ``(b, c, h, w)`` in [0, 1]."""
        x = to_diffusion(images)
        a = (_RELEASED if self.published else LINEAR).signal()
        forward = Diffusion(a, x, noise.normal(FORWARD, 0, x))

        def reverse(_i: int, t: int, s: int, z: Tensor) -> Tensor:
            eps = predict(self.denoiser, z, self._told(t, z)).noise
            # The predicted image, first term of equation 12, clipped.
            x0 = ((z - (1 - a[t]) ** 0.5 * eps) / a[t] ** 0.5).clamp(-1, 1)
            # Equation 12 with sigma = 0: that image with that noise, at the lower level.
            lower: Tensor = a[s] ** 0.5 * x0 + (1 - a[s]) ** 0.5 * eps
            return lower

        grid = LINEAR.grid(self.t_star, self.steps)
        start = forward(self.t_star + self.published)
        z = memory.descend(reverse, start, grid, forward=forward)
        return to_images(z, clamp=False)  # the last step's image is clipped

    def _told(self, level: int, z: Tensor) -> Tensor:
        """The step that the network is told at `level`."""
        if not self.published:
            return times(level, z)
        # DDPMpp makes of it the label 999 (step + 1) / 1000, which is to be level - 1.
        told = (level - 1) * LINEAR.levels / (LINEAR.levels - 1) - 1
        return torch.full((len(z),), told, dtype=z.dtype, device=z.device)
