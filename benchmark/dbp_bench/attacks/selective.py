"""Gradient ascent that averages only the draws which one direction can win together.

In the spirit of DiffHammer (Wang et al., NeurIPS 2024): where the draws of a purifier do not share
a weakness, the plain mean over draws follows a direction that serves none of them, and it is better
to choose, by expectation maximisation, those that share one.

This is no reimplementation. As in the released code, a draw weighs the sigmoid of the loss that one
direction promises at it. Otherwise: every draw has its own exact gradient, at the cost of plain
averaging, where the release chooses by gradients at the purified image and then goes back through
one draw of the purifier (gradient grafting); the direction follows the weights from round to round,
where the release keeps the first; the first direction is chosen by the number of draws that it
promises to win, where the release adds up losses, which one large loss can decide; and there is no
average over steps. Whether the paper's text agrees with its release could not be settled.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from dbp_bench.attacks.common.objectives import OBJECTIVES
from dbp_bench.attacks.common.options import Count, Loss, Number, StepSize, checked
from dbp_bench.threat import AttackerView, Budget, Evaluations, Setup


@checked
class Selective:
    """PGD without restarts, whose mean over draws is weighted; see :func:`shares`.

    The draws of each step are fresh, and each is a pass of its own. Where every draw is known, or
    there is one, this is PGD.

    Args:
        steps: Gradient steps.
        step_size: Length of a step, relative to eps.
        eot: EoT samples of each step, of which some are chosen.
        loss: The loss that is maximised. The margin fits: it is above 0 where a draw is won.
        sharpness: The strictness of the choice of draws, per unit of loss; 0 is the plain mean.
        rounds: Rounds of expectation maximisation per step, which take no pass.
    """

    steps: Count = 20
    step_size: StepSize = 0.25
    eot: Count = 10
    loss: Loss = "margin"
    sharpness: Annotated[Number, Field(ge=0, le=1e3)] = 1.0
    rounds: Count = 3

    def evaluations(self, setup: Setup) -> Evaluations:
        """Its steps, each at all of their EoT samples."""
        return Evaluations(self.steps * (self.eot if setup.hidden else 1), 0, exact=True)

    def unfit(self, setup: Setup) -> None:
        """It fits everywhere."""

    def __call__(
        self, view: AttackerView, images: Tensor, labels: Tensor, budget: Budget
    ) -> Tensor:
        """Adversarial images ``(b, c, h, w)`` in the `budget`."""
        found, objective = images, OBJECTIVES[self.loss]
        eot = 1 if view.deterministic else self.eot
        for step in range(self.steps):
            draws = range(step * eot, (step + 1) * eot)
            each = [view.gradient(found, labels, objective, [draw]) for draw in draws]
            gradients = torch.stack([one.mean for one in each])
            losses = torch.cat([one.losses for one in each], 1).T
            weights = shares(gradients, losses, budget, self.sharpness, self.rounds)
            ascent = budget.ascent(_mean(weights, gradients))
            found = budget.project(found + self.step_size * budget.eps * ascent, images)
        return found


def shares(
    gradients: Tensor, losses: Tensor, budget: Budget, sharpness: float, rounds: int
) -> Tensor:
    """The weight ``(draws, b)`` of each draw; over the draws, weights add up to 1.

    The likelihood to be raised is the share of draws that are won, a draw at the loss ``l`` with
    probability ``sigmoid(sharpness * l)``. Expectation: a draw weighs this probability at the loss
    that a whole step of eps in the common direction promises, to first order. Maximisation: the
    common direction is the steepest ascent of the weighted mean. It starts as the direction of the
    one draw that promises most.

    Args:
        gradients: The gradients at each draw, ``(draws, b, c, h, w)``.
        losses: The losses at each draw, ``(draws, b)``.
        budget: The ball, whose norm decides the steepest direction and whose eps the distance.
        sharpness: The strictness of the choice; 0 weighs all draws alike.
        rounds: The number of rounds of both steps.
    """

    def won(common: Tensor) -> Tensor:
        """The log-probability ``(draws, b)`` that each draw is won along the ascent of `common`."""
        ascent = budget.ascent(common)
        gains = torch.stack([(one * ascent).flatten(1).sum(1) for one in gradients])
        return F.logsigmoid(sharpness * (losses + budget.eps * gains))

    starts = torch.stack([won(one).logsumexp(0) for one in gradients]).argmax(0)
    common = gradients[starts, torch.arange(len(starts), device=starts.device)]
    for _ in range(rounds):
        weights = won(common).softmax(0)
        common = _mean(weights, gradients)
    return weights


def _mean(weights: Tensor, gradients: Tensor) -> Tensor:
    """The weighted mean ``(b, c, h, w)``."""
    return (weights[:, :, None, None, None] * gradients).sum(0)
