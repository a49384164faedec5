"""Auto-PGD (Croce and Hein 2020, algorithm 1) for models with and without hidden noise."""

from collections.abc import Iterator, Sequence
from itertools import count, product
from math import ceil
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from dbp_bench.attacks.common.objectives import (
    OBJECTIVES,
    SELECTION,
    TARGETED,
    compared,
    likely_targets,
    margin,
    mean_over_draws,
    objective_of,
    surely_wrong,
    too_many_targets,
)
from dbp_bench.attacks.common.options import AnyLoss, Count, Number, checked
from dbp_bench.threat import L1, AttackerView, Budget, Evaluations, Setup
from dbp_bench.threat import budget as budget_of

MOMENTUM = 0.75
"""The weight alpha of the new step; the rest goes on in the direction of the last one."""


@checked
class APGD:
    """Steepest ascent with momentum, and step sizes that adapt to its progress.

    Progress and the best iterate are told by losses that can be compared. Where draws are hidden,
    they are means over `eot` guesses that are the same for all iterates of a run, and that no
    gradient is taken on. So luck in a draw moves the losses of all iterates alike. The best
    iterates of several runs are compared on `eot` guesses of yet another set. Where every draw is
    known, the loss of the gradient pass is exact and is used itself; an image that is misclassified
    at an iterate inside the budget is finished, and takes no part in what follows.

    An l1 budget is searched by the sparse variant (Croce and Hein 2021, "Mind the box",
    section 4), without momentum: three phases, of radius 3, 2 and 1 eps, each from the best of the
    last. It departs from the authors' code in two things, each of which brings it nearer to the
    optimum of a linear classifier: pixels that the box stops are not among those that a step
    moves, and their number is rounded down, not up.

    Args:
        steps: Gradient steps of a run.
        eot: EoT samples of each step, fresh at every step; and draws that compare iterates.
        loss: The loss that is maximised.
        rho: Halve the step size where at most this share of the steps raised the loss.
        random_start: True to start at a random point of the ball, not at the clean image.
        restarts: Runs for each target.
        targets: Target classes, the most likely wrong ones by mean logits of the clean image over
            common draws; None where the loss has no target.
    """

    retire: ClassVar[bool] = True
    """True: no more steps are spent on finished images. This is no option, since the images found
    are the same; False serves to measure the saving."""

    steps: Count = 100
    eot: Count = 10
    loss: AnyLoss = "ce"
    rho: Annotated[Number, Field(gt=0, lt=1)] = 0.75
    random_start: bool = True
    restarts: Count = 1
    targets: Count | None = None

    def __post_init__(self) -> None:
        if self.restarts > 1 and not self.random_start:
            raise ValueError("restarts: more than 1 needs random_start: true, or all are the same")
        if (self.loss in TARGETED) != (self.targets is not None):
            raise ValueError("targets: goes with a targeted loss, and is null elsewhere")

    def evaluations(self, setup: Setup) -> Evaluations:
        """The steps of all runs; forward ones order the targets and compare iterates and runs.

        Where every draw is known, the losses of the gradient evaluations are exact: only the last
        iterate takes a forward one, and misclassified images finish.
        """
        runs = self.restarts * min(self.targets or 1, max(setup.classes - 1, 1))
        searches = len(_phases(budget_of(setup.norm, setup.eps), self.steps))
        ordered = int(self.targets is not None)
        if not setup.hidden:
            return Evaluations(runs * self.steps, runs * searches + ordered, exact=False)
        compared = runs if runs > 1 else 0
        forward = runs * (self.steps + searches) + compared + ordered
        return Evaluations(runs * self.steps * self.eot, forward * self.eot, exact=True)

    def unfit(self, setup: Setup) -> str | None:
        """There must be a wrong class for each of the targets."""
        return too_many_targets("targets", self.targets or 0, setup)

    def __call__(
        self, view: AttackerView, images: Tensor, labels: Tensor, budget: Budget
    ) -> Tensor:
        """Adversarial images ``(b, c, h, w)`` in the `budget`.

        Raises:
            AttackFailed: The classifier has too few classes for the loss or for so many targets.
        """
        runs = list(product(self._targets(view, images, labels), range(self.restarts)))
        best, value = images.clone(), torch.full_like(images[:, 0, 0, 0], -torch.inf)
        left = torch.arange(len(images), device=images.device)
        for run, (targets, _) in enumerate(runs):
            if not len(left):
                break
            part, own = view[left], labels[left]
            found = self._run(part, images[left], own, targets[left], budget, run)
            if len(runs) == 1:
                return found.best
            # A misclassified image is finished: no other run can be worth more.
            worth = torch.where(found.wrong, torch.inf, self._value(part, found, own))
            better = worth > value[left]
            rows = left[better]
            best[rows], value[rows] = found.best[better], worth[better]
            if self.retire:
                left = left[~found.wrong]
        return best

    def _targets(self, view: AttackerView, images: Tensor, labels: Tensor) -> Sequence[Tensor]:
        """The target classes ``(b,)`` of each series of restarts; any for an untargeted loss."""
        if self.targets is None:
            return [labels]
        order = likely_targets(view, images, labels, self.eot)
        return order[:, : self.targets].unbind(1)

    def _value(self, view: AttackerView, found: "Search", labels: Tensor) -> Tensor:
        """The values that compare runs; losses towards different targets cannot be compared."""
        if view.deterministic:
            return found.best_loss if self.targets is None else found.best_margin
        objective = OBJECTIVES[self.loss] if self.targets is None else margin
        return compared(view, found.best, labels, objective, self.eot)

    def _run(
        self,
        view: AttackerView,
        clean: Tensor,
        labels: Tensor,
        targets: Tensor,
        budget: Budget,
        run: int,
    ) -> "Search":
        """One run from one start; an l1 budget is reached in phases."""
        eot = 1 if view.deterministic else self.eot
        draws = (range(step * eot, (step + 1) * eot) for step in count(run * self.steps))
        # Before these stand those that compare runs, and those that order targets.
        first = SELECTION + (2 + run) * eot
        comparing = range(first, first + eot)
        phases = _phases(budget, self.steps)
        start = view.random_start(clean, phases[0][0], run) if self.random_start else clean
        for ball, steps in phases:
            start, last = ball.project(start, clean), ball.eps == budget.eps
            found = self.climb(
                view, clean, labels, targets, start, ball, steps, draws, comparing, finish=last
            )
            start = found.best
        return found

    def climb(
        self,
        view: AttackerView,
        clean: Tensor,
        labels: Tensor,
        targets: Tensor,
        start: Tensor,
        budget: Budget,
        steps: int,
        draws: Iterator[range],
        comparing: range,
        *,
        finish: bool,
    ) -> "Search":
        """Algorithm 1 (Croce and Hein 2020) from `start`; its l1 variant for an l1 budget.

        It takes `steps` gradient evaluations of each image, and a forward one of the last iterate.

        Args:
            view: The view of the defense.
            clean: ``(b, c, h, w)`` in [0, 1].
            labels: ``(b,)``.
            targets: ``(b,)``, the classes that a targeted loss aims at.
            start: The first iterate ``(b, c, h, w)``, inside the budget.
            budget: The ball.
            steps: Number of steps.
            draws: The EoT samples of each step, where draws are hidden: fresh at every step.
            comparing: The guesses of every comparison in the run, which no gradient is taken on.
            finish: True if an image is finished once an iterate is misclassified, where every draw
                is known.
        """
        finish = finish and view.deterministic and view.decided_by_logits
        s = Search(clean, start, budget)
        rows = torch.arange(len(clean), device=clean.device)
        part, last = view, 0
        examined = set(checkpoints(steps, sparse=isinstance(budget, L1)))
        for step in range(steps + 1):
            # The next iterate; after the start there is no last change to go on in.
            if step:
                _move(s, clean, budget, MOMENTUM if step > 1 else 1.0)
            # The loss at the iterate, and the gradient for the next step. Where every draw is
            # known, the loss of the gradient pass is that of every other pass.
            x, own = s.x[rows], labels[rows]
            objective = objective_of(self.loss, targets[rows])
            logits = None
            if step < steps:
                ascent = part.gradient(x, own, objective, next(draws))
                s.gradient[rows] = ascent.mean
                logits = ascent.logits if view.deterministic else None
            if logits is None:
                logits = part.logits(x, comparing)
            # The best iterate yet, and the images that are finished.
            s.note(rows, mean_over_draws(objective, logits, own), logits, own, finish=finish)
            if self.retire and bool(s.wrong[rows].any()):
                rows = (~s.wrong).nonzero()[:, 0]
                if not len(rows):
                    break
                part = view[rows]
            # The step size, where this step is a checkpoint.
            if step in examined:
                if isinstance(budget, L1):
                    update_sparse_step_size(s, clean, budget.eps)
                else:
                    update_step_size(s, step - last, self.rho)
                last = step
        return s


class Search:
    """The state of a run, one row per image, and what it found."""

    def __init__(self, clean: Tensor, start: Tensor, budget: Budget) -> None:
        zeros = torch.zeros_like(clean[:, 0, 0, 0])
        sparse = isinstance(budget, L1)
        self.x = self.before = start
        """The iterate, and the one before it."""
        self.gradient = torch.zeros_like(clean)
        self.loss = zeros + torch.inf  # so that the start is no rise
        self.best, self.best_gradient = start.clone(), torch.zeros_like(clean)
        """The iterate of highest loss; where an image is finished, its first misclassified one."""
        self.best_loss, self.best_margin = zeros - torch.inf, zeros.clone()
        """Its loss and its margin, means over the draws that compare iterates."""
        self.wrong = torch.zeros_like(zeros, dtype=torch.bool)
        """True where an iterate is misclassified for certain, so that the image is finished."""
        self.step_size = zeros + (1 if sparse else 2) * budget.eps
        self.rises = zeros.clone()
        """Steps since the last checkpoint that raised the loss."""
        self.halved = ~self.wrong  # the first checkpoint asks not
        """True where the last checkpoint halved the step size."""
        self.best_then = self.best_loss.clone()
        """The best loss at the last checkpoint."""
        moved, pixels = _moved(start - clean), clean[0].numel()
        self.share = torch.where(moved > 0, moved / pixels / 1.5, 0.2)
        """Share of the pixels that an l1 step moves."""
        self.pixels_then = torch.where(moved > 0, moved, float(pixels))
        """Pixels that the best iterate had moved at the last checkpoint (l1)."""

    def note(
        self, rows: Tensor, loss: Tensor, logits: Tensor, labels: Tensor, *, finish: bool
    ) -> None:
        """Note the `loss` of the iterates of these `rows`, and which of them are the best yet."""
        self.rises[rows] += loss > self.loss[rows]
        self.loss[rows] = loss
        better = loss > self.best_loss[rows]
        if finish:
            wrong = surely_wrong(logits[:, 0], labels) & ~self.wrong[rows]
            better = wrong | (better & ~self.wrong[rows])
            self.wrong[rows] |= wrong
        best = rows[better]
        self.best[best], self.best_gradient[best] = self.x[best], self.gradient[best]
        self.best_loss[best] = loss[better]
        self.best_margin[best] = mean_over_draws(margin, logits, labels)[better]

    def return_to_best(self, rows: Tensor) -> None:
        """Go on from the best iterate in the images of the mask `rows`."""
        self.x = torch.where(_wide(rows, self.x), self.best, self.x)
        self.gradient = torch.where(_wide(rows, self.x), self.best_gradient, self.gradient)


def _move(s: Search, clean: Tensor, budget: Budget, momentum: float) -> None:
    """The next iterate: a projected gradient step, mixed with the last change (lines 7 and 8)."""
    step = _wide(s.step_size, clean)
    if isinstance(budget, L1):
        outward = ((s.x <= 0) & (s.gradient < 0)) | ((s.x >= 1) & (s.gradient > 0))
        ascent = budget.sparse(s.gradient.masked_fill(outward, 0), s.share)
        new = budget.project(s.x + step * ascent, clean)
    else:
        aim = budget.project(s.x + step * budget.ascent(s.gradient), clean)
        change = s.x - s.before
        mixed = s.x + (aim - s.x) * momentum + change * (1 - momentum)
        new = budget.project(mixed, clean)
    s.before, s.x = s.x, new


def update_step_size(s: Search, interval: int, rho: float) -> None:
    """Halve the step size, and go back to the best, where there is too little progress (line 15).

    Condition 1: at most `rho` of the steps of the interval raised the loss. Condition 2: the step
    size stayed at the last checkpoint, and no better iterate was found since.
    """
    few = s.rises <= rho * interval
    stuck = ~s.halved & (s.best_loss <= s.best_then)
    s.halved = few | stuck
    s.step_size = torch.where(s.halved, s.step_size / 2, s.step_size)
    s.return_to_best(s.halved)
    s.best_then, s.rises = s.best_loss.clone(), torch.zeros_like(s.rises)


def update_sparse_step_size(s: Search, clean: Tensor, eps: float) -> None:
    """Adapt the number of pixels of a step, and the step size (Croce and Hein 2021, algorithm 1).

    Steps move as many pixels as the best iterate moved, over 1.5. Where that number still falls by
    more than 5 %, the step size starts anew at eps, from the best; else it shrinks by 1.5, to eps /
    10 at least.
    """
    pixels = _moved(s.best - clean)
    sparser = pixels / s.pixels_then < 0.95
    s.share = pixels / clean[0].numel() / 1.5
    s.step_size = torch.where(sparser, eps, s.step_size / 1.5).clamp(eps / 10, eps)
    s.pixels_then = pixels
    s.return_to_best(sparser)


def checkpoints(steps: int, *, sparse: bool = False) -> Iterator[int]:
    """The numbers of steps after which the step size is examined (Croce and Hein 2020, 3.2).

    At ``p_j * steps`` with p_1 = 0.22 and p_(j+1) - p_j = max(p_j - p_(j-1) - 0.03, 0.06), each
    interval rounded down, as in the authors' code; in the `sparse` search every 0.04 of the steps.
    """
    interval, at = max(int((0.04 if sparse else 0.22) * steps), 1), 0
    while (at := at + interval) <= steps:
        yield at
        if not sparse:
            interval = max(interval - max(int(0.03 * steps), 1), int(0.06 * steps), 1)


def _phases(budget: Budget, steps: int) -> list[tuple[Budget, int]]:
    """The balls that a run searches in turn, and the steps in each.

    Only an l1 ball is reached from larger ones, and only where the steps suffice.
    """
    each = ceil(0.3 * steps)
    if not isinstance(budget, L1) or 2 * each >= steps:
        return [(budget, steps)]
    larger = [(L1(factor * budget.eps), each) for factor in (3.0, 2.0)]
    return [*larger, (budget, steps - 2 * each)]


def _moved(change: Tensor) -> Tensor:
    """The number ``(b,)`` of pixels that differ from the clean image."""
    return (change != 0).flatten(1).sum(1).to(change)


def _wide(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))
