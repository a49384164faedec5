"""What a recipe starts from: weights of an earlier recipe, and a classifier that guides."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from dbp_bench.data.catalog import facts_of
from dbp_bench.declaration import parse_json
from dbp_bench.errors import BadRequest, BadWeights
from dbp_bench.training import variants
from dbp_bench.training.recipes import Recipe
from dbp_bench.weights.files import ASSETS, digest, fill, load

HEADER = "dbp-bench"
"""The key in the header of a weights file under which it says what it is."""


@dataclass(frozen=True, slots=True)
class Given:
    """Weights that a recipe starts from, or a classifier that guides it."""

    label: str
    """What messages call it: a path, or the name of a checkpoint."""
    sha256: str
    tensors: dict[str, Tensor]
    header: dict[str, Any]
    """What the file says of itself; empty where it says nothing."""
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
    def earlier(cls, recipe: Recipe, out: Path, file: str, option: str) -> "Given":
        """What an earlier recipe left in `out`, or what ships with the package.

        Raises:
            BadWeights: It is in neither place.
        """
        for path in (out / file, ASSETS / file):
            if path.is_file():
                return cls.file(path)
        first = "classifier" if option == "classifier" else "diffusion"
        raise BadWeights(
            f"{recipe.name} needs {file}, which is not in {out}: run `dbp-bench train {first}` "
            f"with the same --track and --out first, or give --{option}."
        )


def _header(path: Path) -> dict[str, Any]:
    """What a safetensors file says of itself; empty where it says nothing."""
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
        assert recipe.classifier_variant is not None
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
    return network


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
