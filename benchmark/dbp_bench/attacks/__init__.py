"""How an attacker searches. No attack asks which threat model it is under: it sees a view."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from dbp_bench.attacks.pgd import PGD
from dbp_bench.threat import AttackerView, Budget


class Attack(Protocol):
    """A search for adversarial images."""

    def __call__(
        self, view: AttackerView, images: Tensor, labels: Tensor, budget: Budget
    ) -> Tensor:
        """Perturbed `images` ``(b, c, h, w)``. Not trusted: the harness projects and judges."""
        ...


ATTACKS: Mapping[str, Callable[..., Attack]] = {"pgd": PGD}


def build(name: str, options: Mapping[str, Any]) -> Attack:
    """The attack called `name`, with its `options`."""
    return ATTACKS[name](**options)
