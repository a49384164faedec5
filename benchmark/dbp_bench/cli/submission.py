"""Commands of a submission: new, submit, verify, pull, push."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dbp_bench.cli.app import AsJson, Data, Device, Entries, Quiet, Results, TrackName, Trust, app
from dbp_bench.cli.shared import console, device_of, registry_of
from dbp_bench.errors import BadRequest

if TYPE_CHECKING:
    from dbp_bench.submission import hub

new = typer.Typer(help="Start something of one's own.", no_args_is_help=True)
app.add_typer(new, name="new")

Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
Remote = Annotated[str, typer.Argument(help="hf://datasets/owner/name, or a folder.")]
NoResults = Annotated[bool, typer.Option("--no-results", help="Leave results out.")]
WeightsFolder = Annotated[
    Path | None,
    typer.Option("--weights", help="A folder of safetensors files; left out if not given."),
]


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


@app.command()
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
        typer.Option(help="Also put it into this Hugging Face data set repository (owner/name)."),
    ] = None,
    force: Force = False,
    data: Data = None,
    entries: Entries = None,
) -> None:
    """Bundle a defense with its results, check all of it, and say what to put in a pull request."""
    from dbp_bench.submission import bundle, hub

    if upload is not None:
        hub.repo_of(upload.removeprefix(hub.HUB))
    out = out or Path(f"{track}-{defense}.zip")
    if out.suffix != ".zip":
        raise BadRequest(f"--out {out}: a bundle is a .zip file.")
    manifest, sha256 = bundle.submit(
        registry_of(entries, data=data),
        defense,
        track,
        results,
        out,
        with_weights=not no_weights,
        force=force,
    )
    print(f"{out}: {len(manifest.files)} files, all checked.\n")
    print(bundle.request(manifest, out, sha256))
    if upload is not None:
        print(f"\nuploaded: {hub.upload(out, upload)}")


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="A file that `dbp-bench submit` wrote.")],
    replay: Annotated[
        bool,
        typer.Option("--replay", help="Judge the adversarial images again, on fresh draws too."),
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

    if attack is not None and not 0 < attack <= 1:
        raise BadRequest(f"--attack {attack:g}: a share of the images, above 0 and up to 1.")
    on = device_of(device) if replay or attack is not None else None
    try:
        with archive.opened(bundle) as held:
            found = verifying.check(held, entries or [], trust_code=trust_code, data=data)
            replayed = verifying.replay(found, held, on) if on and replay else None
            attacked = verifying.attack(found, held, attack, on) if on and attack else None
            record = verifying.record_of(
                found, held, replayed=replayed, attacked=attacked, share=attack, device=on
            )
            placed = verifying.place(held, record, into, force=force) if into else None
    except archive.Refused as refused:
        if as_json:
            print(json.dumps({"bundle": str(bundle), "refused": str(refused)}))
        else:
            print(f"{bundle}: refused: {refused}")
        raise typer.Exit(1) from None
    if as_json:
        print(json.dumps(record.model_dump(mode="json", by_alias=True), indent=1))
        return
    for line in record.checks:
        print(f"pass  {line}")
    for word, seen in (("replayed", replayed), ("attacked again", attacked)):
        if seen is not None:
            print(
                f"pass  {word}: {seen.differing} of {seen.outcomes} outcomes are others than "
                f"stated ({seen.allowed} may be, on this machine)"
            )
    print(f"{bundle}: {record.level}  sha256 {record.bundle[:16]}...")
    if placed is not None:
        print(placed)


@app.command()
def push(
    remote: Remote,
    results: Results = Path("results"),
    no_results: NoResults = False,
    weights: WeightsFolder = None,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Put results, and weights, where others can pull them from."""
    from dbp_bench.submission import hub

    for folder in (None if no_results else results, weights):
        if folder is not None and not folder.is_dir():
            raise BadRequest(f"{folder}: no such folder.")
    moved = hub.push(hub.remote_of(remote), None if no_results else results, weights, force=force)
    _say(moved, "pushed", remote, quiet)


@app.command()
def pull(
    remote: Remote,
    results: Results = Path("results"),
    no_results: NoResults = False,
    weights: WeightsFolder = None,
    only: Annotated[
        str | None, typer.Option(help="What starts like this, such as a track or track/defense.")
    ] = None,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Get results, and weights, from where others pushed them; all is checked first."""
    from dbp_bench.submission import hub

    moved = hub.pull(
        hub.remote_of(remote), None if no_results else results, weights, match=only, force=force
    )
    _say(moved, "pulled", remote, quiet)


def _say(moved: "hub.Moved", word: str, remote: str, quiet: bool) -> None:
    say = console(quiet)
    for name in moved.moved:
        say.print(name, highlight=False, soft_wrap=True)
    say.print(
        f"{remote}: {len(moved.moved)} files {word}, {len(moved.there)} were there.",
        highlight=False,
        soft_wrap=True,
    )
