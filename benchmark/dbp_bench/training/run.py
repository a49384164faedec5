"""Train one recipe: read what it needs, run the loop, write weights, a card and a log."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor, nn

from dbp_bench.data import DataSet
from dbp_bench.data.catalog import facts_of
from dbp_bench.errors import AttackFailed, BadRequest, BadWeights
from dbp_bench.memory import is_exhausted
from dbp_bench.noise import Tape, seeded
from dbp_bench.result import write_atomically
from dbp_bench.training import diffusion, variants
from dbp_bench.training.checkpoint import Checkpoint, metadata
from dbp_bench.training.distributed import Group
from dbp_bench.training.journal import Journal
from dbp_bench.training.loop import Batch, Precision, train
from dbp_bench.training.processes import DDPM
from dbp_bench.training.recipes import GUIDED, Recipe
from dbp_bench.training.state import Settings
from dbp_bench.weights.files import ASSETS, digest, fill, load

HEADER = "dbp-bench"
"""Where the header of a weights file says what it is."""

_CHUNK = 512


class Update(NamedTuple):
    """How far a run is."""

    number: int
    total: int
    loss: float
    images_per_s: float | None
    """Of all processes together; None between two lines of the log."""


Progress = Callable[[Update], None]


@dataclass(frozen=True, slots=True)
class Options:
    """How a recipe is run; what isn't said in the log's request changes rounding at most."""

    seed: int = 0
    device: torch.device = torch.device("cpu")  # noqa: RUF009
    precision: Precision = "fp32"
    compile: bool = False
    channels_last: bool = False
    resume: bool = True
    checkpoint_every: int = 200
    group: Group = Group()  # noqa: RUF009


@dataclass(frozen=True, slots=True)
class Given:
    """Weights that a recipe starts from, or a classifier that guides it."""

    label: str
    """Of messages: a path, or the name of a checkpoint."""
    sha256: str
    tensors: dict[str, Tensor]
    header: dict[str, Any]
    """What the file says of itself; empty where it says nothing."""
    network: nn.Module | None = None
    """Where it isn't one of the recipes' networks."""

    @classmethod
    def file(cls, path: Path) -> "Given":
        """A safetensors file.

        Raises:
            BadWeights: It isn't there, or isn't one.
        """
        if not path.is_file():
            raise BadWeights(f"{path}: there is no such file.")
        return cls(str(path), digest(path), load(path), metadata(path, HEADER))


@dataclass(frozen=True, slots=True)
class Trained:
    """What a recipe made."""

    path: Path
    sha256: str
    seconds: float
    facts: dict[str, float]
    """Measured on images that it wasn't trained on."""


def run(
    recipe: Recipe,
    data: DataSet,
    out: Path,
    options: Options,
    progress: Progress,
    *,
    init: Given | None = None,
    classifier: Given | None = None,
) -> Trained | None:
    """Train `recipe` and write its weights, a model card and a log to `out`.

    A run that was stopped continues from its checkpoint in `out`; one that is finished is not
    done again. Weights of earlier recipes are taken from `out` if they are there, else from the
    package, unless `init` or `classifier` is given.

    Args:
        recipe: With its iterations counted; see :func:`dbp_bench.training.recipes.changed`.
        data: Its data set.
        out: A folder.
        options: How to run it.
        progress: Called after each update.
        init: Weights to start from.
        classifier: The classifier that guides.

    Returns:
        What was made; None in all processes of a group but the first, which writes.

    Raises:
        AttackFailed: The loss became NaN; the device's memory doesn't do, or torch.compile failed.
        BadRequest: The classifier doesn't fit the data set; the checkpoint is of another request;
            an option is out of range.
        BadWeights: Weights are missing, damaged, or of another network or noise schedule.
    """
    settings = _checked(recipe, options)
    writes = options.group.rank == 0
    path = out / recipe.file
    if init is None and recipe.init:
        init = Given.file(_found(recipe, out, recipe.init, "init"))
    if classifier is None and recipe.classifier:
        classifier = Given.file(_found(recipe, out, recipe.classifier, "classifier"))
    request = _request(recipe, options, init, classifier)
    journal = Journal(path.with_suffix(".jsonl"), request, max(1, settings.iterations // 1000))
    if options.resume and (made := _finished(journal, path)):
        return made if writes else None
    checkpoint = Checkpoint(
        path.with_suffix(".checkpoint.safetensors"),
        options.checkpoint_every,
        request,
        resume=options.resume,
        writes=writes,
    )

    with seeded(options.seed):
        network = variants.build(recipe.variant.path)
    if init:
        _start_from(network, init, recipe)
    network = options.group.joined(network.to(options.device))
    guide = _classifier(recipe, classifier, options) if recipe.name in GUIDED else None
    if options.channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images, labels = _held(data, recipe.data, options.device)

    start = time.perf_counter()
    started = False

    def report(update: int, loss: float, rate: float) -> None:
        nonlocal started
        speed = None
        if writes:
            if not started:
                journal.start(update - 1, start)
                started = True
            speed = journal.add(update, loss, rate, settings.batch_size)
        progress(Update(update, settings.iterations, loss, speed))

    # float32 means float32: no shortened products in convolutions.
    torch.backends.cudnn.allow_tf32 = False
    with _in_words(options, checkpoint):
        values = train(
            network,
            _loss(recipe, _compiled(network, options), guide),
            images,
            labels,
            settings,
            seed=options.seed,
            owner=recipe.name,
            report=report,
            group=options.group,
            checkpoint=checkpoint,
            precision=options.precision,
        )
    if not writes:
        return None
    seconds = time.perf_counter() - start
    write_atomically(path, _packed(values, recipe))
    fill(network, load(path), path)
    facts = _measure(network.eval(), data, recipe, options.device)
    trained = Trained(path, digest(path), seconds, facts)
    write_atomically(path.with_suffix(".md"), _card(recipe, trained, options.seed, len(images)))
    journal.finish({"sha256": trained.sha256, "seconds": seconds, "facts": facts})
    checkpoint.drop()
    return trained


# -------------------------------------------------------------------------------- what it needs


def _checked(recipe: Recipe, options: Options) -> Settings:
    settings = Settings(**recipe.settings)
    if settings.iterations < 1:
        raise BadRequest(f"--updates {settings.iterations}: 1 or more.")
    if settings.batch_size < options.group.size:
        raise BadRequest(
            f"--batch-size {settings.batch_size}: {options.group.size} processes share a batch; "
            "give each an image or more."
        )
    if not 0 < settings.learning_rate < float("inf"):
        raise BadRequest(f"--learning-rate {settings.learning_rate}: a number above 0.")
    if options.checkpoint_every < 1:
        raise BadRequest(f"--checkpoint-every {options.checkpoint_every}: 1 or more.")
    return settings


def _found(recipe: Recipe, out: Path, file: str, option: str) -> Path:
    """The file of an earlier recipe."""
    for path in (out / file, ASSETS / file):
        if path.is_file():
            return path
    first = "classifier" if option == "classifier" else "diffusion"
    raise BadWeights(
        f"{recipe.name} needs {file}, which is not in {out}: run `dbp-bench train {first}` with "
        f"the same --track and --out first, or give --{option}."
    )


def _request(
    recipe: Recipe, options: Options, init: Given | None, classifier: Given | None
) -> dict[str, Any]:
    return {
        "recipe": recipe.name,
        "data": recipe.data,
        "network": recipe.variant.path,
        "seed": options.seed,
        "settings": asdict(Settings(**recipe.settings)),
        "objective": recipe.objective,
        "precision": options.precision,
        "init": init and init.sha256,
        "classifier": classifier and classifier.sha256,
    }


def _finished(journal: Journal, path: Path) -> Trained | None:
    made = journal.finished()
    if made is None or not path.is_file() or digest(path) != made["sha256"]:
        return None
    return Trained(path, made["sha256"], made["seconds"], made["facts"])


def _start_from(network: nn.Module, init: Given, recipe: Recipe) -> None:
    """Fill the network, unless the weights are of another one or of another noise schedule."""
    schedule = init.header.get("schedule")
    if schedule is not None and schedule != recipe.schedule():
        raise BadWeights(
            f"{init.label}: trained for another noise schedule ({schedule or 'none'}); "
            f"{recipe.variant.name} is of: {recipe.schedule()}. Name its network with --network."
        )
    fill(network, init.tensors, Path(init.label))


def _classifier(recipe: Recipe, given: Given | None, options: Options) -> nn.Module:
    """The classifier that guides, frozen.

    Raises:
        BadRequest: It isn't one of the data set's images and classes.
        BadWeights: The weights don't fit its network.
    """
    assert given is not None
    assert recipe.classifier_variant is not None
    network = given.network
    if network is None:
        network = variants.build(given.header.get("network", recipe.classifier_variant.path))
        fill(network, given.tensors, Path(given.label))
    network = network.eval().requires_grad_(False)
    facts = facts_of(recipe.data)
    try:
        with torch.no_grad(), _channels(network) as seen:
            shape = tuple(network(torch.zeros(1, *facts.shape)).shape)
    except (RuntimeError, TypeError, ValueError) as error:
        cause = str(error).partition("\n")[0][:100]
        raise BadRequest(
            f"{given.label}: not a classifier of {recipe.data}'s images {facts.shape}: {cause}"
        ) from None
    if shape != (1, facts.classes):
        raise BadRequest(
            f"{given.label}: gives {shape[1:]} numbers for an image; a classifier of "
            f"{recipe.data} gives ({facts.classes},), one for each class."
        )
    if seen and seen[0] != facts.shape[0]:
        raise BadRequest(
            f"{given.label}: a classifier of images with {seen[0]} channels; those of "
            f"{recipe.data} have {facts.shape[0]}."
        )
    network = network.to(options.device)
    if options.channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return _compiled(network, options)


@contextmanager
def _channels(network: nn.Module) -> Iterator[list[int]]:
    """How many channels each convolution is shown, in the order of their calls.

    The first one's are the images', unless a normalisation before it, with a mean for each channel,
    has silently made three channels of one.
    """
    seen: list[int] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
        for module in network.modules()
        if isinstance(module, nn.Conv2d)
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _compiled(network: nn.Module, options: Options) -> nn.Module:
    if not options.compile:
        return network
    compiled: nn.Module = torch.compile(network)  # type: ignore[assignment]
    return compiled


@contextmanager
def _in_words(options: Options, checkpoint: Checkpoint) -> Iterator[None]:
    """Say what the device or the compiler can't do."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        kept = f" The last state is in {checkpoint.path}." if checkpoint.path.is_file() else ""
        if is_exhausted(error):
            raise AttackFailed(
                "out of memory: give a smaller --batch-size, more processes, or --precision bf16."
                + kept
            ) from None
        if options.compile and type(error).__module__.startswith(
            ("torch._dynamo", "torch._inductor")
        ):
            cause = " ".join(str(error).split())[:160]
            raise AttackFailed(f"torch.compile: {cause}. Leave out --compile.{kept}") from None
        raise


def _held(data: DataSet, name: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """The training images, as bytes where they are read from files, and their labels."""
    ids = data.ids["train"]
    if name == "digits":
        images, labels = data.select(ids)
        return images.to(device), labels.to(device)
    pixels, classes = [], []
    for part in _chunks(ids):
        images, labels = data.select(part)
        pixels.append((images * 255).round().to(torch.uint8))
        classes.append(labels)
    return torch.cat(pixels).to(device), torch.cat(classes).to(device)


def _chunks(ids: Sequence[int]) -> list[Sequence[int]]:
    return [ids[start : start + _CHUNK] for start in range(0, len(ids), _CHUNK)]


def _loss(recipe: Recipe, network: nn.Module, guide: nn.Module | None) -> diffusion.Loss:
    if recipe.name == "classifier":
        return diffusion.classification(network)
    if recipe.name in ("diffusion", "clean-finetune"):
        return diffusion.denoising(network, recipe.process())
    raised = diffusion.fooling(guide) if guide is not None else diffusion.misleading
    return recipe.adversarial().loss(network, raised)


# -------------------------------------------------------------------------------- what it makes


def _packed(values: dict[str, Tensor], recipe: Recipe) -> bytes:
    tensors = {k: v.cpu().contiguous() for k, v in values.items()}
    if recipe.half:
        return save({k: v.half() for k, v in tensors.items()})
    says = {
        "recipe": recipe.name,
        "data": recipe.data,
        "network": recipe.variant.path,
        "schedule": recipe.schedule(),
    }
    return save(tensors, {HEADER: json.dumps(says)})


@torch.no_grad()
def _measure(
    network: nn.Module, data: DataSet, recipe: Recipe, device: torch.device
) -> dict[str, float]:
    """Accuracy of a classifier, or loss of a denoiser, on held-out images."""
    ids = data.ids[_held_out(recipe)]
    process = DDPM() if recipe.data == "digits" else recipe.process()
    total = 0.0
    for part in _chunks(ids):
        images, labels = (tensor.to(device) for tensor in data.select(part))
        if recipe.name == "classifier":
            total += float((network(images).argmax(1) == labels).float().mean()) * len(part)
        else:
            batch = Batch(images, labels, Tape.make(0, "test", part))
            total += float(diffusion.denoising(network, process)(batch)) * len(part)
    kind = recipe.variant.kind
    name = "accuracy" if kind == "classifier" else "noise_prediction_error"
    return {"denoising_loss" if kind == "edm" else name: total / len(ids)}


def _held_out(recipe: Recipe) -> str:
    return "test" if recipe.data == "digits" else "validation"


def _card(recipe: Recipe, trained: Trained, seed: int, images: int) -> str:
    rows = {**recipe.settings, **recipe.objective, "seed": seed}
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    digits = recipe.data == "digits"
    held_out = "360 test images" if digits else "512 validation images"
    facts = "\n".join(
        f"- {key.replace('_', ' ')} on the {held_out}: {value:.4f}"
        for key, value in trained.facts.items()
    )
    if digits:
        stored = "half precision (widened to float32 when loaded)"
        made_by = f"dbp-bench train {recipe.name} --seed {seed}"
        trained_on = f"the {images:,} training images of the embedded digits (`digits.md`)"
        end = """- licence: MIT, as the code; the data are CC BY 4.0
- for: the `digits-*` tracks, which demonstrate the method. Not a model of anything else."""
    else:
        stored = "float32"
        made_by = (
            f"dbp-bench train {recipe.name} --track {recipe.data} --network {recipe.variant.name} "
            f"--seed {seed} --updates {recipe.settings['iterations']} "
            f"--batch-size {recipe.settings['batch_size']} "
            f"--learning-rate {recipe.settings['learning_rate']:g}"
        )
        trained_on = f"{images:,} training images of {recipe.data}, without its validation split"
        end = f"- network: `{recipe.variant.path}`"
        if recipe.schedule():
            end += f"\n- noise schedule: {recipe.schedule()}"
    return f"""# {recipe.title}

`{trained.path.name}`, sha256 `{trained.sha256}`, {stored}.

- made by: `{made_by}`
- trained on: {trained_on}
{facts}
{end}

| setting | value |
|---|---|
{table}
"""
