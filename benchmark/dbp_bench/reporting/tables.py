"""From a track's numbers to tables: CSV for programs, Markdown and LaTeX for readers."""

import re
from collections.abc import Callable, Sequence
from typing import Final

from dbp_bench.reporting.badge import BADGES
from dbp_bench.reporting.leaderboard import QUANTITIES, UNDEFENDED, Leaderboard, Row
from dbp_bench.reporting.pool import Pool
from dbp_bench.reporting.ranking import ALPHA
from dbp_bench.reporting.records import NULL, WHITEBOX
from dbp_bench.reporting.rendering import (
    BOOTSTRAP,
    fractions,
    in_words,
    joined,
    json_of,
    listed,
    md,
    md_lines,
    md_name,
    percent,
    shown_eps,
    tex,
    text_of,
    to_csv_text,
)
from dbp_bench.reporting.sanity import COSINE, ERROR, EXACT, Check
from dbp_bench.reporting.statistics import LEVEL, RESAMPLES, Estimate
from dbp_bench.reporting.votes import FEW, METRICS, Account

_ACCURACIES: Final = ("clean", "hidden", "forward_known", "reverse_known", "all_known")
_PARTS: Final = (
    "undefended",
    "purification",
    "stochasticity",
    "share",
    "stochasticity_forward",
    "stochasticity_reverse",
)
_LOOKED: Final = (
    "No flag says as much as what was looked at, which is named. Null attack: changes no metric. "
    "More knowledge: knowing all draws helps the attack. Zero gradients: no image stays right in "
    "some draw without having met a gradient that isn't zero. Gradient check: on two images, in "
    "float64, the exact gradient is that of "
    f"finite differences (to {ERROR:g}), and the one that the attack followed points its way "
    f"(cosine {EXACT:g} or more if it is called exact, {COSINE:g} if it is labelled an "
    "approximation). Black box: an attack without gradients does no better than the strongest "
    "along gradients that knows the same. More effort: more steps, restarts or draws per gradient "
    "(PGD and APGD) do no better than the leaderboard's own attack. Other attacks: nor does any "
    "other along gradients that knows the same, at whatever effort. Better: by a paired interval "
    "that excludes 0. Sweeps: what `dbp-bench sweep` found over steps, draws, eps, or with a black "
    "box. Each comparison may flag by chance: about one in forty does where there is nothing."
)
_CHECKS: Final = ("fresh", WHITEBOX, NULL)

_BOUNDS: Final = (
    "Every robust accuracy is an upper bound: it is what a finite attack left standing, and a "
    "stronger one may leave less. Stochasticity S is a difference of two upper bounds and no bound "
    "itself."
)
_BLANK: Final = (
    "Blank: not measured, or it needs something that was not measured, or a share of a difference "
    "that is not clearly above zero."
)
_SAME: Final = (
    "= : the same setting as another column, for this defense, measured once. (Without reverse "
    "noise, knowing the forward noise is knowing all; without any noise, all columns are one.)"
)

_DRAWS: Final = (
    "Votes and worst cases: M draws judge each image, the same ones for clean and adversarial "
    "images; any: no noise is drawn, and all are alike. Majority: more than half of k draws right, "
    "k the largest odd number up to M (a tie would be wrong). Outcomes store right and wrong only; "
    "a plurality vote over classes can be right more often, so that this is a lower bound of it. "
    "Worst of m: all of m draws right. Both are unbiased: of draws without replacement from the M, "
    "C(right, m) / C(M, m) for the worst case. Intervals of that table are from a two-level "
    f"bootstrap ({RESAMPLES} resamples): images are drawn anew, and for each of them its chance of "
    "being right, given its outcomes, and M outcomes with that chance. The null attack must give "
    "the clean numbers; a gap, paired by image and draw, is flagged where its interval is off zero."
)


def to_csv(board: Leaderboard) -> str:
    """One line per defense; accuracies are fractions."""
    header = ["rank", "defense", "kind", "track", "norm", "eps", "images", "seeds"]
    header += [f"{key}{end}" for key in QUANTITIES for end in ("", "_lo", "_hi")]
    header += ["attack", "effort", "whitebox_eot", "hidden_draws", "known_draws", "fresh_draws"]
    header += ["network_calls", "served_by", "flags", "checks", "badge", "results"]
    lines: list[list[object]] = []
    for row in board.rows:
        line: list[object] = [
            text_of(row.rank),
            row.defense,
            row.kind,
            board.track,
            board.norm,
            board.eps,
        ]
        line += [board.images, " ".join(map(str, row.pools[0].seeds))]
        for key in QUANTITIES:
            line += fractions(row.estimates[key])
        line += [board.attack, json_of(board.effort), board.whitebox_eot]
        line += [row.hidden_draws, row.known_draws, row.fresh_draws, row.calls]
        line += [" ".join(f"{key}={threat}" for key, threat in row.served_by.items())]
        line += ["; ".join(row.flags), "; ".join(_checked(row)), row.badge]
        line += [" ".join(record.name for pool in row.pools for record in pool.records)]
        lines.append(line)
    return to_csv_text(header, lines)


def _badges(board: Leaderboard) -> list[str]:
    """Which defenses have each badge, that of the closest look first."""
    found = []
    for badge in reversed(BADGES):
        names = [md(row.defense) for row in board.rows if row.badge == badge]
        if names:
            found.append(f"{badge}: {', '.join(names)}.")
    return found


def _checked(row: Row) -> list[str]:
    """What was looked for, where, and with what outcome."""
    return [
        f"{check.name}: "
        + (f"{_outcome(check)} ({', '.join(check.looked)})" if check.looked else "not looked for")
        for check in row.checks
    ]


def _outcome(check: Check) -> str:
    return "flagged" if check.flags else "no finding"


def settings_to_csv(board: Leaderboard) -> str:
    """One line per defense and threat model, with the files that it follows from."""
    header = ["defense", "kind", "threat", "knows", "sites", "track", "norm", "eps", "images"]
    header += ["seeds", "draws", "fresh_draws"]
    header += [f"{key}{end}" for key in ("robust", "clean", "fresh") for end in ("", "_lo", "_hi")]
    header += ["majority_of", "worst_all_of"]
    header += [f"{key}{end}" for key in METRICS[1:] for end in ("", "_lo", "_hi")]
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
            line += fractions(None if values is None else board.bootstrap.estimate(values))
        line += _votes(pool, board)
        line += [pool.attack, json_of(any_.effort), " ".join(any_.overrides)]
        line += [any_.network_calls.per_purification]
        line += [sum(result.network_calls.gradient for result in results)]
        line += [sum(result.network_calls.judging for result in results)]
        searched = all(result.zero_gradient is not None for result in results)
        line += [pool.zero_gradients() if searched else None]
        line += [joined(result.provenance.commit for result in results)]
        line += [joined(result.provenance.dirty for result in results)]
        line += [" ".join(record.name for record in pool.records)]
        line += [" ".join(record.sha256 for record in pool.records)]
        lines.append(line)
    return to_csv_text(header, lines)


def _votes(pool: Pool, board: Leaderboard) -> list[object]:
    """Votes and worst cases of adversarial images.

    Where draws are known each has images of its own, on which no vote is taken.
    """
    found = pool.account("robust", board.bootstrap)
    vote = not pool.knows
    line: list[object] = [found.votes if vote else None, found.draws]
    for key in METRICS[1:]:
        line += fractions(found.estimates[key] if vote or key != "majority" else None)
    return line


def draws_to_csv(board: Leaderboard) -> str:
    """One line per defense and kind of images: clean, attacked with all draws hidden, null attack.

    What one draw gives, what votes over draws, and the worst of several; accuracies are fractions.
    """
    header = ["defense", "kind", "images_of", "threat", "track", "norm", "eps", "images"]
    header += ["draws", "majority_of", "worst_all_of"]
    header += [f"{key}{end}" for key in METRICS for end in ("", "_lo", "_hi")]
    lines: list[list[object]] = []
    for row in board.rows:
        for key, (threat, found) in row.accounts.items():
            line: list[object] = [row.defense, row.kind, key, threat, board.track, board.norm]
            line += [board.eps if key == "hidden" else 0.0, board.images]
            line += [found.draws, found.votes, found.draws]
            for metric in METRICS:
                line += fractions(found.estimates[metric])
            lines.append(line)
    return to_csv_text(header, lines)


def to_markdown(board: Leaderboard) -> str:
    """For reading on a page: four tables, and what they mean."""
    text = [f"# {md(board.title)}", ""]
    if board.demonstration:
        text += [
            (
                "> **A demonstration.** These numbers show the method, on a small data set with "
                "small networks. Never compare them with CIFAR-10 or any other track."
            ),
            "",
        ]
    if board.entry and board.entry.note.strip():
        text += [md(board.entry.note), ""]
    text += [f"Accuracies in percent, with {100 * LEVEL:.0f} % intervals. {ranking(board)}", ""]
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
    text += ["## One draw, votes and worst cases", ""]
    lines = [
        ["", "Defense", "Images", "Draws M", *_draws_headings("{}")],
        ["--:", ":--", ":--", "--:", *("--:" for _ in METRICS)],
    ]
    for row in board.rows:
        for key, (_, found) in row.accounts.items():
            cells = [text_of(row.rank), md_name(row.defense, row.kind), _KINDS[key], _many(found)]
            lines.append([*cells, *(percent(found.estimates[metric]) for metric in METRICS)])
    text += [*md_lines(lines), ""]
    flagged = [f"- **{md(row.defense)}**: {md(flag)}." for row in board.rows for flag in row.flags]
    if flagged:
        text += ["## Flags", "", *flagged, ""]
    text += _looked(board)
    text += ["## Verified by others", "", *(f"- {line}" for line in _badges(board)), ""]
    text += ["## What it means", "", f"{_BOUNDS} {md(_protocol(board))}", ""]
    text += [f"- {line}" for line in _meanings(board)]
    text += [f"- {_DRAWS}", "", f"{BOOTSTRAP} {_BLANK}"]
    if any(row.served_by for row in board.rows):
        text += ["", _SAME]
    text += [
        "",
        (
            f"Every number follows from the files under `results/{board.track}/`; "
            f"`{board.track}-settings.csv` names them, with their sha256."
        ),
    ]
    return "\n".join(text) + "\n"


def _looked(board: Leaderboard) -> list[str]:
    """Which signs of weak attacks and masked gradients were looked for."""
    names = [check.name for check in board.rows[0].checks]
    lines = [
        ["Defense", *(name.capitalize() for name in names)],
        [":--", *(":--" for _ in names)],
    ]
    for row in board.rows:
        cells = [
            f"{'**flagged**' if check.flags else 'no finding'}: {_places(check)}"
            if check.looked
            else "not looked for"
            for check in row.checks
        ]
        lines.append([md_name(row.defense, row.kind), *cells])
    return [
        "## Looked for: weak attacks and masked gradients",
        "",
        *md_lines(lines),
        "",
        _LOOKED,
        "",
    ]


def _places(check: Check) -> str:
    """Where a sign was looked for: by name, or how many are in the CSV file by name."""
    names = check.looked
    return md(", ".join(names)) if len(names) <= _NAMED else f"{len(names)} attacks"


_NAMED: Final = 4
"""How many names a cell of a table holds."""


def to_latex(board: Leaderboard) -> str:
    """For a paper: four booktabs tables in one float, and a note."""
    text = [
        "% Written by dbp-bench report. Needs \\usepackage{booktabs}.",
        r"\begin{table*}[t]",
        r"\centering",
        r"\small",
        r"\setlength{\tabcolsep}{4pt}",
        rf"\caption{{{tex(board.title)}. Accuracy by what the attacker knows, where "
        rf"the robustness comes from, and checks, in percent with {100 * LEVEL:.0f}\,\% intervals."
        + (r" A demonstration: never compare with CIFAR-10." if board.demonstration else "")
        + "}",
        rf"\label{{tab:{re.sub('[^A-Za-z0-9-]', '-', board.track)}}}",
    ]
    tables: list[tuple[list[str], Sequence[str]]] = [
        (
            [
                "Clean",
                f"Hidden $R_{{WB}}${tex(_eot(board))}",
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
        (["On fresh draws", tex(_whitebox(board)), "Null attack"], _CHECKS),
    ]
    for headings, keys in tables:
        text += [*_tex_table(headings, board.rows, keys), r"\par\medskip"]
    text += [*_tex_draws(board), r"\par\medskip"]
    notes = [_BOUNDS, _protocol(board), *_meanings(board), _DRAWS, BOOTSTRAP, _BLANK]
    if any(row.served_by for row in board.rows):
        notes.append(_SAME)
    notes += [f"{row.defense}: {flag}." for row in board.rows for flag in row.flags]
    text += [r"\begin{minipage}{\textwidth}\footnotesize"]
    text += [tex(note) for note in notes]
    text += [r"\end{minipage}", r"\end{table*}"]
    return "\n".join(text) + "\n"


def _md_table(
    columns: Sequence[str], rows: Sequence[Row], cells: Callable[[Row], Sequence[str]]
) -> list[str]:
    lines = [
        ["", "Defense", *columns],
        ["--:", ":--", *("--:" for _ in columns)],
        *([text_of(row.rank), md_name(row.defense, row.kind), *cells(row)] for row in rows),
    ]
    return [*md_lines(lines), ""]


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
        cells = [text_of(row.rank), tex(row.defense), *(_tex_cell(row, key) for key in keys)]
        lines.append(" & ".join(cells) + r" \\")
    return [*lines, r"\bottomrule", r"\end{tabular}"]


_KINDS: Final = {"clean": "clean", "hidden": "attacked, draws hidden", NULL: "null attack"}


def _draws_headings(math: str) -> list[str]:
    k, m = math.format("k"), math.format("M")
    return ["One draw", f"Majority of {k}", f"Worst of {FEW}", f"Worst of {m}"]


def _many(found: Account) -> str:
    """How many draws, and of how many the vote is where that is another number."""
    if found.draws is None:
        return "any"
    return f"{found.draws}" + (f", k = {found.votes}" if found.votes != found.draws else "")


def _tex_draws(board: Leaderboard) -> list[str]:
    headings = ["Images", "Draws $M$", *_draws_headings("${}$")]
    lines = [
        rf"\begin{{tabular}}{{rll{'r' * (1 + len(METRICS))}}}",
        r"\toprule",
        " & ".join(["", "Defense", *headings]) + r" \\",
    ]
    for row in board.rows:
        lines.append(r"\midrule")
        for i, (key, (_, found)) in enumerate(row.accounts.items()):
            cells = ["", ""] if i else [text_of(row.rank), tex(row.defense)]
            cells += [tex(_KINDS[key]), tex(_many(found))]
            cells += [_tex_estimate(found.estimates[metric]) for metric in METRICS]
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
    return _tex_estimate(row.estimates[key], "{}={}" if key in row.served_by else "")


def _tex_estimate(estimate: Estimate | None, same: str = "") -> str:
    if estimate is None:
        return ""
    value, interval = estimate.percent().replace("-", "$-$").split(" ", 1)
    return rf"{value}{same} {{\scriptsize {interval}}}"


def ranking(board: Leaderboard) -> str:
    """How the ranks came about, in a few sentences."""
    which = "hidden" if board.sort == "hidden" else "known"
    return (
        f"Ranked by the accuracy with all draws {which}, with ties: two defenses differ only where "
        "a paired bootstrap over images of their difference says so, adjusted by Holm for all "
        f"pairs (at most {100 * ALPHA:.0f} % chance of any false order). A rank such as 2-4: one "
        "defense is shown to be better, and from there to place 4 nothing tells them apart. Not "
        "to be told apart isn't transitive. Controls stand last, without a rank."
    )


def _protocol(board: Leaderboard) -> str:
    """How everything was measured, in a sentence or two."""
    effort = board.effort or {}
    noisy = [row for row in board.rows if any(pool.sites for pool in row.pools)]
    hidden = listed({row.hidden_draws for row in noisy if row.hidden_draws is not None})
    known = listed({row.known_draws for row in noisy if row.known_draws is not None})
    fresh = listed({row.fresh_draws for row in noisy if row.fresh_draws is not None})
    search = ", ".join(filter(None, [board.attack, in_words(effort)]))
    text = f"Protocol: {search}; {board.norm}, eps = {shown_eps(board.eps)}"
    if board.entry and (board.entry.norm, board.entry.eps) != (board.norm, board.eps):
        text += f" (not the track's own {board.entry.norm}, {shown_eps(board.entry.eps)})"
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
        (
            "Hidden, R_WB: the attacker knows the defense, but no draw of it; known columns: it is "
            "shown the forward noise, the reverse noise, or all noise (DW-box) of the draw that "
            "judges, at equal effort. Reverse stands for all noise but the forward noise. EoT, "
            "the gradient draws averaged in each step, is over hidden draws; with all draws known "
            "it is idle."
        ),
        (
            f"R_0: the classifier without a defense ({UNDEFENDED!r}). P = R_DW - R_0 is what "
            "purification gives by itself, S = R_WB - R_DW is what hiding the draws adds, and its "
            "share is S / (R_WB - R_0)."
        ),
        (
            "S splits into parts by the Shapley value over forward and reverse noise: "
            "((R_WB - R_F) + (R_R - R_DW)) / 2 and ((R_WB - R_R) + (R_F - R_DW)) / 2. "
            "They add up to S, but for rounding."
        ),
        (
            "On fresh draws: images made against known draws, judged on draws that no attacker was "
            "shown."
        ),
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
