"""Signs that a number can't be trusted: attacks that are too weak, gradients that are masked.

Each check says what it looked at, so that no flag isn't mistaken for not looked (Athalye et al.
2018, section 3.1, lists the signs).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from dbp_bench.reporting.findings import Findings
from dbp_bench.reporting.pool import Pool
from dbp_bench.reporting.records import KNOWN, NULL, Effort
from dbp_bench.reporting.rivals import strongest
from dbp_bench.reporting.statistics import Bootstrap, Estimate, Replicates
from dbp_bench.reporting.votes import METRICS, Account, gaps

FEW_DRAWS: Final = 3
"""Known draws below which an average over them is flagged."""
ERROR: Final = 1e-5
"""From this relative distance to finite differences on, a gradient isn't exact."""
COSINE: Final = 0.5
"""Below this cosine with the exact gradient, an approximate one is flagged."""
EXACT: Final = 0.999
"""The same, of a gradient that is called exact."""
FAMILY: Final = ("pgd", "apgd")
"""Attacks that climb a loss along projected gradients: of these, more steps are more effort."""


@dataclass(frozen=True)
class Check:
    """A sign that was looked for."""

    name: str
    looked: Sequence[str]
    """Threat models, or sweeps, that could have shown it; empty where it was not looked for."""
    flags: Sequence[str]
    """What was found."""


def checks(
    columns: Mapping[str, Pool],
    pools: Sequence[Pool],
    null: Account | None,
    findings: Sequence[Findings],
    stochasticity: Estimate | None,
    bootstrap: Bootstrap,
) -> list[Check]:
    """All signs that are looked for, on one defense.

    Args:
        columns: Results that serve the leaderboard's columns.
        pools: All results at the leaderboard's eps.
        null: Of the null attack, where it was run.
        findings: Of sweeps.
        stochasticity: What hiding the draws adds, where that was measured.
        bootstrap: Over the images of the track.
    """
    searched = [pool for pool in pools if pool.any.zero_gradient is not None]
    return [
        _null(columns.get(NULL), null, bootstrap),
        _more_knowledge(columns, stochasticity),
        Check(
            "zero gradients",
            [pool.any.threat for pool in searched],
            [
                f"no gradient, or none but zero, at any step on {pool.zero_gradients()} of "
                f"{bootstrap.images} images, which stay right ({_place(pool, columns)})"
                for pool in searched
                if pool.zero_gradients()
            ],
        ),
        _gradient(pools),
        _black_box(columns, pools, bootstrap),
        _more_effort(columns, pools, bootstrap),
        _other_attacks(columns, pools, bootstrap),
        Check(
            "sweeps",
            [f"{each.threat} {each.axis}" for each in findings],
            [
                f"sweep of {each.threat} over {each.axis}: {flag.message}"
                for each in findings
                for flag in each.flags
            ],
        ),
    ]


def _place(pool: Pool, columns: Mapping[str, Pool]) -> str:
    """The column that a result serves, or its threat model."""
    served = [key for key, other in columns.items() if other is pool]
    return served[0].replace("_", " ") if served else pool.any.threat


def _null(pool: Pool | None, found: Account | None, bootstrap: Bootstrap) -> Check:
    if pool is None or found is None:
        return Check("null attack", [], [])
    wrong = _null_gaps(pool, found, bootstrap)
    flag = (
        f"the null attack does not give clean accuracy ({', '.join(wrong)} points): "
        "something else than the attack is measured"
    )
    return Check("null attack", [pool.any.threat], [flag] if wrong else [])


def _more_knowledge(columns: Mapping[str, Pool], stochasticity: Estimate | None) -> Check:
    hidden, known = columns.get("hidden"), columns.get("all_known")
    if stochasticity is None or hidden is None or known is None or hidden is known:
        return Check("more knowledge", [], [])
    flag = "knowing the draws did not help the attack: its search has not converged"
    return Check(
        "more knowledge",
        [hidden.any.threat, known.any.threat],
        [flag] if stochasticity.high < 0 else [],
    )


def _gradient(pools: Sequence[Pool]) -> Check:
    """The quick check that each run of an attack with gradients stores."""
    looked: list[str] = []
    wrong: dict[str, list[str]] = {}
    for pool in pools:
        stored = [r.result.gradient_check for r in pool.records]
        found = [check for check in stored if check is not None]
        if not found:
            continue
        threat = pool.any.threat
        looked.append(threat)
        errors = [error for check in found for error in check.difference_errors]
        cosines = [cosine for check in found for cosine in check.cosine]
        mode = str(pool.any.effort.get("gradient", "exact"))
        large = [error for error in errors if error is not None and error > ERROR]
        low = [c for c in cosines if c is not None and c < (EXACT if mode == "exact" else COSINE)]
        if large:
            text = "the exact gradient is off from finite differences by {}, relative to their size"
            wrong.setdefault(text, []).append(f"{max(large):.2g} in {threat}")
        if low:
            text = f"the {mode} gradient, which the attack followed, has a cosine with the exact "
            wrong.setdefault(text + "one of only {}", []).append(f"{min(low):.2g} in {threat}")
        if None in errors or None in cosines:
            text = "no gradient on images where it was checked: it is zero, or there is none ({})"
            wrong.setdefault(text, []).append(threat)
    return Check(
        "gradient check", looked, [text.format(", ".join(found)) for text, found in wrong.items()]
    )


def _black_box(columns: Mapping[str, Pool], pools: Sequence[Pool], bootstrap: Bootstrap) -> Check:
    """Attacks without gradients, against those with gradients that know the same."""
    looked: list[str] = []
    flags: list[str] = []
    for pool in pools:
        rivals = [
            other
            for other in pools
            if other.knows == pool.knows and not other.black_box and other.any.eps > 0
        ]
        best = strongest(rivals, bootstrap)
        if not pool.black_box or best is None:
            continue
        looked.append(pool.any.threat)
        left = pool.robust(bootstrap)
        if gap := _lower(left, best, bootstrap):
            flags.append(
                f"{pool.any.threat}, which follows no gradient, finds {gap} points against "
                f"{best.any.threat}, the strongest attack along gradients that knows the same: "
                "the gradient is masked, or its use too weak"
            )
            continue
        own = _own(columns, pool)
        if own is not None and (gap := _lower(left, own, bootstrap)):
            flags.append(
                f"{own.any.threat}: its search has not converged: {pool.any.threat}, which "
                f"follows no gradient, finds {gap} points"
            )
    return Check("black box", looked, flags)


def _more_effort(columns: Mapping[str, Pool], pools: Sequence[Pool], bootstrap: Bootstrap) -> Check:
    """Attacks of the same family with more steps or draws, against the leaderboard's own."""
    looked: list[str] = []
    flags: list[str] = []
    for pool in pools:
        own = _own(columns, pool)
        if own is None or own is pool or not _more(pool, own):
            continue
        looked.append(pool.any.threat)
        if gap := _lower(pool.robust(bootstrap), own, bootstrap):
            flags.append(
                f"{own.any.threat}: its search has not converged: {pool.any.threat}, with "
                f"more steps or draws, finds {gap} points"
            )
    return Check("more effort", looked, flags)


def _other_attacks(
    columns: Mapping[str, Pool], pools: Sequence[Pool], bootstrap: Bootstrap
) -> Check:
    """Other attacks along gradients, whatever their effort, against the leaderboard's own."""
    looked: list[str] = []
    flags: list[str] = []
    for pool in pools:
        own = _own(columns, pool)
        if own is None or pool in columns.values() or pool.black_box or _more(pool, own):
            continue
        looked.append(pool.any.threat)
        if gap := _lower(pool.robust(bootstrap), own, bootstrap):
            flags.append(f"{own.any.threat}: another attack, {pool.any.threat}, finds {gap} points")
    return Check("other attacks", looked, flags)


def _own(columns: Mapping[str, Pool], pool: Pool) -> Pool | None:
    """The leaderboard's own attack with the knowledge of `pool`."""
    return next(
        (columns[k] for k in KNOWN if k in columns and columns[k].knows == pool.knows), None
    )


def _more(pool: Pool, own: Pool) -> bool:
    """Whether `pool` searched as `own` did, but for more of it."""
    mine, theirs = own.searched(own.any.effort), pool.searched(pool.any.effort)
    alike = mine.get("gradient") == theirs.get("gradient")
    if not alike or own.any.attack not in FAMILY or pool.any.attack not in FAMILY:
        return False
    before, after = _amounts(mine), _amounts(theirs)
    return after != before and all(a >= b for a, b in zip(after, before, strict=True))


def _amounts(effort: Effort) -> tuple[int, int]:
    """Gradient steps, and draws of each; a count that is missing or null is 1."""
    counts = {
        key: value if isinstance(value := effort.get(key), int) else 1
        for key in ("steps", "restarts", "targets", "eot")
    }
    return counts["steps"] * counts["restarts"] * counts["targets"], counts["eot"]


def _lower(left: Replicates, other: Pool, bootstrap: Bootstrap) -> str | None:
    """By how much `left` is below the accuracy of `other`, if by more than the interval."""
    gap = bootstrap.estimate(left - other.robust(bootstrap))
    return gap.percent(sign=True) if gap.high < 0 else None


def describe(metric: str, account: Account) -> str:
    """A metric of :data:`METRICS` in words, for this many draws."""
    words = {"mean": "one draw", "majority": "majority", "worst_all": "worst of all"}
    if account.draws is not None:
        words |= {
            "majority": f"majority of {account.votes}",
            "worst_all": f"worst of {account.draws}",
        }
    return words.get(metric, metric.replace("_", " of "))


def _null_gaps(pool: Pool, account: Account, bootstrap: Bootstrap) -> list[str]:
    """Metrics which the null attack changes, and by how much, paired by image and draw."""
    clean = [record.result.clean for record in pool.records]
    robust = [record.result.robust for record in pool.records]
    found = gaps(clean, robust, bootstrap, noisy=bool(pool.sites))
    return [
        f"{describe(metric, account)} {gap.percent(sign=True)}"
        for metric in METRICS
        if (gap := found[metric]) is not None and not gap.low <= 0 <= gap.high
    ]
