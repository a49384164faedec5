"""The figures of a track's page, as inline SVG. Colours are classes: the page's style says them."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Literal

from markupsafe import Markup

from dbp_bench.reporting.page.svg import CHARACTER, Box, Drawing, Scale, label, place, ticks
from dbp_bench.reporting.samples import png
from dbp_bench.reporting.statistics import Estimate

SHAPES: Final = 8
"""Series that colour and shape tell apart."""


# ------------------------------------------------------------------------------ the decomposition


@dataclass(frozen=True)
class Split:
    """One defense's bar, in fractions. What wasn't measured is null."""

    name: str
    clean: Estimate
    base: float | None
    """Accuracy of the base classifier."""
    purification: Estimate | None
    known: Estimate | None
    """Accuracy with all draws known."""
    stochasticity: Estimate | None
    forward: float | None
    """What hiding the forward noise adds; null where the stochasticity isn't split."""
    reverse: float | None
    hidden: Estimate | None
    """Accuracy with all draws hidden."""


def decomposition(splits: Sequence[Split]) -> Markup:
    """Stacked bars: base classifier, purification, forward and reverse noise; clean as outline."""
    left, right, row, top = 132.0, 700.0, 34.0, 26.0
    bottom = top + row * len(splits)
    drawing = Drawing(
        860, bottom + 40, "Robust accuracy split by where it comes from, one bar for each defense"
    )
    x = Scale(0, 1, left, right)
    _hatch(drawing)
    for tick in ticks(0, 1):
        drawing.line(x(tick), top - 6, x(tick), bottom, "grid")
        drawing.text(x(tick), bottom + 16, label(100 * tick), "tick", "middle")
    drawing.text((left + right) / 2, bottom + 33, "accuracy, %", "axis", "middle")
    drawing.text(right + 12, top - 12, "P", "head")
    drawing.text(right + 84, top - 12, "S", "head")
    for i, split in enumerate(splits):
        y = top + row * i + 6
        drawing.text(left - 10, y + 13, _short(split.name, 18), "name", "end")
        at = 0.0
        for kind, size in _parts(split):
            start, end = sorted((at, at + size))
            if end > start:
                extra = " negative" if size < 0 else ""
                drawing.add(
                    "rect",
                    x=x(start),
                    y=y,
                    width=x(end) - x(start),
                    height=18,
                    class_=f"part {kind}{extra}",
                )
                if size < 0:
                    drawing.add(
                        "rect",
                        x=x(start),
                        y=y,
                        width=x(end) - x(start),
                        height=18,
                        fill="url(#hatch)",
                    )
            at += size
        drawing.add(
            "rect", x=x(0), y=y - 2, width=x(split.clean.value) - x(0), height=22, class_="outline"
        )
        if split.known is not None and split.purification is not None:
            zero = split.known.value - split.purification.value
            _whisker(drawing, x, split.purification, zero, y + 13)
        if split.known is not None and split.stochasticity is not None:
            _whisker(drawing, x, split.stochasticity, split.known.value, y + 5)
        for place_, each in ((12, split.purification), (84, split.stochasticity)):
            if each is not None:
                drawing.text(right + place_, y + 13, f"{100 * each.value:.1f}", "value")
    return drawing.markup()


def _parts(split: Split) -> list[tuple[str, float]]:
    """Kind and size of each segment, from the left."""
    parts: list[tuple[str, float]] = []
    if split.base is not None and split.purification is not None:
        parts += [("base", split.base), ("purification", split.purification.value)]
    elif split.known is not None:
        parts.append(("known", split.known.value))
    if split.stochasticity is not None:
        if split.forward is not None and split.reverse is not None:
            parts += [("forward", split.forward), ("reverse", split.reverse)]
        else:
            parts.append(("unsplit", split.stochasticity.value))
    elif split.known is None and split.hidden is not None:
        parts.append(("unknown", split.hidden.value))
    return parts


def _whisker(drawing: Drawing, x: Scale, part: Estimate, start: float, y: float) -> None:
    low, high = x(start + part.low), x(start + part.high)
    for kind in ("halo", "whisker"):
        drawing.line(low, y, high, y, kind)
        for end in (low, high):
            drawing.line(end, y - 3, end, y + 3, kind)


def _hatch(drawing: Drawing) -> None:
    drawing.parts.append(
        '<defs><pattern id="hatch" width="5" height="5" patternUnits="userSpaceOnUse" '
        'patternTransform="rotate(45)"><line x1="0" y1="0" x2="0" y2="5" class="hatch"/>'
        "</pattern></defs>"
    )


def _short(name: str, most: int) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


# -------------------------------------------------------------------------------------- one plane


@dataclass(frozen=True)
class Point:
    """A defense in a plane, accuracies in fractions."""

    name: str
    x: float
    y: Estimate
    spread: Estimate | None = None
    """The interval of x, where it has one."""
    control: bool = False


def plane(
    points: Sequence[Point],
    arrows: Sequence[tuple[str, str]],
    title: str,
    x_name: str,
    y_name: str,
    *,
    percent: bool = True,
) -> Markup:
    """Points with intervals; where both axes are accuracies (`percent`), with the diagonal."""
    drawing = Drawing(620, 430, title)
    frame = Box(64, 14, 606, 372)
    tops = [each.high for p in points for each in (p.y, p.spread) if each is not None]
    top = min(1.0, max([0.05, *tops]) * 1.1)
    y = Scale(0, top, frame.y2, frame.y1)
    if percent:
        x = Scale(0, top, frame.x1, frame.x2)
    else:
        widest = max([1.0, *(p.x for p in points)])
        x = Scale(-0.04 * widest, 1.08 * widest, frame.x1, frame.x2)
    factor = 100 if percent else 1
    for tick in ticks(0, top):
        drawing.line(frame.x1, y(tick), frame.x2, y(tick), "grid")
        drawing.text(frame.x1 - 7, y(tick) + 4, label(100 * tick), "tick", "end")
    for tick in ticks(0, x.high):
        drawing.line(x(tick), frame.y1, x(tick), frame.y2, "grid")
        drawing.text(x(tick), frame.y2 + 17, label(factor * tick), "tick", "middle")
    drawing.text((frame.x1 + frame.x2) / 2, frame.y2 + 40, x_name, "axis", "middle")
    drawing.add(
        "text",
        y_name,
        transform=f"translate(16 {(frame.y1 + frame.y2) / 2:.0f}) rotate(-90)",
        class_="axis",
        text_anchor="middle",
    )
    if percent:
        drawing.line(x(0), y(0), x(top), y(top), "diagonal")
    at = {p.name: (x(p.x), y(p.y.value)) for p in points}
    for source, target in arrows:
        if source in at and target in at and at[source] != at[target]:
            _arrow(drawing, at[source], at[target])
    for p in points:
        px, py = at[p.name]
        drawing.line(px, y(max(0.0, p.y.low)), px, y(p.y.high), "spread")
        if p.spread is not None:
            drawing.line(x(max(0.0, p.spread.low)), py, x(p.spread.high), py, "spread")
    for p in points:
        kind = "point control" if p.control else "point"
        drawing.mark(*at[p.name], 1 if p.control else 0, kind, 4.5)
    texts = [_short(p.name, 24) for p in points]
    for (px, py), text, (tx, ty, far) in zip(
        at.values(), texts, place(list(at.values()), texts, frame), strict=True
    ):
        if far:
            end = min(max(px, tx), tx + CHARACTER * len(text))
            drawing.line(px, py, end, min(max(py, ty - 10), ty), "leader")
        drawing.text(tx, ty, text, "label")
    return drawing.markup()


def _arrow(drawing: Drawing, start: tuple[float, float], end: tuple[float, float]) -> None:
    dx, dy = end[0] - start[0], end[1] - start[1]
    length = (dx * dx + dy * dy) ** 0.5
    if length < 20:
        return
    ux, uy = dx / length, dy / length
    x1, y1 = start[0] + 7 * ux, start[1] + 7 * uy
    x2, y2 = end[0] - 8 * ux, end[1] - 8 * uy
    drawing.line(x1, y1, x2, y2, "arrow")
    for side in (1, -1):
        drawing.line(x2, y2, x2 - 8 * ux + side * 4 * -uy, y2 - 8 * uy + side * 4 * ux, "arrow")


# ----------------------------------------------------------------------------------- small panels


@dataclass(frozen=True)
class Series:
    """Points of one kind, joined by a line."""

    name: str
    style: int
    """Its colour and shape: a number below :data:`SHAPES`."""
    points: Sequence[tuple[float, Estimate]]
    joined: bool = True


@dataclass(frozen=True)
class Level:
    """A horizontal line to hold points against."""

    name: str
    value: float


Axis = Literal["linear", "log", "names"]


def panel(
    title: str,
    series: Sequence[Series],
    levels: Sequence[Level],
    *,
    axis: Axis,
    x_name: str,
    top: float,
    names: Sequence[str] = (),
    low: float | None = None,
    high: float | None = None,
) -> Markup:
    """One of several small figures with the same axes.

    Args:
        title: Above the panel.
        series: What is drawn.
        levels: Horizontal lines.
        axis: How x is laid out; `names`: at 0, 1, ..., with `names` below.
        x_name: Below the axis.
        top: The highest accuracy of all panels, a fraction.
        names: The names of the places on an axis of names.
        low: The least x of all panels; of this one if not given.
        high: The largest x.
    """
    drawing = Drawing(272, 216, f"{title}: accuracy against {x_name}")
    frame = Box(38, 26, 264, 168)
    xs = [x for each in series for x, _ in each.points]
    if axis == "names":
        x = Scale(-0.35, len(names) - 0.65, frame.x1, frame.x2)
    else:
        least = min(xs) if low is None else low
        most = max(xs) if high is None else high
        # A logarithm has no 0; a single value has no span.
        log = axis == "log" and least > 0
        if most == least:
            least, most = (least / 2, most * 2) if log else (least - 0.5, most + 0.5)
        inset = 12.0
        x = Scale(least, most, frame.x1 + inset, frame.x2 - inset, log)
    y = Scale(0, top, frame.y2, frame.y1)
    drawing.text(frame.x1, 15, _short(title, 34), "head")
    for tick in ticks(0, top, 4):
        drawing.line(frame.x1, y(tick), frame.x2, y(tick), "grid")
        drawing.text(frame.x1 - 6, y(tick) + 4, label(100 * tick), "tick", "end")
    if axis == "names":
        for i, name in enumerate(names):
            drawing.text(x(i), frame.y2 + 16, name, "tick", "middle")
    else:
        for value in _apart(_marked(xs, x), x):
            drawing.line(x(value), frame.y2, x(value), frame.y2 + 4, "baseline")
            drawing.text(x(value), frame.y2 + 16, label(value), "tick", "middle")
    drawing.text((frame.x1 + frame.x2) / 2, frame.y2 + 36, x_name, "axis", "middle")
    drawing.line(frame.x1, frame.y2, frame.x2, frame.y2, "baseline")
    for level in levels:
        drawing.line(frame.x1, y(level.value), frame.x2, y(level.value), "level")
    for each in series:
        style = f"s{each.style % SHAPES}"
        at = [(x(value), y(estimate.value)) for value, estimate in each.points]
        if each.joined and len(at) > 1:
            drawing.path(at, f"curve {style}")
        for (px, py), (_, estimate) in zip(at, each.points, strict=True):
            drawing.line(px, y(estimate.low), px, y(estimate.high), f"spread {style}")
            drawing.mark(px, py, each.style, f"dot {style}", 3.6)
    return drawing.markup()


def _marked(xs: Sequence[float], x: Scale) -> list[float]:
    """The values that are drawn, where there are few, else round ones."""
    values = sorted(set(xs))
    decades = [10.0**k for k in range(-6, 13) if x.low <= 10.0**k <= x.high] if x.log else []
    if len(decades) > 1 and not all(value in decades or value < 1e3 for value in values):
        return decades
    if len(values) <= 6 or x.log:
        return values
    return ticks(x.low, x.high, 4)


def _apart(values: Sequence[float], x: Scale) -> list[float]:
    """Those whose texts don't touch; the largest always."""
    kept: list[float] = []
    for value in reversed(values):
        half = 3.4 * len(label(value)) + 3
        if not kept or x(kept[-1]) - x(value) >= half + 3.4 * len(label(kept[-1])):
            kept.append(value)
    return kept[::-1]


def swatch(style: int) -> Markup:
    """The mark of a series, for a legend."""
    drawing = Drawing(22, 12, "")
    drawing.path([(0, 6), (22, 6)], f"curve s{style % SHAPES}")
    drawing.mark(11, 6, style, f"dot s{style % SHAPES}", 3.6)
    return _silent(drawing.markup())


def swatch_of(kind: str) -> Markup:
    """A patch, line or outline of the decomposition or a panel, for a legend."""
    drawing = Drawing(22, 12, "")
    if kind in ("level", "diagonal", "arrow"):
        drawing.line(0, 6, 22, 6, kind)
    elif kind == "outline":
        drawing.add("rect", x=1, y=1, width=20, height=10, class_="outline")
    elif kind in ("point", "point control"):
        drawing.mark(11, 6, int(kind != "point"), kind, 4.5)
    else:
        drawing.add("rect", x=0, y=0, width=22, height=12, class_=f"part {kind}")
    return _silent(drawing.markup())


def _silent(svg: Markup) -> Markup:
    """Without a name: the text beside a legend's mark says it."""
    return Markup(str(svg).replace('role="img" aria-label=""', 'aria-hidden="true"'))


# ---------------------------------------------------------------------------------- image by image

WRONG: Final = (213, 94, 0)
MIDDLE: Final = (236, 236, 236)
RIGHT: Final = (0, 114, 178)
_COLUMNS: Final = 480
"""More images than this are averaged with their neighbours."""


def strips(title: str, rows: Mapping[str, Sequence[float]]) -> Markup:
    """One column for each image, one row for each setting: the share of draws that are right.

    Args:
        title: The title of the figure.
        rows: By setting; the images in the same order everywhere, best first in the first row
            (those that tie by the next ones).
    """
    height, left, width = 15, 104.0, 490.0
    order = sorted(
        range(len(next(iter(rows.values())))), key=lambda i: [-v[i] for v in rows.values()]
    )
    sorted_rows = [_binned([values[i] for i in order]) for values in rows.values()]
    pixels = [b"".join(bytes(shade(value)) for value in row) for row in sorted_rows]
    drawing = Drawing(
        left + width + 2, 24 + height * len(rows), f"{title}: share of draws right, image by image"
    )
    drawing.text(0, 14, _short(title, 60), "head")
    data = b64encode(png(pixels, 3, stored=True)).decode()
    drawing.add(
        "image",
        x=left,
        y=22,
        width=width,
        height=height * len(rows),
        href=f"data:image/png;base64,{data}",
        preserveAspectRatio="none",
        class_="pixels",
    )
    for i, name in enumerate(rows):
        drawing.text(left - 8, 22 + height * i + 11, _short(name, 15), "tick", "end")
        if i:
            drawing.line(left, 22 + height * i, left + width, 22 + height * i, "gap")
    return drawing.markup()


def shade(share: float) -> tuple[int, int, int]:
    """The colour of a share: orange for wrong, blue for right, by way of grey."""
    start, end, t = (WRONG, MIDDLE, 2 * share) if share < 0.5 else (MIDDLE, RIGHT, 2 * share - 1)
    r, g, b = (round(a + (z - a) * t) for a, z in zip(start, end, strict=True))
    return r, g, b


def _binned(values: Sequence[float]) -> list[float]:
    n = len(values)
    if n <= _COLUMNS:
        return list(values)
    bounds = [i * n // _COLUMNS for i in range(_COLUMNS + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(bounds)]
