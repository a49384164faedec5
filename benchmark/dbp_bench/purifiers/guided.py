"""GDMP: guided diffusion purification (Wang et al. 2022), several iterations.

At each reverse step the mean moves by ``-Var_t * s_t * grad_z D(z, target)``, where the target is
the image being purified, noised to the same level with noise of its own, and
``s_t = scale * sqrt((1 - signal_t) / signal_t)``. The distance D is a mean over the pixels of one
image, so an image's purification doesn't depend on its batch (the published code averages over the
batch, which divides the guidance by the batch size). The guidance is a closed form in z and in the
target; both paths, z and target, are differentiated.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from dbp_bench import memory
from dbp_bench.defense import Denoiser
from dbp_bench.errors import BadEntry
from dbp_bench.noise import FORWARD, GUIDANCE, REVERSE, Noise, Site
from dbp_bench.purifiers.ddpm import Posterior, Variance, predict_x0
from dbp_bench.purifiers.schedule import Schedule, to_diffusion, to_images


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
    distance_gradient: Callable[[Tensor, Tensor], Tensor]
    t_star: int
    steps: int
    iterations: int
    scale: float
    noisy_target: bool
    variance: Variance
    clip_x0: bool
    clamp_output: bool
    schedule: Schedule = Schedule()

    @property
    def sites(self) -> frozenset[Site]:
        """Forward, reverse and, where the target is noised, guidance."""
        return frozenset({FORWARD, REVERSE} | ({GUIDANCE} if self.noisy_target else set()))

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        """Purified images ``(b, c, h, w)`` for `images` ``(b, c, h, w)`` in [0, 1]."""
        signal = self.schedule.signal()[self.t_star]
        source = to_diffusion(images)
        z = source
        for k in range(self.iterations):
            z = signal**0.5 * z + (1 - signal) ** 0.5 * noise.normal(FORWARD, k, z)
            for i, (t, s) in enumerate(self.schedule.grid(self.t_star, self.steps)):
                law = Posterior.between(self.schedule, t, s, self.variance)
                index = k * self.steps + i

                def reverse(
                    z: Tensor, source: Tensor, index: int = index, law: Posterior = law
                ) -> Tensor:
                    x0 = predict_x0(self.denoiser, z, law.t, law.signal, self.clip_x0)
                    mean: Tensor = law.x0_weight * x0 + law.z_weight * z
                    if not law.sigma:
                        return mean
                    level = ((1 - law.signal) / law.signal) ** 0.5
                    target = law.signal**0.5 * source
                    if self.noisy_target:
                        fresh = noise.normal(GUIDANCE, index, z)
                        target = target + (1 - law.signal) ** 0.5 * fresh
                    pull: float = law.sigma**2 * self.scale * level
                    mean = mean - pull * self.distance_gradient(z, target)
                    return mean + law.sigma * noise.normal(REVERSE, index, z)

                z = memory.step(reverse, z, source)
        return to_images(z, self.clamp_output)


def gdmp(
    denoiser: Denoiser,
    *,
    distance: Literal["mse", "ssim"],
    window: int,
    t_star: int,
    steps: int,
    iterations: int,
    scale: float,
    noisy_target: bool,
    variance: Variance,
    clip_x0: bool,
    clamp_output: bool,
) -> GDMP:
    """Build :class:`GDMP` from an entry's options; `window` counts for SSIM alone.

    Raises:
        BadEntry: An option is out of range.
    """
    Schedule().grid(t_star, steps)
    if window < 1 or window % 2 == 0:
        raise BadEntry(f"window: {window} is not odd and positive.")
    if iterations < 1:
        raise BadEntry(f"iterations: {iterations} is not positive.")
    distances: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "mse": mse_gradient,
        "ssim": partial(ssim_gradient, window=window),
    }
    return GDMP(
        denoiser,
        distances[distance],
        t_star,
        steps,
        iterations,
        scale,
        noisy_target,
        variance,
        clip_x0,
        clamp_output,
    )
