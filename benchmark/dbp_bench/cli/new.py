"""The command ``new``: start something of your own."""

from pathlib import Path
from typing import Annotated

import typer

from dbp_bench.cli.app import SHARE, Entries, Eps, Trust, app
from dbp_bench.cli.shared import registry_of, show, split

new = typer.Typer(
    help="Start a defense, an attack or a track of your own.",
    no_args_is_help=True,
)
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


@new.command()
def attack(
    name: Annotated[str, typer.Argument(help="Such as my_attack.")],
    out: Annotated[
        Path | None, typer.Option(help="The folder to make; the name if not given.")
    ] = None,
) -> None:
    """Write the module of an attack, which runs as it is."""
    from dbp_bench.submission import scaffold

    path, dotted = scaffold.new_attack(name, out)
    show(path)
    show(
        f"Next: dbp-bench run --defense ddpm --threat eot,dwbox --attack {dotted} --entries "
        f"{path.parent} --trust-code"
    )


@new.command()
def track(
    name: Annotated[str, typer.Argument(help="Such as my-images.")],
    images: Annotated[
        Path,
        typer.Option(
            help="An npz or parquet file, or a folder with a folder of PNG or JPEG files for each "
            "class."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="The folder with tracks/, new or not; the name if not given."),
    ] = None,
    like: Annotated[
        str | None,
        typer.Option(
            metavar="TRACK",
            help="Take its classifier, and defenses as they are set up there; if not given, a "
            "built-in track of the same size and number of classes.",
        ),
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(metavar="MODULE:CALLABLE", help="Builds another classifier instead."),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Its weights in safetensors; see `weights convert`.")
    ] = None,
    norm: Annotated[str | None, typer.Option(help="linf, l2 or l1.")] = None,
    eps: Eps = None,
    first: Annotated[int | None, typer.Option(help="Take the first N images only.")] = None,
    classes: Annotated[
        str, typer.Option(metavar="NAMES", help="Of labels 0, 1, ...; separated by commas.")
    ] = "",
    entries: Entries = None,
    trust_code: Trust = False,
) -> None:
    """Write the declaration of a track of your own images, and try it."""
    from dbp_bench.submission.own_track import new_track

    path, entry, tried = new_track(
        name,
        images,
        registry_of(entries, trust_code),
        out=out,
        like=like,
        network=network,
        weights=weights,
        norm=norm,
        eps=eps,
        first=first,
        classes=split(classes),
    )
    show(path)
    show(f"{entry.title}; {entry.norm} {entry.eps:g}. {tried}")
    show(
        f"Next: dbp-bench run --defense none --threat null --track {name} --entries "
        f"{path.parents[1]}"
    )
