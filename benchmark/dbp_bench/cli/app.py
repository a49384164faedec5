"""The application that every command is added to, and the options that commands share."""

from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from dbp_bench import __version__

app = typer.Typer(
    name="dbp-bench",
    help="How robust diffusion-based purification is, and where the robustness comes from.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def application() -> typer.Typer:
    """The application with every command."""
    for module in (
        *("list", "run", "weights", "train"),
        *("report", "check", "sweep", "analyze"),
        *("new", "submit", "verify", "moved"),
    ):
        # Each adds its commands to the app, whose help shows them in this order.
        import_module(f"dbp_bench.cli.{module}")
    return app


def _version(value: bool) -> None:
    if value:
        print(f"dbp-bench {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say it and exit.")
    ] = False,
) -> None:
    pass


EVALUATE, REPORT, DIAGNOSE, SHARE = "Evaluate", "Report", "Diagnose", "Share"
"""The groups that commands are shown in."""

CHANGED = "Set against the entries, and recorded in the result"
MACHINE = "Where and how it runs"
"""The groups, beside "Options", that the options of a command are shown in."""

# ------------------------------------------------------------------------------ what is measured

Defenses = Annotated[
    str, typer.Option("--defense", metavar="NAMES", help="Separated by commas, or all.")
]
Threats = Annotated[
    str, typer.Option("--threat", metavar="NAMES", help="Separated by commas, or all.")
]
Attack = Annotated[
    str | None,
    typer.Option(
        "--attack",
        metavar="NAME",
        help="In place of the threat model's: see `dbp-bench list attacks`; or "
        "torchattacks:PGD, autoattack:rand, my_package.module:MyAttack.",
        show_default=False,
    ),
]
TrackName = Annotated[
    str, typer.Option("--track", metavar="NAME", help="See `dbp-bench list tracks`.")
]
Seed = Annotated[int, typer.Option("--seed", help="Decides every draw of noise.")]
Out = Annotated[Path, typer.Option("--out", help="The folder of results.")]
Results = Annotated[
    Path,
    typer.Option(
        "--results", help="The folder of results, or hf://datasets/owner/name/path@revision."
    ),
]
ManyResults = Annotated[
    list[Path] | None,
    typer.Option(
        "--results",
        help="The folder of results, or hf://datasets/owner/name/path@revision; can be repeated.",
        show_default="results",
    ),
]

# -------------------------------------------------------------------------- against the entries

Options = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="An option of the attack, such as steps=50 or eot=20; can be repeated.",
        rich_help_panel=CHANGED,
    ),
]
Gradient = Annotated[
    str | None,
    typer.Option(
        "--gradient",
        metavar="KIND",
        help="What the attack differentiates: exact, bpda, surrogate:N, declared-surrogate.",
        rich_help_panel=CHANGED,
    ),
]
Eps = Annotated[
    str | None,
    typer.Option(
        "--eps",
        metavar="NUMBER",
        help="Budget in [0, 1] units, such as 8/255.",
        rich_help_panel=CHANGED,
    ),
]
Examples = Annotated[
    int | None,
    typer.Option("--examples", help="The first N images of the track.", rich_help_panel=CHANGED),
]
Draws = Annotated[
    int | None,
    typer.Option(
        "--draws",
        help="Draws that evaluate an image; where known, known draws.",
        rich_help_panel=CHANGED,
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option("--batch-size", help="Images evaluated together.", rich_help_panel=CHANGED),
]
MaxBatch = Annotated[
    int | None,
    typer.Option(
        "--max-batch",
        help="Images x EoT samples in one pass, at most.",
        rich_help_panel=CHANGED,
    ),
]

# ------------------------------------------------------------------------------- where and how

Device = Annotated[
    str,
    typer.Option("--device", metavar="NAME", help="auto, cpu or cuda.", rich_help_panel=MACHINE),
]
Checkpointing = Annotated[
    str,
    typer.Option(
        "--checkpointing",
        metavar="POLICY",
        help="auto, none or step: memory against time; same results.",
        rich_help_panel=MACHINE,
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help="Where data sets are: a file, a folder, or a folder with one for each data set. "
        "Otherwise DBP_BENCH_DATA, or the Hugging Face hub.",
        show_default=False,
        rich_help_panel=MACHINE,
    ),
]
Entries = Annotated[
    list[Path] | None,
    typer.Option(
        "--entries",
        metavar="FOLDER",
        help="With defenses/, attacks/, tracks/ of your own; can be repeated.",
        rich_help_panel=MACHINE,
    ),
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust-code",
        help="Run code that an entry names outside dbp-bench.",
        rich_help_panel=MACHINE,
    ),
]

# ------------------------------------------------------------------------------ what is printed


def _json_alone(context: typer.Context, asked: bool) -> bool:
    from dbp_bench.cli.shared import json_alone

    if asked and not context.resilient_parsing:
        context.with_resource(json_alone())
    return asked


AsJson = Annotated[
    bool,
    typer.Option("--json", help="Print JSON for scripts, and nothing else.", callback=_json_alone),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
