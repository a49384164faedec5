"""The command ``new``: start something of your own."""

from pathlib import Path
from typing import Annotated

import typer

from dbp_bench.cli.app import SHARE, Entries, app
from dbp_bench.cli.shared import registry_of, show

new = typer.Typer(help="Start a defense of your own.", no_args_is_help=True)
app.add_typer(new, name="new", rich_help_panel=SHARE)


@new.callback()
def _of_ones_own() -> None:
    pass


@new.command()
def defense(
    name: Annotated[str, typer.Argument(help="Such as my_defense.")],
    out: Annotated[
        Path | None, typer.Option(help="The folder to make; the name if not given.")
    ] = None,
    entries: Entries = None,
) -> None:
    """Write an entry, a module and a README of a defense, which pass the checks as they are."""
    from dbp_bench.submission import scaffold

    files = scaffold.new_defense(name, out, registry_of(entries))
    for path in files:
        show(path)
    entry = next(path.stem for path in files if path.suffix == ".yaml")
    show(f"Next: dbp-bench check {entry} --entries {out or name} --trust-code")
