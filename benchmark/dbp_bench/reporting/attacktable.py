"""What attacks other than the leaderboard's own found, as CSV and Markdown, and what they cost."""

from collections.abc import Iterable, Sequence
from typing import Final

from pydantic import ValidationError

from dbp_bench.entries.registry import EFFORTS
from dbp_bench.passes import Setup
from dbp_bench.reporting.findings import Findings, Interval
from dbp_bench.reporting.leaderboard import Leaderboard
from dbp_bench.reporting.pool import Pool
from dbp_bench.reporting.records import MAIN
from dbp_bench.reporting.rendering import (
    BOOTSTRAP,
    fractions,
    in_words,
    json_of,
    md,
    md_lines,
    md_name,
    percent,
    shown_eps,
    to_csv_text,
)
from dbp_bench.reporting.rivals import Attacks, Duel, Verdict
from dbp_bench.reporting.statistics import LEVEL, Estimate

_CALLS_DIFFER: Final = 0.02
"""From this share of network calls on, two attacks are marked as of unequal effort."""


_WORST: Final = (
    "Worst case, all draws hidden: the draws that judge are split in halves; for each image one "
    "half chooses the attack that leaves it right least often (of a tie, the one that is strongest "
    "over all images in that half), and the other half judges that attack, then they swap, so that "
    "every draw judges once. The smallest of several noisy means would be too low; this never is "
    "on average, but may be too high where few draws choose. It can thus lie above the accuracy "
    "under one of the attacks. All draws known: an image falls at a draw if any attack succeeded "
    "at it, which is exact. Blank: the attacks share too few draws."
)
_VERDICT: Final = (
    "The package calls an image robust if it is right in one draw, and still in one draw after "
    "each of its attacks; a failure by chance counts as a success of the attack, and an image that "
    "failed once is never looked at again. We judge the same images on every draw: where draws are "
    "hidden, on fresh ones. An image that is right with chance p in any draw, and that n attacks "
    "leave as it was, passes with p^(n + 1): there the verdict is no accuracy, and the gap is what "
    "single draws make of it. Where all draws are known, the two must agree."
)
_DUELS: Final = (
    "Calls: of the denoising networks, with and without a gradient, for one image. Of our attacks "
    "that know the same and take at most as many on that defense, the one that leaves least is "
    "shown. Lower: the paired interval of the difference is below 0."
)
_CALLS: Final = (
    "Calls of the denoising networks by one attack on one image, on average: those with a "
    "gradient, and others of the search; verdicts are not included. A transfer attack calls "
    "another defense instead. EoT is idle where all draws are known, and not shown there."
)


def attacks_to_csv(board: Leaderboard) -> str:
    """One line per defense and knowledge: every attack, its effort, and the worst case over all.

    Network calls are of the search for one image, those of a surrogate's search not included, nor
    what a transfer attack spends on its source. Where the attack's package gives a verdict, it is
    there too, and how much it is above our accuracy (paired by image).
    """
    threats = _threats(board.attacks)
    judged = {name for row in board.attacks for name in row.verdicts}
    header = ["defense", "kind", "draws_are", "track", "norm", "eps", "images", "draws"]
    header += ["worst_case", "worst_case_lo", "worst_case_hi", "equal_calls"]
    for name in threats:
        header += [name, f"{name}_lo", f"{name}_hi", f"{name}_attack", f"{name}_effort"]
        header += [f"{name}_gradient_calls", f"{name}_other_calls", f"{name}_calls_ratio"]
        header += [f"{name}_results"]
        if name in judged:
            header += [f"{name}_{key}" for key in _VERDICTS]
    lines: list[list[object]] = []
    for row in board.attacks:
        line: list[object] = [row.defense, row.kind, _knowledge(row), board.track, board.norm]
        line += [board.eps, board.images, row.draws, *fractions(row.worst)]
        ratios = list(row.ratios.values())
        line += [None if None in ratios else not any(map(_unequal, ratios))]
        for name in threats:
            pool = row.pools.get(name)
            line += fractions(row.robust.get(name))
            if pool is None:
                line += [None] * (6 + (len(_VERDICTS) if name in judged else 0))
                continue
            ratio = row.ratios[name]
            line += [pool.attack, json_of(pool.any.effort)]
            line += [round(pool.gradient_calls, 6), round(pool.other_calls, 6)]
            line += [None if ratio is None else round(ratio, 6)]
            line += [" ".join(record.name for record in pool.records)]
            if name in judged:
                line += _verdict(row.verdicts.get(name))
        lines.append(line)
    return to_csv_text(header, lines)


_VERDICTS: Final = (
    *("package_verdict", "package_verdict_lo", "package_verdict_hi"),
    *("package_gap", "package_gap_lo", "package_gap_hi"),
)


def _verdict(verdict: Verdict | None) -> list[object]:
    if verdict is None:
        return [None] * len(_VERDICTS)
    return [*fractions(verdict.package), *fractions(verdict.gap)]


def packages_to_csv(board: Leaderboard) -> str:
    """One line per attack of a package and defense, with the attack of ours it is held against.

    Accuracies are fractions, and differences the package's minus ours; `package_lower` is blank
    where there is nothing to compare with, and `why` says why. Network calls as in
    :func:`attacks_to_csv`.
    """
    header = ["defense", "kind", "knows", "sites", "track", "norm", "eps", "images"]
    for name in ("package", "ours"):
        header += [f"{name}_threat", f"{name}_attack", name, f"{name}_lo", f"{name}_hi"]
        header += [f"{name}_gradient_calls", f"{name}_other_calls"]
    header += ["difference", "difference_lo", "difference_hi", "package_lower", "why", "results"]
    lines: list[list[object]] = []
    for duel in board.duels:
        any_ = duel.package.any
        line: list[object] = [any_.defense, duel.kind, " ".join(any_.knows), " ".join(any_.sites)]
        line += [board.track, board.norm, board.eps, board.images]
        for pool, robust in zip((duel.package, duel.ours), duel.robust, strict=True):
            line += [None, None] if pool is None else [pool.any.threat, pool.attack]
            line += fractions(robust)
            if pool is None or not pool.counted:
                line += [None, None]
            else:
                line += [round(pool.gradient_calls, 6), round(pool.other_calls, 6)]
        line += [*fractions(duel.difference), duel.lower, duel.why]
        pools = [pool for pool in (duel.package, duel.ours) if pool is not None]
        line += [" ".join(record.name for pool in pools for record in pool.records)]
        lines.append(line)
    return to_csv_text(header, lines)


def sweeps_to_csv(board: Leaderboard) -> str:
    """One line per value that was swept over; accuracies are fractions."""
    header = ["defense", "threat", "seed", "axis", "value", "standard", "track", "images", "draws"]
    header += [f"{key}{end}" for key in ("accuracy", "fall") for end in ("", "_lo", "_hi")]
    header += ["zero_gradient", "chance", "flags", "notes"]
    lines: list[list[object]] = []
    for found in board.sweeps:
        for value in found.values:
            line: list[object] = [found.defense, found.threat, found.seed, found.axis, value.value]
            line += [found.standard, found.track, found.images, found.draws]
            line += [*fractions(_estimate(value.accuracy)), *fractions(_estimate(value.fall))]
            line += [value.zero_gradient, round(found.chance, 6)]
            line += ["; ".join(f"{flag.name}: {flag.message}" for flag in found.flags)]
            lines.append([*line, "; ".join(found.notes)])
    return to_csv_text(header, lines)


def attacks_to_markdown(board: Leaderboard) -> str:
    """For reading on a page: attacks side by side, their worst case, and what each one cost."""
    text = [f"# Attacks on {md(board.title)}", ""]
    if board.attacks:
        text += _side_by_side(board)
    text += [*_verdicts(board.attacks), *_duels(board.duels), *_sweeps(board)]
    text += _efforts(board.attacks)
    return "\n".join([*text, BOOTSTRAP]) + "\n"


def _side_by_side(board: Leaderboard) -> list[str]:
    text = [
        (
            "Robust accuracy in percent under each attack, and in the worst case over all of "
            f"them, with {100 * LEVEL:.0f} % intervals ({board.norm}, eps = "
            f"{shown_eps(board.eps)}, {board.images} images). In parentheses: network calls of the "
            "search, over those of the first attack, where they are not equal; such attacks differ "
            "in effort, not only in how they search. No query: the search never calls the defense."
        ),
        "",
    ]
    for known in (False, True):
        rows = [row for row in board.attacks if row.known == known]
        if not rows:
            continue
        threats = _threats(rows)
        text += [f"## All draws {_knowledge(rows[0])}", ""]
        lines = [
            ["Defense", *(md(name) for name in threats), "Worst case"],
            [":--", *("--:" for _ in threats), "--:"],
        ]
        for row in rows:
            cells = [_attack_cell(row, name) for name in threats]
            lines.append([md_name(row.defense, row.kind), *cells, percent(row.worst)])
        text += [*md_lines(lines), ""]
    return [*text, _WORST, ""]


def _verdicts(rows: Sequence[Attacks]) -> list[str]:
    """What packages say of themselves, beside what we say."""
    found = [(row, name, verdict) for row in rows for name, verdict in row.verdicts.items()]
    if not found:
        return []
    lines = [
        ["Defense", "Draws", "Threat", "The package's verdict", "Ours", "The package's minus ours"],
        [":--", ":--", ":--", "--:", "--:", "--:"],
    ]
    for row, name, verdict in found:
        cells = [md_name(row.defense, row.kind), _knowledge(row), md(name)]
        cells += [percent(verdict.package), percent(row.robust[name])]
        lines.append([*cells, percent(verdict.gap, sign=True)])
    return ["## AutoAttack's own verdict", "", *md_lines(lines), "", _VERDICT, ""]


def _duels(duels: Sequence[Duel]) -> list[str]:
    """Packages' attacks against ours."""
    if not duels:
        return []
    lines = [
        [
            *("Defense", "Knows", "Package's attack", "Left", "Calls"),
            *("Ours, at most as many calls", "Left", "Calls"),
            *("Package's minus ours", "Package's lower?"),
        ],
        [":--", ":--", ":--", "--:", "--:", ":--", "--:", "--:", "--:", ":--"],
    ]
    for duel in duels:
        package, ours = duel.package, duel.ours
        cells = [md_name(package.any.defense, duel.kind), _knows(package)]
        cells += [md(f"{package.any.threat} ({package.attack})"), percent(duel.robust[0])]
        cells.append(_calls(package) if package.counted else "")
        if ours is None:
            cells += [md(duel.why), "", "", "", ""]
        else:
            cells += [md(f"{ours.any.threat} ({ours.attack})"), percent(duel.robust[1])]
            cells += [_calls(ours), percent(duel.difference, sign=True)]
            cells.append("**yes**" if duel.lower else "no")
        lines.append(cells)
    compared = [duel for duel in duels if duel.ours is not None]
    lower = sum(bool(duel.lower) for duel in compared)
    total = (
        f"Of {len(compared)} comparisons, the package's attack leaves less by more than the "
        f"interval in {lower}."
    )
    return ["## Packages against ours", "", *md_lines(lines), "", f"{total} {_DUELS}", ""]


def _sweeps(board: Leaderboard) -> list[str]:
    """What was swept over, and what that said."""
    if not board.sweeps:
        return ["## Sweeps", "", "None was run. `dbp-bench sweep` runs some.", ""]
    lines = [
        ["Defense", "Threat", "Seed", "Over", "Images x draws", "Left at each value", "Said"],
        [":--", ":--", "--:", ":--", "--:", ":--", ":--"],
    ]
    for found in board.sweeps:
        cells = [md(found.defense), md(found.threat), str(found.seed), found.axis]
        cells += [f"{found.images} x {found.draws}", "; ".join(_swept(found))]
        said = [f"**{flag.name}**: {md(flag.message)}" for flag in found.flags]
        said += [f"undecided: {md(note)}" for note in found.notes]
        lines.append([*cells, "; ".join(said) or "no flag"])
    return [
        "## Sweeps",
        "",
        *md_lines(lines),
        "",
        "Its own: the value that the threat model says.",
        "",
    ]


def _swept(found: Findings) -> list[str]:
    """Each value, and the accuracy there."""
    cells = []
    for each in found.values:
        value = each.value if isinstance(each.value, str) else f"{each.value:g}"
        left = percent(_estimate(each.accuracy)) or "zero gradients only"
        cells.append(f"{md(value)}{' (its own)' if each.value == found.standard else ''}: {left}")
    return cells


def _estimate(interval: Interval | None) -> Estimate | None:
    return None if interval is None else Estimate(interval.value, interval.low, interval.high)


def _efforts(rows: Sequence[Attacks]) -> list[str]:
    """How each attack searched, and what that cost on each defense."""
    if not rows:
        return []
    folded: dict[tuple[str, str, str, str], dict[str, list[str]]] = {}
    for row in rows:
        for name, pool in row.pools.items():
            how = in_words(pool.searched(pool.any.effort))
            defenses = folded.setdefault((name, _knowledge(row), pool.attack, how), {})
            defenses.setdefault(_cost(pool), []).append(row.defense)
    lines = [
        ["Threat", "Draws", "Attack", "Effort", "Calls with a gradient + others"],
        [":--", ":--", ":--", ":--", ":--"],
    ]
    for (name, draws, attack, how), costs in folded.items():
        cost = [f"{', '.join(map(md, names))}: {text}" for text, names in costs.items()]
        lines.append([md(name), draws, md(attack), md(how), "; ".join(cost)])
    return ["## Effort", "", *md_lines(lines), "", _CALLS, ""]


def _cost(pool: Pool) -> str:
    """Network calls, or what is spent where the defense isn't called."""
    if not pool.queries:
        return f"no query{_spent(pool)}"
    return f"{pool.gradient_calls:.0f} + {pool.other_calls:.0f}"


def _spent(pool: Pool) -> str:
    """What a transfer attack spends on its source."""
    effort = pool.any.effort
    try:
        setup = Setup(hidden=effort.get("source") != "none")
        passes = EFFORTS["transfer"].model_validate(effort).passes(setup)
    except ValidationError:
        return ""  # a record of before, or of another version
    counts = {"gradients": passes.gradients, "other calls": passes.looks}
    spent = " and ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    return f", but {'' if passes.exact else 'at most '}{spent} of {md(str(effort['source']))}"


def _calls(pool: Pool) -> str:
    return f"{pool.calls:.0f}" if pool.queries else "no query"


def _knows(pool: Pool) -> str:
    if pool.all_known:
        return "all"
    return md(", ".join(sorted(pool.knows))) or "nothing"


def _threats(rows: Iterable[Attacks]) -> list[str]:
    """All threat models of `rows`, the leaderboard's own first."""
    rows = list(rows)
    own = [name for row in rows for name in row.pools if name in MAIN]
    return list(dict.fromkeys([*own, *sorted(name for row in rows for name in row.pools)]))


def _knowledge(row: Attacks) -> str:
    return "known" if row.known else "hidden"


def _unequal(ratio: float | None) -> bool:
    return ratio is not None and abs(ratio - 1) > _CALLS_DIFFER


def _attack_cell(row: Attacks, threat: str) -> str:
    if threat not in row.robust:
        return ""
    ratio = row.ratios[threat]
    mark = f" ({ratio:.2g}x)" if ratio is not None and _unequal(ratio) else ""
    if not row.pools[threat].queries:
        mark = " (no query)"
    return row.robust[threat].percent() + mark
