"""Auto-PGD (Croce and Hein 2020, algorithm 1) for models with and without hidden noise."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import product
from math import ceil
from typing import Annotated, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from dbp_bench.attacks.common.objectives import (
    OBJECTIVES,
    TARGETED,
    Towards,
    likely_targets,
    margin,
    mean_over_draws,
    surely_wrong,
    too_many_targets,
)
from dbp_bench.attacks.common.options import AnyLoss, Count, Number, checked
from dbp_bench.attacks.pgd import SELECTION
from dbp_bench.threat import L1, AttackerView, Budget, Evaluations, Objective, Setup

MOMENTUM = 0.75
"""Share of the new step; the rest goes on in the direction of the last one (alpha)."""

_PHASES = ((3.0, 0.3), (2.0, 0.3), (1.0, 0.4))
"""The phases of an l1 search: the radius, relative to eps, and the share of the steps."""


class Found(NamedTuple):
    """What one run of the search found."""

    images: Tensor
    """``(b, c, h, w)``: the iterate of highest loss."""
    losses: Tensor
    """``(b,)``: its loss, the mean over the draws that compare iterates."""
    margins: Tensor
    """``(b,)``: its mean margin over the same draws."""
    wrong: Tensor
    """``(b,)``: whether an iterate is misclassified for certain; never where draws are hidden."""
    first_wrong: Tensor
    """``(b, c, h, w)``: the first such iterate, the start where there is none."""


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
        loss: What is maximised.
        rho: Halve the step size where less than this share of the steps raised the loss.
        random_start: Whether to start at a random point of the ball, not at the clean image.
        restarts: Runs for each target.
        targets: Target classes, the most likely wrong ones by mean logits of the clean image over
            common draws; None where the loss has no target.
    """

    retire: ClassVar[bool] = True
    """Whether finished images stop. It is no option, since the images found are the same: False is
    for measuring what it saves."""

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
        searches = len(_phases(setup.norm == "l1", self.steps))
        ordered = int(self.targets is not None)
        if not setup.hidden:
            return Evaluations(runs * self.steps, runs * searches + ordered, exact=False)
        compared = runs if runs > 1 else 0
        forward = runs * (self.steps + searches) + compared + ordered
        return Evaluations(runs * self.steps * self.eot, forward * self.eot, exact=True)

    def unfit(self, setup: Setup) -> str | None:
        """Whether there is a wrong class for each of the targets."""
        return too_many_targets("targets", self.targets or 0, setup)

    def __call__(
        self, view: AttackerView, images: Tensor, labels: Tensor, budget: Budget
    ) -> Tensor:
        """Adversarial images ``(b, c, h, w)`` in the `budget`.

        Raises:
            AttackFailed: The classifier has too few classes for the loss or for so many targets.
        """
        targets = self._targets(view, images, labels)
        runs = list(product(targets, range(self.restarts)))
        out, done = images.clone(), torch.zeros(len(images), dtype=torch.bool, device=images.device)
        best = torch.full((len(images),), -torch.inf, dtype=images.dtype, device=images.device)
        for run, (target, _) in enumerate(runs):
            going = ~done if self.retire else torch.ones_like(done)
            rows = going.nonzero()[:, 0]
            if not len(rows):
                break
            part, clean, own = view[rows], images[rows], labels[rows]
            loss = self._loss(None if target is None else target[rows])
            found = self._run(part, clean, own, budget, loss, run)
            value = best[rows] + 1 if len(runs) == 1 else self._value(part, found, own)
            take = ~done[rows] & (found.wrong | (value > best[rows]) | (len(runs) == 1))
            chosen = torch.where(_wide(found.wrong, clean), found.first_wrong, found.images)
            out[rows[take]], best[rows[take]] = chosen[take], value[take]
            done[rows] |= found.wrong
        return out

    def _targets(
        self, view: AttackerView, images: Tensor, labels: Tensor
    ) -> Sequence[Tensor | None]:
        """The target classes ``(b,)`` of each series of restarts."""
        if self.targets is None:
            return [None]
        draws = range(SELECTION + self.eot, SELECTION + 2 * self.eot)
        order = likely_targets(view, images, labels, draws)
        return list(order[:, : self.targets].unbind(1))

    def _loss(self, targets: Tensor | None) -> Objective:
        return OBJECTIVES[self.loss] if targets is None else Towards(TARGETED[self.loss], targets)

    def _value(self, view: AttackerView, found: Found, labels: Tensor) -> Tensor:
        """The values that compare runs; losses towards different targets cannot be compared."""
        if view.deterministic:
            return found.losses if self.targets is None else found.margins
        logits = view.logits(found.images, range(SELECTION, SELECTION + self.eot))
        objective = OBJECTIVES[self.loss] if self.targets is None else margin
        return mean_over_draws(objective, logits, labels)

    def _run(
        self,
        view: AttackerView,
        clean: Tensor,
        labels: Tensor,
        budget: Budget,
        loss: Objective,
        run: int,
    ) -> Found:
        """One run from one start; an l1 budget is reached in phases."""
        first = run * self.steps
        phases = [
            (L1(factor * budget.eps) if isinstance(budget, L1) else budget, steps)
            for factor, steps in _phases(isinstance(budget, L1), self.steps)
        ]
        start = view.random_start(clean, phases[0][0], run) if self.random_start else clean
        for ball, steps in phases:
            draws = Draws(self.eot, first, (2 + run) * self.eot)
            inside = ball.eps == budget.eps
            found = climb(
                view,
                clean,
                labels,
                ball.project(start, clean),
                ball,
                loss,
                steps=steps,
                rho=self.rho,
                draws=draws,
                finish=inside,
                retire=inside and self.retire,
            )
            start, first = found.images, first + steps
        return found


def _phases(sparse: bool, steps: int) -> list[tuple[float, int]]:
    """The radii, relative to eps, that a run searches in turn, and the steps at each.

    Only an l1 ball (`sparse`) is reached from larger ones, and only where the steps suffice.
    """
    lengths = [ceil(share * steps) for _, share in _PHASES[:-1]]
    if not sparse or sum(lengths) >= steps:
        return [(1.0, steps)]
    lengths.append(steps - sum(lengths))
    return [(factor, length) for (factor, _), length in zip(_PHASES, lengths, strict=True)]


@dataclass(frozen=True, slots=True)
class Draws:
    """The guesses that a run uses where draws are hidden."""

    eot: int
    first: int
    """Number of the run's first gradient step; each has draws of its own."""
    comparison: int
    """Where the draws that compare its iterates begin, above :data:`SELECTION`."""

    def gradient(self, step: int) -> range:
        """The EoT samples of the gradient of this step of the run."""
        return range((self.first + step) * self.eot, (self.first + step + 1) * self.eot)

    @property
    def comparing(self) -> range:
        """The guesses of every comparison in the run."""
        start = SELECTION + self.comparison
        return range(start, start + self.eot)


def checkpoints(steps: int) -> Iterator[int]:
    """After how many steps the progress is examined (Croce and Hein 2020, section 3.2).

    At ``p_j * steps`` with p_1 = 0.22 and p_(j+1) - p_j = max(p_j - p_(j-1) - 0.03, 0.06), each
    interval rounded down, as in the authors' code.
    """
    interval, at = max(int(0.22 * steps), 1), 0
    while (at := at + interval) <= steps:
        yield at
        interval = max(interval - max(int(0.03 * steps), 1), int(0.06 * steps), 1)


@dataclass(slots=True, eq=False)
class _State:
    """The state of a run, one row per image that is still in it."""

    rows: Tensor
    x: Tensor
    before: Tensor
    """The iterate before `x`."""
    gradient: Tensor
    loss: Tensor
    best: Tensor
    best_gradient: Tensor
    best_loss: Tensor
    best_margin: Tensor
    step: Tensor
    """Step size."""
    rises: Tensor
    """Steps since the last checkpoint that raised the loss."""
    halved: Tensor
    """Whether the last checkpoint halved the step size."""
    best_then: Tensor
    """The best loss at the last checkpoint."""
    share: Tensor
    """Share of the pixels that an l1 step moves."""
    pixels_then: Tensor
    """Pixels that the best iterate had moved at the last checkpoint (l1)."""

    def keep(self, rows: Tensor) -> None:
        """Keep only the images of the mask `rows`."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name)[rows])


def climb(
    view: AttackerView,
    clean: Tensor,
    labels: Tensor,
    start: Tensor,
    budget: Budget,
    loss: Objective,
    *,
    steps: int,
    rho: float,
    draws: Draws,
    finish: bool,
    retire: bool,
) -> Found:
    """One run of algorithm 1 (Croce and Hein 2020) from `start`; its l1 variant for an l1 budget.

    It takes `steps` gradient evaluations of each image, and a forward one of the last iterate.

    Args:
        view: The view of the defense.
        clean: ``(b, c, h, w)`` in [0, 1].
        labels: ``(b,)``.
        start: The first iterate ``(b, c, h, w)``, inside the budget.
        budget: The ball.
        loss: To maximise; a :class:`Towards` holds a target for each image.
        steps: Number of steps.
        rho: See :class:`APGD`.
        draws: The guesses where draws are hidden.
        finish: Whether to note misclassified iterates, where every draw is known.
        retire: Whether to stop an image there.
    """
    sparse = budget if isinstance(budget, L1) else None
    finish = finish and view.deterministic and view.decided_by_logits
    found = Found(
        start.clone(),
        torch.zeros_like(clean[:, 0, 0, 0]),
        torch.zeros_like(clean[:, 0, 0, 0]),
        torch.zeros(len(clean), dtype=torch.bool, device=clean.device),
        start.clone(),
    )
    s = _begin(clean, start, budget)
    examined = set(checkpoints(steps))
    if sparse is not None:
        every = max(int(0.04 * steps), 1)
        examined = set(range(every, steps + 1, every))
    interval = last_checkpoint = 0
    for step in range(steps + 1):
        if step:
            _move(s, clean[s.rows], budget, MOMENTUM if step > 1 else 1.0)
        objective = Towards(loss.loss, loss.targets[s.rows]) if isinstance(loss, Towards) else loss
        wrong = _evaluate(s, view, labels, objective, draws, step, gradient=step < steps)
        if finish:
            fresh = wrong & ~found.wrong[s.rows]
            found.first_wrong[s.rows[fresh]] = s.x[fresh]
            found.wrong[s.rows] |= wrong
            if retire and bool(wrong.any()):
                for kept, value in (
                    (found.images, s.best),
                    (found.losses, s.best_loss),
                    (found.margins, s.best_margin),
                ):
                    kept[s.rows[wrong]] = value[wrong]
                s.keep(~wrong)
                view = view[~wrong]
                if not len(s.rows):
                    return found
        if step in examined:
            interval, last_checkpoint = step - last_checkpoint, step
            if sparse is not None:
                _resparsify(s, clean[s.rows], sparse.eps)
            else:
                _examine(s, interval, rho)
    found.images[s.rows] = s.best
    found.losses[s.rows] = s.best_loss
    found.margins[s.rows] = s.best_margin
    return found


def _begin(clean: Tensor, start: Tensor, budget: Budget) -> _State:
    zeros = torch.zeros_like(clean[:, 0, 0, 0])
    moved, pixels = _moved(start - clean), clean[0].numel()
    return _State(
        rows=torch.arange(len(clean), device=clean.device),
        x=start,
        before=start,
        gradient=torch.zeros_like(clean),
        loss=zeros - torch.inf,
        best=start,
        best_gradient=torch.zeros_like(clean),
        best_loss=zeros - torch.inf,
        best_margin=zeros,
        step=zeros + (1 if isinstance(budget, L1) else 2) * budget.eps,
        rises=zeros,
        halved=torch.ones_like(zeros, dtype=torch.bool),  # the first checkpoint asks not
        best_then=zeros - torch.inf,
        share=torch.where(moved > 0, moved / pixels / 1.5, 0.2),
        pixels_then=torch.where(moved > 0, moved, float(pixels)),
    )


def _move(s: _State, clean: Tensor, budget: Budget, momentum: float) -> None:
    """The next iterate: a projected gradient step, mixed with the last change (lines 7 and 8)."""
    step = _wide(s.step, clean)
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


def _evaluate(
    s: _State,
    view: AttackerView,
    labels: Tensor,
    objective: Objective,
    draws: Draws,
    step: int,
    *,
    gradient: bool,
) -> Tensor:
    """Note loss, gradient and best iterate; which images ``(b,)`` are wrong at their first draw."""
    own = labels[s.rows]
    known = view.deterministic
    logits = None
    if gradient:
        asked = draws.gradient(step)
        found = view.gradient(s.x, own, objective, asked[:1] if known else asked)
        s.gradient = found.mean
        logits = found.logits if known else None
    if logits is None:
        logits = view.logits(s.x, draws.comparing[:1] if known else draws.comparing)
    loss = mean_over_draws(objective, logits, own)
    s.rises = s.rises + (loss > s.loss).to(s.rises) * (step > 0)
    s.loss = loss
    better = loss > s.best_loss
    s.best = torch.where(_wide(better, s.x), s.x, s.best)
    s.best_gradient = torch.where(_wide(better, s.x), s.gradient, s.best_gradient)
    s.best_margin = torch.where(better, mean_over_draws(margin, logits, own), s.best_margin)
    s.best_loss = torch.where(better, loss, s.best_loss)
    return surely_wrong(logits[:, 0], own)


def _examine(s: _State, interval: int, rho: float) -> None:
    """Halve the step size, and go back to the best, where there is too little progress (line 15).

    Condition 1: less than `rho` of the steps of the interval raised the loss. Condition 2: the step
    size stayed at the last checkpoint, and no better iterate was found since.
    """
    few = s.rises <= rho * interval
    stuck = ~s.halved & (s.best_loss <= s.best_then)
    s.halved = few | stuck
    s.best_then = s.best_loss
    s.rises = torch.zeros_like(s.rises)
    s.step = torch.where(s.halved, s.step / 2, s.step)
    _return_to_best(s, s.halved)


def _resparsify(s: _State, clean: Tensor, eps: float) -> None:
    """Adapt the number of pixels of a step, and the step size (Croce and Hein 2021, algorithm 1).

    Steps move as many pixels as the best iterate moved, over 1.5. Where that number still falls by
    more than 5 %, the step size starts anew at eps, from the best; else it shrinks by 1.5, to eps /
    10 at least.
    """
    pixels = _moved(s.best - clean)
    sparser = pixels / s.pixels_then < 0.95
    s.share = pixels / clean[0].numel() / 1.5
    s.step = torch.where(sparser, eps, s.step / 1.5).clamp(eps / 10, eps)
    s.pixels_then = pixels
    _return_to_best(s, sparser)


def _return_to_best(s: _State, rows: Tensor) -> None:
    s.x = torch.where(_wide(rows, s.x), s.best, s.x)
    s.gradient = torch.where(_wide(rows, s.x), s.best_gradient, s.gradient)


def _moved(change: Tensor) -> Tensor:
    """How many pixels ``(b,)`` differ from the clean image."""
    return (change != 0).flatten(1).sum(1).to(change)


def _wide(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))
