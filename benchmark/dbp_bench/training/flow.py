"""FlowPure's objective: the velocity of a flow from perturbed to clean images (arXiv 2505.13280).

Conditional flow matching (Lipman et al. 2023, arXiv 2210.02747; Tong et al. 2024, arXiv 2302.00482,
with pairs that are given and no width of the path): for a clean image x1 and its perturbed copy x0
the network is shown ``x_t = (1 - t) x0 + t x1`` at a time t, uniform in 0 ... 1, and is to predict
the velocity ``x1 - x0``. All in diffusion space [-1, 1].
"""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from dbp_bench.noise import Site
from dbp_bench.purifiers.flow import TIMES
from dbp_bench.purifiers.schedule import to_diffusion
from dbp_bench.training.batches import Batch
from dbp_bench.training.diffusion import Loss, inside, slope

_NOISE, _START, _TIME, _BOUND = Site("noise"), Site("start"), Site("time"), Site("bound")

Perturb = Callable[[Batch], Tensor]
"""Perturbed copies ``(b, c, h, w)`` of a batch's images, in diffusion space."""


def matching(velocity: nn.Module, perturb: Perturb) -> Loss:
    """Mean squared error of the velocity."""

    def loss(batch: Batch) -> Tensor:
        clean, start = to_diffusion(batch.images), perturb(batch)
        time = batch.uniform(_TIME)
        share = time.view(-1, 1, 1, 1)
        state = (1 - share) * start + share * clean
        return F.mse_loss(velocity(state, TIMES * time), clean - start)

    return loss


def noisy(sigma: float) -> Perturb:
    """Gaussian noise of standard deviation `sigma`, [0, 1] units (released: 0.3)."""

    def perturb(batch: Batch) -> Tensor:
        z = to_diffusion(batch.images)
        return z + 2 * sigma * batch.tape.normal(_NOISE, 0, z)

    return perturb


def attacked(classifier: nn.Module, eps: float, step: float, rounds: int) -> Perturb:
    """PGD on the bare classifier, within an l-infinity bound of each image's own.

    Args:
        classifier: Frozen; takes images in [0, 1].
        eps: The bounds are uniform in 0 ... `eps`, [0, 1] units (released: 0.05).
        step: Size of a step, [0, 1] units (released: 2/255).
        rounds: Steps after a uniform start (released: 10).
    """

    def perturb(batch: Batch) -> Tensor:
        z = to_diffusion(batch.images)
        bound = eps * batch.uniform(_BOUND).view(-1, 1, 1, 1)

        def loss(delta: Tensor) -> Tensor:
            return F.cross_entropy(classifier((z + delta + 1) / 2), batch.labels, reduction="sum")

        delta = inside(2 * bound * (2 * batch.tape.uniform(_START, 0, z) - 1), z, bound)
        for _ in range(rounds):
            delta = inside(delta + 2 * step * slope(loss, delta).sign(), z, bound)
        return z + delta

    return perturb
