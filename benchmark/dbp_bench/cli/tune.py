"""The command ``tune``: settings of a defense, chosen on validation images."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dbp_bench.cli.app import (
    DIAGNOSE,
    AsJson,
    BatchSize,
    Data,
    Device,
    Draws,
    Entries,
    Examples,
    MaxBatch,
    Out,
    Quiet,
    Seed,
    TrackName,
    Trust,
    app,
)
from dbp_bench.cli.shared import console, device_of, registry_of, show_json
from dbp_bench.errors import BadRequest

if TYPE_CHECKING:
    from rich.console import Console

    from dbp_bench.runs.job import Job
    from dbp_bench.runs.tune import Choice


@app.command(rich_help_panel=DIAGNOSE)
def tune(
    defense: Annotated[str, typer.Argument(help="A defense.")],
    over: Annotated[
        list[str],
        typer.Option(
            metavar="OPTION=VALUES",
            help="An option of the defense, t_star=50,100,150; of several, all combinations.",
        ),
    ],
    track: TrackName = "digits-linf",
    threat: Annotated[str, typer.Option(metavar="NAME", help="A threat model.")] = "eot",
    budget: Annotated[int, typer.Option(help="Gradient evaluations of the standard attack.")] = 100,
    clean: Annotated[
        float,
        typer.Option(
            help="The least clean accuracy that a setting may have, in percent of the base "
            "classifier's."
        ),
    ] = 95.0,
    weights: Annotated[
        Path | None,
        typer.Option(
            help="A folder of weights, such as `dbp-bench train` writes: files in it take the "
            "place of the entries' files of the same name.",
            show_default=False,
        ),
    ] = None,
    seed: Seed = 0,
    out: Out = Path("results"),
    examples: Examples = None,
    draws: Draws = None,
    batch_size: BatchSize = None,
    max_batch: MaxBatch = None,
    device: Device = "auto",
    data: Data = None,
    entries: Entries = None,
    trust_code: Trust = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Choose settings of a defense, by its validation images alone."""
    from dbp_bench.entries.registry import VALIDATION
    from dbp_bench.runs import tune as tuning
    from dbp_bench.runs.execute import execute
    from dbp_bench.runs.job import Overrides, resolve
    from dbp_bench.runs.progress import progress_of_job

    if not 0 <= clean <= 100:
        raise BadRequest(f"--clean {clean:g}: percent, 0 to 100.")
    own = resolve(
        registry_of(entries, trust_code, data),
        track.removesuffix(VALIDATION) + VALIDATION,
        defense,
        threat,
        attack="standard",
        seed=seed,
        device=device_of(device),
        overrides=Overrides(
            effort={"budget": budget},
            draws=draws,
            examples=examples,
            batch_size=batch_size,
            max_batch=max_batch,
        ),
    )
    grid = dict(map(tuning.parse, over))
    say = console(quiet or as_json)

    def run_one(job: "Job", folder: Path) -> Path:
        with progress_of_job(say, job, folder.name) as progress:
            return execute(job, folder, progress=progress)

    choice = tuning.run(tuning.candidates(own, grid, weights), out, run_one, clean / 100)
    if as_json:
        show_json(tuning.to_table(choice))
        return
    _show(say, choice)


def _show(say: "Console", choice: "Choice") -> None:
    from dbp_bench.reporting.rendering import table_of

    numbers = ["clean % [95 %]", "robust % [95 %]", "gain over the entry's [95 %]", "NFE", ""]
    table = table_of(["setting"], numbers)
    for row in choice.tried:
        marks = {
            "entry's": row.candidate.own,
            "clean too low": not row.fit,
            "best": row is choice.best,
            "chosen": row is choice.chosen,
        }
        table.add_row(
            row.candidate.label,
            row.clean.percent(),
            row.robust.percent(),
            "" if row.gain is None else row.gain.percent(sign=True),
            str(row.nfe),
            ", ".join(name for name, holds in marks.items() if holds),
        )
    say.print(table)
