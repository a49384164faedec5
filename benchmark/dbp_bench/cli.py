"""The command line. Thin: heavy imports are inside the verbs, and no user's mistake is a traceback.

Exit codes: 0 done; 1 a check failed; 2 the request, an entry or a file is wrong; 3 an attack or a
defense failed while running; 130 stopped (the same command continues).
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dbp_bench import __version__
from dbp_bench.errors import AttackFailed, BadRequest, DbpError, UnknownName, did_you_mean

if TYPE_CHECKING:
    from rich.console import Console

    from dbp_bench.gradients import Agreement
    from dbp_bench.job import Job, Planned
    from dbp_bench.registry import Entry, Registry
    from dbp_bench.result import Result
    from dbp_bench.run import Progress
    from dbp_bench.sweep import Findings as SweepFindings

app = typer.Typer(
    name="dbp-bench",
    help="How robust diffusion-based purification is, and where the robustness comes from.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Entries = Annotated[
    list[Path] | None,
    typer.Option("--entries", help="A folder with defenses/, attacks/, tracks/ of your own."),
]
Trust = Annotated[
    bool, typer.Option("--trust-code", help="Run code that an entry names outside dbp-bench.")
]
TrackName = Annotated[str, typer.Option("--track", help="See `dbp-bench list`.")]
Results = Annotated[Path, typer.Option("--results", help="The folder of results.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts, and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]


def main() -> None:
    """Entry point of the ``dbp-bench`` command."""
    signal.signal(signal.SIGTERM, _interrupt)
    # One thread, unless the user says otherwise: the operations on small images are too short to
    # share. More threads sleep while they wait: beside other jobs, spinning is 15 times slower.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        _invoke()
    except AttackFailed as error:
        _fail(str(error), 3)
    except DbpError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail("stopped. The same command continues where this one was.", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        _fail(f"{error.filename or 'input/output'}: {error.strerror or error}.", 2)


def _invoke() -> None:
    try:
        app(standalone_mode=True)
    except SystemExit as stop:
        if stop.code == 130:  # typer's way to say that it was interrupted
            raise KeyboardInterrupt from None
        raise


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _fail(message: str, code: int) -> None:
    print(f"dbp-bench: {message}", file=sys.stderr)
    sys.exit(code)


def _version(value: bool) -> None:
    if value:
        print(f"dbp-bench {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="And exit.")
    ] = False,
) -> None:
    pass


# ------------------------------------------------------------------------------------ what there is


@app.command("list")
def list_entries(
    kind: Annotated[str | None, typer.Argument(help="defenses, threats or tracks.")] = None,
    entries: Entries = None,
    as_json: AsJson = False,
) -> None:
    """List defenses, threat models and tracks."""
    registry = _registry(entries)
    readers: dict[str, tuple[dict[str, Path], Callable[[str], Entry[Any]]]] = {
        "defenses": (registry.defenses, registry.defense),
        "threats": (registry.threats, registry.threat),
        "tracks": (registry.tracks, registry.track),
    }
    if kind is not None and kind not in readers:
        raise UnknownName(f"no list {kind!r}.{did_you_mean(kind, readers)}")
    titles = {
        what: {name: read(name).entry.title for name in names}
        for what, (names, read) in readers.items()
        if kind in (None, what)
    }
    if as_json:
        print(json.dumps(titles, indent=1))
        return
    for what, names in titles.items():
        print(f"{what}")
        width = max(map(len, names), default=0)
        for name, title in names.items():
            print(f"  {name:<{width}}  {title}")


@app.command()
def describe(
    name: Annotated[str, typer.Argument(help="A defense, a threat model or a track.")],
    entries: Entries = None,
) -> None:
    """Show what an entry says, and the file it is in."""
    registry = _registry(entries)
    found = [
        entry
        for names, read in (
            (registry.defenses, registry.defense),
            (registry.threats, registry.threat),
            (registry.tracks, registry.track),
        )
        if name in names
        for entry in [read(name)]
    ]
    if not found:
        known = [*registry.defenses, *registry.threats, *registry.tracks]
        raise UnknownName(f"no entry {name!r}.{did_you_mean(name, known)}")
    for entry in found:
        print(f"# {entry.path}  (sha256 {entry.sha256[:16]}...)")
        print(entry.path.read_text(encoding="utf-8").rstrip())


# --------------------------------------------------------------------------------------------- run


@app.command()
def run(
    context: typer.Context,
    defense: Annotated[str, typer.Option(help="Names, separated by commas, or all.")],
    threat: Annotated[str, typer.Option(help="Names, separated by commas, or all.")],
    track: TrackName = "digits-linf",
    seed: Annotated[int, typer.Option(help="Decides every draw of noise.")] = 0,
    out: Annotated[Path, typer.Option(help="The folder of results.")] = Path("results"),
    device: Device = "auto",
    examples: Annotated[int | None, typer.Option(help="The first N images of the track.")] = None,
    draws: Annotated[
        int | None, typer.Option(help="Draws that judge an image; where known, known draws.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Attack steps.")] = None,
    eot: Annotated[int | None, typer.Option(help="Gradient draws per attack step.")] = None,
    step_size: Annotated[
        float | None, typer.Option(help="Step of the attack, relative to eps.")
    ] = None,
    loss: Annotated[str | None, typer.Option(help="ce, margin or dlr.")] = None,
    random_start: Annotated[bool | None, typer.Option(help="Start inside the ball.")] = None,
    restarts: Annotated[int | None, typer.Option(help="Searches, the best one kept.")] = None,
    gradient: Annotated[
        str | None, typer.Option(help="exact, or bpda: how the attack differentiates.")
    ] = None,
    eps: Annotated[str | None, typer.Option(help="Budget in [0, 1] units, such as 8/255.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images evaluated together.")] = None,
    rows: Annotated[
        int | None, typer.Option(help="Images x gradient draws in one pass, at most.")
    ] = None,
    checkpointing: Annotated[
        str, typer.Option(help="auto, none or step: memory against time; same results.")
    ] = "auto",
    resume: Annotated[bool, typer.Option(help="Continue what is there.")] = True,
    save_adversarial: Annotated[
        bool, typer.Option("--save-adversarial", help="Also write the adversarial images.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="The same as `dbp-bench plan`.")
    ] = False,
    entries: Entries = None,
    trust_code: Trust = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Attack defenses and write one result file for each defense and threat model."""
    from dbp_bench.job import Overrides, plan

    registry = _registry(entries, trust_code)
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
        eps=None if eps is None else _eps(eps),
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
        _split(defense),
        _split(threat),
        seed=seed,
        device=_device(device),
        overrides=overrides,
    )
    say = _console(quiet or as_json)
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
    defense: Annotated[str, typer.Option(help="Names, separated by commas, or all.")] = "all",
    threat: Annotated[str, typer.Option(help="Names, separated by commas, or all.")] = "all",
    track: TrackName = "digits-linf",
    seed: Annotated[int, typer.Option(help="Decides every draw of noise.")] = 0,
    out: Annotated[Path, typer.Option(help="The folder of results.")] = Path("results"),
    device: Device = "auto",
    examples: Annotated[int | None, typer.Option(help="The first N images of the track.")] = None,
    draws: Annotated[int | None, typer.Option(help="Draws that judge an image.")] = None,
    steps: Annotated[int | None, typer.Option(help="Attack steps.")] = None,
    eot: Annotated[int | None, typer.Option(help="Gradient draws per attack step.")] = None,
    step_size: Annotated[
        float | None, typer.Option(help="Step of the attack, relative to eps.")
    ] = None,
    loss: Annotated[str | None, typer.Option(help="ce, margin or dlr.")] = None,
    random_start: Annotated[bool | None, typer.Option(help="Start inside the ball.")] = None,
    restarts: Annotated[int | None, typer.Option(help="Searches, the best one kept.")] = None,
    eps: Annotated[str | None, typer.Option(help="Budget in [0, 1] units, such as 8/255.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images evaluated together.")] = None,
    rows: Annotated[int | None, typer.Option(help="Images x gradient draws in one pass.")] = None,
    checkpointing: Annotated[str, typer.Option(help="auto, none or step.")] = "auto",
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
        eps=eps,
        batch_size=batch_size,
        rows=rows,
        checkpointing=checkpointing,
        dry_run=True,
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
    from dbp_bench.job import measured_elsewhere
    from dbp_bench.result import Result
    from dbp_bench.run import adversarial_path, execute, is_complete

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
        with _progress(say, job.label) as progress:
            path = execute(
                job,
                registry,
                out,
                policy=checkpointing,
                resume=resume,
                save_adversarial=save_adversarial,
                progress=progress,
            )
        done.append((path, Result.read(path)))
    _show_results(say, done, as_json)


@contextmanager
def _progress(say: "Console", label: str) -> "Iterator[Progress]":
    """A bar with the time that is left, on a terminal; a line at start and end elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    from dbp_bench.run import Progress

    if not say.is_terminal or say.quiet:
        yield Progress(
            start=lambda total: say.print(f"{label}: {total} image gradients", highlight=False)
        )
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("image gradients"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=say, transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield Progress(
            start=lambda total: bar.update(task, total=total),
            tick=lambda rows: bar.advance(task, rows),
        )


def _show_results(say: "Console", done: "Sequence[tuple[Path, Result]]", as_json: bool) -> None:
    from rich.table import Table

    from dbp_bench.report import accuracies

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
            _percent(estimates["clean"]),
            _percent(estimates["robust"]),
            _percent(estimates["fresh"]),
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


def _percent(estimate: "dict[str, float] | None") -> str:
    if estimate is None:
        return ""
    value, low, high = (100 * estimate[key] for key in ("value", "low", "high"))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def _plan(
    say: "Console",
    planned: "Sequence[Planned]",
    registry: "Registry",
    checkpointing: Any,
    as_json: bool,
    out: Path,
) -> None:
    from rich.table import Table

    from dbp_bench.estimate import Cost, estimate

    costs: list[tuple[Job, Job | None, Cost | None]] = []
    for item in planned:
        cost = None if item.instead else estimate(item.job, registry, out, checkpointing)
        costs.append((item.job, item.instead, cost))
    total = sum(cost.seconds for _, _, cost in costs if cost)
    if as_json:
        rows = [
            {
                **job.identity(),
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
            f"{cost.calls:,}",
            _duration(cost.seconds),
            f"{cost.bytes / 2**20:,.0f} MiB{' by step' if cost.by_step else ''}",
        )
    say.print(table)
    for job, _, _ in costs[:1]:
        say.print(
            f"{job.track.entry.norm} eps {job.eps:g}, seed {job.seed}, {job.device}; groups of "
            f"{job.batch_size} images, at most {job.rows} rows in one pass.",
            highlight=False,
        )
    say.print(
        f"about {_duration(total)} in all on this device. Network calls: images x calls, forward; "
        "those of the attack are followed by as many backward.",
        highlight=False,
    )


def _duration(seconds: float) -> str:
    if seconds < 1:
        return "under 1 s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


@app.command()
def judge(
    file: Annotated[Path, typer.Argument(help="A file that --save-adversarial wrote.")],
    draws: Annotated[int, typer.Option(help="Fresh draws, that no attacker was shown.")] = 9,
    eight_bit: Annotated[
        bool, typer.Option("--8bit", help="As a file of 256 grey levels would hold them.")
    ] = False,
    device: Device = "auto",
    entries: Entries = None,
    trust_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Check saved adversarial images (inside ball and box) and judge them on fresh draws."""
    from dbp_bench.job import Overrides, identity_of, refuse_other_request, resolve
    from dbp_bench.result import Result
    from dbp_bench.run import adversarial_path, rejudge
    from dbp_bench.statistics import Bootstrap

    if draws < 1:
        raise BadRequest(f"--draws {draws}: must be 1 or more.")
    stem = file.stem.removeprefix("adversarial-")
    result = Result.read(file.with_name(f"{stem}.json"))
    if adversarial_path(file.with_name(f"{stem}.json")) != file:
        raise BadRequest(f"{file}: not a file of adversarial images beside its result.")
    registry = _registry(entries, trust_code)
    asked = Overrides(
        effort={k: v for k, v in result.effort.items() if k in result.overrides},
        eps=result.eps,
        draws=len(result.draws) if result.sites else None,
        examples=len(result.ids),
        batch_size=result.arithmetic.batch_size,
        rows=result.arithmetic.rows,
    )
    job = resolve(
        registry,
        result.track,
        result.defense,
        result.threat,
        seed=result.seed,
        device=_device(device),
        overrides=asked,
    )
    held = {**identity_of(result), "device": job.device}
    refuse_other_request(job.identity(), held, file)
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
        f"{_percent(estimate)} % right over {draws} fresh draws."
    )
    if eight_bit:
        print(
            f"Judged as rounded to k/255: that took {outside} of {len(right) * len(ids)} images "
            "out of the ball, by at most half a level a pixel; those were projected onto it."
        )


@app.command()
def sweep(
    defense: Annotated[str, typer.Argument(help="A defense.")],
    threat: Annotated[str, typer.Option(help="A threat model.")],
    over: Annotated[
        list[str] | None,
        typer.Option(help="steps=20,40,100, eot=1,10,40 or eps=0.1,0.2,0.5; can be repeated."),
    ] = None,
    black_box: Annotated[
        str | None,
        typer.Option(
            help="A threat without gradients to compare with (square if it is there), or none."
        ),
    ] = None,
    track: TrackName = "digits-linf",
    seed: Annotated[int, typer.Option(help="Decides every draw of noise.")] = 0,
    out: Annotated[Path, typer.Option(help="The folder of results.")] = Path("results"),
    examples: Annotated[int | None, typer.Option(help="The first N images of the track.")] = None,
    draws: Annotated[int | None, typer.Option(help="Draws that judge an image.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images evaluated together.")] = None,
    device: Device = "auto",
    entries: Entries = None,
    trust_code: Trust = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Look for a weak attack or a masked gradient: more steps, more draws, larger budgets."""
    from functools import partial

    from dbp_bench import sweep as sweeps
    from dbp_bench.job import Overrides
    from dbp_bench.run import execute

    registry = _registry(entries, trust_code)
    say = _console(quiet or as_json)
    overrides = Overrides(examples=examples, draws=draws, batch_size=batch_size)
    common: dict[str, Any] = {"seed": seed, "device": _device(device), "overrides": overrides}
    if black_box is None and "square" in registry.threats:
        black_box = "square"
    black_box = None if black_box == "none" else black_box
    planned = [
        sweeps.plan(registry, track, defense, threat, *sweeps.parse(text), **common)
        for text in over or []
    ]
    if black_box is not None:
        planned.append(sweeps.against(registry, track, defense, threat, black_box, **common))
    if not planned:
        raise BadRequest("--over names nothing. Write it as steps=20,40,100.")

    def run_one(label: str, job: "Job", folder: Path) -> Path:
        with _progress(say, label) as progress:
            return execute(job, registry, folder, progress=progress)

    found = [
        sweeps.run(item, out, partial(run_one, f"{defense} / {threat} / {item.axis}"))
        for item in planned
    ]
    if as_json:
        print(json.dumps([item.model_dump(mode="json", by_alias=True) for item in found], indent=1))
        return
    _show_sweeps(say, found)


def _show_sweeps(say: "Console", found: "Sequence[SweepFindings]") -> None:
    from rich.table import Table

    for item in found:
        table = Table(box=None, pad_edge=False)
        for name in (item.axis, "robust % [95 %]", "falls by [95 %]", "zero gradient %"):
            table.add_column(name, justify="right")
        for row in item.values:
            mark = " *" if row.value == item.standard else ""
            table.add_row(
                f"{row.value if isinstance(row.value, str) else f'{row.value:g}'}{mark}",
                _percent(None if row.accuracy is None else row.accuracy.model_dump()),
                _percent(None if row.fall is None else row.fall.model_dump()),
                "" if row.zero_gradient is None else f"{100 * row.zero_gradient:.1f}",
            )
        say.print(table)
        for flag in item.flags:
            say.print(f"FLAG {flag.name}: {flag.message}.", highlight=False, soft_wrap=True)
        for note in item.notes:
            say.print(f"undecided: {note}.", highlight=False, soft_wrap=True)
        if not item.flags and not item.notes:
            say.print("no flag.", highlight=False)
    say.print("* as the threat model says. falls by: from there, on the same images.", style="dim")


# ------------------------------------------------------------------------------------------ results


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
    """Make leaderboards (CSV, Markdown, LaTeX) from results."""
    from dbp_bench.report import write_leaderboards

    if sort not in ("hidden", "known"):
        raise BadRequest(f"--sort {sort!r}: hidden or known.")
    registry = _registry(entries)
    paths = write_leaderboards(
        results, out, track, sort="known" if sort == "known" else "hidden", registry=registry
    )
    say = _console(quiet)
    for path in paths:
        say.print(str(path), highlight=False)


@app.command()
def export(
    files: Annotated[list[Path], typer.Argument(help="Result files.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The CSV file to write.")],
) -> None:
    """Write the outcomes of results as CSV, one row per image and draw."""
    from dbp_bench.report import outcomes_csv

    outcomes_csv(files, out)


@app.command()
def schema() -> None:
    """Print the JSON Schema of a result file."""
    from dbp_bench.result import json_schema

    print(json.dumps(json_schema(), indent=1))


# ---------------------------------------------------------------------------------- for the makers


@app.command()
def check(
    defense: Annotated[str, typer.Argument(help="A defense, or all.")],
    track: TrackName = "digits-linf",
    entries: Entries = None,
    trust_code: Trust = False,
) -> None:
    """Run the conformance suite that every defense must pass."""
    from dbp_bench.conformance import check_entry
    from dbp_bench.job import plan

    registry = _registry(entries, trust_code)
    names = [defense]
    if defense == "all":
        from dbp_bench.job import Overrides

        jobs = plan(registry, track, ["all"], ["eot"], seed=0, device="cpu", overrides=Overrides())
        names = [item.job.defense.name for item in jobs]
    failed = False
    for name in names:
        for title, fault in check_entry(registry, name, track):
            failed |= fault is not None
            print(f"{'FAIL' if fault else 'pass'}  {name}: {title}{f': {fault}' if fault else ''}")
    if failed:
        raise typer.Exit(1)


@app.command("check-grad")
def check_grad(
    defense: Annotated[str, typer.Argument(help="A defense.")],
    track: TrackName = "digits-linf",
    images: Annotated[int, typer.Option(help="The first N images of the track.")] = 16,
    seed: Annotated[int, typer.Option(help="Decides every draw of noise.")] = 0,
    loss: Annotated[str, typer.Option(help="ce, margin or dlr.")] = "ce",
    surrogate_steps: Annotated[
        int | None, typer.Option(help="Steps of the surrogate; half of the defense's if not given.")
    ] = None,
    device: Device = "auto",
    entries: Entries = None,
    trust_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Compare each kind of gradient with the exact one, and that with finite differences."""
    from dbp_bench import gradients

    registry = _registry(entries, trust_code)
    asked = gradients.request(
        registry,
        defense,
        track,
        images=images,
        seed=seed,
        loss=loss,
        surrogate_steps=surrogate_steps,
    )
    found = gradients.check(registry, asked, _device(device))
    if as_json:
        head = {
            "defense": defense,
            "track": track,
            "images": images,
            "seed": seed,
            "loss": loss,
            "dtype": "float64",
            "steps": asked.steps,
            "surrogate_steps": asked.surrogate_steps,
            "exact": found.exact,
        }
        print(json.dumps({**head, **asdict(found)}, indent=1))
    else:
        say = _console(False)
        short = asked.surrogate_steps
        names = {"surrogate": f"surrogate, {short} of {asked.steps} steps"}
        say.print(
            f"{defense} on {track}: {loss} gradients at the first {images} images, unattacked; "
            f"float64, seed {seed}.",
            highlight=False,
        )
        rows = [(names.get(row.mode, row.mode), row) for row in found.modes]
        rows += [("exact, other draws (noise floor)", row) for row in found.noise_floor]
        _show_agreement(say, rows)
        errors = ", ".join(
            "no gradient" if error is None else f"{error:.1e}" for error in found.difference_errors
        )
        say.print(
            f"exact against central differences, relative error by image: {errors}"
            f"{'' if found.exact else '  FAIL'}",
            highlight=False,
        )
    if not found.exact:
        raise typer.Exit(1)


def _show_agreement(say: "Console", rows: "Sequence[tuple[str, Agreement]]") -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("gradient")
    for name in ("draws", "cosine [95 %]", "equal signs % [95 %]", "images"):
        table.add_column(name, justify="right")
    for name, row in rows:
        cosine = row.cosine
        table.add_row(
            name,
            str(row.draws),
            "" if cosine is None else f"{cosine.value:.3f} [{cosine.low:.3f}, {cosine.high:.3f}]",
            "" if row.sign is None else row.sign.percent(),
            str(row.images),
        )
    say.print(table)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="classifier, diffusion, addt, or all.")],
    out: Annotated[Path, typer.Option(help="Where the weights go.")] = Path("weights"),
    seed: Annotated[int, typer.Option(help="Decides initial weights, batches and noise.")] = 0,
    track: TrackName = "digits-linf",
    quiet: Quiet = False,
) -> None:
    """Train the weights that ship with the package again, by their committed recipes."""
    from dbp_bench.training.recipes import RECIPES
    from dbp_bench.training.recipes import run as train_recipe

    names = list(RECIPES) if recipe == "all" else [recipe]
    if names[0] not in RECIPES:
        raise UnknownName(f"no recipe {recipe!r}.{did_you_mean(recipe, [*RECIPES, 'all'])}")
    if not track.startswith("digits-"):
        raise BadRequest(f"--track {track}: recipes are there for digits-linf and digits-l2.")
    say = _console(quiet)
    for name in names:

        def progress(update: int, total: int, loss: float, name: str = name) -> None:
            if update % max(1, total // 10) == 0:
                say.print(f"{name}: {update}/{total} updates, loss {loss:.4f}", highlight=False)

        made = train_recipe(name, out, seed, progress)
        facts = ", ".join(f"{key.replace('_', ' ')} {v:.4f}" for key, v in made.facts.items())
        say.print(
            f"{made.path}  sha256 {made.sha256}  {made.seconds:.0f} s  {facts}", highlight=False
        )


@app.command()
def bench(
    device: Device = "auto",
    repeats: Annotated[int, typer.Option(help="Rounds; the median ratio is printed.")] = 7,
    as_json: AsJson = False,
) -> None:
    """Measure attack steps against a hand-written loop, as ratios within this run."""
    from dbp_bench.bench import measure, render

    table = measure(_device(device), repeats)
    print(json.dumps(table, indent=1) if as_json else render(table))


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what is installed, and run a tiny golden case again."""
    from dbp_bench.doctor import examine, render

    findings = examine()
    print(json.dumps(findings, indent=1) if as_json else render(findings))
    if not findings["ok"]:
        raise typer.Exit(1)


# ------------------------------------------------------------------------------------------ helpers


def _registry(entries: list[Path] | None, trust_code: bool = False) -> "Registry":
    from dbp_bench.registry import Registry

    return Registry(entries or [], trust_code=trust_code)


def _console(quiet: bool) -> "Console":
    from rich.console import Console

    console = Console(quiet=quiet)
    # A log has no width of its own: don't fold its tables at 80.
    return console if console.is_terminal else Console(quiet=quiet, width=140)


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def _eps(text: str) -> float:
    from dbp_bench.registry import number

    try:
        return number(text)
    except ValueError:
        raise BadRequest(f"--eps {text!r}: not a number such as 0.2 or 8/255.") from None


def _device(name: str) -> str:
    if name == "cpu":
        return name
    if name not in ("auto", "cuda"):
        raise BadRequest(f"--device {name!r}: auto, cpu or cuda.")
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if name == "cuda":
        raise BadRequest("--device cuda: this torch sees no GPU; `dbp-bench doctor` tells more.")
    return "cpu"
