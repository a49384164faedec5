"""Data sets: images in [0, 1], their labels, and frozen lists of image ids."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from dbp_bench.data import splits
from dbp_bench.data.catalog import CATALOG, Facts
from dbp_bench.data.catalog import facts_of as facts_of
from dbp_bench.data.splits import split_ids as split_ids
from dbp_bench.errors import BadData, BadRequest

if TYPE_CHECKING:
    from torch import Tensor

    from dbp_bench.data.readers import Pixels, Source


@dataclass(frozen=True, slots=True)
class DataSet:
    """Images and labels by id; only the images that are asked for are decoded."""

    facts: Facts
    place: Path | None = None
    """The file or folder that the user names; see :mod:`dbp_bench.data.places`."""
    _open: "dict[str, Source]" = field(default_factory=dict)

    @property
    def ids(self) -> Mapping[str, list[int]]:
        """The images of each split, in order."""
        return {split: split_ids(self.facts, split) for split in splits.split_names(self.facts)}

    def select(self, ids: Sequence[int]) -> "tuple[Tensor, Tensor]":
        """Images ``(b, c, h, w)``, float32 in [0, 1], and labels ``(b,)``, int64, of `ids`.

        Raises:
            BadData: An image is missing, damaged or of another size, or its label out of range.
        """
        import numpy as np
        import torch

        labels = self.labels_of(ids)
        pixels = np.stack([self._pixels(i) for i in ids])
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
        return images.float() / self.facts.levels, torch.tensor(labels)

    def labels_of(self, ids: Sequence[int]) -> list[int]:
        """Labels of `ids`, without reading an image.

        Raises:
            BadData: An image is missing, or its label out of range.
        """
        from dbp_bench.data.readers import ABSENT

        found = []
        for part, row in map(self._row, ids):
            source = self._source(part)
            if row >= len(source.labels) or source.labels[row] == ABSENT:
                held = int((source.labels != ABSENT).sum())
                raise BadData(
                    f"{source.where}: {held} images, and number {row} (from 0) is not there: "
                    f"{self.facts.name} has {getattr(self.facts, part)} in its {part} part."
                )
            label = int(source.labels[row])
            if not 0 <= label < self.facts.classes:
                raise BadData(
                    f"{source.where}: image {row} has label {label}; {self.facts.name} has 0 ... "
                    f"{self.facts.classes - 1}."
                )
            found.append(label)
        return found

    def digest(self, ids: Sequence[int]) -> str:
        """A sha256 that stands for the images and labels of `ids`, for the record.

        It is that of the file where one ships with the package, and else the pixels' digest.
        """
        return self.facts.shipped or self.pixel_digest(ids)

    def pixel_digest(self, ids: Sequence[int]) -> str:
        """The sha256 of the decoded pixels and the labels of `ids`, whatever files hold them."""
        total = sha256()
        for label, id_ in zip(self.labels_of(ids), ids, strict=True):
            pixels = self._pixels(id_)
            total.update(f"{label},{pixels.shape};".encode())
            total.update(pixels.tobytes())
        return total.hexdigest()

    def verify(self, split: str) -> None:
        """Refuse files whose images are others than the published ones, or in another order.

        Labels are compared with those that a frozen list is made for, and pixels with the digest in
        the catalog, where it has one.

        Raises:
            BadData: They are, or there are too few of them.
        """
        name, listed = self.facts.name, splits.frozen(self.facts, split)
        ids = splits.split_ids(self.facts, split)
        labels = self.labels_of(ids)
        where = self._source(self._row(ids[0])[0]).where
        if listed is not None and splits.digest_of(labels) != listed.labels:
            raise BadData(
                f"{where}: the labels of split {split!r} are not those of {name} in its published "
                "order: another data set, or the images were put in another order."
            )
        if split in self.facts.pixels and self.pixel_digest(ids) != self.facts.pixels[split]:
            if self.facts.own:
                raise BadData(
                    f"{where}: its images or labels are not those that the track was written for: "
                    "their digest is another. Write the track anew with dbp-bench new track."
                )
            raise BadData(
                f"{where}: the pixels of split {split!r} are not those of {name} as it is "
                "published: another data set, or the images were encoded anew."
            )

    def _row(self, id_: int) -> tuple[str, int]:
        """The part that holds an image, and its row there."""
        if self.facts.shipped or id_ < self.facts.test:
            return "test", id_
        return "train", id_ - self.facts.test

    def _source(self, part: str) -> "Source":
        if part not in self._open:
            from dbp_bench.data.places import open_part

            source = self._open[part] = open_part(self.facts, part, self.place)
            most = getattr(self.facts, part)
            held = len(source.labels)
            if self.facts.own and held != most:
                raise BadData(f"{source.where}: {held} images; the track declares {most}.")
            if held > most and not self.facts.shipped:
                raise BadData(
                    f"{source.where}: {held} images; {self.facts.name} has {most} in its {part} "
                    "part."
                )
        return self._open[part]

    def _pixels(self, id_: int) -> "Pixels":
        """The image of an id ``(h, w, c)`` in whole numbers."""
        channels, height, width = self.facts.shape
        part, row = self._row(id_)
        source = self._source(part)
        pixels = source.image(row)
        if pixels.shape != (height, width, channels):
            raise BadData(
                f"{source.where}: image {row} is {pixels.shape[1]} x {pixels.shape[0]} pixels; "
                f"{self.facts.name} has {width} x {height}."
            )
        return pixels


def names() -> list[str]:
    """The data sets that can be named in a track."""
    return sorted(CATALOG)


def load_data(facts: Facts | str, place: Path | None = None, split: str | None = None) -> DataSet:
    """A data set.

    Args:
        facts: Its facts, or the name of a built-in one.
        place: The file or folder that the user names; see :func:`dbp_bench.data.places.open_part`.
        split: The split that will be used: that its images are there, in order, is verified at
            once.

    Raises:
        BadEntry: There is no such data set or split.
        BadData: Its files are not there, or are not what they should be.
        BadExtra: A package that reads them is missing.
    """
    data = DataSet(facts_of(facts), place)
    if data.facts.shipped and place is not None:
        raise BadData(
            f"--data {place}: the images of data set {data.facts.name!r} come with the package, "
            "and no file is read for them. Leave out --data, or take a track of other data."
        )
    if split is not None:
        data.verify(split)
    return data


def digits() -> DataSet:
    """The UCI handwritten digits bundled by scikit-learn: 1,797 images, 8 x 8, 17 grey levels.

    CC BY 4.0, Alpaydin and Kaynak 1998; see ``assets/digits.md``.
    """
    return load_data("digits")


def stand_in(facts: Facts, count: int) -> "tuple[Tensor, Tensor]":
    """`count` grey images ``(b, c, h, w)`` and labels 0: enough to time a pass without the data."""
    import torch

    return torch.full((count, *facts.shape), 0.5), torch.zeros(count, dtype=torch.int64)


def first(ids: Sequence[int], examples: int | None) -> list[int]:
    """The first `examples` of a track's `ids`, or all.

    Raises:
        BadRequest: There are not so many, or fewer than one is asked for.
    """
    if examples is None:
        return list(ids)
    if not 1 <= examples <= len(ids):
        raise BadRequest(f"--examples {examples}: this track has 1 to {len(ids)} images.")
    return list(ids[:examples])
