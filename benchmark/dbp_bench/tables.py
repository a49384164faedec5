"""From a track's numbers to tables: CSV for programs, Markdown and LaTeX for readers."""

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from dbp_bench.comparable import NULL, WHITEBOX, Effort
from dbp_bench.leaderboard import QUANTITIES, UNDEFENDED, Leaderboard, Row
from dbp_bench.statistics import LEVEL, RESAMPLES, Estimate

_ACCURACIES: Final = ("clean", "hidden", "forward_known", "reverse_known", "all_known")
_PARTS: Final = (
    "undefended",
    "purification",
    "stochasticity",
    "share",
    "stochasticity_forward",
    "stochasticity_reverse",
)
_CHECKS: Final = ("fresh", WHITEBOX, NULL)

_BOUNDS: Final = (
    "Every robust accuracy is an upper bound: it is what a finite attack left standing, and a "
    "stronger one may leave less. Stochasticity S is a difference of two upper bounds and no bound "
    "itself."
)
_BOOTSTRAP: Final = (
    f"In brackets: {100 * LEVEL:.0f} % intervals from a paired bootstrap over images ({RESAMPLES} "
    "resamples, the same ones for every number of the track; percentiles). They say what other "
    "images of the kind could have given, not what other training runs or stronger attacks could. "
    "At 0 or 100 % a bootstrap has no width."
)
_BLANK: Final = (
    "Blank: not measured, or it needs something that was not measured, or a share of a difference "
    "that is not clearly above zero."
)
_SAME: Final = (
    "= : the same setting as another column, for this defense, measured once. (Without reverse "
    "noise, knowing the forward noise is knowing all; without any noise, all columns are one.)"
)


def to_csv(board: Leaderboard) -> str:
    """One line per defense; accuracies are fractions."""
    header = ["rank", "defense", "kind", "track", "norm", "eps", "images", "seeds"]
    header += [f"{key}{end}" for key in QUANTITIES for end in ("", "_lo", "_hi")]
    header += ["attack", "effort", "whitebox_eot", "hidden_draws", "known_draws", "fresh_draws"]
    header += ["network_calls", "served_by", "flags", "results"]
    lines: list[list[object]] = []
    for row in board.rows:
        line: list[object] = [row.rank, row.defense, row.kind, board.track, board.norm, board.eps]
        line += [board.images, " ".join(map(str, row.pools[0].seeds))]
        for key in QUANTITIES:
            line += _fractions(row.estimates[key])
        line += [board.attack, _json(board.effort), board.whitebox_eot]
        line += [row.hidden_draws, row.known_draws, row.fresh_draws, row.calls]
        line += [" ".join(f"{key}={threat}" for key, threat in row.served_by.items())]
        line += ["; ".join(row.flags)]
        line += [" ".join(record.name for pool in row.pools for record in pool.records)]
        lines.append(line)
    return _csv(header, lines)


def settings_to_csv(board: Leaderboard) -> str:
    """One line per defense and threat model, with the files that it follows from."""
    header = ["defense", "kind", "threat", "knows", "sites", "track", "norm", "eps", "images"]
    header += ["seeds", "draws", "fresh_draws"]
    header += [f"{key}{end}" for key in ("robust", "clean", "fresh") for end in ("", "_lo", "_hi")]
    header += ["attack", "effort", "overrides", "network_calls", "gradient_calls", "judging_calls"]
    header += ["zero_gradients", "commit", "dirty", "results", "sha256"]
    lines: list[list[object]] = []
    for pool, kind in board.settings:
        any_, results = pool.any, [record.result for record in pool.records]
        line: list[object] = [any_.defense, kind, any_.threat, " ".join(any_.knows)]
        line += [" ".join(any_.sites), board.track, any_.norm, any_.eps, board.images]
        line += [" ".join(map(str, pool.seeds)), pool.draws]
        line += [len(any_.fresh[0][0]) if any_.fresh else None]
        fresh = pool.fresh(board.bootstrap)
        for values in (pool.robust(board.bootstrap), pool.clean(board.bootstrap), fresh):
            line += _fractions(None if values is None else board.bootstrap.estimate(values))
        line += [any_.attack, _json(any_.effort), " ".join(any_.overrides)]
        line += [any_.network_calls.per_purification]
        line += [sum(result.network_calls.gradient for result in results)]
        line += [sum(result.network_calls.judging for result in results)]
        searched = all(result.zero_gradient is not None for result in results)
        line += [pool.zero_gradients() if searched else None]
        line += [_joined(result.provenance.commit for result in results)]
        line += [_joined(result.provenance.dirty for result in results)]
        line += [" ".join(record.name for record in pool.records)]
        line += [" ".join(record.sha256 for record in pool.records)]
        lines.append(line)
    return _csv(header, lines)


def to_markdown(board: Leaderboard) -> str:
    """For reading on a page: three tables, and what they mean."""
    text = [f"# {_md(board.title)}", ""]
    if board.demonstration:
        text += [
            "> **A demonstration.** These numbers show the method, on a small data set with small "
            "networks. Never compare them with CIFAR-10 or any other track.",
            "",
        ]
    if board.entry and board.entry.note.strip():
        text += [_md(board.entry.note), ""]
    text += [f"Accuracies in percent, with {100 * LEVEL:.0f} % intervals. {_ranking(board)}", ""]
    text += ["## Accuracy, by what the attacker knows", ""]
    text += _md_table(
        [
            "Clean",
            f"Hidden, R<sub>WB</sub>{_eot(board)}",
            "Forward known, R<sub>F</sub>",
            "Reverse known, R<sub>R</sub>",
            "All known, R<sub>DW</sub>",
        ],
        board.rows,
        lambda row: [_md_cell(row, key) for key in _ACCURACIES],
    )
    text += ["## Where the robustness comes from", ""]
    text += _md_table(
        [
            "Undefended, R<sub>0</sub>",
            "Purification, P",
            "Stochasticity, S",
            "Share of S, %",
            "S, forward noise",
            "S, reverse noise",
        ],
        board.rows,
        lambda row: [_md_cell(row, key) for key in _PARTS],
    )
    text += ["## Checks and cost", ""]
    text += _md_table(
        [
            "Known-draw images on fresh draws",
            _whitebox(board),
            "Null attack, eps = 0",
            "Network calls",
            "Draws hidden / known",
        ],
        board.rows,
        lambda row: [
            *(_md_cell(row, key) for key in _CHECKS),
            str(row.calls),
            f"{row.hidden_draws or '-'} / {row.known_draws or '-'}",
        ],
    )
    flagged = [
        f"- **{_md(row.defense)}**: {_md(flag)}." for row in board.rows for flag in row.flags
    ]
    if flagged:
        text += ["## Flags", "", *flagged, ""]
    text += ["## What it means", "", f"{_BOUNDS} {_md(_protocol(board))}", ""]
    text += [f"- {line}" for line in _meanings(board)]
    text += ["", f"{_BOOTSTRAP} {_BLANK}"]
    if any(row.served_by for row in board.rows):
        text += ["", _SAME]
    text += [
        "",
        f"Every number follows from the files under `results/{board.track}/`; "
        f"`{board.track}-settings.csv` names them, with their sha256.",
    ]
    return "\n".join(text) + "\n"


def to_latex(board: Leaderboard) -> str:
    """For a paper: three booktabs tables in one float, and a note."""
    text = [
        "% Written by dbp-bench report. Needs \\usepackage{booktabs}.",
        r"\begin{table*}[t]",
        r"\centering",
        r"\small",
        r"\setlength{\tabcolsep}{4pt}",
        rf"\caption{{{_tex(board.title)}. Accuracy by what the attacker knows, where "
        rf"the robustness comes from, and checks, in percent with {100 * LEVEL:.0f}\,\% intervals."
        + (r" A demonstration: never compare with CIFAR-10." if board.demonstration else "")
        + "}",
        rf"\label{{tab:{re.sub('[^A-Za-z0-9-]', '-', board.track)}}}",
    ]
    tables: list[tuple[list[str], Sequence[str]]] = [
        (
            [
                "Clean",
                f"Hidden $R_{{WB}}${_tex(_eot(board))}",
                "Forward known $R_F$",
                "Reverse known $R_R$",
                "All known $R_{DW}$",
            ],
            _ACCURACIES,
        ),
        (
            [
                "Undefended $R_0$",
                "Purification $P$",
                "Stochasticity $S$",
                r"Share of $S$ (\%)",
                "$S$, forward",
                "$S$, reverse",
            ],
            _PARTS,
        ),
        (["On fresh draws", _tex(_whitebox(board)), "Null attack"], _CHECKS),
    ]
    for headings, keys in tables:
        text += [*_tex_table(headings, board.rows, keys), r"\par\medskip"]
    notes = [_BOUNDS, _protocol(board), *_meanings(board), _BOOTSTRAP, _BLANK]
    if any(row.served_by for row in board.rows):
        notes.append(_SAME)
    notes += [f"{row.defense}: {flag}." for row in board.rows for flag in row.flags]
    text += [r"\begin{minipage}{\textwidth}\footnotesize"]
    text += [_tex(note) for note in notes]
    text += [r"\end{minipage}", r"\end{table*}"]
    return "\n".join(text) + "\n"


def _md_table(
    columns: Sequence[str], rows: Sequence[Row], cells: Callable[[Row], Sequence[str]]
) -> list[str]:
    lines = [
        ["", "Defense", *columns],
        ["--:", ":--", *("--:" for _ in columns)],
        *([_text(row.rank), _md_name(row), *cells(row)] for row in rows),
    ]
    return [f"| {' | '.join(line)} |" for line in lines] + [""]


def _md_name(row: Row) -> str:
    return f"{_md(row.defense)} *(control)*" if row.kind == "control" else _md(row.defense)


def _md_cell(row: Row, key: str) -> str:
    estimate = row.estimates[key]
    if estimate is None:
        return ""
    return estimate.percent() + (" =" if key in row.served_by else "")


def _tex_table(columns: Sequence[str], rows: Sequence[Row], keys: Sequence[str]) -> list[str]:
    lines = [
        rf"\begin{{tabular}}{{rl{'r' * len(columns)}}}",
        r"\toprule",
        " & ".join(["", "Defense", *(_tex_heading(column) for column in columns)]) + r" \\",
        r"\midrule",
    ]
    for i, row in enumerate(rows):
        if i and row.kind == "control" != rows[i - 1].kind:
            lines.append(r"\midrule")
        cells = [_text(row.rank), _tex(row.defense), *(_tex_cell(row, key) for key in keys)]
        lines.append(" & ".join(cells) + r" \\")
    return [*lines, r"\bottomrule", r"\end{tabular}"]


def _tex_heading(column: str) -> str:
    """On two lines, so that a column is as wide as its numbers."""
    words = column.split(" ")
    if len(words) == 1:
        return column
    half = len(words) // 2
    lines = rf"{' '.join(words[:half])} \\ {' '.join(words[half:])}"
    return rf"\begin{{tabular}}[b]{{@{{}}r@{{}}}}{lines}\end{{tabular}}"


def _tex_cell(row: Row, key: str) -> str:
    estimate = row.estimates[key]
    if estimate is None:
        return ""
    value, interval = estimate.percent().replace("-", "$-$").split(" ", 1)
    same = "{}={}" if key in row.served_by else ""
    return rf"{value}{same} {{\scriptsize {interval}}}"


def _ranking(board: Leaderboard) -> str:
    which = "hidden" if board.sort == "hidden" else "known"
    return f"Ranked by the accuracy with all draws {which}; controls stand last, without a rank."


def _protocol(board: Leaderboard) -> str:
    """How everything was measured, in a sentence or two."""
    effort = board.effort or {}
    words = {"steps": "{} steps", "step_size": "step size {} eps", "eot": "EoT-{}"}
    search = [words.get(key, f"{key} {{}}").format(value) for key, value in effort.items()]
    noisy = [row for row in board.rows if any(pool.sites for pool in row.pools)]
    hidden = _listed({row.hidden_draws for row in noisy if row.hidden_draws is not None})
    known = _listed({row.known_draws for row in noisy if row.known_draws is not None})
    fresh = _listed({row.fresh_draws for row in noisy if row.fresh_draws is not None})
    text = f"Protocol: {', '.join([board.attack, *search])}; {board.norm}, eps = {_eps(board.eps)}"
    if board.entry and (board.entry.norm, board.entry.eps) != (board.norm, board.eps):
        text += f" (not the track's own {board.entry.norm}, {_eps(board.entry.eps)})"
    text += f"; {board.images} images."
    if hidden:
        text += (
            f" With all draws hidden, images are judged on {hidden} draws no attacker was shown."
        )
    if known:
        text += f" Known draws: {known}, each attacked anew and judged on the draw that was shown"
        text += f"; its images also on {fresh} fresh draws." if fresh else "."
    return text


def _meanings(board: Leaderboard) -> list[str]:
    """What each column is."""
    lines = [
        "Hidden, R_WB: the attacker knows the defense, but no draw of it; known columns: it is "
        "shown the forward noise, the reverse noise, or all noise (DW-box) of the draw that "
        "judges, at equal effort. Reverse stands for all noise but the forward noise. EoT, the "
        "gradient draws averaged in each step, is over hidden draws; with all draws known it is "
        "idle.",
        f"R_0: the classifier without a defense ({UNDEFENDED!r}). P = R_DW - R_0 is what "
        "purification gives by itself, S = R_WB - R_DW is what hiding the draws adds, and its "
        "share is S / (R_WB - R_0).",
        "S splits into parts by the Shapley value over forward and reverse noise: "
        "((R_WB - R_F) + (R_R - R_DW)) / 2 and ((R_WB - R_R) + (R_F - R_DW)) / 2. "
        "They add up to S, but for rounding.",
        "On fresh draws: images made against known draws, judged on draws that no attacker was "
        "shown.",
        "Null attack: eps = 0, which must give clean accuracy.",
        "Network calls: calls of the denoising networks in one purification.",
    ]
    if board.whitebox_eot is not None:
        lines.insert(1, f"{_whitebox(board)}: the hidden setting with that EoT instead.")
    return lines


def _eot(board: Leaderboard) -> str:
    eot = (board.effort or {}).get("eot")
    return "" if eot is None else f", EoT-{eot}"


def _whitebox(board: Leaderboard) -> str:
    if board.whitebox_eot is None:
        return "White-box"
    return f"White-box, EoT-{board.whitebox_eot}"


def _fractions(estimate: Estimate | None) -> list[object]:
    if estimate is None:
        return [None, None, None]
    return [round(x, 6) + 0.0 for x in (estimate.value, estimate.low, estimate.high)]


def _eps(eps: float) -> str:
    """As a decimal where it is one, else as a fraction of 255."""
    if float(f"{eps:.6g}") == eps:
        return f"{eps:.6g}"
    levels = round(eps * 255)
    return f"{levels}/255" if abs(eps * 255 - levels) < 1e-6 else f"{eps:.6g}"


def _csv(header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(lines)
    return file.getvalue()


def _json(effort: Effort | None) -> str:
    return "" if effort is None else json.dumps(effort)


def _joined(values: Iterable[object]) -> str:
    """The different values, in order; blank for null."""
    return " ".join(dict.fromkeys(str(value) for value in values if value is not None))


def _listed(values: Iterable[int | None]) -> str:
    return " or ".join(str(value) for value in sorted(v for v in values if v is not None))


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _md(text: str) -> str:
    """Plain text, as Markdown that shows it as it is."""
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", " ".join(text.split()))


_TEX: Final = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def _tex(text: str) -> str:
    """Plain text, as LaTeX that prints it as it is."""
    return "".join(_TEX.get(character, character) for character in " ".join(text.split()))
