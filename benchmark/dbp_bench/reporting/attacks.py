"""Attacks on one defense side by side: their worst case, and third-party attacks against ours."""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Final, Literal

import pandas as pd

from dbp_bench.reporting.frames import Signed, cell, frame_of
from dbp_bench.reporting.pool import Pool, strongest
from dbp_bench.reporting.protocol import FORWARD
from dbp_bench.reporting.statistics import Score, proportion
from dbp_bench.reporting.votes import worst_hidden, worst_known

Kind = Literal["control", "defense"]

_ORDER: Final = ("none", FORWARD, f"all but {FORWARD}", "all")
"""What attackers know, in order of tables."""


def attacks(
    pools: Sequence[Pool], columns: Mapping[str, Mapping[str, Pool]], kinds: Mapping[str, Kind]
) -> pd.DataFrame:
    """A row for each attack, by defense and by what is known; no rows where only our own ran.

    `own` says whether it is the leaderboard's; `ratio` is of its evaluations to those of the
    leaderboard's own. Where the attack's package gives a verdict, the share of images that it
    calls robust is there, and how much that is above our accuracy (paired by image). The worst case
    is that of all rows of the defense and knowledge.

    Args:
        pools: All results of a track at the leaderboard's eps, in order.
        columns: By defense, the results behind the leaderboard's columns, those at equal effort
            first.
        kinds: Whether each defense is a control.
    """
    groups: dict[tuple[str, str], list[Pool]] = {}
    for pool in pools:
        groups.setdefault((pool.any.defense, pool.knowledge), []).append(pool)
    order = {name: i for i, name in enumerate(_ORDER)}
    rows: list[dict[str, object]] = []
    for defense, knows in sorted(groups, key=lambda key: (key[0], order.get(key[1], 9), key[1])):
        group = groups[defense, knows]
        own = [pool for pool in dict.fromkeys(columns[defense].values()) if pool in group]
        ordered = [*own, *(pool for pool in group if pool not in own)]
        if len(own) == len(group):
            continue
        worst, draws = _worst_case(ordered)
        first = own[0].evaluations if own else None
        rows += [
            {
                **{"defense": defense, "kind": kinds[defense], "knows": knows},
                **setting_of(pool),
                "own": pool in own,
                "draws": pool.draws,
                "robust": pool.robust.estimate,
                "search": pool.search,
                **how(pool),
                "ratio": _ratio(pool, first),
                "package_verdict": cell(pool.package and pool.package.estimate),
                "package_gap": cell(pool.package and pool.package.above(pool.robust), Signed),
                "worst_case": cell(worst and proportion(worst, draws)),
                "worst_case_draws": draws,
                "results": " ".join(record.name for record in pool.records),
            }
            for pool in ordered
        ]
    return frame_of(rows)


def third_party(pools: Sequence[Pool], kinds: Mapping[str, Kind]) -> pd.DataFrame:
    """A row for each third-party attack, with the strongest of ours on that defense.

    Of ours that know the same and take at most as many evaluations; `why` says why there is none.
    `lower` is whether the third party's leaves less by more than the interval of the difference,
    which is theirs minus ours, paired by image.

    Args:
        pools: All results of a track at the leaderboard's eps, in order.
        kinds: Whether each defense is a control.
    """
    rows = []
    for theirs in (pool for pool in pools if pool.third_party):
        ours, why = _ours(theirs, pools)
        gap = ours and theirs.robust.above(ours.robust)
        rows.append(
            {
                "defense": theirs.any.defense,
                "kind": kinds[theirs.any.defense],
                "knows": theirs.knowledge,
                **_side("", theirs),
                **_side("ours_", ours),
                "difference": cell(gap, Signed),
                "lower": None if gap is None else gap.high < 0,
                "why": why or None,
                "results": " ".join(
                    record.name for pool in (theirs, ours) if pool for record in pool.records
                ),
            }
        )
    return frame_of(rows)


def setting_of(pool: Pool) -> dict[str, object]:
    """The threat model and the attack, as cells."""
    return {"threat": pool.any.threat, "attack": pool.any.label}


def how(pool: Pool) -> dict[str, object]:
    """How the attack searched, and the evaluations of one attack on one image, as cells."""
    counts = {
        "gradient_evaluations": pool.gradient_evaluations,
        "forward_evaluations": pool.forward_evaluations,
        "evaluations": pool.evaluations,
    }
    return {
        "effort": json.dumps(pool.any.effort),
        "gradient": pool.any.gradient,
        **{key: None if count is None else round(count, 6) for key, count in counts.items()},
        "nfe": pool.any.evaluations.nfe,
        "searched_nfe": pool.any.evaluations.searched_nfe,
    }


def _side(prefix: str, pool: Pool | None) -> dict[str, object]:
    """One side of a comparison with a third party, as cells."""
    keys = ("threat", "attack", "gradient_evaluations", "forward_evaluations", "evaluations")
    cells = {**setting_of(pool), **how(pool)} if pool else {}
    side = {f"{prefix}{key}": cells.get(key) for key in keys}
    return {**side, f"{prefix}robust": cell(pool and pool.robust.estimate)}


def _ours(theirs: Pool, pools: Sequence[Pool]) -> tuple[Pool | None, str]:
    """The strongest of ours with at most as many evaluations as `theirs`; why, if there is none."""
    same = (theirs.any.defense, theirs.knows)
    rivals = [p for p in pools if (p.any.defense, p.knows) == same and not p.third_party]
    counted = {pool: count for pool in rivals if (count := pool.evaluations) is not None}
    most = theirs.evaluations
    if not rivals:
        return None, "no attack of ours with this knowledge"
    if most is None or not counted:
        return None, "evaluations were not recorded"
    ours = strongest(pool for pool, count in counted.items() if count <= most)
    fewest = min(counted.values())
    why = "" if ours else f"none of ours has as few evaluations (the fewest: {fewest:.0f})"
    return ours, why


def _ratio(pool: Pool, first: float | None) -> float | None:
    return round(pool.evaluations / first, 6) if first and pool.evaluations is not None else None


def _worst_case(pools: Collection[Pool]) -> tuple[Score | None, int]:
    """The worst case over attacks, on the seeds and draws they share, and how many draws."""
    known = all(pool.all_known for pool in pools)
    seeds = sorted(set.intersection(*(set(pool.seeds) for pool in pools)))
    draws = sorted(
        set.intersection(*(set(record.result.draws) for pool in pools for record in pool.records))
    )
    chance = any(pool.knows for pool in pools) and not known
    # Where a defense draws no noise, it has one draw, and everything is known.
    if chance or not seeds or len(draws) < (1 if known else 2):
        return None, len(draws)
    scores = []
    for seed in seeds:
        results = [r.result for pool in pools for r in pool.records if r.result.seed == seed]
        tables = [r.right("adversarial")[:, [r.draws.index(d) for d in draws]] for r in results]
        scores.append(worst_known(tables) if known else worst_hidden(tables))
    right = [sum(each) for each in zip(*(score.right for score in scores), strict=True)]
    return Score(right, scores[0].trials * len(seeds)), len(draws)
