"""Commands of a submission: new, submit, verify."""

import json
from pathlib import Path
from typing import Annotated

import typer

from dbp_bench.cli.app import AsJson, Data, Device, Entries, Results, TrackName, Trust, app
from dbp_bench.cli.shared import device_of, registry_of
from dbp_bench.errors import BadRequest

SHARE = "Share"
"""The panel of the help in which these commands stand."""

new = typer.Typer(help="Start a defense of your own.", no_args_is_help=True)
app.add_typer(new, name="new", rich_help_panel=SHARE)

Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]


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
        print(path)
    entry = next(path.stem for path in files if path.suffix == ".yaml")
    print(f"Next: dbp-bench check {entry} --entries {out or name} --trust-code")


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
    print(f"{out}: {len(manifest.files)} files, all checked.\n")
    title = submitting.title(manifest)
    if repo is None:
        print(f"Title: {title}\n\nAttach {out.name}, or link to where it lies. In the text:\n")
        print(submitting.description(manifest, out.name, sha256))
    else:
        text = submitting.description(manifest, hub.place_of(out, repo), sha256)
        print(f"opened: {hub.propose(out, repo, title, text)}")


@app.command(rich_help_panel=SHARE)
def verify(
    bundle: Annotated[
        str,
        typer.Argument(
            help="A file that `dbp-bench submit` wrote, or hf://datasets/owner/name/path[@revision]."
        ),
    ],
    replay: Annotated[
        bool,
        typer.Option("--replay", help="Evaluate the adversarial images again, on fresh draws too."),
    ] = False,
    attack: Annotated[
        float | None,
        typer.Option(help="Attack this share of the images again, from the stated seeds."),
    ] = None,
    into: Annotated[
        Path | None,
        typer.Option(help="Put the results, and the record of this, into a folder of results."),
    ] = None,
    force: Force = False,
    device: Device = "auto",
    data: Data = None,
    entries: Entries = None,
    trust_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Verify a bundle; its code runs only if replayed or attacked. Exit code 1: refused."""
    from dbp_bench.submission import archive
    from dbp_bench.submission import verify as verifying
    from dbp_bench.submission.hub import local

    if attack is not None and not 0 < attack <= 1:
        raise BadRequest(f"--attack {attack:g}: a share of the images, above 0 and up to 1.")
    on = device_of(device) if replay or attack is not None else None
    try:
        with archive.opened(local(bundle)) as held:
            found = verifying.check(held, entries or [], trust_code=trust_code, data=data)
            replayed = verifying.replay(found, on) if on and replay else None
            attacked = verifying.attack(found, attack, on) if on and attack else None
            record = verifying.record_of(
                found, replayed=replayed, attacked=attacked, share=attack, device=on
            )
            placed = verifying.place(held, record, into, force=force) if into else None
    except archive.Refused as refused:
        if as_json:
            print(json.dumps({"bundle": bundle, "refused": str(refused)}))
        else:
            print(f"{bundle}: refused: {refused}")
        raise typer.Exit(1) from None
    if as_json:
        print(json.dumps(record.model_dump(mode="json", by_alias=True), indent=1))
        return
    for line in record.checks:
        print(f"pass  {line}")
    for word, compared in (("replayed", replayed), ("attacked again", attacked)):
        if compared is not None:
            print(
                f"pass  {word}: {compared.differing} of {compared.outcomes} outcomes are others "
                f"than stated ({compared.allowed} may be, on this machine)"
            )
    print(f"{bundle}: {record.level}  sha256 {record.bundle[:16]}...")
    if placed is not None:
        print(placed)


# ----------------------------------------------------------------------------- names that are gone

_GONE = {
    "push": "`dbp-bench submit --upload owner/name` proposes a bundle to a data set.",
    "pull": "`dbp-bench report --results hf://datasets/owner/name/path` reads results from there.",
}


def _gone(name: str, instead: str) -> None:
    """Let the command called `name` say what took its place, whatever it is given."""

    @app.command(
        name,
        hidden=True,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )
    def _say() -> None:
        raise BadRequest(f"`dbp-bench {name}` is gone: {instead}")


for _name, _instead in _GONE.items():
    _gone(_name, _instead)
