"""The products of a recipe: a weights file, measurements on held-out images, and a model card."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from dbp_bench.data import DataSet
from dbp_bench.noise import Tape
from dbp_bench.training import diffusion
from dbp_bench.training.batches import Batch
from dbp_bench.training.given import HEADER
from dbp_bench.training.processes import DDPM
from dbp_bench.training.recipes import CLASSIFIERS, FLOWS, Recipe
from dbp_bench.training.recipes import recipe as usual_recipe
from dbp_bench.training.state import Settings

_CHUNK = 512


@dataclass(frozen=True, slots=True)
class Trained:
    """The weights that a recipe made."""

    path: Path
    sha256: str
    seconds: float
    facts: dict[str, float]
    """Measurements on images that it wasn't trained on."""


def packed(values: dict[str, Tensor], recipe: Recipe) -> bytes:
    """The weights as a safetensors file that says in its header what it is.

    Weights in half precision ship with the package: their bytes are committed, without a header.
    """
    tensors = {k: v.cpu().contiguous() for k, v in values.items()}
    if recipe.data == "digits":
        return save({k: v.half() for k, v in tensors.items()})
    says = {
        "recipe": recipe.name,
        "data": recipe.data,
        "network": recipe.variant.path,
        "schedule": recipe.schedule(),
    }
    return save(tensors, {HEADER: json.dumps(says)})


@torch.no_grad()
def measured(
    network: nn.Module, own: diffusion.Loss, data: DataSet, recipe: Recipe, device: torch.device
) -> dict[str, float]:
    """Accuracy of a classifier, or loss of a denoiser, on images that weren't trained on.

    They are the validation images; where the digits' are trained on, too, the test images. A
    denoiser's loss is the ordinary one, whatever it was trained by; a flow's is its `own`.
    """
    digits = recipe.data == "digits"
    ids = data.ids["test" if digits and not recipe.hold_out else "validation"]
    process, told = DDPM() if digits else recipe.process(), recipe.variant.conditional
    flows = recipe.name in FLOWS
    loss = own if flows else diffusion.denoising(network, process, conditional=told)
    total = 0.0
    for part in chunks(ids):
        images, labels = (tensor.to(device) for tensor in data.select(part))
        if recipe.name in CLASSIFIERS:
            value = (network(images).argmax(1) == labels).float().mean()
        else:
            value = loss(Batch(images, labels, Tape.make(0, "test", part)))
        total += float(value) * len(part)
    names = {"classifier": "accuracy", "edm": "denoising_loss", "flow": "velocity_error"}
    kind = "flow" if flows else recipe.variant.kind
    return {names.get(kind, "noise_prediction_error"): total / len(ids)}


def chunks(ids: Sequence[int]) -> list[Sequence[int]]:
    """The ids in parts that are read together."""
    return [ids[start : start + _CHUNK] for start in range(0, len(ids), _CHUNK)]


def rows(recipe: Recipe) -> dict[str, Any]:
    """The settings by name, but those that have their defaults, and its constants."""
    defaults = {field.name: field.default for field in fields(Settings)}
    given = {k: v for k, v in asdict(recipe.settings).items() if v != defaults[k]}
    return given | recipe.objective


def card(recipe: Recipe, trained: Trained, seed: int, images: int) -> str:
    """The model card, in Markdown: how the weights were made, from how many images, and facts."""
    made_by = f"dbp-bench train {recipe.name}"
    if recipe.data == "digits":
        stored, held_out = "half precision (widened to float32 when loaded)", "360 test images"
        made_by += f" --seed {seed}"
        trained_on = f"the {images:,} training images of the embedded digits (`digits.md`)"
        if recipe.hold_out:
            held_out = "180 validation images"
            made_by += " --hold-out"
            trained_on = f"{images:,} training images of the embedded digits, without validation"
        end = """- licence: MIT, as the code; the data are CC BY 4.0
- for: the `digits-*` tracks, which demonstrate the method. Not a model of anything else."""
    else:
        stored, held_out, settings = "float32", "512 validation images", recipe.settings
        made_by += (
            f" --track {recipe.data} --network {recipe.variant.name} --seed {seed} "
            f"--updates {settings.iterations} --batch-size {settings.batch_size} "
            f"--learning-rate {settings.learning_rate:g}"
        )
        trained_on = f"{images:,} training images of {recipe.data}, without its validation split"
        end = f"- network: `{recipe.variant.path}`"
        if recipe.schedule():
            end += f"\n- noise schedule: {recipe.schedule()}"
    usual = usual_recipe(recipe.name, recipe.data, recipe.variant.name).objective
    changed = {key: value for key, value in recipe.objective.items() if value != usual[key]}
    made_by += "".join(f" --set {key}={value}" for key, value in changed.items())
    facts = "\n".join(
        f"- {key.replace('_', ' ')} on the {held_out}: {value:.4f}"
        for key, value in trained.facts.items()
    )
    table = "\n".join(
        f"| {key} | {value} |" for key, value in (rows(recipe) | {"seed": seed}).items()
    )
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
