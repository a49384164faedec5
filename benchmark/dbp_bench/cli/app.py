"""The application that every command is added to, and the options that commands share."""

from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from dbp_bench import __version__
from dbp_bench.errors import AttackFailed, BadRequest, place_of

app = typer.Typer(
    name="dbp-bench",
    help="How robust diffusion-based purification is, and where the robustness comes from.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Once(TyperCommand):
    """A command that refuses a second name, place or seed where only the last would count.

    A setting can be given again, as an alias does: the last one counts.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See the base class."""
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for option in order:
            one = not (option.multiple or getattr(option, "is_flag", False))
            setting = getattr(option, "rich_help_panel", None) == CHANGED
            if order.count(option) > 1 and one and not setting:
                raise BadRequest(f"{option.opts[0]}: given twice, and only one would count.")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """See the base class; what ends a command ends it only where this package raises it."""
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.BadParameter) as error:
            if place := place_of(error):
                raise AttackFailed(f"{place}: {type(error).__name__}") from error
            raise


def application() -> typer.Typer:
    """The application with every command."""
    for module in (
        *("list", "run", "certify", "weights", "train"),
        *("report", "check", "sweep", "tune", "analyze"),
        *("new", "submit", "verify", "moved"),
    ):
        # Each adds its commands to the app, whose help shows them in this order.
        import_module(f"dbp_bench.cli.{module}")
    for group in (app, *(held.typer_instance for held in app.registered_groups)):
        for command in group.registered_commands if group else ():
            command.cls = Once
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
_changed = partial(typer.Option, rich_help_panel=CHANGED)
_machine = partial(typer.Option, rich_help_panel=MACHINE)

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
    _changed(
        "--set",
        metavar="NAME=VALUE",
        help="An option of the attack, such as budget=400 or steps=50; can be repeated.",
    ),
]
Effort = Annotated[
    int | None,
    _changed(
        "--budget",
        metavar="N",
        help="Gradient evaluations of the standard attack for each image, or known draw: --set "
        "budget=N.",
    ),
]
Gradient = Annotated[
    str | None,
    _changed(
        "--gradient",
        metavar="KIND",
        help="What the attack differentiates: exact, bpda, surrogate:N, declared-surrogate.",
    ),
]
Eps = Annotated[
    str | None, _changed("--eps", metavar="NUMBER", help="Budget in [0, 1] units, such as 8/255.")
]
Examples = Annotated[int | None, _changed("--examples", help="The first N images of the track.")]
Draws = Annotated[
    int | None, _changed("--draws", help="Draws that evaluate an image; where known, known draws.")
]
BatchSize = Annotated[int | None, _changed("--batch-size", help="Images evaluated together.")]
MaxBatch = Annotated[
    int | None, _changed("--max-batch", help="Images x EoT samples in one pass, at most.")
]

# ------------------------------------------------------------------------------- where and how

Device = Annotated[str, _machine("--device", metavar="NAME", help="auto, cpu or cuda.")]
Checkpointing = Annotated[
    str,
    _machine(
        "--checkpointing",
        metavar="POLICY",
        help="auto, none or step: memory against time; same results.",
    ),
]
Data = Annotated[
    Path | None,
    _machine(
        "--data",
        help="Where data sets are: a file, a folder, or a folder with one for each data set. "
        "Otherwise DBP_BENCH_DATA, or the Hugging Face hub.",
        show_default=False,
    ),
]
Entries = Annotated[
    list[Path] | None,
    _machine(
        "--entries",
        metavar="FOLDER",
        help="With defenses/, attacks/, tracks/ of your own; can be repeated.",
    ),
]
Trust = Annotated[
    bool, _machine("--trust-code", help="Run code that an entry names outside dbp-bench.")
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
NoResume = Annotated[
    bool, typer.Option("--no-resume", help="Replace what is there; otherwise it is continued.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
