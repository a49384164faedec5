"""The columns of a leaderboard: one for each threat model whose entry says `protocol: true`."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

from dbp_bench.entries.registry import Registry
from dbp_bench.entries.threat import Threat
from dbp_bench.result import Result, without_draws

FORWARD: Final = "forward"

_SITES: Final = frozenset({FORWARD, "reverse", "guidance", "any other"})
"""The sites of an imagined defense, of which each kind of knowledge covers different ones."""

KNOWN: Final[Mapping[str, frozenset[str]]] = {
    "hidden": frozenset(),
    "forward_known": frozenset({FORWARD}),
    "reverse_known": _SITES - {FORWARD},
    "all_known": _SITES,
}
"""The columns that split robustness, each with the sites of :data:`_SITES` that are known."""


def knowledge(result: Result) -> str:
    """The attacker's knowledge: none, forward, all but forward, all, or the names of the sites.

    Where a defense draws no noise, nothing is hidden, and the answer is `all`.
    """
    knows, sites = set(result.knows), set(result.sites)
    if knows == sites:
        return "all"
    if knows and knows == sites - {FORWARD}:
        return f"all but {FORWARD}"
    return ", ".join(sorted(knows)) or "none"


@dataclass(frozen=True)
class ThreatColumn:
    """A column of the leaderboard with results of its own: those of one threat model."""

    key: str
    """The column's name in tables: a key of :data:`KNOWN`, else the threat model's name."""
    threat: str
    entry: Threat

    def knows(self, sites: Iterable[str]) -> frozenset[str]:
        """The sites among those of a defense whose draws this threat model knows."""
        return frozenset(self.entry.sites(sorted(sites)))


@dataclass(frozen=True)
class Protocol:
    """The threat models that a leaderboard is made of; others are only compared with it."""

    columns: Sequence[ThreatColumn]
    """The columns of :data:`KNOWN`, at equal effort."""
    extra: Sequence[ThreatColumn]
    """The columns that know something else, or search with another effort, such as other EoT."""
    null: str | None
    """The threat model with eps = 0; None if there is none."""
    attacks: Mapping[str, str]
    """The default attack of each of these threat models, by name."""

    @classmethod
    def of(cls, registry: Registry) -> "Protocol":
        """The protocol that the threat entries of `registry` declare."""
        declared = {name: registry.threat(name).entry for name in registry.protocol}
        attacking = {name: entry for name, entry in declared.items() if entry.eps != 0}
        equal = _equal_effort(attacking)
        by_knowledge: dict[frozenset[str], str] = {}
        for name in equal:
            by_knowledge.setdefault(frozenset(attacking[name].sites(sorted(_SITES))), name)
        columns = [
            ThreatColumn(key, by_knowledge[known], attacking[by_knowledge[known]])
            for key, known in KNOWN.items()
            if known in by_knowledge
        ]
        taken = {column.threat for column in columns}
        return cls(
            columns=columns,
            extra=[ThreatColumn(n, n, entry) for n, entry in attacking.items() if n not in taken],
            null=next((name for name in declared if name not in attacking), None),
            attacks={name: entry.attack for name, entry in declared.items()},
        )

    @property
    def every(self) -> Sequence[ThreatColumn]:
        """All columns but that of the null attack."""
        return (*self.columns, *self.extra)

    @property
    def equal(self) -> frozenset[str]:
        """The threat models compared at equal effort."""
        return frozenset(each.threat for each in self.every if not self.free(each.threat))

    def holds(self, result: Result) -> bool:
        """True if `result` is of one of these threat models, with the threat model's own attack."""
        own = self.attacks.get(result.threat)
        return result.setting is None and own is not None and result.attack == own

    def free(self, threat: str) -> frozenset[str]:
        """The options in which `threat` may differ from those compared at equal effort."""
        extra = next((column.entry for column in self.extra if column.threat == threat), None)
        if extra is None or not self.columns:
            return frozenset()
        mine, theirs = extra.effort, self.columns[0].entry.effort
        return frozenset(key for key in {*mine, *theirs} if mine.get(key) != theirs.get(key))


@cache
def shipped() -> Protocol:
    """The protocol of the package's own entries."""
    return Protocol.of(Registry())


def _equal_effort(threats: Mapping[str, Threat]) -> list[str]:
    """The names of the largest group of `threats` with one attack, gradient and effort.

    Where every draw is known, averaging over draws changes nothing, and its number may differ.
    """

    def search(entry: Threat, *, draws: bool) -> str:
        effort = dict(entry.effort) if draws else without_draws(dict(entry.effort))
        return json.dumps([entry.attack, effort, entry.gradient], sort_keys=True)

    known = {name for name, entry in threats.items() if entry.knows == "all"}
    groups: dict[str, list[str]] = {}
    for name in sorted(set(threats) - known) or sorted(known):
        groups.setdefault(search(threats[name], draws=True), []).append(name)
    if not groups:
        return []
    most = max(groups.values(), key=len)
    counts = search(threats[most[0]], draws=False)
    idle = [name for name in known if search(threats[name], draws=False) == counts]
    return sorted({*most, *idle})
