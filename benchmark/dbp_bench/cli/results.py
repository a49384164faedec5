"""Commands on result files: judge, report, compare, samples, export, schema."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dbp_bench.cli.app import AsJson, Data, Device, Entries, Quiet, Results, Trust, app
from dbp_bench.cli.shared import console, device_of, percent, registry_of
from dbp_bench.errors import BadRequest


@app.command()
def judge(
    file: Annotated[Path, typer.Argument(help="A file that --save-adversarial wrote.")],
    draws: Annotated[int, typer.Option(help="Fresh draws, that no attacker was shown.")] = 9,
    eight_bit: Annotated[
        bool, typer.Option("--8bit", help="As a file of 256 grey levels would hold them.")
    ] = False,
    device: Device = "auto",
    data: Data = None,
    entries: Entries = None,
    trust_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Check saved adversarial images (inside ball and box) and judge them on fresh draws."""
    from dbp_bench.reporting.statistics import Bootstrap
    from dbp_bench.result import Result
    from dbp_bench.runs.replay import job_of
    from dbp_bench.runs.saved import adversarial_path, rejudge

    if draws < 1:
        raise BadRequest(f"--draws {draws}: must be 1 or more.")
    stem = file.stem.removeprefix("adversarial-")
    result = Result.read(file.with_name(f"{stem}.json"))
    if adversarial_path(file.with_name(f"{stem}.json")) != file:
        raise BadRequest(f"{file}: not a file of adversarial images beside its result.")
    registry = registry_of(entries, trust_code, data)
    job = job_of(result, file, registry, device_of(device))
    right, ids, outside = rejudge(file, job, registry, draws=draws, eight_bit=eight_bit)
    bootstrap = Bootstrap(len(ids))
    hits = [sum(sum(attack[i]) for attack in right) for i in range(len(ids))]
    estimate = asdict(bootstrap.estimate(bootstrap.mean(hits, len(right) * draws)))
    if as_json:
        table = {"file": str(file), **estimate, "draws": draws, "ids": ids, "right": right}
        print(json.dumps({**table, "left_the_ball": outside} if eight_bit else table))
        return
    print(
        f"{file}: {len(right)} x {len(ids)} images inside {result.norm} {result.eps:g} and [0, 1]; "
        f"{percent(estimate)} % right over {draws} fresh draws."
    )
    if eight_bit:
        print(
            f"Judged as rounded to k/255: that took {outside} of {len(right) * len(ids)} images "
            "out of the ball, by at most half a level a pixel; those were projected onto it."
        )


@app.command()
def report(
    results: Results = Path("results"),
    out: Annotated[Path, typer.Option(help="Where the leaderboards go.")] = Path("leaderboards"),
    track: Annotated[str | None, typer.Option(help="One track only.")] = None,
    sort: Annotated[
        str, typer.Option(help="hidden (EoT accuracy, as the field does) or known (DW-box).")
    ] = "hidden",
    entries: Entries = None,
    quiet: Quiet = False,
) -> None:
    """Make leaderboards (CSV, Markdown, LaTeX, an HTML page) from results."""
    from dbp_bench.reporting.report import write_leaderboards
    from dbp_bench.submission.hub import local

    if sort not in ("hidden", "known"):
        raise BadRequest(f"--sort {sort!r}: hidden or known.")
    registry = registry_of(entries)
    paths = write_leaderboards(
        local(results), out, track, sort="known" if sort == "known" else "hidden", registry=registry
    )
    say = console(quiet)
    for path in paths:
        say.print(str(path), highlight=False)


@app.command()
def compare(
    a: Annotated[
        str,
        typer.Argument(help="A result file, a folder, or defense, defense/threat, threat."),
    ],
    b: Annotated[str, typer.Argument(help="The same, to compare with.")],
    results: Results = Path("results"),
    track: Annotated[str | None, typer.Option(help="Of names; not needed if there is one.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare results, defenses or threat models: paired difference, tests, changed images."""
    from dbp_bench.reporting import compare as comparing

    found = comparing.compare(comparing.side(a, results, track), comparing.side(b, results, track))
    if as_json:
        print(json.dumps(comparing.to_table(found), indent=1))
        return
    print("\n".join(comparing.in_words(found)))


@app.command()
def samples(
    files: Annotated[list[Path], typer.Argument(help="Result files.")],
    device: Device = "auto",
    data: Data = None,
    entries: Entries = None,
    trust_code: Trust = False,
    quiet: Quiet = False,
) -> None:
    """Attack the first images of results again: pictures for the report, and a spot check."""
    from dbp_bench.reporting.samples import Samples
    from dbp_bench.runs.pictures import make_samples

    registry, say = registry_of(entries, trust_code, data), console(quiet)
    for file in files:
        path = make_samples(file, registry, device_of(device))
        made = Samples.read(path)
        say.print(
            f"{path}: {made.compared - made.differing} of {made.compared} outcomes as stored",
            highlight=False,
            soft_wrap=True,
        )


@app.command()
def export(
    files: Annotated[list[Path], typer.Argument(help="Result files.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The CSV file to write.")],
) -> None:
    """Write the outcomes of results as CSV, one row per image and draw."""
    from dbp_bench.reporting.report import outcomes_csv

    outcomes_csv(files, out)


@app.command()
def schema() -> None:
    """Print the JSON Schema of a result file."""
    from dbp_bench.result import json_schema

    print(json.dumps(json_schema(), indent=1))
