"""Projected gradient descent (Madry et al. 2018) with expectation over transformation."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dbp_bench.attacks.objectives import OBJECTIVES
from dbp_bench.threat import AttackerView, Budget

SELECTION = 1 << 31
"""Guesses from here on compare restarts; no gradient was ever taken on one."""


@dataclass(frozen=True, slots=True)
class PGD:
    """Steepest ascent on the mean loss; the last iterate counts.

    Several restarts are compared by their mean loss over one set of `eot` guesses that is common to
    all of them and that none was optimised on.

    Args:
        steps: Gradient steps.
        step_size: Length of a step, relative to eps.
        eot: Gradient draws averaged at each step, fresh at every step.
        loss: One of :data:`dbp_bench.attacks.objectives.OBJECTIVES`.
        random_start: Whether to start at a random point of the ball, not at the clean image.
        restarts: How often to search.
    """

    steps: int
    step_size: float
    eot: int
    loss: str = "ce"
    random_start: bool = False
    restarts: int = 1

    def __call__(
        self, view: AttackerView, images: Tensor, labels: Tensor, budget: Budget
    ) -> Tensor:
        """Adversarial images ``(b, c, h, w)`` in the `budget`."""
        found = self._search(view, images, labels, budget, 0)
        if self.restarts == 1:
            return found
        best = self._value(view, found, labels)
        for restart in range(1, self.restarts):
            other = self._search(view, images, labels, budget, restart)
            value = self._value(view, other, labels)
            better = value > best
            found = torch.where(better.view(-1, 1, 1, 1), other, found)
            best = torch.where(better, value, best)
        return found

    def _search(
        self, view: AttackerView, images: Tensor, labels: Tensor, budget: Budget, restart: int
    ) -> Tensor:
        found = view.random_start(images, budget, restart) if self.random_start else images
        for step in range(restart * self.steps, (restart + 1) * self.steps):
            draws = range(step * self.eot, (step + 1) * self.eot)
            gradient = view.gradient(found, labels, OBJECTIVES[self.loss], draws)
            ascent = budget.ascent(gradient.mean)
            found = budget.project(found + self.step_size * budget.eps * ascent, images)
        return found

    def _value(self, view: AttackerView, found: Tensor, labels: Tensor) -> Tensor:
        logits = view.logits(found, range(SELECTION, SELECTION + self.eot))
        losses = OBJECTIVES[self.loss](
            logits.flatten(0, 1), labels.repeat_interleave(logits.shape[1])
        )
        return losses.view(logits.shape[:2]).mean(1)
