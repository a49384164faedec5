"""The standard attack: one budget of gradient evaluations, spent as what is known allows.

What AutoAttack (Croce and Hein 2020) is for deterministic classifiers: no option but the budget.
Its constants were chosen on images that no table is made of; see docs/protocol.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dbp_bench.attacks.common.objectives import (
    SELECTION,
    cross_entropy,
    log_odds,
    margin,
    objective_of,
    ordered_targets,
    surely_wrong,
)
from dbp_bench.attacks.common.options import Count, checked
from dbp_bench.attacks.square import Square
from dbp_bench.threat import L2, AttackerView, Budget, Evaluations, Linf, Objective, Setup

TARGETS = 5
"""Wrong classes to aim at, at most, where every draw is known."""
LAST_LEG = 0.4
"""The share of the budget that the last leg takes there, which begins at the best image so far."""
SAMPLES = 2
"""EoT samples of each step where a draw is hidden."""
LONGEST, LONGEST_PARTLY = 2.0, 10.0
"""The most that a gradient of the log-odds counts, relative to the median length of those so far:
where every draw is hidden, and where a part is known."""
MOMENTUM = 0.8
"""The share of the running mean gradient that a step keeps where a draw is hidden."""
FIRST, FIRST_AGAIN, LAST_KNOWN, LAST_HIDDEN = 2.0, 0.5, 0.02, 0.01
"""Lengths of the first and the last step of a search, relative to eps; `FIRST_AGAIN` is that of the
first step from the best image so far."""
RANGE = 20.0
"""The range that the logits of a clean image are scaled to, where a draw is hidden: log-odds, and
what they rank, must not depend on the scale that a classifier happens to have."""
WINDOW, EASE = 20, 5.0
"""Where a draw is hidden, an image is finished when its last 20 draws were all misclassified, with
log-odds of being wrong that have a mean of more than 5 standard deviations."""
SHORTEST = 10
"""Steps of a leg, at least."""
LONG = 800
"""The budget from which on half of it goes to one guess, where a part of the draws is known."""


@checked
class Standard:
    """Steepest ascent from the clean image, with steps that fall from the ball's diameter to 0.

    Where every draw is known, the defense is deterministic: the first leg maximises the
    cross-entropy, and each further leg the margin of one likely wrong class over the label
    (MultiTargeted, Gowal et al. 2019, arXiv 1910.09338). The last leg begins at the iterate of
    largest margin so far, and maximises the margin of whichever wrong class is ahead, with shorter
    steps. An image that is misclassified for certain is finished; of the others, the iterate of
    largest margin counts.

    Where a draw is hidden, each step follows a running mean of gradients (momentum, Dong et al.
    2018) over two fresh EoT samples, and maximises a smooth error rate: the mean over the samples
    of ``sigmoid(z / T)``, where z is the log-odds of being wrong, by logits whose range on the
    clean image is scaled to 20, and T the standard deviation of those that the image has met. The
    first step takes a tenth of the budget, for it decides in which direction the search sets out. A
    sample whose gradient of the log-odds is longer than twice the median so far (ten times, where a
    part of the draws is known) counts as if it were no longer, so that gradients that explode in
    some draws don't outweigh all others. The last iterate counts.

    Where a part of the draws is known and the budget is 800 or more, this search takes a quarter of
    it. Half of it is a search as if every draw were known, with the hidden draws those of one
    guess, for where these hardly matter a search without noise climbs further. The last quarter is
    the search over fresh samples again, from that of both images which 20 further guesses
    misclassify more, with steps that fall from eps / 2.

    Where a defense masks its gradient, steps lead nowhere: images whose gradient was zero at every
    step are searched by Square (Andriushchenko et al. 2020), which sees logits alone, with as many
    queries. The record says which images these are.

    Args:
        budget: Gradient evaluations of each image, for each known draw.
    """

    without_gradient: ClassVar[bool] = True
    """It searches on where every gradient is zero."""

    budget: Count = 200

    def evaluations(self, setup: Setup) -> Evaluations:
        """The budget at most, and forward evaluations: known draws finish images."""
        masked = self._square.evaluations(setup) if setup.norm != "l1" else Evaluations(0, 0, True)
        legs = 1 + len(_legs(self.budget, setup.classes - 1))
        if not setup.hidden:
            own = Evaluations(self.budget, legs, False)
        elif self.budget < LONG:
            own = Evaluations(sum(_plan(self.budget)), 1, exact=False)
        else:
            own = Evaluations(self.budget, legs + 3 + 2 * WINDOW, exact=False)
        return own + masked

    @property
    def _square(self) -> Square:
        return Square(n_queries=self.budget, eot=SAMPLES)

    def unfit(self, setup: Setup) -> str | None:
        """A budget of one evaluation is too small where a draw is hidden."""
        if setup.hidden and self.budget < SAMPLES:
            return f"budget: {self.budget}, but a step takes {SAMPLES} gradient evaluations"
        return None

    def __call__(
        self, view: AttackerView, images: Tensor, labels: Tensor, budget: Budget
    ) -> Tensor:
        """Adversarial images ``(b, c, h, w)`` in the `budget`."""
        search = self._known if view.deterministic else self._hidden
        found = search(view, images, labels, budget)
        masked = ~view.log.nonzero & (view.log.gradient > 0)
        if bool(masked.any()) and isinstance(budget, Linf | L2):
            rows = masked.to(images.device)
            found[rows] = self._square(view[masked], images[rows], labels[rows], budget)
        return found

    # ------------------------------------------------------------------- a draw is hidden

    def _hidden(self, view: AttackerView, images: Tensor, labels: Tensor, budget: Budget) -> Tensor:
        if view.blind or self.budget < LONG:
            plan = _plan(self.budget)
            return _follow(view, images, images, labels, budget, plan)[0]
        before, at_guess, after = _parts(self.budget)
        found, finished = _follow(view, images, images, labels, budget, _plan(before))
        left = ~finished
        if not bool(left.any()):
            return found
        part, clean, own, x = view[left], images[left], labels[left], found[left]
        other = _search(part.supposing(before), clean, own, budget, at_guess)
        better = _errs_more(part, other, x, own)
        x = torch.where(better[:, None, None, None], other, x)
        plan = [SAMPLES] * (after // SAMPLES)
        found[left] = _follow(part, x, clean, own, budget, plan, FIRST_AGAIN, before + 1)[0]
        return found

    # ------------------------------------------------------------------- every draw is known

    def _known(self, view: AttackerView, images: Tensor, labels: Tensor, budget: Budget) -> Tensor:
        return _search(view, images, labels, budget, self.budget)


def _follow(
    view: AttackerView,
    start: Tensor,
    images: Tensor,
    labels: Tensor,
    budget: Budget,
    plan: Sequence[int],
    first: float = FIRST,
    guess: int = 0,
) -> tuple[Tensor, Tensor]:
    """Follow the running mean of gradients at fresh guesses, from `start`.

    Args:
        view: The view of a defense with draws that are hidden.
        start: Where the search sets out, ``(b, c, h, w)``.
        images: The clean images ``(b, c, h, w)``.
        labels: ``(b,)``.
        budget: The ball around the clean images.
        plan: EoT samples of each step.
        first: The length of the first step, relative to eps.
        guess: The number of the first guess.

    Returns:
        The last iterates ``(b, c, h, w)``, and True ``(b,)`` where an image was finished.
    """
    found, rows = start.clone(), torch.arange(len(images), device=images.device)
    done = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    x, mean = start, torch.zeros_like(images)
    odds = lengths = images.new_empty(len(images), 0)
    wrong = torch.empty_like(odds, dtype=torch.bool)
    factor = _factor(view.logits(images, [0])[:, 0])
    error: SmoothError | None = None
    for step, samples in enumerate(plan):
        part, own = view[rows], labels[rows]
        gradient = torch.zeros_like(x)
        for _ in range(samples):
            draw = guess + odds.shape[1]
            seen = part.gradient(x, own, Scaled(error or log_odds, factor), [draw])
            logits = factor[:, None] * seen.logits[:, 0]
            met = log_odds(logits, own)
            odds = torch.cat([odds, met[:, None]], 1)
            wrong = torch.cat([wrong, (margin(logits, own) > 0)[:, None]], 1)
            # How long the gradient of the log-odds themselves is.
            length = torch.linalg.vector_norm(seen.mean, dim=(1, 2, 3))
            length = length / error.slope(met) if error else length
            lengths = torch.cat([lengths, length[:, None]], 1)
            counts = _shorter(lengths, LONGEST if view.blind else LONGEST_PARTLY)
            gradient += seen.mean * counts[:, None, None, None] / samples
        # A step along the running mean of the gradients, projected. The first gradient is that of
        # the log-odds themselves, unscaled, so that it weighs on the steps that follow.
        mean = MOMENTUM * mean + (1 - MOMENTUM) * gradient if step else gradient
        size = _falling(first, LAST_HIDDEN, step, len(plan)) * budget.eps
        ahead = budget.project(x + size * budget.ascent(mean), images[rows])
        # An image that its last draws misclassified with ease is finished, where it stands.
        finished = _lost(odds, wrong) & view.decided_by_logits
        found[rows] = torch.where(finished[:, None, None, None], x, ahead)
        done[rows] = finished
        left = ~finished
        state = (rows, ahead, mean, odds, lengths, wrong, factor)
        rows, x, mean, odds, lengths, wrong, factor = (each[left] for each in state)
        if not len(rows):
            break
        # The temperature is the scale of all log-odds met so far.
        error = SmoothError(_scale(odds))
    return found, done


def _search(
    view: AttackerView, images: Tensor, labels: Tensor, budget: Budget, evaluations: int
) -> Tensor:
    """The images ``(b, c, h, w)`` of largest margin in all legs, where every draw is known."""
    logits = view.logits(images, [0])[:, 0]
    targets = ordered_targets(logits, labels)
    found, best = images.clone(), _value(view, logits, labels)
    for leg in _legs(evaluations, targets.shape[1]):
        rows = (best < torch.inf).nonzero()[:, 0]
        x = (found if leg.goes_on else images)[rows]
        for step in range(leg.steps + 1):
            if not len(rows):
                return found
            part, own = view[rows], labels[rows]
            if step < leg.steps:
                seen = part.gradient(x, own, leg.objective(targets[rows]), [0])
                logits = seen.logits[:, 0]
            else:
                logits = part.logits(x, [0])[:, 0]
            # The iterate of largest margin is kept; a misclassified one finishes the image.
            value = _value(view, logits, own)
            better = value > best[rows]
            found[rows[better]], best[rows[better]] = x[better], value[better]
            left = value < torch.inf
            if step < leg.steps:
                first = FIRST_AGAIN if leg.goes_on else FIRST
                size = _falling(first, LAST_KNOWN, step, leg.steps) * budget.eps
                x = budget.project(x + size * budget.ascent(seen.mean), images[rows])
            rows, x = rows[left], x[left]
    return found


def _errs_more(view: AttackerView, some: Tensor, others: Tensor, labels: Tensor) -> Tensor:
    """True ``(b,)`` where `some` ``(b, c, h, w)`` have a larger smooth error rate than `others`.

    Over guesses that both share, and that no gradient was taken on.
    """
    factor = _factor(view.logits(others, [0])[:, 0])
    drawn = range(SELECTION, SELECTION + WINDOW)
    again = labels.repeat_interleave(WINDOW)
    odds = [
        log_odds((factor[:, None, None] * view.logits(each, drawn)).flatten(0, 1), again)
        for each in (some, others)
    ]
    own, theirs = (each.view(-1, WINDOW) for each in odds)
    scale = _scale(torch.cat([own, theirs], 1))[:, None]
    return torch.sigmoid(own / scale).mean(1) > torch.sigmoid(theirs / scale).mean(1)


@dataclass(frozen=True, slots=True)
class Leg:
    """A part of the search where every draw is known: so many steps with one objective.

    Args:
        steps: Gradient evaluations.
        target: The place of the wrong class that it aims at, 0 for the most likely one; None to
            aim at none.
        goes_on: Whether it begins at the best image so far, in place of the clean one.
    """

    steps: int
    target: int | None = None
    goes_on: bool = False

    def objective(self, targets: Tensor) -> Objective:
        """Return what it maximises, for wrong classes ``(b, k)``, the most likely first."""
        if self.target is not None:
            return objective_of("margin-targeted", targets[:, self.target])
        return margin if self.goes_on else cross_entropy


def _legs(budget: int, wrong_classes: int) -> list[Leg]:
    """Return an untargeted leg, one for each target, and one that goes on, of 10 steps or more."""
    last = int(LAST_LEG * budget)
    if last < SHORTEST:
        last = 0
    targets = max(0, min(TARGETS, wrong_classes, (budget - last) // SHORTEST - 1))
    steps = (budget - last) // (targets + 1)
    legs = [Leg(budget - last - targets * steps), *(Leg(steps, place) for place in range(targets))]
    return [*legs, Leg(last, goes_on=True)] if last else legs


def _plan(budget: int) -> list[int]:
    """EoT samples of each step: a tenth of the budget for the first one, which picks a side."""
    first = max(SAMPLES, budget // 10)
    return [first] + [SAMPLES] * ((budget - first) // SAMPLES)


def _parts(budget: int) -> tuple[int, int, int]:
    """Evaluations before, at and after the search at one guess: a quarter, a half, the rest."""
    quarter = budget // 4
    return quarter, 2 * quarter, budget - 3 * quarter


def _scale(odds: Tensor) -> Tensor:
    """The temperature ``(b,)`` for log-odds ``(b, n)``: their standard deviation.

    It is an eighth of their mean at least, beyond which the sigmoid would have no gradient.
    """
    return torch.maximum(odds.std(1, correction=0), odds.mean(1).abs() / 8).clamp(min=1e-6)


def _factor(logits: Tensor) -> Tensor:
    """Factors ``(b,)`` that give logits ``(b, k)`` a range of 20; 1 where all are equal."""
    spread = logits.amax(1) - logits.amin(1)
    return torch.where(spread > 0, RANGE / spread, 1.0)


def _lost(odds: Tensor, wrong: Tensor) -> Tensor:
    """True ``(b,)`` where the last draws of ``(b, n)`` were `wrong`, by some deviations."""
    last = odds[:, -WINDOW:]
    lost = last.mean(1) > EASE * last.std(1, correction=0)
    return lost & wrong[:, -WINDOW:].all(1) & (odds.shape[1] >= WINDOW)


def _shorter(lengths: Tensor, medians: float) -> Tensor:
    """Factors ``(b,)`` that shorten the last of lengths ``(b, n)`` to so many of their medians."""
    longest, last = medians * lengths.median(1).values, lengths[:, -1]
    return torch.where((longest > 0) & (last > longest), longest / last, 1.0)


def _falling(first: float, last: float, step: int, steps: int) -> float:
    """The length of a step, which falls linearly."""
    return first + (last - first) * step / max(steps - 1, 1)


def _value(view: AttackerView, logits: Tensor, labels: Tensor) -> Tensor:
    """The margins ``(b,)``; infinite where the image is misclassified for certain."""
    wrong = surely_wrong(logits, labels) & view.decided_by_logits
    return margin(logits, labels).masked_fill(wrong, torch.inf)


@dataclass(frozen=True, slots=True, eq=False)
class Scaled:
    """An objective of logits ``(b, k)`` times a `factor` ``(b,)``, one for each image."""

    objective: Objective
    factor: Tensor

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Losses ``(b,)`` for logits ``(b, k)``."""
        return self.objective(self.factor[:, None] * logits, labels)


@dataclass(frozen=True, slots=True, eq=False)
class SmoothError:
    """``sigmoid(log-odds / T)``, a smooth count of wrong draws, with T ``(b,)`` for each image."""

    temperature: Tensor

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Losses ``(b,)`` for logits ``(b, k)``, one for each image."""
        return torch.sigmoid(log_odds(logits, labels) / self.temperature)

    def slope(self, odds: Tensor) -> Tensor:
        """Its derivative ``(b,)`` at log-odds ``(b,)``, one for each image."""
        smooth = torch.sigmoid(odds / self.temperature)
        slope = smooth * (1 - smooth) / self.temperature
        return slope.clamp(min=torch.finfo(odds.dtype).tiny)
