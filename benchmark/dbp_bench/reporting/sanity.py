"""Signs that a number can't be trusted: attacks that are too weak, gradients that are masked.

Each check names what it tested, so that "no finding" isn't mistaken for "not tested" (Athalye et
al. 2018, section 3.1, lists the signs).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from dbp_bench.reporting.columns import CELLS, NULL
from dbp_bench.reporting.effort import BUDGET, Convergence
from dbp_bench.reporting.findings import Findings
from dbp_bench.reporting.pool import Pool, strongest
from dbp_bench.reporting.rendering import note
from dbp_bench.reporting.statistics import Estimate
from dbp_bench.result import Result

FEW_DRAWS: Final = 3
"""The number of known draws below which an average over them is flagged."""
ERROR: Final = 1e-5
"""The relative distance to finite differences above which a gradient isn't exact."""
COSINE: Final = 0.5
"""The cosine with the exact gradient below which an approximate one is flagged."""
EXACT: Final = 0.999
"""The same bound for a gradient that is called exact."""


@dataclass(frozen=True)
class Check:
    """A test for one sign of weak attacks or masked gradients, and its outcome."""

    name: str
    tested: Sequence[str]
    """Threat models with their attacks, or sweeps, that could have shown it; empty where it was not
    tested."""
    flags: Sequence[str]
    """The findings, in words; empty where nothing was found."""
    brief: str = ""
    """The findings in few words, for a column."""
    needed: bool = True
    """True if every row needs it, and a row without it says so."""

    @property
    def outcome(self) -> str:
        """The outcome: "flagged", "no finding" or "not tested"."""
        return "flagged" if self.flags else "no finding" if self.tested else "not tested"


def summary(checks: Sequence[Check]) -> str:
    """The column of checks: "all passed", or what was found and what was not tested."""
    needed = [check.name for check in checks if check.needed]
    missing = [check.name for check in checks if check.needed and check.outcome == "not tested"]
    said = [check.brief for check in checks if check.brief]
    if missing:
        said.append(f"{', '.join(missing) if missing != needed else 'checks'} not tested")
    return "; ".join(said) or "all passed"


def checks(
    columns: Mapping[str, Pool],
    pools: Sequence[Pool],
    findings: Sequence[Findings],
    converged: Sequence[Convergence],
    stochasticity: Estimate | None,
) -> list[Check]:
    """All checks on one defense; those on its own results are the same for every defense.

    Args:
        columns: Results that serve the leaderboard's columns.
        pools: All results at the leaderboard's eps.
        findings: The findings of sweeps.
        converged: The results that serve the columns beside those with twice the budget.
        stochasticity: The gain of hiding the draws, where that was measured.
    """
    served = list(dict.fromkeys(pool for key, pool in columns.items() if key != NULL))
    swept = [
        each
        for each in findings
        if each.axis != BUDGET and each.setting in {pool.setting for pool in served}
    ]
    sweep_flags = {
        note("flag_sweep", at=each.setting, axis=each.axis, said=flag.message): flag.name
        for each in swept
        for flag in each.flags
    }
    return [
        _null(columns.get(NULL)),
        _conformance(served),
        _gradient(served),
        _zero_gradients(columns, served),
        _convergence(converged),
        _more_knowledge(columns, stochasticity),
        _draws(served),
        *_stronger(columns, pools),
        Check(
            "sweeps",
            [f"{each.setting} {each.axis}" for each in swept],
            list(sweep_flags),
            "".join(f"sweep: {name}" for name in list(sweep_flags.values())[:1]),
            needed=False,
        ),
    ]


def doubts(result: Result) -> list[str]:
    """The warnings that belong wherever the accuracies of one `result` are printed."""
    pool = Pool.of(result)
    made = [_zero_gradients({}, [pool]), _conformance([pool]), _gradient([pool])]
    if result.eps == 0:
        made.append(_null(pool))
    return [flag for check in made for flag in check.flags]


def _null(pool: Pool | None) -> Check:
    """Check that under the null attack each image and draw has the class of the clean image."""
    if pool is None:
        return Check("null attack", [], [])
    outcomes = differing = 0
    for result in (record.result for record in pool.records):
        clean, adversarial = result.classes("clean"), result.classes("adversarial")
        other = clean != adversarial
        if not result.classes_recorded:
            other = result.right("clean") != result.right("adversarial")
        outcomes, differing = outcomes + other.size, differing + int(other.sum())
    if not differing:
        return Check("null attack", [pool.setting], [])
    flag = note("flag_null", differing=differing, outcomes=outcomes)
    return Check("null attack", [pool.setting], [flag], f"null attack changes {differing} outcomes")


def _more_knowledge(columns: Mapping[str, Pool], stochasticity: Estimate | None) -> Check:
    """Check that an attacker who knows all draws leaves no more than one who knows none."""
    hidden, known = columns.get("hidden"), columns.get("all_known")
    if stochasticity is None or hidden is None or known is None or hidden is known:
        return Check("more knowledge", [], [], needed=False)
    settings = [hidden.setting, known.setting]
    if stochasticity.high >= 0:
        return Check("more knowledge", settings, [], needed=False)
    return Check("more knowledge", settings, [note("flag_knowledge")], "known draws don't help")


def _draws(served: Sequence[Pool]) -> Check:
    """Check that the average over known draws is over a few at least."""
    known = [pool for pool in served if pool.knows]
    few = [f"fewer than {FEW_DRAWS} known draws"] if any(p.draws < FEW_DRAWS for p in known) else []
    return Check("known draws", [pool.setting for pool in known], few, "".join(few), needed=False)


def _zero_gradients(columns: Mapping[str, Pool], pools: Sequence[Pool]) -> Check:
    """Look for images that stay right though all their gradients were zero."""
    named = {pool: CELLS[key] for key, pool in reversed(list(columns.items())) if key in CELLS}
    counts = {pool: pool.zero_gradients() for pool in pools}
    found = {named.get(pool, pool.setting): (pool, n) for pool, n in counts.items() if n}
    return Check(
        "zero gradients",
        [pool.setting for pool, count in counts.items() if count is not None],
        [
            note("flag_zero", count=count, of=len(pool.any.ids), at=at)
            for at, (pool, count) in found.items()
        ],
        f"zero gradients: {_few(f'{at} ({n} images)' for at, (_, n) in found.items())}"
        if found
        else "",
    )


def _few(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(names))


def _convergence(found: Sequence[Convergence]) -> Check:
    """Check that twice the budget finds little more in any cell."""
    falls = [each for each in found if each.verdict == "not converged"]
    missing = [each for each in found if each.verdict == "not tested"]
    said = []
    if falls:
        said.append(f"not converged: {_few(each.said for each in falls)}")
    if missing and len(missing) < len(found):
        said.append(f"convergence not tested: {_few(each.said for each in missing)}")
    return Check(
        "convergence",
        [each.own.setting for each in found if each.verdict != "not tested"],
        [
            note(
                "flag_converged",
                at=each.own.setting,
                budget=each.own.any.effort[BUDGET],
                difference=each.difference.percent(sign=True),
            )
            for each in falls
            if each.difference
        ],
        "; ".join(said),
    )


def _conformance(pools: Sequence[Pool]) -> Check:
    """Read the short conformance record that each run stores of its defense."""
    tested: list[str] = []
    failed: dict[str, str] = {}
    for pool in pools:
        records = [record.result.conformance for record in pool.records]
        checks = [pair for record in records if record for pair in record.checks.items()]
        if checks:
            tested.append(pool.setting)
        failed |= {f"{name}: {reason}": pool.setting for name, reason in checks if reason != "pass"}
    flags = [note("flag_conformance", at=at, said=said) for said, at in failed.items()]
    names = _few(said.partition(":")[0] for said in failed)
    return Check("conformance", tested, flags, f"conformance failed: {names}" if failed else "")


def _gradient(pools: Sequence[Pool]) -> Check:
    """Read the quick gradient check that each run of an attack with gradients stores.

    An attack along another gradient than the defense's own is named, whatever its check says.
    """
    tested: list[str] = []
    wrong: dict[tuple[str, str], list[str]] = {}
    instead: dict[str, list[str]] = {}
    for pool in pools:
        if pool.any.gradient not in ("exact", None):
            instead.setdefault(pool.any.gradient, []).append(pool.setting)
        records = [record.result.conformance for record in pool.records]
        found = [record.gradient for record in records if record and record.gradient]
        if not found:
            continue
        at, mode = pool.setting, pool.any.gradient or "exact"
        tested.append(at)
        errors = [error for check in found for error in check.difference_errors]
        cosines = [cosine for check in found for cosine in check.cosine]
        large = [error for error in errors if error is not None and error > ERROR]
        low = [c for c in cosines if c is not None and c < (EXACT if mode == "exact" else COSINE)]
        if large:
            wrong.setdefault(("flag_difference", ""), []).append(f"{max(large):.2g} in {at}")
        if low:
            wrong.setdefault(("flag_cosine", mode), []).append(f"{min(low):.2g} in {at}")
        if None in errors or None in cosines:
            wrong.setdefault(("flag_no_gradient", ""), []).append(at)
    flags = [note(name, mode=mode, found=", ".join(each)) for (name, mode), each in wrong.items()]
    said = ["gradient check failed"] if flags else []
    for mode, settings in instead.items():
        flags.append(note("flag_instead", mode=mode, at=_few(settings)))
        said.append(f"attacked along {mode}, not its own gradient")
    return Check("gradient", tested, flags, "; ".join(said))


def _stronger(columns: Mapping[str, Pool], pools: Sequence[Pool]) -> list[Check]:
    """Look for attacks that beat one they should not beat, by more than the paired interval."""
    names = ("black box", "more effort", "other attacks")
    tested: dict[str, list[str]] = {name: [] for name in names}
    # By name and knowledge, the finding of the attack that finds most: gap, note, and in few words.
    most: dict[str, dict[str, tuple[float, str, str]]] = {name: {} for name in names}
    for pool in pools:
        own = _own(columns, pool)
        # The attacks that this one should not beat, and the note to add if it does.
        rivals: list[tuple[str, Pool]] = []
        if pool.black_box:
            name = "black box"
            best = strongest(p for p in pools if p.knows == pool.knows and not p.black_box)
            if best is None:
                continue
            rivals = [("flag_masked", best), *([("flag_black_box", own)] if own else [])]
        elif own is None:
            continue
        elif _more(pool, own):
            name, rivals = "more effort", [("flag_effort", own)]
        elif pool not in columns.values():
            name, rivals = "other attacks", [("flag_other", own)]
        else:
            continue
        tested[name].append(pool.setting)
        for flag, rival in rivals:
            gap = pool.robust.above(rival.robust)
            if gap.high < 0:
                counts = [f"{p.gradient_evaluations or 0:.0f}" for p in (pool, rival)]
                texts = {"at": pool.setting, "rival": rival.setting, "more": counts[0]}
                said = note(flag, gap=gap.percent(sign=True), fewer=counts[1], **texts)
                brief = f"{pool.any.label} finds {100 * gap.value:+.1f} at {_cell(columns, pool)}"
                before = most[name].get(pool.knowledge)
                if before is None or gap.value < before[0]:
                    most[name][pool.knowledge] = (gap.value, said, brief)
                break
    return [
        Check(
            name,
            tested[name],
            [said for _, said, _ in most[name].values()],
            _few(brief for *_, brief in most[name].values()),
            needed=False,
        )
        for name in names
    ]


def _cell(columns: Mapping[str, Pool], pool: Pool) -> str:
    """The cell of the leaderboard that knows what the attack of `pool` knows."""
    keys = (key for key in CELLS if key in columns and columns[key].knows == pool.knows)
    return next((CELLS[key] for key in keys), pool.setting)


def _own(columns: Mapping[str, Pool], pool: Pool) -> Pool | None:
    """The leaderboard's own attack with the knowledge of `pool`."""
    return next(
        (columns[k] for k in CELLS if k in columns and columns[k].knows == pool.knows), None
    )


def _more(pool: Pool, own: Pool) -> bool:
    """True if `pool` is the attack of `own` along the same gradient, with more evaluations."""
    mine, theirs = own.gradient_evaluations, pool.gradient_evaluations
    if mine is None or theirs is None or theirs <= mine:
        return False
    return (pool.any.attack, pool.any.gradient) == (own.any.attack, own.any.gradient)
