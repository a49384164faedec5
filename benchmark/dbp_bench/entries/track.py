"""A track: a data set, its frozen images, the classifier to protect, and the attacker's budget."""

from typing import Annotated, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from dbp_bench.data.catalog import Facts, facts_of
from dbp_bench.declaration import Strict
from dbp_bench.entries.fields import AnyNetwork, Eps, Name, Sha256, check_eps


class OwnImages(Strict):
    """Images of one's own, and what must be known of them before they are read."""

    path: str
    """The file or folder, below the folder that `tracks/` is in: npz, parquet, or a folder of
    images for each class; ``--data`` says where it is instead."""
    sha256: Sha256
    """The digest of the decoded pixels and labels of the split, which `dbp-bench new track`
    prints."""
    images: int = Field(ge=1)
    """The number of images; a split may take the first N."""
    shape: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=3, max_length=3)]
    """``[c, h, w]``."""
    classes: Annotated[list[str], Field(min_length=2)]
    """Their names, in the order of their labels."""


class Track(Strict):
    """The images that every defense of the track is attacked on, and the budget."""

    title: str
    data: Annotated[
        Annotated[str, Tag("<name>")] | Annotated[OwnImages, Tag("<own>")],
        Discriminator(lambda value: "<name>" if isinstance(value, str) else "<own>"),
    ]
    """The name of a built-in data set, or images of one's own."""
    split: str
    """The split; of images of one's own ``all``, or ``first-N``."""
    classifier: AnyNetwork
    """The base classifier, which the defenses of the track protect."""
    norm: Literal["linf", "l2", "l1"]
    eps: Eps
    """The budget in [0, 1] pixel units: 8/255, not 8."""
    batch_size: int = Field(ge=1)
    """Images evaluated together: a fixed group, so that the arithmetic has a fixed shape."""
    max_batch: int = Field(ge=1)
    """Images x EoT samples in one pass through the networks, at most."""
    settings_of: Name | None = None
    """A track whose settings defenses take that have none for this one. May be left out."""
    demonstration: bool
    """True where its numbers stand for nothing but the method."""
    note: str

    def facts(self, name: str) -> Facts:
        """The facts of the data set of the track called `name`.

        Raises:
            BadEntry: There is no such built-in data set.
        """
        if isinstance(self.data, str):
            return facts_of(self.data)
        c, h, w = self.data.shape
        return Facts(
            name,
            len(self.data.classes),
            (c, h, w),
            test=self.data.images,
            train=0,
            pixels={self.split: self.data.sha256},
            own=True,
        )

    def on_validation_images(self) -> "Track":
        """The same track on the validation images of its data set, for choosing settings."""
        title = f"{self.title}; validation images, for choosing settings"
        return self.model_copy(update={"split": "validation", "title": title})

    @model_validator(mode="after")
    def _units(self) -> Self:
        check_eps(self.norm, self.eps)
        return self
