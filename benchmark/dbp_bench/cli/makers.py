"""Commands for makers: of defenses, of attacks, of the weights and of this package."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dbp_bench.cli.app import (
    AsJson,
    Data,
    Device,
    Entries,
    Quiet,
    TrackName,
    Trust,
    app,
)
from dbp_bench.cli.shared import console, device_of, percent, progress_bar, registry_of
from dbp_bench.errors import BadRequest

if TYPE_CHECKING:
    from rich.console import Console

    from dbp_bench.checks.gradients import Agreement
    from dbp_bench.reporting.findings import Findings as SweepFindings
    from dbp_bench.runs.job import Job


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
    data: Data = None,
    entries: Entries = None,
    trust_code: Trust = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Look for a weak attack or a masked gradient: more steps, more draws, larger budgets."""
    from functools import partial

    from dbp_bench.runs import sweep as sweeps
    from dbp_bench.runs.execute import execute
    from dbp_bench.runs.job import Overrides

    registry = registry_of(entries, trust_code, data)
    say = console(quiet or as_json)
    overrides = Overrides(examples=examples, draws=draws, batch_size=batch_size)
    common: dict[str, Any] = {"seed": seed, "device": device_of(device), "overrides": overrides}
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
        with progress_bar(say, label) as progress:
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
                percent(None if row.accuracy is None else row.accuracy.model_dump()),
                percent(None if row.fall is None else row.fall.model_dump()),
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


@app.command()
def check(
    defense: Annotated[str, typer.Argument(help="A defense, or all.")],
    track: TrackName = "digits-linf",
    data: Data = None,
    entries: Entries = None,
    trust_code: Trust = False,
) -> None:
    """Run the conformance suite that every defense must pass."""
    from dbp_bench.checks.conformance import check_entry
    from dbp_bench.runs.job import plan

    registry = registry_of(entries, trust_code, data)
    names = [defense]
    if defense == "all":
        from dbp_bench.runs.job import Overrides

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
    data: Data = None,
    entries: Entries = None,
    trust_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Compare each kind of gradient with the exact one, and that with finite differences."""
    from dbp_bench.checks import gradients

    registry = registry_of(entries, trust_code, data)
    asked = gradients.request(
        registry,
        defense,
        track,
        images=images,
        seed=seed,
        loss=loss,
        surrogate_steps=surrogate_steps,
    )
    found = gradients.check(registry, asked, device_of(device))
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
        say = console(False)
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
def doctor(as_json: AsJson = False) -> None:
    """Say what is installed, and run a tiny golden case again."""
    from dbp_bench.checks.doctor import examine, render

    findings = examine()
    print(json.dumps(findings, indent=1) if as_json else render(findings))
    if not findings["ok"]:
        raise typer.Exit(1)
