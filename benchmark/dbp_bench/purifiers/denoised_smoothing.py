"""Randomised smoothing by denoisers: purifiers whose forward noise is that of a certificate.

Each adds Gaussian noise to the image, in its pixels, not clipped, before it does anything else, and
reads nothing of the image but the noisy one. So the defense, all of its draws taken together, is a
random function of ``image + noise``, and Cohen et al.'s theorem (2019) holds for the class that
most of its draws name: a *vote of a certificate is one draw of the whole defense*. A certificate
needs no noise of its own. It takes draws that differ, each with forward noise and reverse noise of
its own, and sets the option `sigma`. The same defense, as it is, stands on attack tracks.

`sigma` is in [0, 1] pixels; diffusion space is twice as wide. The noise is at site `forward`, step
0: ``image + s * noise.normal(FORWARD, 0, image)``, and `smoothing_sigma` says s. It is `sigma`, but
for DDS, which takes the least noise level of the network that has as much: s is at least `sigma`,
and a certificate for `sigma` holds. That a purifier keeps the rule can be seen from outside: moving
an image by d and its forward noise by ``-d / s`` changes nothing.

They are in two parts (:class:`dbp_bench.defense.InTwoParts`): all votes of a draw share the noisy
image, and each goes on with noise of its own. So DensePure's K reverse runs of one noisy image are
the entry's `votes: K`, and DiffSmooth's m local draws behind one denoising are its `votes: m`,
whose probabilities `decision: mean` averages.
"""

from dataclasses import dataclass
from functools import cache
from math import log, sqrt
from typing import ClassVar

import torch
from torch import Tensor

from dbp_bench import memory
from dbp_bench.defense import Denoiser, NoiseOption
from dbp_bench.errors import BadEntry
from dbp_bench.noise import FORWARD, REVERSE, Noise, Site
from dbp_bench.purifiers.ddpm import Posterior, Variance
from dbp_bench.purifiers.schedule import (
    SCHEDULES,
    Cosine,
    ScheduleName,
    predict,
    to_diffusion,
    to_images,
)

LOCAL = Site("local")
"""The noise that DiffSmooth adds to a denoised image."""

BETA_MAX = 0.999
"""The largest beta of a strided chain."""


def smoothed(images: Tensor, sigma: float, noise: Noise) -> Tensor:
    """The noisy images ``(b, c, h, w)`` for `images` in [0, 1]; they leave [0, 1]."""
    return images + sigma * noise.normal(FORWARD, 0, images)


def positive(name: str, value: float) -> None:
    """Refuse a `value` of an option that isn't a finite number above 0."""
    if not 0 < value < float("inf"):
        raise BadEntry(f"{name}: {value} is not a number above 0.")


# --------------------------------------------------------------------- noise levels of a network


def least_step(schedule: ScheduleName, sigma: float, first: int = 0) -> int:
    """The first 0-based step, from `first`, whose noise is at least `sigma`, in [0, 1] pixels.

    Carlini et al. 2022, section 3.2: ``sqrt((1 - a) / a) >= 2 sigma``.

    Raises:
        BadEntry: `sigma` isn't above 0, or no step of the schedule has as much noise.
    """
    positive("sigma", sigma)
    signal = SCHEDULES[schedule].signal()
    for step in range(first, len(signal) - 1):
        if noise_of(signal[step + 1]) >= sigma:
            return step
    raise _beyond(schedule, sigma)


def matching_time(schedule: ScheduleName, sigma: float) -> float:
    """The network's time t whose noise is `sigma`, in [0, 1] pixels (Xiao et al. 2023).

    On the cosine schedule it is exact, and no integer:
    ``t = T (1 - 2 (1 + s) / pi * asin(sin(pi / (2 (1 + s))) / sqrt(1 + 4 sigma^2)))``, for which
    ``a(t) / a(0) = 1 / (1 + 4 sigma^2)``. On the linear one it is the nearest 0-based step.

    Raises:
        BadEntry: `sigma` isn't above 0, or no step of the schedule has as much noise.
    """
    positive("sigma", sigma)
    chain = SCHEDULES[schedule]
    signal = chain.signal()
    if noise_of(signal[-1]) < sigma:
        raise _beyond(schedule, sigma)
    if isinstance(chain, Cosine):
        return chain.level_of(1 / (1 + 4 * sigma**2))
    steps = range(len(signal) - 1)
    return float(min(steps, key=lambda step: abs(noise_of(signal[step + 1]) - sigma)))


def noise_of(signal: float) -> float:
    """The noise over the image at a level of so much `signal`, in [0, 1] pixels."""
    return sqrt((1 - signal) / signal) / 2


def _beyond(schedule: ScheduleName, sigma: float) -> BadEntry:
    most = noise_of(SCHEDULES[schedule].signal()[-1])
    return BadEntry(f"sigma: {sigma} is beyond the schedule {schedule}, which ends at {most:.4g}.")


def estimated(
    denoiser: Denoiser, z: Tensor, step: int, signal: float
) -> tuple[Tensor, Tensor | None]:
    """The clipped image that the predicted noise stands for in `z`, and the share of variance.

    Args:
        denoiser: The network, asked at the 0-based `step`.
        z: ``(b, c, h, w)`` in diffusion space.
        step: The step that the network is told.
        signal: The signal of z.

    Returns:
        Images ``(b, c, h, w)`` in [-1, 1] (Ho et al. 2020, equation 15); and where between its
        bounds the log-variance is (:attr:`Prediction.share`).
    """
    t = torch.full((len(z),), float(step), dtype=z.dtype, device=z.device)
    said = predict(denoiser, z, t)
    x0 = (z - (1 - signal) ** 0.5 * said.noise) / signal**0.5
    return x0.clamp(-1, 1), said.share


# ------------------------------------------------------------------------------------- purifiers


@dataclass(frozen=True)
class Smoothing:
    """Noise and no denoiser, for a classifier of noisy images (Cohen et al. 2019)."""

    sigma: float

    sites: ClassVar[frozenset[Site]] = frozenset({FORWARD})
    noise_option: ClassVar[NoiseOption] = ("sigma", 1.0)
    clamp_output: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse a `sigma` that is out of range."""
        positive("sigma", self.sigma)

    @property
    def smoothing_sigma(self) -> float:
        """Standard deviation of the noise that is added, in [0, 1] pixels."""
        return self.sigma

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        """Noisy images ``(b, c, h, w)`` for `images` in [0, 1]; they leave [0, 1]."""
        return smoothed(images, self.sigma, noise)


@dataclass(frozen=True)
class DDS:
    """Diffusion denoised smoothing: one denoising step (Carlini et al. 2022, algorithm 1).

    The noise is that of the network's first step that has at least as much as `sigma`.
    """

    denoiser: Denoiser
    sigma: float
    schedule: ScheduleName

    sites: ClassVar[frozenset[Site]] = frozenset({FORWARD})
    noise_option: ClassVar[NoiseOption] = ("sigma", 1.0)

    def __post_init__(self) -> None:
        """Refuse a `sigma` that is out of range."""
        least_step(self.schedule, self.sigma, first=1)

    @property
    def smoothing_sigma(self) -> float:
        """Standard deviation of the noise that is added, in [0, 1] pixels; at least `sigma`."""
        return noise_of(self._level()[1])

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        """Denoised images ``(b, c, h, w)`` in [0, 1] for `images` in [0, 1]."""
        step, signal = self._level()
        noisy = smoothed(images, self.smoothing_sigma, noise)
        return one_shot(self.denoiser, noisy, step, signal)

    def _level(self) -> tuple[int, float]:
        """The network's 0-based step, and its signal."""
        step = least_step(self.schedule, self.sigma, first=1)
        return step, SCHEDULES[self.schedule].signal()[step + 1]


def one_shot(denoiser: Denoiser, noisy: Tensor, step: int, signal: float) -> Tensor:
    """The denoised images ``(b, c, h, w)`` in [0, 1] for `noisy` ones, which leave [0, 1]."""

    def reverse(_i: int, _t: int, _s: int, z: Tensor) -> Tensor:
        return estimated(denoiser, z, step, signal)[0]

    # Scaled as the signal is, noise and all.
    z = signal**0.5 * to_diffusion(noisy)
    return to_images(memory.descend(reverse, z, [(step + 1, 0)]), clamp=False)


@dataclass(frozen=True)
class DiffSmooth:
    """One denoising step, then local smoothing (Zhang et al. 2023, section 4).

    Each vote classifies the denoised image under local noise of its own; the entry averages the
    probabilities of m votes (`votes: m` and `decision: mean`).
    """

    denoiser: Denoiser
    sigma: float
    schedule: ScheduleName
    local_sigma: float
    """Standard deviation of the local noise, in [0, 1] pixels."""

    sites: ClassVar[frozenset[Site]] = frozenset({FORWARD, LOCAL})
    noise_option: ClassVar[NoiseOption] = ("sigma", 1.0)
    clamp_output: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse options that are out of range."""
        least_step(self.schedule, self.sigma)
        positive("local_sigma", self.local_sigma)

    @property
    def smoothing_sigma(self) -> float:
        """Standard deviation of the noise that is added first, in [0, 1] pixels."""
        return self.sigma

    def shared(self, images: Tensor, noise: Noise) -> Tensor:
        """Denoised images ``(b, c, h, w)`` in [0, 1] for `images` in [0, 1]."""
        step = least_step(self.schedule, self.sigma)
        signal = SCHEDULES[self.schedule].signal()[step + 1]
        return one_shot(self.denoiser, smoothed(images, self.sigma, noise), step, signal)

    def single(self, state: Tensor, noise: Noise) -> Tensor:
        """The denoised images `state` ``(b, c, h, w)`` under local noise; they leave [0, 1]."""
        return state + self.local_sigma * noise.normal(LOCAL, 0, state)

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        """Denoised and noisy images ``(b, c, h, w)`` for `images` in [0, 1]."""
        return self.single(self.shared(images, noise), noise)


@dataclass(frozen=True, slots=True)
class Link:
    """One step of a strided chain, towards the image."""

    step: int
    """The 0-based step that the network is told."""
    signal: float
    """The signal of the state that the step starts from."""
    law: Posterior


@cache
def chain(schedule: ScheduleName, grid: tuple[int, ...], variance: Variance) -> tuple[Link, ...]:
    """The links of the chain over the network's steps in `grid`, upwards from step 0.

    Its betas are ``1 - A(g_j) / A(g_j-1)``, at most 0.999, and its signal is their product, so that
    step 0 counts as the image itself. A is the schedule's: the continuous one where it is the
    cosine (Xiao et al. 2023, code).

    Args:
        schedule: The schedule that the network was trained on.
        grid: 0-based steps, downwards, all above 0.
        variance: That of the noise that is added; none in the step to the image.
    """
    known = SCHEDULES[schedule]
    signal = known.signal()

    def at(step: int) -> float:
        return known.continuous(step) if isinstance(known, Cosine) else signal[step + 1]

    links: list[Link] = []
    above, before = 1.0, 0
    for step in reversed(grid):
        beta = min(1 - at(step) / at(before), BETA_MAX)
        below, above, before = above, above * (1 - beta), step
        small = beta * (1 - below) / (1 - above)
        last = not links
        spread = small if variance == "small" else beta
        # Ho et al. 2020, equation 7, on this chain.
        law = Posterior(
            x0_weight=below**0.5 * beta / (1 - above),
            z_weight=(1 - beta) ** 0.5 * (1 - below) / (1 - above),
            sigma=0.0 if last else spread**0.5,
            bounds=(log(small), log(beta)) if variance == "learned" and not last else None,
        )
        links.append(Link(step, above, law))
    return tuple(links)


@dataclass(frozen=True)
class DensePure:
    """The reverse chain in a few strides, from just the noise level of `sigma` (Xiao et al. 2023).

    Its betas are computed anew on the strided grid. The entry's `votes: K` are K reverse runs of
    one noisy image.
    """

    denoiser: Denoiser
    sigma: float
    schedule: ScheduleName
    steps: int
    variance: Variance

    sites: ClassVar[frozenset[Site]] = frozenset({FORWARD, REVERSE})
    noise_option: ClassVar[NoiseOption] = ("sigma", 1.0)

    def __post_init__(self) -> None:
        """Refuse options that are out of range."""
        self.grid()

    @property
    def smoothing_sigma(self) -> float:
        """Standard deviation of the noise that is added, in [0, 1] pixels."""
        return self.sigma

    def grid(self) -> list[int]:
        """The steps that the network is asked at, downwards: ``round(t - i t / steps)``.

        Halves are rounded to even.

        Raises:
            BadEntry: There is one step, which draws no noise, or there are more than levels.
        """
        if self.steps < 2:
            raise BadEntry(
                f"steps: {self.steps} is not 2 or more; one step is diffusion denoised "
                "smoothing, `dds`."
            )
        t = matching_time(self.schedule, self.sigma)
        steps = [round(t - i * t / self.steps) for i in range(self.steps)]
        if len({*steps, 0}) <= self.steps:
            raise BadEntry(
                f"steps: {self.steps} are more than the {round(t)} levels below sigma = "
                f"{self.sigma}."
            )
        return steps

    def shared(self, images: Tensor, noise: Noise) -> Tensor:
        """Noisy images ``(b, c, h, w)`` for `images` in [0, 1]; they leave [0, 1]."""
        return smoothed(images, self.sigma, noise)

    def single(self, state: Tensor, noise: Noise) -> Tensor:
        """Denoised images ``(b, c, h, w)`` in [0, 1] for noisy ones."""
        links = chain(self.schedule, tuple(self.grid()), self.variance)

        def reverse(i: int, number: int, below: int, z: Tensor) -> Tensor:
            link = links[number - 1]
            # The image that the predicted noise stands for, clipped.
            x0, share = estimated(self.denoiser, z, link.step, link.signal)
            mean = link.law.mean(x0, z)
            if below == 0:
                return mean
            return mean + link.law.deviation(share) * noise.normal(REVERSE, i, z)

        z = (1 + 4 * self.sigma**2) ** -0.5 * to_diffusion(state)
        grid = [(number, number - 1) for number in range(self.steps, 0, -1)]
        return to_images(memory.descend(reverse, z, grid), clamp=False)

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        """Denoised images ``(b, c, h, w)`` in [0, 1] for `images` in [0, 1]."""
        return self.single(self.shared(images, noise), noise)
