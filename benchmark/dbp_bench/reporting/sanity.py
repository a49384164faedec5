"""Signs that a number can't be trusted: attacks that are too weak, gradients that are masked.

Each check says what it tested, so that no flag isn't mistaken for not tested (Athalye et al.
2018, section 3.1, lists the signs).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from dbp_bench.reporting.findings import Findings
from dbp_bench.reporting.pool import Pool, strongest
from dbp_bench.reporting.protocol import KNOWN
from dbp_bench.reporting.statistics import Estimate
from dbp_bench.result import Result

FEW_DRAWS: Final = 3
"""Known draws below which an average over them is flagged."""
ERROR: Final = 1e-5
"""From this relative distance to finite differences on, a gradient isn't exact."""
COSINE: Final = 0.5
"""Below this cosine with the exact gradient, an approximate one is flagged."""
EXACT: Final = 0.999
"""The same, of a gradient that is called exact."""


@dataclass(frozen=True)
class Check:
    """A sign that was tested for."""

    name: str
    tested: Sequence[str]
    """Threat models with their attacks, or sweeps, that could have shown it; empty where it was not
    tested."""
    flags: Sequence[str]
    """What was found."""

    @property
    def outcome(self) -> str:
        """In two words."""
        return "flagged" if self.flags else "no finding" if self.tested else "not tested"


def checks(
    columns: Mapping[str, Pool],
    pools: Sequence[Pool],
    findings: Sequence[Findings],
    stochasticity: Estimate | None,
) -> list[Check]:
    """All signs that are tested for, on one defense.

    Args:
        columns: Results that serve the leaderboard's columns.
        pools: All results at the leaderboard's eps.
        findings: What sweeps found.
        stochasticity: What hiding the draws adds, where that was measured.
    """
    return [
        _null(columns.get("null")),
        _more_knowledge(columns, stochasticity),
        _zero_gradients(columns, pools),
        _conformance(pools),
        _gradient(pools),
        *_stronger(columns, pools),
        Check(
            "sweeps",
            [f"{each.setting} {each.axis}" for each in findings],
            [
                f"sweep of {each.setting} over {each.axis}: {flag.message}"
                for each in findings
                for flag in each.flags
            ],
        ),
    ]


def doubts(result: Result) -> list[str]:
    """What should be known wherever the accuracies of one `result` are printed."""
    pool = Pool.of(result)
    made = [_zero_gradients({}, [pool]), _conformance([pool]), _gradient([pool])]
    if result.eps == 0:
        made.append(_null(pool))
    return [flag for check in made for flag in check.flags]


def _null(pool: Pool | None) -> Check:
    """Whether under the null attack each image and draw has the class of the clean image."""
    if pool is None:
        return Check("null attack", [], [])
    outcomes = differing = 0
    for result in (record.result for record in pool.records):
        clean, adversarial = result.classes("clean"), result.classes("adversarial")
        other = clean != adversarial
        if not result.classes_recorded:
            other = result.right("clean") != result.right("adversarial")
        outcomes, differing = outcomes + other.size, differing + int(other.sum())
    flag = (
        f"the null attack changes {differing} of {outcomes} outcomes, where image and draw are the "
        "same: something else than the attack is measured, such as noise that the defense draws on "
        "its own"
    )
    return Check("null attack", [pool.setting], [flag] if differing else [])


def _more_knowledge(columns: Mapping[str, Pool], stochasticity: Estimate | None) -> Check:
    hidden, known = columns.get("hidden"), columns.get("all_known")
    if stochasticity is None or hidden is None or known is None or hidden is known:
        return Check("more knowledge", [], [])
    flag = "knowing the draws did not help the attack: its search has not converged"
    return Check(
        "more knowledge",
        [hidden.setting, known.setting],
        [flag] if stochasticity.high < 0 else [],
    )


def _zero_gradients(columns: Mapping[str, Pool], pools: Sequence[Pool]) -> Check:
    """Images that stay right and met no gradient but zero."""
    served = {id(pool): key.replace("_", " ") for key, pool in reversed(list(columns.items()))}
    counts = {pool: pool.zero_gradients() for pool in pools}
    return Check(
        "zero gradients",
        [pool.setting for pool, count in counts.items() if count is not None],
        [
            f"no gradient, or none but zero, at any step on {count} of {len(pool.any.ids)} "
            f"images, which stay right ({served.get(id(pool), pool.setting)})"
            for pool, count in counts.items()
            if count
        ],
    )


def _conformance(pools: Sequence[Pool]) -> Check:
    """The short conformance record that each run stores of its defense."""
    tested: list[str] = []
    failed: dict[str, str] = {}
    for pool in pools:
        records = [record.result.conformance for record in pool.records]
        checks = [pair for record in records if record for pair in record.checks.items()]
        if checks:
            tested.append(pool.setting)
        failed |= {f"{name}: {reason}": pool.setting for name, reason in checks if reason != "pass"}
    flags = [
        f"the defense fails a conformance check in {at}: {text}" for text, at in failed.items()
    ]
    return Check("conformance", tested, flags)


def _gradient(pools: Sequence[Pool]) -> Check:
    """The quick gradient check that each run of an attack with gradients stores."""
    tested: list[str] = []
    wrong: dict[str, list[str]] = {}
    for pool in pools:
        records = [r.result.conformance for r in pool.records]
        found = [record.gradient for record in records if record and record.gradient]
        if not found:
            continue
        tested.append(pool.setting)
        errors = [error for check in found for error in check.difference_errors]
        cosines = [cosine for check in found for cosine in check.cosine]
        mode = pool.any.gradient or "exact"
        large = [error for error in errors if error is not None and error > ERROR]
        low = [c for c in cosines if c is not None and c < (EXACT if mode == "exact" else COSINE)]
        if large:
            text = "the exact gradient is off from finite differences by {}, relative to their size"
            wrong.setdefault(text, []).append(f"{max(large):.2g} in {pool.setting}")
        if low:
            text = f"the {mode} gradient, which the attack followed, has a cosine with the exact "
            wrong.setdefault(text + "one of only {}", []).append(
                f"{min(low):.2g} in {pool.setting}"
            )
        if None in errors or None in cosines:
            text = "no gradient on images where it was checked: it is zero, or there is none ({})"
            wrong.setdefault(text, []).append(pool.setting)
    return Check(
        "gradient check", tested, [text.format(", ".join(found)) for text, found in wrong.items()]
    )


def _stronger(columns: Mapping[str, Pool], pools: Sequence[Pool]) -> list[Check]:
    """Attacks that leave less than others should, by more than the paired interval."""
    names = ("black box", "more effort", "other attacks")
    tested: dict[str, list[str]] = {name: [] for name in names}
    flags: dict[str, list[str]] = {name: [] for name in names}
    for pool in pools:
        own = _own(columns, pool)
        at = pool.setting
        # Whom this attack should not be below, and what to say if it is.
        rivals: list[tuple[Pool, str]] = []
        if pool.black_box:
            name = "black box"
            best = strongest(p for p in pools if p.knows == pool.knows and not p.black_box)
            if best is None:
                continue
            masked = (
                f"{at}, which follows no gradient, finds {{}} points against {best.setting}, the "
                "strongest attack along gradients that knows the same: the gradient is masked, or "
                "its use too weak"
            )
            weak = f"its search has not converged: {at}, which follows no gradient,"
            rivals = [(best, masked)]
            rivals += [(own, f"{own.setting}: {weak} finds {{}} points")] if own else []
        elif own is None:
            continue
        elif _more(pool, own):
            name = "more effort"
            counts = [f"{each.gradient_evaluations:.0f}" for each in (pool, own)]
            weak = f"{own.setting}: its search has not converged: {at}, with {counts[0]} gradient "
            rivals = [(own, f"{weak}evaluations against {counts[1]}, finds {{}} points")]
        elif pool not in columns.values():
            name = "other attacks"
            rivals = [(own, f"{own.setting}: another attack, {at}, finds {{}} points")]
        else:
            continue
        tested[name].append(at)
        gaps = ((pool.robust.above(rival.robust), flag) for rival, flag in rivals)
        found = [flag.format(gap.percent(sign=True)) for gap, flag in gaps if gap.high < 0]
        flags[name] += found[:1]
    return [Check(name, tested[name], flags[name]) for name in names]


def _own(columns: Mapping[str, Pool], pool: Pool) -> Pool | None:
    """The leaderboard's own attack with the knowledge of `pool`."""
    return next(
        (columns[k] for k in KNOWN if k in columns and columns[k].knows == pool.knows), None
    )


def _more(pool: Pool, own: Pool) -> bool:
    """Whether `pool` is the same attack as `own` along the same gradient, but for more of it."""
    mine, theirs = own.gradient_evaluations, pool.gradient_evaluations
    if mine is None or theirs is None or theirs <= mine:
        return False
    return (pool.any.attack, pool.any.gradient) == (own.any.attack, own.any.gradient)
