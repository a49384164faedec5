"""Purification at another size than the classifier's: 224 x 224 images by a 256 x 256 network."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from dbp_bench.defense import Purifier
from dbp_bench.noise import Noise, Site


@dataclass(frozen=True)
class Resized:
    """A purifier between two bilinear resizes, to ``(size, size)`` and back.

    As in the published evaluations on ImageNet: pixel centres aligned (``align_corners=False``), no
    smoothing before the image shrinks. Both are linear, and keep [0, 1].
    """

    purifier: Purifier
    size: int

    @property
    def sites(self) -> frozenset[Site]:
        """The sites at which the purifier draws noise."""
        return self.purifier.sites

    @property
    def clamp_output(self) -> bool:
        """True where the purifier's output is in [0, 1]."""
        return bool(getattr(self.purifier, "clamp_output", True))

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        """Purified images ``(b, c, h, w)`` for `images` ``(b, c, h, w)`` in [0, 1]."""
        purified = self.purifier(_resize(images, (self.size, self.size)), noise)
        return _resize(purified, (images.shape[2], images.shape[3]))


def _resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False)
