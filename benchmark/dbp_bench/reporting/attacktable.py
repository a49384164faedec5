"""What attacks other than the leaderboard's own found, as CSV and Markdown, and what they cost."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import pandas as pd

from dbp_bench.reporting.findings import Findings
from dbp_bench.reporting.frames import (
    Marked,
    cell,
    frame_of,
    named,
    percent,
    to_csv,
    to_markdown,
)
from dbp_bench.reporting.leaderboard import Leaderboard
from dbp_bench.reporting.rendering import md, note, shown_eps
from dbp_bench.reporting.tables import of_track

_UNEQUAL: Final = 0.02
"""From this share of evaluations on, two attacks are marked as of unequal effort."""


def csv_tables(board: Leaderboard) -> Mapping[str, str]:
    """The CSV files of other attacks, by how their names end; those that have rows."""
    frames = {
        "-third-party.csv": of_track(board.third_party, board),
        "-sweeps.csv": _sweeps_frame(board.sweeps),
        "-attacks.csv": of_track(board.attacks.drop(columns="search", errors="ignore"), board),
    }
    return {end: to_csv(frame) for end, frame in frames.items() if "defense" in frame}


def _sweeps_frame(findings: Sequence[Findings]) -> pd.DataFrame:
    """A row for each value that was swept over."""
    return frame_of(
        {
            **{"track": found.track, "defense": found.defense, "threat": found.threat},
            **{
                "attack": found.attack,
                "seed": found.seed,
                "axis": found.axis,
                "value": value.value,
            },
            **{"standard": found.standard, "images": found.images, "draws": found.draws},
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


def attacks_markdown(board: Leaderboard) -> str:
    """For reading on a page: attacks side by side, their worst case, and what each one cost."""
    text = [f"# Attacks on {md(board.title)}", ""]
    frame = board.attacks
    if not frame.empty:
        text += _side_by_side(board)
        text += _verdicts(frame)
    if not board.third_party.empty:
        text += _third_party(board.third_party)
    text += _sweeps(board)
    if not frame.empty:
        text += _efforts(board)
    return "\n".join([*text, note("bootstrap")]) + "\n"


def _titled(frame: pd.DataFrame) -> pd.DataFrame:
    """The columns that are shown by name, with the defenses that are controls marked."""
    names = [named(*pair) for pair in zip(frame["defense"], frame["kind"], strict=True)]
    frame = frame.assign(defense=pd.Series(names, index=frame.index, dtype=object))
    return frame.rename(columns=lambda name: name.replace("_", " ").capitalize())


def _side_by_side(board: Leaderboard) -> list[str]:
    """By what is known, a table of attacks by defenses."""
    said = note("beside", norm=board.norm, eps=shown_eps(board.eps), images=board.images)
    text = [said, ""]
    frame = _titled(board.attacks)
    frame["cell"] = pd.Series([_left(row) for _, row in board.attacks.iterrows()], dtype=object)
    setting = ["Threat", "Attack"]
    frame["Other"] = ~frame.groupby(["Knows", *setting])["Own"].transform("max").astype(bool)
    for knows, group in frame.groupby("Knows", sort=False):
        table = group.pivot(index=["Other", *setting], columns="Defense", values="cell")
        worst = group.drop_duplicates("Defense").set_index("Defense")["Worst case"]
        last = frame_of([{"Threat": "worst case", "Attack": "any of these", **worst}])
        table = pd.concat([table.reset_index(), last]).drop(columns="Other")
        text += [f"## Attacks that know {_KNOWS.get(str(knows), knows)}", "", *to_markdown(table)]
    return [*text, note("worst"), ""]


_KNOWS: Final = {"none": "no draw", "all": "all draws"}


def _left(row: Any) -> Marked:
    """What an attack left standing, and how its effort compares where it isn't equal."""
    if row.gradient_evaluations == row.forward_evaluations == 0:
        return Marked(f"{percent(row.robust)} (no query)")
    unequal = row.ratio is not None and abs(row.ratio - 1) > _UNEQUAL
    return Marked(percent(row.robust) + (f" ({row.ratio:.2g}x)" if unequal else ""))


def _verdicts(frame: pd.DataFrame) -> list[str]:
    """What packages say of themselves, beside what we say."""
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


def _sweeps(board: Leaderboard) -> list[str]:
    """What was swept over, and what that said."""
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
    """Each value, and the accuracy there."""
    cells = []
    for each in found.values:
        value = each.value if isinstance(each.value, str) else f"{each.value:g}"
        left = percent(each.accuracy) or "zero gradients only"
        cells.append(f"{md(value)}{' (its own)' if each.value == found.standard else ''}: {left}")
    return cells


def _efforts(board: Leaderboard) -> list[str]:
    """How each attack searched, and what that took on each defense."""
    frame = board.attacks
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
