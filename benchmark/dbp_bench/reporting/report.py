"""Writes what the results say: leaderboards, and the outcomes as one table."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dbp_bench.entries.registry import Registry
from dbp_bench.errors import BadResult
from dbp_bench.reporting.attacktable import (
    attacks_to_csv,
    attacks_to_markdown,
    packages_to_csv,
    sweeps_to_csv,
)
from dbp_bench.reporting.findings import load_findings
from dbp_bench.reporting.leaderboard import Leaderboard, Sort, leaderboard
from dbp_bench.reporting.page import Material, load_samples, to_html
from dbp_bench.reporting.pool import Pool
from dbp_bench.reporting.records import Record, load
from dbp_bench.reporting.statistics import Bootstrap, Estimate
from dbp_bench.reporting.tables import draws_to_csv, settings_to_csv, to_csv, to_latex, to_markdown
from dbp_bench.result import Result, write_atomically


@dataclass(frozen=True)
class Accuracies:
    """Of one result, each with its interval; `fresh` is null where no draw was known."""

    clean: Estimate
    robust: Estimate
    fresh: Estimate | None


def accuracies(result: Result) -> Accuracies:
    """Clean, robust and fresh-draw accuracy of one result."""
    bootstrap = Bootstrap(len(result.ids))
    pool = Pool([Record(Path(), "", "", result)])
    fresh = pool.fresh(bootstrap)
    return Accuracies(
        clean=bootstrap.estimate(pool.clean(bootstrap)),
        robust=bootstrap.estimate(pool.robust(bootstrap)),
        fresh=None if fresh is None else bootstrap.estimate(fresh),
    )


def write_leaderboards(
    results: Path,
    out: Path,
    track: str | None = None,
    *,
    sort: Sort = "hidden",
    registry: Registry | None = None,
) -> list[Path]:
    """Write ``<track>.csv``, ``.md``, ``.tex``, ``.html`` and more by track.

    That is also ``<track>-draws.csv`` and ``<track>-settings.csv``.

    Where there are results of attacks other than the leaderboard's own, also
    ``<track>-attacks.csv`` and ``.md``; of packages' attacks, ``<track>-packages.csv``; findings of
    sweeps, ``<track>-sweeps.csv`` and ``<track>-attacks.md``.

    Nothing is written if any of the results is refused.

    Args:
        results: The folder that `run` writes to.
        out: Folder of the leaderboards.
        track: Only this one.
        sort: The accuracy that ranks: with all draws hidden, or with all of them known.
        registry: Where titles and kinds come from; the package's own entries if not given.

    Raises:
        BadResult: There are no results, or one of them or of the findings can't be read.
        NotComparable: Two of them may not stand in one table.
    """
    records = load(results, track)
    tracks = sorted({record.result.track for record in records})
    findings = load_findings(results, tracks)
    boards = [
        leaderboard(
            [record for record in records if record.result.track == name],
            registry,
            sort,
            [each for each in findings if each.track == name],
        )
        for name in tracks
    ]
    files = {
        out / f"{board.track}.html": to_html(
            board,
            Material(load_samples(r for r in records if r.result.track == board.track)),
            registry,
        )
        for board in boards
    } | {
        out / f"{board.track}{suffix}": render(board)
        for board in boards
        for suffix, render in _tables(board)
    }
    for path, content in files.items():
        write_atomically(path, content)
    return list(files)


def _tables(board: Leaderboard) -> list[tuple[str, Callable[[Leaderboard], str]]]:
    """How the names of a track's files end, and what makes them."""
    tables: list[tuple[str, Callable[[Leaderboard], str]]] = [
        (".csv", to_csv),
        (".md", to_markdown),
        (".tex", to_latex),
        ("-draws.csv", draws_to_csv),
        ("-settings.csv", settings_to_csv),
    ]
    if board.duels:
        tables.append(("-packages.csv", packages_to_csv))
    if board.sweeps:
        tables.append(("-sweeps.csv", sweeps_to_csv))
    if board.attacks:
        tables.append(("-attacks.csv", attacks_to_csv))
    if board.attacks or board.duels or board.sweeps:
        tables.append(("-attacks.md", attacks_to_markdown))
    return tables


def outcomes_csv(results: Sequence[Path], out: Path) -> None:
    """Write the outcomes in the files `results` as one table, a line per image and draw.

    `clean` and `robust` are 1 where the defense is right; `fresh` is the mean over fresh draws,
    blank where no draw was known.

    Raises:
        BadResult: A file isn't a result.
    """
    import pandas as pd

    tables = []
    for path in results:
        result = Result.read(path)
        draws = len(result.draws)
        fresh = (
            [None] * (draws * len(result.ids))
            if result.fresh is None
            else [sum(d) / len(d) if d else None for image in result.fresh for d in image]
        )
        tables.append(
            pd.DataFrame(
                {
                    "track": result.track,
                    "defense": result.defense,
                    "threat": result.threat,
                    "seed": result.seed,
                    "image": [i for i in result.ids for _ in range(draws)],
                    "label": [label for label in result.labels for _ in range(draws)],
                    "draw": result.draws * len(result.ids),
                    "clean": [int(right) for image in result.clean for right in image],
                    "robust": [int(right) for image in result.robust for right in image],
                    "fresh": pd.array(fresh, dtype="Float64"),
                }
            )
        )
    if not tables:
        raise BadResult("no result files given. `dbp-bench run` makes some.")
    table = pd.concat(tables, ignore_index=True)
    write_atomically(out, table.to_csv(index=False, float_format="%.6g", lineterminator="\n"))
