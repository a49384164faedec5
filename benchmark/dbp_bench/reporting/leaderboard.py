"""From the results of a track to its numbers: accuracies, and their split by what is known.

A setting is what the attacker knew and how hard it searched, not the name of a threat model: where
a defense has no reverse noise, knowing the forward noise is knowing all, and one result serves.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from dbp_bench.entries.registry import Registry, Track
from dbp_bench.errors import NotComparable
from dbp_bench.reporting.badge import Badge, badge_of
from dbp_bench.reporting.findings import Findings
from dbp_bench.reporting.pool import Pool
from dbp_bench.reporting.ranking import Standing, ranks_with_ties
from dbp_bench.reporting.records import (
    KNOWN,
    MAIN,
    NULL,
    PROTOCOL,
    WHITEBOX,
    Effort,
    Record,
    check_comparable,
)
from dbp_bench.reporting.rivals import Attacks, Duel, Kind, attacks_on, duels
from dbp_bench.reporting.sanity import FEW_DRAWS, Check, checks
from dbp_bench.reporting.statistics import Bootstrap, Estimate, Replicates, ratio
from dbp_bench.reporting.votes import Account
from dbp_bench.result import Result

Sort = Literal["hidden", "known"]

UNDEFENDED: Final = "none"
"""The defense whose robust accuracy is the zero of the scale."""

QUANTITIES: Final = (
    "clean",
    "undefended",
    "hidden",
    "forward_known",
    "reverse_known",
    "all_known",
    "purification",
    "stochasticity",
    "share",
    "stochasticity_forward",
    "stochasticity_reverse",
    "fresh",
    "whitebox",
    "null",
)
"""What a leaderboard says of each defense, each with an interval."""


@dataclass(frozen=True)
class Row:
    """A defense on a leaderboard."""

    rank: Standing | None
    """Among the defenses; null for a control, and where the column that ranks was not measured."""
    defense: str
    kind: Kind
    estimates: Mapping[str, Estimate | None]
    """By name, one of :data:`QUANTITIES`; null where something that it needs was not measured."""
    served_by: Mapping[str, str]
    """For columns that another threat model's result serves: which."""
    accounts: Mapping[str, tuple[str, Account]]
    """What the draws say: for `clean`, `hidden` and `null`, the threat model and the account."""
    pools: Sequence[Pool]
    """All that was measured, one for each threat model of the leaderboard."""
    hidden_draws: int | None
    known_draws: int | None
    fresh_draws: int | None
    """For each known draw."""
    calls: int
    """Network calls of one purification."""
    flags: Sequence[str]
    """What a reader should know before trusting the row."""
    checks: Sequence[Check]
    """What was looked for, whether it was found or not."""
    badge: Badge
    """What somebody else verified of its results."""


@dataclass(frozen=True)
class Leaderboard:
    """What is known of all defenses on a track."""

    track: str
    entry: Track | None
    """Null where the track isn't registered here."""
    sort: Sort
    norm: str
    eps: float
    images: int
    attack: str
    effort: Effort | None
    """Of the columns compared at equal effort; null where none of them was measured."""
    whitebox_eot: int | float | str | bool | None
    rows: Sequence[Row]
    settings: Sequence[tuple[Pool, Kind]]
    attacks: Sequence[Attacks]
    """Where attacks other than the leaderboard's own were run."""
    duels: Sequence[Duel]
    """Every attack of a package, against ours."""
    sweeps: Sequence[Findings]
    """What was swept over."""
    bootstrap: Bootstrap

    @property
    def title(self) -> str:
        """Of the track, or its name."""
        return self.entry.title if self.entry else self.track

    @property
    def demonstration(self) -> bool:
        """Whether the numbers stand for nothing but the method."""
        return self.entry is not None and self.entry.demonstration


def leaderboard(
    records: Sequence[Record],
    registry: Registry | None = None,
    sort: Sort = "hidden",
    findings: Sequence[Findings] = (),
) -> Leaderboard:
    """What the results of one track say of its defenses.

    Args:
        records: Results, all of one track.
        registry: Where titles and kinds come from; the package's own entries if not given.
        sort: The accuracy that ranks: with all draws hidden, or with all of them known.
        findings: Of sweeps on that track.

    Raises:
        NotComparable: Two of the results may not stand in one table.
    """
    registry = registry or Registry()
    tracks = sorted({record.result.track for record in records})
    if len(tracks) != 1:
        raise NotComparable(f"one leaderboard per track, not one of {', '.join(tracks) or 'none'}.")
    check_comparable(records)
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.result.defense, record.result.threat), []).append(record)
    pools = [
        Pool(sorted(group, key=lambda record: record.result.seed)) for group in groups.values()
    ]
    # Where nothing is hidden EoT is idle, so that a result there doesn't tell the EoT of others.
    pools.sort(key=lambda pool: (pool.knows == pool.sites, pool.any.defense, pool.any.threat))
    main = [pool for pool in pools if pool.any.threat in MAIN]
    protocol = next((pool.any for pool in main if pool.any.threat in PROTOCOL), None)
    whitebox = next((pool.any for pool in main if pool.any.threat == WHITEBOX), None)
    first = protocol or (main or pools)[0].any
    bootstrap = Bootstrap(len(first.ids))

    names = sorted({pool.any.defense for pool in pools})
    columns = {
        name: _columns([pool for pool in main if pool.any.defense == name], protocol, whitebox)
        for name in names
    }
    zero = columns.get(UNDEFENDED, {}).get("hidden")
    undefended = None if zero is None else zero.robust(bootstrap)
    kinds = {name: _kind(registry, name) for name in names}
    eps = next((pool.any.eps for pool in main or pools if pool.any.threat != NULL), first.eps)
    unranked = [
        _row(
            name,
            kinds[name],
            sorted(
                [pool for pool in main if pool.any.defense == name]
                or [pool for pool in pools if pool.any.defense == name],
                key=lambda pool: pool.any.threat,
            ),
            columns[name],
            [pool for pool in pools if pool.any.defense == name and pool.any.eps == eps > 0],
            [each for each in findings if each.defense == name],
            undefended,
            bootstrap,
        )
        for name in names
    ]
    return Leaderboard(
        track=tracks[0],
        entry=registry.track(tracks[0]).entry if tracks[0] in registry.tracks else None,
        sort=sort,
        norm=first.norm,
        eps=eps,
        images=len(first.ids),
        attack=first.attack,
        effort=protocol.effort if protocol else None,
        whitebox_eot=whitebox.effort.get("eot") if whitebox else None,
        rows=_ranked(unranked, columns, sort),
        settings=[
            (pool, kinds[pool.any.defense])
            for pool in sorted(pools, key=lambda pool: (pool.any.defense, pool.any.threat))
        ],
        attacks=[
            row
            for name in names
            for known in (False, True)
            if (
                row := attacks_on(
                    [
                        pool
                        for pool in pools
                        if pool.any.defense == name
                        and pool.any.threat not in MAIN
                        and pool.any.eps == eps
                        and (pool.all_known if known else not pool.knows and not pool.all_known)
                    ],
                    columns[name],
                    kinds[name],
                    bootstrap,
                    known=known,
                )
            )
        ],
        duels=duels(
            sorted(pools, key=lambda pool: (pool.any.defense, pool.any.threat)),
            kinds,
            eps,
            bootstrap,
        ),
        sweeps=findings,
        bootstrap=bootstrap,
    )


def _columns(
    pools: Sequence[Pool], protocol: Result | None, whitebox: Result | None
) -> dict[str, Pool]:
    """The results of one defense that serve the columns; a column without one isn't there."""
    wanted = [(key, threat, knows, protocol) for key, (threat, knows) in KNOWN.items()]
    wanted.append((WHITEBOX, WHITEBOX, KNOWN["hidden"][1], whitebox))
    columns = {}
    for key, threat, knows, reference in wanted:
        fitting = [
            pool
            for pool in pools
            if reference is not None
            and pool.any.threat != NULL
            and pool.knows == knows(pool.sites)
            and pool.any.attack == reference.attack
            and pool.searched(pool.any.effort) == pool.searched(reference.effort)
        ]
        # Its own result where there is one, else that of a setting that is the same.
        fitting.sort(key=lambda pool: (pool.any.threat != threat, pool.any.threat))
        if fitting:
            columns[key] = fitting[0]
    null = [pool for pool in pools if pool.any.threat == NULL and pool.any.eps == 0]
    return columns | ({NULL: null[0]} if null else {})


def _row(
    defense: str,
    kind: Kind,
    pools: Sequence[Pool],
    columns: Mapping[str, Pool],
    attacks: Sequence[Pool],
    findings: Sequence[Findings],
    undefended: Replicates | None,
    bootstrap: Bootstrap,
) -> Row:
    found: dict[str, Replicates | None] = {
        key: pool.robust(bootstrap) for key, pool in columns.items()
    }
    # A defense is as clean in every setting; the one with most draws tells it best.
    clean = max(pools, key=lambda pool: pool.draws).clean(bootstrap)
    found["clean"] = clean
    found["undefended"] = undefended
    known = columns.get("all_known")
    found["fresh"] = None if known is None else known.fresh(bootstrap)
    found |= decompose(
        undefended,
        *(found.get(key) for key in ("hidden", "forward_known", "reverse_known", "all_known")),
    )
    estimates = {
        key: None if (values := found.get(key)) is None else bootstrap.estimate(values)
        for key in QUANTITIES
    }
    accounts = _accounts(pools, columns, bootstrap)
    null = accounts[NULL][1] if NULL in accounts else None
    made = checks(columns, attacks, null, findings, estimates["stochasticity"], bootstrap)
    flags = [flag for check in made for flag in check.flags]
    known_draws = next((pool.draws for pool in columns.values() if pool.knows), None)
    if known_draws is not None and known_draws < FEW_DRAWS:
        flags.append(f"fewer than {FEW_DRAWS} known draws")
    preferred = {key: threat for key, (threat, _) in KNOWN.items()} | {WHITEBOX: WHITEBOX}
    hidden = columns.get("hidden")
    return Row(
        rank=None,
        defense=defense,
        kind=kind,
        estimates=estimates,
        served_by={
            key: columns[key].any.threat
            for key, threat in preferred.items()
            if key in columns and columns[key].any.threat != threat
        },
        accounts=accounts,
        pools=pools,
        hidden_draws=hidden.draws if hidden else None,
        known_draws=known_draws,
        fresh_draws=len(known.any.fresh[0][0]) if known and known.any.fresh else None,
        calls=pools[0].any.network_calls.per_purification,
        flags=flags,
        checks=made,
        badge=badge_of(pools[0].records[0].path.parent.parent),
    )


def _accounts(
    pools: Sequence[Pool], columns: Mapping[str, Pool], bootstrap: Bootstrap
) -> dict[str, tuple[str, Account]]:
    """Of clean images, adversarial ones with all draws hidden, and those of the null attack.

    Clean images are judged with the draws that judge the adversarial ones.
    """
    hidden = columns.get("hidden")
    clean = hidden or max(pools, key=lambda pool: pool.draws)
    found = {"clean": (clean.any.threat, clean.account("clean", bootstrap))}
    for key in ("hidden", NULL):
        if (pool := columns.get(key)) is not None:
            found[key] = (pool.any.threat, pool.account("robust", bootstrap))
    return found


def decompose(
    undefended: Replicates | None,
    hidden: Replicates | None,
    forward_known: Replicates | None,
    reverse_known: Replicates | None,
    all_known: Replicates | None,
) -> dict[str, Replicates | None]:
    """Robust accuracy split into what purification and what hidden draws give.

    Purification is what is left with all draws known, above the undefended classifier;
    stochasticity is what hiding them adds. The latter is split between the forward noise and all
    other noise by the Shapley value: each site's gain when hidden first and when hidden last,
    averaged, so that the order doesn't matter and the two parts add up.
    """
    parts: dict[str, Replicates | None] = dict.fromkeys(
        (
            "purification",
            "stochasticity",
            "share",
            "stochasticity_forward",
            "stochasticity_reverse",
        )
    )
    if all_known is not None and undefended is not None:
        parts["purification"] = all_known - undefended
    if hidden is None or all_known is None:
        return parts
    parts["stochasticity"] = hidden - all_known
    if undefended is not None:
        parts["share"] = ratio(hidden - all_known, hidden - undefended)
    if forward_known is not None and reverse_known is not None:
        parts["stochasticity_forward"] = (
            (hidden - forward_known) + (reverse_known - all_known)
        ) / 2
        parts["stochasticity_reverse"] = (
            (hidden - reverse_known) + (forward_known - all_known)
        ) / 2
    return parts


def _ranked(
    rows: Sequence[Row], columns: Mapping[str, Mapping[str, Pool]], sort: Sort
) -> list[Row]:
    """Best first; what was not measured after it, controls last."""
    column = "hidden" if sort == "hidden" else "all_known"

    def order(row: Row) -> tuple[bool, bool, float, str]:
        score = row.estimates[column]
        return (
            row.kind == "control",
            score is None,
            -score.value if score else 0.0,
            row.defense,
        )

    standings = ranks_with_ties(
        {
            row.defense: columns[row.defense][column].score()
            for row in rows
            if row.kind == "defense" and row.estimates[column] is not None
        }
    )
    return [replace(row, rank=standings.get(row.defense)) for row in sorted(rows, key=order)]


def _kind(registry: Registry, defense: str) -> Kind:
    return registry.defense(defense).entry.kind if defense in registry.defenses else "defense"
