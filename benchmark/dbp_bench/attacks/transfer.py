"""Adversarial images made against another defense: what an attacker can do without a query."""

from dataclasses import field, replace
from typing import Any

from torch import Tensor

from dbp_bench.attacks.common.options import checked
from dbp_bench.attacks.ensemble import inner, spelled_out
from dbp_bench.errors import ZeroGradient
from dbp_bench.threat import AttackerView, Budget, Evaluations, Setup


@checked
class Transfer:
    """An attack on `source`, with none of its draws known; the victim is never called.

    Papernot et al. 2017, with a source that is given and not trained. The log of the victim's view
    stays empty: evaluations of the source are not evaluations of the victim.

    Args:
        source: The defense to attack in place of the victim, such as the base classifier.
        search: The attack on it: a table of a name (`attack`) and options.
    """

    source: str = "none"
    search: dict[str, Any] = field(default_factory=lambda: {"attack": "pgd", "eot": 1})

    def __post_init__(self) -> None:
        # As a result records it: with every default.
        object.__setattr__(self, "search", spelled_out(self.search))

    @property
    def sources(self) -> tuple[str, ...]:
        """The defenses that the attacker needs."""
        return (self.source,)

    def evaluations(self, setup: Setup) -> Evaluations:
        """The evaluations of the source, whose draws are hidden where it has any."""
        return inner(self.search).evaluations(self._of_source(setup))

    def unfit(self, setup: Setup) -> str | None:
        """The search must fit the source."""
        return inner(self.search).unfit(self._of_source(setup))

    def _of_source(self, setup: Setup) -> Setup:
        return replace(setup, hidden=setup.sources.get(self.source, setup.hidden))

    def __call__(
        self, view: AttackerView, images: Tensor, labels: Tensor, budget: Budget
    ) -> Tensor:
        """Adversarial images ``(b, c, h, w)`` in the `budget`.

        Raises:
            ZeroGradient: The source's gradient is zero for every image at every step.
        """
        other = view.toward(self.source)
        found = inner(self.search)(other, images, labels, budget)
        if other.log.gradient.any() and not other.log.nonzero.any():
            raise ZeroGradient(
                "the gradient of the source is zero for every image at every step: choose another "
                "source."
            )
        return found
