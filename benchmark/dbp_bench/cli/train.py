"""The command that trains: classifiers, diffusion models, and what defenses make of them."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from dbp_bench.cli.app import EVALUATE, Data, Device, Entries, Quiet, TrackName, app
from dbp_bench.cli.shared import console, device_of, options_of, registry_of
from dbp_bench.errors import BadRequest

if TYPE_CHECKING:
    from dbp_bench.training.given import Given


@app.command(rich_help_panel=EVALUATE)
def train(
    recipe: Annotated[
        str,
        typer.Argument(
            help="classifier, noisy-classifier, diffusion, conditional (told the class), addt, "
            "clean-finetune, mse-guided, addt-linf, adbm, flow, flow-pgd or consistency; for the "
            "digits also all: the weights that ship."
        ),
    ],
    track: TrackName = "digits-linf",
    network: Annotated[
        str | None,
        typer.Option(help="A name or a size: published, small (trials), tiny (one core)."),
    ] = None,
    init: Annotated[
        str | None, typer.Option(help="Weights to start from: a file, or a checkpoint's name.")
    ] = None,
    classifier: Annotated[
        str | None, typer.Option(help="The classifier that guides: a file, or a checkpoint's name.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the weights go.")] = Path("weights"),
    seed: Annotated[int, typer.Option(help="Decides initial weights, batches and noise.")] = 0,
    updates: Annotated[int | None, typer.Option(help="In place of the recipe's.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images per update, of all processes together.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="In place of the recipe's.")] = None,
    constants: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="A constant of the recipe, such as lambda_unit=0.1; can be repeated.",
        ),
    ] = None,
    precision: Annotated[str, typer.Option(help="fp32, or bf16: autocast.")] = "fp32",
    compile_: Annotated[bool, typer.Option("--compile", help="By torch.compile.")] = False,
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="The memory layout of a GPU's convolutions.")
    ] = False,
    hold_out: Annotated[
        bool,
        typer.Option(
            "--hold-out",
            help="Without the validation images, to choose settings on them: the digits are else "
            "trained on all.",
        ),
    ] = False,
    resume: Annotated[
        bool, typer.Option(help="Continue where the same command was stopped, or start anew.")
    ] = True,
    checkpoint_every: Annotated[int, typer.Option(help="Updates between two checkpoints.")] = 200,
    device: Device = "auto",
    data: Data = None,
    entries: Entries = None,
    quiet: Quiet = False,
) -> None:
    """Train weights by a seeded recipe; with several GPUs, under torchrun --no-python."""
    from dbp_bench.data import load_data
    from dbp_bench.runs.progress import progress
    from dbp_bench.training import recipes
    from dbp_bench.training.distributed import launched
    from dbp_bench.training.loop import Options, Precision
    from dbp_bench.training.run import run
    from dbp_bench.writing import locked

    if precision not in get_args(Precision):
        raise BadRequest(f"--precision {precision!r}: fp32 or bf16.")
    name = _data_set(track, entries)
    names = recipes.SHIPPED if recipe == "all" and name == "digits" else (recipe,)
    objective = options_of(constants)
    planned = [
        replace(
            recipes.with_objective(recipes.recipe(one, name, network), objective),
            hold_out=hold_out and name == "digits",
        )
        for one in names
    ]
    if classifier is not None and not set(names) & set(recipes.GUIDED):
        raise BadRequest(
            f"--classifier: {recipe} takes none. Recipes that do: {', '.join(recipes.GUIDED)}."
        )
    starts = _given(init, "init"), _given(classifier, "classifier")
    images = load_data(name, data, "train")
    if name == "digits" and device == "auto":
        device = "cpu"  # where the weights that ship were made
    with launched(device_of(device)) as (group, place), ExitStack() as stack:
        say = console(quiet or group.rank > 0)
        options = Options(
            seed=seed,
            device=place,
            precision="bf16" if precision == "bf16" else "fp32",
            compile=compile_,
            channels_last=channels_last,
            resume=resume,
            checkpoint_every=checkpoint_every,
            group=group,
        )
        if group.rank == 0:
            stack.enter_context(locked(out / ".train", what="training"))
        for plan in planned:
            made = recipes.changed(
                plan,
                len(plan.ids(images)),
                iterations=updates,
                batch_size=batch_size,
                learning_rate=learning_rate,
            )
            with progress(say, plan.name, "updates", lines=10) as tick:
                trained = run(
                    made, images, out, options, tick, init=starts[0], classifier=starts[1]
                )
            if trained is None:
                continue
            facts = ", ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in trained.facts.items())
            say.print(
                f"{trained.path}  sha256 {trained.sha256}  {trained.seconds:.0f} s  {facts}",
                highlight=False,
            )


def _data_set(track: str, entries: list[Path] | None) -> str:
    """The data set of a track, or the one that is named; tracks can be made of what is trained."""
    from dbp_bench.data import names

    registry = registry_of(entries)
    if track in registry.tracks:
        found = registry.track(track).entry.data
        if isinstance(found, str):
            return found
        raise BadRequest(
            f"--track {track}: it has images of one's own; networks are trained on "
            f"{', '.join(names())}."
        )
    for name in names():
        if track in (name, f"{name}-linf", f"{name}-l2"):
            return name
    raise BadRequest(
        f"--track {track}: no such track or data set. "
        f"Known: {', '.join(sorted({*registry.tracks, *names()}))}."
    )


def _given(text: str | None, option: str) -> "Given | None":
    """A file of weights, or a checkpoint in the cache."""
    from dbp_bench.training.given import Given
    from dbp_bench.weights import catalog, store

    if text is None:
        return None
    path = Path(text)
    if path.suffix or path.exists():
        return Given.file(path)
    try:
        entry = catalog.find(text)
    except Exception as error:
        raise BadRequest(f"--{option} {text}: no such file; and {error}") from None
    from dbp_bench.weights.build import build

    network = build(text)
    held = {k: v.detach() for k, v in network.state_dict().items()}
    return Given(text, store.read(text).sha256, held, {"catalog": entry.title}, network)
