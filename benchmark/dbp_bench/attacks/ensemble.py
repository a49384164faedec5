"""Several attacks, and of each image the candidate that hurts most; AutoAttack, corrected."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dbp_bench.attacks.common.objectives import margin
from dbp_bench.attacks.pgd import SELECTION
from dbp_bench.threat import AttackerView, Budget

COMPARISON = SELECTION + (1 << 30)
"""Guesses from here on compare members; no member ever looks at one."""


class Member(Protocol):
    """An attack."""

    def __call__(
        self, view: AttackerView, images: Tensor, labels: Tensor, budget: Budget
    ) -> Tensor:
        """Perturbed `images` ``(b, c, h, w)``."""
        ...


@dataclass(frozen=True, slots=True)
class Ensemble:
    """Every member attacks every image; guesses that none of them saw choose among what they find.

    The candidate with the lowest accuracy over those guesses is returned, among equals the one of
    largest mean margin. The clean image is a candidate too, so a member's failure costs nothing.
    The guesses are common to all candidates and the verdict is given on other draws, so the luck of
    the best of several is not taken for success. Where every draw is known, one look is exact, and
    an image that it finds misclassified is finished: later members don't get it.

    A member's own verdict (AutoAttack's) is not passed up. It is about the images that this member
    found, and only those that earlier members left to it; of the ensemble it would be neither the
    package's verdict nor ours. To see the two beside each other, run the member as an attack.

    Args:
        members: The attacks, in order.
        compare: Guesses that compare the candidates.
    """

    members: Sequence[Member]
    compare: int

    def __call__(
        self, view: AttackerView, images: Tensor, labels: Tensor, budget: Budget
    ) -> Tensor:
        """Adversarial images ``(b, c, h, w)`` in the `budget`."""
        found = images.clone()
        accuracy, best = self._value(view, images, labels)
        left = torch.arange(len(images), device=images.device)
        for member in self.members:
            if view.deterministic and view.decided_by_logits:
                left = left[accuracy[left] > 0]
            if not len(left):
                break
            part = view if len(left) == len(images) else view[left]
            other = member(part, images[left], labels[left], budget)
            view.log.verdict = None  # where `part` is the whole
            other = budget.project(other.detach(), images[left])
            right, value = self._value(part, other, labels[left])
            better = right < accuracy[left]
            better |= (right == accuracy[left]) & (value > best[left])
            rows = left[better]
            found[rows], accuracy[rows], best[rows] = other[better], right[better], value[better]
        return found

    def _value(self, view: AttackerView, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Accuracy ``(b,)`` and mean margin ``(b,)`` over the guesses that compare."""
        draws = range(COMPARISON, COMPARISON + (1 if view.deterministic else self.compare))
        logits = view.logits(images, draws)
        right = (logits.argmax(2) == labels[:, None]).to(images.dtype).mean(1)
        margins = margin(logits.flatten(0, 1), labels.repeat_interleave(len(draws)))
        return right, margins.view(len(images), len(draws)).mean(1)
