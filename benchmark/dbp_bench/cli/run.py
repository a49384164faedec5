"""Commands that attack: run, and plan, which says what that would take."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dbp_bench.cli.app import (
    AsJson,
    BatchSize,
    Checkpointing,
    Data,
    Defenses,
    Device,
    Draws,
    Entries,
    Eot,
    Eps,
    Examples,
    Gradient,
    Loss,
    Out,
    Quiet,
    RandomStart,
    Restarts,
    Rows,
    Seed,
    Steps,
    StepSize,
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
    percent,
    progress_bar,
    registry_of,
    split,
)
from dbp_bench.errors import AttackFailed, BadRequest

if TYPE_CHECKING:
    from rich.console import Console

    from dbp_bench.entries.registry import Registry
    from dbp_bench.result import Result
    from dbp_bench.runs.estimate import Cost
    from dbp_bench.runs.job import Job, Planned


@app.command()
def run(
    context: typer.Context,
    defense: Defenses,
    threat: Threats,
    track: TrackName = "digits-linf",
    seed: Seed = 0,
    out: Out = Path("results"),
    device: Device = "auto",
    examples: Examples = None,
    draws: Draws = None,
    steps: Steps = None,
    eot: Eot = None,
    step_size: StepSize = None,
    loss: Loss = None,
    random_start: RandomStart = None,
    restarts: Restarts = None,
    gradient: Gradient = None,
    eps: Eps = None,
    batch_size: BatchSize = None,
    rows: Rows = None,
    checkpointing: Checkpointing = "auto",
    resume: Annotated[bool, typer.Option(help="Continue what is there.")] = True,
    save_adversarial: Annotated[
        bool, typer.Option("--save-adversarial", help="Also write the adversarial images.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="The same as `dbp-bench plan`.")
    ] = False,
    data: Data = None,
    entries: Entries = None,
    trust_code: Trust = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Attack defenses and write one result file for each defense and threat model."""
    from dbp_bench.runs.job import Overrides, plan

    registry = registry_of(entries, trust_code, data)
    given = {
        "steps": steps,
        "eot": eot,
        "step_size": step_size,
        "loss": loss,
        "random_start": random_start,
        "restarts": restarts,
        "gradient": gradient,
    }
    overrides = Overrides(
        effort={key: value for key, value in given.items() if value is not None},
        eps=None if eps is None else eps_of(eps),
        draws=draws,
        examples=examples,
        batch_size=batch_size,
        rows=rows,
    )
    if checkpointing not in ("auto", "none", "step"):
        raise BadRequest(f"--checkpointing {checkpointing!r}: auto, none or step.")
    planned = plan(
        registry,
        track,
        split(defense),
        split(threat),
        seed=seed,
        device=device_of(device),
        overrides=overrides,
    )
    say = console(quiet or as_json)
    source = context.get_parameter_source("track")
    default = source is not None and source.name == "DEFAULT"
    _show_head(say, registry, track, default)
    if dry_run:
        _plan(say, planned, registry, checkpointing, as_json, out)
        return
    _run_all(
        say,
        planned,
        registry,
        out,
        checkpointing,
        resume=resume,
        save_adversarial=save_adversarial,
        as_json=as_json,
    )


@app.command()
def plan(
    context: typer.Context,
    defense: Defenses = "all",
    threat: Threats = "all",
    track: TrackName = "digits-linf",
    seed: Seed = 0,
    out: Out = Path("results"),
    device: Device = "auto",
    examples: Examples = None,
    draws: Draws = None,
    steps: Steps = None,
    eot: Eot = None,
    step_size: StepSize = None,
    loss: Loss = None,
    random_start: RandomStart = None,
    restarts: Restarts = None,
    gradient: Gradient = None,
    eps: Eps = None,
    batch_size: BatchSize = None,
    rows: Rows = None,
    checkpointing: Checkpointing = "auto",
    data: Data = None,
    entries: Entries = None,
    trust_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Show what a run would do: settings, network calls, time and memory on this device."""
    run(
        context,
        defense=defense,
        threat=threat,
        track=track,
        seed=seed,
        out=out,
        device=device,
        examples=examples,
        draws=draws,
        steps=steps,
        eot=eot,
        step_size=step_size,
        loss=loss,
        random_start=random_start,
        restarts=restarts,
        gradient=gradient,
        eps=eps,
        batch_size=batch_size,
        rows=rows,
        checkpointing=checkpointing,
        dry_run=True,
        data=data,
        entries=entries,
        trust_code=trust_code,
        as_json=as_json,
    )


def _show_head(say: "Console", registry: "Registry", track: str, default: bool) -> None:
    entry = registry.track(track).entry
    chosen = "  (the default track)" if default else ""
    say.print(f"track    {track}{chosen}: {entry.title}", highlight=False)
    if entry.demonstration:
        say.print("         a demonstration: never compare its numbers with CIFAR-10", style="dim")


def _run_all(
    say: "Console",
    planned: "Sequence[Planned]",
    registry: "Registry",
    out: Path,
    checkpointing: Any,
    *,
    resume: bool,
    save_adversarial: bool,
    as_json: bool,
) -> None:
    from dbp_bench.result import Result
    from dbp_bench.runs.execute import execute, is_complete
    from dbp_bench.runs.job import measured_elsewhere
    from dbp_bench.runs.saved import adversarial_path

    for item in planned:
        item.job.identity()  # weights that must be fetched are missed before anything has begun
    done: list[tuple[Path, Result]] = []
    for item in planned:
        job = item.job
        twin = item.instead or (measured_elsewhere(job, registry, out) if resume else None)
        if twin and not item.instead and save_adversarial:
            twin = twin if adversarial_path(twin.path(out)).is_file() else None
        if twin is not None:
            sites = ", ".join(job.sites) or "nowhere"
            say.print(
                f"{job.label}: the same setting as {twin.threat.name}, since {job.defense.name} "
                f"draws noise at: {sites}. Not run twice; see {twin.path(out)}",
                highlight=False,
            )
            if item.instead is None:
                done.append((twin.path(out), Result.read(twin.path(out))))
            continue
        if resume and not save_adversarial and is_complete(job, out):
            say.print(
                f"{job.label}: all there already, nothing to run (--no-resume runs it again)",
                highlight=False,
            )
            done.append((job.path(out), Result.read(job.path(out))))
            continue
        with progress_bar(say, job.label) as progress:
            try:
                path = execute(
                    job,
                    registry,
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

    from dbp_bench.reporting.report import accuracies

    rows = [(path, result, asdict(accuracies(result))) for path, result in done]
    if as_json:
        listed = [
            {
                "defense": result.defense,
                "threat": result.threat,
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
    for name in ("defense", "threat"):
        table.add_column(name)
    for name in ("clean %", "robust % [95 %]", "fresh draws %", "images", "draws"):
        table.add_column(name, justify="right")
    for _, result, estimates in rows:
        table.add_row(
            result.defense,
            result.threat,
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
    registry: "Registry",
    checkpointing: Any,
    as_json: bool,
    out: Path,
) -> None:
    from rich.table import Table

    from dbp_bench.runs.estimate import estimate

    costs: list[tuple[Job, Job | None, Cost | None]] = []
    for item in planned:
        cost = None if item.instead else estimate(item.job, registry, out, checkpointing)
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
    for name in ("defense", "threat", "knows", "effort"):
        table.add_column(name)
    for name in ("images", "draws", "network calls", "time", "memory"):
        table.add_column(name, justify="right")
    for job, twin, cost in costs:
        effort = " ".join(
            f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}"
            for k, v in job.effort.items()
            if v is not None
        )
        head = [job.defense.name, job.threat.name, ", ".join(job.knows) or "nothing", effort]
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
            f"{job.track.entry.norm} eps {job.eps:g}, seed {job.seed}, {job.device}; groups of "
            f"{job.batch_size} images, at most {job.rows} rows in one pass.",
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
            rows = max(1, job.rows * cost.free_bytes // max(1, cost.bytes))
            say.print(
                f"{job.label}: does not fit: {cost.free_bytes / 2**20:,.0f} MiB are free on "
                f"{job.device}. Try --rows {rows}.",
                highlight=False,
                soft_wrap=True,
            )
    missing = list(dict.fromkeys(name for _, cost in costs for name in cost.made_up))
    if missing:
        say.print(
            f"timed with made-up weights: {', '.join(missing)} not in the cache. "
            "`dbp-bench weights list` says where they are from.",
            highlight=False,
            soft_wrap=True,
        )
