"""Writes reports of results: leaderboards, and the outcomes as one table."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from dbp_bench.entries.registry import Registry
from dbp_bench.errors import BadResult
from dbp_bench.reporting import certified
from dbp_bench.reporting.attacks import attack_files
from dbp_bench.reporting.baseline import (
    beside,
    certificates_beside,
    findings_beside,
    sweeps_beside,
)
from dbp_bench.reporting.certificates import load_certificates
from dbp_bench.reporting.findings import load_findings
from dbp_bench.reporting.frames import csv_name
from dbp_bench.reporting.leaderboard import Sort, leaderboard
from dbp_bench.reporting.page import load_samples, to_html
from dbp_bench.reporting.records import load, load_sweeps
from dbp_bench.reporting.rendering import md
from dbp_bench.reporting.tables import csv_tables, leaderboard_latex, leaderboard_markdown
from dbp_bench.result import NOT_RECORDED, Kind, Result, write_atomically
from dbp_bench.writing import write_together


def write_leaderboards(
    results: Path | Sequence[Path],
    out: Path,
    track: str | None = None,
    *,
    sort: Sort = "hidden",
    registry: Registry | None = None,
    baseline: Path | None = None,
) -> list[Path]:
    """Write ``<track>.csv``, ``.md``, ``.tex``, ``.html`` and more by track.

    Every track also gets ``<track>-draws.csv`` and ``<track>-results.csv``. Certificates add
    ``<track>-certificates.csv`` and its figure; a track of certificates alone gets no page. Results
    of attacks other than the leaderboard's own add ``<track>-attacks.csv`` and ``.md``; those of
    third-party attacks, ``<track>-third-party.csv``; findings of sweeps, ``<track>-sweeps.csv`` and
    ``<track>-attacks.md``.

    All are written together, and none if any of the results is refused.

    Args:
        results: The folder that `run` writes to, or several folders and result files.
        out: Folder of the leaderboards.
        track: The one track to write; all if None.
        sort: The accuracy that ranks: with all draws hidden, or with all of them known.
        registry: The source of the protocol, titles and kinds; the package's own entries if not
            given.
        baseline: A folder of results whose rows stand beside them, on the same tracks.

    Raises:
        BadResult: There are no results, or one of them or of the findings can't be read.
        NotComparable: Two of them may not stand in one table.
    """
    places = [results] if isinstance(results, Path) else list(results)
    certificates = load_certificates(places, track)
    records = load(places, track, needed=not certificates)
    tracks = sorted({record.result.track for record in records})
    findings = [each for place in places for each in load_findings(place, tracks)]
    sweeps = [each for place in places for each in load_sweeps(place, tracks)]
    if baseline is not None:
        records += beside(records, baseline)
        findings += findings_beside(findings, baseline, tracks)
        sweeps = sweeps_beside(sweeps, baseline, tracks)
        certificates = certificates_beside(certificates, baseline, tracks)
    files: dict[str, str | bytes] = {}
    for name in tracks:
        its_own = [record for record in records if record.result.track == name]
        swept = [each for each in findings if each.track == name]
        board = leaderboard(
            its_own,
            registry,
            sort,
            swept,
            [r for r in sweeps if r.result.track == name],
            [held for held in certificates if held.certificate.track == name],
        )
        page = to_html(board, load_samples(its_own), registry)
        contents = {
            ".html": page,
            **csv_tables(board),
            ".md": leaderboard_markdown(board),
            ".tex": leaderboard_latex(board),
            **attack_files(board),
            **certified.files(board.certificates, board.attacked),
        }
        files |= {f"{name}{end}": content for end, content in contents.items()}
    for name in sorted({held.certificate.track for held in certificates} - {*tracks}):
        own = [held for held in certificates if held.certificate.track == name]
        text = [f"# {md(name)}", "", *certified.markdown(own, {})]
        contents = {
            ".md": "\n".join(text),
            ".tex": "\n".join(certified.latex(own, {})) + "\n",
            **certified.files(own, {}),
        }
        files |= {f"{name}{end}": content for end, content in contents.items()}
    write_together(out, files)
    return [out / name for name in files]


def outcomes_csv(results: Sequence[Path], out: Path) -> None:
    """Write the outcomes in the files `results` as one table, a line per image and draw.

    `clean` and `adversarial` are the predicted classes, blank where they were not recorded;
    `clean_right` and `robust` are 1 where the defense is right; `fresh` is the mean over fresh
    draws, blank where no draw was known.

    Raises:
        BadResult: A file isn't a result.
    """
    if not results:
        raise BadResult("no result files given. `dbp-bench run` makes some.")
    table = pd.concat([_outcomes(Result.read(path)) for path in results], ignore_index=True)
    write_atomically(out, table.to_csv(index=False, float_format="%.6g", lineterminator="\n"))


def _outcomes(result: Result) -> pd.DataFrame:
    images, draws = len(result.ids), len(result.draws)
    columns: dict[str, object] = {
        "track": result.track,
        "defense": csv_name(result.defense),
        "threat": csv_name(result.threat),
        "attack": csv_name(result.label),
        "seed": result.seed,
        "image": np.repeat(result.ids, draws),
        "label": np.repeat(result.labels, draws),
        "draw": np.tile(result.draws, images),
    }
    kinds: tuple[tuple[Kind, str], ...] = (("clean", "clean_right"), ("adversarial", "robust"))
    for kind, name in kinds:
        classes = pd.Series(result.classes(kind).ravel(), dtype="Int64")
        columns[kind] = classes.mask(classes == NOT_RECORDED)
        columns[name] = result.right(kind).ravel().astype(int)
    fresh = None if not result.knows else result.right("fresh").mean(axis=2).ravel()
    columns["fresh"] = pd.array([None] * (images * draws) if fresh is None else fresh, "Float64")
    return pd.DataFrame(columns)
