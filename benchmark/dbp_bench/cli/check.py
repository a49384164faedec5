"""The command ``check``: of a defense, of its gradient, and of this installation."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dbp_bench.cli.app import (
    DIAGNOSE,
    AsJson,
    Data,
    Device,
    Entries,
    TrackName,
    Trust,
    app,
)
from dbp_bench.cli.shared import console, device_of, registry_of, show, show_json
from dbp_bench.errors import BadRequest

if TYPE_CHECKING:
    from dbp_bench.checks.gradients import Findings

GRADIENTS = "With --gradients"
"""The group that options of the comparison of gradients are shown in."""


@app.command(rich_help_panel=DIAGNOSE)
def check(
    defense: Annotated[
        str | None, typer.Argument(help="A defense, or all.", show_default=False)
    ] = None,
    track: TrackName = "digits-linf",
    gradients: Annotated[
        bool,
        typer.Option(
            "--gradients", help="Compare each kind of gradient with the exact one, in float64."
        ),
    ] = False,
    environment: Annotated[
        bool,
        typer.Option(
            "--environment", help="Say what is installed, and run a tiny golden case again."
        ),
    ] = False,
    images: Annotated[
        int, typer.Option(help="The first N images of the track.", rich_help_panel=GRADIENTS)
    ] = 16,
    seed: Annotated[
        int, typer.Option(help="Decides every draw of noise.", rich_help_panel=GRADIENTS)
    ] = 0,
    loss: Annotated[
        str,
        typer.Option(metavar="NAME", help="ce, margin or dlr.", rich_help_panel=GRADIENTS),
    ] = "ce",
    surrogate_steps: Annotated[
        int | None,
        typer.Option(
            help="Steps of the surrogate; half of the defense's if not given.",
            rich_help_panel=GRADIENTS,
        ),
    ] = None,
    device: Device = "auto",
    data: Data = None,
    entries: Entries = None,
    trust_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Test a defense against the rules that every defense must keep.

    Exit code 1: a test failed.
    """
    if environment:
        from dbp_bench.checks.environment import examine, render

        findings = examine()
        if as_json:
            show_json(findings)
        else:
            show(render(findings))
        if not findings["ok"]:
            raise typer.Exit(1)
        return
    if defense is None:
        raise BadRequest("name a defense, or all; or add --environment.")
    registry = registry_of(entries, trust_code, data)
    if gradients:
        from dbp_bench.checks.gradients import check as measure

        subject = registry.subject(defense, track)
        found, short = measure(
            subject,
            images=images,
            seed=seed,
            loss=loss,
            surrogate_steps=surrogate_steps,
            device=device_of(device),
        )
        asked = {"defense": defense, "track": track, "images": images, "seed": seed, "loss": loss}
        asked |= {"dtype": "float64", "steps": subject.setting.replaceable.get("steps")}
        asked["surrogate_steps"] = short
        if as_json:
            show_json({**asked, "exact": found.exact, **asdict(found)})
        else:
            _show_gradients(asked, found)
        if not found.exact:
            raise typer.Exit(1)
        return
    names = [defense]
    if defense == "all":
        registry.check_names("defenses")
        names = registry.defenses_of(track)
    from dbp_bench.checks.conformance import NOT_TESTED, check_subject

    faults = {name: dict(check_subject(registry.subject(name, track))) for name in names}
    if as_json:
        show_json(faults)
    else:
        for name, tests in faults.items():
            for title, fault in tests.items():
                verdict = "FAIL" if fault else "pass"
                if fault and fault.startswith(NOT_TESTED):
                    verdict = "----"
                show(f"{verdict}  {name}: {title}{f': {fault}' if fault else ''}")
    if any(fault for tests in faults.values() for fault in tests.values()):
        raise typer.Exit(1)


def _show_gradients(asked: "dict[str, Any]", found: "Findings") -> None:
    from rich.table import Table

    say = console(False)
    say.print(
        f"{asked['defense']} on {asked['track']}: {asked['loss']} gradients at the first "
        f"{asked['images']} images, unattacked; float64, seed {asked['seed']}."
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("gradient")
    for name in ("draws", "cosine [95 %]", "equal signs % [95 %]", "images"):
        table.add_column(name, justify="right")
    shorter = f"surrogate, {asked['surrogate_steps']} of {asked['steps']} steps"
    rows = [(shorter if row.mode == "surrogate" else row.mode, row) for row in found.modes]
    rows += [("exact, other draws (noise floor)", row) for row in found.noise_floor]
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
    errors = ", ".join(
        "no gradient" if error is None else f"{error:.1e}" for error in found.difference_errors
    )
    say.print(
        f"exact against central differences, relative error by image: {errors}"
        f"{'' if found.exact else '  FAIL'}",
    )
