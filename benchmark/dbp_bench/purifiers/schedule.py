"""Noise levels of a variance-preserving diffusion, addressed by integers.

A level t counts noising steps: t = 0 is the clean image, t = T pure noise. Networks are trained on
0-based steps, so the network that denoises level t is called at step t - 1. The signal at level t,
`a_t` in the samplers, is what Ho et al. (2020) write as alpha-bar and Song et al. (2021) as alpha:
``z_t = sqrt(a_t) x0 + sqrt(1 - a_t) noise``.
"""

import itertools
from dataclasses import dataclass
from functools import cache
from math import asin, cos, pi
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dbp_bench.defense import Denoiser
from dbp_bench.errors import BadEntry

MOST = 10_000
"""More steps, or runs in a row, than any sampler takes: their number is a slip."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Linear betas (Ho et al. 2020): ``linspace(beta_first, beta_last, levels)``."""

    levels: int = 1000
    beta_first: float = 1e-4
    beta_last: float = 2e-2

    def signal(self) -> tuple[float, ...]:
        """The products of (1 - beta) for levels 0 ... T; the first is 1."""
        return _signal(self)

    def grid(self, t_star: int, steps: int, *, published: bool = False) -> list[tuple[int, int]]:
        """`steps` pairs (from, to) of integer levels from `t_star` down to 0, evenly spaced.

        The `published` grid, of the scripts published with ADDT, is one level higher and one step
        longer. They take t* for a 0-based step, so they noise to level ``t_star + 1`` and call the
        network at steps ``t_star, t_star - stride, ..., stride, 0``: ``steps + 1`` times.

        Raises:
            BadEntry: `t_star` is not a level above 0, or `steps` is not in 1 ... `t_star`; or, of
                the published grid, `steps` does not divide `t_star`, or no level is above it.
        """
        if not 1 <= t_star <= self.levels:
            raise BadEntry(f"t_star: {t_star} is not in 1 ... {self.levels} (the model's levels).")
        if not 1 <= steps <= t_star:
            raise BadEntry(f"steps: {steps} is not in 1 ... t_star = {t_star}.")
        levels = [(t_star * (steps - i) + steps // 2) // steps for i in range(steps + 1)]
        if published:
            if t_star % steps:
                raise BadEntry(f"steps: {steps} does not divide t_star = {t_star}.")
            if t_star == self.levels:
                raise BadEntry(f"t_star: {t_star} has no level above it (published_grid).")
            levels = [*(level + 1 for level in levels), 0]
        return list(itertools.pairwise(levels))

    def respaced(self, count: int) -> tuple[int, ...]:
        """Levels 0 ... `count` of a chain of fewer levels, as levels of this one.

        The `count` steps are evenly spaced over all 0-based steps, both ends included, and rounded
        (Nichol and Dhariwal 2021, section 4).

        Raises:
            BadEntry: `count` is not in 2 ... the number of levels.
        """
        if not 2 <= count <= self.levels:
            raise BadEntry(f"respaced: {count} is not in 2 ... {self.levels} (the model's levels).")
        stride = (self.levels - 1) / (count - 1)
        return (0, *(round(i * stride) + 1 for i in range(count)))


@cache
def _signal(schedule: Schedule) -> tuple[float, ...]:
    first, last = schedule.beta_first, schedule.beta_last
    betas = torch.linspace(first, last, schedule.levels, dtype=torch.float64)
    return (1.0, *torch.cumprod(1 - betas, 0).tolist())


LINEAR = Schedule()
"""The schedule of every purifier here that has no option for another."""


@dataclass(frozen=True, slots=True)
class Cosine:
    """The cosine schedule (Nichol and Dhariwal 2021, equation 17), with betas of at most 0.999."""

    levels: int = 4000
    offset: float = 0.008

    def continuous(self, level: float) -> float:
        """The signal at a `level` from 0, where it is 1, to T, where it is 0; betas unclipped."""
        return self._unscaled(level) / self._unscaled(0)

    def level_of(self, signal: float) -> float:
        """The level, no integer, at which the continuous signal is this one, in 0 ... 1."""
        angle = asin((signal * self._unscaled(0)) ** 0.5)
        return self.levels * (1 - 2 * (1 + self.offset) / pi * angle)

    def signal(self) -> tuple[float, ...]:
        """The products of (1 - beta) for levels 0 ... T; the first is 1."""
        return _cosine_signal(self)

    def _unscaled(self, level: float) -> float:
        return cos((level / self.levels + self.offset) / (1 + self.offset) * pi / 2) ** 2


@cache
def _cosine_signal(schedule: Cosine) -> tuple[float, ...]:
    exact = [schedule.continuous(level) for level in range(schedule.levels + 1)]
    kept = (max(low / high, 1 - 0.999) for high, low in itertools.pairwise(exact))
    return tuple(itertools.accumulate(kept, lambda product, one: product * one, initial=1.0))


COSINE = Cosine()
"""The schedule of improved DDPM's network for CIFAR-10."""

ScheduleName = Literal["linear-1000", "cosine-4000"]

SCHEDULES: dict[ScheduleName, Schedule | Cosine] = {"linear-1000": LINEAR, "cosine-4000": COSINE}
"""The schedules that denoising networks are trained on, by name."""


@dataclass(frozen=True, slots=True)
class Diffusion:
    """The forward process of `source` at every level, all with one draw of noise.

    ``z_t = sqrt(signal_t) source + sqrt(1 - signal_t) fresh`` (Ho et al. 2020, equation 4). Each
    level has its law; the noise that all levels share makes their joint law another than the
    Markov chain's.
    """

    signal: tuple[float, ...]
    source: Tensor
    """``(b, c, h, w)`` in diffusion space."""
    fresh: Tensor
    """Standard normal noise like `source`."""

    def __call__(self, level: int) -> Tensor:
        """The state ``(b, c, h, w)`` at `level`."""
        signal = self.signal[level]
        state: Tensor = signal**0.5 * self.source + (1 - signal) ** 0.5 * self.fresh
        return state


def times(level: int, like: Tensor) -> Tensor:
    """The network's 0-based step ``(b,)`` at `level`."""
    return torch.full((len(like),), float(level - 1), dtype=like.dtype, device=like.device)


class Prediction(NamedTuple):
    """The noise that a network predicts in a noisy image, and its learned variance."""

    noise: Tensor
    """``(b, c, h, w)``."""
    share: Tensor | None
    """``(b, c, h, w)``: where between its bounds the step's log-variance is, from -1 to 1 (Nichol
    and Dhariwal 2021, equation 15); None where the network doesn't say."""


def predict(denoiser: Denoiser, z: Tensor, t: Tensor) -> Prediction:
    """The prediction of `denoiser` for `z` ``(b, c, h, w)`` at 0-based steps `t` ``(b,)``.

    Raises:
        BadEntry: It gives neither as many channels as it is given, nor twice as many.
    """
    out = denoiser(z, t)
    channels = z.shape[1]
    if out.shape[1] == channels:
        return Prediction(out, None)
    if out.shape[1] == 2 * channels:
        return Prediction(out[:, :channels], out[:, channels:])
    raise BadEntry(
        f"the denoiser gives {out.shape[1]} channels for {channels}: it must give the noise, or "
        "the noise and as many channels of variance."
    )


def denoise(denoiser: Denoiser, z: Tensor, t: int, *, clip: bool) -> tuple[Tensor, Prediction]:
    """The image estimated from `z` at level `t` by the predicted noise, and the prediction.

    It is ``(b, c, h, w)`` in [-1, 1] (Ho et al. 2020, equation 15); with `clip` it is clipped.
    """
    a_t = LINEAR.signal()[t]
    said = predict(denoiser, z, times(t, z))
    x0: Tensor = (z - (1 - a_t) ** 0.5 * said.noise) / a_t**0.5
    return x0.clamp(-1, 1) if clip else x0, said


def refuse_count(name: str, count: int) -> None:
    """Refuse an option `name` that counts steps, if no sampler takes so many.

    Raises:
        BadEntry: It is not in 1 ... 10,000.
    """
    if not 1 <= count <= MOST:
        raise BadEntry(f"{name}: {count} is not in 1 ... {MOST:,}.")


def to_diffusion(images: Tensor) -> Tensor:
    """The `images` in [0, 1] mapped to diffusion space [-1, 1]."""
    return 2 * images - 1


def to_images(z: Tensor, clamp: bool) -> Tensor:
    """The images of `z` in diffusion space, with [0, 1] for [-1, 1].

    With `clamp`, values outside [0, 1] are clamped, and their gradient is zero.
    """
    images = (z + 1) / 2
    return images.clamp(0, 1) if clamp else images
