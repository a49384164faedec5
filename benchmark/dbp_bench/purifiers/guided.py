"""GDMP: guided diffusion purification (Wang et al. 2022), several iterations.

At each reverse step the mean moves by ``-Var_t * s_t * grad_z D(z, target)``, where the target is
the image being purified, noised to the same level with noise of its own, and
``s_t = scale * sqrt((1 - signal_t) / signal_t)``. The distance D is a mean over the pixels of one
image, so an image's purification doesn't depend on its batch. The guidance is a closed form in z
and in the target; both paths, z and target, are differentiated.

The published code differs, and each difference is an option: it averages the distance over the
batch too, so that the guidance is divided by the batch size (`batch_mean`, which no rule of this
benchmark allows: an image's outcome depends on its batch); on CIFAR-10 its forward noise is one
level above the first reverse step (`noise_ahead`); its last step is guided too (`guide_last`); on
ImageNet its chain is respaced (`respaced`), its variance learned, and its target the input as it
is, neither noised nor scaled (`scale_target: false`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import log
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from dbp_bench import memory
from dbp_bench.defense import Denoiser
from dbp_bench.errors import BadEntry
from dbp_bench.noise import FORWARD, GUIDANCE, REVERSE, Noise, Site
from dbp_bench.purifiers.ddpm import Posterior, Variance
from dbp_bench.purifiers.schedule import (
    LINEAR,
    Diffusion,
    Schedule,
    denoise,
    refuse_count,
    to_diffusion,
    to_images,
)


def published_scale(guide_scale: float, ptb: float) -> float:
    """The `scale` that published settings write as `guide_scale` and `ptb` (in 0 ... 255 units).

    Their ``s_t`` is ``sqrt((1 - signal_t) / signal_t)`` over ``m = (2 ptb / 255) / (3
    guide_scale)``; of a batch of b, their guidance is that of this scale over b.
    """
    return 3 * guide_scale * 255 / (2 * ptb)


def mse_gradient(z: Tensor, target: Tensor) -> Tensor:
    """Gradient in `z` of the mean squared error of each image; all ``(b, c, h, w)``."""
    return 2 * (z - target) / z[0].numel()


def ssim_gradient(z: Tensor, target: Tensor, window: int) -> Tensor:
    """Gradient in `z` of minus the mean SSIM of each image (Wang et al. 2004, equation 13).

    SSIM with a Gaussian window (standard deviation 1.5, C1 = 0.01^2, C2 = 0.03^2), zero-padded as
    in the published code. Written out instead of left to autograd, so that the guidance is an
    ordinary differentiable function of `z` and `target`.
    """
    c1, c2 = 0.01**2, 0.03**2
    blur = partial(_gaussian_blur, window=window)
    mean_z, mean_t = blur(z), blur(target)
    var_z = blur(z * z) - mean_z * mean_z
    var_t = blur(target * target) - mean_t * mean_t
    cov = blur(z * target) - mean_z * mean_t
    a1, a2 = 2 * mean_z * mean_t + c1, 2 * cov + c2
    b1, b2 = mean_z * mean_z + mean_t * mean_t + c1, var_z + var_t + c2
    ssim = a1 * a2 / (b1 * b2)
    by_cov = 2 * a1 / (b1 * b2)
    by_var = -ssim / b2
    by_mean = 2 * mean_t * a2 / (b1 * b2) - 2 * mean_z * ssim / b1
    # Through var_z = blur(z^2) - mean_z^2 and cov = blur(z t) - mean_z mean_t; the blur is its own
    # adjoint because its window is symmetric and its padding zero.
    gradient = (
        blur(by_mean - 2 * mean_z * by_var - mean_t * by_cov)
        + 2 * z * blur(by_var)
        + target * blur(by_cov)
    )
    return -gradient / z[0].numel()


def _gaussian_blur(x: Tensor, window: int) -> Tensor:
    offsets = torch.arange(window, dtype=x.dtype, device=x.device) - (window - 1) / 2
    weights = torch.exp(-(offsets**2) / (2 * 1.5**2))
    weights = weights / weights.sum()
    channels = x.shape[1]
    kernel = (weights[:, None] * weights).expand(channels, 1, window, window)
    return F.conv2d(x, kernel, padding=window // 2, groups=channels)


@dataclass(frozen=True)
class GDMP:
    """`iterations` times: diffuse to level `t_star`, sample back under guidance to the input."""

    denoiser: Denoiser
    distance: Literal["mse", "ssim"]
    t_star: int
    steps: int
    iterations: int
    scale: float
    noisy_target: bool
    variance: Variance
    clip_x0: bool
    clamp_output: bool
    window: int | None = None
    """The side of SSIM's window in pixels; None for another distance."""
    batch_mean: bool = False
    """The distance is a mean over the images of the batch too: the guidance of each then depends on
    how many there are."""
    noise_ahead: bool = False
    """The forward noise is one level above the first reverse step."""
    guide_last: bool = False
    """The step to level 0 is guided too."""
    scale_target: bool = True
    """A target without noise is scaled as the signal is."""
    respaced: int | None = None
    """Levels of the shorter chain that `t_star` and `steps` count in; null for all."""

    def __post_init__(self) -> None:
        """Refuse options that are out of range, or make no difference."""
        chain = Schedule(levels=len(self._levels()) - 1)
        chain.grid(self.t_star, self.steps)
        if self.noise_ahead and self.t_star == chain.levels:
            raise BadEntry(f"t_star: {self.t_star} has no level above it (noise_ahead).")
        if self.guide_last and (self.steps == 1 or self.variance == "small"):
            raise BadEntry(
                "guide_last: makes no difference with variance: small, whose last step has none, "
                "and needs two steps."
            )
        if self.noisy_target and not self.scale_target:
            raise BadEntry("scale_target: false goes with noisy_target: false.")
        if (self.window is None) == (self.distance == "ssim"):
            raise BadEntry("window: goes with distance: ssim, and is left out elsewhere.")
        if self.window is not None and (self.window < 1 or self.window % 2 == 0):
            raise BadEntry(f"window: {self.window} is not odd and positive.")
        refuse_count("iterations", self.iterations)

    @property
    def sites(self) -> frozenset[Site]:
        """The sites forward, reverse and, where the target is noised, guidance."""
        return frozenset({FORWARD, REVERSE} | ({GUIDANCE} if self.noisy_target else set()))

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        """Purified images ``(b, c, h, w)`` for `images` ``(b, c, h, w)`` in [0, 1]."""
        a, levels, source = LINEAR.signal(), self._levels(), to_diffusion(images)
        grid = [(levels[t], levels[s]) for t, s in LINEAR.grid(self.t_star, self.steps)]

        def reverse(i: int, t: int, s: int, z: Tensor, source: Tensor) -> Tensor:
            # The mean of an unguided step, as in DDPM.
            x0, said = denoise(self.denoiser, z, t, clip=self.clip_x0)
            law = Posterior.between(t, s, self.variance)
            mean = law.mean(x0, z)
            if s == 0 and not self.guide_last:
                return mean
            # The target: the image that is purified, at the level of z.
            target = a[t] ** 0.5 * source if self.scale_target else source
            if self.noisy_target:
                target = target + (1 - a[t]) ** 0.5 * noise.normal(GUIDANCE, i, z)
            # The guidance: -Var_t * s_t * grad_z D(z, target).
            spread = law if s else self._last_spread(above=grid[-2][0], t=t)
            level = ((1 - a[t]) / a[t]) ** 0.5
            pull = spread.deviation(said.share) ** 2 * self.scale * level
            if self.batch_mean:
                pull = pull / len(z)
            guided: Tensor = mean - pull * self.distance_gradient(z, target)
            if s == 0:
                return guided
            return guided + law.deviation(said.share) * noise.normal(REVERSE, i, z)

        z = source
        for k in range(self.iterations):
            forward = Diffusion(a, z, noise.normal(FORWARD, k, z))
            start = forward(levels[self.t_star + self.noise_ahead])
            z = memory.descend(reverse, start, grid, source, forward=forward, first=k * self.steps)
        return to_images(z, self.clamp_output)

    def distance_gradient(self, z: Tensor, target: Tensor) -> Tensor:
        """Gradient in `z` of each image's distance to its target; all ``(b, c, h, w)``."""
        if self.window is None:
            return mse_gradient(z, target)
        return ssim_gradient(z, target, self.window)

    def _levels(self) -> Sequence[int]:
        """The levels of the schedule that the levels of the chain are."""
        if self.respaced is None:
            return range(LINEAR.levels + 1)
        return LINEAR.respaced(self.respaced)

    def _last_spread(self, above: int, t: int) -> Posterior:
        """The law whose variance scales the guidance in the step from level `t` to 0.

        The variance of that step is 0. In its place stands that of the step before, from level
        `above` (Nichol and Dhariwal 2021, code): for `large`, and as the lower bound where it is
        learned.
        """
        law = Posterior.between(t, 0, self.variance)
        before = Posterior.between(above, t, "small").sigma
        beta = 1 - LINEAR.signal()[t]
        bounds = (2 * log(before), log(beta)) if self.variance == "learned" else None
        return replace(law, sigma=before, bounds=bounds)
