"""The diffusions that are trained: their levels, and the predictions of networks there.

A network is told a level, and sees ``mean * z + std * noise`` for images z in [-1, 1].
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dbp_bench.noise import Site
from dbp_bench.purifiers.schedule import LINEAR
from dbp_bench.purifiers.vpsde import BETA_MAX, BETA_MIN
from dbp_bench.training.batches import Batch

_LEVEL = Site("level")
_SIGNALS = torch.tensor(LINEAR.signal())
_SIGMA_DATA = 0.5
"""The standard deviation of the images, as EDM takes it."""


class Level(NamedTuple):
    """One noise level for each image of a batch."""

    told: Tensor
    """``(b,)``: the level as the network is told it."""
    mean: Tensor
    """``(b, 1, 1, 1)``: the factor of the image."""
    std: Tensor
    """``(b, 1, 1, 1)``: the factor of the noise."""
    ratio: Tensor
    """``(b, 1, 1, 1)``: the image's factor over the noise's."""

    def diffuse(self, z: Tensor, noise: Tensor) -> Tensor:
        """The noisy images ``(b, c, h, w)``."""
        return self.mean * z + self.std * noise


class Prediction(NamedTuple):
    """A network's prediction of noisy images, both ways; ``(b, c, h, w)`` each."""

    x0: Tensor
    noise: Tensor


class _NoisePrediction:
    """Networks that predict the noise (Ho et al. 2020, equations 14 and 15)."""

    __slots__ = ()

    def predict(self, network: Callable[..., Tensor], z_t: Tensor, level: Level) -> Prediction:
        """The prediction of `network` for noisy images."""
        noise = network(z_t, level.told)
        return Prediction((z_t - level.std * noise) / level.mean, noise)

    def loss(self, said: Prediction, level: Level, z: Tensor, noise: Tensor) -> Tensor:  # noqa: ARG002
        """Mean squared error of the noise, where the images are `z`."""
        return F.mse_loss(said.noise, noise)


@dataclass(frozen=True, slots=True)
class DDPM(_NoisePrediction):
    """Integer steps, uniform in 0 ... levels - 1.

    Args:
        levels: Fewer than the schedule's for networks that see low levels alone.
    """

    levels: int = LINEAR.levels

    def draw(self, batch: Batch) -> Level:
        """A level for each image, from the batch's tape."""
        return self.at((batch.uniform(_LEVEL) * self.levels).floor())

    def at(self, t: Tensor) -> Level:
        """The level of 0-based steps `t` ``(b,)``; that of step -1 is the clean image's."""
        signal = _SIGNALS.to(t.device, t.dtype)[t.long() + 1].view(-1, 1, 1, 1)
        return Level(t, signal.sqrt(), (1 - signal).sqrt(), (signal / (1 - signal)).sqrt())

    def at_time(self, time: Tensor) -> Level:
        """The level of `time` ``(b,)`` in 0 ... 1000, rounded up to an integer; 1 at least."""
        return self.at(time.ceil().clamp(min=1) - 1)


@dataclass(frozen=True, slots=True)
class VPSDE(_NoisePrediction):
    """Continuous times, uniform in 0.001 ... 1 (Song et al. 2021, appendix C).

    The network is told ``1000 t - 1``, the 0-based step whose level is t, of which
    :class:`~dbp_bench.networks.songunet.DDPMpp` makes the label 999 t.
    """

    def draw(self, batch: Batch) -> Level:
        """A level for each image, from the batch's tape."""
        return self.at(1e-3 + (1.0 - 1e-3) * batch.uniform(_LEVEL))

    def at(self, t: Tensor) -> Level:
        """The level of times `t` ``(b,)``."""
        exponent = (-0.5 * (BETA_MAX - BETA_MIN) * t * t - BETA_MIN * t).view(-1, 1, 1, 1)
        mean, std = (exponent / 2).exp(), (-exponent.expm1()).sqrt()
        return Level(1000 * t - 1, mean, std, mean / std)

    def at_time(self, time: Tensor) -> Level:
        """The level at `time` ``(b,)`` in 0 ... 1000; 0.01 at least (in ADBM's code, 1e-5 of 1)."""
        return self.at((time / 1000).clamp(min=1e-5))


@dataclass(frozen=True, slots=True)
class EDM:
    """Log-normal noise levels; networks predict the image (Karras et al. 2022, table 1)."""

    def draw(self, batch: Batch) -> Level:
        """A level for each image, from the batch's tape."""
        return self.at((-1.2 + 1.2 * batch.normal(_LEVEL)).exp())

    def at(self, sigma: Tensor) -> Level:
        """The level of noise levels `sigma` ``(b,)``."""
        std = sigma.view(-1, 1, 1, 1)
        return Level(sigma, torch.ones_like(std), std, 1 / std)

    def predict(self, network: Callable[..., Tensor], z_t: Tensor, level: Level) -> Prediction:
        """The prediction of `network` for noisy images."""
        x0 = network(z_t, level.told)
        return Prediction(x0, (z_t - x0) / level.std)

    def loss(self, said: Prediction, level: Level, z: Tensor, noise: Tensor) -> Tensor:  # noqa: ARG002
        """Mean squared error of the images `z`, weighted to one size at all levels."""
        weight = (level.std**2 + _SIGMA_DATA**2) / (level.std * _SIGMA_DATA) ** 2
        return (weight * (said.x0 - z) ** 2).mean()


Process = DDPM | VPSDE | EDM
"""A diffusion, as its network is trained."""
