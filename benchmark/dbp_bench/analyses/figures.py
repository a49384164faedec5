"""Draws the figure of an analysis from its record alone, as SVG and PNG."""

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from dbp_bench.analyses.efficacy import DIRECTIONS
from dbp_bench.analyses.eot_curve import SCALES, similarity
from dbp_bench.analyses.record import Record, Row
from dbp_bench.reporting.plotting import COLOURS, LINES, MARKERS, styled
from dbp_bench.result import write_atomically


def draw(path: Path) -> list[Path]:
    """Draw the record at `path`; the figures go beside it, each all of it or nothing.

    Raises:
        BadResult: The file is no record of an analysis.
    """
    record = Record.read(path)
    written = []
    with styled():
        figure = Figure(layout="constrained")
        _DRAWN[record.analysis](record, figure)
        for suffix, metadata in ((".svg", {"Date": None}), (".png", {"Software": None})):
            buffer = io.BytesIO()
            dpi = 144 if figure.get_figwidth() < 12 else 100
            figure.savefig(buffer, format=suffix[1:], dpi=dpi, metadata=metadata)
            to = path.with_suffix(suffix)
            write_atomically(to, buffer.getvalue())
            written.append(to)
    return written


# ------------------------------------------------------------------------------------ parts


def _band(
    axes: Axes, rows: list[Row], label: str, number: int, scale: float = 1.0, mark: bool = True
) -> None:
    """A curve over the first axis with its interval."""
    x = [r.at[0] for r in rows]
    value, low, high = (
        scale * np.array([getattr(r, key) for r in rows], dtype=float)
        for key in ("value", "low", "high")
    )
    colour = COLOURS[number % len(COLOURS)]
    axes.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
    marker = MARKERS[number % len(MARKERS)] if mark else None
    axes.plot(x, value, color=colour, linestyle=LINES[number % 6], marker=marker, label=label)


def _bars(value: Row, scale: float = 1.0) -> tuple[float, list[list[float]]]:
    """The value, and the distances from it to both ends of its interval."""
    low = value.value if value.low is None else value.low
    high = value.value if value.high is None else value.high
    return scale * value.value, [[scale * (value.value - low)], [scale * (high - value.value)]]


def _size(figure: Figure, width: float, height: float, record: Record, title: str) -> None:
    figure.set_size_inches(width, height)
    request = record.request
    images = "1 image" if len(record.images) == 1 else f"{len(record.images)} images"
    figure.suptitle(
        f"{title}\n{record.track}, {request['norm']} {request['eps']:g}, {images}, "
        f"seed {request['seed']}; bands and bars: 95 % intervals",
        fontsize=9.5,
    )


def _percent(axes: Axes, label: str = "accuracy (%)") -> None:
    axes.set_ylim(0, 102)
    axes.set_ylabel(label)


# -------------------------------------------------------------------------------- analyses


def _stochasticity(record: Record, figure: Figure) -> None:
    _size(figure, 10, 3.6, record, "Share k of the noise that is fresh: 0 DW-box, 1 white-box")
    panels = figure.subplots(1, 3)
    for number, name in enumerate(record.defenses):
        _band(panels[0], record.select(name, "accuracy"), f"{name}, attacked", number, 100)
        clean = record.select(name, "clean-accuracy")
        _band(panels[0], clean, f"{name}, clean", number + 2, 100)
        _band(panels[1], record.select(name, "robustness-loss"), name, number)
        _band(panels[2], record.select(name, "clean-loss"), name, number)
    _percent(panels[0])
    panels[1].set_ylabel("robustness loss R(k) (nats)")
    panels[2].set_ylabel("clean loss (nats)")
    for panel in panels:
        panel.set_xlabel("k")
    # Where no curve is: accuracies under attack are low, those without are high.
    panels[0].legend(loc="center left", bbox_to_anchor=(0.02, 0.68))
    panels[1].legend(loc="lower left")
    panels[2].legend(loc="upper left")
    for panel in panels[1:]:
        panel.set_ylim(bottom=0)


def _immobilise(record: Record, figure: Figure) -> None:
    series = record.series(record.defenses[0], "accuracy")
    _size(
        figure, 7, 1.6 + 0.55 * len(series), record, "Accuracy where these sites' draws are known"
    )
    axes = figure.subplots()
    height = 0.8 / (2 * len(record.defenses))
    slot = 0
    for number, name in enumerate(record.defenses):
        kinds = (("accuracy", "at the victim's own draw"), ("accuracy-fresh", "at fresh draws"))
        for kind, said in kinds:
            filled = kind == "accuracy"
            for place, known in enumerate(series):
                (found,) = record.select(name, kind, known)
                value, reach = _bars(found, 100)
                axes.errorbar(
                    value,
                    place + (slot - len(record.defenses) + 0.5) * height,
                    xerr=reach,
                    color=COLOURS[number],
                    marker=MARKERS[number],
                    markerfacecolor=COLOURS[number] if filled else "white",
                    capsize=2.5,
                    linestyle="none",
                    label=f"{name}, {said}" if place == 0 else None,
                )
            slot += 1
    names = [known.replace("+", " + ") for known in series]
    axes.set_yticks(range(len(series)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 102)
    axes.set_xlabel("accuracy under attack (%)")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


def _eot_curve(record: Record, figure: Figure) -> None:
    _size(figure, 3.6 + 3.6 * len(record.defenses), 3.9, record, "What more EoT samples buy")
    panels = figure.subplots(1, 1 + len(record.defenses))
    for number, name in enumerate(record.defenses):
        _band(panels[0], record.select(name, "accuracy", "eot"), f"{name}, EoT-N", number, 100)
        (known,) = record.select(name, "accuracy", "dwbox")
        value, _ = _bars(known, 100)
        panels[0].axhline(
            value, color=COLOURS[number], linestyle=":", linewidth=1.2, label=f"{name}, DW-box"
        )
    _percent(panels[0])
    panels[0].set_title("accuracy under attack")
    for panel, name in zip(panels[1:], record.defenses, strict=True):
        for number, scale in enumerate(SCALES):
            rows = record.select(name, "cosine", scale)
            if not rows:
                continue
            _band(panel, rows, f"mean {scale}", number)
            (rho,) = record.select(name, "rho", scale)
            n = np.geomspace(rows[0].at[0], rows[-1].at[0], 100)
            panel.plot(
                n,
                similarity(rho.value, n),
                color=COLOURS[number],
                linewidth=1,
                linestyle=":",
                label=f"fit, $\\rho$ = {rho.value:.2f} [{rho.low:.2f}, {rho.high:.2f}]",
            )
        panel.set_ylim(0, 1)
        panel.set_ylabel("cosine with the gradient at a known draw")
        panel.set_title(name)
    counts = record.request["options"]["counts"]
    for panel in panels:
        panel.set_xscale("log")
        panel.set_xticks(counts, [str(n) for n in counts], fontsize=7)
        panel.minorticks_off()
        panel.set_xlabel("EoT samples N")
        panel.legend(loc="best")


def _efficacy(record: Record, figure: Figure) -> None:
    _size(figure, 8, 1.2 + 2.9 * len(record.defenses), record, "Loss along single-step directions")
    panels = figure.subplots(len(record.defenses), 2, sharey=True, sharex=True, squeeze=False)
    for line, name in zip(panels, record.defenses, strict=True):
        kinds = (("loss-known", "at the known draw"), ("loss-fresh", "on fresh draws"))
        for panel, (kind, said) in zip(line, kinds, strict=True):
            for number, series in enumerate(DIRECTIONS):
                _band(panel, record.select(name, kind, series), series, number, mark=False)
            panel.set_title(f"{name}, {said}")
            panel.set_xlabel("k: steps of eps / 16")
            panel.set_xticks(range(-16, 17, 8))
        line[0].set_ylabel("mean cross-entropy (nats)")
    # After all curves: the panels share the axis.
    panels[0][0].set_ylim(bottom=0)
    panels[0][0].legend(loc="upper left")


def _landscape(record: Record, figure: Figure) -> None:
    _size(
        figure,
        2.2 + 3.3 * len(record.defenses),
        10.6,
        record,
        "Loss over x + a dD + b r: dD of DW-box at (1, 0); r, what EoT has beside it",
    )
    kinds = (("loss-known", "at the draw that dD knows"), ("loss-fresh", "on fresh draws"))
    surfaces = {
        (name, kind): _surface(record.select(name, kind, "mean"))
        for name in record.defenses
        for kind, _ in kinds
    }
    top = max(values.max() for _, values in surfaces.values())
    levels = MaxNLocator(10).tick_values(0, top)
    panels = figure.subplots(3, len(record.defenses), squeeze=False)
    drawn = None
    for line, (kind, said) in enumerate(kinds):
        for panel, name in zip(panels[line], record.defenses, strict=True):
            axis, values = surfaces[name, kind]
            drawn = panel.contourf(axis, axis, values.T, levels=levels, cmap="cividis")
            panel.contour(axis, axis, values.T, levels=levels, colors="white", linewidths=0.4)
            (along,) = record.select(name, "along", "eot")
            _point(panel, (0, 0), "x", "o", (6, 6))
            _point(panel, (1, 0), "DW", "s", (6, 6))
            _point(panel, (along.value, 1), "EoT", "^", (6, 6))
            panel.set_title(f"{name}, {said}")
            panel.set_xlabel("a: along DW")
            panel.set_ylabel("b: beside it")
            panel.set_aspect("equal")
            panel.grid(visible=False)
    if drawn is not None:
        bar = figure.colorbar(drawn, ax=panels[:2, :].ravel().tolist(), shrink=0.6)
        bar.set_label("mean cross-entropy (nats)")
    # The line of the grid that is nearest to b = 0.
    line_b = min((r.at[1] for r in record.rows if len(r.at) == 2), key=abs)
    for panel, name in zip(panels[2], record.defenses, strict=True):
        for number, (kind, said) in enumerate(kinds):
            mean = [r for r in record.select(name, kind, "mean") if r.at[1] == line_b]
            _band(panel, mean, f"b = {line_b:g}, {said}", number)
            draws = [s for s in record.series(name, kind) if s != "mean"]
            for draw in draws:
                along_a = [r for r in record.select(name, kind, draw) if r.at[1] == line_b]
                panel.plot(
                    [r.at[0] for r in along_a],
                    [r.value for r in along_a],
                    color=COLOURS[number],
                    linewidth=0.6,
                )
        panel.set_ylim(0, top * 1.05)
        panel.set_xlabel("a: along DW (thin lines: planes of each known draw)")
        panel.set_ylabel("cross-entropy (nats)")
        panel.set_title(name)
        panel.legend(loc="upper left")


def _surface(rows: list[Row]) -> tuple[Any, Any]:
    """Grid values, and the mean loss ``(a, b)``."""
    axis = sorted({r.at[0] for r in rows})
    values = np.array([r.value for r in rows]).reshape(len(axis), len(axis))
    return np.array(axis), values


def _point(axes: Axes, at: tuple[float, float], text: str, marker: str, off: Any) -> None:
    axes.plot(*at, marker=marker, color="black", markeredgecolor="white", markersize=7)
    axes.annotate(
        text,
        at,
        xytext=off,
        textcoords="offset points",
        bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "linewidth": 0, "alpha": 0.85},
    )


def _trajectory(record: Record, figure: Figure) -> None:
    views = ["plane", "known", "fresh"]
    if record.select(record.defenses[0], "tsne-x"):
        views.append("tsne")
    columns = [(name, image) for name in record.defenses for image in record.images]
    _size(
        figure,
        0.8 + 2.6 * len(columns),
        2.0 + 2.5 * len(views),
        record,
        "Paths of PGD from one image; filled mark: the last iterate",
    )
    heights = [1.35 if view == "plane" else 1 for view in views]
    grid = figure.add_gridspec(len(views), len(columns), height_ratios=heights)
    for column, (name, image) in enumerate(columns):
        first: Axes | None = None
        for line, view in enumerate(views):
            projection = "3d" if view == "plane" else None
            axes = figure.add_subplot(grid[line, column], projection=projection)
            _PATHS[view](axes, record, name, image)
            if line == 0:
                axes.set_title(f"{name}, image {image}")
            if line == 1 and column == 0:
                first = axes
        if first is not None:
            handles, labels = first.get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=4)


def _runs(record: Record, name: str, image: int, *quantities: str) -> list[tuple[str, int, Any]]:
    """Each run's label (empty but for the first of its kind), its kind, and its numbers.

    Of the last quantity also the two ends of its interval.
    """
    found, seen = [], set()
    for series in record.series(name, quantities[0]):
        label, colour = _kind(record, series)
        rows = [[r for r in record.select(name, q, series) if r.at[0] == image] for q in quantities]
        values = [[r.value for r in each] for each in rows]
        values += [[r.value if r.low is None else r.low for r in rows[-1]]]
        values += [[r.value if r.high is None else r.high for r in rows[-1]]]
        found.append(("" if label in seen else label, colour, np.array(values)))
        seen.add(label)
    return found


def _kind(record: Record, series: str) -> tuple[str, int]:
    """The label of a run, and the number of its colour."""
    kind, _, number = series.rpartition(" ")
    if kind == "white-box":
        return "white-box, EoT-1", 1
    if kind == "eot":
        return f"EoT-{record.request['options']['eot']}", 0
    return ("DW-box, the known draw", 2) if number == "0" else ("DW-box, another draw", 3)


def _in_plane(axes: Any, record: Record, name: str, image: int) -> None:
    for _, colour, (x, y, z, *_) in _runs(record, name, image, "x", "y", "loss-known"):
        axes.plot(x, y, z, color=COLOURS[colour], linestyle=LINES[colour], linewidth=1.1)
        axes.scatter(x[-1:], y[-1:], z[-1:], color=COLOURS[colour], marker=MARKERS[colour], s=22)
    axes.set_xlabel("along DW", labelpad=-9, fontsize=7.5)
    axes.set_ylabel("EoT, beside DW", labelpad=-9, fontsize=7.5)
    axes.set_zlabel("loss, known draw", labelpad=-7, fontsize=7.5)
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.set_major_locator(MaxNLocator(3))
    axes.tick_params(pad=-4, labelsize=6.5)
    axes.zaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))
    axes.view_init(elev=22, azim=-58)
    axes.set_box_aspect((1, 1, 0.8), zoom=0.88)


def _by_step(kind: str, said: str) -> Callable[[Any, Record, str, int], None]:
    def panel(axes: Any, record: Record, name: str, image: int) -> None:
        for label, colour, (loss, *bounds) in _runs(record, name, image, f"loss-{kind}"):
            axes.plot(
                range(len(loss)),
                loss,
                color=COLOURS[colour],
                linestyle=LINES[colour],
                linewidth=1.2,
                label=label or None,
            )
            if kind == "fresh":
                axes.fill_between(
                    range(len(loss)), *bounds, color=COLOURS[colour], alpha=0.1, linewidth=0
                )
        axes.set_xlabel("step")
        axes.set_ylabel(f"loss, {said} (nats)")
        axes.set_ylim(bottom=0)
        axes.ticklabel_format(axis="y", scilimits=(-3, 4))

    return panel


def _embedded(axes: Any, record: Record, name: str, image: int) -> None:
    for _, colour, (x, y, *_) in _runs(record, name, image, "tsne-x", "tsne-y"):
        axes.plot(x, y, color=COLOURS[colour], linestyle=LINES[colour], linewidth=0.9)
        axes.plot(x[-1], y[-1], color=COLOURS[colour], marker=MARKERS[colour])
    axes.set_xlabel("t-SNE 1 (no unit)")
    axes.set_ylabel("t-SNE 2 (no unit)")


_PATHS: Mapping[str, Callable[[Any, Record, str, int], None]] = {
    "plane": _in_plane,
    "known": _by_step("known", "known draw"),
    "fresh": _by_step("fresh", "fresh draws"),
    "tsne": _embedded,
}

_DRAWN: Mapping[str, Callable[[Record, Figure], None]] = {
    "trajectory": _trajectory,
    "landscape": _landscape,
    "eot-curve": _eot_curve,
    "stochasticity": _stochasticity,
    "immobilise": _immobilise,
    "efficacy": _efficacy,
}
