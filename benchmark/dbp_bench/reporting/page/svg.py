"""Writes SVG: elements with escaped text, axes, and labels that keep clear of each other."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from math import ceil, floor, log10

from markupsafe import Markup

CHARACTER = 7.0
"""Width of a character of a label, in units of the drawing."""
LINE = 13.0
"""Height of a line of text."""


def number(x: float) -> str:
    """To a tenth of a unit, in as few characters as that takes."""
    text = f"{x:.1f}".removesuffix(".0")
    return "0" if text == "-0" else text


@dataclass
class Drawing:
    """An SVG element that grows."""

    width: float
    height: float
    title: str
    parts: list[str] = field(default_factory=list)

    def add(self, name: str, text: str | None = None, **attributes: object) -> None:
        """An element, with `text` in it; an underscore in an attribute's name is a dash."""
        said = "".join(
            f' {key.rstrip("_").replace("_", "-")}="'
            f'{number(value) if isinstance(value, float | int) else escape(str(value))}"'
            for key, value in attributes.items()
            if value is not None
        )
        end = "/>" if text is None else f">{escape(text)}</{name}>"
        self.parts.append(f"<{name}{said}{end}")

    def text(self, x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> None:
        """A line of text with its baseline at `y`."""
        self.add("text", text, x=x, y=y, class_=kind or None, text_anchor=anchor)

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        """A straight line."""
        self.add("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=kind)

    def path(self, points: Iterable[tuple[float, float]], kind: str) -> None:
        """An open polygon."""
        steps = "L".join(f"{number(x)} {number(y)}" for x, y in points)
        self.add("path", d=f"M{steps}", class_=kind)

    def mark(self, x: float, y: float, shape: int, kind: str, size: float = 4.0) -> None:
        """A marker: the shapes differ, so that colour isn't needed to tell them apart."""
        s = size
        if shape % 4 == 0:
            self.add("circle", cx=x, cy=y, r=s, class_=kind)
            return
        points = {
            1: [(-s, -s), (s, -s), (s, s), (-s, s)],
            2: [(0, -1.3 * s), (1.2 * s, s), (-1.2 * s, s)],
            3: [(0, -1.4 * s), (1.4 * s, 0), (0, 1.4 * s), (-1.4 * s, 0)],
        }[shape % 4]
        joined = " ".join(f"{number(x + dx)},{number(y + dy)}" for dx, dy in points)
        self.add("polygon", points=joined, class_=kind)

    def markup(self) -> Markup:
        """The element; its text is escaped."""
        w, h = number(self.width), number(self.height)
        return Markup(  # every attribute and text was escaped above
            f'<svg viewBox="0 0 {w} {h}" width="{w}" height="{h}" role="img" '
            f'aria-label="{escape(self.title)}">{"".join(self.parts)}</svg>'
        )


@dataclass(frozen=True)
class Scale:
    """From values to places; logarithmic on demand."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Where `value` lies."""
        low, high, v = (
            (log10(self.low), log10(self.high), log10(value))
            if self.log
            else (self.low, self.high, value)
        )
        return self.start + (self.end - self.start) * ((v - low) / ((high - low) or 1.0))


def ticks(low: float, high: float, number_of: int = 5) -> list[float]:
    """Round values from `low` to `high`, about `number_of` of them."""
    span = (high - low) or 1.0
    rough = span / max(1, number_of)
    power = 10.0 ** floor(log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = ceil(low / step - 1e-9), floor(high / step + 1e-9)
    return [round(i * step, 10) + 0.0 for i in range(first, last + 1)]


def label(value: float) -> str:
    """A tick's text: four digits, thousands as k and millions as M."""
    rounded = float(f"{value:.4g}")
    for unit, size in (("M", 1e6), ("k", 1e4)):
        if abs(rounded) >= size:
            return f"{rounded / (1e6 if unit == 'M' else 1e3):g}{unit}"
    return f"{rounded:g}"


@dataclass(frozen=True)
class Box:
    """What must not be covered."""

    x1: float
    y1: float
    x2: float
    y2: float

    def meets(self, other: "Box") -> bool:
        """Whether the two overlap."""
        return (
            self.x1 < other.x2 and other.x1 < self.x2 and self.y1 < other.y2 and other.y1 < self.y2
        )


def place(
    points: Sequence[tuple[float, float]], texts: Sequence[str], frame: Box
) -> list[tuple[float, float, bool]]:
    """Where each text goes (left end and baseline), and whether it needs a line to its point.

    The nearest place that covers no point and no text placed before; the order is that of the
    points, so that the result is always the same.
    """
    taken = [Box(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    placed = []
    for (x, y), text in zip(points, texts, strict=True):
        width = CHARACTER * len(text)
        found = None
        for distance in range(8, 200, 8):
            for dx, dy in _DIRECTIONS:
                cx, cy = x + dx * distance, y + dy * distance
                left = cx if dx > 0 else cx - width if dx < 0 else cx - width / 2
                box = Box(left, cy - LINE / 2, left + width, cy + LINE / 2)
                inside = (
                    box.x1 >= frame.x1
                    and box.x2 <= frame.x2
                    and box.y1 >= frame.y1
                    and box.y2 <= frame.y2
                )
                if inside and not any(box.meets(other) for other in taken):
                    found = box, distance
                    break
            if found:
                break
        box, distance = found or (Box(x + 8, y - 6, x + 8 + width, y + 7), 8)
        taken.append(box)
        placed.append((box.x1, box.y2 - 3, distance > 16))
    return placed


_DIRECTIONS = ((1, 0), (-1, 0), (0.7, -0.7), (0.7, 0.7), (-0.7, -0.7), (-0.7, 0.7), (0, -1), (0, 1))
