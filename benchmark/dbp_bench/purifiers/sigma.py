"""Denoised images at continuous noise levels sigma, by networks of either kind.

At level sigma an image in [-1, 1] has noise of that standard deviation added, and isn't scaled
down. EDM's networks give the denoised image there. Networks that predict the noise, at steps of
the linear schedule, see the same image scaled to unit variance of image and noise together.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import isfinite, log
from typing import Literal

import torch
from torch import Tensor

from dbp_bench.errors import BadEntry
from dbp_bench.purifiers.schedule import LINEAR, predict

Predicts = Literal["image", "noise"]
"""What a network gives: the denoised `image` at a level sigma (EDM), or the `noise` at a 0-based
step of the linear schedule (DDPM)."""


@dataclass(frozen=True, slots=True)
class AtSigma:
    """The expected image D(z; sigma) by a `network`, which may be class-conditional."""

    network: Callable[..., Tensor]
    """Called with images, levels (or steps) ``(b,)`` and, where it is conditional, labels."""
    predicts: Predicts

    def __call__(self, z: Tensor, sigma: Tensor, *labels: Tensor) -> Tensor:
        """Denoised images like `z` ``(b, c, h, w)``, at levels ``(b,)``, of classes ``(b,)``."""
        if self.predicts == "image":
            return self.network(z, sigma, *labels)
        s = per_image(sigma)
        scaled = z / (1 + s**2).sqrt()
        said = predict(lambda x, t: self.network(x, t, *labels), scaled, step_at(sigma))
        return z - s * said.noise


def step_at(sigma: Tensor) -> Tensor:
    """The 0-based steps ``(b,)`` of the linear schedule whose noise levels are `sigma`.

    Between two steps, in proportion to log sigma.
    """
    table, at = _logs().to(sigma.device), sigma.double().log()
    above = torch.searchsorted(table, at).clamp(1, len(table) - 1)
    low, high = table[above - 1], table[above]
    return (above - 1 + (at - low) / (high - low)).to(sigma.dtype)


def refuse_levels(low: float, high: float, predicts: Predicts) -> None:
    """Refuse levels from `low` to `high` that no network knows.

    Raises:
        BadEntry: They aren't above 0, finite and in order; or the linear schedule has no such
            level.
    """
    if not 0 < low <= high:
        raise BadEntry(f"sigma_min: {low} is not above 0 and at most sigma_max = {high}.")
    if not isfinite(high):
        raise BadEntry(f"sigma_max: {high} is not finite.")
    first, last = (float(_logs()[i].exp()) for i in (0, -1))
    if predicts == "noise" and not (first <= low and high <= last):
        found = f"sigma: {high:g}" if low == high else f"sigma_min, sigma_max: {low:g} ... {high:g}"
        raise BadEntry(
            f"{found} is not in {first:.4g} ... {last:.4g}, the levels of a network that predicts "
            "the noise, in units of images in [-1, 1]."
        )


def per_image(values: Tensor) -> Tensor:
    """The `values` ``(b,)`` as ``(b, 1, 1, 1)``."""
    return values.view(-1, 1, 1, 1)


@cache
def _logs() -> Tensor:
    """The logarithm of sigma at each step of the linear schedule, in float64."""
    signal = LINEAR.signal()[1:]
    return torch.tensor([log((1 - a) / a) / 2 for a in signal], dtype=torch.float64)
