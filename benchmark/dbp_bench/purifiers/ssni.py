"""A level for each image, by its score norm: a wrapper in the spirit of SSNI (Sun et al. 2025).

Sample-specific noise injection (arXiv 2506.06027) says that an image that is nearer to the data
needs less noise. It takes the norm of the score at the image for its distance, and reweights t* by
it, image by image, in front of any purifier. That much is public; what is chosen here is the rest:

* The norm is that of the noise that the purifier's own network predicts in the image as it is, as a
  root mean square over pixels, at the levels `probes`, and the mean of these. The score is minus
  that noise over ``sqrt(1 - signal)``, so this is its norm in units in which pure noise has 1. No
  noise is drawn for it: the level is a function of the image.
* t* is multiplied by one of `shares`. Where the norm is `center`, it is the middle of the least and
  the largest share; around it the share rises with the norm, along a line or a logistic curve. What
  norms images have depends on the network: :meth:`SSNI.norms` tells them.
* The purifier takes as many steps at each level, so that each image has the same NFE.

The share is a step function of the image, so that it has no gradient but where it jumps. Hence the
gradient of the whole is exact at every image that isn't on such an edge, and it is that of the
purifier at the level that the image has. No attack by gradients learns from it that another level
is near.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from math import isfinite
from typing import Any, Literal

import torch
from torch import Tensor

from dbp_bench.defense import Purifier
from dbp_bench.errors import BadEntry
from dbp_bench.noise import Noise, Site
from dbp_bench.purifiers.schedule import LINEAR, predict, times, to_diffusion

Curve = Literal["linear", "logistic"]
"""How the share rises with the norm, from the least to the largest."""


@dataclass(frozen=True)
class SSNI:
    """Each image is purified by `inner`, at `inner`'s own t* times the share of its score norm."""

    inner: Any
    """The purifier that is wrapped: a dataclass with the fields `t_star` and `denoiser`."""
    shares: list[float]
    """The shares of t*, rising. Images of a batch with one share are purified together."""
    probes: list[int]
    """The levels at which the network is asked for the score, each with 1 NFE."""
    curve: Curve
    center: float
    """The norm at which the share is in the middle."""
    width: float
    """The range of norms over which a line rises from the least share to the largest; a logistic
    curve has the slope of that line in its middle."""
    _at: list[Purifier] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse options that are out of range, or an `inner` without a level."""
        held = getattr(self.inner, "__dataclass_fields__", {}) if is_dataclass(self.inner) else {}
        missing = [name for name in ("t_star", "denoiser") if name not in held]
        if missing:
            raise BadEntry(
                f"inner: {type(self.inner).__name__} has no field {' and no '.join(missing)}; "
                "take a purifier that goes to the level t_star with the network denoiser, such as "
                "DDPM."
            )
        rising = all(a < b for a, b in zip(self.shares, self.shares[1:], strict=False))
        if len(self.shares) < 2 or not rising or self.shares[0] <= 0:
            raise BadEntry(f"shares: {self.shares} are not two or more positive, rising numbers.")
        if not self.probes:
            raise BadEntry("probes: there is none.")
        for level in self.probes:
            if not 1 <= level <= LINEAR.levels:
                raise BadEntry(f"probes: {level} is not in 1 ... {LINEAR.levels}.")
        for name in ("center", "width"):
            value = getattr(self, name)
            if not (isfinite(value) and value > 0):
                raise BadEntry(f"{name}: {value} is not positive.")
        made: list[Purifier] = []
        for level in self.levels:
            try:
                made.append(replace(self.inner, t_star=level))
            except BadEntry as error:
                raise BadEntry(f"inner at level {level}: {error}") from None
        object.__setattr__(self, "_at", made)

    @property
    def levels(self) -> list[int]:
        """The level that goes with each share."""
        return [round(share * self.inner.t_star) for share in self.shares]

    @property
    def clamp_output(self) -> bool:
        """Whether the wrapped purifier keeps its output in [0, 1]."""
        return bool(getattr(self.inner, "clamp_output", True))

    @property
    def sites(self) -> frozenset[Site]:
        """The sites of the wrapped purifier."""
        found: frozenset[Site] = self.inner.sites
        return found

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        """Purified images ``(b, c, h, w)`` for `images` ``(b, c, h, w)`` in [0, 1]."""
        chosen: list[int] = self.choose(self.norms(images)).tolist()
        present = sorted(set(chosen))
        if len(present) == 1:
            return self._at[present[0]](images, noise)
        # An image's noise doesn't depend on the level that it or another image has.
        held: dict[tuple[Any, ...], Tensor] = {}
        groups = [[i for i, k in enumerate(chosen) if k == level] for level in present]
        parts = [
            self._at[level](images[rows], _SomeRows(noise, len(chosen), rows, held))
            for level, rows in zip(present, groups, strict=True)
        ]
        order = torch.tensor([i for rows in groups for i in rows], device=images.device)
        return torch.cat(parts)[order.argsort()]

    def norms(self, images: Tensor) -> Tensor:
        """The norm ``(b,)`` of the noise predicted in each of `images` ``(b, c, h, w)`` in [0, 1].

        It is a root mean square over pixels, and a mean over `probes`; it carries no gradient.
        """
        found = []
        with torch.no_grad():
            for level in self.probes:
                z = LINEAR.signal()[level] ** 0.5 * to_diffusion(images)
                said = predict(self.inner.denoiser, z, times(level, z)).noise
                found.append(said.flatten(1).square().mean(1).sqrt())
        return torch.stack(found).mean(0)

    def choose(self, norms: Tensor) -> Tensor:
        """The number ``(b,)`` of the share nearest to where the curve is, at these `norms`."""
        away = (norms - self.center) / self.width
        height = torch.sigmoid(4 * away)
        if self.curve == "linear":
            height = (away + 0.5).clamp(0, 1)
        low, high = self.shares[0], self.shares[-1]
        wanted = low + (high - low) * height
        shares = wanted.new_tensor(self.shares)
        return (wanted[:, None] - shares).abs().argmin(1)


@dataclass(frozen=True)
class _SomeRows:
    """The draws of some rows of a batch; each is asked for once and `held` for the other rows."""

    noise: Noise
    total: int
    rows: Sequence[int]
    held: dict[tuple[Any, ...], Tensor]

    def normal(self, site: Site, step: int, like: Tensor) -> Tensor:
        """Standard normal noise like `like` ``(rows, ...)``."""
        key = (site, step, like.shape[1:], like.dtype, like.device)
        if key not in self.held:
            whole = like.new_empty(self.total, *like.shape[1:])
            self.held[key] = self.noise.normal(site, step, whole)
        return self.held[key][self.rows]
