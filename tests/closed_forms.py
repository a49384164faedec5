"""Data whose denoiser is known exactly, and where the samplers' limits take it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dbp_bench.defense import Purifier
from dbp_bench.noise import Site

F64 = torch.float64


@dataclass(frozen=True)
class Mixture:
    """Gaussians of one `variance` around `means` ``(k, c, h, w)``, with equal weights."""

    means: Tensor
    variance: float

    def expected(self, z: Tensor, signal: float, spread: float) -> Tensor:
        """E[x | z] for z = sqrt(signal) x + sqrt(spread) noise, both ``(b, c, h, w)``."""
        total = signal * self.variance + spread
        away = z[:, None] - signal**0.5 * self.means
        share = (-away.flatten(2).square().sum(2) / (2 * total)).softmax(1)
        each = self.means + signal**0.5 * self.variance / total * away
        return torch.einsum("bk,bkchw->bchw", share, each)


def gaussian(mean: float, variance: float) -> Mixture:
    """One Gaussian, every pixel of every image with one mean."""
    return Mixture(torch.full((1, 1, 1, 1), mean, dtype=F64), variance)


class NoiseNet(nn.Module):
    """The exact noise prediction at a 0-based step, given the signal at each level."""

    def __init__(self, data: Mixture, signal: Callable[[float], float]) -> None:
        super().__init__()
        self.data, self.signal = data, signal
        self.seen: list[float] = []

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (len(z),)
        self.seen.append(float(t[0]))
        a = self.signal(float(t[0]) + 1)
        out: Tensor = (z - a**0.5 * self.data.expected(z, a, 1 - a)) / (1 - a) ** 0.5
        return out


class ImageNet(nn.Module):
    """The exact denoiser D(z; sigma)."""

    def __init__(self, data: Mixture) -> None:
        super().__init__()
        self.data = data
        self.seen: list[float] = []

    def forward(self, z: Tensor, sigma: Tensor) -> Tensor:
        assert sigma.shape == (len(z),)
        self.seen.append(float(sigma[0]))
        return self.data.expected(z, 1.0, float(sigma[0]) ** 2)


@dataclass
class Impulses:
    """Zero noise, but for a one in row i of the i-th draw, from row 1."""

    rows: dict[tuple[Site, int], int] = field(default_factory=dict)

    def normal(self, site: Site, step: int, like: Tensor) -> Tensor:
        row = self.rows.setdefault((site, step), len(self.rows) + 1)
        out = torch.zeros_like(like)
        out[row:][:1] = 1
        return out


def moments(purifier: Purifier, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance, over all draws, of what is made of `x` ``(1, c, h, w)``, in [-1, 1] space.

    Exact for a purifier that is affine in its noise, each pixel on its own.
    """
    heard = Impulses()
    purifier(x, heard)
    out = 2 * purifier(x.expand(len(heard.rows) + 1, -1, -1, -1), Impulses()) - 1
    return out[0], (out[1:] - out[0]).square().sum(0)


State = tuple[Tensor, ...]


def runge_kutta(
    slope: Callable[[float, State], State], state: State, start: float, end: float, steps: int
) -> State:
    """Where an ODE takes `state` from `start` to `end`: the classical method, of order 4."""
    h = (end - start) / steps

    def moved(by: float, slopes: State) -> State:
        return tuple(y + by * s for y, s in zip(state, slopes, strict=True))

    for i in range(steps):
        t = start + i * h
        one = slope(t, state)
        two = slope(t + h / 2, moved(h / 2, one))
        three = slope(t + h / 2, moved(h / 2, two))
        four = slope(t + h, moved(h, three))
        state = tuple(
            y + h / 6 * (a + 2 * b + 2 * c + d)
            for y, a, b, c, d in zip(state, one, two, three, four, strict=True)
        )
    return state


def orders(error: Callable[[int], float], steps: Sequence[int]) -> list[float]:
    """By how much the error shrinks from each of `steps` to the next; `steps` doubles."""
    errors = [error(count) for count in steps]
    return [errors[i] / errors[i + 1] for i in range(len(errors) - 1)]
