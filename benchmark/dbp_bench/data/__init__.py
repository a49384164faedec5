"""Data sets: images in [0, 1], their labels, and frozen lists of image ids."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from dbp_bench.data.catalog import CATALOG, Facts, facts_of
from dbp_bench.data.splits import digest_of, frozen, split_ids, split_names
from dbp_bench.errors import BadData, BadRequest
from dbp_bench.weights.files import ASSETS, load, verify

if TYPE_CHECKING:
    from torch import Tensor

    from dbp_bench.data.readers import Pixels, Source

__all__ = [
    "DataSet",
    "Digits",
    "Stored",
    "digits",
    "facts_of",
    "first",
    "load_data",
    "names",
    "split_ids",
    "stand_in",
]

_DIGITS = "6eb3236e2694a43165707b1dc0277ad68a0bd8259c1ee2fcedc532eb2fbec6a4"
"""The sha256 of the file of the digits."""


class DataSet(Protocol):
    """A data set gives images and labels by id."""

    @property
    def ids(self) -> Mapping[str, list[int]]:
        """Which images each split holds, and in which order."""

    def select(self, ids: Sequence[int]) -> "tuple[Tensor, Tensor]":
        """Images ``(b, c, h, w)``, float32 in [0, 1], and labels ``(b,)``, int64, of `ids`."""

    def labels_of(self, ids: Sequence[int]) -> list[int]:
        """Labels of `ids`, without reading an image."""

    def digest(self, ids: Sequence[int]) -> str:
        """A sha256 that stands for the images and labels of `ids`, for the record."""


@dataclass(frozen=True, slots=True)
class Digits:
    """A data set that is small enough to be held."""

    images: "Tensor"
    """float32 ``(n, c, h, w)`` in [0, 1]; an image's id is its index."""
    labels: "Tensor"
    """int64 ``(n,)``."""
    ids: dict[str, list[int]]
    sha256: str
    """The digest of the file."""

    def select(self, ids: Sequence[int]) -> "tuple[Tensor, Tensor]":
        """Images and labels of `ids`."""
        return self.images[list(ids)], self.labels[list(ids)]

    def labels_of(self, ids: Sequence[int]) -> list[int]:
        """Labels of `ids`."""
        labels: list[int] = self.labels[list(ids)].tolist()
        return labels

    def digest(self, ids: Sequence[int]) -> str:  # noqa: ARG002
        """The sha256 of the file, whatever the `ids`."""
        return self.sha256


@dataclass(frozen=True, slots=True)
class Stored:
    """A data set in files, of which only the images that are asked for are decoded."""

    facts: Facts
    place: Path | None
    """The file or folder that the user names; see :mod:`dbp_bench.data.places`."""
    _open: "dict[str, Source]" = field(default_factory=dict)

    @property
    def ids(self) -> Mapping[str, list[int]]:
        """Which images each split holds, and in which order."""
        name = self.facts.name
        return {split: split_ids(name, split) for split in split_names(name)}

    def select(self, ids: Sequence[int]) -> "tuple[Tensor, Tensor]":
        """Images and labels of `ids`.

        Raises:
            BadData: An image is missing, damaged or of another size, or its label out of range.
        """
        import numpy as np
        import torch

        labels = self.labels_of(ids)
        pixels = np.stack(self._pixels(ids))
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
        return images.float() / 255, torch.tensor(labels)

    def labels_of(self, ids: Sequence[int]) -> list[int]:
        """Labels of `ids`.

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
        """The sha256 of the decoded pixels and the labels of `ids`, whatever files hold them."""
        total = sha256()
        for label, pixels in zip(self.labels_of(ids), self._pixels(ids), strict=True):
            total.update(f"{label},{pixels.shape};".encode())
            total.update(pixels.tobytes())
        return total.hexdigest()

    def verify(self, split: str) -> None:
        """Refuse files whose images are in another order than the frozen list is made for.

        Raises:
            BadData: They are, or there are too few of them.
        """
        found = frozen(self.facts.name, split)
        ids = split_ids(self.facts.name, split) if found is None else found.ids
        labels = self.labels_of(ids)
        if found is not None and digest_of(labels) != found.labels:
            part, _ = self._row(ids[0])
            raise BadData(
                f"{self._source(part).where}: the labels of split {split!r} are not those of "
                f"{self.facts.name} in its published order: another data set, or the images were "
                "put in another order."
            )

    def _row(self, id_: int) -> tuple[str, int]:
        return ("test", id_) if id_ < self.facts.test else ("train", id_ - self.facts.test)

    def _source(self, part: str) -> "Source":
        if part not in self._open:
            from dbp_bench.data.places import open_part

            source = open_part(self.facts, part, self.place)
            most = getattr(self.facts, part)
            if len(source.labels) > most:
                raise BadData(
                    f"{source.where}: {len(source.labels)} images; {self.facts.name} has {most} in "
                    f"its {part} part."
                )
            self._open[part] = source
        return self._open[part]

    def _pixels(self, ids: Sequence[int]) -> "list[Pixels]":
        _, height, width = self.facts.shape
        found = []
        rows = [self._row(i) for i in ids]
        streams = {
            part: self._source(part).pixels([row for p, row in rows if p == part])
            for part in {part for part, _ in rows}
        }
        for part, row in rows:
            pixels = next(streams[part])
            if pixels.shape != (height, width, 3):
                raise BadData(
                    f"{self._source(part).where}: image {row} is {pixels.shape[1]} x "
                    f"{pixels.shape[0]} pixels; {self.facts.name} has {width} x {height}."
                )
            found.append(pixels)
        return found


def digits() -> Digits:
    """The UCI handwritten digits bundled by scikit-learn: 1,797 images, 8 x 8, 17 grey levels.

    CC BY 4.0, Alpaydin and Kaynak 1998; see ``assets/digits.md``. Pixels are stored compressed.
    """
    import torch

    path = ASSETS / "digits.safetensors"
    verify(path, _DIGITS)
    tensors = load(path)
    pixels = zlib.decompress(bytes(tensors["pixels_zlib"].tolist()))
    images = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(-1, 1, 8, 8)
    ids = {split: split_ids("digits", split) for split in split_names("digits")}
    return Digits(images.float() / 16, tensors["labels"].long(), ids, _DIGITS)


def names() -> list[str]:
    """The data sets that can be named in a track."""
    return sorted(CATALOG)


def load_data(name: str, place: Path | None = None, split: str | None = None) -> DataSet:
    """The data set called `name`.

    Args:
        name: The data set's name.
        place: The file or folder that the user names; see :func:`dbp_bench.data.places.open_part`.
        split: The split that will be used: that its images are there, in order, is verified at
            once.

    Raises:
        BadEntry: There is no such data set or split.
        BadData: Its files are not there, or are not what they should be.
        BadExtra: A package that reads them is missing.
    """
    facts = facts_of(name)
    if name == "digits":
        if place is not None:
            raise BadData(
                f"--data {place}: the images of data set 'digits' come with the package, and no "
                "file is read for them. Leave out --data, or take a track of other data."
            )
        return digits()
    data = Stored(facts, place)
    if split is not None:
        data.verify(split)
    return data


def stand_in(name: str, count: int) -> "tuple[Tensor, Tensor]":
    """`count` grey images ``(b, c, h, w)`` and labels 0: enough to time a pass without the data."""
    import torch

    return torch.full((count, *facts_of(name).shape), 0.5), torch.zeros(count, dtype=torch.int64)


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
