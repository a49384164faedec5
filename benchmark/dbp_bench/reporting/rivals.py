"""Attacks on one defense side by side: their worst case, and packages' attacks against ours."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from dbp_bench.reporting.pool import Pool
from dbp_bench.reporting.records import MAIN, NULL, WHITEBOX
from dbp_bench.reporting.statistics import Bootstrap, Estimate
from dbp_bench.reporting.votes import WorstCase, worst_hidden, worst_known

Kind = Literal["control", "defense"]


@dataclass(frozen=True)
class Verdict:
    """What an attack's own package says, beside what we say."""

    package: Estimate
    """The share of images that it calls robust."""
    gap: Estimate
    """Above our accuracy, paired by image."""


@dataclass(frozen=True)
class Attacks:
    """All attacks on a defense by attackers who know the same."""

    defense: str
    kind: Kind
    known: bool
    """Whether all draws are known, or all are hidden."""
    pools: Mapping[str, Pool]
    """By threat model; the leaderboard's own first."""
    robust: Mapping[str, Estimate]
    """By threat model."""
    ratios: Mapping[str, float | None]
    """Network calls of the search, over those of the leaderboard's own threat model; null where
    either is unknown."""
    worst: Estimate | None
    """Of the worst case over all of them; null where they have too few draws in common."""
    draws: int
    """Which all attacks were judged on, of each seed."""
    verdicts: Mapping[str, Verdict]
    """By threat model, where the attack's own package gives one."""


@dataclass(frozen=True)
class Duel:
    """A package's attack, and the strongest of ours with at most as many network calls."""

    kind: Kind
    package: Pool
    ours: Pool | None
    """Null where there is none to compare with."""
    why: str
    """Why there is none; empty where there is one."""
    robust: tuple[Estimate, Estimate | None]
    """Accuracy under the package's attack, and under ours."""
    difference: Estimate | None
    """The package's minus ours, paired by image; null where there is none of ours."""

    @property
    def lower(self) -> bool | None:
        """Whether the package's attack leaves less by more than the interval."""
        return None if self.difference is None else self.difference.high < 0


def attacks_on(
    others: Sequence[Pool],
    columns: Mapping[str, Pool],
    kind: Kind,
    bootstrap: Bootstrap,
    *,
    known: bool,
) -> Attacks | None:
    """The leaderboard's own attacks and `others`, all on one defense; null if there are none."""
    if not others:
        return None
    own = columns.get("all_known" if known else "hidden")
    pools = [] if own is None else [own]
    if not known and WHITEBOX in columns and columns[WHITEBOX] is not own:
        pools.append(columns[WHITEBOX])
    pools += sorted(others, key=lambda pool: pool.any.threat)
    calls = [pool.calls for pool in pools]
    worst, draws = _worst_case(pools, known=known)
    return Attacks(
        defense=others[0].any.defense,
        kind=kind,
        known=known,
        pools={pool.any.threat: pool for pool in pools},
        robust={pool.any.threat: bootstrap.estimate(pool.robust(bootstrap)) for pool in pools},
        ratios={
            pool.any.threat: number / calls[0] if own is not None and calls[0] else None
            for pool, number in zip(pools, calls, strict=True)
        },
        worst=None if worst is None else bootstrap.estimate(worst.replicates(bootstrap)),
        draws=draws,
        verdicts={
            pool.any.threat: Verdict(
                bootstrap.estimate(package), bootstrap.estimate(package - pool.robust(bootstrap))
            )
            for pool in pools
            if (package := pool.package(bootstrap)) is not None
        },
    )


def duels(
    pools: Sequence[Pool], kinds: Mapping[str, Kind], eps: float, bootstrap: Bootstrap
) -> list[Duel]:
    """Each package's attack among `pools`, against ours on the same defense, knowing the same.

    Args:
        pools: All of a track, in order.
        kinds: Of each defense.
        eps: Of the attacks that count; the null attack is none.
        bootstrap: Over the images of the track.
    """
    found = []
    attacks = [pool for pool in pools if pool.any.eps == eps and pool.any.threat != NULL]
    for package in attacks:
        if not package.borrowed:
            continue
        rivals = [
            pool
            for pool in attacks
            if pool.any.defense == package.any.defense
            and pool.knows == package.knows
            and not pool.borrowed
        ]
        fair = [pool for pool in rivals if pool.calls <= package.calls]
        why = ""
        if not package.counted:
            fair, why = [], "purification calls no network, so that calls do not tell effort"
        elif not rivals:
            why = "no attack of ours with this knowledge"
        elif not fair:
            fewest = min(pool.calls for pool in rivals)
            why = f"none of ours has as few calls (the fewest: {fewest:.0f})"
        theirs = package.robust(bootstrap)
        ours = strongest(fair, bootstrap)
        mine = None if ours is None else ours.robust(bootstrap)
        found.append(
            Duel(
                kind=kinds[package.any.defense],
                package=package,
                ours=ours,
                why=why,
                robust=(
                    bootstrap.estimate(theirs),
                    None if mine is None else bootstrap.estimate(mine),
                ),
                difference=None if mine is None else bootstrap.estimate(theirs - mine),
            )
        )
    return found


def strongest(pools: Iterable[Pool], bootstrap: Bootstrap) -> Pool | None:
    """The attack that leaves least; of a tie, the one with fewest calls. Null of none."""

    def order(pool: Pool) -> tuple[float, float, bool, str]:
        left = float(pool.robust(bootstrap)[0])
        return left, pool.calls, pool.any.threat not in MAIN, pool.any.threat

    return min(pools, key=order, default=None)


def _worst_case(pools: Sequence[Pool], *, known: bool) -> tuple[WorstCase | None, int]:
    """The worst case over attacks, on the seeds and draws they share, and how many draws."""
    seeds = sorted(set.intersection(*(set(pool.seeds) for pool in pools)))
    draws = sorted(
        set.intersection(*(set(record.result.draws) for pool in pools for record in pool.records))
    )
    # Where a defense draws no noise, it has one draw, and everything is known.
    if not seeds or len(draws) < (1 if known else 2):
        return None, len(draws)
    cases = []
    for seed in seeds:
        tables = []
        for pool in pools:
            (result,) = (r.result for r in pool.records if r.result.seed == seed)
            places = [result.draws.index(draw) for draw in draws]
            tables.append([[row[place] for place in places] for row in result.robust])
        cases.append(worst_known(tables) if known else worst_hidden(tables))
    numerators = [sum(each) for each in zip(*(case.numerators for case in cases), strict=True)]
    return WorstCase(numerators, cases[0].denominator * len(seeds)), len(draws)
