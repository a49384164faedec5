"""The catalog of published checkpoints, with their addresses, layouts and licences."""

import re
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from dbp_bench.declaration import Strict, read_yaml
from dbp_bench.errors import UnknownName, did_you_mean

PATH = Path(__file__).with_name("catalog.yaml")
ROBUSTBENCH = Path(__file__).with_name("robustbench.yaml")

DRIVE = "https://drive.usercontent.google.com/download?export=download&confirm=t&id="
"""The address of a file on Google Drive, but for its id."""

DIFFUSERS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
"""Names of the weights in a folder of diffusers, the preferred one first."""

ZOOS = {
    "robustbench": (
        r"robustbench:[a-z0-9]+/[A-Za-z0-9]+/[A-Za-z0-9_-]+",
        "robustbench:cifar10/Linf/Standard",
    ),
    "timm": (r"timm:[a-z0-9_]+(\.[a-z0-9_]+)?", "timm:resnet50"),
}
"""The form of a model's name and an example, for each package that loads models by name."""

Layout = Literal[
    "plain", "diffusers", "pesser", "score-sde", "edm", "robustbench", "deepmind", "meliketoy"
]
"""The code whose names the file uses; `plain` ones are the network's own. See :mod:`convert`."""

Restriction = Literal["none", "research", "non-commercial", "not stated"]


class Hub(Strict):
    """A model of diffusers on the Hugging Face Hub."""

    kind: Literal["hub"]
    repo: str
    revision: str

    @property
    def what(self) -> str:
        """The file, for messages."""
        return f"{DIFFUSERS[0]} of huggingface.co/{self.repo}"


class Url(Strict):
    """A file that a link leads to; on Google Drive, too (see :data:`DRIVE`)."""

    kind: Literal["url"]
    url: str = Field(pattern=r"^https://")

    @property
    def what(self) -> str:
        return self.url


class ByHand(Strict):
    """A file that no link leads to, or that the user makes."""

    kind: Literal["by-hand"]
    what: str
    """The file to get or to make, and where; it completes "get ..."."""


class Zoo(Strict):
    """A model that a package loads by its name."""

    kind: Literal["zoo"]
    model: str

    @property
    def what(self) -> str:
        return self.model


Source = Annotated[Hub | Url | ByHand | Zoo, Field(discriminator="kind")]


class Licence(Strict):
    """The uses that a file's publisher permits, as far as that is stated."""

    name: str
    restriction: Restriction


class Checkpoint(Strict):
    """A published file of weights, and the network here that takes them.

    What isn't known of it is None.
    """

    title: str
    source: Source
    licence: Licence
    network: str | None = Field(default=None, pattern=r"^dbp_bench\.networks\.\w+:\w+$")
    """``module:callable``; None for a model of a package, which brings its own."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the callable."""
    layout: Layout | None = None
    """None for a model of a package."""
    size: int | None = Field(default=None, ge=1)
    """Bytes of the published file."""
    md5: str | None = Field(default=None, pattern=r"^[0-9a-f]{32}$")
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    paper: str | None = None
    note: str = ""


class Catalog(Strict):
    checkpoints: dict[str, Checkpoint]


@cache
def entries() -> dict[str, Checkpoint]:
    """Name and entry of every checkpoint in the catalog."""
    return read_yaml(PATH, Catalog).checkpoints


def find(name: str) -> Checkpoint:
    """The checkpoint called `name`: in the catalog, ``robustbench:...`` or ``timm:...``.

    Raises:
        UnknownName: There is none.
    """
    package, _, model = name.partition(":")
    if package in ZOOS:
        form, example = ZOOS[package]
        if not re.fullmatch(form, name):
            raise UnknownName(f"{name!r}: write it as {example}.")
        if package == "robustbench" and model in robustbench()["models"]:
            return _wide(model)
        return Checkpoint(
            title=f"{model}, loaded by {package}",
            source=Zoo(kind="zoo", model=name),
            licence=Licence(name=f"the model's own; see {package}", restriction="not stated"),
        )
    if name not in entries():
        known = [*entries(), "robustbench:<dataset>/<threat>/<model>", "timm:<model>"]
        raise UnknownName(f"no checkpoint {name!r}.{did_you_mean(name, known)}")
    return entries()[name]


def _wide(model: str) -> Checkpoint:
    """A wide residual network of RobustBench's zoo, which our own network takes."""
    depth, width, layout, statistics, file, licence = robustbench()["models"][model]
    data, _, title = model.split("/")
    return Checkpoint(
        title=f"RobustBench's {title}, WRN-{depth}-{width}, {data}",
        network="dbp_bench.networks.wrn:WideResNet",
        options={
            "depth": depth,
            "width": width,
            "classes": 100 if data == "cifar100" else 10,
            "layout": layout,
            "normalise": robustbench()["statistics"][statistics],
        },
        layout=layout,
        source=Url(kind="url", url=f"{DRIVE}{file}"),
        licence=Licence(name=f"{licence} (of RobustBench's zoo)", restriction="none"),
    )


@cache
def robustbench() -> dict[str, Any]:
    """The models of RobustBench's zoo that our own networks take; see the file."""
    found: dict[str, Any] = yaml.safe_load(ROBUSTBENCH.read_text(encoding="utf-8"))
    return found
