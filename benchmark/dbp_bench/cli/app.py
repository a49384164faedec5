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

EVALUATE, REPORT, DIAGNOSE, SHARE = "Evaluate", "Report", "Diagnose", "Share"
"""The groups that commands are shown in."""

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
    typer.Option("--draws", help="Draws that evaluate an image; where known, known draws."),
]
Attack = Annotated[
    str | None,
    typer.Option(
        "--attack",
        help="In place of the threat model's: one of `dbp-bench list attacks`, torchattacks:PGD, "
        "autoattack:rand, or my_package.module:MyAttack.",
        show_default=False,
    ),
]
Options = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="An option of the attack, such as steps=50 or eot=20; can be repeated."
    ),
]
Gradient = Annotated[
    str | None,
    typer.Option(
        "--gradient", help="What the attack differentiates: exact, bpda, surrogate:N, ..."
    ),
]
Eps = Annotated[str | None, typer.Option("--eps", help="Budget in [0, 1] units, such as 8/255.")]
BatchSize = Annotated[int | None, typer.Option("--batch-size", help="Images evaluated together.")]
MaxBatch = Annotated[
    int | None, typer.Option("--max-batch", help="Images x EoT samples in one pass, at most.")
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
Results = Annotated[
    Path,
    typer.Option(
        "--results", help="The folder of results, or hf://datasets/owner/name[/path][@revision]."
    ),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts, and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
