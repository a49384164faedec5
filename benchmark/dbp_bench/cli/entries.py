"""Commands that show what there is: list, describe."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dbp_bench.cli.app import AsJson, Entries, app
from dbp_bench.cli.shared import registry_of
from dbp_bench.errors import UnknownName, did_you_mean

if TYPE_CHECKING:
    from dbp_bench.entries.registry import Entry


@app.command("list")
def list_entries(
    kind: Annotated[str | None, typer.Argument(help="defenses, threats or tracks.")] = None,
    entries: Entries = None,
    as_json: AsJson = False,
) -> None:
    """List defenses, threat models and tracks."""
    registry = registry_of(entries)
    readers: dict[str, tuple[dict[str, Path], Callable[[str], Entry[Any]]]] = {
        "defenses": (registry.defenses, registry.defense),
        "threats": (registry.threats, registry.threat),
        "tracks": (registry.tracks, registry.track),
    }
    if kind is not None and kind not in readers:
        raise UnknownName(f"no list {kind!r}.{did_you_mean(kind, readers)}")
    titles = {
        what: {name: read(name).entry.title for name in names}
        for what, (names, read) in readers.items()
        if kind in (None, what)
    }
    if as_json:
        print(json.dumps(titles, indent=1))
        return
    for what, names in titles.items():
        print(f"{what}")
        width = max(map(len, names), default=0)
        for name, title in names.items():
            print(f"  {name:<{width}}  {title}")


@app.command()
def describe(
    name: Annotated[str, typer.Argument(help="A defense, a threat model or a track.")],
    entries: Entries = None,
) -> None:
    """Show what an entry says, and the file it is in."""
    registry = registry_of(entries)
    found = [
        entry
        for names, read in (
            (registry.defenses, registry.defense),
            (registry.threats, registry.threat),
            (registry.tracks, registry.track),
        )
        if name in names
        for entry in [read(name)]
    ]
    if not found:
        known = [*registry.defenses, *registry.threats, *registry.tracks]
        raise UnknownName(f"no entry {name!r}.{did_you_mean(name, known)}")
    for entry in found:
        print(f"# {entry.path}  (sha256 {entry.sha256[:16]}...)")
        print(entry.path.read_text(encoding="utf-8").rstrip())
