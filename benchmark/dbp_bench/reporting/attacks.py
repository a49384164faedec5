"""Tables of attacks other than the leaderboard's own, as CSV and Markdown.

They show attacks side by side with their evaluations and their worst case, third-party attacks
against ours, and the findings of sweeps.
"""

from collections.abc import Collection, Sequence
from typing import Any, Final

import pandas as pd

from dbp_bench.reporting.columns import CELLS
from dbp_bench.reporting.curves import figure_files
from dbp_bench.reporting.effort import BUDGET, WITHIN, Curve, curves
from dbp_bench.reporting.findings import Findings
from dbp_bench.reporting.frames import (
    Marked,
    Signed,
    cell,
    frame_of,
    named,
    percent,
    to_csv,
    to_markdown,
)
from dbp_bench.reporting.leaderboard import Leaderboard
from dbp_bench.reporting.pool import Pool, strongest
from dbp_bench.reporting.protocol import FORWARD
from dbp_bench.reporting.rendering import md, note, shown_eps
from dbp_bench.reporting.statistics import Score, proportion
from dbp_bench.reporting.tables import how, of_track, raised, setting_of
from dbp_bench.reporting.votes import worst_hidden, worst_known

_ORDER: Final = ("none", FORWARD, f"all but {FORWARD}", "all")
"""The attackers' knowledge, in the order of tables."""
_KNOWS: Final = {"none": "no draw", "all": "all draws"}
"""The knowledge in the words of titles, where they differ."""
_FEW: Final = 3
"""Points of a curve below which its area is printed as a lower bound."""
_UNEQUAL: Final = 0.02
"""The relative difference in evaluations above which an attack's effort is marked as unequal."""


def attack_files(board: Leaderboard) -> dict[str, str | bytes]:
    """The files on other attacks, by the ends of their names; files without rows are left out."""
    attacks, third_party = _attacks_frame(board), _third_party_frame(board)
    optimality = _optimality_frame(board)
    frames = {
        "-third-party.csv": of_track(third_party, board),
        "-sweeps.csv": _sweeps_frame(board.sweeps),
        "-optimality.csv": of_track(optimality, board),
        "-attacks.csv": of_track(attacks.drop(columns="search", errors="ignore"), board),
    }
    found: dict[str, str | bytes] = {
        end: to_csv(frame) for end, frame in frames.items() if "defense" in frame
    }
    for end, figure in figure_files(attack_curves(board)).items():
        found[f"-attacks{end}"] = figure
    if found or board.apart:
        found["-attacks.md"] = _markdown(board, attacks, third_party, optimality)
    return found


# --- Frames


def _attacks_frame(board: Leaderboard) -> pd.DataFrame:
    """A row for each attack, by defense and knowledge; none where only the leaderboard's own ran.

    `own` is True for the leaderboard's own attack; `ratio` is the ratio of evaluations to those of
    that attack. Where the attack's package gives a verdict, `package_verdict` is the share of
    images that it calls robust, and `package_gap` that share minus our accuracy, paired by image.
    The worst case is that of all rows of the defense and knowledge.
    """
    groups: dict[tuple[str, str], list[Pool]] = {}
    for pool in board.at_eps:
        groups.setdefault((pool.any.defense, pool.knowledge), []).append(pool)
    order = {name: i for i, name in enumerate(_ORDER)}
    by_name = {row.defense: row for row in board.rows}
    rows: list[dict[str, object]] = []
    for defense, knows in sorted(groups, key=lambda key: (key[0], order.get(key[1], 9), key[1])):
        group, row = groups[defense, knows], by_name[defense]
        serving = dict.fromkeys(pool for key, pool in row.columns.items() if key != "clean")
        own = [pool for pool in serving if pool in group]
        ordered = [*own, *(pool for pool in group if pool not in own)]
        if len(own) == len(group):
            continue
        worst, draws = _worst_case(ordered)
        first = own[0].evaluations if own else None
        rows += [
            {
                "defense": defense,
                "kind": row.kind,
                "knows": knows,
                **setting_of(pool),
                "own": pool in own,
                "draws": pool.draws,
                "robust": pool.robust.estimate,
                "search": pool.search,
                **how(pool),
                "ratio": round(count / first, 6)
                if first and (count := pool.evaluations) is not None
                else None,
                "package_verdict": cell(package.estimate if package else None),
                "package_gap": cell(package.above(pool.robust) if package else None, Signed),
                "worst_case": cell(worst and proportion(worst, draws)),
                "worst_case_draws": draws,
                "results": " ".join(record.name for record in pool.records),
            }
            for pool, package in ((pool, pool.package) for pool in ordered)
        ]
    return frame_of(rows)


def attack_curves(board: Leaderboard) -> list[list[Curve]]:
    """The curves of all attacks, by defense and knowledge, where there are several attacks."""
    groups: dict[tuple[str, str], list[Pool]] = {}
    for pool in board.at_eps:
        groups.setdefault((pool.any.defense, pool.knowledge), []).append(pool)
    by_name = {row.defense: row for row in board.rows}
    found = []
    for (defense, _), pools in sorted(groups.items(), key=_ordered):
        row = by_name[defense]
        swept = [pool for pool in board.swept if pool.any.defense == defense]
        own = next((row.columns[key] for key in CELLS if row.columns.get(key) in pools), None)
        clean = row.estimates["clean"]
        if clean and len(made := curves(pools, swept, own, clean.value)) > 1:
            found.append(made)
    return found


def _ordered(group: tuple[tuple[str, str], object]) -> tuple[int, str, str]:
    """The order of groups: by knowledge, then by defense."""
    (defense, knows), _ = group
    return _ORDER.index(knows) if knows in _ORDER else len(_ORDER), knows, defense


def _optimality_frame(board: Leaderboard) -> pd.DataFrame:
    """A row for each attack with its best accuracy, by knowledge and defense, the best one first.

    `optimality`, a lower bound where there are few `points`, is 1 for an attack that leaves least
    at every effort; `difference` is the best accuracy at up to ten times the budget of the
    leaderboard's own attack minus that attack's, paired by image, and `lower` is True where its
    whole interval is below 0.
    """
    kinds = {row.defense: row.kind for row in board.rows}
    return frame_of(
        {
            "knows": curve.knows,
            "defense": curve.defense,
            "kind": kinds[curve.defense],
            "attack": curve.attack,
            "own": curve.own,
            "points": len(curve.points),
            "best": round(curve.best.accuracy, 6),
            "evaluations": round(curve.best.evaluations, 6),
            "fewest": round(curve.points[0].evaluations, 6),
            "optimality": None if curve.optimality is None else round(curve.optimality, 6),
            "difference": cell(curve.difference, Signed),
            "lower": curve.lower,
            "results": " ".join(
                record.name for point in curve.points for record in point.pool.records
            ),
        }
        for group in attack_curves(board)
        for curve in group
    )


def _third_party_frame(board: Leaderboard) -> pd.DataFrame:
    """A row for each third-party attack, with the strongest of ours on that defense.

    Ours must have the same knowledge and at most as many evaluations; `why` is the reason if there
    is none. `difference` is the accuracy under theirs minus that under ours, paired by image, and
    `lower` is True where its whole interval is below 0.
    """
    kinds = {row.defense: row.kind for row in board.rows}
    pools = board.at_eps
    rows = []
    for theirs in (pool for pool in pools if pool.third_party):
        ours, why = _ours(theirs, pools)
        gap = theirs.robust.above(ours.robust) if ours else None
        rows.append(
            {
                "defense": theirs.any.defense,
                "kind": kinds[theirs.any.defense],
                "knows": theirs.knowledge,
                **_side("", theirs),
                **_side("ours_", ours),
                "difference": cell(gap, Signed),
                "lower": gap.high < 0 if gap else None,
                "why": why or None,
                "results": " ".join(
                    record.name for pool in (theirs, ours) if pool for record in pool.records
                ),
            }
        )
    return frame_of(rows)


def _side(prefix: str, pool: Pool | None) -> dict[str, object]:
    """One side of a comparison with a third party, as cells."""
    keys = ("threat", "attack", "gradient_evaluations", "forward_evaluations", "evaluations")
    cells = {**setting_of(pool), **how(pool)} if pool else {}
    side = {f"{prefix}{key}": cells.get(key) for key in keys}
    return {**side, f"{prefix}robust": cell(pool.robust.estimate if pool else None)}


def _ours(theirs: Pool, pools: Sequence[Pool]) -> tuple[Pool | None, str]:
    """Our strongest with at most as many evaluations as `theirs`; the reason if there is none."""
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


def _worst_case(pools: Collection[Pool]) -> tuple[Score | None, int]:
    """The worst case over attacks, on the seeds and draws they share, and the number of draws."""
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


def _sweeps_frame(findings: Sequence[Findings]) -> pd.DataFrame:
    """A row for each value that was swept over."""
    return frame_of(
        {
            "track": found.track,
            "defense": found.defense,
            "threat": found.threat,
            "attack": found.attack,
            "seed": found.seed,
            "axis": found.axis,
            "value": value.value,
            "standard": found.standard,
            "images": found.images,
            "draws": found.draws,
            "accuracy": cell(value.accuracy),
            "fall": cell(value.fall),
            "zero_gradient": value.zero_gradient,
            "chance": round(found.chance, 6),
            "flags": "; ".join(f"{flag.name}: {flag.message}" for flag in found.flags) or None,
            "notes": "; ".join(found.notes) or None,
        }
        for found in findings
        for value in found.values
    )


# --- Markdown


def _markdown(
    board: Leaderboard, attacks: pd.DataFrame, third_party: pd.DataFrame, optimality: pd.DataFrame
) -> str:
    """The tables in Markdown: which attack to use, attacks side by side, and the effort of each."""
    text = [f"# Attacks on {md(board.title)}", ""]
    if not optimality.empty:
        text += _which(board, optimality)
    if not attacks.empty:
        text += _side_by_side(board, attacks)
        text += _verdicts(attacks)
    if not third_party.empty:
        text += _third_party(third_party)
    text += _apart(board)
    text += _sweeps(board)
    if not attacks.empty:
        text += _efforts(attacks)
    return "\n".join([*text, note("bootstrap")]) + "\n"


def _titled(frame: pd.DataFrame) -> pd.DataFrame:
    """The `frame` with the headings that readers see, and the defenses that are controls marked."""
    names = [named(*pair) for pair in zip(frame["defense"], frame["kind"], strict=True)]
    frame = frame.assign(defense=pd.Series(names, index=frame.index, dtype=object))
    return frame.rename(columns=lambda name: name.replace("_", " ").capitalize())


def _which(board: Leaderboard, frame: pd.DataFrame) -> list[str]:
    """The attacks at each knowledge, the best one first, and whether any beats the board's own."""
    own = board.reference.label if board.reference else None
    budget = board.reference.effort.get(BUDGET) if board.reference else None
    text = ["## Which attack to use", ""]
    compared = frame["lower"].notna()
    if own and compared.any():
        lower = frame[frame["lower"].eq(True)]
        where = [f"{row.attack} on {row.defense}" for row in lower.itertuples()]
        said = f"in {len(where)}" + (f" ({', '.join(where)})" if where else "")
        effort = (f"budget of {budget}" if budget else "evaluations") + raised(board)
        total = (
            f"Of {compared.sum()} comparisons with {md(own)}, another attack at up to {WITHIN} "
            f"times its {effort} leaves less by more than the paired interval {md(said)}."
        )
        text += [total, ""]
    if frame["knows"].isin(["none", "all"]).any():  # the figure's panels
        text += [f"![Accuracy against effort]({board.track}-attacks.svg)", ""]
    pairs = zip(frame["attack"], frame["own"], strict=True)
    names = [Marked(f"**{md(name)}**" if bold else md(name)) for name, bold in pairs]
    shown = _titled(frame).assign(
        Attack=pd.Series(names, dtype=object),
        Best=[f"{100 * best:.1f}" for best in frame["best"]],
        Evaluations=[f"{count:.0f}" for count in frame["evaluations"]],
        Optimality=[
            "" if x is None else f"{x:.2f}" if n >= _FEW else f"{x:.2f}+"
            for x, n in zip(frame["optimality"], frame["points"], strict=True)
        ],
        Lower=frame["lower"].map({True: Marked("**yes**"), False: "no"}).astype(object),
    )
    columns = ["Defense", "Attack", "Points", "Best", "Evaluations", "Optimality"]
    for knows, group in shown.groupby("Knows", sort=False):
        table = group[[*columns, "Difference", "Lower"]]
        text += [f"### Knows {_KNOWS.get(str(knows), knows)}", "", *to_markdown(table)]
    return [*text, note("optimality", within=WITHIN, few=_FEW), ""]


def _side_by_side(board: Leaderboard, attacks: pd.DataFrame) -> list[str]:
    """A table for each knowledge, with a row for each attack and a column for each defense."""
    said = note("beside", norm=board.norm, eps=shown_eps(board.eps), images=board.images)
    text = [said, ""]
    frame = _titled(attacks)
    frame["cell"] = pd.Series([_left(row) for _, row in attacks.iterrows()], dtype=object)
    setting = ["Threat", "Attack"]
    frame["Other"] = ~frame.groupby(["Knows", *setting])["Own"].transform("max").astype(bool)
    for knows, group in frame.groupby("Knows", sort=False):
        table = group.pivot(index=["Other", *setting], columns="Defense", values="cell")
        worst = group.drop_duplicates("Defense").set_index("Defense")["Worst case"]
        last = frame_of([{"Threat": "worst case", "Attack": "any of these", **worst}])
        table = pd.concat([table.reset_index(), last]).drop(columns="Other")
        text += [f"## Attacks that know {_KNOWS.get(str(knows), knows)}", "", *to_markdown(table)]
    return [*text, note("worst"), ""]


def _left(row: Any) -> Marked:
    """The robust accuracy under an attack, and the ratio of its effort where that isn't equal."""
    if row.gradient_evaluations == row.forward_evaluations == 0:
        return Marked(f"{percent(row.robust)} (no query)")
    unequal = row.ratio is not None and abs(row.ratio - 1) > _UNEQUAL
    return Marked(percent(row.robust) + (f" ({row.ratio:.2g}x)" if unequal else ""))


def _verdicts(frame: pd.DataFrame) -> list[str]:
    """The verdicts of attack packages, beside our accuracies."""
    shown = _titled(frame[[percent(each) != "" for each in frame["package_verdict"]]])
    if shown.empty:
        return []
    columns = ["Defense", "Knows", "Threat", "Attack", "Package verdict", "Robust", "Package gap"]
    return ["## AutoAttack's own verdict", "", *to_markdown(shown[columns]), note("verdict"), ""]


def _third_party(frame: pd.DataFrame) -> list[str]:
    """Third-party attacks against ours."""
    shown = _titled(frame)
    compared = frame["lower"].notna()
    for key in ("Evaluations", "Ours evaluations"):
        shown[key] = [None if count is None else round(count) for count in shown[key]]
    shown["Lower"] = frame["lower"].map({True: Marked("**yes**"), False: "no"}).astype(object)
    shown.loc[~compared, "Ours attack"] = frame["why"]
    columns = ["Defense", "Knows", "Threat", "Attack", "Robust", "Evaluations"]
    columns += ["Ours threat", "Ours attack", "Ours robust", "Ours evaluations"]
    table = to_markdown(shown[[*columns, "Difference", "Lower"]])
    total = (
        f"Of {compared.sum()} comparisons, the third-party attack leaves less by more than the "
        f"interval in {frame['lower'].eq(True).sum()}."
    )
    return ["## Third-party attacks against ours", "", *table, f"{total} {note('third_party')}", ""]


def _apart(board: Leaderboard) -> list[str]:
    """The attacks with a bound of their own, whose accuracies stand in no other table."""
    if not board.apart:
        return []
    kinds = {row.defense: row.kind for row in board.rows}
    frame = frame_of(
        {
            "defense": pool.any.defense,
            "kind": kinds[pool.any.defense],
            "knows": pool.knowledge,
            **setting_of(pool),
            "bound": pool.bound,
            "robust": pool.robust.estimate,
            "evaluations": _cost(pd.Series(how(pool))),
        }
        for pool in board.apart
    )
    table = to_markdown(_titled(frame).drop(columns="Kind"))
    return ["## Attacks with a bound of their own", "", *table, note("apart", norm=board.norm), ""]


def _sweeps(board: Leaderboard) -> list[str]:
    """The sweeps, with the accuracy at each value and their findings."""
    if not board.sweeps:
        return ["## Sweeps", "", "None was run. `dbp-bench sweep` runs some.", ""]
    table = frame_of(
        {
            "Defense": found.defense,
            "Threat": found.threat,
            "Attack": found.attack,
            "Seed": found.seed,
            "Over": found.axis,
            "Images x draws": f"{found.images} x {found.draws}",
            "Left at each value": Marked("; ".join(_swept(found))),
            "Said": Marked("; ".join(_findings(found)) or "no flag"),
        }
        for found in board.sweeps
    )
    own = "Its own: the value that the threat model says."
    return ["## Sweeps", "", *to_markdown(table), own, ""]


def _findings(found: Findings) -> list[str]:
    said = [f"**{flag.name}**: {md(flag.message)}" for flag in found.flags]
    return said + [f"undecided: {md(note)}" for note in found.notes]


def _swept(found: Findings) -> list[str]:
    """Each value of a sweep, and the accuracy there."""
    cells = []
    for each in found.values:
        value = each.value if isinstance(each.value, str) else f"{each.value:g}"
        left = percent(each.accuracy) or "zero gradients only"
        cells.append(f"{md(value)}{' (its own)' if each.value == found.standard else ''}: {left}")
    return cells


def _efforts(frame: pd.DataFrame) -> list[str]:
    """The effort of each attack, and its evaluations on each defense."""
    setting = ["Knows", "Threat", "Attack", "Effort"]
    long = _titled(frame).assign(
        Effort=frame["search"],
        Cost=[_cost(row) for _, row in frame.iterrows()],
        Defense=frame["defense"],
    )
    folded = long.groupby([*setting, "Cost"], sort=False)["Defense"].agg(", ".join).reset_index()
    column = "Gradient + forward evaluations"
    folded[column] = folded["Defense"] + ": " + folded["Cost"]
    table = folded.groupby(setting, sort=False)[column].agg("; ".join).reset_index()
    return ["## Effort", "", *to_markdown(table.astype(object)), note("evaluations"), ""]


def _cost(row: Any) -> str:
    if row.gradient_evaluations is None:
        return "not recorded"
    if row.gradient_evaluations == row.forward_evaluations == 0:
        return "no query"
    cost = f"{row.gradient_evaluations:.0f} + {row.forward_evaluations:.0f}"
    if row.searched_nfe in (None, row.nfe):
        return cost
    return f"{cost}, of {row.searched_nfe} NFE in place of {row.nfe}"
