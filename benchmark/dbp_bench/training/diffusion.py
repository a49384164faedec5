"""The losses of the recipes: classification, denoising, and ADDT (CGPO + RBGM) with its ablations.

ADDT is "Adversarial Denoising Diffusion Training", arXiv 2404.14309, equations 6 to 9 and
algorithm 1, with the constants of its released code where the two differ.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dbp_bench.noise import Site
from dbp_bench.purifiers.schedule import to_diffusion
from dbp_bench.training.batches import Batch
from dbp_bench.training.processes import Level, Prediction, Process

_NOISE, _START, _SIZE = Site("noise"), Site("start"), Site("size")

Loss = Callable[[Batch], Tensor]
"""The mean loss of a batch."""
Push = Callable[[Batch, Level, Tensor], Tensor]
"""Pushes the noise of a batch at a level."""
Guide = Callable[[Prediction, Tensor, Tensor], Tensor]
"""The quantity that a perturbation raises, of a prediction, its noise and the labels.

It is a sum over images, so that an image's gradient doesn't depend on the others.
"""


def classification(classifier: nn.Module) -> Loss:
    """Cross-entropy of a classifier of images in [0, 1]."""
    return lambda batch: F.cross_entropy(classifier(batch.images), batch.labels)


def noisy_classification(classifier: nn.Module, sigma_min: float, sigma_max: float) -> Loss:
    """Cross-entropy on images under Gaussian noise that isn't clipped (Cohen et al. 2019).

    The standard deviation of each image's noise is uniform between the two, in [0, 1] pixels.
    """

    def loss(batch: Batch) -> Tensor:
        size = sigma_min + (sigma_max - sigma_min) * batch.uniform(_SIZE).view(-1, 1, 1, 1)
        noisy = batch.images + size * batch.tape.normal(_NOISE, 0, batch.images)
        return F.cross_entropy(classifier(noisy), batch.labels)

    return loss


def denoising(
    denoiser: nn.Module, process: Process, push: Push | None = None, *, conditional: bool = False
) -> Loss:
    """The ordinary loss of a diffusion model, of noise that was pushed where `push` is given.

    A `conditional` one is told the classes.
    """

    def loss(batch: Batch) -> Tensor:
        level = process.draw(batch)
        z = to_diffusion(batch.images)
        noise = batch.tape.normal(_NOISE, 0, z)
        if push:
            noise = push(batch, level, noise)
        told = partial(denoiser, labels=batch.labels) if conditional else denoiser
        said = process.predict(told, level.diffuse(z, noise), level)
        return process.loss(said, level, z, noise)

    return loss


def adversarial(objective: "ADDT | LinfADDT", denoiser: nn.Module, guide: Guide) -> Loss:
    """The diffusion's loss where the noise was pushed, all of which is to be predicted (eq. 8)."""

    def push(batch: Batch, level: Level, noise: Tensor) -> Tensor:
        return objective.mix(noise, objective.perturb(denoiser, guide, batch, level), level)

    return denoising(denoiser, objective.process, push)


# ------------------------------------------------------------------------------------- guides


def fooling(classifier: nn.Module) -> Guide:
    """Cross-entropy of `classifier` on the one-step denoised images (CGPO)."""

    def guide(said: Prediction, noise: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG001
        return F.cross_entropy(classifier((said.x0 + 1) / 2), labels, reduction="sum")

    return guide


def misleading(said: Prediction, noise: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG001
    """Squared error of the predicted noise against the round's fresh noise, as published."""
    return F.mse_loss(said.noise, noise, reduction="sum")


# ------------------------------------------------------------------------------- perturbations


def _ascent(
    objective: "ADDT | LinfADDT",
    denoiser: nn.Module,
    guide: Guide,
    batch: Batch,
    level: Level,
    perturbation: Tensor,
    noise: Tensor,
) -> Tensor:
    """The gradient of the guide in the perturbation."""

    def value(perturbation: Tensor) -> Tensor:
        z_t = level.diffuse(to_diffusion(batch.images), objective.mix(noise, perturbation, level))
        return guide(objective.process.predict(denoiser, z_t, level), noise, batch.labels)

    return slope(value, perturbation)


def slope(value: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """The gradient of a sum over images in `at` alone: none is left on any weight."""
    with torch.enable_grad():
        leaf = at.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(value(leaf), leaf)
    return gradient


def inside(delta: Tensor, z: Tensor, eps: float | Tensor) -> Tensor:
    """`delta` brought back into the ball of `eps` and, with the images `z`, into the pixel box.

    Args:
        delta: ``(b, c, h, w)`` in [-1, 1] units.
        z: ``(b, c, h, w)`` in [-1, 1].
        eps: The l-infinity bound, [0, 1] units; a number, or one for each image.
    """
    bound = torch.as_tensor(2 * eps, dtype=z.dtype, device=z.device)
    return delta.clamp(-bound, bound).clamp(-1 - z, 1 - z)


def rank_based_gaussian(gradient: Tensor, gaussian: Tensor) -> Tensor:
    """RBGM: the values of `gaussian` in the rank order of `gradient`, both ``(b, c, h, w)``.

    For each image and channel apart, the i-th largest gradient gets the i-th largest Gaussian
    value (arXiv 2404.14309, section 5.2): the output is a Gaussian sample that points where the
    gradient points.
    """
    ranks = gradient.flatten(2).argsort(dim=2, stable=True).argsort(dim=2)
    return gaussian.flatten(2).sort(dim=2).values.gather(2, ranks).view_as(gradient)


@dataclass(frozen=True, slots=True)
class ADDT:
    """The ADDT objective: denoise noise that was pushed where it fools the guiding classifier.

    Args:
        lambda_unit: Size of the adversarial part in image space, [-1, 1] units (paper: 0.03).
        lambda_max: Its largest share of the noise (paper: 0.3).
        rounds: Rounds of CGPO (paper: 5).
        process: The diffusion.
    """

    lambda_unit: float
    lambda_max: float
    rounds: int
    process: Process

    def share(self, ratio: Tensor) -> Tensor:
        """The share lambda, clip(lambda_unit * ratio, 0, lambda_max), for :attr:`Level.ratio`."""
        return (self.lambda_unit * ratio).clamp(0, self.lambda_max)

    def mix(self, noise: Tensor, perturbation: Tensor, level: Level) -> Tensor:
        """sqrt(1 - lambda^2) * noise + lambda * perturbation: unit variance (equation 7)."""
        share = self.share(level.ratio)
        return (1 - share**2).sqrt() * noise + share * perturbation

    def perturb(self, denoiser: nn.Module, guide: Guide, batch: Batch, level: Level) -> Tensor:
        """CGPO: a Gaussian-shaped perturbation ``(b, c, h, w)`` that raises what the guide says.

        No gradient is left on any weight.
        """
        perturbation = batch.tape.normal(_START, 0, batch.images)
        total = torch.zeros_like(batch.images)
        for k in range(self.rounds):
            # The gradient of the guide at the one-step denoised image, under fresh noise.
            noise = batch.tape.normal(_NOISE, 1 + k, batch.images)
            total += _ascent(self, denoiser, guide, batch, level, perturbation, noise)
            # RBGM: the sum over all rounds, mapped back to Gaussian values.
            gaussian = batch.tape.normal(_START, 1 + k, batch.images)
            perturbation = rank_based_gaussian(total, gaussian)
        return perturbation


@dataclass(frozen=True, slots=True)
class LinfADDT:
    """The ablation without RBGM: an l-infinity perturbation of the image, by signs.

    The network is to predict ``noise + min(ratio, ratio_max) * delta``, so that it sees the
    diffused ``z + delta`` where the limit doesn't bind.

    Args:
        eps: Budget, [0, 1] units (paper: 8/255).
        step: Step of one round, [0, 1] units (paper: 4/255).
        rounds: Rounds of signed ascent, from 0 (paper: 5).
        ratio_max: The limit (paper: 10).
        process: The diffusion.
    """

    eps: float
    step: float
    rounds: int
    ratio_max: float
    process: Process

    def mix(self, noise: Tensor, perturbation: Tensor, level: Level) -> Tensor:
        """The noise that stands for `noise` and `perturbation` together."""
        return noise + level.ratio.clamp(max=self.ratio_max) * perturbation

    def perturb(self, denoiser: nn.Module, guide: Guide, batch: Batch, level: Level) -> Tensor:
        """A perturbation ``(b, c, h, w)`` in [-1, 1] units, of at most `eps`, inside the box."""
        z = to_diffusion(batch.images)
        delta = torch.zeros_like(z)
        for k in range(self.rounds):
            noise = batch.tape.normal(_NOISE, 1 + k, z)
            gradient = _ascent(self, denoiser, guide, batch, level, delta, noise)
            delta = inside(delta + 2 * self.step * gradient.sign(), z, self.eps)
        return delta
