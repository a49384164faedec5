"""The style of every figure, on a track's page and in an analysis, and figures as SVG of a page.

Colours are those of Okabe and Ito, which can be told apart without full colour vision; markers and
line styles differ as well.
"""

import base64
import io
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

BLUE, ORANGE, GREEN, PINK = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
AMBER, SKY, SAND = "#e69f00", "#56b4e9", "#f2d16b"
INK, GREY, MIST, RULE, PAPER = "#000000", "#767676", "#b9c0c8", "#dddddd", "#ffffff"

COLOURS: Final = (BLUE, ORANGE, GREEN, PINK, AMBER, SKY)
MARKERS: Final = ("o", "s", "^", "D", "v", "P")
LINES: Final[tuple[Any, ...]] = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))

ON_DARK: Final[Mapping[str, str]] = {
    BLUE: "#3a9bdc",
    ORANGE: "#f0894a",
    GREEN: "#2fc79a",
    PINK: "#e59cc4",
    SKY: "#9cc9f0",
    SAND: "#f7e0a0",
    INK: "#e6e9ec",
    GREY: "#a3acb6",
    MIST: "#59616b",
    RULE: "#363c44",
    PAPER: "#14171b",
}
"""The colour that a dark page shows in place of a light page's."""

STYLE: Final[dict[Any, Any]] = {
    "svg.hashsalt": "dbp-bench",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "sans-serif"],
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
}

_ON_PAGE: Final[dict[Any, Any]] = {
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "text.parse_math": False,  # names may hold a dollar
}

_PIXELS: Final = 4 / 3
"""The pixels of a page for each point (1/72 inch) of a figure."""


def dark_css() -> str:
    """The rules that give the figures of a page their colours on a dark ground."""
    rules = (
        f'[{paint}="{colour}"] {{ {paint}: {dark}; }}\n'
        for colour, dark in ON_DARK.items()
        for paint in ("fill", "stroke")
    )
    return f"@media (prefers-color-scheme: dark) {{\n{''.join(rules)}}}\n"


def look(number: int, *, joined: bool = True) -> dict[str, Any]:
    """The line style of the curve of this `number`; that of its points alone if not `joined`."""
    marks = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
    return {**marks, "markeredgecolor": PAPER, "linestyle": "-" if joined else "none"}


@contextmanager
def styled(changes: dict[Any, Any] | None = None) -> Iterator[None]:
    """While it lasts, figures have :data:`STYLE` and `changes`, whatever a user has set."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        # The font that measures may lack a letter of a name; the reader's shows it.
        warnings.filterwarnings("ignore", "Glyph")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE | (changes or {}))
        yield


def on_page(salt: str = "") -> AbstractContextManager[None]:
    """While it lasts, figures are those of a page; `salt` goes into their ids."""
    return styled(_ON_PAGE | {"svg.hashsalt": salt})


def to_svg(figure: Figure, label: str, *, silent: bool = False) -> Markup:
    """The `figure` as an SVG element of a page.

    Its text is text in the page's font, and its colours are attributes, which :func:`dark_css` can
    override; the page allows no style of an element's own. The same figure gives the same bytes.

    Args:
        figure: A figure that was drawn under :func:`on_page`.
        label: A description for those who can't see it; no two figures of a page have the same.
        silent: True if the text beside it says the same already.
    """
    buffer = io.BytesIO()
    # Ids are hashes of what they name: of different salts, no two figures share one.
    with on_page(salt=label):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(_METADATA))
    text = buffer.getvalue().decode()
    referred = set(re.findall(r'(?:url\(|href=")#(\w+)', text))
    root = ElementTree.fromstring(text)
    for element in list(root.iter()):
        for child in list(element):
            if child.tag.endswith(("}metadata", "}style")):
                element.remove(child)
        attributes = {_local(name): value for name, value in element.items()}
        pairs = (pair.partition(":") for pair in attributes.pop("style", "").split(";"))
        attributes |= {name.strip(): value.strip() for name, _, value in pairs if value}
        attributes.pop("font-family", None)
        if attributes.get("id") not in referred:
            attributes.pop("id", None)
        element.tag, element.tail = _local(element.tag), None
        if element.tag == "image":
            attributes["href"] = _uncompressed(attributes["href"])
        elif element.tag != "text":
            element.text = None
        element.attrib.clear()
        for name, value in attributes.items():
            element.set(name, _rounded(value, 4 if name == "transform" else 2))
    width, height = figure.get_size_inches() * 72 * _PIXELS
    root.attrib |= {"width": f"{width:.0f}", "height": f"{height:.0f}"}
    root.attrib |= {"fill": INK, "stroke-linejoin": "round"}
    root.attrib |= {"aria-hidden": "true"} if silent else {"role": "img", "aria-label": label}
    return Markup(ElementTree.tostring(root, encoding="unicode"))  # escapes what it holds


_METADATA: Final = ("Creator", "Date", "Format", "Type")


def _local(name: str) -> str:
    """A name without its namespace, which an HTML page knows."""
    return name.rpartition("}")[2]


def _rounded(value: str, digits: int) -> str:
    """An attribute on one line, with its numbers cut to so many `digits` after the point."""

    def shorter(number: re.Match[str]) -> str:
        return f"{float(number[0]):.{digits}f}".rstrip("0").rstrip(".")

    return re.sub(r"\d+\.\d+", shorter, " ".join(value.split()))


def _uncompressed(address: str) -> str:
    """The picture at a data address, stored so that its bytes don't depend on a compressor."""
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))) as picture:
        picture.convert("RGB").save(buffer, "png", compress_level=0)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
