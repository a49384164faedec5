"""Several attacks, and of each image the candidate that hurts most; AutoAttack, corrected."""

from collections.abc import Mapping, Sequence
from dataclasses import field, fields
from typing import Any

import torch
from torch import Tensor

from dbp_bench import attacks
from dbp_bench.attacks.common.objectives import SELECTION, margin, mean_over_draws
from dbp_bench.attacks.common.options import Count, checked
from dbp_bench.errors import did_you_mean
from dbp_bench.threat import Attack, AttackerView, Budget, Evaluations, Method, Setup, own_bound

COMPARISON = SELECTION + (1 << 30)
"""The number of the first guess that compares members; no member evaluates it or a later one."""


_DEFAULT = (
    {"attack": "apgd", "loss": "ce"},
    {"attack": "apgd", "loss": "dlr"},
    {"attack": "square", "n_queries": 500, "eot": 5},
)
"""The members, where none are named."""


@checked
class Ensemble:
    """Every member attacks every image; guesses that none of them saw choose among what they find.

    The candidate with the lowest accuracy over those guesses is returned, among equals the one of
    largest mean margin. The clean image is a candidate too, so a member's failure costs nothing.
    The guesses are common to all candidates and the verdict is given on other draws, so the luck of
    the best of several is not taken for success. Where every draw is known, one evaluation is
    exact, and an image that it finds misclassified is finished: later members don't get it.

    A member's own verdict (AutoAttack's) is not passed up. It is about the images that this member
    found, and only those that earlier members left to it; of the ensemble it would be neither the
    package's verdict nor ours. To see the two beside each other, run the member as an attack.

    Args:
        members: The attacks, in order: tables of a name (`attack`) and options.
        eot: EoT samples of each member that does not say its own.
        compare: Guesses that compare the candidates.
    """

    members: list[dict[str, Any]] = field(default_factory=lambda: [*_DEFAULT])
    eot: Count = 20
    compare: Count = 40

    def __post_init__(self) -> None:
        if not self.members:
            raise ValueError("members: there is none")
        # As a result records them: with every default.
        full = [spelled_out(member, eot=self.eot) for member in self.members]
        object.__setattr__(self, "members", full)

    @property
    def attacks(self) -> list[Attack]:
        """The members."""
        return [inner(member) for member in self.members]

    def evaluations(self, setup: Setup) -> Evaluations:
        """The sum over the members, and forward ones that choose among what they found.

        Known draws finish images.
        """
        forward = (len(self.members) + 1) * (self.compare if setup.hidden else 1)
        total = Evaluations(0, forward, exact=setup.hidden)
        for member in self.attacks:
            total += member.evaluations(setup)
        return total

    def unfit(self, setup: Setup) -> str | None:
        """Every member must fit."""
        return next(filter(None, (member.unfit(setup) for member in self.attacks)), None)

    def __call__(
        self, view: AttackerView, images: Tensor, labels: Tensor, budget: Budget
    ) -> Tensor:
        """Adversarial images ``(b, c, h, w)`` in the `budget`."""
        return strongest(self.attacks, self.compare, view, images, labels, budget)


def strongest(
    members: Sequence[Method],
    compare: int,
    view: AttackerView,
    images: Tensor,
    labels: Tensor,
    budget: Budget,
) -> Tensor:
    """The strongest candidate of the `members` for each image; see :class:`Ensemble`."""
    found = images.clone()
    accuracy, best = _value(view, images, labels, compare)
    left = torch.arange(len(images), device=images.device)
    for member in members:
        if view.deterministic and view.decided_by_logits:
            left = left[accuracy[left] > 0]
        if not len(left):
            break
        part = view if len(left) == len(images) else view[left]
        other = member(part, images[left], labels[left], budget)
        view.log.verdict = None  # where `part` is the whole
        other = budget.project(other.detach(), images[left])
        right, value = _value(part, other, labels[left], compare)
        better = right < accuracy[left]
        better |= (right == accuracy[left]) & (value > best[left])
        rows = left[better]
        found[rows], accuracy[rows], best[rows] = other[better], right[better], value[better]
    return found


def _value(
    view: AttackerView, images: Tensor, labels: Tensor, compare: int
) -> tuple[Tensor, Tensor]:
    """Accuracy ``(b,)`` and mean margin ``(b,)`` over the guesses that compare."""
    draws = range(COMPARISON, COMPARISON + (1 if view.deterministic else compare))
    logits = view.logits(images, draws)
    right = (logits.argmax(2) == labels[:, None]).to(images.dtype).mean(1)
    return right, mean_over_draws(margin, logits, labels)


def inner(table: Mapping[str, Any]) -> Attack:
    """The attack that a `table` inside another attack names, with its options.

    Raises:
        ValueError: There is no such attack, it is itself made of attacks, or an option is wrong.
    """
    if "attack" not in table:
        raise ValueError("attack: is missing")
    name = str(table["attack"])
    known = set(attacks.names()) - set(MADE_OF_ATTACKS)
    if name in MADE_OF_ATTACKS:
        raise ValueError(f"{name}: attacks made of attacks are not put into one another")
    if name.partition(":")[0] not in known:
        hint = did_you_mean(name, known).rstrip(".")
        raise ValueError(f"no attack {name!r} of this package.{hint}")
    own = {key: value for key, value in table.items() if key != "attack"}
    try:
        made = attacks.make(name, own)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if own_bound(made) is not None:
        raise ValueError(f"{name}: keeps a bound of its own, and cannot search in another's")
    return made


MADE_OF_ATTACKS = ("ensemble", "transfer")


def spelled_out(table: Mapping[str, Any], **shared: Any) -> dict[str, Any]:
    """The `table` of an attack inside another, with every option that it leaves out.

    Of the `shared` options, the attack takes those that it has and the table does not say.
    """
    attack = inner(table)
    has = {each.name for each in fields(attack)}  # type: ignore[arg-type]
    given = {key: value for key, value in shared.items() if key in has}
    full = {**given, **table}
    return {"attack": str(table["attack"]), **attacks.described(str(table["attack"]), inner(full))}
