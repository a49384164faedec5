"""Gradient ascent that averages only the draws which one direction can attack together.

In the spirit of DiffHammer (Wang et al., NeurIPS 2024): where the draws of a purifier do not share
a weakness, the plain mean over draws follows a direction that serves none of them, and it is better
to choose, by expectation maximisation, those that share one.

What could not be settled, so that this is not a reimplementation: the exact distribution of the
paper's expectation step and how it treats draws that are already wrong. Its gradient grafting,
which averages at the classifier and then goes back through one draw of the purifier, is left out:
every draw here has its own exact gradient, at the cost of plain averaging.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dbp_bench.attacks.objectives import OBJECTIVES
from dbp_bench.threat import AttackerView, Budget


@dataclass(frozen=True, slots=True)
class Selective:
    """PGD without restarts, whose mean over draws is weighted; see :func:`agreement`.

    The draws of each step are fresh, and each is a pass of its own. Where every draw is known, or
    there is one, this is PGD.

    Args:
        steps: Gradient steps.
        step_size: Length of a step, relative to eps.
        eot: Gradient draws of each step.
        loss: One of :data:`dbp_bench.attacks.objectives.OBJECTIVES`.
        sharpness: How strictly draws are chosen; 0 is the plain mean.
        rounds: Rounds of expectation maximisation per step, which take no pass.
    """

    steps: int
    step_size: float
    eot: int
    loss: str = "ce"
    sharpness: float = 10.0
    rounds: int = 3

    def __call__(
        self, view: AttackerView, images: Tensor, labels: Tensor, budget: Budget
    ) -> Tensor:
        """Adversarial images ``(b, c, h, w)`` in the `budget`."""
        found, objective = images, OBJECTIVES[self.loss]
        eot = 1 if view.deterministic else self.eot
        for step in range(self.steps):
            draws = range(step * eot, (step + 1) * eot)
            each = torch.stack(
                [view.gradient(found, labels, objective, [draw]).mean for draw in draws]
            )
            weights = agreement(each, budget, self.sharpness, self.rounds)
            ascent = budget.ascent(_mean(weights, each))
            found = budget.project(found + self.step_size * budget.eps * ascent, images)
        return found


def agreement(each: Tensor, budget: Budget, sharpness: float, rounds: int) -> Tensor:
    """How much each draw counts ``(draws, b)``; over the draws, weights add up to 1.

    Maximisation: the common direction is the steepest ascent of the weighted mean. Expectation: a
    draw weighs ``exp(sharpness * gain)``, where its gain, in [-1, 1], is how much the common
    direction of all *other* draws raises its loss, to first order, relative to its own best
    direction. A draw has no say on itself: of 10 draws that have nothing in common, each would
    agree with a mean that holds a tenth of it.

    Args:
        each: The gradient at each draw, ``(draws, b, c, h, w)``.
        budget: Whose norm decides which direction is steepest.
        sharpness: 0 weighs all alike.
        rounds: Of both steps, from equal weights.
    """
    draws = len(each)
    weights = each.new_full(each.shape[:2], 1 / draws)
    own = torch.stack([_dot(one, budget.ascent(one)) for one in each]).clamp(min=1e-30)
    for _ in range(rounds if draws > 1 else 0):
        whole = _mean(weights, each)
        others = (whole - _per_draw(weight, one) for weight, one in zip(weights, each, strict=True))
        gains = [_dot(one, budget.ascent(rest)) for one, rest in zip(each, others, strict=True)]
        weights = torch.softmax(sharpness * torch.stack(gains) / own, dim=0)
    return weights


def _mean(weights: Tensor, each: Tensor) -> Tensor:
    """The weighted mean ``(b, c, h, w)``."""
    return torch.stack([_per_draw(w, one) for w, one in zip(weights, each, strict=True)]).sum(0)


def _per_draw(weight: Tensor, one: Tensor) -> Tensor:
    return weight.view(-1, 1, 1, 1) * one


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)
