"""Commands for published weights: list, fetch, convert, verify."""

import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dbp_bench.cli.app import EVALUATE, AsJson, Entries, Force, Quiet, Trust, app
from dbp_bench.cli.shared import console, registry_of, show, show_json, split
from dbp_bench.errors import BadRequest, BadWeights

if TYPE_CHECKING:
    from rich.console import Console

    from dbp_bench.weights.catalog import Checkpoint
    from dbp_bench.weights.store import Record

weights = typer.Typer(
    help="Published weights: fetch them, or convert local files.", no_args_is_help=True
)
app.add_typer(weights, name="weights", rich_help_panel=EVALUATE)


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
        list[str] | None,
        typer.Argument(
            help="Names of the list, robustbench:<dataset>/<threat>/<model>, or timm:<model>.",
            show_default=False,
        ),
    ] = None,
    defense: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES", help="All that these defenses need on a track, instead of names."
        ),
    ] = None,
    track: Annotated[
        str | None, typer.Option(metavar="NAME", help="The track of --defense.")
    ] = None,
    accept_licence: Annotated[
        bool, typer.Option("--accept-licence", help="Accept the licences without being asked.")
    ] = False,
    keep_download: Annotated[
        bool, typer.Option("--keep-download", help="Keep the file that was converted, too.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Fetch what is in the cache again.")
    ] = False,
    entries: Entries = None,
    quiet: Quiet = False,
) -> None:
    """Download checkpoints and convert them into the cache; a cut download goes on."""
    from dbp_bench.weights import catalog, store

    say = console(quiet)
    asked = names or []
    if bool(asked) == (defense is not None) or (defense is None) != (track is None):
        raise BadRequest("give names of checkpoints, or --defense NAMES and --track NAME.")
    if defense is not None and track is not None:
        registry = registry_of(entries)
        rows = [registry.subject(each, track) for each in split(defense)]
        asked = list(dict.fromkeys(name for row in rows for name in row.checkpoints()))
        if not asked:
            say.print(f"{defense} on {track}: nothing to fetch, all weights are files.")
    wanted = {name: catalog.find(name) for name in asked}
    for name in list(wanted):
        if store.has(name) and not force and _problem(name) is None:
            say.print(f"{name}: already in the cache.", highlight=False, soft_wrap=True)
            del wanted[name]
    by_hand = [n for n, entry in wanted.items() if isinstance(entry.source, catalog.ByHand)]
    linked = {name: entry for name, entry in wanted.items() if name not in by_hand}
    _accept(say, linked, accept_licence)
    from huggingface_hub.utils.tqdm import disable_progress_bars

    from dbp_bench.weights.fetch import fetch as fetch_one

    if quiet:
        disable_progress_bars()
    for name in [*linked, *by_hand]:  # the others are there before one is refused
        say.print(f"{name}: fetching", highlight=False)
        _report(say, fetch_one(name, keep=keep_download))


def _accept(say: "Console", entries: "Mapping[str, Checkpoint]", accepted: bool) -> None:
    """Show the licences, and ask for consent to each unless it was given.

    Raises:
        BadRequest: Nobody can be asked, or an answer is no.
    """
    asks = sys.stdin.isatty()
    for name, entry in entries.items():
        for line in (
            f"{name}: {entry.title}",
            f"  from: {entry.source.what}",
            f"  licence: {_terms(entry)}",
        ):
            say.print(line, highlight=False, soft_wrap=True)
        if not accepted and asks and not typer.confirm("Download under this licence?"):
            raise BadRequest(f"{name}: not downloaded, for its licence wasn't accepted.")
    if entries and not accepted and not asks:
        terms = "; ".join(f"{name}: licence {_terms(e)}" for name, e in entries.items())
        it = "it" if len(entries) == 1 else "them"
        raise BadRequest(f"{terms}: to accept {it}, add --accept-licence. Nothing was downloaded.")


@weights.command()
def convert(
    name: Annotated[
        str,
        typer.Argument(
            help="A name of `dbp-bench weights list`; or, with --network, a file of your own.",
            metavar="NAME|FILE",
        ),
    ],
    source: Annotated[
        Path | None,
        typer.Option("--from", help="A file in the published layout, or a folder of diffusers."),
    ] = None,
    unpublished: Annotated[
        bool, typer.Option("--unpublished", help="Of another size or digest than published.")
    ] = False,
    network: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:CALLABLE",
            help="Builds the network without arguments; FILE has a state dict of it.",
        ),
    ] = None,
    to: Annotated[
        Path | None, typer.Option(help="The safetensors file that is written of FILE.")
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option(help="Of the names to take, such as ema., where FILE has several networks."),
    ] = None,
    force: Force = False,
    entries: Entries = None,
    trust_code: Trust = False,
    quiet: Quiet = False,
) -> None:
    """Convert a published file into the cache, or one of your own; nothing in it is run."""
    own = {"--network": network, "--to": to}
    if all(value is None for value in (*own.values(), prefix)) and not force:
        from dbp_bench.weights.convert import convert as convert_one

        if source is None:
            raise BadRequest(
                f"{name}: give --from FILE for a published checkpoint; for weights of your own "
                "--network module:callable --to mine.safetensors."
            )
        _report(console(quiet), convert_one(name, source, unpublished=unpublished))
        return
    if missing := [option for option, value in own.items() if value is None]:
        raise BadRequest(f"{name}: {missing[0]} is missing, to convert weights of your own.")
    if source is not None or unpublished:
        raise BadRequest(
            "--from and --unpublished are of published checkpoints; the file of your own is the "
            "argument: dbp-bench weights convert FILE --network module:callable --to F.safetensors"
        )
    assert network is not None
    assert to is not None
    _convert_own(Path(name), network, to, prefix, force, entries, trust_code, quiet)


def _convert_own(
    path: Path,
    network: str,
    to: Path,
    prefix: str | None,
    force: bool,
    entries: list[Path] | None,
    trust_code: bool,
    quiet: bool,
) -> None:
    """Write the state of `network` in the file at `path`, and print what an entry says of it."""
    from dbp_bench.entries.fields import DOTTED_PATH
    from dbp_bench.weights import own

    if not path.is_file():
        raise BadWeights(f"{path}: there is no such file.")
    if not re.match(DOTTED_PATH, network):
        raise BadRequest(f"--network {network!r}: write it as module:callable.")
    builder = registry_of(entries, trust_code).builder
    found = own.find(path, builder.call(network, Path("--network"), "networks", {}), prefix)
    sha256 = own.save(found, to, force=force)
    if quiet:
        return
    show(f"{to}: {len(found.state)} tensors")
    if found.prefix:
        show(f"taken from: {found.prefix}")
    if found.dropped:
        show(f"dropped: {', '.join(found.dropped)}")
    if found.added:
        show(f"set to 0, for they were missing: {', '.join(found.added)}")
    show(f"network: {network}\nfile: {to.name}\nsha256: {sha256}")


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
