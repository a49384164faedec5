"""Minibatches: images drawn with replacement, augmented, each with its row of a tape."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dbp_bench.noise import Site, Tape

_IMAGE, _FLIP, _ROW, _COLUMN = Site("image"), Site("flip"), Site("row"), Site("column")


@dataclass(frozen=True, slots=True)
class Batch:
    """Images ``(b, c, h, w)`` in [0, 1] with labels ``(b,)``, and the tape of this update."""

    images: Tensor
    labels: Tensor
    tape: Tape

    def uniform(self, site: Site) -> Tensor:
        """One number in (0, 1) for each image ``(b,)``."""
        return self.tape.uniform(site, 0, self._one())[:, 0]

    def normal(self, site: Site) -> Tensor:
        """One standard normal number for each image ``(b,)``."""
        return self.tape.normal(site, 0, self._one())[:, 0]

    def _one(self) -> Tensor:
        return self.images.new_empty(len(self.images), 1)


def draw(images: Tensor, labels: Tensor, tape: Tape, *, flip: bool, crop: int) -> Batch:
    """The batch that the rows of `tape` choose from all training images.

    Args:
        images: ``(n, c, h, w)`` in [0, 1], or uint8 in 0 ... 255.
        labels: ``(n,)``.
        tape: One row for each image of the batch.
        flip: Mirror every other image.
        crop: Shift images by up to so many pixels, mirrored at the border.
    """
    rows = torch.empty(len(tape.ids), 1)
    index = (tape.uniform(_IMAGE, 0, rows)[:, 0] * len(images)).long().to(images.device)
    chosen = images[index]
    if chosen.dtype == torch.uint8:
        chosen = chosen.float() / 255
    if crop:
        chosen = _shifted(chosen, tape, crop)
    if flip:
        mirrored = tape.uniform(_FLIP, 0, rows).to(chosen.device).view(-1, 1, 1, 1) < 0.5
        chosen = torch.where(mirrored, chosen.flip(3), chosen)
    return Batch(chosen, labels[index], tape)


def _shifted(images: Tensor, tape: Tape, most: int) -> Tensor:
    """Images ``(b, c, h, w)``, each moved by up to `most` pixels along both axes."""
    count, _, height, width = images.shape
    like = torch.empty(count, 1)
    start = [
        (tape.uniform(site, 0, like) * (2 * most + 1)).long().to(images.device)
        for site in (_ROW, _COLUMN)
    ]
    y = start[0] + torch.arange(height, device=images.device)
    x = start[1] + torch.arange(width, device=images.device)
    padded = F.pad(images, (most,) * 4, mode="reflect").permute(0, 2, 3, 1)
    image = torch.arange(count, device=images.device).view(-1, 1, 1)
    return padded[image, y[:, :, None], x[:, None]].permute(0, 3, 1, 2).contiguous()
