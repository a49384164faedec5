"""The commands ``report`` and ``compare``: from result files to tables and tests."""

from pathlib import Path
from typing import Annotated

import typer

from dbp_bench.cli.app import REPORT, AsJson, Entries, ManyResults, Quiet, TrackName, app
from dbp_bench.cli.shared import console, registry_of, show, show_json
from dbp_bench.errors import BadRequest


@app.command(rich_help_panel=REPORT)
def report(
    results: ManyResults = None,
    out: Annotated[Path, typer.Option(help="Where the leaderboards go.")] = Path("leaderboards"),
    track: Annotated[str | None, typer.Option(help="One track only.")] = None,
    sort: Annotated[
        str, typer.Option(help="hidden (EoT accuracy, as the field does) or known (DW-box).")
    ] = "hidden",
    outcomes: Annotated[
        Path | None,
        typer.Option(
            help="Write the outcomes of all results to this CSV file instead, one row per image "
            "and draw.",
            show_default=False,
        ),
    ] = None,
    baseline: Annotated[
        bool,
        typer.Option("--baseline", help="Beside them, the project's own results on these tracks."),
    ] = False,
    entries: Entries = None,
    quiet: Quiet = False,
) -> None:
    """Make leaderboards (CSV, Markdown, LaTeX, HTML) from results."""
    from dbp_bench.reporting.baseline import beside, committed
    from dbp_bench.reporting.records import load
    from dbp_bench.reporting.report import outcomes_csv, write_leaderboards
    from dbp_bench.submission.hub import local

    if sort not in ("hidden", "known"):
        raise BadRequest(f"--sort {sort!r}: hidden or known.")
    say = console(quiet)
    places = [local(place) for place in results or [Path("results")]]
    project = committed() if baseline else None
    if outcomes is not None:
        records = load(places, track)
        records += beside(records, project) if project else []
        outcomes_csv([record.path for record in records], outcomes)
        say.print(str(outcomes), soft_wrap=True)
        return
    paths = write_leaderboards(
        places,
        out,
        track,
        sort="known" if sort == "known" else "hidden",
        registry=registry_of(entries),
        baseline=project,
    )
    for path in paths:
        say.print(str(path), soft_wrap=True)


@app.command(rich_help_panel=REPORT)
def compare(
    a: Annotated[
        str,
        typer.Argument(help="A result file, a folder, or defense, defense/threat, threat."),
    ],
    b: Annotated[str, typer.Argument(help="The same, to compare with.")],
    results: ManyResults = None,
    track: TrackName = "digits-linf",
    as_json: AsJson = False,
) -> None:
    """Compare results, defenses or threat models, paired by image."""
    from dbp_bench.reporting import compare as comparing

    places = results or [Path("results")]
    found = comparing.compare(comparing.side(a, places, track), comparing.side(b, places, track))
    if as_json:
        show_json(comparing.to_table(found))
        return
    show("\n".join(comparing.in_words(found)))
