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

from collections.abc import Callable, Sequence
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
from dbp_bench.purifiers.ddpm import Posterior, Variance, denoise
from dbp_bench.purifiers.schedule import Diffusion, Schedule, to_diffusion, to_images


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
    batch_mean: bool = False
    """Whether the distance is a mean over the images of the batch too: the guidance of each then
    depends on how many there are."""
    noise_ahead: bool = False
    """Whether the forward noise is one level above the first reverse step."""
    guide_last: bool = False
    """Whether the step to level 0 is guided too."""
    scale_target: bool = True
    """Whether a target without noise is scaled as the signal is."""
    respaced: int | None = None
    """Levels of the shorter chain that `t_star` and `steps` count in; null for all."""

    @property
    def sites(self) -> frozenset[Site]:
        """Forward, reverse and, where the target is noised, guidance."""
        return frozenset({FORWARD, REVERSE} | ({GUIDANCE} if self.noisy_target else set()))

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        """Purified images ``(b, c, h, w)`` for `images` ``(b, c, h, w)`` in [0, 1]."""
        source = to_diffusion(images)
        levels = self._levels()
        pairs = [(levels[t], levels[s]) for t, s in self.schedule.grid(self.t_star, self.steps)]
        z = source
        for k in range(self.iterations):
            forward = Diffusion(self.schedule.signal(), z, noise.normal(FORWARD, k, z))
            z = forward(levels[self.t_star + self.noise_ahead])
            for i, (t, s) in enumerate(pairs):
                law = Posterior.between(self.schedule, t, s, self.variance)
                guide = law
                if not s and self.guide_last:
                    guide = _guide_of_the_last(self.schedule, pairs[i - 1][0], t, self.variance)
                index = k * self.steps + i

                def reverse(
                    z: Tensor,
                    source: Tensor,
                    index: int = index,
                    law: Posterior = law,
                    guide: Posterior = guide,
                ) -> Tensor:
                    x0, _, share = denoise(self.denoiser, z, law.t, law.signal, self.clip_x0)
                    mean: Tensor = law.x0_weight * x0 + law.z_weight * z
                    if not guide.sigma:
                        return mean
                    level = ((1 - law.signal) / law.signal) ** 0.5
                    target = law.signal**0.5 * source if self.scale_target else source
                    if self.noisy_target:
                        fresh = noise.normal(GUIDANCE, index, z)
                        target = target + (1 - law.signal) ** 0.5 * fresh
                    pull = guide.deviation(share) ** 2 * self.scale * level
                    if self.batch_mean:
                        pull = pull / len(z)
                    mean = mean - pull * self.distance_gradient(z, target)
                    if not law.sigma:
                        return mean
                    return mean + law.deviation(share) * noise.normal(REVERSE, index, z)

                z = memory.step(reverse, z, source, level=s, forward=forward)
        return to_images(z, self.clamp_output)

    def _levels(self) -> Sequence[int]:
        """The level of each of the chain's own levels."""
        if self.respaced is None:
            return range(self.schedule.levels + 1)
        return self.schedule.respaced(self.respaced)


def _guide_of_the_last(schedule: Schedule, above: int, t: int, variance: Variance) -> Posterior:
    """Of the step from level `t` to 0, the variance that scales the guidance.

    The posterior's own is 0 there; in its place stands that of the step before (Nichol and Dhariwal
    2021, code), from level `above`: for `large`, and as the lower bound where it is learned.
    """
    law = Posterior.between(schedule, t, 0, variance)
    before = Posterior.between(schedule, above, t, "small").sigma
    beta = 1 - schedule.signal()[t]
    bounds = (2 * log(before), log(beta)) if variance == "learned" else None
    return replace(law, sigma=before, bounds=bounds)


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
    batch_mean: bool = False,
    noise_ahead: bool = False,
    guide_last: bool = False,
    scale_target: bool = True,
    respaced: int | None = None,
) -> GDMP:
    """Build :class:`GDMP` from an entry's options; `window` counts for SSIM alone.

    Raises:
        BadEntry: An option is out of range.
    """
    chain = Schedule()
    if respaced is not None:
        chain = Schedule(levels=len(chain.respaced(respaced)) - 1)
    chain.grid(t_star, steps)
    if noise_ahead and t_star == chain.levels:
        raise BadEntry(f"t_star: {t_star} has no level above it (noise_ahead).")
    if guide_last and (steps == 1 or variance == "small"):
        raise BadEntry(
            "guide_last: makes no difference with variance: small, whose last step has none, and "
            "needs two steps."
        )
    if noisy_target and not scale_target:
        raise BadEntry("scale_target: false goes with noisy_target: false.")
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
        batch_mean=batch_mean,
        noise_ahead=noise_ahead,
        guide_last=guide_last,
        scale_target=scale_target,
        respaced=respaced,
    )
