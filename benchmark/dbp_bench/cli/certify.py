"""The command ``certify``: certificates of randomised smoothing, and the plan of one."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dbp_bench.cli.app import (
    CHANGED,
    EVALUATE,
    MACHINE,
    AsJson,
    Data,
    Defenses,
    Device,
    Entries,
    Examples,
    NoResume,
    Out,
    Quiet,
    Seed,
    TrackName,
    Trust,
    app,
)
from dbp_bench.cli.shared import (
    console,
    device_of,
    duration,
    options_of,
    registry_of,
    show_json,
    show_random_weights,
    split,
)
from dbp_bench.errors import AttackFailed, BadRequest, NotConforming

if TYPE_CHECKING:
    from rich.console import Console

    from dbp_bench.reporting.certificates import Held
    from dbp_bench.runs.certify import CertificateJob


@app.command(rich_help_panel=EVALUATE)
def certify(
    defense: Defenses,
    track: TrackName = "digits-l2",
    sigma: Annotated[
        str,
        typer.Option(
            "--sigma",
            metavar="NUMBERS",
            help="Sizes of the Gaussian noise in [0, 1] pixel units. The defense's noise level "
            "follows.",
        ),
    ] = "0.25,0.5,1.0",
    n0: Annotated[int, typer.Option("--n0", help="Votes that choose an image's class.")] = 100,
    n: Annotated[
        int,
        typer.Option("--n", help="Fresh votes that bound its probability; published: 100000."),
    ] = 1000,
    alpha: Annotated[
        float,
        typer.Option("--alpha", help="Failure probability of a certificate, for the table alone."),
    ] = 0.001,
    radii: Annotated[
        str | None,
        typer.Option(
            "--radii",
            metavar="NUMBERS",
            help="Radii of the table, in l2 and pixel units.",
            show_default="quarters in reach",
        ),
    ] = None,
    seed: Seed = 0,
    out: Out = Path("results"),
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="An option of the defense, or its votes, such as steps=5 or votes=3; can be "
            "repeated.",
            rich_help_panel=CHANGED,
        ),
    ] = None,
    examples: Examples = None,
    max_batch: Annotated[
        int | None,
        typer.Option(
            "--max-batch",
            help="Votes in one pass, at most.",
            show_default="what memory allows",
            rich_help_panel=CHANGED,
        ),
    ] = None,
    device: Device = "auto",
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Only say what would run: votes, NFE, time, and the largest radius in reach.",
            rich_help_panel=MACHINE,
        ),
    ] = False,
    no_resume: NoResume = False,
    data: Data = None,
    entries: Entries = None,
    trust_code: Trust = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Certify defenses by randomised smoothing: no attack within a radius changes the vote."""
    from dbp_bench.certificate import check_alpha, largest_radius
    from dbp_bench.reporting.certificates import check_radii
    from dbp_bench.runs.certify import plan

    registry = registry_of(entries, trust_code, data)
    check_alpha(alpha)
    sigmas = _numbers("--sigma", sigma)
    jobs = plan(
        registry,
        track,
        split(defense),
        sigmas,
        n0=n0,
        n=n,
        seed=seed,
        device=device_of(device),
        examples=examples,
        max_batch=max_batch,
        options=options_of(options),
    )
    reach = largest_radius(n, max(sigmas), alpha)
    at = None if radii is None else check_radii(_numbers("--radii", radii), reach, n, alpha)
    say = console(quiet or as_json)
    say.print(f"track    {track}: {registry.track(track).entry.title}")
    if dry_run:
        _plan(say, jobs, alpha, out, as_json)
        return
    for job in jobs:
        job.defense()  # what can't be built is found before anything has begun
    if jobs and (doubt := jobs[0].doubt()):
        say.print(f"warning: {doubt}", soft_wrap=True)
    _run_all(say, jobs, out, alpha, at, resume=not no_resume, as_json=as_json)


def _numbers(option: str, text: str) -> list[float]:
    from dbp_bench.declaration import number

    try:
        found = [number(each) for each in split(text)]
    except ValueError:
        raise BadRequest(f"{option} {text!r}: not numbers such as 0.25,0.5,1.0.") from None
    if not found:
        raise BadRequest(f"{option} names nothing. Write it as 0.25,0.5,1.0.")
    return list(dict.fromkeys(found))


def _run_all(
    say: "Console",
    jobs: "Sequence[CertificateJob]",
    out: Path,
    alpha: float,
    radii: Sequence[float] | None,
    *,
    resume: bool,
    as_json: bool,
) -> None:
    from dbp_bench.reporting.certificates import read_certificate
    from dbp_bench.runs.certify import certify as run
    from dbp_bench.runs.certify import is_complete
    from dbp_bench.runs.progress import progress_of_count

    held: list[Held] = []
    for job in jobs:
        if resume and is_complete(job, out):
            say.print(f"{job.label}: all there already (--no-resume runs it again)", soft_wrap=True)
        else:
            with progress_of_count(say, job.label, "votes", lines=10) as progress:
                try:
                    run(job, out, resume=resume, progress=progress)
                except (AttackFailed, NotConforming) as error:
                    raise type(error)(f"{job.label}: {error}") from error
        held.append(read_certificate(job.path(out)))
    _show(say, held, alpha, radii, as_json)


def _show(
    say: "Console",
    held: "Sequence[Held]",
    alpha: float,
    radii: Sequence[float] | None,
    as_json: bool,
) -> None:
    from dbp_bench.reporting.certificates import certificates_frame, terminal_table, to_table

    if as_json:
        show_json(to_table(held, radii, alpha=alpha))
        return
    say.print("", terminal_table(certificates_frame(held, radii, alpha=alpha)), "", sep="\n")
    say.print(
        f"Certified accuracy in percent within an l2 radius in [0, 1] pixel units, at alpha "
        f"{alpha:g}; blank: no radius that so many votes can reach. It is that of the vote, not of "
        "one answer of the defense.",
        style="dim",
    )
    for each in held:
        say.print(str(each.path), soft_wrap=True)


def _plan(
    say: "Console", jobs: "Sequence[CertificateJob]", alpha: float, out: Path, as_json: bool
) -> None:
    from dbp_bench.certificate import largest_radius
    from dbp_bench.reporting.rendering import table_of
    from dbp_bench.runs.estimate import forward_cost

    rows: list[dict[str, Any]] = []
    missing: list[str] = []
    for job in jobs:
        cost = forward_cost(job.subject, job.device)
        missing += cost.random_weights
        noise = job.smoothing
        rows.append(
            {
                "defense": job.subject.name,
                "sigma": noise.sigma,
                "options": job.subject.setting.recorded,
                "images": job.examples,
                "votes": job.votes,
                "nfe_of_an_image": job.votes * cost.nfe,
                "nfe": job.examples * job.votes * cost.nfe,
                "reach": largest_radius(noise.n, noise.sigma, alpha),
                "seconds": job.examples * job.votes * cost.seconds,
                "file": str(job.path(out)),
            }
        )
    if as_json:
        show_json({"jobs": rows, "seconds": sum(row["seconds"] for row in rows)})
        return
    table = table_of(
        ["defense", "sigma"], ["images", "votes", "NFE of one", "NFE of all", "radius", "time"]
    )
    for row in rows:
        table.add_row(
            row["defense"],
            f"{row['sigma']:g}",
            f"{row['images']}",
            f"{row['votes']:,}",
            f"{row['nfe_of_an_image']:,}",
            f"{row['nfe']:,}",
            f"{row['reach']:.4f}",
            duration(row["seconds"]),
        )
    say.print("", table, "", sep="\n")
    shown = ("t_star", "sigma_max", "steps", "votes")
    for row in rows:
        levels = [f"{name}={row['options'][name]:g}" for name in shown if name in row["options"]]
        if levels:
            say.print(f"{row['defense']} at sigma {row['sigma']:g}: {', '.join(levels)}")
    show_random_weights(say, missing)
    say.print(f"total    {duration(sum(row['seconds'] for row in rows))} on this device")
    say.print(
        "Votes are those of one image. Radius: the largest in reach, where all votes agree, at "
        f"alpha {alpha:g}, in l2 and [0, 1] pixel units; more needs a larger --n or --sigma.",
        style="dim",
    )
