import re
from base64 import b64decode
from xml.etree import ElementTree

import pytest

from dbp_bench.reporting.page.charts import (
    RIGHT,
    WRONG,
    Level,
    Point,
    Series,
    Split,
    decomposition,
    panel,
    plane,
    shade,
    strips,
    swatch,
    swatch_of,
)
from dbp_bench.reporting.page.svg import Box, Scale, label, place, ticks
from dbp_bench.reporting.samples import png
from dbp_bench.reporting.statistics import Estimate
from pngs import pixels

HOSTILE = "<script>alert(\"x\")</script> & 'co'"


def exactly(value: float, width: float = 0.02) -> Estimate:
    return Estimate(value, value - width, value + width)


def parsed(svg: str) -> ElementTree.Element:
    """An SVG element is XML; what isn't raises."""
    return ElementTree.fromstring(svg)


def of_class(svg: str, kind: str) -> list[dict[str, str]]:
    return [e.attrib for e in parsed(svg).iter() if kind in e.attrib.get("class", "").split()]


def texts(svg: str) -> list[str]:
    return [e.text or "" for e in parsed(svg).iter("text")]


def split(**changes: object) -> Split:
    table: dict[str, object] = {
        "name": "ddpm",
        "clean": exactly(0.9),
        "base": 0.05,
        "purification": exactly(0.2),
        "known": exactly(0.25),
        "stochasticity": exactly(0.4),
        "forward": 0.15,
        "reverse": 0.25,
        "hidden": exactly(0.65),
    }
    return Split(**(table | changes))  # type: ignore[arg-type]


# --- Decomposition --------------------------------------------------------------------------------


def segments(svg: str) -> list[tuple[str, float, float]]:
    """Kind, start and end of each part of the first bar, as fractions of the axis."""
    (outline,) = of_class(svg, "outline")
    start, unit = float(outline["x"]), float(outline["width"]) / 0.9
    return [
        (
            part["class"].removeprefix("part "),
            round((float(part["x"]) - start) / unit, 2),
            round((float(part["x"]) + float(part["width"]) - start) / unit, 2),
        )
        for part in of_class(svg, "part")
    ]


def test_the_parts_of_a_bar_stand_end_to_end() -> None:
    assert segments(decomposition([split()])) == [
        ("base", 0.0, 0.05),
        ("purification", 0.05, 0.25),
        ("forward", 0.25, 0.4),
        ("reverse", 0.4, 0.65),
    ]


def test_a_negative_part_goes_back_and_is_hatched() -> None:
    svg = decomposition([split(stochasticity=exactly(-0.1), forward=-0.1, reverse=0.0)])
    kind, start, end = segments(svg)[-1]
    assert (kind, start, end) == (
        "forward negative",
        0.15,
        0.25,
    )
    assert svg.count("url(#hatch)") == 1
    assert "url(#hatch)" not in decomposition([split()])


def test_what_was_not_measured_is_not_drawn() -> None:
    unsplit = segments(decomposition([split(forward=None, reverse=None)]))
    assert [kind for kind, _, _ in unsplit] == ["base", "purification", "unsplit"]
    no_zero = segments(decomposition([split(base=None, purification=None)]))
    assert [kind for kind, _, _ in no_zero] == ["known", "forward", "reverse"]
    hidden = split(purification=None, known=None, stochasticity=None, forward=None, reverse=None)
    assert [kind for kind, _, _ in segments(decomposition([hidden]))] == ["unknown"]


def test_intervals_lie_at_the_ends_of_their_parts() -> None:
    svg = decomposition([split()])
    (outline,) = of_class(svg, "outline")
    start, unit = float(outline["x"]), float(outline["width"]) / 0.9
    flat = [w for w in of_class(svg, "whisker") if w["y1"] == w["y2"]]
    spans = [tuple(round((float(w[k]) - start) / unit, 2) for k in ("x1", "x2")) for w in flat]
    assert spans == [(0.23, 0.27), (0.63, 0.67)]


# --- Plane ----------------------------------------------------------------------------------------


def test_a_point_on_the_diagonal_and_one_above() -> None:
    points = [
        Point("on", 0.4, exactly(0.4), exactly(0.4)),
        Point("above", 0.2, exactly(0.5), exactly(0.2), control=True),
    ]
    svg = plane(points, [("on", "above"), ("on", "missing")], "t", "x", "y")
    (line,) = of_class(svg, "diagonal")
    x1, y1, x2, y2 = (float(line[k]) for k in ("x1", "y1", "x2", "y2"))
    (circle,) = [e.attrib for e in parsed(svg).iter("circle")]
    share = (float(circle["cx"]) - x1) / (x2 - x1)
    assert (float(circle["cy"]) - y1) / (y2 - y1) == pytest.approx(share, abs=2e-3)
    assert len(of_class(svg, "arrow")) == 3
    (control,) = of_class(svg, "control")
    cx, cy = (float(v) for v in control["points"].split()[0].split(","))
    assert (cy - y1) / (y2 - y1) > (cx - x1) / (x2 - x1)
    assert "arrow" not in plane(points, [("on", "missing")], "t", "x", "y")


def test_labels_keep_clear_of_points_and_of_each_other() -> None:
    points = [(100 + 3 * i, 100 + 2 * (i % 3)) for i in range(8)]
    names = [f"defense-{i}" for i in range(8)]
    placed = place(points, names, Box(0, 0, 400, 300))
    boxes = [
        Box(x, y - 10, x + 7 * len(n), y + 3) for (x, y, _), n in zip(placed, names, strict=True)
    ]
    for i, box in enumerate(boxes):
        assert not any(box.meets(other) for other in boxes[i + 1 :])
        assert not any(box.x1 < px < box.x2 and box.y1 < py < box.y2 for px, py in points)
    assert placed == place(points, names, Box(0, 0, 400, 300))
    assert any(far for _, _, far in placed)


# --- Panels ---------------------------------------------------------------------------------------


def test_a_logarithmic_axis_has_equal_steps_for_equal_factors() -> None:
    series = [Series("s", 0, [(1.0, exactly(0.5)), (10.0, exactly(0.4)), (100.0, exactly(0.3))])]
    svg = panel("p", series, [Level("known", 0.2)], axis="log", x_name="EoT", top=1.0)
    xs = [float(e.attrib["cx"]) for e in parsed(svg).iter("circle")]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)
    assert {"1", "10", "100", "EoT"} <= set(texts(svg))
    (level,) = of_class(svg, "level")
    assert level["y1"] == level["y2"]
    ys = [float(e.attrib["cy"]) for e in parsed(svg).iter("circle")]
    assert ys == sorted(ys)
    assert max(ys) < float(level["y1"])


def test_axes_that_have_little_to_show() -> None:
    one = [Series("s", 3, [(5.0, exactly(0.5))])]
    for axis in ("log", "linear"):
        assert parsed(panel("p", one, [], axis=axis, x_name="x", top=1.0)) is not None
    zero = [Series("s", 0, [(0.0, exactly(0.5)), (2.0, exactly(0.4))])]
    assert "nan" not in panel("p", zero, [], axis="log", x_name="x", top=1.0)
    many = [
        Series("s", 1, [(float(x), exactly(0.1)) for x in (150, 160, 2000, 10100)], joined=False)
    ]
    svg = panel("p", many, [], axis="log", x_name="calls", top=1.0)
    assert not of_class(svg, "curve")
    assert "1000" in texts(svg)


def test_round_ticks() -> None:
    assert ticks(0, 1) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(0, 0.5) == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    assert ticks(0, 12) == [0, 5, 10]
    assert [label(x) for x in (0.2, 306.5, 10100, 2.5e6, 1000)] == [
        "0.2",
        "306.5",
        "10.1k",
        "2.5M",
        "1000",
    ]
    assert Scale(1, 100, 0, 10, log=True)(10) == pytest.approx(5)


# --- Image by image -------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_png(stored: bool, channels: int) -> None:
    rows = [bytes((7 * x + y) % 256 for x in range(300 * channels)) for y in range(100)]
    found = pixels(png(rows, channels, stored=stored))
    assert [[v for pixel in row for v in pixel] for row in found] == [list(row) for row in rows]


def test_no_png_of_nothing() -> None:
    for rows, channels in (([], 1), ([b""], 1), ([b"ab", b"a"], 1), ([b"ab"], 2)):
        with pytest.raises(ValueError, match="not a picture"):
            png(rows, channels)


def image_of(svg: str) -> list[list[tuple[int, ...]]]:
    found = re.search(r"base64,([A-Za-z0-9+/=]+)", svg)
    assert found
    return pixels(b64decode(found[1]))


def test_images_stand_in_one_order() -> None:
    rows = image_of(strips("d", {"hidden": [0.0, 1.0, 0.5], "known": [1.0, 0.0, 0.5]}))
    assert rows == [[RIGHT, shade(0.5), WRONG], [WRONG, shade(0.5), RIGHT]]


def test_of_many_images_neighbours_are_averaged() -> None:
    values = [float(i < 500) for i in range(1000)]
    (row,) = image_of(strips("d", {"hidden": values}))
    assert len(row) == 480
    assert row[0] == RIGHT
    assert row[-1] == WRONG
    assert sum(pixel == RIGHT for pixel in row) == 240


# --- Text -----------------------------------------------------------------------------------------


def test_names_are_shown_as_they_are() -> None:
    drawn = [
        decomposition([split(name=HOSTILE)]),
        plane([Point(HOSTILE, 0.1, exactly(0.2))], [], HOSTILE, HOSTILE, HOSTILE),
        panel(HOSTILE, [], [], axis="names", names=[HOSTILE], x_name=HOSTILE, top=1.0),
        strips(HOSTILE, {HOSTILE: [0.5]}),
        swatch(3),
        swatch_of("outline"),
    ]
    for svg in drawn:
        assert "<script" not in svg
        parsed(svg)
    assert HOSTILE in texts(drawn[1])
