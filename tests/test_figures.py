"""Tests of the charts of a page, and of how a figure becomes a part of it."""

import re
from base64 import b64decode
from collections.abc import Sequence
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.text import Text

from dbp_bench.reporting.page.charts import (
    Curve,
    Panel,
    Point,
    decomposition,
    panels,
    parts,
    plane,
    strips,
    swatch,
)
from dbp_bench.reporting.plotting import BLUE, ON_DARK, dark_css, on_page, to_svg
from dbp_bench.reporting.samples import png
from dbp_bench.reporting.statistics import Estimate
from pngs import pixels

HOSTILE = "<script>alert(\"x\")</script> & 'co' $\\frac$ \x1b[1m"
RIGHT, HALF, WRONG = (0, 114, 179), (236, 236, 236), (213, 94, 1)


def exactly(value: float, width: float = 0.02) -> Estimate:
    return Estimate(value, value - width, value + width)


def axes_of(figure: Figure) -> Axes:
    (axes,) = figure.axes
    return axes


def texts(svg: str) -> list[str]:
    """An SVG element is XML; what isn't raises."""
    return [e.text or "" for e in ElementTree.fromstring(svg).iter("text")]


def bar(**changes: Estimate | None) -> dict[str, Estimate | None]:
    return {
        "clean": exactly(0.9),
        "base": exactly(0.05),
        "purification": exactly(0.2),
        "all_known": exactly(0.25),
        "stochasticity": exactly(0.4),
        "stochasticity_forward": exactly(0.15),
        "stochasticity_reverse": exactly(0.25),
        "hidden": exactly(0.65),
        **changes,
    }


# --- Decomposition --------------------------------------------------------------------------------


def rectangles(figure: Figure) -> list[Rectangle]:
    """The parts of a bar, and last the outline of its clean accuracy."""
    return [patch for patch in axes_of(figure).patches if isinstance(patch, Rectangle)]


def spans(figure: Figure) -> list[tuple[float, float]]:
    return [(round(r.get_x()), round(r.get_x() + r.get_width())) for r in rectangles(figure)]


def test_the_parts_of_a_bar_stand_end_to_end() -> None:
    assert spans(decomposition({"d": bar()})) == [(0, 5), (5, 25), (25, 40), (40, 65), (0, 90)]


def test_a_negative_part_goes_back_and_is_hatched() -> None:
    below = {"stochasticity_forward": exactly(-0.1), "stochasticity_reverse": exactly(0.0)}
    figure = decomposition({"d": bar(stochasticity=exactly(-0.1), **below)})
    assert spans(figure)[2] == (25, 15)
    assert [bool(each.get_hatch()) for each in rectangles(figure)] == [0, 0, 1, 0, 0]


def test_what_was_not_measured_is_not_drawn() -> None:
    unsplit = bar(stochasticity_forward=None, stochasticity_reverse=None)
    assert list(parts(unsplit)) == ["base", "purification", "unsplit"]
    no_zero = bar(base=None, purification=None)
    assert list(parts(no_zero)) == ["known", "forward", "reverse"]
    split = ("stochasticity", "stochasticity_forward", "stochasticity_reverse")
    hidden = bar(purification=None, all_known=None, **dict.fromkeys(split))
    assert parts(hidden) == {"unknown": 0.65}
    assert spans(decomposition({"d": hidden})) == [(0, 65), (0, 90)]


def test_intervals_lie_at_the_ends_of_their_parts() -> None:
    figure = decomposition({"d": bar()})
    found = [np.asarray(line.get_xdata()).round().tolist() for line in axes_of(figure).lines]
    assert found == [[23, 27], [63, 67]]
    assert {"20.0", "40.0"} <= {text.get_text() for text in axes_of(figure).texts}


# --- Plane ----------------------------------------------------------------------------------------


def test_points_arrows_and_a_diagonal() -> None:
    points = [
        Point("on", exactly(40.0), exactly(40.0)),
        Point("above", exactly(20.0), exactly(50.0, 5), control=True),
    ]
    axes = axes_of(plane(points, "x", "y", diagonal=True, arrows=[("on", "above")]))
    marks = {line.get_marker(): line.get_xydata() for line in axes.lines}
    assert np.array_equal(marks["o"], [[40, 40]])
    assert np.array_equal(marks["s"], [[20, 50]])
    assert axes.get_xlim() == axes.get_ylim() == pytest.approx((0, 1.1 * 55))
    assert [text.get_text() for text in axes.texts] == ["", "on", "above"]
    assert axes_of(plane(points, "x", "y")).get_xlim() == pytest.approx((-1.6, 43.2))


def test_labels_keep_clear_of_points_and_of_each_other() -> None:
    points = [Point(f"defense-{i}", exactly(20 + i), exactly(20 + 2 * (i % 3))) for i in range(8)]
    axes = axes_of(plane(points, "x", "y"))
    boxes = [Text.get_window_extent(text) for text in axes.texts if text.get_text()]
    assert len(boxes) == 8
    for i, box in enumerate(boxes):
        assert box.count_overlaps(boxes[i + 1 :]) == 0
        at = axes.transData.transform([(p.x.value, p.y.value) for p in points])
        assert not any(box.contains(x, y) for x, y in at)


# --- Panels ---------------------------------------------------------------------------------------


def panel(points: Sequence[tuple[float, Estimate]], **options: object) -> Axes:
    found = {"p": Panel([Curve(0, points)], level=0.2)}
    return axes_of(panels(found, "x", **options)["p"])  # type: ignore[arg-type]


def shown(axes: Axes) -> list[str]:
    assert isinstance(axes.figure, Figure)
    axes.figure.draw_without_rendering()
    low, high = axes.get_xlim()
    return [
        tick.label1.get_text()
        for tick in axes.xaxis.get_major_ticks()
        if low <= tick.get_loc() <= high
    ]


def test_a_logarithmic_axis() -> None:
    axes = panel([(1.0, exactly(0.5)), (10.0, exactly(0.4)), (10100.0, exactly(0.3))], log=True)
    assert axes.get_xscale() == "log"
    assert shown(axes) == ["1", "10", "100", "1k", "10k"]
    assert axes.get_ylim() == pytest.approx((0, 56.16))
    near = [(1.0, exactly(0.5)), (40.0, exactly(0.4))]
    assert shown(panel(near, log=True)) == ["1", "3", "10", "30"]
    (level,) = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert np.asarray(level.get_ydata()).tolist() == [20, 20]


def test_axes_that_have_little_to_show() -> None:
    for log in (False, True):
        assert panel([(5.0, exactly(0.5))], log=log).get_xlim()[0] < 5
    assert panel([(0.0, exactly(0.5)), (2.0, exactly(0.4))], log=True).get_xscale() == "linear"
    many = [(float(x), exactly(0.1)) for x in (150, 151, 160, 170, 500, 900, 2000, 10100)]
    assert {"1k", "10k"} <= set(shown(panel(many, log=True)))
    assert shown(panel([(0, exactly(0.1))], names=["none", "all"])) == ["none", "all"]
    assert panels({}, "x", log=True) == {}


# --- Image by image -------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_png(channels: int) -> None:
    rows = [bytes((7 * x + y) % 256 for x in range(300 * channels)) for y in range(100)]
    found = pixels(png(rows, channels))
    assert [[v for pixel in row for v in pixel] for row in found] == [list(row) for row in rows]


def test_no_png_of_nothing() -> None:
    for rows, channels in (([], 1), ([b""], 1), ([b"ab", b"a"], 1), ([b"ab"], 2)):
        with pytest.raises(ValueError, match="not a picture"):
            png(rows, channels)


def image_of(rows: dict[str, list[float]]) -> list[list[tuple[int, ...]]]:
    with on_page():
        figure = strips("d", {name: np.array(row) for name, row in rows.items()})
    found = re.search(r"base64,([A-Za-z0-9+/=]+)", to_svg(figure, "d"))
    assert found
    return pixels(b64decode(found[1]))


def near(found: Sequence[tuple[int, ...]], wanted: Sequence[tuple[int, ...]]) -> bool:
    return bool(np.abs(np.array(found) - np.array(wanted)).max() <= 2)


def test_images_stand_in_one_order() -> None:
    first, second = image_of({"hidden": [0.0, 1.0, 0.5, 0.5], "known": [1.0, 0.0, 0.0, 1.0]})
    assert near(first, [RIGHT, HALF, HALF, WRONG])
    assert near(second, [WRONG, RIGHT, WRONG, RIGHT])


def test_of_many_images_neighbours_are_averaged() -> None:
    (row,) = image_of({"hidden": [float(i < 500) for i in range(1000)]})
    assert len(row) == 480
    assert near([row[0], row[239], row[240], row[-1]], [RIGHT, RIGHT, WRONG, WRONG])


# --- Parts of a page ------------------------------------------------------------------------------


def drawn() -> list[Figure]:
    estimate = exactly(0.2)
    named = {HOSTILE: Panel([Curve(9, [(0.0, estimate)])])}
    with on_page():
        return [
            decomposition({HOSTILE: bar()}),
            plane([Point(HOSTILE, estimate, estimate)], "x", "y", diagonal=True),
            *panels(named, "x", names=["none"]).values(),
            strips(HOSTILE, {HOSTILE: np.array([0.5])}),
            swatch(Patch(color=BLUE)),
        ]


def test_names_are_shown_as_they_are() -> None:
    svgs = [to_svg(figure, f"{HOSTILE[:-8]} {i}") for i, figure in enumerate(drawn())]
    assert not any("<script" in svg for svg in svgs)
    assert HOSTILE[:16] in "".join(texts(svgs[0]))
    assert "\x1b" not in "".join(svgs)


def test_a_figure_is_text_and_attributes_in_the_same_bytes() -> None:
    first, second = ([to_svg(f, f"figure {i}") for i, f in enumerate(drawn())] for _ in range(2))
    assert first == second
    ids = [i for svg in first for i in re.findall(r' id="([^"]+)"', svg)]
    assert len(set(ids)) == len(ids)
    for i, svg in enumerate(first):
        assert not re.search(
            r"style=|<style|<metadata|font-family|\d\.\d{5}|xlink|-\d\d-\d\dT", svg
        )
        assert svg.startswith("<svg ")
        assert f'aria-label="figure {i}"' in svg
        assert set(re.findall(r'(?:url\(|href=")#(\w+)', svg)) <= set(ids)
    assert 'aria-hidden="true"' in to_svg(drawn()[-1], "silent", silent=True)


def test_a_user_s_own_settings_change_nothing() -> None:
    usual = to_svg(drawn()[1], "plane")
    with matplotlib.rc_context({"font.size": 20, "axes.linewidth": 5, "text.usetex": True}):
        assert to_svg(drawn()[1], "plane") == usual


def test_a_dark_page_changes_every_colour() -> None:
    css = dark_css()
    used = {c for f in drawn() for c in re.findall(r'"(#[0-9a-f]{6})"', to_svg(f, "a"))}
    assert used - set(ON_DARK) == {"#e69f00"}
    for colour in used & set(ON_DARK):
        assert f'[fill="{colour}"] {{ fill: {ON_DARK[colour]}; }}' in css
