"""Projected gradient descent (Madry et al. 2018) with expectation over transformation."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dbp_bench.attacks.common.objectives import (
    OBJECTIVES,
    TARGETED,
    compared,
    likely_targets,
    objective_of,
    too_many_targets,
)
from dbp_bench.attacks.common.options import AnyLoss, Count, StepSize, checked
from dbp_bench.errors import AttackFailed
from dbp_bench.threat import AttackerView, Budget, Evaluations, Gradient, Objective, Setup


@checked
class PGD:
    """Steepest ascent on the mean loss; the last iterate counts.

    Several restarts are compared by their mean loss over one set of `eot` guesses that is common to
    all of them and that none was optimised on.

    With a targeted loss, each restart aims at a class of its own, the most likely wrong one first
    (MultiTargeted, Gowal et al. 2019, arXiv 1910.09338): `restarts` is the number of targets. Their
    order follows from the mean logits of the clean image over another set of `eot` guesses that no
    gradient is taken on. Losses towards different targets cannot be compared: the untargeted loss
    of the same family compares the restarts.

    Args:
        steps: Gradient steps of each restart.
        step_size: Length of a step, relative to eps.
        eot: EoT samples of each step, fresh at every step.
        loss: The loss that is maximised; if targeted, each restart aims at another wrong class.
        random_start: True to start at a random point of the ball, not at the clean image.
        restarts: The number of searches.
    """

    steps: Count = 20
    step_size: StepSize = 0.25
    eot: Count = 10
    loss: AnyLoss = "ce"
    random_start: bool = False
    restarts: Count = 1

    def __post_init__(self) -> None:
        if self.restarts > 1 and not (self.random_start or self.loss in TARGETED):
            raise ValueError(
                "restarts: more than 1 needs random_start: true or a targeted loss, or all are "
                "the same"
            )

    def evaluations(self, setup: Setup) -> Evaluations:
        """The steps of all restarts; forward ones compare the restarts and order the targets."""
        samples = self.eot if setup.hidden else 1
        compared = self.restarts if self.restarts > 1 else 0
        forward = (compared + (self.loss in TARGETED)) * samples
        return Evaluations(self.steps * self.restarts * samples, forward, exact=True)

    def unfit(self, setup: Setup) -> str | None:
        """Each restart of a targeted loss needs a wrong class of its own."""
        targets = self.restarts if self.loss in TARGETED else 0
        return too_many_targets("restarts", targets, setup)

    def __call__(
        self, view: AttackerView, images: Tensor, labels: Tensor, budget: Budget
    ) -> Tensor:
        """Adversarial images ``(b, c, h, w)`` in the `budget`.

        Raises:
            AttackFailed: The classifier has too few classes for the loss or for so many targets.
        """
        return self.search(view, images, labels, budget, view.gradient)

    def search(
        self,
        view: AttackerView,
        images: Tensor,
        labels: Tensor,
        budget: Budget,
        gradient: Callable[[Tensor, Tensor, Objective, range], Gradient],
    ) -> Tensor:
        """The same search along another `gradient`, which has the signature of the view's."""
        best, value = images, torch.full_like(images[:, 0, 0, 0], -torch.inf)
        for restart, targets in enumerate(self._targets(view, images, labels)):
            found = self._ascend(view, images, labels, budget, gradient, targets, restart)
            if self.restarts == 1:
                return found
            worth = self._value(view, found, labels)
            better = worth > value
            best = torch.where(better.view(-1, 1, 1, 1), found, best)
            value = torch.where(better, worth, value)
        return best

    def _targets(self, view: AttackerView, images: Tensor, labels: Tensor) -> Sequence[Tensor]:
        """The classes ``(b,)`` that each restart aims at; any for an untargeted loss."""
        if self.loss not in TARGETED:
            return [labels] * self.restarts
        targets = likely_targets(view, images, labels, self.eot)
        if self.restarts > targets.shape[1]:
            raise AttackFailed(
                f"restarts: {self.restarts}, but loss {self.loss} aims each restart at another "
                f"wrong class, of which this classifier has {targets.shape[1]}; give "
                f"{targets.shape[1]} at most."
            )
        return targets[:, : self.restarts].unbind(1)

    def _ascend(
        self,
        view: AttackerView,
        images: Tensor,
        labels: Tensor,
        budget: Budget,
        gradient: Callable[[Tensor, Tensor, Objective, range], Gradient],
        targets: Tensor,
        restart: int,
    ) -> Tensor:
        loss = objective_of(self.loss, targets)
        found = view.random_start(images, budget, restart) if self.random_start else images
        for step in range(restart * self.steps, (restart + 1) * self.steps):
            # The mean gradient over fresh EoT samples.
            draws = range(step * self.eot, (step + 1) * self.eot)
            ascent = budget.ascent(gradient(found, labels, loss, draws).mean)
            # A step of steepest ascent, projected onto the ball and the pixel box.
            found = budget.project(found + self.step_size * budget.eps * ascent, images)
        return found

    def _value(self, view: AttackerView, found: Tensor, labels: Tensor) -> Tensor:
        untargeted = OBJECTIVES[self.loss.removesuffix("-targeted")]
        return compared(view, found, labels, untargeted, self.eot)
