"""The command ``run``, and the plan of a run."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dbp_bench.cli.app import (
    EVALUATE,
    AsJson,
    Attack,
    BatchSize,
    Checkpointing,
    Data,
    Defenses,
    Device,
    Draws,
    Entries,
    Eps,
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
    duration,
    eps_of,
    options_of,
    percent,
    progress_bar,
    registry_of,
    split,
)
from dbp_bench.errors import AttackFailed, BadRequest

if TYPE_CHECKING:
    from rich.console import Console

    from dbp_bench.entries.fields import Entry
    from dbp_bench.entries.track import Track
    from dbp_bench.result import Result
    from dbp_bench.runs.estimate import Cost
    from dbp_bench.runs.job import Job, Planned


@app.command(rich_help_panel=EVALUATE)
def run(
    context: typer.Context,
    defense: Defenses,
    threat: Threats,
    attack: Attack = None,
    track: TrackName = "digits-linf",
    seed: Seed = 0,
    out: Out = Path("results"),
    device: Device = "auto",
    examples: Examples = None,
    draws: Draws = None,
    options: Options = None,
    gradient: Gradient = None,
    eps: Eps = None,
    batch_size: BatchSize = None,
    max_batch: MaxBatch = None,
    checkpointing: Checkpointing = "auto",
    resume: Annotated[bool, typer.Option(help="Continue what is there.")] = True,
    save_adversarial: Annotated[
        bool, typer.Option("--save-adversarial", help="Also write the adversarial images.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Show the plan: settings, network calls, time and memory here."
        ),
    ] = False,
    data: Data = None,
    entries: Entries = None,
    trust_code: Trust = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Attack defenses and write one result file for each defense, threat model and attack."""
    from dbp_bench.runs.job import Overrides, plan

    registry = registry_of(entries, trust_code, data)
    if checkpointing not in ("auto", "none", "step"):
        raise BadRequest(f"--checkpointing {checkpointing!r}: auto, none or step.")
    planned = plan(
        registry,
        track,
        split(defense),
        split(threat),
        attack=attack,
        seed=seed,
        device=device_of(device),
        overrides=Overrides(
            effort=options_of(options),
            gradient=gradient,
            eps=None if eps is None else eps_of(eps),
            draws=draws,
            examples=examples,
            batch_size=batch_size,
            max_batch=max_batch,
        ),
    )
    say = console(quiet or as_json)
    source = context.get_parameter_source("track")
    default = source is not None and source.name == "DEFAULT"
    _show_head(say, registry.track(track), default)
    if dry_run:
        _plan(say, planned, checkpointing, as_json, out)
        return
    _run_all(
        say,
        planned,
        out,
        checkpointing,
        resume=resume,
        save_adversarial=save_adversarial,
        as_json=as_json,
    )


def _show_head(say: "Console", track: "Entry[Track]", default: bool) -> None:
    chosen = "  (the default track)" if default else ""
    say.print(f"track    {track.name}{chosen}: {track.entry.title}", highlight=False, markup=False)
    if track.entry.demonstration:
        say.print("         a demonstration: never compare its numbers with CIFAR-10", style="dim")


def _run_all(
    say: "Console",
    planned: "Sequence[Planned]",
    out: Path,
    checkpointing: Any,
    *,
    resume: bool,
    save_adversarial: bool,
    as_json: bool,
) -> None:
    from dbp_bench.result import Result
    from dbp_bench.runs.execute import execute, is_complete
    from dbp_bench.runs.replay import adversarial_path

    for item in planned:
        item.job.identity()  # weights that must be fetched are missed before anything has begun
    done: list[tuple[Path, Result]] = []
    for item in planned:
        job = item.job
        elsewhere = item.instead.path(out) if item.instead else None
        if elsewhere is None and resume:
            elsewhere = job.measured_elsewhere(out)
            if elsewhere and save_adversarial and not adversarial_path(elsewhere).is_file():
                elsewhere = None
        if elsewhere is not None:
            sites = ", ".join(job.sites) or "nowhere"
            say.print(
                f"{job.label}: the same setting as {elsewhere.parents[1].name}, since "
                f"{job.subject.name} draws noise at: {sites}. Not run twice; see {elsewhere}",
                highlight=False,
                markup=False,
            )
            if item.instead is None:
                done.append((elsewhere, Result.read(elsewhere)))
            continue
        if resume and not save_adversarial and is_complete(job, out):
            say.print(
                f"{job.label}: all there already, nothing to run (--no-resume runs it again)",
                highlight=False,
                markup=False,
            )
            done.append((job.path(out), Result.read(job.path(out))))
            continue
        with progress_bar(say, job.label) as progress:
            try:
                path = execute(
                    job,
                    out,
                    policy=checkpointing,
                    resume=resume,
                    save_adversarial=save_adversarial,
                    progress=progress,
                )
            except AttackFailed as error:
                raise type(error)(f"{job.label}: {error}") from error
        done.append((path, Result.read(path)))
    _show_results(say, done, as_json)


def _show_results(say: "Console", done: "Sequence[tuple[Path, Result]]", as_json: bool) -> None:
    from rich.table import Table

    from dbp_bench.reporting.pool import accuracies

    rows = [(path, result, asdict(accuracies(result))) for path, result in done]
    if as_json:
        listed = [
            {
                "defense": result.defense,
                "threat": result.threat,
                "attack": result.label,
                "file": str(path),
                "images": len(result.ids),
                "draws": len(result.draws),
                **estimates,
            }
            for path, result, estimates in rows
        ]
        print(json.dumps(listed, indent=1))
        return
    table = Table(box=None, pad_edge=False)
    for name in ("defense", "threat", "attack"):
        table.add_column(name)
    for name in ("clean %", "robust % [95 %]", "fresh draws %", "images", "draws"):
        table.add_column(name, justify="right")
    for _, result, estimates in rows:
        table.add_row(
            result.defense,
            result.threat,
            result.label,
            percent(estimates["clean"]),
            percent(estimates["robust"]),
            percent(estimates["fresh"]),
            str(len(result.ids)),
            str(len(result.draws)),
        )
    say.print(table)
    if any(result.knows for _, result, _ in rows):
        say.print(
            "robust: on the draws that the attacker knew. fresh draws: the same images on draws "
            "that no attacker was shown.",
            style="dim",
        )
    for path, _, _ in rows:
        say.print(str(path), highlight=False, soft_wrap=True)


def _plan(
    say: "Console",
    planned: "Sequence[Planned]",
    checkpointing: Any,
    as_json: bool,
    out: Path,
) -> None:
    from rich.table import Table

    from dbp_bench.runs.estimate import estimate

    costs: list[tuple[Job, Job | None, Cost | None]] = []
    for item in planned:
        cost = None if item.instead else estimate(item.job, out, checkpointing)
        costs.append((item.job, item.instead, cost))
    total = sum(cost.seconds for _, _, cost in costs if cost)
    if as_json:
        rows = [
            {
                **job.identity(planned=True),
                "examples": job.examples,
                "draws": job.draws,
                "same_setting_as": twin.threat.name if twin else None,
                "cost": None if cost is None else cost.as_dict(),
            }
            for job, twin, cost in costs
        ]
        print(json.dumps({"jobs": rows, "seconds": total}, indent=1))
        return
    table = Table(box=None, pad_edge=False)
    for name in ("defense", "threat", "attack", "knows", "effort"):
        table.add_column(name)
    for name in ("images", "draws", "network calls", "time", "memory"):
        table.add_column(name, justify="right")
    for job, twin, cost in costs:
        effort = " ".join(
            f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}"
            for k, v in job.search.effort.items()
            if v is not None
        )
        head = [
            job.subject.name,
            job.threat.name,
            job.search.label,
            ", ".join(job.knows) or "nothing",
            effort,
        ]
        if cost is None:
            same = f"= {twin.threat.name}" if twin else ""
            table.add_row(*head, str(job.examples), str(job.draws), same, "", "")
            continue
        table.add_row(
            *head,
            str(job.examples),
            str(job.draws),
            f"{'at most ' if cost.at_most else ''}{cost.calls:,}",
            duration(cost.seconds),
            f"{cost.bytes / 2**20:,.0f} MiB{' by step' if cost.by_step else ''}",
        )
    say.print(table)
    for job, _, _ in costs[:1]:
        say.print(
            f"{job.subject.track.entry.norm} eps {job.eps:g}, seed {job.seed}, {job.device}; "
            f"groups of {job.batch_size} images, at most {job.max_batch} images x samples a pass.",
            highlight=False,
        )
    _show_limits(say, [(job, cost) for job, _, cost in costs if cost is not None])
    known = [cost.at_most for _, _, cost in costs if cost is not None]
    sooner = ", or less: images may finish early" if any(known) else ""
    say.print(
        f"about {duration(total)} in all on this device{sooner}. Network calls: images x calls, "
        "forward; those of the attack are followed by as many backward.",
        highlight=False,
    )


def _show_limits(say: "Console", costs: "Sequence[tuple[Job, Cost]]") -> None:
    """What stands between the plan and the run."""
    for job, cost in costs:
        if not cost.fits:
            smaller = max(1, job.max_batch * cost.free_bytes // max(1, cost.bytes))
            say.print(
                f"{job.label}: does not fit: {cost.free_bytes / 2**20:,.0f} MiB are free on "
                f"{job.device}. Try --max-batch {smaller}.",
                highlight=False,
                soft_wrap=True,
            )
    missing = list(dict.fromkeys(name for _, cost in costs for name in cost.random_weights))
    if missing:
        say.print(
            f"timed with random weights: {', '.join(missing)} not in the cache. "
            "`dbp-bench weights list` says where they are from.",
            highlight=False,
            soft_wrap=True,
        )
