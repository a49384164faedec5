"""How an attacker searches. No attack asks which threat model it is under: it sees a view."""

from collections.abc import Callable, Mapping
from typing import Any

from dbp_bench.attacks.apgd import APGD
from dbp_bench.attacks.autoattack import AutoAttack
from dbp_bench.attacks.diffattack import DiffAttack
from dbp_bench.attacks.ensemble import Ensemble
from dbp_bench.attacks.low_frequency import LowFrequency
from dbp_bench.attacks.pgd import PGD
from dbp_bench.attacks.selective import Selective
from dbp_bench.attacks.square import Square
from dbp_bench.attacks.torchattacks import Torchattacks
from dbp_bench.attacks.transfer import Transfer
from dbp_bench.defense import Defense
from dbp_bench.threat import Attack, Budget

ATTACKS: Mapping[str, Callable[..., Attack]] = {
    "pgd": PGD,
    "apgd": APGD,
    "lf": LowFrequency,
    "selective": Selective,
    "diffattack": DiffAttack,
    "square": Square,
    "autoattack": AutoAttack,
    "torchattacks": Torchattacks,
}
"""The attacks that are not made of others."""


_MODES = ("gradient", "surrogate_steps")
"""How the view differentiates, which is none of an attack's business."""


def build(name: str, options: Mapping[str, Any], source: Defense | None = None) -> Attack:
    """The attack called `name`, with the part of an effort's `options` that is its own.

    Args:
        name: Of the attack.
        options: Its effort.
        source: The defense that a transfer attack searches in.

    Raises:
        ValueError: A transfer attack without a `source`.
    """
    own = {key: value for key, value in options.items() if key not in _MODES}
    if name == "ensemble":
        members = [_inner(member, own["eot"]) for member in own["members"]]
        return Ensemble(members, own["compare"])
    if name == "transfer":
        if source is None:
            raise ValueError("a transfer attack needs the defense that it searches in.")
        return Transfer(source, _inner(own["search"]))
    return ATTACKS[name](**own)


def check(name: str, options: Mapping[str, Any], budget: Budget) -> None:
    """Refuse what no attack of another package could run with. Nothing is computed.

    Args:
        name: Of the attack.
        options: Its effort.
        budget: The ball that it would search.

    Raises:
        BadEntry: The package has no such attack, or it doesn't take these options.
        BadExtra: The package isn't there.
        AttackFailed: The attack doesn't search in the norm of `budget`.
    """
    attack = _inner(options["search"]) if name == "transfer" else build(name, options)
    for part in attack.members if isinstance(attack, Ensemble) else [attack]:
        if isinstance(part, AutoAttack | Torchattacks):
            part.check(budget)


def _inner(table: Mapping[str, Any], eot: int | None = None) -> Attack:
    """An attack inside another, whose `eot` it shares where it doesn't say its own."""
    own = {key: value for key, value in table.items() if key != "attack"}
    shared = {} if eot is None or table["attack"] == "torchattacks" else {"eot": eot}
    return build(table["attack"], {**shared, **own})
