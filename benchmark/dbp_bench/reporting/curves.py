"""The figure that says which attack to use: the accuracy that each leaves, against its effort.

One panel for each defense and knowledge, as wide as a column of a paper.
"""

import io
from collections.abc import Sequence
from typing import Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator

from dbp_bench.reporting.effort import Curve, Point, steps
from dbp_bench.reporting.plotting import COLOURS, GREY, INK, LINES, MIST, PAPER, styled

_WIDTH: Final = 3.35
"""The width of a paper's column, in inches."""
_PANEL: Final = 1.75
"""The height of a panel, in inches."""
_MOST: Final = 4
"""The most attacks that have a name in a panel, beside the leaderboard's own."""
_DEFENSES: Final = 2
"""The most defenses that are drawn, those on which most attacks were run."""
_KNOWS: Final = {"none": "no draw known", "all": "every draw known"}


def figure_of(groups: Sequence[Sequence[Curve]]) -> Figure | None:
    """The figure of the curves of :func:`dbp_bench.reporting.attacks.attack_curves`.

    It shows the defenses on which most attacks were run, where no draw and where every draw is
    known; None where there are no such curves. It must be drawn under a style of
    :mod:`dbp_bench.reporting.plotting`.
    """
    shown = [group for group in groups if group[0].knows in _KNOWS]
    counts: dict[str, int] = {}
    for group in shown:
        counts[group[0].defense] = counts.get(group[0].defense, 0) + len(group)
    drawn = sorted(counts, key=lambda name: (-counts[name], name))[:_DEFENSES]
    shown = [group for group in shown if group[0].defense in drawn]
    if not shown:
        return None
    figure = Figure(figsize=(_WIDTH, 0.25 + _PANEL * len(shown)), layout="constrained")
    panels = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
    most = max(point.evaluations for group in shown for curve in group for point in curve.points)
    colours = _colours(shown)
    for axes, group in zip(panels, shown, strict=True):
        _panel(axes, group, 2 * most, colours)
    panels[-1].set_xlabel("evaluations of one image (and known draw)", size=8)
    return figure


def _named(group: Sequence[Curve]) -> list[Curve]:
    """The attacks that have a name: the leaderboard's own, and those that leave least."""
    own = [curve for curve in group if curve.own]
    return [*own, *[curve for curve in group if not curve.own][:_MOST]]


def _colours(groups: Sequence[Sequence[Curve]]) -> dict[str, int]:
    """A number for each attack that is named somewhere, so that it has one look in all panels."""
    names: dict[str, int] = {}
    for own in (True, False):
        for curve in (each for group in groups for each in _named(group) if each.own is own):
            names.setdefault(curve.attack, len(names))
    return names


def _panel(axes: Axes, group: Sequence[Curve], end: float, numbers: dict[str, int]) -> None:
    """Draw one defense at one knowledge; the envelope of all attacks is the edge of a grey area."""
    first = group[0]
    axes.set_title(f"{first.defense}, {_KNOWS[first.knows]}", loc="left", size=8, weight="bold")
    edge = _corners([point for curve in group for point in curve.points], end)
    counts, lows = zip(*edge, strict=True)
    axes.fill_between(counts, lows, step="post", color=MIST, alpha=0.35, linewidth=0)
    named = _named(group)
    for curve in group:
        if curve not in named:
            for point in curve.points:
                axes.plot(
                    max(1.0, point.evaluations), 100 * point.accuracy, ".", color=GREY, markersize=3
                )
    labels = []
    for curve in reversed(named):
        number = numbers[curve.attack]
        colour = INK if curve.own else COLOURS[(number - 1) % len(COLOURS)]
        corners = _corners(curve.points, end)
        axes.step(
            *zip(*corners, strict=True),
            where="post",
            color=colour,
            linestyle="-" if curve.own else LINES[number % len(LINES)],
            linewidth=2 if curve.own else 1.2,
            zorder=4 if curve.own else 3,
        )
        xs, ys = zip(*corners[:-1], strict=True)
        axes.plot(xs, ys, "o", color=colour, markersize=3.5, markeredgecolor=PAPER, zorder=5)
        labels.append((corners[-1][1], curve.attack, colour, curve.own))
    top = max(100 * point.accuracy for curve in named for point in curve.points)
    low = min(100 * point.accuracy for curve in group for point in curve.points)
    axes.set(xscale="log", xlim=(0.8, end), ylim=(max(0, low - 8), min(100, top + 8)))
    axes.set_ylabel("accuracy, %", size=8)
    axes.xaxis.set_major_locator(LogLocator())
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.minorticks_off()
    axes.tick_params(labelsize=7)
    axes.grid(visible=False, axis="x")
    _write(axes, labels)


def _corners(points: Sequence[Point], end: float) -> list[tuple[float, float]]:
    """The corners of a curve in percent, drawn on to the `end`."""
    found = [(max(1.0, count), 100 * accuracy) for count, accuracy in steps(points)]
    return [*found, (end, found[-1][1])]


def _write(axes: Axes, labels: Sequence[tuple[float, str, str, bool]]) -> None:
    """Write names to the right of where their lines end, moved apart where they would touch."""
    low, high = axes.get_ylim()
    apart = (high - low) * 0.115
    ordered = sorted(labels)
    places = [height for height, *_ in ordered]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + apart)
    over = max(0.0, places[-1] - high)
    places = [place - over for place in places]
    for i in range(len(places) - 1, 0, -1):
        places[i - 1] = min(places[i - 1], places[i] - apart)
    for place, (height, name, colour, own) in zip(places, ordered, strict=True):
        axes.annotate(
            name if len(name) <= 19 else f"{name[:18]}…",
            (1, height),
            (1.12, place),
            xycoords=axes.get_yaxis_transform(),
            textcoords=axes.get_yaxis_transform(),
            arrowprops={
                **{"arrowstyle": "-", "color": colour, "linewidth": 0.6},
                **{"relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 0},
            },
            annotation_clip=False,
            color=colour,
            size=7,
            weight="bold" if own else "normal",
            va="center",
        )


def figure_files(groups: Sequence[Sequence[Curve]]) -> dict[str, bytes]:
    """The figure as SVG and PDF, by the end of the name; nothing where there are no curves.

    The same curves give the same bytes.
    """
    files = {}
    with styled({"pdf.compression": 0, "pdf.fonttype": 42, "svg.fonttype": "path"}):
        figure = figure_of(groups)
        if figure is None:
            return {}
        for kind in ("svg", "pdf"):
            buffer = io.BytesIO()
            dates = {"Date": None} if kind == "svg" else {"CreationDate": None}
            figure.savefig(buffer, format=kind, metadata=dates)
            files[f".{kind}"] = buffer.getvalue()
    return files
