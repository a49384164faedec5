"""The section on certified accuracy of a track: tables for readers, a figure, and files."""

import io
from collections.abc import Sequence
from typing import Final

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dbp_bench.reporting.certificates import (
    ATTACKED,
    Attacked,
    Best,
    Held,
    certificates_frame,
    difference,
    groups,
    radii_of,
)
from dbp_bench.reporting.frames import Marked, Signed, cell, frame_of, to_csv, to_latex, to_markdown
from dbp_bench.reporting.plotting import COLOURS, INK, LINES, styled
from dbp_bench.reporting.rendering import md, note, tex

TITLE: Final = "Certified accuracy"
_WIDTH, _PANEL, _WIDE = 3.35, 1.9, 2
"""The width of a paper's column and the height of a panel, in inches; panels side by side."""


def table(frame: pd.DataFrame) -> pd.DataFrame:
    """The table of :func:`certificates_frame`, with the headings that readers see.

    The first column is empty, as that of ranks is in other tables.
    """
    shown = {"": [""] * len(frame), "Defense": frame["defense"], "Sigma": frame["sigma"]}
    shown |= {"n": frame["n"], **{at: frame[name] for name, at in radii_of(frame).items()}}
    missing = frame["abstained"].isna()
    shown["Abstained, %"] = [
        "" if empty else f"{100 * share:.1f}"
        for share, empty in zip(frame["abstained"], missing, strict=True)
    ]
    return pd.DataFrame(shown, dtype=object)


def caption(frame: pd.DataFrame) -> str:
    """What the numbers of the table are."""
    attacked = bool((frame["sigma"] == ATTACKED).any())
    return " ".join([note("certified"), *([note("certified_attacked")] if attacked else [])])


def differences(helds: Sequence[Held], radii: Sequence[float]) -> pd.DataFrame:
    """Each defense at its best sigma minus the cheapest one at its best, paired by image.

    The cheapest is that of fewest network calls for one vote, but for classifiers alone. Empty
    where there are not two with equally many votes.
    """
    rows = []
    of_size: dict[int, list[Best]] = {}
    for group in groups(helds):
        of_size.setdefault(group.helds[0].certificate.n, []).append(group)
    for n, found in of_size.items():
        denoised = [each for each in found if each.helds[0].certificate.nfe]
        if len(denoised) < 2:
            continue
        first = min(denoised, key=lambda each: each.helds[0].certificate.nfe)
        rows += [
            {
                "": "",
                "Defense": each.what,
                "minus": first.what,
                "n": n,
                **{f"{r:g}": cell(difference(each, first, r), Signed) for r in radii},
            }
            for each in found
            if each is not first
        ]
    return frame_of(rows)


def markdown(helds: Sequence[Held], attacked: Attacked) -> list[str]:
    """The lines of the section in Markdown; none without certificates."""
    if not helds:
        return []
    frame = certificates_frame(helds, attacked=attacked)
    track = helds[0].certificate.track
    text = [f"## {TITLE}", "", *to_markdown(_marked(table(frame)), stacked=True)]
    text += [caption(frame), ""]
    paired = differences(helds, [float(at) for at in radii_of(frame).values()])
    if not paired.empty:
        text += [
            "Difference from the cheapest denoiser, each at its best sigma, paired by image:",
            "",
        ]
        text += to_markdown(_marked(paired), stacked=True)
    return [*text, f"![Certified accuracy against the radius]({track}-certificates.svg)", ""]


def _marked(shown: pd.DataFrame) -> pd.DataFrame:
    """The table without its first column, whose names are Markdown."""
    names = [Marked(md(name)) for name in shown["Defense"]]
    return shown.drop(columns="").assign(Defense=pd.Series(names, dtype=object))


def latex(helds: Sequence[Held], attacked: Attacked) -> list[str]:
    """The lines of a float in LaTeX; none without certificates."""
    if not helds:
        return []
    frame = certificates_frame(helds, attacked=attacked)
    shown = table(frame).drop(columns="")
    names = shown["Defense"]
    rules = [i for i, same in enumerate(names == names.shift()) if i and not same]
    track = helds[0].certificate.track
    return [
        r"\begin{table*}[t]",
        r"\centering",
        r"\small",
        r"\setlength{\tabcolsep}{4pt}",
        rf"\caption{{Certified accuracy within l2 radii on {tex(track)}, in percent.}}",
        *to_latex(shown, rules),
        r"\begin{minipage}{\textwidth}\footnotesize",
        tex(caption(frame)),
        r"\end{minipage}",
        r"\end{table*}",
    ]


def files(helds: Sequence[Held], attacked: Attacked) -> dict[str, str | bytes]:
    """The files on certificates, by the ends of their names; none without certificates."""
    if not helds:
        return {}
    first = helds[0].certificate
    frame = certificates_frame(helds, attacked=attacked).assign(track=first.track, norm="l2")
    found: dict[str, str | bytes] = {"-certificates.csv": to_csv(frame)}
    with styled({"pdf.compression": 0, "pdf.fonttype": 42, "svg.fonttype": "path"}):
        drawn = figure(groups(helds))
        for kind in ("svg", "pdf"):
            buffer = io.BytesIO()
            dates = {"Date": None} if kind == "svg" else {"CreationDate": None}
            drawn.savefig(buffer, format=kind, metadata=dates)
            found[f"-certificates.{kind}"] = buffer.getvalue()
    return found


# -------------------------------------------------------------------------------------- figure


def figure(found: Sequence[Best]) -> Figure:
    """Certified accuracy against the radius: a panel for each defense, a curve for each sigma.

    It must be drawn under a style of :mod:`dbp_bench.reporting.plotting`.
    """
    rows = -(-len(found) // _WIDE)
    wide = min(_WIDE, len(found))
    size = (_WIDTH * wide, 0.3 + _PANEL * rows)
    drawn = Figure(figsize=size, layout="constrained")
    panels = list(drawn.subplots(rows, wide, squeeze=False, sharex=True, sharey=True).flat)
    sigmas = sorted({held.certificate.sigma for group in found for held in group.helds})
    for axes, group in zip(panels, found, strict=False):
        _panel(axes, group, sigmas)
    for axes in panels[len(found) :]:
        axes.set_visible(False)
    return drawn


def _panel(axes: Axes, group: Best, sigmas: Sequence[float]) -> None:
    """Draw one defense; each curve ends where its votes can reach no further."""
    first = group.helds[0].certificate
    axes.set_title(f"{group.what}, n = {first.n:,}", loc="left", size=8, weight="bold")
    for held in group.helds:
        one, found = held.certificate, held.certified
        radii = np.sort(np.where(found.right, found.radii, -1.0))
        radii = radii[radii >= 0]
        shares = 100 * np.arange(len(radii), 0, -1) / len(found.labels)
        number = list(sigmas).index(one.sigma)
        xs = np.concatenate([[0.0], radii, [one.reach()]])
        ys = np.concatenate([[shares[0] if len(shares) else 0.0], shares, [0.0]])
        axes.step(
            xs,
            ys,
            where="pre",
            color=COLOURS[number % len(COLOURS)],
            linestyle=LINES[number % len(LINES)],
            label=f"sigma {one.sigma:g}",
        )
    axes.set(xlim=(0, None), ylim=(0, 100))
    axes.set_xlabel("l2 radius, pixel units", size=8)
    axes.set_ylabel("certified accuracy, %", size=8)
    axes.tick_params(labelsize=7, labelbottom=True)
    axes.legend(labelcolor=INK, fontsize=7)
