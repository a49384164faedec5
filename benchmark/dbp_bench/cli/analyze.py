"""The command for analyses: where the robustness of a defense comes from."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dbp_bench.analyses.catalog import NAMES
from dbp_bench.cli.app import (
    DIAGNOSE,
    AsJson,
    Data,
    Device,
    Entries,
    Examples,
    Out,
    Quiet,
    Seed,
    Trust,
    app,
)
from dbp_bench.cli.shared import console, device_of, registry_of, show_json, split
from dbp_bench.errors import BadRequest

if TYPE_CHECKING:
    from dbp_bench.analyses.record import Record


@app.command(rich_help_panel=DIAGNOSE)
def analyze(
    analysis: Annotated[
        str,
        typer.Argument(help=f"{', '.join(NAMES[:-1])} or {NAMES[-1]}."),
    ],
    defense: Annotated[
        str, typer.Option("--defense", help="Names, separated by commas: one figure for all.")
    ],
    track: Annotated[str, typer.Option("--track", help="See `dbp-bench list`.")] = "digits-linf",
    examples: Examples = None,
    seed: Seed = 0,
    out: Out = Path("results"),
    steps: Annotated[int | None, typer.Option("--steps", help="Attack steps.")] = None,
    step_size: Annotated[
        float | None, typer.Option("--step-size", help="Step of the attack, relative to eps.")
    ] = None,
    eot: Annotated[int | None, typer.Option("--eot", help="EoT samples per attack step.")] = None,
    budget: Annotated[
        int | None, typer.Option(help="Gradient evaluations of the standard attack.")
    ] = None,
    known: Annotated[int | None, typer.Option(help="Known draws, each attacked anew.")] = None,
    fresh: Annotated[
        int | None, typer.Option(help="Evaluation draws, which no attack is shown.")
    ] = None,
    draws: Annotated[
        int | None,
        typer.Option(help="immobilise, eot-curve: evaluation draws where nothing is known."),
    ] = None,
    runs: Annotated[
        int | None, typer.Option(help="trajectory: runs of each attack that knows no draw.")
    ] = None,
    points: Annotated[
        int | None, typer.Option(help="landscape: points along each side of the grid.")
    ] = None,
    counts: Annotated[
        str | None, typer.Option(help="eot-curve: EoT samples, such as 1,10,100.")
    ] = None,
    levels: Annotated[
        str | None, typer.Option(help="stochasticity: shares of fresh noise, such as 0,0.5,1.")
    ] = None,
    sets: Annotated[
        int | None, typer.Option(help="efficacy: known draws of the mean gradient.")
    ] = None,
    figure: Annotated[bool, typer.Option(help="Also draw it.")] = True,
    resume: Annotated[
        bool, typer.Option(help="Continue what is there; otherwise throw it away.")
    ] = True,
    device: Device = "auto",
    data: Data = None,
    entries: Entries = None,
    trust_code: Trust = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Analyse where robustness comes from; write numbers (JSON, CSV), a figure (SVG, PNG, PDF)."""
    numbers = {
        "steps": steps,
        "step_size": step_size,
        "eot": eot,
        "budget": budget,
        "known": known,
        "fresh": fresh,
        "draws": draws,
        "runs": runs,
        "points": points,
        "counts": None if counts is None else [int(n) for n in _numbers("--counts", counts)],
        "levels": None if levels is None else _numbers("--levels", levels),
        "sets": sets,
    }
    given = {name: value for name, value in numbers.items() if value is not None}
    from dbp_bench.analyses.analyse import analyse
    from dbp_bench.analyses.record import Record

    say = console(quiet or as_json)
    path = analyse(
        analysis,
        registry_of(entries, trust_code, data),
        track,
        split(defense),
        seed=seed,
        device=device_of(device),
        out=out,
        examples=examples,
        options=given,
        resume=resume,
        say=lambda piece: say.print(f"{analysis}: {piece}", highlight=False),
    )
    written = [path, path.with_suffix(".csv")]
    if figure:
        from dbp_bench.analyses.figures import draw

        written += draw(path)
    record = Record.read(path)
    if as_json:
        show_json(record.model_dump(mode="json", by_alias=True))
        return
    _show(say, record)
    for each in written:
        say.print(str(each), highlight=False, soft_wrap=True)


def _numbers(option: str, text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise BadRequest(f"{option} {text!r}: write numbers, such as 1,2,4.") from None
    if option == "--counts" and any(value != int(value) for value in values):
        raise BadRequest(f"{option} {text!r}: EoT samples are whole numbers.")
    return values


_MOST = 60
"""Rows that a terminal shows; of more, those with a place on the axes are in the files alone."""


def _show(say: Any, record: "Record") -> None:
    from rich.table import Table

    rows = record.rows
    if len(rows) > _MOST:
        say.print(f"{len(rows)} numbers: see the files.", highlight=False)
        rows = [r for r in rows if not r.at]
        if not rows:
            return
    table = Table(box=None, pad_edge=False)
    for name in ("defense", "series", *record.axes, "quantity", "value [95 %]"):
        table.add_column(name)
    for r in rows:
        places = [f"{x:g}" for x in r.at] + [""] * (len(record.axes) - len(r.at))
        interval = "" if r.low is None else f" [{r.low:.3f}, {r.high:.3f}]"
        table.add_row(r.defense, r.series, *places, r.quantity, f"{r.value:.3f}{interval}")
    say.print(table)
