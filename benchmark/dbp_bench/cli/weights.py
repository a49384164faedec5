"""Commands for published weights: list, fetch, convert, verify."""

import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dbp_bench.cli.app import EVALUATE, AsJson, Quiet, app
from dbp_bench.cli.shared import console, show, show_json
from dbp_bench.errors import BadRequest, BadWeights

if TYPE_CHECKING:
    from rich.console import Console

    from dbp_bench.weights.catalog import Checkpoint
    from dbp_bench.weights.store import Record

weights = typer.Typer(
    help="Published weights: fetch them, or convert local files.", no_args_is_help=True
)
app.add_typer(weights, name="weights", rich_help_panel=EVALUATE)

CheckpointName = Annotated[str, typer.Argument(help="See `dbp-bench weights list`.")]


@weights.command("list")
def list_weights(as_json: AsJson = False) -> None:
    """List published checkpoints: what they are, their licences, and which are in the cache."""
    from rich.table import Table

    from dbp_bench.weights import catalog, store

    # The record of each name in the cache; None where it is damaged.
    there: dict[str, Record | None] = dict.fromkeys(store.names())
    for name in there:
        with suppress(BadWeights):
            there[name] = store.read(name)
    entries = {**catalog.entries(), **{n: catalog.find(n) for n in there}}
    if as_json:
        rows = {name: entry.model_dump(mode="json") for name, entry in entries.items()}
        for name, row in rows.items():
            record = there.get(name)
            row["cached"] = record.model_dump() if record else None
        show_json(rows)
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("name", no_wrap=True)  # to be copied whole
    for column in ("cached", "what", "licence"):
        table.add_column(column, overflow="fold")
    for name, entry in entries.items():
        file = store.file(name)
        cached = "damaged" if name in there else ""
        if there.get(name):
            cached = f"{file.stat().st_size / 1e6:,.0f} MB" if file.is_file() else "yes"
        table.add_row(name, cached, entry.title, _terms(entry))
    console(quiet=False).print(table)
    show(f"cache: {store.folder()}")


def _terms(entry: "Checkpoint") -> str:
    kind = entry.licence.restriction
    return entry.licence.name if kind == "none" else f"{entry.licence.name} ({kind})"


@weights.command()
def fetch(
    names: Annotated[
        list[str],
        typer.Argument(
            help="Names of the list, robustbench:<dataset>/<threat>/<model>, or timm:<model>."
        ),
    ],
    accept_licence: Annotated[
        bool, typer.Option("--accept-licence", help="Accept the licences without being asked.")
    ] = False,
    keep_download: Annotated[
        bool, typer.Option("--keep-download", help="Keep the file that was converted, too.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Fetch what is in the cache again.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Download checkpoints and convert them into the cache; a cut download goes on."""
    from dbp_bench.weights import catalog, store

    say = console(quiet)
    entries = {name: catalog.find(name) for name in names}
    for name in list(entries):
        if store.has(name) and not force and _problem(name) is None:
            say.print(f"{name}: already in the cache.", highlight=False, soft_wrap=True)
            del entries[name]
    for name, entry in entries.items():
        if not isinstance(entry.source, catalog.ByHand):
            _accept(say, name, entry, accept_licence)
    from huggingface_hub.utils.tqdm import disable_progress_bars

    from dbp_bench.weights.fetch import fetch as fetch_one

    if quiet:
        disable_progress_bars()
    for name in entries:
        say.print(f"{name}: fetching", highlight=False)
        _report(say, fetch_one(name, keep=keep_download))


def _accept(say: "Console", name: str, entry: "Checkpoint", accepted: bool) -> None:
    """Show the licence, and ask for consent unless it was given.

    Raises:
        BadRequest: Nobody can be asked, or the answer is no.
    """
    for line in (
        f"{name}: {entry.title}",
        f"  from: {entry.source.what}",
        f"  licence: {_terms(entry)}",
    ):
        say.print(line, highlight=False, soft_wrap=True)
    if accepted:
        return
    if not sys.stdin.isatty():
        raise BadRequest(
            f"{name}: licence {_terms(entry)}: to accept it, add --accept-licence. Nothing was "
            "downloaded."
        )
    if not typer.confirm("Download under this licence?"):
        raise BadRequest(f"{name}: not downloaded, for its licence wasn't accepted.")


@weights.command()
def convert(
    name: CheckpointName,
    source: Annotated[
        Path,
        typer.Option("--from", help="A file in the published layout, or a folder of diffusers."),
    ],
    unpublished: Annotated[
        bool, typer.Option("--unpublished", help="Of another size or digest than published.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Convert a local file into the cache; nothing in it is run."""
    from dbp_bench.weights.convert import convert as convert_one

    _report(console(quiet), convert_one(name, source, unpublished=unpublished))


def _report(say: "Console", record: "Record") -> None:
    from dbp_bench.weights import store

    where = store.file(record.name) if record.network else store.record_file(record.name)
    state = {True: ", as published", False: ", NOT the published file", None: ""}[record.published]
    say.print(
        f"{record.name}: {where}  sha256 {record.sha256[:16]}...{state}",
        highlight=False,
        soft_wrap=True,
    )


@weights.command()
def verify(as_json: AsJson = False) -> None:
    """Hash everything in the cache again, and say what is damaged."""
    from dbp_bench.weights import store

    found = {name: _problem(name) for name in store.names()}
    strangers = [str(path) for path in store.strangers()]
    if as_json:
        show_json({"checkpoints": found, "strangers": strangers})
    else:
        for name, problem in found.items():
            show(problem or f"{name}: sound")
        for path in strangers:
            show(f"{path}: belongs to no checkpoint; delete it.")
        show(f"{len(found)} in {store.folder()}")
    if any(found.values()):
        raise typer.Exit(1)


def _problem(name: str) -> str | None:
    """The fault of the checkpoint `name` in the cache; None where it can be used."""
    from dbp_bench.weights import store

    try:
        # Where a package keeps the weights, its model is verified when it is loaded.
        if store.read(name).network is not None:
            store.verified(name)
    except BadWeights as error:
        return str(error)
    return None
