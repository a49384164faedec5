"""Adversarial images made against another defense: what an attacker can do without a query."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dbp_bench.defense import Defense
from dbp_bench.errors import ZeroGradient
from dbp_bench.threat import AttackerView, Budget


class Inner(Protocol):
    """An attack."""

    def __call__(
        self, view: AttackerView, images: Tensor, labels: Tensor, budget: Budget
    ) -> Tensor:
        """Perturbed `images` ``(b, c, h, w)``."""
        ...


@dataclass(frozen=True, slots=True)
class Transfer:
    """An attack on `source`, with none of its draws known; the victim is never called.

    Papernot et al. 2017, with a source that is given and not trained. The log of the victim's view
    stays empty: passes through the source are not passes through the victim.

    Args:
        source: The defense to attack, such as the bare classifier.
        attack: How.
    """

    source: Defense
    attack: Inner

    def __call__(
        self, view: AttackerView, images: Tensor, labels: Tensor, budget: Budget
    ) -> Tensor:
        """Adversarial images ``(b, c, h, w)`` in the `budget`.

        Raises:
            ZeroGradient: The source's gradient is zero for every image at every step.
        """
        other = view.toward(self.source)
        found = self.attack(other, images, labels, budget)
        if other.log.gradients.any() and not other.log.nonzero.any():
            raise ZeroGradient(
                "the gradient of the source is zero for every image at every step: choose another "
                "source."
            )
        return found
