"""A track's numbers as tables: CSV for programs, Markdown and LaTeX for readers."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

import pandas as pd

from dbp_bench.entries.defense import BASE, OWN_CLASSIFIER
from dbp_bench.reporting import certified
from dbp_bench.reporting.badge import BADGES
from dbp_bench.reporting.columns import CELLS, DETAILS, HEADLINE, NULL, SECTIONS
from dbp_bench.reporting.effort import BUDGET, FALL, FALL_END, Convergence
from dbp_bench.reporting.frames import (
    Shared,
    Signed,
    cell,
    frame_of,
    named,
    to_csv,
    to_latex,
    to_markdown,
)
from dbp_bench.reporting.leaderboard import Leaderboard, Row
from dbp_bench.reporting.pool import Pool, search_in_words
from dbp_bench.reporting.ranking import ALPHA
from dbp_bench.reporting.rendering import listed, md, note, shown_eps, tex
from dbp_bench.reporting.sanity import COSINE, ERROR, EXACT, Check
from dbp_bench.reporting.statistics import LEVEL, Estimate
from dbp_bench.reporting.votes import FEW, METRICS, Tally

_COST: Final = {"nfe": "NFE", "draws": "Draws hidden / known"}
"""The headings of what a table shows of each defense beside its columns."""
_IMAGES: Final = {"clean": "clean", "hidden": "attacked, draws hidden", NULL: "null attack"}


# --- Frames


def csv_tables(board: Leaderboard) -> Mapping[str, str]:
    """The CSV files of a leaderboard, by the ends of their names."""
    converged = convergence_frame(board)
    extra = {} if converged.empty else {"-convergence.csv": to_csv(of_track(converged, board))}
    return {
        ".csv": to_csv(of_track(rows_frame(board), board)),
        "-draws.csv": to_csv(of_track(draws_frame(board).drop(columns="rank"), board)),
        **extra,
        "-results.csv": to_csv(
            # The norm of each, in the place of the leaderboard's.
            of_track(results_frame(board), board).assign(norm=[p.any.norm for p, _ in board.pools])
        ),
    }


def of_track(frame: pd.DataFrame, board: Leaderboard) -> pd.DataFrame:
    """The `frame` with the track, the budget and the number of images in every row."""
    facts: dict[str, Any] = {
        "track": board.track,
        "norm": board.norm,
        "eps": board.eps,
        "images": board.images,
    }
    return frame.assign(**{key: value for key, value in facts.items() if key not in frame})


def rows_frame(board: Leaderboard) -> pd.DataFrame:
    """The leaderboard's numbers, one row per defense; accuracies are estimates."""
    search = board.reference
    return frame_of(
        {
            "rank": None if row.rank is None else str(row.rank),
            "defense": row.defense,
            "kind": row.kind,
            "seeds": _joined(row.pools[0].seeds),
            **{
                (key := column.key): cell(
                    row.estimates[key], Shared if key in row.served_by else Estimate
                )
                for column in board.columns
            },
            "checks": row.checked,
            "attack": search.label if search else None,
            "effort": json.dumps(search.effort | ({BUDGET: row.budget} if row.budget else {}))
            if search
            else None,
            "gradient": search.gradient if search else None,
            "hidden_draws": row.hidden_draws,
            "known_draws": row.known_draws,
            "fresh_draws": row.fresh_draws,
            "nfe": row.nfe,
            "served_by": _joined(f"{key}={threat}" for key, threat in row.served_by.items()),
            "flags": "; ".join(row.flags) or None,
            "tests": "; ".join(map(_said, row.checks)),
            "badge": row.badge,
            "results": _joined(record.name for pool in row.pools for record in pool.records),
        }
        for row in board.rows
    )


def results_frame(board: Leaderboard) -> pd.DataFrame:
    """All results, one row per defense, threat model and attack, with the files they are from."""
    return frame_of(_result(pool, kind) for pool, kind in board.pools)


def _result(pool: Pool, kind: str) -> dict[str, object]:
    results = [record.result for record in pool.records]
    tally = pool.tally("adversarial")
    # Where draws are known each has images of its own, on which no vote is taken.
    found = {**tally.estimates, **({"plurality": None} if pool.knows else {})}
    return {
        "defense": pool.any.defense,
        "kind": kind,
        **setting_of(pool),
        "knows": pool.knowledge,
        "sites": _joined(pool.any.sites),
        "eps": pool.any.eps,
        "seeds": _joined(pool.seeds),
        "draws": pool.draws,
        "fresh_draws": pool.fresh_draws,
        "robust": pool.robust.estimate,
        "clean": cell(pool.clean.estimate),
        "fresh": cell(pool.fresh.estimate if pool.fresh else None),
        "plurality_of": None if pool.knows else tally.votes,
        "worst_all_of": tally.draws,
        **{key: cell(found[key]) for key in METRICS[1:]},
        **how(pool),
        "overrides": _joined(pool.any.overrides),
        "zero_gradients": pool.zero_gradients(),
        "commit": _joined(result.provenance.commit for result in results),
        "dirty": _joined(result.provenance.dirty for result in results),
        "results": _joined(record.name for record in pool.records),
        "sha256": _joined(record.sha256 for record in pool.records),
        "digest": _joined(result.digest for result in results),
    }


def setting_of(pool: Pool) -> dict[str, object]:
    """The threat model and the attack, as cells."""
    return {"threat": pool.any.threat, "attack": pool.any.label}


def how(pool: Pool) -> dict[str, object]:
    """The effort and gradient of an attack, its evaluations per image and its NFE, as cells."""
    counts = {
        "gradient_evaluations": pool.gradient_evaluations,
        "forward_evaluations": pool.forward_evaluations,
        "evaluations": pool.evaluations,
    }
    return {
        "effort": json.dumps(pool.any.effort),
        "gradient": pool.any.gradient,
        **{key: None if count is None else round(count, 6) for key, count in counts.items()},
        "nfe": pool.any.evaluations.nfe,
        "searched_nfe": pool.any.evaluations.searched_nfe,
    }


def draws_frame(board: Leaderboard) -> pd.DataFrame:
    """One row per defense and kind of images: clean, attacked with all draws hidden, null attack.

    A row has the accuracies of one draw, of votes over draws, and of the worst of several.
    """
    return frame_of(
        {
            "rank": None if row.rank is None else str(row.rank),
            "defense": row.defense,
            "kind": row.kind,
            "images_of": key,
            **setting_of(
                row.columns.get("hidden" if key == "clean" else key, row.columns["clean"])
            ),
            "eps": board.eps if key == "hidden" else 0.0,
            "draws": tally.draws,
            "plurality_of": tally.votes,
            "worst_all_of": tally.draws,
            **{metric: cell(tally.estimates[metric]) for metric in METRICS},
        }
        for row in board.rows
        for key, (pool, tally) in row.tallies.items()
    )


def convergence_frame(board: Leaderboard) -> pd.DataFrame:
    """One row per defense and result at equal effort, beside one with twice the budget.

    The accuracies are those on the images and draws that both have, and `difference` is that at
    twice the budget minus that at the budget, paired by image.
    """
    return frame_of(_converged(row, each) for row in board.rows for each in row.convergence)


def _converged(row: Row, each: Convergence) -> dict[str, object]:
    at, twice = each.accuracies or (None, None)
    return {
        "defense": row.defense,
        "kind": row.kind,
        "column": each.column,
        **setting_of(each.own),
        "knows": each.own.knowledge,
        "budget": each.own.any.effort.get(BUDGET),
        "images": each.images,
        "robust": cell(at.estimate if at else None),
        "twice": cell(twice.estimate if twice else None),
        "difference": cell(each.difference, Signed),
        **{
            f"{side}{key}": None if count is None else round(count, 6)
            for side, pool in (("", each.own), ("twice_", each.twice))
            for key, count in (
                ("gradient_evaluations", pool.gradient_evaluations if pool else None),
                ("forward_evaluations", pool.forward_evaluations if pool else None),
            )
        },
        "verdict": each.verdict,
        "results": _joined(
            record.name for pool in (each.own, each.twice) if pool for record in pool.records
        ),
    }


def _joined(values: Iterable[object]) -> str | None:
    """The different values, in order; None where there is none."""
    texts = dict.fromkeys(str(value) for value in values if value is not None)
    return " ".join(texts) or None


def _said(check: Check) -> str:
    """The name of a check, its outcome and the attacks that it tested."""
    where = f" ({', '.join(check.tested)})" if check.tested else ""
    return f"{check.name}: {check.outcome}{where}"


# --- Tables for readers


def sections(board: Leaderboard) -> dict[str, pd.DataFrame]:
    """The tables of a leaderboard by title, with the headings that readers see."""
    frame = rows_frame(board)
    frame["draws"] = [f"{row.hidden_draws or '-'} / {row.known_draws or '-'}" for row in board.rows]
    beside = {HEADLINE: {"checks": "Checks"}, DETAILS: _COST}
    shown = {}
    for section in SECTIONS:
        titles = {c.key: c.heading for c in board.columns if c.section == section}
        titles = {**_NAMES, **titles, **beside[section]}
        shown[section] = frame[list(titles)].rename(columns=titles)
    if any(row.convergence for row in board.rows):
        shown[CONVERGENCE] = convergence_table(board)
    return {**shown, "One draw, votes and worst cases": draws_table(board)}


CONVERGENCE: Final = "Does the attack converge?"
"""The title of the table of results beside those with twice the budget."""


def convergence_table(board: Leaderboard) -> pd.DataFrame:
    """The differences of :func:`convergence_frame`, with the headings that readers see."""
    frame = convergence_frame(board)
    frame["rank"] = [
        None if r.rank is None else str(r.rank) for r in board.rows for _ in r.convergence
    ]
    frame["column"] = frame["column"].map(CELLS)
    frame["used"] = [_used(each) for row in board.rows for each in row.convergence]
    return frame[list(_CONVERGENCE)].rename(columns=_CONVERGENCE)


def convergence_note() -> str:
    """The sentences under the table of convergence."""
    return note("convergence", fall=f"{100 * FALL:g}", end=f"{100 * FALL_END:g}")


def _used(each: Convergence) -> str:
    """The evaluations that both searches used on average, gradient and forward together."""
    counts = [pool.evaluations for pool in (each.own, each.twice) if pool]
    return " / ".join("not recorded" if count is None else f"{count:.0f}" for count in counts)


def draws_table(board: Leaderboard) -> pd.DataFrame:
    """The accuracies of :func:`draws_frame`, with the headings that readers see."""
    frame = draws_frame(board)
    frame["images_of"] = frame["images_of"].map(_IMAGES)
    frame["draws"] = [_many(each) for row in board.rows for _, each in row.tallies.values()]
    return frame[list(_DRAWS)].rename(columns=_DRAWS)


_NAMES: Final = {"rank": "", "defense": "Defense"}
_DRAWS: Final = {
    **_NAMES,
    "images_of": "Images",
    "draws": "Draws M",
    **{"mean": "One draw", "plurality": "Plurality of k"},
    **{f"worst_{FEW}": f"Worst of {FEW}", "worst_all": "Worst of M"},
}
"""The headings of the table of draws, by column; its metrics are those of METRICS."""
_CONVERGENCE: Final = {
    **_NAMES,
    **{"column": "Cell", "budget": "Budget", "images": "Images", "robust": "At the budget"},
    **{"twice": "At twice the budget", "difference": "Difference", "used": "Evaluations used"},
    "verdict": "Verdict",
}
"""The headings of the table of convergence, by column."""


def _many(found: Tally) -> str:
    """The number of draws, and that of a vote's draws, k, where it is another number."""
    if found.draws is None:
        return "any"
    return f"{found.draws}" + (f", k = {found.votes}" if found.votes != found.draws else "")


def leaderboard_markdown(board: Leaderboard) -> str:
    """The leaderboard in Markdown: its tables, and their meaning."""
    text = [f"# {md(board.title)}", ""]
    if board.demonstration:
        text += [f"> **A demonstration.** {note('demonstration')}", ""]
    if board.entry and board.entry.note.strip():
        text += [md(board.entry.note), ""]
    text += [f"Accuracies in percent, with {100 * LEVEL:.0f} % intervals. {ranking(board)}", ""]
    if board.reference is None:
        text += [f"**{md(unmeasured(board))}**", ""]
    kinds = {row.defense: row.kind for row in board.rows}
    for title, frame in sections(board).items():
        names = [named(name, kinds[name]) for name in frame["Defense"]]
        frame["Defense"] = pd.Series(names, dtype=object)
        text += [f"## {title}", "", *to_markdown(frame, stacked=title == HEADLINE)]
        if title == HEADLINE:
            text += [_in_short(board), ""]
        if title == CONVERGENCE:
            text += [convergence_note(), ""]
    text += certified.markdown(board.certificates, board.attacked)
    flagged = [f"- **{md(row.defense)}**: {md(flag)}." for row in board.rows for flag in row.flags]
    if flagged:
        text += ["## What the checks found", "", *flagged, ""]
    text += ["## What is checked", "", checked(), ""]
    text += ["## Verified by others", "", *(f"- {line}" for line in _badges(board)), ""]
    text += ["## What it means", "", f"{note('bounds')} {md(_measured(board))}", ""]
    text += [
        *(f"- {line}" for line in _meanings(board)),
        "",
        f"{note('bootstrap')} {note('blank')}",
    ]
    text += [
        "",
        (
            f"Every number follows from the files under `results/{board.track}/`; "
            f"`{board.track}-results.csv` names them, with their sha256."
        ),
    ]
    return "\n".join(text) + "\n"


def checked() -> str:
    """The sentences that tell what each check tests."""
    return note(
        "tested",
        error=f"{ERROR:g}",
        exact=f"{EXACT:g}",
        cosine=f"{COSINE:g}",
        fall=f"{100 * FALL:g}",
        end=f"{100 * FALL_END:g}",
    )


def _in_short(board: Leaderboard) -> str:
    """A few words under the first table, for a reader who sees no other."""
    said = note("headline")
    return f"{said} {note('same')}" if any(row.served_by for row in board.rows) else said


def _badges(board: Leaderboard) -> list[str]:
    """The defenses that have each badge, the strongest verification first."""
    names = {badge: [md(r.defense) for r in board.rows if r.badge == badge] for badge in BADGES}
    return [f"{badge}: {', '.join(names[badge])}." for badge in reversed(BADGES) if names[badge]]


def leaderboard_latex(board: Leaderboard) -> str:
    """The leaderboard in LaTeX, for a paper: its tables in one float, and a note."""
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
    kinds = {row.defense: row.kind for row in board.rows}
    for title, frame in sections(board).items():
        names = frame["Defense"]
        repeats = names.duplicated()
        changed = (names != names.shift()) & (names.map(kinds.get) != names.map(kinds.get).shift())
        begins = ~repeats if repeats.any() else changed
        frame.loc[repeats, ["", "Defense"]] = ""
        rules = [i for i, begin in enumerate(begins) if begin and i]
        text += to_latex(frame, rules, stacked=title == HEADLINE)
        text += [r"\par\medskip"]
    notes = [note("bounds"), _measured(board), *_meanings(board), note("bootstrap"), note("blank")]
    if any(row.served_by for row in board.rows):
        notes.append(note("same"))
    notes += [f"{row.defense}: {flag}." for row in board.rows for flag in row.flags]
    text += [r"\begin{minipage}{\textwidth}\footnotesize"]
    text += [tex(note) for note in notes]
    text += [r"\end{minipage}", r"\end{table*}"]
    text += certified.latex(board.certificates, board.attacked)
    return "\n".join(text) + "\n"


def ranking(board: Leaderboard) -> str:
    """The rule that ranks the defenses, in a few sentences."""
    which = "hidden" if board.sort == "hidden" else "known"
    return note("ranking", which=which, alpha=f"{100 * ALPHA:.0f}")


def protocol(board: Leaderboard) -> str:
    """The attack at equal effort, the budget and the images, in a few words."""
    search = [search_in_words(board.reference)] if board.reference else []
    if search:
        search[0] += raised(board)
    budget = f"{board.norm}, eps = {shown_eps(board.eps)}"
    if board.entry and (board.entry.norm, board.entry.eps) != (board.norm, board.eps):
        budget += f" (not the track's own {board.entry.norm}, {shown_eps(board.entry.eps)})"
    return "; ".join([*search, budget, f"{board.images} images"])


def raised(board: Leaderboard) -> str:
    """The budgets of rows that are raised, in brackets; empty where none is."""
    budgets = listed(row.budget for row in board.rows)
    return f" (in rows that are raised, a budget of {budgets})" if budgets else ""


def unmeasured(board: Leaderboard) -> str:
    """The sentence where no result is of the protocol's own attack."""
    protocol = board.protocol
    own = " or ".join(sorted({protocol.attacks[each] for each in protocol.equal}))
    others = sorted({pool.any.label for pool, _ in board.pools if pool.any.eps > 0})
    return (
        f"The protocol's attack, {own}, was not run on this track. What was run instead "
        f"({', '.join(others) or 'nothing'}) stands among the other attacks."
    )


def _measured(board: Leaderboard) -> str:
    """The protocol and the numbers of draws, in a sentence or two."""
    noisy = [row for row in board.rows if any(pool.sites for pool in row.pools)]
    hidden = listed(row.hidden_draws for row in noisy)
    known = listed(row.known_draws for row in noisy)
    fresh = listed(row.fresh_draws for row in noisy)
    text = f"Protocol: {protocol(board)}."
    if hidden:
        text += (
            f" With all draws hidden, images are evaluated on {hidden} draws no attacker was shown."
        )
    if known:
        text += f" Known draws: {known}, each attacked anew and evaluated on the draw shown"
        text += f"; its images also on {fresh} fresh draws." if fresh else "."
    return text


def _meanings(board: Leaderboard) -> list[str]:
    """The meaning of each column, in sentences."""
    titles = {column.key: column.entry.title for column in board.protocol.extra}
    extra = [f"{c.heading}: {titles[c.key]}." for c in board.columns if c.key in titles]
    parts = note("parts", base=repr(BASE))
    own = any(OWN_CLASSIFIER in row.pools[0].any.provenance.weights for row in board.rows)
    more = [note("own_classifier")] if own else []
    return [note("hidden"), parts, *more, note("checks"), *extra, note("votes")]
