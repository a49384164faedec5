"""Which figures a page shows, from its leaderboard; one without data says what would give it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from markupsafe import Markup

from dbp_bench.reporting.findings import Findings
from dbp_bench.reporting.leaderboard import Leaderboard, Row
from dbp_bench.reporting.page.charts import (
    Axis,
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
from dbp_bench.reporting.protocol import KNOWN
from dbp_bench.reporting.statistics import Estimate
from dbp_bench.result import Right, without_draws

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


def _run(board: Leaderboard, *keys: str) -> str:
    """The command that measures these columns."""
    columns = {each.key: each.threat for each in board.protocol.columns}
    threats = ",".join(columns[key] for key in keys if key in columns)
    return f"dbp-bench run --track {board.track} --defense all --threat {threats or 'all'}"


def _sweep(board: Leaderboard, over: str) -> str:
    threat = next(
        (each.threat for each in board.protocol.columns if each.key == "hidden"), "THREAT"
    )
    return f"dbp-bench sweep DEFENSE --track {board.track} --threat {threat} --over {over}"


_Found = dict[str, tuple[list[Series], list[Level]]]
"""By the title of a panel, what is drawn in it."""


def _panels(found: _Found, x_name: str, axis: Axis, names: Sequence[str] = ()) -> list[Markup]:
    """Small figures with the same axes; on a linear one, each as wide as its own points."""
    highs = [
        *(e.high for series, _ in found.values() for each in series for _, e in each.points),
        *(level.value for _, levels in found.values() for level in levels),
    ]
    top = min(1.0, max([0.1, *highs]) * 1.08)
    xs = [x for series, _ in found.values() for each in series for x, _ in each.points]
    ends = {"low": min(xs), "high": max(xs)} if axis == "log" and xs else {}
    return [
        panel(title, series, levels, axis=axis, names=names, x_name=x_name, top=top, **ends)
        for title, (series, levels) in found.items()
    ]


def _decomposition(board: Leaderboard) -> Figure:
    splits = [
        Split(
            name=row.defense,
            clean=clean,
            base=_value(row, "base"),
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
    kinds = {"base": "base classifier", "purification": "purification, P"}
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
        caption="Each bar ends at the accuracy with no draw known. What is left with all noise "
        "known, above the base classifier, is purification (P); what hiding the noise adds "
        "is stochasticity (S), split between forward and all other noise by the Shapley value. "
        "Lines: intervals of P and of S. Hatched: a negative part.",
        drawings=[decomposition(splits)] if splits else [],
        legend=[(swatch_of(kind), text) for kind, text in kinds.items()],
        missing="" if splits else _run(board, *KNOWN),
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
        "Accuracy with no draw known against accuracy with all noise known",
        "accuracy with all noise known, %",
        "accuracy with no draw known, %",
    )
    return Figure(
        title="Hidden against known",
        caption="The height above the diagonal is what hiding the noise adds; to the right is what "
        "purification gives by itself. Lines through the points: intervals.",
        drawings=[drawing] if points else [],
        legend=legend,
        missing="" if points else _run(board, "hidden", "all_known"),
    )


def _eot(board: Leaderboard) -> Figure:
    found: _Found = {}
    swept = False
    for row in board.rows:
        series = []
        points = _eot_points(row, board)
        if len(points) > 1:
            series.append(Series("results", 0, points))
        for each in board.sweeps:
            if each.defense == row.defense and each.axis == "eot" and (at := _measured(each)):
                swept = True
                series.append(Series(f"sweep of {each.setting}", 1, at))
        known = row.estimates["all_known"]
        if series:
            found[row.defense] = (series, [Level("all noise known", known.value)] if known else [])
    legend = [(swatch(0), "results, same search but for EoT")]
    if swept:
        legend.append((swatch(1), "sweeps, on their own images and draws"))
    legend.append((swatch_of("level"), "all noise known"))
    return Figure(
        title="Accuracy against EoT",
        caption="More gradient draws per step (EoT samples) bring an attacker who knows no draw "
        "nearer to one who knows all of them. Efforts differ along the axis.",
        drawings=_panels(found, "EoT samples per step", "log"),
        legend=legend,
        missing="" if found else _sweep(board, "eot=1,10,40"),
    )


def _eot_points(row: Row, board: Leaderboard) -> list[tuple[float, Estimate]]:
    """Results that know nothing, and differ in EoT only."""
    own = row.columns.get("hidden")
    if own is None or not own.sites:
        return []
    alike = [
        pool
        for pool in _pools(row, board)
        if not pool.knows
        and (pool.any.attack, pool.any.gradient) == (own.any.attack, own.any.gradient)
        and without_draws(pool.any.effort) == without_draws(own.any.effort)
        and isinstance(pool.any.effort.get("eot"), int)
    ]
    by_eot = {pool.any.effort["eot"]: pool for pool in alike}
    return [(eot, by_eot[eot].left) for eot in sorted(by_eot)]


def _pools(row: Row, board: Leaderboard) -> list[Pool]:
    """All results of a defense at the leaderboard's eps."""
    return [
        pool
        for pool, _ in board.pools
        if pool.any.defense == row.defense and pool.any.eps == board.eps > 0
    ]


_KNOWLEDGE: Final = dict(zip(KNOWN, ("none", "forward", "reverse", "all"), strict=True))


def _knowledge(board: Leaderboard) -> Figure:
    found: _Found = {}
    for row in board.rows:
        points = [
            (float(i), estimate)
            for i, key in enumerate(KNOWN)
            if (estimate := row.estimates[key]) is not None
        ]
        if row.sites and len(points) > 1:
            zero = row.estimates["base"]
            levels = [Level("base classifier", zero.value)] if zero else []
            found[row.defense] = ([Series("accuracy", 0, points)], levels)
    return Figure(
        title="Accuracy against what the attacker knows",
        caption="At equal effort. Reverse stands for all noise but the forward noise.",
        drawings=_panels(found, "noise that is known", "names", list(_KNOWLEDGE.values())),
        legend=[(swatch(0), "accuracy"), (swatch_of("level"), "base classifier")],
        missing="" if found else _run(board, *KNOWN),
    )


def _strips(board: Leaderboard) -> Figure:
    drawings = []
    for row in board.rows:
        pools = {key: row.columns[key] for key in KNOWN if key in row.columns}
        # A result that serves several columns is shown once, under its own name.
        own_last = sorted(pools, key=lambda key: key not in row.served_by)
        shown = {pools[key]: key for key in own_last}
        rows = {
            f"{_KNOWLEDGE[key]} known": _shares(pool.right("adversarial"))
            for key, pool in pools.items()
            if shown[pool] == key
        }
        rows["clean"] = _shares(pools.get("hidden", row.columns["clean"]).right("clean"))
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
        missing="" if drawings else _run(board, "hidden", "all_known"),
    )


def _shares(tables: Sequence[Right]) -> list[float]:
    """The share of draws, over all seeds, at which each image is right."""
    shares: list[float] = np.concatenate(tables, axis=1).mean(axis=1).tolist()
    return shares


def _eps(board: Leaderboard) -> Figure:
    found: _Found = {}
    settings: dict[str, int] = {}
    for each in board.sweeps:
        if each.axis == "eps" and (at := _measured(each)):
            style = settings.setdefault(each.setting, len(settings))
            series, levels = found.setdefault(each.defense, ([], []))
            series.append(Series(each.setting, style, at))
            levels[:] = [Level("chance", max([each.chance, *(level.value for level in levels)]))]
    return Figure(
        title="Accuracy against eps",
        caption="Down to the end point: at the largest eps any image can become plain grey, and no "
        "more than chance may be left; more than that is a masked gradient.",
        drawings=_panels(found, f"eps, {board.norm}", "linear"),
        legend=[
            *((swatch(style), setting) for setting, style in settings.items()),
            (swatch_of("level"), "chance, where noise is hidden"),
        ],
        missing="" if found else _sweep(board, "eps=0.1,0.2,0.3,0.5"),
    )


def _cost(board: Leaderboard) -> Figure:
    points = [
        Point(row.defense, float(row.nfe), hidden, None, row.kind == "control")
        for row in board.rows
        if (hidden := row.estimates["hidden"])
    ]
    drawing = plane(
        points,
        [],
        "Accuracy with no draw known against NFE",
        "NFE, calls of the denoising networks in one purification",
        "accuracy with no draw known, %",
        percent=False,
    )
    return Figure(
        title="What a defense costs",
        caption="Calls of the denoising networks to purify one image.",
        drawings=[drawing] if points else [],
        legend=[(swatch_of("point"), "defense"), (swatch_of("point control"), "control")],
        missing="" if points else _run(board, "hidden"),
    )


def _effort(board: Leaderboard) -> Figure:
    found: _Found = {}
    for row in board.rows:
        points: dict[str, list[tuple[float, Estimate]]] = {}
        for pool in _pools(row, board):
            if pool.evaluations:
                known = pool.knowledge if pool.knowledge in ("none", "all") else "some"
                points.setdefault(known, []).append((pool.evaluations, pool.left))
        series = [
            Series(name, style, sorted(points[name], key=lambda at: (at[0], at[1].value)), False)
            for style, name in enumerate(("none", "all", "some"))
            if name in points
        ]
        if len({x for each in series for x, _ in each.points}) > 1:
            found[row.defense] = (series, [])
    return Figure(
        title="What an attack costs",
        caption="Every attack that was run, by the evaluations of its search for one image, with "
        "and without a gradient; the table of other attacks names them. Efforts differ along the "
        "axis.",
        drawings=_panels(found, "evaluations of the search", "log"),
        legend=[
            (swatch(0), "no draw known"),
            (swatch(1), "all noise known"),
            (swatch(2), "some noise known"),
        ],
        missing="" if found else _run(board, "hidden", "all_known"),
    )


def _value(row: Row, key: str) -> float | None:
    estimate = row.estimates[key]
    return None if estimate is None else estimate.value


def _measured(found: Findings) -> list[tuple[float, Estimate]]:
    """The points of a sweep that have an accuracy."""
    return [(float(v.value), v.accuracy) for v in found.values if v.accuracy is not None]
