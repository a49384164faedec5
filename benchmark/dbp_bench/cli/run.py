"""The command ``run``, and the plan of a run."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
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
    Effort,
    Entries,
    Eps,
    Examples,
    Gradient,
    MaxBatch,
    NoResume,
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
    overrides_of,
    registry_of,
    show_json,
    show_random_weights,
    split,
)
from dbp_bench.errors import AttackFailed, BadRequest, BadResult, NotConforming

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from dbp_bench.entries.fields import Entry
    from dbp_bench.entries.registry import Registry
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
    options: Options = None,
    budget: Effort = None,
    gradient: Gradient = None,
    eps: Eps = None,
    examples: Examples = None,
    draws: Draws = None,
    batch_size: BatchSize = None,
    max_batch: MaxBatch = None,
    device: Device = "auto",
    checkpointing: Checkpointing = "auto",
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only say what would run: NFE, time and memory."),
    ] = False,
    save_adversarial: Annotated[
        bool, typer.Option("--save-adversarial", help="Also write the adversarial images.")
    ] = False,
    no_resume: NoResume = False,
    data: Data = None,
    entries: Entries = None,
    trust_code: Trust = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Attack defenses; write a result for each, under each threat model."""
    from dbp_bench.runs.job import bases, plan

    registry = registry_of(entries, trust_code, data)
    if checkpointing not in ("auto", "none", "step"):
        raise BadRequest(f"--checkpointing {checkpointing!r}: auto, none or step.")
    planning = partial(
        plan,
        registry,
        track,
        threats=split(threat),
        attack=attack,
        seed=seed,
        device=device_of(device),
        overrides=overrides_of(
            options,
            eps,
            budget,
            gradient=gradient,
            draws=draws,
            examples=examples,
            batch_size=batch_size,
            max_batch=max_batch,
        ),
    )
    planned = planning(defenses=split(defense))
    say = console(quiet or as_json)
    source = context.get_parameter_source("track")
    default = source is not None and source.name == "DEFAULT"
    _show_head(say, registry.track(track), default)
    if split(threat) == ["all"]:
        names = list(dict.fromkeys(item.job.subject.name for item in planned))
        for base in bases(registry, track, names):
            if base not in names:
                planned += _base(say, base, planning, out)
    if dry_run:
        _plan(say, planned, checkpointing, as_json, out)
        return
    _run_all(
        say,
        planned,
        registry,
        out,
        checkpointing,
        resume=not no_resume,
        save_adversarial=save_adversarial,
        as_json=as_json,
    )


def _base(
    say: "Console", base: str, planning: "Callable[..., list[Planned]]", out: Path
) -> "list[Planned]":
    """The missing jobs of the classifier alone, the zero of a defense's scale."""
    from dbp_bench.runs.execute import is_wanted

    try:
        planned = planning(defenses=[base])
    except BadRequest as error:
        say.print(f"{base}: not run along as the base classifier. {error}", soft_wrap=True)
        return []
    wanted = [item for item in planned if item.instead is None and is_wanted(item.job, out)]
    if wanted:
        say.print(f"base     {base}: run along, once, as the zero of the scale (R_0)")
    return wanted


def _show_head(say: "Console", track: "Entry[Track]", default: bool) -> None:
    chosen = "  (the default track)" if default else ""
    say.print(f"track    {track.name}{chosen}: {track.entry.title}")
    if track.entry.demonstration:
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
    from dbp_bench.checks.record import Memo
    from dbp_bench.runs.execute import execute, is_complete
    from dbp_bench.runs.job import why_same
    from dbp_bench.runs.progress import progress_of_job
    from dbp_bench.runs.saved import adversarial_path
    from dbp_bench.writing import Busy

    for item in planned:
        item.job.identity()  # weights that must be fetched are missed before anything has begun
        if not resume and item.instead is None:
            _keep_larger(item.job, out)
    memo = Memo()
    done: list[tuple[Path, Result]] = []
    busy: list[Planned] = []

    def measure(item: "Planned", *, wait: bool = False) -> None:
        job = item.job
        elsewhere = item.instead.path(out) if item.instead else None
        if elsewhere is None and resume:
            elsewhere = job.measured_elsewhere(out)
            if elsewhere and save_adversarial and not adversarial_path(elsewhere).is_file():
                elsewhere = None
        if elsewhere is not None:
            name = elsewhere.parents[1].name
            threat = registry.threat(name).entry if name in registry.threats else None
            say.print(
                f"{job.label}: the same setting as {name}, since {why_same(job, threat)}. Not run "
                f"twice; see {elsewhere}",
                soft_wrap=True,
            )
            if item.instead is None:
                done.append((elsewhere, _held(say, job, elsewhere)))
            return
        if resume and not save_adversarial and is_complete(job, out):
            say.print(
                f"{job.label}: all there already, nothing to run (--no-resume runs it again)",
                soft_wrap=True,
            )
            done.append((job.path(out), _held(say, job, job.path(out))))
            return
        with progress_of_job(say, job) as progress:
            try:
                path = execute(
                    job,
                    out,
                    policy=checkpointing,
                    resume=resume or wait,  # what another command has just made is not made again
                    save_adversarial=save_adversarial,
                    wait=wait,
                    progress=progress,
                    memo=memo,
                )
            except (AttackFailed, NotConforming) as error:
                raise type(error)(f"{job.label}: {error}") from error
        done.append((path, _held(say, job, path)))

    refused = None
    for item in planned:
        try:
            measure(item)
        except Busy as error:
            refused = error
            busy.append(item)
    if refused and not done:
        raise refused
    for item in busy:
        say.print(f"{item.job.label}: another command runs it; waiting for that one.")
        measure(item, wait=True)
    _show_results(say, done, as_json)


def _held(say: "Console", job: "Job", path: Path) -> "Result":
    """The result at `path`; where it is of more than `job` asks for, that is said."""
    from dbp_bench.result import Result

    held = Result.read(path)
    if len(held.ids) > job.examples or len(held.draws) > job.draws:
        say.print(
            f"{job.label}: {_size(job.examples, job.draws)} asked; the row below is of all that is "
            f"there, {_size(len(held.ids), len(held.draws))}. For fewer, choose another --out.",
            soft_wrap=True,
        )
    return held


def _size(images: int, draws: int) -> str:
    return f"{images} images x {draws} draws"


def _keep_larger(job: "Job", out: Path) -> None:
    """Ask before a larger result is replaced, and refuse where nobody can be asked.

    Raises:
        BadRequest: It stays.
    """
    from dbp_bench.result import Result

    path = job.path(out)
    try:
        held = Result.read(path) if path.is_file() else None
    except BadResult:
        return  # a damaged one is what --no-resume is for
    if held is None or (len(held.ids) <= job.examples and len(held.draws) <= job.draws):
        return
    said = (
        f"--no-resume would replace {path}, of {_size(len(held.ids), len(held.draws))}, by "
        f"{_size(job.examples, job.draws)}"
    )
    if not (sys.stdin.isatty() and typer.confirm(f"{said}. Replace it?", err=True)):
        raise BadRequest(f"{said}. Choose another --out, or delete the file.")


def _show_results(say: "Console", done: "Sequence[tuple[Path, Result]]", as_json: bool) -> None:
    from dbp_bench.reporting.outcomes import KNOWN, outcome_table, remarks
    from dbp_bench.reporting.pool import accuracies
    from dbp_bench.reporting.sanity import doubts

    rows = [(path, result, accuracies(result)) for path, result in done]
    if as_json:
        listed = [
            {
                "defense": result.defense,
                "threat": result.threat,
                "attack": result.label,
                "file": str(path),
                "images": len(result.ids),
                "draws": len(result.draws),
                **asdict(estimates),
                "doubts": doubts(result),
            }
            for path, result, estimates in rows
        ]
        show_json(listed)
        return
    results = [result for _, result, _ in rows]
    say.print("", outcome_table(results), "", sep="\n")
    if any(result.knows for result in results):
        say.print(KNOWN, style="dim")
    for remark in remarks(results):
        say.print(remark, soft_wrap=True)
    for path, _, _ in rows:
        say.print(str(path), soft_wrap=True)


def _plan(
    say: "Console",
    planned: "Sequence[Planned]",
    checkpointing: Any,
    as_json: bool,
    out: Path,
) -> None:
    from dbp_bench.runs.estimate import estimate
    from dbp_bench.runs.execute import is_complete

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
                "cost": None if cost is None else asdict(cost),
            }
            for job, twin, cost in costs
        ]
        show_json({"jobs": rows, "seconds": total})
        return
    from dbp_bench.reporting.rendering import table_of

    table = table_of(["defense", "threat", "knows"], ["images", "draws", "NFE", "time", "memory"])
    for job, twin, cost in costs:
        known = "all" if job.knows == job.sites else ", ".join(job.knows)
        head = [job.subject.name, job.threat.name, known if job.knows else "nothing"]
        head += [str(job.examples), str(job.draws)]
        if cost is None:
            table.add_row(*head, f"= {twin.threat.name}" if twin else "", "", "")
            continue
        table.add_row(
            *head,
            f"{'at most ' if cost.at_most and cost.nfe else ''}{cost.nfe:,}",
            "all there" if is_complete(job, out) else duration(cost.seconds),
            f"{cost.bytes / 2**20:,.0f} MiB{' *' if cost.by_step else ''}",
        )
    say.print("", table, "", sep="\n")
    say.print(_plan_in_words([job for job, _, _ in costs]))
    known_costs = [(job, cost) for job, _, cost in costs if cost is not None]
    _show_limits(say, known_costs)
    early = any(cost.at_most for _, cost in known_costs)
    said = f"total    {duration(total)} on this device"
    if early:
        said += ", or less: images may finish early"
    if any(getattr(job.attack(), "without_gradient", False) for job, _ in known_costs):
        said += ", and a search without gradients is only for those whose gradient is zero"
    say.print(said)
    say.print(
        "NFE: of all images and evaluations, forward; those of gradients are followed "
        "by as many backward.",
        style="dim",
    )
    if any(cost.by_step for _, cost in known_costs):
        say.print("* with gradients checkpointed by step.", style="dim")


def _plan_in_words(jobs: "Sequence[Job]") -> "Table":
    """Each attack with all its options and the threat models that take it, then the budget."""
    from rich.table import Table

    attacks: dict[str, list[str]] = {}
    for job in jobs:
        options = ", ".join(f"{name}={_as_set(v)}" for name, v in job.search.effort.items())
        said = f"{job.search.label}: {options}; gradient {job.search.gradient or 'none'}"
        attacks.setdefault(said, []).append(job.threat.name)
    lines = Table.grid(padding=(0, 2, 0, 0))
    lines.add_column(min_width=7)
    for number, (said, threats) in enumerate(attacks.items()):
        of = f"  ({', '.join(dict.fromkeys(threats))})" if len(attacks) > 1 else ""
        lines.add_row("attack" if number == 0 else "", said + of)
    one = jobs[0]
    sizes = " and ".join(f"{eps:g}" for eps in dict.fromkeys(job.eps for job in jobs))
    lines.add_row(
        "run",
        f"{one.norm} eps {sizes}, seed {one.seed}, {one.device}; groups of {one.batch_size} "
        f"images, at most {one.max_batch} images x samples in a pass",
    )
    return lines


def _as_set(value: object) -> str:
    """A value as ``--set`` takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def _show_limits(say: "Console", costs: "Sequence[tuple[Job, Cost]]") -> None:
    """Say what stands between the plan and the run."""
    large: dict[tuple[str, str], list[str]] = {}
    for job, cost in costs:
        if not cost.fits:
            passes = min(job.max_batch, job.batch_size * job.samples)
            smaller = max(1, passes * cost.free_bytes // cost.bytes)
            free = f"{cost.free_bytes / 2**20:,.0f} MiB are free on {job.device}"
            why = f"does not fit: {free}. Try --max-batch {smaller}."
            large.setdefault((job.subject.name, why), []).append(job.threat.name)
    for (name, why), threats in large.items():
        say.print(f"{name} ({', '.join(threats)}) {why}", soft_wrap=True)
    show_random_weights(say, (name for _, cost in costs for name in cost.random_weights))
