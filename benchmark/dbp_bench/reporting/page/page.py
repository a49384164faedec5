"""The contents of a track's page, computed from its leaderboard; the template lays them out."""

import re
import shlex
from base64 import b64encode
from collections.abc import Iterable, Mapping
from functools import cache
from hashlib import sha256
from math import isnan
from pathlib import Path
from typing import Any, Final, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from dbp_bench.entries.registry import Registry
from dbp_bench.errors import BadResult
from dbp_bench.reporting import certified
from dbp_bench.reporting.certificates import certificates_frame
from dbp_bench.reporting.columns import SECTIONS, Column
from dbp_bench.reporting.frames import symbols
from dbp_bench.reporting.leaderboard import Leaderboard, Row
from dbp_bench.reporting.literature import published
from dbp_bench.reporting.page.charts import charts, swatch
from dbp_bench.reporting.plotting import dark_css, to_svg
from dbp_bench.reporting.pool import Pool, search_in_words
from dbp_bench.reporting.protocol import KNOWN
from dbp_bench.reporting.records import Record
from dbp_bench.reporting.rendering import note, shown_eps
from dbp_bench.reporting.samples import Samples, samples_path
from dbp_bench.reporting.statistics import LEVEL, Estimate
from dbp_bench.reporting.tables import (
    checked,
    convergence_note,
    convergence_table,
    draws_table,
    protocol,
    ranking,
    unmeasured,
)
from dbp_bench.result import Result

FOLDER: Final = Path(__file__).parent


class Cell(NamedTuple):
    """A number of a table."""

    value: str = ""
    interval: str = ""
    sort: str = ""
    """The value to sort by, a fraction with six digits; an empty one sorts last."""
    href: str = ""
    same: bool = False
    """True if the result of another, equivalent threat model serves this column."""


def to_html(
    board: Leaderboard,
    samples: Mapping[str, Samples] | None = None,
    registry: Registry | None = None,
) -> str:
    """The page of a track: one HTML text without external resources, every name in it escaped.

    Args:
        board: The leaderboard.
        samples: Pictures, by the name of their result.
        registry: The source of titles and papers; the package's own entries if not given.
    """
    certificates = certificates_frame(board.certificates, attacked=board.attacked)
    style, script = _text("style.css") + dark_css(), _text("script.js")
    return _template().render(
        board=board,
        page=_Page(board, samples or {}, registry or Registry()),
        policy=f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; "
        f"script-src '{_hash(script)}'",
        style=Markup(style),  # our own file
        script=Markup(script),
        protocol=protocol(board),
        ranking=_coded(ranking(board)),
        draws=draws_table(board),
        convergence=convergence_table(board) if any(r.convergence for r in board.rows) else None,
        convergence_note=_coded(convergence_note()),
        certified=certified.table(certificates) if board.certificates else None,
        certified_caption=certified.caption(certificates) if board.certificates else "",
        checked=_coded(checked()),
        unmeasured=None if board.reference else unmeasured(board),
        note=note,
        charts=charts(board),
        to_svg=to_svg,
        swatch=swatch,
        cell=cell,
        is_number=lambda each: isinstance(each, Estimate),
        level=f"{100 * LEVEL:.0f}",
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("template.html")


def load_samples(records: Iterable[Record]) -> dict[str, Samples]:
    """The pictures that lie beside the results, by the names of the results.

    Raises:
        BadResult: A file of pictures can't be read, or belongs to another result.
    """
    found = {}
    for record in records:
        path = samples_path(record.path)
        if not path.is_file():
            continue
        samples = Samples.read(path)
        if samples.result_sha256 != record.sha256:
            raise BadResult(
                f"{path}: the samples of another result than {record.path.name} is now; make them "
                f"again: dbp-bench verify {record.path} --pictures, or delete the file."
            )
        found[record.name] = samples
    return found


def command_of(record: Record, registry: Registry) -> str:
    """The command that computes a result again and compares outcomes, run beside ``results/``."""
    words = ["dbp-bench", "verify", f"results/{record.name}", "--again"]
    result = record.result
    outside = result.defense not in registry.defenses or result.track not in registry.tracks
    if outside or result.provenance.code:
        words += ["--entries", "FOLDER"]
    if result.provenance.code:
        words += ["--trust-code"]
    return shlex.join(words)


class _Page:
    """The values that the template needs and the leaderboard doesn't hold."""

    def __init__(
        self, board: Leaderboard, samples: Mapping[str, Samples], registry: Registry
    ) -> None:
        self.board, self.samples, self.registry = board, samples, registry
        self.published = published()
        self.records = [(record, pool) for pool, _ in board.pools for record in pool.records]
        unequal = {column.key for column in board.protocol.extra}  # among the other attacks
        self.sections = {
            section: [c for c in board.columns if c.section == section and c.key not in unequal]
            for section in SECTIONS
        }
        self.sites = sorted({site for row in board.rows for site in row.sites})
        # Links go by number, since the name of an entry may hold any character.
        self.results = {record.name: f"result-{i}" for i, (record, _) in enumerate(self.records, 1)}
        self.defenses = {row.defense: f"defense-{i}" for i, row in enumerate(board.rows, 1)}

    def link(self, record: Record) -> str:
        """The link to the line of a result file."""
        return f"#{self.results[record.name]}"

    def heading(self, column: Column) -> Markup:
        """The heading of a column, with the indices of its symbols as subscripts."""
        return _indexed(column.heading)

    def cells(self, row: Row) -> list[list[Cell]]:
        """The numbers of a defense, by section; each links to the result that it follows from."""
        found: list[list[Cell]] = []
        for columns in self.sections.values():
            found.append([])
            for column in columns:
                pool = None if column.of else row.columns.get(column.key)
                href = self.link(pool.records[0]) if pool else f"#{self.defenses[row.defense]}"
                same = column.key in row.served_by
                found[-1].append(cell(row.estimates[column.key], href, same=same))
        return found

    def others(self) -> list[tuple[Pool, str, Cell]]:
        """Results at the leaderboard's eps that serve no column of equal effort.

        Each comes with the ratio of its evaluations to those of the column of equal knowledge.
        """
        found = []
        for row in self.board.rows:
            own = {row.columns[key].knows: row.columns[key] for key in KNOWN if key in row.columns}
            for pool, _ in self.board.pools:
                here = pool.within(self.board.norm, self.board.eps)
                if here and pool.any.defense == row.defense and pool not in own.values():
                    count = pool.evaluations
                    first = own[pool.knows].evaluations if pool.knows in own else None
                    ratio = "" if count is None or not first else f"{count / first:.2g}"
                    found.append(
                        (pool, ratio, cell(pool.robust.estimate, self.link(pool.records[0])))
                    )
        return found

    def numbers(self, row: Row) -> list[tuple[Markup, str, list[Record]]]:
        """Each number of a defense, and the results that it follows from."""
        lines = []
        for column in (each for columns in self.sections.values() for each in columns):
            estimate = row.estimates[column.key]
            if estimate is None:
                continue
            records: list[Record] = []
            for key in column.of or (column.key,):
                pool = row.base if key == "base" else row.columns.get(key)
                records += pool.records if pool else ()
            lines.append((_indexed(column.name), estimate.percent(), records))
        return lines

    def details(self, row: Row) -> dict[str, Any]:
        """The details that a row opens to: paper, options, commands, environment and weights."""
        known = row.defense in self.registry.defenses
        entry = self.registry.defense(row.defense).entry if known else None
        url = entry.paper if entry else None
        paper = self.published.paper(url)
        records = [record for record, _ in self.records if record.result.defense == row.defense]
        made = [record.result.provenance for record in records]
        return {
            "title": entry.title if entry else "",
            "options": [f"{key}: {value}" for key, value in row.pools[0].any.options.items()],
            "paper": f"{paper.title} ({paper.year})" if paper else url,
            # Anyone writes entries: keep only an address that a browser reads and doesn't run.
            "url": url if url and url.startswith(("https://", "http://")) else "",
            "bibtex": paper.bibtex() if paper else "",
            "galleries": [r for r in records if r.name in self.samples],
            "samples": shlex.join(["dbp-bench", "verify", f"results/{records[0].name}"]),
            "commands": [self.command(record) for record in records],
            "environments": sorted({environment_of(record.result) for record in records}),
            "weights": sorted(
                {pair for each in made for pair in each.weights.items()}
                | {("data", each.data) for each in made}
            ),
        }

    def command(self, record: Record) -> str:
        """The command that computes a result again."""
        return command_of(record, self.registry)

    def made(self, record: Record, pool: Pool) -> str:
        """The attack, budget, images, draws, seed and commit of a result, in words."""
        result = record.result
        draws = f"{len(result.draws)} {'known ' if result.knows else ''}draws"
        return (
            f"knows {self.knows(pool)}; {search_in_words(result)}; {result.norm}, eps = "
            f"{shown_eps(result.eps)}; {len(result.ids)} images, {draws}, seed {result.seed}; "
            f"{_code(result)}"
        )

    def knows(self, pool: Pool) -> str:
        """The attacker's knowledge, in words."""
        return pool.knowledge if pool.sites else "all (there is no noise)"


def _indexed(name: str) -> Markup:
    """A name with the indices of its symbols as subscripts."""
    return Markup(symbols(str(escape(name)), r"\1<sub>\2</sub>"))


def _coded(text: str) -> Markup:
    """The escaped `text`, what stands between backticks set as code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _text(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{b64encode(sha256(text.encode()).digest()).decode()}"


def cell(estimate: Estimate | None, href: str = "", *, same: bool = False) -> Cell:
    """The cell of an estimate, linked to `href`; blank where it was not measured."""
    if estimate is None or isnan(estimate.value):
        return Cell()
    value, interval = estimate.percent().split(" ", 1)
    return Cell(value, interval, f"{estimate.value:.6f}", href, same)


def environment_of(result: Result) -> str:
    """The versions, device, arithmetic and commit that a result was computed with, in words."""
    where = result.provenance
    packages = ", ".join(f"{name} {version}" for name, version in sorted(where.packages.items()))
    return (
        f"dbp-bench {where.dbp_bench}, Python {where.python}, {packages}; {where.device_name} "
        f"({result.arithmetic.device}, {result.arithmetic.dtype}), {where.threads} threads, "
        f"batches of {result.arithmetic.batch_size}; {_code(result)}"
    )


def _code(result: Result) -> str:
    where = result.provenance
    if where.commit is None:
        return "commit not known"
    return f"commit {where.commit[:12]}{', with changes' if where.dirty else ''}"
