"""Pieces that networks share: embeddings of the level, attention, resampling, image sizes."""

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dbp_bench.errors import BadEntry


def sinusoids(t: Tensor, channels: int, *, endpoint: bool = True) -> Tensor:
    """Sine, then cosine features ``(b, channels)`` of levels `t` ``(b,)`` (Vaswani et al. 2017).

    The frequencies fall geometrically from 1, in ``channels / 2`` steps; with `endpoint` the last
    of them is 1 / 10000, without it the series stops one step above.
    """
    half = channels // 2
    index = torch.arange(half, dtype=t.dtype, device=t.device)
    angles = t[:, None] * torch.exp(-math.log(10000) / (half - endpoint) * index)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Scaled dot-product attention ``(n, d, l)`` over l places, each of d channels.

    Written out: the fused kernels' backward passes add in another order from run to run on a GPU,
    and have no second derivative.
    """
    weight = torch.einsum("ndq,ndk->nqk", query / query.shape[1] ** 0.5, key).softmax(dim=2)
    return torch.einsum("nqk,ndk->ndq", weight, value)


def named(**layers: nn.Module) -> nn.Sequential:
    """The `layers` in a row; a checkpoint has their parameters under these names."""
    return nn.Sequential(OrderedDict(layers))


def doubling(width: int) -> nn.Sequential:
    """Twice the resolution, by repetition and a convolution (`conv`)."""
    return named(up=nn.Upsample(scale_factor=2.0), conv=nn.Conv2d(width, width, 3, padding=1))


def resampled(x: Tensor, scale: float) -> Tensor:
    """`x` ``(b, c, h, w)`` doubled by repetition, halved by means of 2 x 2, or as it is (1)."""
    if scale > 1:
        return F.interpolate(x, scale_factor=scale)
    return F.avg_pool2d(x, 2) if scale < 1 else x


def refuse_size(images: Tensor, divisor: int, network: str) -> None:
    """Refuse images ``(b, c, h, w)`` that cannot be halved as often as `network` does.

    Raises:
        BadEntry: A side is not a multiple of `divisor`.
    """
    height, width = images.shape[-2:]
    if height % divisor or width % divisor or not height or not width:
        raise BadEntry(
            f"{network} takes images whose sides are multiples of {divisor}, not {height} x "
            f"{width}. Resize them, or name another network."
        )
