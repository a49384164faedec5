"""The command ``sweep``: one attack at several efforts or budgets."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dbp_bench.cli.app import (
    DIAGNOSE,
    AsJson,
    Attack,
    BatchSize,
    Data,
    Device,
    Draws,
    Entries,
    Examples,
    Gradient,
    MaxBatch,
    Options,
    Out,
    Quiet,
    Seed,
    Threats,
    TrackName,
    Trust,
    app,
)
from dbp_bench.cli.shared import (
    console,
    device_of,
    overrides_of,
    registry_of,
    show_json,
    split,
)
from dbp_bench.errors import BadRequest

if TYPE_CHECKING:
    from rich.console import Console

    from dbp_bench.reporting.findings import Findings
    from dbp_bench.runs.job import Job


@app.command(rich_help_panel=DIAGNOSE)
def sweep(
    defense: Annotated[
        str, typer.Argument(metavar="DEFENSES", help="Separated by commas, or all.")
    ],
    threat: Threats,
    attack: Attack = None,
    over: Annotated[
        list[str] | None,
        typer.Option(
            metavar="AXIS=VALUES",
            help="budget=400, eps=0.1,0.2,0.5, or any number among the attack's options; can be "
            "repeated.",
        ),
    ] = None,
    black_box: Annotated[
        str,
        typer.Option(
            metavar="ATTACK", help="An attack without gradients to compare with, or none."
        ),
    ] = "square",
    track: TrackName = "digits-linf",
    seed: Seed = 0,
    out: Out = Path("results"),
    options: Options = None,
    gradient: Gradient = None,
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
    """Look for a weak attack or a masked gradient: more effort, larger eps."""
    from dbp_bench.checks.record import Memo
    from dbp_bench.runs import sweep as sweeps
    from dbp_bench.runs.execute import execute
    from dbp_bench.runs.job import plan, resolve
    from dbp_bench.runs.progress import progress_of_job

    registry = registry_of(entries, trust_code, data)
    say = console(quiet or as_json)
    overrides = overrides_of(
        options,
        gradient=gradient,
        draws=draws,
        examples=examples,
        batch_size=batch_size,
        max_batch=max_batch,
    )
    if not over and black_box == "none":
        raise BadRequest("--over names nothing. Write it as budget=400.")
    axes = [sweeps.parse(text) for text in over or []]
    device = device_of(device)
    planned: list[sweeps.Sweep] = []
    for item in plan(
        registry,
        track,
        split(defense),
        split(threat),
        attack=attack,
        seed=seed,
        device=device,
        overrides=overrides,
    ):
        job = item.job
        if item.instead is not None or (split(threat) == ["all"] and job.eps == 0):
            continue  # measured under another name, or nothing that an attack could change
        names = (track, job.subject.name, job.threat.name)
        one = partial(resolve, registry, *names, seed=seed, device=device)
        planned += [sweeps.plan(one, attack, overrides, *axis) for axis in axes]
        if black_box != "none":
            planned.append(sweeps.against(one, attack, overrides, black_box))

    memo = Memo()

    def run_one(job: "Job", folder: Path) -> Path:
        with progress_of_job(say, job, folder.name) as progress:
            return execute(job, folder, progress=progress, memo=memo)

    found = [sweeps.run(item, out, run_one) for item in planned]
    if as_json:
        show_json([item.model_dump(mode="json", by_alias=True) for item in found])
        return
    _show_sweeps(say, found)


def _show_sweeps(say: "Console", found: "Sequence[Findings]") -> None:
    from dbp_bench.reporting.rendering import table_of
    from dbp_bench.runs.sweep import shown

    for item in found:
        say.print(f"{item.defense} / {item.setting}")
        table = table_of([], [item.axis, "robust % [95 %]", "falls by [95 %]", "zero gradient %"])
        for row in item.values:
            mark = " *" if row.value == item.standard else ""
            table.add_row(
                f"{shown(row.value)}{mark}",
                "" if row.accuracy is None else row.accuracy.percent(),
                "" if row.fall is None else row.fall.percent(),
                "" if row.zero_gradient is None else f"{100 * row.zero_gradient:.1f}",
            )
        say.print(table)
        for flag in item.flags:
            say.print(f"FLAG {flag.name}: {flag.message}.", soft_wrap=True)
        for note in item.notes:
            say.print(f"undecided: {note}.", soft_wrap=True)
        if not item.flags and not item.notes:
            say.print("no flag.")
    say.print("* as the threat model says. falls by: from there, on the same images.", style="dim")
