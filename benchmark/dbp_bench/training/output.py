"""What a recipe leaves: a weights file, what is measured on held-out images, and a model card."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from dbp_bench.data import DataSet
from dbp_bench.noise import Tape
from dbp_bench.training import diffusion
from dbp_bench.training.batches import Batch
from dbp_bench.training.given import HEADER
from dbp_bench.training.processes import DDPM
from dbp_bench.training.recipes import Recipe

_CHUNK = 512


@dataclass(frozen=True, slots=True)
class Trained:
    """What a recipe made."""

    path: Path
    sha256: str
    seconds: float
    facts: dict[str, float]
    """What was measured on images that it wasn't trained on."""


def packed(values: dict[str, Tensor], recipe: Recipe) -> bytes:
    """The weights as a safetensors file that says in its header what it is.

    Weights in half precision ship with the package: their bytes are committed, without a header.
    """
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
def measured(
    network: nn.Module, data: DataSet, recipe: Recipe, device: torch.device
) -> dict[str, float]:
    """Accuracy of a classifier, or loss of a denoiser, on held-out images."""
    ids = data.ids["test" if recipe.data == "digits" else "validation"]
    process = DDPM() if recipe.data == "digits" else recipe.process()
    total = 0.0
    for part in chunks(ids):
        images, labels = (tensor.to(device) for tensor in data.select(part))
        if recipe.name == "classifier":
            total += float((network(images).argmax(1) == labels).float().mean()) * len(part)
        else:
            batch = Batch(images, labels, Tape.make(0, "test", part))
            total += float(diffusion.denoising(network, process)(batch)) * len(part)
    kind = recipe.variant.kind
    name = "accuracy" if kind == "classifier" else "noise_prediction_error"
    return {"denoising_loss" if kind == "edm" else name: total / len(ids)}


def chunks(ids: Sequence[int]) -> list[Sequence[int]]:
    """The ids in parts that are read together."""
    return [ids[start : start + _CHUNK] for start in range(0, len(ids), _CHUNK)]


def card(recipe: Recipe, trained: Trained, seed: int, images: int) -> str:
    """The model card, in Markdown: how the weights were made, from how many images, and facts."""
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
