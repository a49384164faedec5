"""A threat model: what the attacker knows, and the attack that it takes by default."""

import re
from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from dbp_bench import attacks
from dbp_bench.declaration import Strict
from dbp_bench.entries.fields import DOTTED_PATH, Eps, Names, Options
from dbp_bench.errors import UnknownName

KNOWN_DRAWS = 3
"""The least number of known draws at which each image is attacked."""


class AllBut(Strict):
    """Every site but some."""

    all_but: Names = Field(alias="all-but")


def _form(value: object) -> str | None:
    """The form in which an entry states `knows`, so that a mistake gets one message, not three."""
    if isinstance(value, AllBut) or (isinstance(value, dict) and set(value) == {"all-but"}):
        return "<but>"
    if isinstance(value, list):
        return "<sites>"
    return "<word>" if value in ("none", "all") else None


Knows = Annotated[
    Annotated[Literal["none", "all"], Tag("<word>")]
    | Annotated[Names, Tag("<sites>")]
    | Annotated[AllBut, Tag("<but>")],
    Discriminator(
        _form,
        custom_error_type="knows",
        custom_error_message="give none, all, sites such as [forward], or {all-but: [forward]}",
    ),
]


def _attack(name: str) -> str:
    """Refuse an attack that nobody has; a dotted path is somebody's own code, looked up later."""
    if not is_outside(name):
        try:
            attacks.check_name(name)
        except UnknownName as error:
            raise ValueError(str(error).rstrip(".")) from None
    return name


def is_outside(attack: str) -> bool:
    """Tell whether `attack` is a path to code, such as ``my_package.module:MyAttack``."""
    return bool(re.match(DOTTED_PATH, attack)) and attack.partition(":")[0] not in attacks.names()


AttackName = Annotated[str, AfterValidator(_attack)]
"""``pgd``, ``torchattacks:PGD``, or ``my_package.module:MyAttack``."""

GRADIENT = r"^(exact|bpda|declared-surrogate|surrogate:[1-9][0-9]*)$"
Gradient = Annotated[str, Field(pattern=GRADIENT)]
"""An attack differentiates the whole defense (`exact`); the classifier at the purified image
(`bpda`, Athalye et al. 2018); a purifier of N steps in place of the defense's (`surrogate:N`); or
the surrogate that the defense's entry declares (`declared-surrogate`)."""


class AttackSetting(Strict):
    """A named setting of an attack: its options, and the gradient that it follows."""

    title: str
    attack: AttackName
    effort: Options
    """Options of the attack; those that are left out have its defaults."""
    gradient: Gradient = "exact"


class Threat(Strict):
    """The knowledge of an attacker, and the attack with its effort that it takes by default."""

    title: str
    knows: Knows
    """Sites whose victim draws are shown."""
    attack: AttackName
    effort: Options
    """Options of the attack; those that are left out have its defaults."""
    gradient: Gradient = "exact"
    draws: int = Field(ge=1, le=10_000)
    """Fresh draws that evaluate an image; where draws are known, known ones, each attacked anew."""
    eps: Eps | None
    """The radius in [0, 1] pixel units: null for the track's, 0 for the null attack."""
    protocol: bool
    """True for the threat models that a leaderboard is made of, which "all" stands for."""

    @model_validator(mode="after")
    def _enough_draws(self) -> Self:
        if self.knows != "none" and self.draws < KNOWN_DRAWS:
            raise ValueError(
                f"draws: {self.draws}, but at least {KNOWN_DRAWS} where draws are known; one draw "
                "is one trajectory"
            )
        return self

    @property
    def named_sites(self) -> set[str]:
        """The sites that `knows` spells out."""
        if isinstance(self.knows, AllBut):
            return set(self.knows.all_but)
        return set() if isinstance(self.knows, str) else set(self.knows)

    def sites(self, defense: Sequence[str]) -> list[str]:
        """The sites of a `defense` that this attacker knows, sorted."""
        if self.knows == "none":
            return []
        if self.knows == "all":
            return sorted(defense)
        if isinstance(self.knows, AllBut):
            return sorted(set(defense) - set(self.knows.all_but))
        return sorted(set(defense) & set(self.knows))
