"""The command ``list``: what there is, and what an entry says."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dbp_bench.cli.app import EVALUATE, AsJson, Entries, app
from dbp_bench.cli.shared import registry_of, show, show_json
from dbp_bench.errors import BadEntry, UnknownName, did_you_mean, plain

if TYPE_CHECKING:
    from dbp_bench.entries.fields import Entry
    from dbp_bench.entries.registry import Registry


@app.command("list", rich_help_panel=EVALUATE)
def list_entries(
    name: Annotated[
        str | None,
        typer.Argument(
            help="defenses, threats, attacks, tracks; or the name of one.",
        ),
    ] = None,
    entries: Entries = None,
    as_json: AsJson = False,
) -> None:
    """List defenses, threat models, attacks and tracks; or show one entry."""
    from dbp_bench import attacks

    registry = registry_of(entries)
    readers: dict[str, tuple[dict[str, Path], Callable[[str], Entry[Any]]]] = {
        "defenses": (registry.defenses, registry.defense),
        "threats": (registry.threats, registry.threat),
        "attacks": (registry.settings, registry.setting),
        "tracks": (registry.tracks, registry.track),
    }
    if name is not None and name not in readers:
        _show(name, registry, readers)
        return
    titles = {
        what: {each: _title_of(read, each) for each in names}
        for what, (names, read) in readers.items()
        if name in (None, what)
    }
    if "attacks" in titles:
        titles["attacks"] |= {own: _title(own) for own in attacks.names()}
    for fault in (fault for faults in registry.faults.values() for fault in faults.values()):
        print(plain(f"dbp-bench: left out: {fault}"), file=sys.stderr)
    if as_json:
        show_json(titles)
        return
    for what, found in titles.items():
        show(what)
        width = max(map(len, found), default=0)
        for each, title in sorted(found.items()):
            show(f"  {each:<{width}}  {title}")


def _title_of(read: Callable[[str], "Entry[Any]"], name: str) -> str:
    """The title of an entry, or the fault of one that can't be read."""
    try:
        return str(read(name).entry.title)
    except BadEntry as error:
        return f"can't be read: {error}"


def _title(attack: str) -> str:
    """The first sentence of the module of an attack, which is read and not imported."""
    import ast
    from importlib.util import find_spec

    spec = find_spec(f"dbp_bench.attacks.{attack.replace('-', '_')}")
    source = Path(spec.origin).read_text(encoding="utf-8") if spec and spec.origin else ""
    text = ast.get_docstring(ast.parse(source)) or ""
    return text.partition("\n")[0].rstrip(".")


def _show(
    name: str,
    registry: "Registry",
    readers: "dict[str, tuple[dict[str, Path], Callable[[str], Entry[Any]]]]",
) -> None:
    """Print the entries called `name`, with the files they are in."""
    for kind in registry.faults:
        registry.check_name(kind, name)
    found = [read(name) for names, read in readers.values() if name in names]
    if not found:
        known = [*readers, *(each for names, _ in readers.values() for each in names)]
        raise UnknownName(f"no entry {name!r}.{did_you_mean(name, known, 'dbp-bench list')}")
    for entry in found:
        show(f"# {entry.path}  (sha256 {entry.sha256[:16]}...)")
        show(entry.path.read_text(encoding="utf-8").rstrip())
