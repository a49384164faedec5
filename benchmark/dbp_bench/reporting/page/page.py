"""What goes onto a track's page, from its leaderboard; the template says how it looks."""

import shlex
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from dbp_bench.entries.registry import Registry
from dbp_bench.errors import BadResult
from dbp_bench.reporting.leaderboard import BASE, NULL, Leaderboard, Row
from dbp_bench.reporting.literature import Paper, Published, published
from dbp_bench.reporting.page.charts import charts, swatch
from dbp_bench.reporting.plotting import dark_css, to_svg
from dbp_bench.reporting.pool import Pool, search_in_words
from dbp_bench.reporting.protocol import KNOWN
from dbp_bench.reporting.records import Record
from dbp_bench.reporting.rendering import note, shown_eps
from dbp_bench.reporting.samples import Samples, samples_path
from dbp_bench.reporting.sanity import describe
from dbp_bench.reporting.statistics import LEVEL, Estimate
from dbp_bench.reporting.tables import IMAGES, many, protocol, ranking
from dbp_bench.reporting.votes import METRICS
from dbp_bench.result import Result

FOLDER: Final = Path(__file__).parent

ACCURACIES: Final = {
    "clean": "Clean",
    **dict(zip(KNOWN, ("No draw", "Forward noise", "Reverse noise", "All noise"), strict=True)),
}
PARTS: Final = {
    "purification": "Purification, P",
    "stochasticity": "Stochasticity, S",
    "share": "Share of S, %",
    "stochasticity_forward": "S, forward",
    "stochasticity_reverse": "S, reverse",
}
CHECKS: Final = {
    "fresh": "On fresh draws",
    NULL: "Null attack, eps = 0",
}
_FROM: Final[Mapping[str, tuple[str, ...]]] = {
    "purification": ("all_known", "base"),
    "stochasticity": ("hidden", "all_known"),
    "share": ("hidden", "all_known", "base"),
    "stochasticity_forward": tuple(KNOWN),
    "stochasticity_reverse": tuple(KNOWN),
    "fresh": ("all_known",),
}
"""Columns that a derived number follows from; the others are columns themselves."""


@dataclass(frozen=True)
class Material:
    """What a page takes beside the leaderboard."""

    samples: Mapping[str, Samples] = field(default_factory=dict)
    """By the name of their result."""
    published: Published = field(default_factory=published)


@dataclass(frozen=True)
class Link:
    """To where a number comes from."""

    text: str
    href: str


@dataclass(frozen=True)
class Cell:
    """A number of a table."""

    value: str = ""
    interval: str = ""
    sort: str = ""
    """For programs; empty sorts last."""
    href: str = ""
    same: bool = False
    """Whether another setting's result serves this column too."""


def to_html(
    board: Leaderboard, material: Material | None = None, registry: Registry | None = None
) -> str:
    """The page of a track, which needs nothing but itself; every name in it is escaped."""
    style, script = _text("style.css") + dark_css(), _text("script.js")
    page = _Page(board, material or Material(), registry or Registry())
    return _template().render(
        board=board,
        policy=f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; "
        f"script-src '{_hash(script)}'",
        style=Markup(style),  # our own file
        script=Markup(script),
        protocol=protocol(board),
        ranking=ranking(board),
        note=note,
        groups=_groups(board),
        lines=[page.line(row) for row in board.rows],
        sites=sorted({site for row in board.rows for site in row.sites}),
        charts=charts(board),
        to_svg=to_svg,
        swatch=swatch,
        others=page.others(),
        draws=_draws(board),
        metrics=_metric_names(board),
        details=[page.details(row) for row in board.rows],
        sources=[page.source(record, pool) for pool, _ in board.pools for record in pool.records],
        published=page.material.published,
        bootstrap=note("bootstrap"),
        level=f"{100 * LEVEL:.0f}",
        same=any(row.served_by for row in board.rows),
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
    """The samples beside the results that have some, by the results' names.

    Raises:
        BadResult: A file holds none, or those of another result.
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
    """What makes a result again, beside the folder of results, and compares its outcomes."""
    words = ["dbp-bench", "verify", f"results/{record.name}", "--again"]
    result = record.result
    outside = result.defense not in registry.defenses or result.track not in registry.tracks
    if outside or result.provenance.code:
        words += ["--entries", "FOLDER"]
    if result.provenance.code:
        words += ["--trust-code"]
    return shlex.join(words)


class _Page:
    """Parts of the page that link to one another."""

    def __init__(self, board: Leaderboard, material: Material, registry: Registry) -> None:
        self.board, self.material, self.registry = board, material, registry
        self.records = [record for pool, _ in board.pools for record in pool.records]
        # Numbers, since a name of an entry may hold anything.
        self.anchors = {record.name: f"result-{i}" for i, record in enumerate(self.records, 1)}
        self.rows = {row.defense: f"defense-{i}" for i, row in enumerate(board.rows, 1)}

    def line(self, row: Row) -> dict[str, Any]:
        """A row of the leaderboard."""
        anchor = self.rows[row.defense]
        cells = []
        for key in (*ACCURACIES, *PARTS, *CHECKS):
            pool = None if key in _FROM else row.columns.get(key)
            href = self._href(pool) if pool else f"#{anchor}"
            cells.append(_cell(row.estimates[key], href, same=key in row.served_by))
        rank = row.rank
        return {
            "row": row,
            "anchor": anchor,
            "rank": "" if rank is None else str(rank),
            "rank_sort": "" if rank is None else f"{rank.best}.{rank.worst:04d}",
            "sites": " ".join(row.sites),
            "cells": cells,
            "draws": f"{row.hidden_draws or '-'} / {row.known_draws or '-'}",
        }

    def others(self) -> list[dict[str, Any]]:
        """Results at the leaderboard's eps that serve no column of equal effort."""
        found = []
        for row in self.board.rows:
            own = {row.columns[key].knows: row.columns[key] for key in KNOWN if key in row.columns}
            for pool, _ in self.board.pools:
                here = pool.any.defense == row.defense and pool.any.eps == self.board.eps
                if not here or pool in own.values():
                    continue
                mine = pool.evaluations
                first = own[pool.knows].evaluations if pool.knows in own else None
                found.append(
                    {
                        "defense": row.defense,
                        "threat": pool.any.threat,
                        "attack": pool.any.label,
                        "knows": _knowledge(pool),
                        "effort": pool.search,
                        "evaluations": "" if mine is None else f"{mine:.0f}",
                        "ratio": f"{mine / first:.2g}" if first and mine is not None else "",
                        "cell": _cell(pool.left, self._href(pool)),
                    }
                )
        return found

    def details(self, row: Row) -> dict[str, Any]:
        """What a row opens to."""
        known = row.defense in self.registry.defenses
        entry = self.registry.defense(row.defense).entry if known else None
        url = entry.paper if entry else None
        paper = self.material.published.paper(url)
        records = [record for record in self.records if record.result.defense == row.defense]
        pictures = f"results/{records[0].name}"
        return {
            "row": row,
            "anchor": self.rows[row.defense],
            "title": entry.title if entry else "",
            "sites": ", ".join(row.sites) or "nowhere",
            "options": [f"{key}: {value}" for key, value in row.pools[0].any.options.items()],
            "paper": _paper(url, paper),
            "bibtex": paper.bibtex() if paper else "",
            "numbers": self._numbers(row),
            "galleries": [
                (record.setting, self._link(record), self.material.samples[record.name])
                for record in records
                if record.name in self.material.samples
            ],
            "samples_command": shlex.join(["dbp-bench", "verify", pictures, "--pictures"]),
            "commands": [command_of(record, self.registry) for record in records],
            "environments": sorted({_environment(record.result) for record in records}),
            "weights": sorted(
                {pair for record in records for pair in record.result.provenance.weights.items()}
                | {("data", record.result.provenance.data) for record in records}
            ),
        }

    def source(self, record: Record, pool: Pool) -> dict[str, Any]:
        """A result file."""
        result = record.result
        draws = f"{len(result.draws)} known draws" if result.knows else f"{len(result.draws)} draws"
        return {
            "anchor": self.anchors[record.name],
            "result": result,
            "file": record.name,
            "sha256": record.sha256,
            "protocol": f"knows {_knowledge(pool)}; {search_in_words(result)}; {result.norm}, eps "
            f"= {shown_eps(result.eps)}; {len(result.ids)} images, {draws}, seed {result.seed}",
            "command": command_of(record, self.registry),
            "code": _code(result),
        }

    def _numbers(self, row: Row) -> list[tuple[str, str, list[Link]]]:
        """Each number of a row, and the results that it follows from."""
        zero = next((each for each in self.board.rows if each.defense == BASE), None)
        lines = []
        names = ACCURACIES | {"base": "Base classifier"} | PARTS | CHECKS
        for key, name in names.items():
            estimate = row.estimates[key]
            if estimate is None:
                continue
            links = []
            for column in _FROM.get(key, (key,)):
                owner, place = (zero, "hidden") if column == "base" else (row, column)
                pool = owner.columns.get(place) if owner else None
                links += [Link(r.name, self._link(r)) for r in (pool.records if pool else ())]
            title = f"{name} known" if key in KNOWN else name
            lines.append((title, estimate.percent(), links))
        return lines

    def _href(self, pool: Pool) -> str:
        return self._link(pool.records[0])

    def _link(self, record: Record) -> str:
        return f"#{self.anchors[record.name]}"


def _text(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{b64encode(sha256(text.encode()).digest()).decode()}"


def _groups(board: Leaderboard) -> list[tuple[str, list[str]]]:
    known = "Accuracy, %, by what the attacker knows; equal effort"
    return [
        (known + ("" if board.eot is None else f" (EoT-{board.eot})"), list(ACCURACIES.values())),
        ("Where the robustness comes from, points", list(PARTS.values())),
        ("Checks, %", list(CHECKS.values())),
    ]


def _cell(estimate: Estimate | None, href: str, *, same: bool = False) -> Cell:
    if estimate is None:
        return Cell()
    value, interval = estimate.percent().split(" ", 1)
    return Cell(value, interval, f"{estimate.value:.6f}", href, same)


def _knowledge(pool: Pool) -> str:
    """What the attacker knows, in words."""
    return "all (there is no noise)" if not pool.sites else pool.knowledge


def _draws(board: Leaderboard) -> list[tuple[str, str, str, list[Cell]]]:
    """One draw, votes and worst cases."""
    return [
        (
            *(row.defense, IMAGES[key], many(account)),
            [_cell(account.estimates[metric], "") for metric in METRICS],
        )
        for row in board.rows
        for key, (_, account) in row.accounts.items()
    ]


def _paper(url: str | None, paper: Paper | None) -> Link | None:
    if url is None:
        return None
    # An entry is anyone's: only an address that a browser reads and doesn't run.
    safe = url.startswith(("https://", "http://"))
    return Link(f"{paper.title} ({paper.year})" if paper else url, url if safe else "")


def _environment(result: Result) -> str:
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


def _metric_names(board: Leaderboard) -> Sequence[str]:
    """The columns of the table of draws."""
    accounts = [account for row in board.rows for _, account in row.accounts.values()]
    account = next((each for each in accounts if each.draws), accounts[0])
    return [describe(metric, account).capitalize() for metric in METRICS]
