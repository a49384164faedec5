"""Data sets and their frozen lists of image ids."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dbp_bench.errors import BadEntry, BadRequest, did_you_mean
from dbp_bench.weights import ASSETS, digest, load

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class DataSet:
    """Images in [0, 1], their labels, and named lists of ids."""

    images: "Tensor"
    """float32 ``(n, c, h, w)`` in [0, 1]; an image's id is its index."""
    labels: "Tensor"
    """int64 ``(n,)``."""
    ids: dict[str, list[int]]
    """Frozen lists: which images a split holds, and in which order."""
    sha256: str

    def select(self, ids: Sequence[int]) -> "tuple[Tensor, Tensor]":
        """Images and labels of `ids`."""
        return self.images[list(ids)], self.labels[list(ids)]


def digits() -> DataSet:
    """The UCI handwritten digits bundled by scikit-learn: 1,797 images, 8 x 8, 17 grey levels.

    CC BY 4.0, Alpaydin and Kaynak 1998; see ``assets/digits.md``. Pixels are stored compressed.
    """
    import torch

    path = _FILES["digits"]
    tensors = load(path)
    pixels = zlib.decompress(bytes(tensors["pixels_zlib"].tolist()))
    images = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(-1, 1, 8, 8)
    ids = {name: tensors[f"{name}_ids"].tolist() for name in ("train", "test")}
    return DataSet(images.float() / 16, tensors["labels"].long(), ids, digest(path))


_LOADERS = {"digits": digits}
_FILES = {"digits": ASSETS / "digits.safetensors"}


def names() -> list[str]:
    """The data sets that can be named in a track."""
    return sorted(_LOADERS)


def load_data(name: str) -> DataSet:
    """The data set called `name`.

    Raises:
        BadEntry: There is none.
    """
    if name not in _LOADERS:
        raise BadEntry(f"no data set {name!r}.{did_you_mean(name, _LOADERS)}")
    return _LOADERS[name]()


def split_ids(name: str, split: str) -> list[int]:
    """The frozen ids of a split, read without torch.

    Raises:
        BadEntry: There is no such data set or split.
    """
    from safetensors.numpy import load_file

    if name not in _FILES:
        raise BadEntry(f"no data set {name!r}.{did_you_mean(name, _FILES)}")
    lists = {k[: -len("_ids")]: v for k, v in load_file(_FILES[name]).items() if "_ids" in k}
    if split not in lists:
        raise BadEntry(f"data set {name!r} has no split {split!r}.{did_you_mean(split, lists)}")
    return [int(i) for i in lists[split]]


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
