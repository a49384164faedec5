"""The losses of the recipes: classification, noise prediction, and ADDT (CGPO + RBGM).

ADDT is "Adversarial Denoising Diffusion Training", arXiv 2404.14309, equations 6 to 9 and
algorithm 1, with the constants of its released code where the two differ.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dbp_bench.noise import Site
from dbp_bench.purifiers.schedule import Schedule, to_diffusion
from dbp_bench.training.loop import Batch

_NOISE, _START = Site("noise"), Site("start")


def classification(classifier: nn.Module) -> Callable[[Batch], Tensor]:
    """Cross-entropy of a classifier of images in [0, 1]."""
    return lambda batch: F.cross_entropy(classifier(batch.images), batch.labels)


def noise_prediction(denoiser: nn.Module, schedule: Schedule) -> Callable[[Batch], Tensor]:
    """Mean squared error of the predicted noise (Ho et al. 2020, equation 14)."""
    table = torch.tensor(schedule.signal()[1:])

    def loss(batch: Batch) -> Tensor:
        t = batch.levels(schedule.levels)
        signal = _per_image(table[t.long()])
        z = to_diffusion(batch.images)
        noise = batch.tape.normal(_NOISE, 0, z)
        return F.mse_loss(denoiser(signal.sqrt() * z + (1 - signal).sqrt() * noise, t), noise)

    return loss


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
    """The ADDT objective: predict noise that was pushed where it fools the guiding classifier.

    Args:
        lambda_unit: Size of the adversarial part in image space, [-1, 1] units (paper: 0.03).
        lambda_max: Its largest share of the noise (paper: 0.3).
        rounds: Rounds of CGPO (paper: 5).
        levels: Training steps are uniform in 0 ... levels - 1 (paper: all 1000).
        schedule: Of the diffusion.
    """

    lambda_unit: float
    lambda_max: float
    rounds: int
    levels: int
    schedule: Schedule = Schedule()

    def share(self, signal: Tensor) -> Tensor:
        """lambda_t = clip(lambda_unit * sqrt(signal / (1 - signal)), 0, lambda_max)."""
        return (self.lambda_unit * (signal / (1 - signal)).sqrt()).clamp(0, self.lambda_max)

    def mix(self, noise: Tensor, perturbation: Tensor, share: Tensor) -> Tensor:
        """sqrt(1 - lambda^2) * noise + lambda * perturbation: unit variance (equation 7)."""
        return (1 - share**2).sqrt() * noise + share * perturbation

    def perturb(
        self, denoiser: nn.Module, classifier: nn.Module, batch: Batch, t: Tensor, signal: Tensor
    ) -> Tensor:
        """CGPO: a Gaussian-shaped perturbation ``(b, c, h, w)`` that raises the classifier's loss.

        Each round draws fresh noise, takes the gradient of the cross-entropy of the one-step
        denoised image in the perturbation, adds it to the sum of all rounds, and maps that sum
        back to Gaussian values (RBGM). No gradient is left on any weight.
        """
        z = to_diffusion(batch.images)
        share = self.share(signal)
        perturbation = batch.tape.normal(_START, 0, z)
        total = torch.zeros_like(z)
        for k in range(self.rounds):
            noise = batch.tape.normal(_NOISE, 1 + k, z)
            with torch.enable_grad():
                delta = perturbation.detach().requires_grad_()
                z_t = signal.sqrt() * z + (1 - signal).sqrt() * self.mix(noise, delta, share)
                x0 = (z_t - (1 - signal).sqrt() * denoiser(z_t, t)) / signal.sqrt()
                loss = F.cross_entropy(classifier((x0 + 1) / 2), batch.labels, reduction="sum")
                (gradient,) = torch.autograd.grad(loss, delta)
            total += gradient
            perturbation = rank_based_gaussian(total, batch.tape.normal(_START, 1 + k, z))
        return perturbation

    def loss(self, denoiser: nn.Module, classifier: nn.Module) -> Callable[[Batch], Tensor]:
        """Mean squared error against the whole mixed noise (equation 8)."""
        table = torch.tensor(self.schedule.signal()[1:])

        def loss(batch: Batch) -> Tensor:
            t = batch.levels(self.levels)
            signal = _per_image(table[t.long()])
            perturbation = self.perturb(denoiser, classifier, batch, t, signal)
            z = to_diffusion(batch.images)
            noise = batch.tape.normal(_NOISE, 0, z)
            mixed = self.mix(noise, perturbation, self.share(signal))
            z_t = signal.sqrt() * z + (1 - signal).sqrt() * mixed
            return F.mse_loss(denoiser(z_t, t), mixed)

        return loss


def _per_image(values: Tensor) -> Tensor:
    return values.float().view(-1, 1, 1, 1)
