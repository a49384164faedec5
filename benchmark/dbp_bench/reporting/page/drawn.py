"""Which figures a page shows, from its leaderboard; one without data says what would give it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from markupsafe import Markup

from dbp_bench.reporting.findings import Findings, Interval
from dbp_bench.reporting.leaderboard import Leaderboard, Row
from dbp_bench.reporting.page.columns import serving
from dbp_bench.reporting.page.figures import (
    Level,
    Point,
    Series,
    Split,
    decomposition,
    panel,
    plane,
    strips,
    swatch,
    swatch_of,
)
from dbp_bench.reporting.pool import Pool
from dbp_bench.reporting.records import NULL
from dbp_bench.reporting.statistics import Estimate
from dbp_bench.result import without_draws

ARROWS: Final = (("ddpm", "addt"),)
"""From a defense to the one that was trained from it."""


@dataclass(frozen=True)
class Figure:
    """A figure of the page."""

    title: str
    caption: str
    drawings: Sequence[Markup]
    legend: Sequence[tuple[Markup, str]]
    missing: str = ""
    """The command that would give the data; empty where there is some."""


def figures(board: Leaderboard) -> list[Figure]:
    """All of them, in order."""
    makers: tuple[Callable[[Leaderboard], Figure], ...] = (
        _decomposition,
        _plane,
        _eot,
        _knowledge,
        _strips,
        _eps,
        _cost,
        _effort,
    )
    return [make(board) for make in makers]


def _run(board: Leaderboard, threats: str) -> str:
    return f"dbp-bench run --track {board.track} --defense all --threat {threats}"


def _sweep(board: Leaderboard, over: str) -> str:
    return f"dbp-bench sweep DEFENSE --track {board.track} --threat eot --over {over}"


def _decomposition(board: Leaderboard) -> Figure:
    splits = [
        Split(
            name=row.defense,
            clean=clean,
            undefended=_value(row, "undefended"),
            purification=row.estimates["purification"],
            known=row.estimates["all_known"],
            stochasticity=row.estimates["stochasticity"],
            forward=_value(row, "stochasticity_forward"),
            reverse=_value(row, "stochasticity_reverse"),
            hidden=row.estimates["hidden"],
        )
        for row in board.rows
        if (clean := row.estimates["clean"]) is not None
        and (row.estimates["hidden"] or row.estimates["all_known"])
    ]
    kinds = {"undefended": "undefended", "purification": "purification, P"}
    kinds |= {"forward": "hidden forward noise", "reverse": "hidden reverse noise"}
    if any(s.stochasticity and (s.forward is None or s.reverse is None) for s in splits):
        kinds["unsplit"] = "hidden noise, not split"
    if any(s.purification is None and s.known for s in splits):
        kinds["known"] = "left with all noise known"
    if any(s.known is None for s in splits):
        kinds["unknown"] = "not split: known draws were not measured"
    kinds["outline"] = "clean accuracy"
    return Figure(
        title="Where the robustness comes from",
        caption="Each bar ends at the accuracy with nothing known. What is left with all noise "
        "known, above the undefended classifier, is purification (P); what hiding the noise adds "
        "is stochasticity (S), split between forward and all other noise by the Shapley value. "
        "Lines: intervals of P and of S. Hatched: a negative part.",
        drawings=[decomposition(splits)] if splits else [],
        legend=[(swatch_of(kind), text) for kind, text in kinds.items()],
        missing="" if splits else _run(board, "eot,dw-fwd,dw-rev,dwbox"),
    )


def _plane(board: Leaderboard) -> Figure:
    points = [
        Point(row.defense, known.value, hidden, known, row.kind == "control")
        for row in board.rows
        if (hidden := row.estimates["hidden"]) and (known := row.estimates["all_known"])
    ]
    names = {point.name for point in points}
    arrows = [pair for pair in ARROWS if names.issuperset(pair)]
    legend = [
        (swatch_of("point"), "defense"),
        (swatch_of("point control"), "control"),
        (swatch_of("diagonal"), "hiding the noise adds nothing"),
    ]
    if arrows:
        said = ", ".join(" to ".join(pair) for pair in arrows)
        legend.append((swatch_of("arrow"), f"trained from: {said}"))
    drawing = plane(
        points,
        arrows,
        "Accuracy with nothing known against accuracy with all noise known",
        "accuracy with all noise known, %",
        "accuracy with nothing known, %",
    )
    return Figure(
        title="Hidden against known",
        caption="The height above the diagonal is what hiding the noise adds; to the right is what "
        "purification gives by itself. Lines through the points: intervals.",
        drawings=[drawing] if points else [],
        legend=legend,
        missing="" if points else _run(board, "eot,dwbox"),
    )


def _eot(board: Leaderboard) -> Figure:
    found: dict[str, tuple[list[Series], list[Level]]] = {}
    swept = False
    for row in board.rows:
        series = []
        points = _eot_points(row, board)
        if len(points) > 1:
            series.append(Series("results", 0, points))
        for each in board.sweeps:
            if each.defense == row.defense and each.axis == "eot" and (at := _measured(each)):
                swept = True
                series.append(Series(f"sweep of {each.threat}", 1, at))
        known = row.estimates["all_known"]
        if series:
            found[row.defense] = (series, [Level("all noise known", known.value)] if known else [])
    top = _top(found)
    everything = [x for series, _ in found.values() for each in series for x, _ in each.points]
    legend = [(swatch(0), "results, same search but for EoT")]
    if swept:
        legend.append((swatch(1), "sweeps, on their own images and draws"))
    legend.append((swatch_of("level"), "all noise known"))
    return Figure(
        title="Accuracy against EoT",
        caption="More gradient draws per step (EoT) bring an attacker who knows no draw nearer to "
        "one who knows all of them. Efforts differ along the axis.",
        drawings=[
            panel(
                name,
                series,
                levels,
                axis="log",
                x_name="EoT, gradient draws per step",
                top=top,
                low=min(everything),
                high=max(everything),
            )
            for name, (series, levels) in found.items()
        ],
        legend=legend,
        missing="" if found else _sweep(board, "eot=1,10,40"),
    )


def _eot_points(row: Row, board: Leaderboard) -> list[tuple[float, Estimate]]:
    """Results that know nothing, and differ in EoT only."""
    own = serving(row, "hidden")
    if own is None or not own.sites:
        return []
    alike = [
        pool
        for pool, _ in board.settings
        if pool.any.defense == row.defense
        and pool.any.eps == board.eps
        and not pool.knows
        and pool.attack == own.attack
        and without_draws(pool.any.effort) == without_draws(own.any.effort)
        and isinstance(pool.any.effort.get("eot"), int)
    ]
    by_eot = {pool.any.effort["eot"]: pool for pool in alike}
    return [(eot, _robust(by_eot[eot], board)) for eot in sorted(by_eot)]


_KNOWLEDGE: Final = {
    "hidden": "nothing",
    "forward_known": "forward",
    "reverse_known": "reverse",
    "all_known": "all",
}


def _knowledge(board: Leaderboard) -> Figure:
    found: dict[str, tuple[list[Series], list[Level]]] = {}
    for row in board.rows:
        points = [
            (float(i), estimate)
            for i, key in enumerate(_KNOWLEDGE)
            if (estimate := row.estimates[key]) is not None
        ]
        if row.pools[0].sites and len(points) > 1:
            zero = row.estimates["undefended"]
            levels = [Level("undefended", zero.value)] if zero else []
            found[row.defense] = ([Series("accuracy", 0, points)], levels)
    top = _top(found)
    return Figure(
        title="Accuracy against what the attacker knows",
        caption="At equal effort. Reverse stands for all noise but the forward noise.",
        drawings=[
            panel(
                name,
                series,
                levels,
                axis="names",
                names=list(_KNOWLEDGE.values()),
                x_name="noise that is known",
                top=top,
            )
            for name, (series, levels) in found.items()
        ],
        legend=[(swatch(0), "accuracy"), (swatch_of("level"), "undefended")],
        missing="" if found else _run(board, "eot,dw-fwd,dw-rev,dwbox"),
    )


def _strips(board: Leaderboard) -> Figure:
    drawings = []
    for row in board.rows:
        pools = {key: serving(row, key) for key in _KNOWLEDGE}
        # A result that serves several columns is shown once, under its own name.
        shown = {
            id(pool): key
            for own in (False, True)
            for key, pool in pools.items()
            if pool is not None and (key not in row.served_by) == own
        }
        rows = {
            f"{name} known": _shares([record.result.robust for record in pool.records])
            for key, name in _KNOWLEDGE.items()
            if (pool := pools[key]) is not None and shown[id(pool)] == key
        }
        if pool := serving(row, "hidden") or serving(row, "clean"):
            rows["clean"] = _shares([r.result.clean for r in pool.records])
        if len(rows) > 1:
            drawings.append(strips(row.defense, rows))
    return Figure(
        title="Image by image",
        caption="One column for each image, in the same order in all rows of a defense: by the "
        "first row, then by the next ones. The colour is the share of draws at which the image is "
        "classified right. A defense without chance makes a step, one that lives on it a slope.",
        drawings=drawings,
        legend=[
            (swatch_of("right"), "right at every draw"),
            (swatch_of("half"), "at half of them"),
            (swatch_of("wrong"), "at none"),
        ],
        missing="" if drawings else _run(board, "eot,dwbox"),
    )


def _shares(tables: Sequence[Sequence[Sequence[bool]]]) -> list[float]:
    """Of each image, over the draws of all seeds."""
    return [sum(map(sum, rows)) / sum(map(len, rows)) for rows in zip(*tables, strict=True)]


def _eps(board: Leaderboard) -> Figure:
    found: dict[str, tuple[list[Series], list[Level]]] = {}
    threats: dict[str, int] = {}
    for each in board.sweeps:
        if each.axis == "eps" and (at := _measured(each)):
            style = threats.setdefault(each.threat, len(threats))
            series, levels = found.setdefault(each.defense, ([], []))
            series.append(Series(each.threat, style, at))
            levels[:] = [Level("chance", max([each.chance, *(level.value for level in levels)]))]
    top = _top(found)
    return Figure(
        title="Accuracy against eps",
        caption="Down to the end point: at the largest eps any image can become plain grey, and no "
        "more than chance may be left; more than that is a masked gradient.",
        drawings=[
            panel(name, series, levels, axis="linear", x_name=f"eps, {board.norm}", top=top)
            for name, (series, levels) in found.items()
        ],
        legend=[
            *((swatch(style), threat) for threat, style in threats.items()),
            (swatch_of("level"), "chance, where noise is hidden"),
        ],
        missing="" if found else _sweep(board, "eps=0.1,0.2,0.3,0.5"),
    )


def _cost(board: Leaderboard) -> Figure:
    points = [
        Point(row.defense, float(row.calls), hidden, None, row.kind == "control")
        for row in board.rows
        if (hidden := row.estimates["hidden"])
    ]
    drawing = plane(
        points,
        [],
        "Accuracy with nothing known against network calls of one purification",
        "network calls of one purification",
        "accuracy with nothing known, %",
        percent=False,
    )
    return Figure(
        title="What a defense costs",
        caption="Calls of the denoising networks to purify one image.",
        drawings=[drawing] if points else [],
        legend=[(swatch_of("point"), "defense"), (swatch_of("point control"), "control")],
        missing="" if points else _run(board, "eot"),
    )


def _effort(board: Leaderboard) -> Figure:
    found: dict[str, tuple[list[Series], list[Level]]] = {}
    for row in board.rows:
        pools = [
            pool
            for pool, _ in board.settings
            if pool.any.defense == row.defense
            and pool.any.eps == board.eps
            and pool.any.threat != NULL
            and pool.counted
            and pool.calls > 0
        ]
        series = [
            Series(name, style, sorted(((p.calls, _robust(p, board)) for p in group), key=_first))
            for style, name, group in (
                (0, "nothing known", [p for p in pools if not p.knows and not p.all_known]),
                (1, "all known", [p for p in pools if p.all_known]),
                (2, "some known", [p for p in pools if p.knows and not p.all_known]),
            )
            if group
        ]
        if len({each for s in series for each, _ in s.points}) > 1:
            unjoined = [Series(s.name, s.style, s.points, joined=False) for s in series]
            found[row.defense] = (unjoined, [])
    top = _top(found)
    calls = [x for series, _ in found.values() for each in series for x, _ in each.points]
    return Figure(
        title="What an attack costs",
        caption="Every attack that was run, by the network calls of its search for one image; the "
        "table of other attacks names them. Efforts differ along the axis.",
        drawings=[
            panel(
                name,
                series,
                levels,
                axis="log",
                x_name="network calls of the search",
                top=top,
                low=min(calls),
                high=max(calls),
            )
            for name, (series, levels) in found.items()
        ],
        legend=[
            (swatch(0), "nothing known"),
            (swatch(1), "all noise known"),
            (swatch(2), "some noise known"),
        ],
        missing="" if found else _run(board, "eot,whitebox,dwbox"),
    )


def _first(point: tuple[float, Estimate]) -> tuple[float, float]:
    return point[0], point[1].value


def _value(row: Row, key: str) -> float | None:
    estimate = row.estimates[key]
    return None if estimate is None else estimate.value


def _robust(pool: Pool, board: Leaderboard) -> Estimate:
    return board.bootstrap.estimate(pool.robust(board.bootstrap))


def _measured(found: Findings) -> list[tuple[float, Estimate]]:
    """The points of a sweep that have an accuracy."""
    return [
        (float(each.value), _estimate(each.accuracy))
        for each in found.values
        if each.accuracy is not None
    ]


def _estimate(interval: Interval) -> Estimate:
    return Estimate(interval.value, interval.low, interval.high)


def _top(found: dict[str, tuple[list[Series], list[Level]]]) -> float:
    """The highest accuracy of all panels, so that they have one axis."""
    highs = [
        *(e.high for series, _ in found.values() for each in series for _, e in each.points),
        *(level.value for _, levels in found.values() for level in levels),
    ]
    return min(1.0, max([0.1, *highs]) * 1.08)
