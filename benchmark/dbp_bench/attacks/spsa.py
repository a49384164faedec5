"""SPSA (Uesato et al. 2018): Adam on a gradient estimated from logits in random directions."""

from math import sqrt
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from dbp_bench.attacks.common.adam import Adam
from dbp_bench.attacks.common.objectives import (
    OBJECTIVES,
    mean_over_draws,
    surely_wrong,
)
from dbp_bench.attacks.common.options import Count, Loss, Number, StepSize, checked
from dbp_bench.errors import AttackFailed
from dbp_bench.noise import Site
from dbp_bench.threat import L1, AttackerView, Budget, Evaluations, Linf, Setup

_DIRECTION = Site("spsa/direction")


@checked
class SPSA:
    """Ascent along a gradient that no masked gradient can hide, since none is asked for.

    A step takes the mean over random directions v, of which every pixel is 1 or -1, of
    ``(loss(x + delta v) - loss(x - delta v)) / (2 delta) v`` (Uesato et al. 2018, algorithm 1),
    which is the gradient in expectation, but for terms of order ``delta^2``. Both points are
    clipped to [0, 1]: at the edge of the box this halves the derivative in a pixel, which
    Adam evens out. The last iterate counts.

    Where draws are hidden, both points of a pair are evaluated at the same `eot` guesses, so that
    the noise which they share cancels; the guesses are fresh for each pair. Where every draw is
    known, one more evaluation per step tells which images are misclassified, and those are
    finished.

    Args:
        steps: Steps of Adam.
        directions: Pairs of points of each step.
        delta: Distance of the points from the image, in [0, 1] pixel units.
        step_size: Adam's learning rate, relative to eps (linf), or to eps over the square root of
            the number of pixels and channels (l2).
        eot: Guesses over which each difference is averaged.
        loss: The loss that is maximised.
    """

    steps: Count = 100
    directions: Count = 32
    delta: Annotated[Number, Field(gt=0, le=0.5)] = 0.01
    step_size: StepSize = 0.3
    eot: Count = 1
    loss: Loss = "margin"

    def evaluations(self, setup: Setup) -> Evaluations:
        """Two evaluations of each pair at each guess; known draws finish images."""
        if setup.hidden:
            return Evaluations(0, self.steps * self.directions * 2 * self.eot, exact=True)
        return Evaluations(0, self.steps * (self.directions * 2 + 1), exact=False)

    def unfit(self, setup: Setup) -> str | None:
        """The norm must not be l1, where a step that moves all pixels goes nowhere."""
        if setup.norm == "l1":
            return "spsa searches in linf and l2, not in l1: take pgd, apgd or autoattack"
        return None

    def __call__(
        self, view: AttackerView, images: Tensor, labels: Tensor, budget: Budget
    ) -> Tensor:
        """Adversarial images ``(b, c, h, w)`` in the `budget`.

        Raises:
            AttackFailed: The budget is l1.
        """
        if isinstance(budget, L1):
            raise AttackFailed("spsa: searches linf and l2 budgets only.")
        unit = budget.eps if isinstance(budget, Linf) else budget.eps / sqrt(images[0].numel())
        found, rows = images.clone(), torch.arange(len(images), device=images.device)
        part, clean, own, x = view, images, labels, images
        adam = Adam.of(self.step_size * unit, images)
        for step in range(self.steps):
            if view.deterministic and view.decided_by_logits:
                wrong = surely_wrong(part.logits(x, [0])[:, 0], own)
                if bool(wrong.any()):
                    found[rows], left = x, ~wrong
                    if not bool(left.any()):
                        return found
                    rows, part, clean, own = rows[left], part[left], clean[left], own[left]
                    x, adam = x[left], adam[left]
            adam = adam.after(self.gradient(part, x, own, step))
            x = budget.project(x + adam.step, clean)
        found[rows] = x
        return found

    def gradient(self, view: AttackerView, images: Tensor, labels: Tensor, step: int) -> Tensor:
        """The estimated gradient ``(b, c, h, w)``, with directions and guesses of this `step`."""
        total = torch.zeros_like(images)
        for pair in range(step * self.directions, (step + 1) * self.directions):
            v = (view.tape.uniform(_DIRECTION, pair, images) - 0.5).sign()
            draws = range(pair * self.eot, (pair + 1) * self.eot)
            up, down = (
                mean_over_draws(
                    OBJECTIVES[self.loss],
                    view.logits((images + sign * self.delta * v).clamp(0, 1), draws),
                    labels,
                )
                for sign in (1, -1)
            )
            total += ((up - down) / (2 * self.delta)).view(-1, 1, 1, 1) * v
        return total / self.directions
