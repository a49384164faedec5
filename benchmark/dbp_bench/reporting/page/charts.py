"""The charts of a track's page; a chart without data names the command that measures it."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from operator import itemgetter
from typing import Any, Final, NamedTuple

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from dbp_bench.reporting.attacks import attack_curves
from dbp_bench.reporting.certificates import groups
from dbp_bench.reporting.certified import figure as radii
from dbp_bench.reporting.curves import figure_of
from dbp_bench.reporting.findings import Findings
from dbp_bench.reporting.leaderboard import Leaderboard, Row
from dbp_bench.reporting.plotting import (
    AMBER,
    BLUE,
    GREY,
    INK,
    MIST,
    ORANGE,
    PAPER,
    SAND,
    SKY,
    look,
    on_page,
)
from dbp_bench.reporting.pool import Pool
from dbp_bench.reporting.protocol import KNOWN
from dbp_bench.reporting.rendering import note
from dbp_bench.reporting.statistics import Estimate
from dbp_bench.result import Right, without_draws

ARROWS: Final = (("ddpm", "addt"),)
"""Pairs of defenses, of which the second was trained from the first."""


@dataclass(frozen=True)
class Chart:
    """One figure or several small ones under one title."""

    title: str
    caption: str
    drawings: Mapping[str, Figure]
    """The figures, each under a short text that describes it."""
    legend: Sequence[tuple[Artist, str]]
    missing: str
    """The command that measures the data, shown where there is nothing to draw."""


def charts(board: Leaderboard) -> list[Chart]:
    """All charts of a page, in order."""
    makers: tuple[Callable[[Leaderboard], Chart], ...] = (
        _decomposition,
        _hidden_against_known,
        _optimality,
        _eot,
        _knowledge,
        _image_by_image,
        _eps,
        _cost,
        _effort,
    )
    with on_page():
        made = [make(board) for make in makers]
        return [*made, *([_certified(board)] if board.certificates else [])]


def swatch(artist: Artist) -> Figure:
    """A small figure that shows one mark of a legend."""
    bare = {"borderpad": 0, "borderaxespad": 0, "handletextpad": 0}
    with on_page():
        figure = Figure(figsize=(22 / 96, 12 / 96))
        figure.legend(handles=[artist], labels=[""], loc="center", handlelength=2, **bare)
    return figure


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


# ---------------------------------------------------------------------------------------- drawing


def _axes(width: float, height: float, *margins: float) -> tuple[Figure, Axes]:
    """A figure and its axes, with `margins` left, right, above and below; in pixels of a page."""
    figure = Figure(figsize=(width / 96, height / 96))
    left, right, top, bottom = margins
    sides = (1 - (left + right) / width, 1 - (top + bottom) / height)
    return figure, figure.add_axes((left / width, bottom / height, *sides))


def _short(name: str, most: int) -> str:
    """The name cut to `most` characters, with unprintable ones replaced."""
    shown = "".join(each if each.isprintable() else "\ufffd" for each in name)
    return shown if len(shown) <= most else f"{shown[: most - 1]}…"


def _percent(estimate: Estimate) -> Estimate:
    return Estimate(*(100 * each for each in (estimate.value, estimate.low, estimate.high)))


def _exactly(value: float) -> Estimate:
    return Estimate(value, value, value)


def _draw(axes: Axes, xs: Sequence[Estimate], ys: Sequence[Estimate], **style: Any) -> None:
    """Draw points with their intervals."""
    up, along = (np.array([[e.value - e.low, e.high - e.value] for e in es]).T for es in (ys, xs))
    axes.errorbar([x.value for x in xs], [y.value for y in ys], up, along, clip_on=False, **style)


def _mark(number: int, *, joined: bool = True) -> Line2D:
    """The mark of a curve in a legend."""
    return Line2D([], [], **look(number, joined=joined))


def _dashes(colour: str = INK) -> Line2D:
    return Line2D([], [], color=colour, linestyle="--", linewidth=1)


Bar = Mapping[str, Estimate | None]
"""The estimates of one defense, by the leaderboard's columns; None where not measured."""

_PARTS: Final = {
    "base": (GREY, "base classifier"),
    "purification": (BLUE, "purification, P"),
    "known": (SKY, "left with all noise known"),
    "forward": (AMBER, "hidden forward noise"),
    "reverse": (SAND, "hidden reverse noise"),
    "unsplit": (AMBER, "hidden noise, not split"),
    "unknown": (MIST, "not split: known draws were not measured"),
}
"""The parts of a bar, from the left, each with its colour and its label."""


def parts(bar: Bar) -> dict[str, float]:
    """The size of each part of a bar, from the left, as a fraction of the images."""
    known, stochasticity = bar["all_known"], bar["stochasticity"]
    sizes = {
        "base": bar["base"] if bar["purification"] else None,
        "purification": bar["purification"] if bar["base"] else None,
    }
    if not all(sizes.values()):
        sizes = {"known": known}
    forward, reverse = bar["stochasticity_forward"], bar["stochasticity_reverse"]
    if stochasticity and forward and reverse:
        sizes |= {"forward": forward, "reverse": reverse}
    elif stochasticity:
        sizes |= {"unsplit": stochasticity}
    elif not known:
        sizes |= {"unknown": bar["hidden"]}
    return {kind: size.value for kind, size in sizes.items() if size is not None}


def decomposition(bars: Mapping[str, Bar]) -> Figure:
    """A stacked bar for each defense; its clean accuracy is an outline, a negative part hatched."""
    figure, axes = _axes(860, 66 + 34 * len(bars), 150, 140, 24, 42)
    beside = axes.get_yaxis_transform()
    for x, heading in ((1.02, "P"), (1.13, "S")):
        axes.text(x, 1.01, heading, transform=axes.transAxes, weight="bold")
    for y, bar in enumerate(bars.values()):
        start = 0.0
        for kind, size in parts(bar).items():
            colour, hatch = _PARTS[kind][0], "////" if size < 0 else None
            axes.barh(
                y,
                100 * size,
                0.52,
                left=100 * start,
                color=colour,
                edgecolor=PAPER,
                linewidth=0.6,
                hatch=hatch,
            )
            start += size
        if (clean := bar["clean"]) is not None:
            width = 100 * clean.value
            axes.barh(y, width, 0.66, fill=False, edgecolor=GREY, linestyle="--", linewidth=0.8)
        known = bar["all_known"]
        for key, x, up in (("purification", 1.02, 0.12), ("stochasticity", 1.13, -0.12)):
            if (part := bar[key]) is not None and known is not None:
                # A part ends where the next begins; its interval is that of its size.
                start = 100 * (known.value - (part.value if key == "purification" else 0))
                ends = [start + 100 * part.low, start + 100 * part.high]
                halo = [withStroke(linewidth=2.8, foreground=PAPER)]
                axes.plot(ends, [y + up] * 2, INK, marker="|", linewidth=1.1, path_effects=halo)
                axes.text(x, y, f"{100 * part.value:.1f}", transform=beside, va="center")
    axes.set(xlim=(0, 100), ylim=(len(bars) - 0.5, -0.5), xlabel="accuracy, %")
    axes.set_yticks(range(len(bars)), [_short(name, 18) for name in bars])
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    return figure


class Point(NamedTuple):
    """A defense in a plane, in units of the axes."""

    name: str
    x: Estimate
    y: Estimate
    control: bool = False


_POINTS: Final[Mapping[bool, dict[str, Any]]] = {
    False: {"color": BLUE, "marker": "o", "linestyle": "none"},
    True: {"color": GREY, "marker": "s", "linestyle": "none"},
}
"""The marks of defenses (False) and of controls (True)."""
_KINDS: Final = [
    (Line2D([], [], **style), "control" if control else "defense")
    for control, style in _POINTS.items()
]
"""The same marks, as a legend lists them."""


def plane(
    points: Sequence[Point],
    x_name: str,
    y_name: str,
    *,
    diagonal: bool = False,
    arrows: Sequence[tuple[str, str]] = (),
) -> Figure:
    """A plot of named points with intervals; with a `diagonal`, both axes have one range."""
    figure, axes = _axes(620, 430, 64, 14, 14, 58)
    for control, mark in _POINTS.items():
        these = [point for point in points if point.control == control]
        style = mark | {"markersize": 6, "markeredgecolor": PAPER, "ecolor": GREY}
        xs, ys = [point.x for point in these], [point.y for point in these]
        _draw(axes, xs, ys, elinewidth=0.9, **style)
    highs = [e.high for p in points for e in ((p.x, p.y) if diagonal else (p.y,))]
    top, wide = min(100.0, 1.1 * max(5.0, *highs)), max(1.0, *(p.x.value for p in points))
    axes.set(ylim=(0, top), xlim=(0, top) if diagonal else (-0.04 * wide, 1.08 * wide))
    axes.set(xlabel=x_name, ylabel=y_name)
    axes.locator_params(steps=[1, 2, 5, 10])
    if diagonal:
        axes.axline((0, 0), slope=1, color=GREY, linestyle="--", linewidth=1)
    at = {point.name: (point.x.value, point.y.value) for point in points}
    for source, target in arrows:
        arrow = {"arrowstyle": "->", "color": ORANGE, "linewidth": 1.5, "shrinkA": 5, "shrinkB": 5}
        axes.annotate("", at[target], at[source], arrowprops=arrow)
    _write_names(axes, at, 4 * figure.dpi / 72)
    return figure


_DIRECTIONS: Final = (
    *((1, 0), (-1, 0), (0.7, -0.7), (0.7, 0.7), (-0.7, -0.7), (-0.7, 0.7), (0, -1), (0, 1)),
)


def _write_names(axes: Axes, at: Mapping[str, tuple[float, float]], size: float) -> None:
    """Write each name near its point, where it covers no point (of this size) and no name."""
    centres = axes.transData.transform(list(at.values()))
    taken = [Bbox.from_bounds(x - size, y - size, 2 * size, 2 * size) for x, y in centres]
    for name, point in at.items():
        text = axes.annotate(_short(name, 24), point, (8, 0), textcoords="offset points")
        for far, (dx, dy) in product(range(8, 150, 7), _DIRECTIONS):
            side = "left" if dx > 0 else "right" if dx < 0 else "center"
            text.set(position=(far * dx, far * dy), ha=side, va="center")
            box = text.get_window_extent()
            inside = axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max)
            if inside and not box.count_overlaps(taken):
                break
        taken.append(box)
        if far > 16:
            line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
            place = text.get_position()
            axes.annotate("", point, place, textcoords="offset points", arrowprops=line)


class Curve(NamedTuple):
    """Points of one kind, each a place on the axis and the accuracy there."""

    number: int
    """The number of its colour and marker."""
    points: Sequence[tuple[float, Estimate]]
    joined: bool = True


class Panel(NamedTuple):
    """One of several small figures."""

    curves: Sequence[Curve]
    level: float | None = None
    """An accuracy, as a fraction, drawn as a horizontal line for reference."""

    @property
    def xs(self) -> set[float]:
        """The places of all points on the axis."""
        return {x for curve in self.curves for x, _ in curve.points}


def panels(
    found: Mapping[str, Panel], x_name: str, *, log: bool = False, names: Sequence[str] = ()
) -> dict[str, Figure]:
    """Small figures of one height; on a logarithmic axis, also of one width.

    Args:
        found: The panels, by defense.
        x_name: The label of the axis.
        log: True for a logarithmic axis; it stays linear where there is a zero.
        names: The labels of the places 0, 1, ... of the axis, if they are not numbers.
    """
    highs = [e.high for each in found.values() for curve in each.curves for _, e in curve.points]
    levels = [each.level for each in found.values() if each.level is not None]
    top = min(100.0, 108 * max([0.1, *highs, *levels]))
    every = [x for each in found.values() for x in each.xs]
    figures = {}
    for name, each in found.items():
        figure, axes = _axes(272, 216, 40, 8, 26, 48)
        axes.set_title(_short(name, 34), loc="left", weight="bold", size=9)
        for curve in each.curves:
            xs, ys = zip(*curve.points, strict=True)
            style = look(curve.number, joined=curve.joined) | {"markeredgewidth": 0.5}
            places, shown = [_exactly(x) for x in xs], [_percent(y) for y in ys]
            _draw(axes, places, shown, elinewidth=1, **style)
        if each.level is not None:
            axes.axhline(100 * each.level, color=INK, linestyle="--", linewidth=1)
        if names:
            axes.set_xlim(-0.35, len(names) - 0.65)
            axes.set_xticks(range(len(names)), names)
        elif log and min(every) > 0:
            least, most = min(every), max(every)
            beside = 1.2 if most > least else 2
            axes.set(xscale="log", xlim=(least / beside, most * beside))
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 3) if most < 1000 * least else (1,)))
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.minorticks_off()
        else:
            axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set(ylim=(0, top), xlabel=x_name)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.grid(visible=False, axis="x")
        figures[name] = figure
    return figures


_SHARES: Final = LinearSegmentedColormap.from_list("right", ["#d55e01", "#ececec", "#0072b3"])
"""The colours of the share of right draws (none, half, all), on light and dark pages alike."""
_COLUMNS: Final = 480
"""The most columns of a strip; of more images, neighbours are averaged."""


def strips(name: str, rows: Mapping[str, NDArray[np.float64]]) -> Figure:
    """One column for each image, one row for each setting: the share of draws that are right.

    Args:
        name: The defense.
        rows: The share of right draws of each image, by setting, with the images in one order. They
            are drawn sorted by the first row, best first, and ties by the next rows.
    """
    shares = np.array(list(rows.values()))
    shares = shares[:, np.lexsort(-shares[::-1])]
    if (images := shares.shape[1]) > _COLUMNS:
        starts = np.arange(_COLUMNS) * images // _COLUMNS
        shares = np.add.reduceat(shares, starts, axis=1) / np.diff(starts, append=images)
    figure, axes = _axes(596, 26 + 16 * len(rows), 104, 2, 24, 2)
    axes.set_title(_short(name, 60), loc="left", weight="bold", size=9)
    axes.imshow(shares, _SHARES, vmin=0, vmax=1, aspect="auto", interpolation="none")
    axes.set_yticks(range(len(rows)), [_short(name, 15) for name in rows])
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    for i in range(1, len(rows)):
        axes.axhline(i - 0.5, color=PAPER, linewidth=1.5)
    return figure


# ----------------------------------------------------------------------------------------- charts


def _decomposition(board: Leaderboard) -> Chart:
    bars = {
        row.defense: row.estimates
        for row in board.rows
        if row.estimates["clean"] and (row.estimates["hidden"] or row.estimates["all_known"])
    }
    shown = {kind for bar in bars.values() for kind in parts(bar)}
    kinds = [(Patch(color=c), said) for kind, (c, said) in _PARTS.items() if kind in shown]
    outline = Patch(facecolor="none", edgecolor=GREY, linestyle="--")
    return Chart(
        title="Where the robustness comes from",
        caption=note("chart_decomposition"),
        drawings={"one bar for each defense": decomposition(bars)} if bars else {},
        legend=[*kinds, (outline, "clean accuracy")],
        missing=_run(board, *KNOWN),
    )


def _hidden_against_known(board: Leaderboard) -> Chart:
    points = [
        Point(row.defense, _percent(known), _percent(hidden), row.kind == "control")
        for row in board.rows
        if (hidden := row.estimates["hidden"]) and (known := row.estimates["all_known"])
    ]
    names = {point.name for point in points}
    arrows = [pair for pair in ARROWS if names.issuperset(pair)]
    axes = ("accuracy with all noise known, %", "accuracy with no draw known, %")
    drawing = plane(points, *axes, diagonal=True, arrows=arrows) if points else None
    said = ", ".join(" to ".join(pair) for pair in arrows)
    return Chart(
        title="Hidden against known",
        caption=note("chart_hidden_against_known"),
        drawings={" against ".join(reversed(axes)): drawing} if drawing else {},
        legend=[
            *_KINDS,
            (_dashes(GREY), "hiding the noise adds nothing"),
            *([(Line2D([], [], color=ORANGE), f"trained from: {said}")] if said else []),
        ],
        missing=_run(board, "hidden", "all_known"),
    )


def _optimality(board: Leaderboard) -> Chart:
    figure = figure_of(attack_curves(board))
    return Chart(
        title="Which attack to use",
        caption=note("chart_optimality"),
        drawings={"accuracy left by each attack against its evaluations": figure} if figure else {},
        legend=[],
        missing=f"dbp-bench run --track {board.track} --defense all --attack apgd",
    )


def _eot(board: Leaderboard) -> Chart:
    found = {}
    swept = False
    for row in board.rows:
        # Results that know nothing of some noise, and differ in EoT only.
        alike: dict[str, dict[int, Estimate]] = {}
        for pool in _pools(row, board):
            samples = pool.any.effort.get("eot")
            if pool.sites and not pool.knows and isinstance(samples, int):
                rest = [pool.any.attack, pool.any.gradient, without_draws(pool.any.effort)]
                same = alike.setdefault(json.dumps(rest, sort_keys=True), {})
                same[samples] = pool.robust.estimate
        most = max(alike.values(), key=len, default={})
        curves = [Curve(0, sorted(most.items(), key=itemgetter(0)))] if len(most) > 1 else []
        for each in board.sweeps:
            if each.defense == row.defense and each.axis == "eot" and (at := _measured(each)):
                swept = True
                curves.append(Curve(1, at))
        if curves:
            known = row.estimates["all_known"]
            found[row.defense] = Panel(curves, known.value if known else None)
    return Chart(
        title="Accuracy against EoT",
        caption=note("chart_eot"),
        drawings=panels(found, "EoT samples per step", log=True),
        legend=[
            (_mark(0), "results, same search but for EoT"),
            *([(_mark(1), "sweeps, on their own images and draws")] if swept else []),
            (_dashes(), "all noise known"),
        ],
        missing=f"{_sweep(board, 'eot=1,10,40')} --attack pgd",
    )


def _pools(row: Row, board: Leaderboard) -> list[Pool]:
    """All results of a defense at the leaderboard's eps."""
    return [pool for pool in board.at_eps if pool.any.defense == row.defense]


_KNOWLEDGE: Final = dict(zip(KNOWN, ("none", "forward", "reverse", "all"), strict=True))


def _knowledge(board: Leaderboard) -> Chart:
    found = {}
    for row in board.rows:
        points = [(i, e) for i, key in enumerate(KNOWN) if (e := row.estimates[key]) is not None]
        if row.sites and len(points) > 1:
            base = row.estimates["base"]
            found[row.defense] = Panel([Curve(0, points)], base.value if base else None)
    return Chart(
        title="Accuracy against what the attacker knows",
        caption=note("chart_knowledge"),
        drawings=panels(found, "noise that is known", names=list(_KNOWLEDGE.values())),
        legend=[(_mark(0), "accuracy"), (_dashes(), "base classifier")],
        missing=_run(board, *KNOWN),
    )


def _image_by_image(board: Leaderboard) -> Chart:
    drawings = {}
    for row in board.rows:
        pools = {key: row.columns[key] for key in KNOWN if key in row.columns}
        # A result that serves several columns is shown once, under its own name.
        own_last = sorted(pools, key=lambda key: key not in row.served_by)
        shown = {pools[key]: key for key in own_last}
        rows = {
            f"{_KNOWLEDGE[key]} known": _right(pool.right("adversarial"))
            for key, pool in pools.items()
            if shown[pool] == key
        }
        rows["clean"] = _right(pools.get("hidden", row.columns["clean"]).right("clean"))
        if len(rows) > 1:
            drawings[row.defense] = strips(row.defense, rows)
    shares = {"right at every draw": 1.0, "at half of them": 0.5, "at none": 0.0}
    return Chart(
        title="Image by image",
        caption=note("chart_image_by_image"),
        drawings=drawings,
        legend=[(Patch(color=_SHARES(share)), said) for said, share in shares.items()],
        missing=_run(board, "hidden", "all_known"),
    )


def _right(tables: Sequence[Right]) -> NDArray[np.float64]:
    """The share of draws, over all seeds, at which each image is right."""
    shares: NDArray[np.float64] = np.concatenate(tables, axis=1).mean(axis=1)
    return shares


def _eps(board: Leaderboard) -> Chart:
    found: dict[str, Panel] = {}
    settings: dict[str, int] = {}
    for each in board.sweeps:
        if each.axis == "eps" and (at := _measured(each)):
            style = settings.setdefault(each.setting, len(settings))
            before = found.get(each.defense, Panel([], each.chance))
            level = max(each.chance, before.level or 0.0)
            found[each.defense] = Panel([*before.curves, Curve(style, at)], level)
    return Chart(
        title="Accuracy against eps",
        caption=note("chart_eps"),
        drawings=panels(found, f"eps, {board.norm}"),
        legend=[
            *((_mark(style), setting) for setting, style in settings.items()),
            (_dashes(), "chance, where noise is hidden"),
        ],
        missing=_sweep(board, "eps=0.1,0.2,0.3,0.5"),
    )


def _cost(board: Leaderboard) -> Chart:
    points = [
        Point(row.defense, _exactly(row.nfe), _percent(hidden), row.kind == "control")
        for row in board.rows
        if (hidden := row.estimates["hidden"])
    ]
    axes = (
        "NFE, calls of the denoising networks in one purification",
        "accuracy with no draw known, %",
    )
    return Chart(
        title="What a defense costs",
        caption=note("chart_cost"),
        drawings={"accuracy with no draw known against NFE": plane(points, *axes)}
        if points
        else {},
        legend=_KINDS,
        missing=_run(board, "hidden"),
    )


def _certified(board: Leaderboard) -> Chart:
    found = groups(board.certificates)
    return Chart(
        title="Certified accuracy against the radius",
        caption=note("certified"),
        drawings={"a panel for each defense, a curve for each size of the noise": radii(found)},
        legend=[],
        missing=f"dbp-bench certify --track {board.track} --defense all",
    )


def _effort(board: Leaderboard) -> Chart:
    found = {}
    for row in board.rows:
        points: dict[str, list[tuple[float, Estimate]]] = {}
        for pool in _pools(row, board):
            if pool.evaluations:
                known = pool.knowledge if pool.knowledge in ("none", "all") else "some"
                points.setdefault(known, []).append((pool.evaluations, pool.robust.estimate))
        numbered = enumerate(("none", "all", "some"))
        curves = [Curve(i, points[name], joined=False) for i, name in numbered if name in points]
        if len((panel := Panel(curves)).xs) > 1:
            found[row.defense] = panel
    legend = ("no draw known", "all noise known", "some noise known")
    return Chart(
        title="What an attack costs",
        caption=note("chart_effort"),
        drawings=panels(found, "evaluations of the search", log=True),
        legend=[(_mark(style, joined=False), said) for style, said in enumerate(legend)],
        missing=_run(board, "hidden", "all_known"),
    )


def _measured(found: Findings) -> list[tuple[float, Estimate]]:
    """The points of a sweep that have an accuracy."""
    return [(float(v.value), v.accuracy) for v in found.values if v.accuracy is not None]
