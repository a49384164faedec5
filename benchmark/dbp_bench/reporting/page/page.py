"""What goes onto a track's page, from its leaderboard; the template says how it looks."""

import shlex
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dbp_bench.entries.registry import Registry
from dbp_bench.errors import BadResult
from dbp_bench.reporting.leaderboard import UNDEFENDED, Leaderboard, Row
from dbp_bench.reporting.literature import Paper, Published, published
from dbp_bench.reporting.page.columns import serving
from dbp_bench.reporting.page.drawn import figures
from dbp_bench.reporting.pool import Pool
from dbp_bench.reporting.ranking import ALPHA
from dbp_bench.reporting.records import KNOWN, NULL, Record
from dbp_bench.reporting.rendering import BOOTSTRAP, in_words, shown_eps
from dbp_bench.reporting.samples import Samples, samples_path
from dbp_bench.reporting.sanity import describe
from dbp_bench.reporting.statistics import LEVEL, Estimate
from dbp_bench.reporting.tables import ranking
from dbp_bench.reporting.votes import METRICS
from dbp_bench.result import Result

FOLDER: Final = Path(__file__).parent

ACCURACIES: Final = {
    "clean": "Clean",
    "hidden": "Nothing",
    "forward_known": "Forward noise",
    "reverse_known": "Reverse noise",
    "all_known": "All noise",
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
    "purification": ("all_known", "undefended"),
    "stochasticity": ("hidden", "all_known"),
    "share": ("hidden", "all_known", "undefended"),
    "stochasticity_forward": ("hidden", "forward_known", "reverse_known", "all_known"),
    "stochasticity_reverse": ("hidden", "forward_known", "reverse_known", "all_known"),
    "fresh": ("all_known",),
}
"""Columns that a derived number follows from; the others are columns themselves."""
_OPTIONS: Final = ("steps", "eot", "step_size", "loss", "random_start", "restarts", "gradient")
"""Effort that the command line can set."""


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


@dataclass(frozen=True)
class Line:
    """A row of the leaderboard."""

    anchor: str
    rank: str
    rank_sort: str
    defense: str
    kind: str
    sites: str
    cells: Sequence[Cell]
    calls: int
    draws: str
    flags: int


@dataclass(frozen=True)
class Derived:
    """A number, and the results that it follows from."""

    name: str
    value: str
    links: Sequence[Link]


@dataclass(frozen=True)
class Gallery:
    """Pictures of one result."""

    threat: str
    href: str
    samples: Samples


@dataclass(frozen=True)
class Details:
    """What a row opens to."""

    anchor: str
    defense: str
    title: str
    kind: str
    sites: str
    options: Sequence[str]
    paper: Link | None
    bibtex: str
    flags: Sequence[str]
    badge: str
    checks: Sequence[tuple[str, str, str]]
    numbers: Sequence[Derived]
    galleries: Sequence[Gallery]
    samples_command: str
    commands: Sequence[str]
    environments: Sequence[str]
    weights: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Source:
    """A result file."""

    anchor: str
    defense: str
    threat: str
    file: str
    sha256: str
    protocol: str
    command: str
    code: str


@dataclass(frozen=True)
class Other:
    """A result that stands in no column of equal effort."""

    defense: str
    threat: str
    knows: str
    effort: str
    calls: str
    ratio: str
    cell: Cell


def to_html(
    board: Leaderboard, material: Material | None = None, registry: Registry | None = None
) -> str:
    """The page of a track, which needs nothing but itself; every name in it is escaped."""
    material, registry = material or Material(), registry or Registry()
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    style, script = (_text(name) for name in ("style.css", "script.js"))
    anchors = _anchors(board)
    return environment.get_template("template.html").render(
        board=board,
        eps=shown_eps(board.eps),
        policy=f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; "
        f"script-src '{_hash(script)}'",
        style=Markup(style),  # our own file
        script=Markup(script),
        protocol=_protocol(board),
        ranking=ranking(board),
        groups=_groups(board),
        lines=[_line(row, board, anchors) for row in board.rows],
        sites=sorted({site for row in board.rows for site in row.pools[0].sites}),
        figures=figures(board),
        others=_others(board, anchors),
        draws=_draws(board),
        metrics=_metric_names(board),
        details=[_details(row, board, anchors, material, registry) for row in board.rows],
        sources=[
            _source(record, pool, anchors[record.name])
            for pool, _ in board.settings
            for record in pool.records
        ],
        published=material.published,
        bootstrap=BOOTSTRAP,
        level=f"{100 * LEVEL:.0f}",
        alpha=f"{100 * ALPHA:.0f}",
        same=any(row.served_by for row in board.rows),
    )


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
                f"again: dbp-bench samples {record.path}, or delete the file."
            )
        found[record.name] = samples
    return found


def command_of(result: Result) -> str:
    """What makes a result again."""
    words = ["dbp-bench", "run", "--track", result.track, "--defense", result.defense]
    words += ["--threat", result.threat, "--seed", str(result.seed)]
    words += ["--examples", str(len(result.ids))]
    for name in result.overrides:
        value = result.effort.get(name)
        option = f"--{name.replace('_', '-')}"
        if name == "eps":
            words += [option, shown_eps(result.eps)]
        elif name == "draws":
            words += [option, str(len(result.draws))]
        elif name in ("batch_size", "rows"):
            words += [option, str(getattr(result.arithmetic, name))]
        elif name == "random_start":
            words.append(option if value else "--no-random-start")
        elif name in _OPTIONS:
            words += [option, str(value)]
    return " ".join(shlex.quote(word) for word in [*words, "--device", result.arithmetic.device])


def _text(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{b64encode(sha256(text.encode()).digest()).decode()}"


def _anchors(board: Leaderboard) -> dict[str, str]:
    """By the name of a result. Numbers: a name of an entry may hold anything."""
    names = [record.name for pool, _ in board.settings for record in pool.records]
    return {name: f"result-{i}" for i, name in enumerate(names, start=1)}


def _anchor_of(row: Row, board: Leaderboard) -> str:
    return f"defense-{[each.defense for each in board.rows].index(row.defense) + 1}"


def _groups(board: Leaderboard) -> list[tuple[str, list[str]]]:
    eot = (board.effort or {}).get("eot")
    known = "Accuracy, %, by what the attacker knows; equal effort"
    return [
        (known + (f" (EoT-{eot})" if eot is not None else ""), list(ACCURACIES.values())),
        ("Where the robustness comes from, points", list(PARTS.values())),
        ("Checks, %", list(CHECKS.values())),
    ]


def _line(row: Row, board: Leaderboard, anchors: Mapping[str, str]) -> Line:
    standing = row.rank
    anchor = _anchor_of(row, board)
    cells = []
    for key in (*ACCURACIES, *PARTS, *CHECKS):
        pool = None if key in _FROM else serving(row, key)
        href = f"#{anchors[pool.records[0].name]}" if pool else f"#{anchor}"
        cells.append(_cell(row.estimates[key], href, same=key in row.served_by))
    return Line(
        anchor=anchor,
        rank="" if standing is None else str(standing),
        rank_sort="" if standing is None else f"{standing.best}.{standing.worst:04d}",
        defense=row.defense,
        kind=row.kind,
        sites=" ".join(row.pools[0].any.sites),
        cells=cells,
        calls=row.calls,
        draws=f"{row.hidden_draws or '-'} / {row.known_draws or '-'}",
        flags=len(row.flags),
    )


def _cell(estimate: Estimate | None, href: str, *, same: bool = False) -> Cell:
    if estimate is None:
        return Cell()
    value, interval = estimate.percent().split(" ", 1)
    return Cell(value, interval, f"{estimate.value:.6f}", href, same)


def _protocol(board: Leaderboard) -> str:
    effort = ", ".join(filter(None, [board.attack, in_words(board.effort or {})]))
    return f"{effort}; {board.norm}, eps = {shown_eps(board.eps)}; {board.images} images"


def _others(board: Leaderboard, anchors: Mapping[str, str]) -> list[Other]:
    """Results at the leaderboard's eps that serve no column of equal effort."""
    columns = [(row, {id(serving(row, key)) for key in KNOWN}) for row in board.rows]
    found = []
    for row, used in columns:
        own = {pool.knows: pool for key in KNOWN if (pool := serving(row, key)) is not None}
        for pool, _ in board.settings:
            if pool.any.defense != row.defense or pool.any.eps != board.eps or id(pool) in used:
                continue
            reference = own.get(pool.knows)
            counted = reference is not None and reference.counted and reference.calls > 0
            found.append(
                Other(
                    defense=row.defense,
                    threat=pool.any.threat,
                    knows=knowledge(pool),
                    effort=", ".join(filter(None, [pool.attack, in_words(pool.any.effort)])),
                    calls=f"{pool.calls:.0f}" if pool.counted else "",
                    ratio=f"{pool.calls / reference.calls:.2g}" if counted and reference else "",
                    cell=_cell(
                        board.bootstrap.estimate(pool.robust(board.bootstrap)),
                        f"#{anchors[pool.records[0].name]}",
                    ),
                )
            )
    return found


def knowledge(pool: Pool) -> str:
    """What the attacker knows, in words."""
    if not pool.sites:
        return "no noise"
    if pool.all_known:
        return "all noise"
    return " and ".join(sorted(pool.knows)) or "nothing"


_IMAGES: Final = {"clean": "clean", "hidden": "attacked, nothing known", NULL: "null attack"}


def _draws(board: Leaderboard) -> list[tuple[str, str, str, list[Cell]]]:
    """One draw, votes and worst cases."""
    lines = []
    for row in board.rows:
        for key, (_, account) in row.accounts.items():
            cells = [_cell(account.estimates[metric], "") for metric in METRICS]
            draws = "any" if account.draws is None else str(account.draws)
            if account.votes != account.draws:
                draws += f", votes of {account.votes}"
            lines.append((row.defense, _IMAGES[key], draws, cells))
    return lines


def _details(
    row: Row,
    board: Leaderboard,
    anchors: Mapping[str, str],
    material: Material,
    registry: Registry,
) -> Details:
    entry = registry.defense(row.defense).entry if row.defense in registry.defenses else None
    url = entry.paper if entry else None
    paper = material.published.paper(url)
    records = [
        record
        for pool, _ in board.settings
        for record in pool.records
        if record.result.defense == row.defense
    ]
    galleries = [
        Gallery(record.result.threat, f"#{anchors[record.name]}", material.samples[record.name])
        for record in records
        if record.name in material.samples
    ]
    return Details(
        anchor=_anchor_of(row, board),
        defense=row.defense,
        title=entry.title if entry else "",
        kind=row.kind,
        sites=", ".join(row.pools[0].any.sites) or "nowhere",
        options=[f"{key}: {value}" for key, value in row.pools[0].any.options.items()],
        paper=_paper(url, paper),
        bibtex=paper.bibtex() if paper else "",
        flags=row.flags,
        badge=row.badge,
        checks=[
            (
                check.name,
                ", ".join(check.looked),
                "flagged" if check.flags else "no finding" if check.looked else "not looked for",
            )
            for check in row.checks
        ],
        numbers=_numbers(row, board, anchors),
        galleries=galleries,
        samples_command=" ".join(
            shlex.quote(word) for word in ["dbp-bench", "samples", f"results/{records[0].name}"]
        ),
        commands=[command_of(record.result) for record in records],
        environments=sorted({_environment(record.result) for record in records}),
        weights=sorted(
            {pair for record in records for pair in record.result.provenance.weights.items()}
            | {("data", record.result.provenance.data) for record in records}
        ),
    )


def _paper(url: str | None, paper: Paper | None) -> Link | None:
    if url is None:
        return None
    # An entry is anyone's: only an address that a browser reads and doesn't run.
    safe = url.startswith(("https://", "http://"))
    return Link(f"{paper.title} ({paper.year})" if paper else url, url if safe else "")


def _numbers(row: Row, board: Leaderboard, anchors: Mapping[str, str]) -> list[Derived]:
    none = next((each for each in board.rows if each.defense == UNDEFENDED), None)
    lines = []
    names = ACCURACIES | {"undefended": "Undefended"} | PARTS | CHECKS
    for key, name in names.items():
        estimate = row.estimates[key]
        if estimate is None:
            continue
        links = []
        for source in _FROM.get(key, (key,)):
            owner = none if source == "undefended" else row
            pool = owner and serving(owner, "hidden" if source == "undefended" else source)
            links += [
                Link(record.name, f"#{anchors[record.name]}")
                for record in (pool.records if pool else ())
            ]
        title = f"{name} known" if key in KNOWN else name
        lines.append(Derived(title, estimate.percent(), links))
    return lines


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


def _source(record: Record, pool: Pool, anchor: str) -> Source:
    result = record.result
    judged = f"{len(result.draws)} known draws" if result.knows else f"{len(result.draws)} draws"
    effort = ", ".join(filter(None, [pool.attack, in_words(result.effort)]))
    return Source(
        anchor=anchor,
        defense=result.defense,
        threat=result.threat,
        file=record.name,
        sha256=record.sha256,
        protocol=f"knows {knowledge(pool)}; {effort}; {result.norm}, "
        f"eps = {shown_eps(result.eps)}; {len(result.ids)} images, {judged}, seed {result.seed}",
        command=command_of(result),
        code=_code(result),
    )


def _metric_names(board: Leaderboard) -> list[str]:
    """Of the columns of the table of draws."""
    account = next((a for row in board.rows for _, a in row.accounts.values() if a.draws), None)
    if account is None:
        account = next(iter(board.rows[0].accounts.values()))[1]
    return [describe(metric, account).capitalize() for metric in METRICS]
