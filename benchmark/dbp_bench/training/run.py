"""Train one recipe: read what it needs, run the loop, write weights, a card and a log."""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from dbp_bench.data import DataSet
from dbp_bench.errors import AttackFailed, BadRequest
from dbp_bench.memory import is_exhausted
from dbp_bench.noise import seeded
from dbp_bench.provenance import full_float32
from dbp_bench.result import write_atomically
from dbp_bench.training import adbm, consistency, diffusion, flow, output, variants
from dbp_bench.training.diffusion import Loss
from dbp_bench.training.given import Given, guiding_classifier, start_from
from dbp_bench.training.journal import Journal
from dbp_bench.training.loop import Options, train
from dbp_bench.training.output import Trained
from dbp_bench.training.recipes import GUIDED, Recipe
from dbp_bench.training.state import Checkpoint, Settings
from dbp_bench.weights.files import digest, fill, load

Progress = Callable[[int, int, str], None]
"""Called after each update with its number, the number of all updates, and a note."""


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
        recipe: Has its iterations counted; see :func:`dbp_bench.training.recipes.changed`.
        data: Its data set.
        out: A folder.
        options: See :class:`dbp_bench.training.loop.Options`.
        progress: See :data:`Progress`.
        init: Weights to start from.
        classifier: The classifier that guides.

    Returns:
        The trained weights; None in all processes of a group but the first, which writes.

    Raises:
        AttackFailed: The loss became NaN; the device's memory doesn't do, or torch.compile failed.
        BadRequest: The classifier doesn't fit the data set; the checkpoint belongs to another
            request; an option is out of range.
        BadWeights: Weights are missing, damaged, or made for another network or noise schedule.
    """
    settings = recipe.settings
    _check(settings, options)
    writes = options.group.rank == 0
    path = out / recipe.file
    init = init or Given.earlier(recipe, out, "init")
    classifier = classifier or Given.earlier(recipe, out, "classifier")
    request = {
        "recipe": recipe.name,
        "data": recipe.data,
        "network": recipe.variant.path,
        "seed": options.seed,
        "settings": asdict(settings),
        "objective": recipe.objective,
        "precision": options.precision,
        "init": init and init.sha256,
        "classifier": classifier and classifier.sha256,
        **({"hold_out": True} if recipe.hold_out else {}),
    }
    every = max(1, settings.iterations // 1000)
    journal = Journal(path.with_suffix(".jsonl"), request, every, settings.batch_size)
    made = journal.made() if options.resume and path.is_file() else None
    if made and made["sha256"] == digest(path):
        return Trained(path, **made) if writes else None
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
        start_from(network, init, recipe)
    network = _placed(options.group.joined(network.to(options.device)), options)
    guide = None
    if classifier and recipe.name in GUIDED:
        guide = _compiled(_placed(guiding_classifier(classifier, recipe), options), options)
    elif recipe.name == "consistency":
        teacher = copy.deepcopy(network).eval().requires_grad_(False)
        guide = _compiled(teacher, options)
    images, labels = _held(data, recipe, options.device)

    def report(update: int, loss: float, rate: float) -> None:
        speed = journal.add(update, loss, rate) if writes else None
        fast = f", {speed:.0f} images/s" if speed else ""
        progress(update, settings.iterations, f"loss {loss:.4f}{fast}")

    full_float32()
    start = time.perf_counter()
    journal.start()
    with _in_words(options, checkpoint):
        values = train(
            network,
            _loss(recipe, _compiled(network, options), guide),
            images,
            labels,
            settings,
            owner=recipe.name,
            options=options,
            report=report,
            checkpoint=checkpoint,
        )
    if not writes:
        return None
    seconds = time.perf_counter() - start
    write_atomically(path, output.packed(values, recipe))
    fill(network, load(path), path)
    own = _loss(recipe, network.eval(), guide)
    facts = output.measured(network, own, data, recipe, options.device)
    trained = Trained(path, digest(path), seconds, facts)
    card = output.card(recipe, trained, options.seed, len(images))
    write_atomically(path.with_suffix(".md"), card)
    journal.append({"made": {"sha256": trained.sha256, "seconds": seconds, "facts": facts}})
    checkpoint.path.unlink(missing_ok=True)
    return trained


def _check(settings: Settings, options: Options) -> None:
    """Refuse numbers that are out of range."""
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


def _placed(network: nn.Module, options: Options) -> nn.Module:
    """The network on the device, in the memory layout that is asked for."""
    network = network.to(options.device)
    if options.channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def _compiled(network: nn.Module, options: Options) -> nn.Module:
    return torch.compile(network) if options.compile else network  # type: ignore[return-value]


def _held(data: DataSet, recipe: Recipe, device: torch.device) -> tuple[Tensor, Tensor]:
    """The training images, as bytes where they are read from files, and their labels."""
    pixels, classes = [], []
    for part in output.chunks(recipe.ids(data)):
        images, labels = data.select(part)
        exact = recipe.data == "digits"
        pixels.append(images if exact else (images * 255).round().to(torch.uint8))
        classes.append(labels)
    return torch.cat(pixels).to(device), torch.cat(classes).to(device)


def _loss(recipe: Recipe, network: nn.Module, guide: nn.Module | None) -> Loss:
    """The loss of a recipe.

    The `guide` is frozen: a classifier; or, in a distillation, the network as it started.
    """
    if recipe.name == "classifier":
        return diffusion.classification(network)
    if recipe.name == "noisy-classifier":
        return diffusion.noisy_classification(network, **recipe.objective)
    if recipe.name in ("diffusion", "clean-finetune", "conditional"):
        told = recipe.variant.conditional
        return diffusion.denoising(network, recipe.process(), conditional=told)
    if recipe.name == "mse-guided":
        return diffusion.adversarial(recipe.adversarial(), network, diffusion.misleading)
    if recipe.name == "flow":
        return flow.matching(network, flow.noisy(**recipe.objective))
    assert guide is not None
    if recipe.name == "flow-pgd":
        return flow.matching(network, flow.attacked(guide, **recipe.objective))
    if recipe.name == "consistency":
        return consistency.distilling(network, guide, *recipe.distillation())
    if recipe.name == "adbm":
        return adbm.bridging(recipe.bridge(), network, diffusion.fooling(guide))
    return diffusion.adversarial(recipe.adversarial(), network, diffusion.fooling(guide))


@contextmanager
def _in_words(options: Options, checkpoint: Checkpoint) -> Iterator[None]:
    """Say in one line what the device or the compiler can't do."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        kept = f" The last state is in {checkpoint.path}." if checkpoint.path.is_file() else ""
        if is_exhausted(error):
            raise AttackFailed(
                "out of memory: give a smaller --batch-size, more processes, or --precision bf16."
                + kept
            ) from None
        of_compiler = type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
        if options.compile and of_compiler:
            cause = " ".join(str(error).split())[:160]
            raise AttackFailed(f"torch.compile: {cause}. Leave out --compile.{kept}") from None
        raise
