"""Toy networks, purifiers and noises whose answers are known."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import exp
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dbp_bench.checks.record import Approach
from dbp_bench.defense import Defense, Denoiser
from dbp_bench.evaluation import Attacked, Group, attack, predict
from dbp_bench.noise import ATTACKER, FORWARD, REVERSE, VICTIM, Noise, Site, Tape, seeded
from dbp_bench.purifiers.ddpm import DDIM, DDPM
from dbp_bench.purifiers.dpm_solver import DPMSolver
from dbp_bench.purifiers.guided import GDMP, mse_gradient, ssim_gradient
from dbp_bench.purifiers.vpsde import DiffPure
from dbp_bench.threat import AttackerView, Budget, Method
from dbp_bench.training.batches import Batch

NOTHING = frozenset[Site]()
BOTH = frozenset({FORWARD, REVERSE})
SUBSETS = [NOTHING, frozenset({FORWARD}), frozenset({REVERSE}), BOTH]


# --------------------------------------------------------------------------------------- data


def uniform(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform numbers in (0, 1), one image of `shape` ``(n, ...)`` a row."""
    tape = Tape.make(seed, "data", range(shape[0]))
    return tape.uniform(Site("value"), 0, torch.empty(shape, dtype=dtype))


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers of `shape` ``(n, ...)``."""
    tape = Tape.make(seed, "data", range(shape[0]))
    return tape.normal(Site("value"), 0, torch.empty(shape, dtype=dtype))


def group(n: int, size: int = 4, channels: int = 1) -> Group:
    """`n` uniform images with alternating labels and ids that are not their positions."""
    return Group(uniform(n, channels, size, size), torch.arange(n) % 2, range(10, 10 + n))


def batch(n: int = 6, iteration: int = 0) -> Batch:
    """`n` uniform images with alternating labels, as a recipe trains on them."""
    tape = Tape.make(0, "recipe", range(n), iteration)
    return Batch(uniform(n, 1, 4, 4), torch.arange(n) % 2, tape)


def images(n: int = 3, size: int = 4, channels: int = 1) -> Tensor:
    """`n` uniform images, in float64."""
    return uniform(n, channels, size, size, dtype=torch.float64)


def tape(n: int = 3, draw: int = 0) -> Tape:
    """A draw for each of `n` images."""
    return Tape.make(0, "test", range(n), draw)


def distinct(rows: Tensor) -> int:
    """How many rows differ from all before them."""
    return len({tuple(row) for row in rows.flatten(1).tolist()})


def is_right(defense: Defense, images: Tensor, of: Group, draw: int = 0) -> Tensor:
    """Which ``(b,)`` of the `images` the defense gets right at victim draw `draw` of seed 0."""
    return predict(defense, images, of.ids, seed=0, draw=draw) == of.labels


def view_of(of: Defense, n: int, knows: frozenset[Site] = BOTH) -> AttackerView:
    """The view that an attacker of `n` images has, at victim draw 0 of seed 0."""
    ids = range(n)
    return AttackerView(of, knows, Tape.make(0, VICTIM, ids), Tape.make(0, ATTACKER, ids), 4096)


def search(
    of: Defense, method: Method, group: Group, ball: Budget, knows: frozenset[Site] = BOTH
) -> Attacked:
    """The images that `method` finds in the `ball`, at victim draw 0 of seed 0."""
    return attack(of, method, group, ball, knows, seed=0, victim_draw=0, max_batch=4096)


def approach(batch_size: int, max_batch: int) -> Approach:
    """An attack with exact gradients, 2 EoT samples a step and every draw hidden."""
    entries = Path("track"), Path("defense")
    return Approach((*entries, "cpu"), frozenset(), "exact", "ce", 2, batch_size, max_batch, seed=0)


# ---------------------------------------------------------------------------------- schedules


def discrete_signal(level: float) -> float:
    """The product of (1 - beta) over the first `level` of 1000 linear betas, by NumPy."""
    products = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))
    return float(products[round(level) - 1]) if level else 1.0


def continuous_signal(level: float) -> float:
    """The same of the VP-SDE: exp(-integral of 0.1 + 19.9 t)."""
    t = level / 1000
    return exp(-0.5 * 19.9 * t * t - 0.1 * t)


# ----------------------------------------------------------------------------------- networks


class Linear(nn.Module):
    """Two logits that differ by the score ``weight . x + bias``."""

    def __init__(self, weight: Tensor, bias: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = bias

    def score(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight + self.bias

    def forward(self, images: Tensor) -> Tensor:
        score = self.score(images)
        return torch.stack([-score / 2, score / 2], 1)


class TwoSided(nn.Module):
    """Class 1 where ``|weight . (x - 0.5)| > bound``: which way to push depends on the noise."""

    def __init__(self, weight: Tensor, bound: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bound = bound

    def forward(self, images: Tensor) -> Tensor:
        u = (images - 0.5).flatten(1) @ self.weight
        return torch.stack([torch.zeros_like(u), u * u - self.bound**2], 1)


class Echo(nn.Module):
    """The pixels themselves as logits."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


class Small(nn.Module):
    """A classifier with weights and curvature: two classes, any image size."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        with seeded(1):
            self.conv = nn.Conv2d(channels, 4, 3, padding=1)
            self.out = nn.Linear(4, 2)

    def forward(self, images: Tensor) -> Tensor:
        h = F.silu(self.conv(4 * images - 2)).mean((2, 3))
        return 20 * self.out(h)  # type: ignore[no-any-return]


class SmallDenoiser(nn.Module):
    """A denoiser with weights and curvature; means nothing."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        with seeded(2):
            self.first = nn.Conv2d(channels + 1, 4, 3, padding=1)
            self.last = nn.Conv2d(4, channels, 3, padding=1)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        level = (t / 1000).view(-1, 1, 1, 1).expand(-1, 1, *z.shape[2:])
        return self.last(F.silu(self.first(torch.cat([z, level], 1))))  # type: ignore[no-any-return]


class Zero(nn.Module):
    """Predicts no noise, and remembers what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        self.seen.append((z.detach(), t))
        return torch.zeros_like(z) + 0 * z


class GaussianDenoiser(nn.Module):
    """The exact noise prediction for data ``N(mean, variance)``, each pixel on its own.

    z_t has mean sqrt(a) * mean and variance a * variance + 1 - a, so that
    ``E[noise | z_t] = sqrt(1 - a) (z_t - sqrt(a) mean) / (a * variance + 1 - a)``.
    """

    def __init__(
        self,
        mean: float = 0.2,
        variance: float = 0.25,
        signal: Callable[[float], float] = discrete_signal,
    ) -> None:
        super().__init__()
        self.mean, self.variance, self.signal = mean, variance, signal

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        a = self.signal(float(t[0]) + 1)
        spread = a * self.variance + 1 - a
        out: Tensor = (1 - a) ** 0.5 * (z - a**0.5 * self.mean) / spread
        return out

    def posterior(self, z: Tensor, level: int) -> tuple[Tensor, float]:
        """Mean and variance of the clean image, given `z` at `level`."""
        a = self.signal(level)
        spread = a * self.variance + 1 - a
        mean = self.mean + a**0.5 * self.variance / spread * (z - a**0.5 * self.mean)
        return mean, self.variance * (1 - a) / spread


class MixtureDenoiser(nn.Module):
    """The exact noise prediction for a mixture of Gaussians at `means` ``(k, c, h, w)``."""

    def __init__(self, means: Tensor, variance: float = 0.05) -> None:
        super().__init__()
        self.means = nn.Parameter(means)
        self.variance = variance

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        a = discrete_signal(float(t[0]) + 1)
        spread = a * self.variance + 1 - a
        away = z[:, None] - a**0.5 * self.means
        share = (-away.flatten(2).square().sum(2) / (2 * spread)).softmax(1)
        out: Tensor = (1 - a) ** 0.5 / spread * torch.einsum("bk,bkchw->bchw", share, away)
        return out


class Recorder(nn.Module):
    """A denoiser that keeps its inputs, with the step as a number."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.seen: list[tuple[Tensor, float]] = []

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (len(z),)
        assert bool((t == t[0]).all())
        self.seen.append((z.detach().clone(), float(t[0])))
        return self.denoiser(z, t)  # type: ignore[no-any-return]

    @property
    def levels(self) -> list[float]:
        """The 0-based step of every call."""
        return [t for _, t in self.seen]


# ---------------------------------------------------------------------------------- purifiers


@dataclass(frozen=True)
class Noisy:
    """``x + forward * n + reverse * m``, with one draw from each of two sites."""

    forward: float
    reverse: float
    sites: frozenset[Site] = BOTH

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        n, m = noise.normal(FORWARD, 0, images), noise.normal(REVERSE, 0, images)
        return images + self.forward * n + self.reverse * m


@dataclass(frozen=True)
class Made:
    """A purifier made of one function."""

    run: Callable[[Tensor, Noise], Tensor]
    sites: frozenset[Site] = frozenset({FORWARD})

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        return self.run(images, noise)


@dataclass(frozen=True)
class GuidedBy(GDMP):
    """GDMP whose guidance is another function of state and target."""

    distance_gradient: Callable[[Tensor, Tensor], Tensor] = mse_gradient  # type: ignore[assignment]


class Small4(NamedTuple):
    """The options that all samplers share, small."""

    t_star: int = 60
    steps: int = 4


def sampler(
    name: str, denoiser: Denoiser, **changes: Any
) -> DDPM | DDIM | DPMSolver | DiffPure | GDMP:
    """The sampler called `name`, at small size, with some options changed."""
    kinds: Mapping[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "ddpm": (DDPM, {"variance": "large", "clip_x0": True}),
        "ddim": (DDIM, {"clip_x0": True}),
        "dpm-solver": (DPMSolver, {"clip_x0": True}),
        "diffpure": (DiffPure, {}),
        "gdmp": (
            GDMP,
            {
                "distance": "mse",
                "iterations": 2,
                "scale": 200.0,
                "noisy_target": True,
                "variance": "large",
                "clip_x0": True,
            },
        ),
    }
    make, options = kinds[name]
    if "distance_gradient" in changes:
        make = GuidedBy
    options = {**Small4()._asdict(), **options, "clamp_output": True, **changes}
    return make(denoiser, **options)  # type: ignore[no-any-return]


SAMPLERS = ["ddpm", "ddim", "dpm-solver", "diffpure", "gdmp"]


def ssim(z: Tensor, target: Tensor) -> Tensor:
    """The guidance towards SSIM, at a window that fits a toy."""
    return ssim_gradient(z, target, window=3)


# -------------------------------------------------------------------------------------- noises


class Silent:
    """Noise that is zero."""

    def normal(self, site: Site, step: int, like: Tensor) -> Tensor:
        return torch.zeros_like(like)


@dataclass(frozen=True)
class Impulse:
    """Zero, but for a one in row i at step i of `site`: the response of a linear purifier."""

    site: Site

    def normal(self, site: Site, step: int, like: Tensor) -> Tensor:
        out = torch.zeros_like(like)
        if site == self.site:
            out[step] = 1
        return out


@dataclass
class LoggedNoise:
    """The draws of a tape, and a list of what was asked for and given."""

    tape: Tape
    log: list[tuple[Site, int, Tensor]] = field(default_factory=list)

    def normal(self, site: Site, step: int, like: Tensor) -> Tensor:
        out = self.tape.normal(site, step, like)
        self.log.append((site, step, out))
        return out
