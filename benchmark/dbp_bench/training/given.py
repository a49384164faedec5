"""The weights that a recipe starts from, and the classifier that guides it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from dbp_bench.data.catalog import facts_of
from dbp_bench.declaration import parse_json
from dbp_bench.errors import BadRequest, BadWeights
from dbp_bench.training import variants
from dbp_bench.training.recipes import Recipe
from dbp_bench.weights.files import digest, fill, load
from dbp_bench.weights.places import ASSETS

HEADER = "dbp-bench"
"""The key in the header of a weights file under which it says what it is."""


@dataclass(frozen=True, slots=True)
class Given:
    """Weights that a recipe starts from, or a classifier that guides it."""

    label: str
    """Its name in messages: a path, or the name of a checkpoint."""
    sha256: str
    tensors: dict[str, Tensor]
    header: dict[str, Any]
    """The description in the file; empty where it has none."""
    network: nn.Module | None = None
    """The network with these weights, where it isn't one of the recipes' networks."""

    @classmethod
    def file(cls, path: Path) -> "Given":
        """A safetensors file.

        Raises:
            BadWeights: It isn't there, or isn't one.
        """
        if not path.is_file():
            raise BadWeights(f"{path}: there is no such file.")
        return cls(str(path), digest(path), load(path), _header(path))

    @classmethod
    def earlier(cls, recipe: Recipe, out: Path, option: str) -> "Given | None":
        """The weights that an earlier recipe left in `out`, or that ship with the package.

        None where the recipe needs none.

        Raises:
            BadWeights: They are in neither place.
        """
        file = recipe.classifier if option == "classifier" else recipe.init
        if file is None:
            return None
        for path in (out / file, ASSETS / file):
            if path.is_file():
                return cls.file(path)
        first = "classifier" if option == "classifier" else "diffusion"
        raise BadWeights(
            f"{recipe.name} needs {file}, which is not in {out}: run `dbp-bench train {first}` "
            f"with the same --track and --out first, or give --{option}."
        )


def _header(path: Path) -> dict[str, Any]:
    """The description in a safetensors file; empty where it has none."""
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(HEADER)
    try:
        found = parse_json(text) if text else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def start_from(network: nn.Module, init: Given, recipe: Recipe) -> None:
    """Fill the network with the weights that a recipe starts from.

    Raises:
        BadWeights: They belong to another network or another noise schedule.
    """
    schedule = init.header.get("schedule")
    if schedule is not None and schedule != recipe.schedule():
        raise BadWeights(
            f"{init.label}: trained for another noise schedule ({schedule or 'none'}); "
            f"{recipe.variant.name} is of: {recipe.schedule()}. Name its network with --network."
        )
    fill(network, init.tensors, Path(init.label))


def guiding_classifier(given: Given, recipe: Recipe) -> nn.Module:
    """The classifier that guides, frozen.

    Raises:
        BadRequest: It doesn't classify the data set's images into its classes.
        BadWeights: The weights don't fit its network.
    """
    network = given.network
    if network is None:
        network = variants.build(given.header.get("network", recipe.guide.path))
        fill(network, given.tensors, Path(given.label))
    network = network.eval().requires_grad_(False)
    facts = facts_of(recipe.data)
    seen: list[int] = []

    def look(module: nn.Module, inputs: Any) -> None:
        """Note how many channels each convolution is shown."""
        if isinstance(module, nn.Conv2d):
            seen.append(inputs[0].shape[1])

    try:
        with torch.no_grad(), register_module_forward_pre_hook(look):
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
    # A normalisation with a mean for each of three channels silently makes three of one.
    if seen and seen[0] != facts.shape[0]:
        raise BadRequest(
            f"{given.label}: a classifier of images with {seen[0]} channels; those of "
            f"{recipe.data} have {facts.shape[0]}."
        )
    return network
