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


_MODES = ("gradient", "surrogate_steps")
"""How the view differentiates, which is none of an attack's business."""


def build(name: str, options: Mapping[str, Any]) -> Attack:
    """The attack called `name`, with the part of an effort's `options` that is its own."""
    own = {key: value for key, value in options.items() if key not in _MODES}
    return ATTACKS[name](**own)
