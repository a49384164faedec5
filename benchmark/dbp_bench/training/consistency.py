"""Consistency distillation (Song et al. 2023, arXiv 2303.01469, algorithm 2) on a DDPM's levels.

The student is to give the same image at both ends of a short piece of its teacher's path. A noisy
image at level t is taken down the probability flow to level s < t by one step of DDIM with the
teacher; the student's image at t is drawn to its own image at s, through which no gradient goes. At
level 0 the student is the identity (:mod:`dbp_bench.purifiers.consistency`), so that all levels are
drawn to the clean end of the path.

Three choices: the squared distance; every level t of those that are trained, uniformly, with s =
max(t - skip, 0); and a target that is the student's own as it is, without an average of its weights
(Song and Dhariwal 2023, arXiv 2310.14189, section 3.2).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dbp_bench.noise import Site
from dbp_bench.purifiers.schedule import to_diffusion
from dbp_bench.training.batches import Batch
from dbp_bench.training.diffusion import Loss
from dbp_bench.training.processes import DDPM

_NOISE = Site("noise")


def distilling(student: nn.Module, teacher: nn.Module, process: DDPM, skip: int) -> Loss:
    """Mean squared distance of the student's images at both ends of a piece of `skip` levels."""

    def loss(batch: Batch) -> Tensor:
        high = process.draw(batch)
        low = process.at((high.told - skip).clamp(min=-1))
        z = to_diffusion(batch.images)
        z_high = high.diffuse(z, batch.tape.normal(_NOISE, 0, z))
        with torch.no_grad():
            # DDIM, equation 12 of Song et al. 2021 with sigma = 0, nothing clipped.
            path = process.predict(teacher, z_high, high)
            z_low = low.diffuse(path.x0, path.noise)
            target = process.predict(student, z_low, low).x0
        return F.mse_loss(process.predict(student, z_high, high).x0, target)

    return loss
