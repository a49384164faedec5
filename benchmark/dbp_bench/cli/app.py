"""The application that every command is added to, and the options that commands share."""

from pathlib import Path
from typing import Annotated

import typer

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
Seed = Annotated[int, typer.Option("--seed", help="Decides every draw of noise.")]
Out = Annotated[Path, typer.Option("--out", help="The folder of results.")]
Defenses = Annotated[str, typer.Option("--defense", help="Names, separated by commas, or all.")]
Threats = Annotated[str, typer.Option("--threat", help="Names, separated by commas, or all.")]
Examples = Annotated[
    int | None, typer.Option("--examples", help="The first N images of the track.")
]
Draws = Annotated[
    int | None,
    typer.Option("--draws", help="Draws that judge an image; where known, known draws."),
]
Steps = Annotated[int | None, typer.Option("--steps", help="Attack steps.")]
Eot = Annotated[int | None, typer.Option("--eot", help="Gradient draws per attack step.")]
StepSize = Annotated[
    float | None, typer.Option("--step-size", help="Step of the attack, relative to eps.")
]
Loss = Annotated[str | None, typer.Option("--loss", help="ce, margin or dlr, or ce-targeted ...")]
RandomStart = Annotated[
    bool | None,
    typer.Option("--random-start/--no-random-start", help="Start inside the ball."),
]
Restarts = Annotated[int | None, typer.Option("--restarts", help="Searches, the best one kept.")]
Gradient = Annotated[
    str | None,
    typer.Option("--gradient", help="exact, or bpda: how the attack differentiates."),
]
Eps = Annotated[str | None, typer.Option("--eps", help="Budget in [0, 1] units, such as 8/255.")]
BatchSize = Annotated[int | None, typer.Option("--batch-size", help="Images evaluated together.")]
Rows = Annotated[
    int | None, typer.Option("--rows", help="Images x gradient draws in one pass, at most.")
]
Checkpointing = Annotated[
    str,
    typer.Option("--checkpointing", help="auto, none or step: memory against time; same results."),
]
Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help="Where data sets are: a file, a folder, or a folder with one for each data set. "
        "Otherwise DBP_BENCH_DATA, or the Hugging Face hub.",
        show_default=False,
    ),
]
Results = Annotated[Path, typer.Option("--results", help="The folder of results.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts, and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
