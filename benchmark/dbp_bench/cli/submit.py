"""The command ``submit``: bundle a defense with its results."""

from pathlib import Path
from typing import Annotated

import typer

from dbp_bench.cli.app import SHARE, Data, Entries, Force, Results, TrackName, app
from dbp_bench.cli.shared import registry_of, show
from dbp_bench.errors import BadRequest


@app.command(rich_help_panel=SHARE)
def submit(
    defense: Annotated[str, typer.Argument(help="A defense.")],
    track: TrackName = "digits-linf",
    results: Results = Path("results"),
    out: Annotated[
        Path | None,
        typer.Option(help="The bundle; <track>-<defense>.zip if not given.", show_default=False),
    ] = None,
    no_weights: Annotated[
        bool, typer.Option("--no-weights", help="Leave the entry's own weights out.")
    ] = False,
    upload: Annotated[
        str | None,
        typer.Option(help="Open a pull request on this Hugging Face data set (owner/name)."),
    ] = None,
    force: Force = False,
    data: Data = None,
    entries: Entries = None,
) -> None:
    """Bundle a defense with its results, check all of it, and say what to put in a pull request."""
    from dbp_bench.submission import hub
    from dbp_bench.submission import submit as submitting

    repo = hub.repo_of(upload) if upload is not None else None
    out = out or Path(f"{track}-{defense}.zip")
    if out.suffix != ".zip":
        raise BadRequest(f"--out {out}: a bundle is a .zip file.")
    manifest, sha256 = submitting.submit(
        registry_of(entries, data=data),
        defense,
        track,
        results,
        out,
        with_weights=not no_weights,
        force=force,
    )
    show(f"{out}: {len(manifest.files)} files, all checked.\n")
    title = submitting.title(manifest)
    if repo is None:
        show(f"Title: {title}\n\nAttach {out.name}, or link to where it lies. In the text:\n")
        show(submitting.description(manifest, out.name, sha256))
    else:
        text = submitting.description(manifest, hub.place_of(out, repo), sha256)
        show(f"opened: {hub.propose(out, repo, title, text)}")
