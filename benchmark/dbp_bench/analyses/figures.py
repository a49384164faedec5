"""Draws the figure of an analysis from its record alone, one column of a paper wide."""

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from dbp_bench.analyses.efficacy import DIRECTIONS
from dbp_bench.analyses.eot_curve import SCALES, similarity
from dbp_bench.analyses.immobilise import NOTHING
from dbp_bench.analyses.record import FIGURES, Record, Row
from dbp_bench.reporting.plotting import COLOURS, GREY, LINES, MARKERS, PAPER, styled
from dbp_bench.result import write_atomically

WIDTH: Final = 3.3
"""The width of one column, in inches; more than two defenses side by side take more."""

_LINE: Final = 0.145
"""The height of a line of text, in inches."""

STYLE: Final[dict[Any, Any]] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "figure.titlesize": 8,
    "axes.labelpad": 2,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "legend.handlelength": 2.2,
    "legend.columnspacing": 1,
    "legend.borderaxespad": 0.1,
    "text.parse_math": False,  # titles may hold a dollar
    "pdf.fonttype": 42,
}
"""The style of these figures, beside that of all."""


def draw(path: Path) -> list[Path]:
    """Draw the record at `path`; the figures go beside it, each all of it or nothing.

    Raises:
        BadResult: The file is no record of an analysis.
    """
    record = Record.read(path)
    metadata = {".svg": {"Date": None}, ".png": {"Software": None}, ".pdf": {"CreationDate": None}}
    written = []
    with styled(STYLE):
        figure = drawn(record)
        for suffix in FIGURES:
            buffer = io.BytesIO()
            figure.savefig(buffer, format=suffix[1:], dpi=300, metadata=metadata[suffix])
            to = path.with_suffix(suffix)
            write_atomically(to, buffer.getvalue())
            written.append(to)
    return written


def drawn(record: Record) -> Figure:
    """The figure of a `record`, under :data:`STYLE`."""
    figure = Figure(layout="constrained")
    _DRAWN[record.analysis](record, figure)
    return figure


# ------------------------------------------------------------------------------------ parts


def shown_names(record: Record) -> list[str]:
    """The name of each defense: what its title says before a comma, or else its id."""
    titles = [record.titles.get(name, name) for name in record.defenses]
    short = [title.partition(",")[0].removesuffix(" purification") for title in titles]
    same = zip(short, record.defenses, strict=True)
    return [f"{name} ({id})" if short.count(name) > 1 else name for name, id in same]


def _layout(
    figure: Figure, record: Record, title: str, caption: str, *heights: float
) -> list[SubFigure]:
    """One part of the figure for each of `heights` (inches), below a title, above a caption."""
    request = record.request
    images = "1 image" if len(record.images) == 1 else f"{len(record.images)} images"
    caption += (
        f" {record.track}, {request['norm']} {request['eps']:g}, {images}, seed {request['seed']}; "
        "95 % intervals over images."
    )
    width = WIDTH * max(1.0, len(record.defenses) / 2)
    # About 15 letters of 8 pt fit an inch.
    text = fill(caption, int(15.4 * width), break_on_hyphens=False)
    lines = text.count("\n") + 3
    figure.set_size_inches(width, sum(heights) + _LINE * lines)
    figure.suptitle(title, weight="bold")
    figure.supxlabel(text, x=0.01, ha="left", fontsize=8)
    return list(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])


def _panels(part: SubFigure, record: Record, rows: int = 1, **more: Any) -> Any:
    """Panels ``(rows, defenses)``, each column headed by its defense."""
    panels = part.subplots(rows, len(record.defenses), squeeze=False, sharey="row", **more)
    for panel, name in zip(panels[0], shown_names(record), strict=True):
        panel.set_title(fill(name, 21))
    return panels


def _legend(part: SubFigure, entries: Iterable[Any], columns: int) -> None:
    """A legend above the panels of a part; `entries` are axes, or lines with labels."""
    found: list[Any] = list(entries)
    handles = found if isinstance(found[0], Line2D) else found[0].get_legend_handles_labels()[0]
    part.legend(handles=handles, loc="outside upper center", ncols=columns)


def _key(record: Record, filled: str, hollow: str) -> list[Line2D]:
    """Colours, filled and hollow marks have one legend where all defenses share a panel."""
    plain: dict[str, Any] = {}
    marks = [(name, i, COLOURS[i % 6], plain) for i, name in enumerate(shown_names(record))]
    marks += [(filled, 0, GREY, plain), (hollow, 0, GREY, {"markerfacecolor": PAPER})]
    return [
        Line2D([], [], label=label, color=colour, marker=MARKERS[i % 6], linestyle="none", **more)
        for label, i, colour, more in marks
    ]


def _band(axes: Axes, rows: Sequence[Row], number: int, scale: float = 1.0, **more: Any) -> None:
    """A curve over the first axis with its interval."""
    x = [r.at[0] for r in rows]
    value, low, high = (
        scale * np.array([getattr(r, key) for r in rows], dtype=float)
        for key in ("value", "low", "high")
    )
    colour = COLOURS[number % 6]
    style = {"linestyle": LINES[number % 6], "marker": MARKERS[number % 6], "markevery": 1}
    axes.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
    axes.plot(x, value, color=colour, **{**style, **more})


# -------------------------------------------------------------------------------- analyses


def _stochasticity(record: Record, figure: Figure) -> None:
    asked = record.request["options"]
    above, below = _layout(
        figure,
        record,
        "Accuracy and loss by the share of fresh noise",
        "k: share of the noise that is fresh, the rest is known; 0 is DW-box, 1 all hidden. "
        f"Accuracy: standard attack, {asked['budget']} gradient evaluations. Robustness loss R: "
        f"what PGD adds, {asked['steps']} steps, EoT-{asked['eot']}.",
        2.1,
        1.5,
    )
    accuracy, losses = above.subplots(), list(below.subplots(1, 2))
    for number, name in enumerate(record.defenses):
        _band(accuracy, record.select(name, "accuracy"), number, 100)
        clean = record.select(name, "clean-accuracy")
        _band(accuracy, clean, number, 100, markerfacecolor=PAPER)
        for panel, quantity in zip(losses, ("robustness-loss", "clean-loss"), strict=True):
            _band(panel, record.select(name, quantity), number)
    accuracy.set_ylim(0, 102)
    accuracy.set_ylabel("accuracy (%)")
    for panel, label in zip(losses, ("R(k) (nats)", "clean loss (nats)"), strict=True):
        panel.set_ylim(bottom=0)
        panel.set_ylabel(label)
    for panel in (accuracy, *losses):
        panel.set_xlabel("k")
    _legend(above, _key(record, "attacked", "clean"), 2)


def _immobilise(record: Record, figure: Figure) -> None:
    series = record.series(record.defenses[0], "accuracy")
    (part,) = _layout(
        figure,
        record,
        "Accuracy by the sites whose draws are known",
        f"Standard attack, {record.request['options']['budget']} gradient evaluations for each "
        "known draw; fresh draws: the same images on draws that no attack was shown.",
        0.9 + 0.25 * len(record.defenses) * len(series),
    )
    axes = part.subplots()
    slots = 2 * len(record.defenses)
    for number, name in enumerate(record.defenses):
        for half, kind in enumerate(("accuracy", "accuracy-fresh")):
            for place, known in enumerate(series):
                if half and known == NOTHING:
                    continue  # its accuracy is that on fresh draws
                (found,) = record.select(name, kind, known)
                value, low, high = 100 * np.array(found[-3:], dtype=float)
                axes.errorbar(
                    value,
                    place + (2 * number + half - (slots - 1) / 2) * 0.8 / slots,
                    xerr=[[value - low], [high - value]],
                    color=COLOURS[number % 6],
                    marker=MARKERS[number % 6],
                    markerfacecolor=PAPER if half or known == NOTHING else COLOURS[number % 6],
                    capsize=2,
                )
    axes.set_yticks(range(len(series)), [known.replace("+", "\n+ ") for known in series])
    axes.invert_yaxis()
    axes.set_xlim(0, 102)
    axes.set_xlabel("accuracy under attack (%)")
    _legend(part, _key(record, "known draw", "fresh draws"), 2)


def _eot_curve(record: Record, figure: Figure) -> None:
    asked = record.request["options"]
    above, below = _layout(
        figure,
        record,
        "What more EoT samples bring, beside the DW-box",
        f"PGD: {asked['steps']} steps of {asked['step_size']:g} eps, N EoT samples each "
        f"({asked['steps']} N gradient evaluations). Lines: standard attack, {asked['budget']} "
        "gradient evaluations. Cosine: of the mean of N gradients with that at a known draw; "
        "dotted: fit of ρ.",
        1.95,
        1.95,
    )
    panels = _panels(above, record)[0]
    lines = (("hidden", "standard, hidden"), ("dwbox", "standard, DW-box"))
    for panel, name in zip(panels, record.defenses, strict=True):
        _band(panel, record.select(name, "accuracy", "eot"), 0, 100, label="PGD, hidden")
        for number, (series, label) in enumerate(lines, start=1):
            (found,) = record.select(name, "accuracy", series)
            value, low, high = 100 * np.array(found[-3:], dtype=float)
            style = {"color": COLOURS[number], "linestyle": LINES[number]}
            panel.axhline(value, label=label, **style)
            panel.axhspan(low, high, color=COLOURS[number], alpha=0.13, linewidth=0)
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("accuracy (%)")
    _legend(above, panels, 2)
    cosines = _panels(below, record)[0]
    for panel, name in zip(cosines, record.defenses, strict=True):
        for number, scale in enumerate(SCALES):
            rows = record.select(name, "cosine", scale)
            if not rows:
                continue
            _band(panel, rows, number, label=f"mean {scale}")
            (rho,) = record.select(name, "rho", scale)
            n = np.geomspace(rows[0].at[0], rows[-1].at[0], 100)
            panel.plot(n, similarity(rho.value, n), color=COLOURS[number], linestyle=":")
            said = f"ρ {rho.value:.2f} {scale}"
            panel.text(0.04, 0.2 - 0.15 * number, said, transform=panel.transAxes)
    cosines[0].set_ylim(0, 1)
    cosines[0].set_ylabel("cosine")
    _legend(below, cosines, 2)
    counts = asked["counts"]
    some = counts[:: -(-len(counts) // 4)]
    for panel in (*panels, *cosines):
        panel.set_xscale("log")
        panel.set_xticks(some, [str(n) for n in some])
        panel.minorticks_off()
        panel.set_xlabel("EoT samples N")


def _efficacy(record: Record, figure: Figure) -> None:
    (part,) = _layout(
        figure,
        record,
        "Loss along one gradient step",
        "k: length of the step, in eps / 16. Gradient at one known draw, its mean over "
        f"{record.request['options']['sets']} known draws, and a random direction.",
        3.6,
    )
    panels = _panels(part, record, 2, sharex=True)
    kinds = (("loss-known", "known draw"), ("loss-fresh", "fresh draws"))
    for line, (kind, said) in zip(panels, kinds, strict=True):
        for panel, name in zip(line, record.defenses, strict=True):
            for number, series in enumerate(DIRECTIONS):
                rows = record.select(name, kind, series)
                _band(panel, rows, number, marker=None, label=series)
            panel.set_xticks(range(-16, 17, 8))
        line[0].set_ylabel(f"loss, {said} (nats)")
    top = max(panel.get_ylim()[1] for panel in panels.flat)
    for panel in panels.flat:
        panel.set_ylim(0, top)
    for panel in panels[-1]:
        panel.set_xlabel("k")
    _legend(part, panels.flat, 2)


def _landscape(record: Record, figure: Figure) -> None:
    asked = record.request["options"]
    above, below = _layout(
        figure,
        record,
        "Loss toward the images that two attacks found",
        "a: along the perturbation of DW-box; b: along what that of EoT has at right angles to it; "
        "1 is the attack's end. Known: at the draw that DW-box was shown; fresh: on draws that no "
        f"attack was shown. Below: at b = 0, thin for each of {asked['known']} known draws. PGD, "
        f"{asked['steps']} steps, EoT-{asked['eot']}.",
        3.7,
        1.6,
    )
    kinds = (("loss-known", "known"), ("loss-fresh", "fresh"))
    surfaces = {
        (name, kind): _surface(record.select(name, kind, "mean"))
        for name in record.defenses
        for kind, _ in kinds
    }
    top = max(values.max() for _, values in surfaces.values())
    levels = MaxNLocator(10).tick_values(0, top)
    panels = _panels(above, record, 2, sharex=True)
    drawn: Any = None
    for line, (kind, said) in zip(panels, kinds, strict=True):
        for panel, name in zip(line, record.defenses, strict=True):
            axis, values = surfaces[name, kind]
            drawn = panel.contourf(axis, axis, values.T, levels=levels, cmap="cividis")
            panel.contour(axis, axis, values.T, levels=levels, colors=PAPER, linewidths=0.4)
            (along,) = record.select(name, "along", "eot")
            points = {"clean": (0, 0), "DW-box": (1, 0), "EoT": (along.value, 1)}
            for marker, (label, at) in zip(MARKERS, points.items(), strict=False):
                style = {"color": "black", "markeredgecolor": PAPER, "markersize": 6}
                panel.plot(*at, marker=marker, linestyle="none", label=label, **style)
            panel.set_aspect("equal")
            panel.grid(visible=False)
        line[0].set_ylabel(f"b ({said} draw{'s' * (said == 'fresh')})")
    for panel in panels[-1]:
        panel.set_xlabel("a")
    bar = above.colorbar(drawn, ax=panels.ravel().tolist(), location="bottom", aspect=40)
    bar.set_label("mean cross-entropy (nats)")
    _legend(above, panels.flat, 3)
    # The line of the grid that is nearest to b = 0.
    line_b = min((r.at[1] for r in record.rows if len(r.at) == 2), key=abs)
    cuts = _panels(below, record)[0]
    for panel, name in zip(cuts, record.defenses, strict=True):
        for number, (kind, said) in enumerate(kinds):
            for series in record.series(name, kind):
                rows = [r for r in record.select(name, kind, series) if r.at[1] == line_b]
                if series == "mean":
                    _band(panel, rows, number, label=f"{said} draw{'s' * number}")
                else:
                    x, y = [r.at[0] for r in rows], [r.value for r in rows]
                    panel.plot(x, y, color=COLOURS[number], linewidth=0.5)
        panel.set_ylim(0, top * 1.05)
        panel.set_xlabel("a, at b = 0")
    cuts[0].set_ylabel("loss (nats)")
    _legend(below, cuts, 2)


def _surface(rows: list[Row]) -> tuple[Any, Any]:
    """Grid values, and the mean loss ``(a, b)``."""
    axis = sorted({r.at[0] for r in rows})
    values = np.array([r.value for r in rows]).reshape(len(axis), len(axis))
    return np.array(axis), values


def _trajectory(record: Record, figure: Figure) -> None:
    asked = record.request["options"]
    images = list(dict.fromkeys(int(r.at[1]) for r in record.rows if len(r.at) == 2))
    (part,) = _layout(
        figure,
        record,
        "Paths of attacks, and the loss on the way",
        f"PGD, {asked['steps']} steps of {asked['step_size']:g} eps, from the clean image at "
        "(0, 0); images "
        f"{' and '.join(map(str, images))}. x: along the end of DW-box; y: along what the ends of "
        f"EoT-{asked['eot']} have at right angles to it (Euclidean, pixels in [0, 1]). Below: loss "
        "at the draw that DW-box was shown, mean over all images.",
        1.9 + 1.25 * len(images),
    )
    kinds = {
        "white-box": "EoT-1",
        "eot": f"EoT-{asked['eot']}",
        "dwbox": "DW-box",
        "dwbox-other": "DW-box, other draw",
    }
    *panels, losses = _panels(part, record, len(images) + 1)
    for line, image in zip(panels, images, strict=True):
        for panel, name in zip(line, record.defenses, strict=True):
            for series in record.series(name, "x"):
                number = list(kinds).index(series.rpartition(" ")[0])
                x, y = (
                    [r.value for r in record.select(name, q, series) if r.at[1] == image]
                    for q in "xy"
                )
                style = {"color": COLOURS[number], "linestyle": LINES[number]}
                panel.plot(x, y, **style, linewidth=0.9)
                panel.plot(x[-1], y[-1], color=COLOURS[number], marker=MARKERS[number])
        line[0].set_ylabel(f"image {image}: y")
    for panel in panels[-1]:
        panel.set_xlabel("x")
    for panel, name in zip(losses, record.defenses, strict=True):
        for number, (kind, label) in enumerate(kinds.items()):
            rows = record.select(name, "loss-known", kind)
            _band(panel, rows, number, markevery=[-1], label=label)
        panel.set_xlabel("step")
    losses[0].set_ylim(bottom=0)
    losses[0].set_ylabel("loss (nats)")
    _legend(part, losses, 2)


_DRAWN: Mapping[str, Callable[[Record, Figure], None]] = {
    "trajectory": _trajectory,
    "landscape": _landscape,
    "eot-curve": _eot_curve,
    "stochasticity": _stochasticity,
    "immobilise": _immobilise,
    "efficacy": _efficacy,
}
