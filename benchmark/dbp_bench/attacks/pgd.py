"""Projected gradient descent (Madry et al. 2018) with expectation over transformation."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dbp_bench.errors import AttackFailed
from dbp_bench.threat import AttackerView, Budget


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy ``(n,)`` of logits ``(n, k)``."""
    return F.cross_entropy(logits, labels, reduction="none")


@dataclass(frozen=True, slots=True)
class PGD:
    """Steepest ascent on the mean cross-entropy, from the clean image; the last iterate counts.

    Args:
        steps: Gradient steps.
        step_size: Length of a step, relative to eps.
        eot: Gradient draws averaged at each step, fresh at every step.
    """

    steps: int
    step_size: float
    eot: int

    def __call__(
        self, view: AttackerView, images: Tensor, labels: Tensor, budget: Budget
    ) -> Tensor:
        """Adversarial images ``(b, c, h, w)`` in the `budget`.

        Raises:
            AttackFailed: The gradient of every image is zero, so nothing was searched.
        """
        adversarial = images
        moved = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        for step in range(self.steps):
            draws = range(step * self.eot, (step + 1) * self.eot)
            gradient, _ = view.gradient(adversarial, labels, cross_entropy, draws)
            moved |= (gradient.flatten(1) != 0).any(1)
            ascent = budget.ascent(gradient)
            adversarial = budget.project(
                adversarial + self.step_size * budget.eps * ascent, images
            )
        if self.steps and not moved.any():
            raise AttackFailed(
                "the gradient of every image is zero at every step: the defense masks its "
                "gradient, and this accuracy would mean nothing."
            )
        return adversarial
