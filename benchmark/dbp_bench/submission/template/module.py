"""A purifier to start from: noise, then a Gaussian blur.

The entry names the class, and its fields are the options. `dbp-bench check` tests these rules:

- Images come in as (b, c, h, w) in [0, 1] and leave in the same shape and range.
- Every random number comes from noise.normal(site, step, like). Number the steps: asking twice for
  one (site, step) gives the same noise twice. `sites` names every site, here and in the entry.
- The gradient reaches the input: no detach, no no_grad, no rounding.
- No image sees another image of its batch.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from dbp_bench.noise import FORWARD, Noise, Site


@dataclass(frozen=True)
class Purifier:
    """Noise of standard deviation `level`, then a 3 x 3 Gaussian blur of width `blur` pixels."""

    level: float
    blur: float
    sites: ClassVar[frozenset[Site]] = frozenset({FORWARD})

    def __post_init__(self) -> None:
        """Refuse options that can't be right."""
        if self.level < 0 or self.blur <= 0:
            raise ValueError(f"level {self.level:g} must be 0 or more, blur {self.blur:g} above 0")

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        """Purified images (b, c, h, w) in [0, 1] for `images` (b, c, h, w) in [0, 1]."""
        noisy = images + self.level * noise.normal(FORWARD, 0, images)
        return self._blurred(noisy).clamp(0, 1)

    def _blurred(self, images: Tensor) -> Tensor:
        """Each channel convolved with a Gaussian that sums to 1; pixels repeat at the border."""
        at = torch.arange(-1, 2, dtype=images.dtype, device=images.device)
        line = (-0.5 * (at / self.blur) ** 2).exp()
        kernel = line[:, None] * line[None, :]
        channels = images.shape[1]
        weight = (kernel / kernel.sum()).expand(channels, 1, 3, 3)
        return conv2d(pad(images, (1, 1, 1, 1), mode="replicate"), weight, groups=channels)
