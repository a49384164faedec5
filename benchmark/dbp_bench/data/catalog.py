"""The data sets: their numbers of images and classes, their sizes, and their publications."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from dbp_bench.errors import BadEntry, did_you_mean


@dataclass(frozen=True, slots=True)
class Hub:
    """Parquet files of a data set repository on the Hugging Face hub, at one commit."""

    repository: str
    revision: str
    folder: str

    def file(self, part: str) -> str:
        """The file of the test or training images."""
        return f"{self.folder}/{part}-00000-of-00001.parquet"


@dataclass(frozen=True, slots=True)
class Facts:
    """The facts of a data set that are known before any file of it is read.

    Ids count the test images in their published order, then the training images in theirs:
    training image ``i`` has the id ``test + i``. Those of a file that ships count its images.
    """

    name: str
    classes: int
    shape: tuple[int, int, int]
    """``(c, h, w)``."""
    test: int
    """Number of test images."""
    train: int
    """Number of training images; 0 where none is read."""
    levels: int = 255
    """The whole number in a file that stands for 1."""
    label_columns: tuple[str, ...] = ("label",)
    """Columns that can hold the labels in parquet files; the first that is there is taken."""
    hub: Hub | None = None
    binary: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    """Names of the files of the authors' binary version: test, training."""
    label_bytes: int = 1
    """Bytes of labels before each image of the binary version; the last one counts."""
    resize: int | None = None
    """The shorter side to which an image is resized before its centre is cut out."""
    shipped: str | None = None
    """The sha256 of the file that ships with the package, if one does."""
    pixels: Mapping[str, str] = field(default_factory=dict)
    """The digest that the images and labels of each split must have.

    It is that of :meth:`dbp_bench.data.DataSet.pixel_digest`, and is filled in where the published
    files are lossless and somebody has computed it from them. Where it is blank, nothing is
    compared: a result records the digest of the images that it was computed on.
    """
    own: bool = False
    """True if a track declares it: images of one's own, all of which count as test images."""


CATALOG = {
    facts.name: facts
    for facts in (
        Facts(
            "digits",
            10,
            (1, 8, 8),
            test=360,
            train=1437,
            levels=16,
            shipped="6eb3236e2694a43165707b1dc0277ad68a0bd8259c1ee2fcedc532eb2fbec6a4",
            pixels={
                "test": "65394ff2dd85425ca881a4b0fe179923772d4483d365e703205d2f45d7c6373b",
                "train": "527081e686742b6d253e111011a3c8a739867bae0034fbe2ad49703b8fc7458a",
                "validation": "943b5db27d119c0104df5c8129e3d39cb27a3d3187ca207505a86cb1505c47e0",
            },
        ),
        Facts(
            "cifar10",
            10,
            (3, 32, 32),
            test=10_000,
            train=50_000,
            hub=Hub("uoft-cs/cifar10", "0b2714987fa478483af9968de7c934580d0bb9a2", "plain_text"),
            binary=(("test_batch.bin",), tuple(f"data_batch_{i}.bin" for i in range(1, 6))),
        ),
        Facts(
            "cifar100",
            100,
            (3, 32, 32),
            test=10_000,
            train=50_000,
            label_columns=("fine_label", "label"),
            hub=Hub("uoft-cs/cifar100", "aadb3af77e9048adbea6b47c21a81e47dd092ae5", "cifar100"),
            binary=(("test.bin",), ("train.bin",)),
            label_bytes=2,
        ),
        # CIFAR-10 after JPEG: another data set, for trials where the original can't be had.
        Facts("cifar10-jpeg", 10, (3, 32, 32), test=5_000, train=50_000),
        # The 50,000 validation images are the test images: the labels of the others aren't public.
        Facts("imagenet", 1000, (3, 224, 224), test=50_000, train=0, resize=256),
    )
}


def facts_of(name: str | Facts) -> Facts:
    """The facts of the built-in data set called `name`; facts themselves are as they are.

    Raises:
        BadEntry: There is none.
    """
    if isinstance(name, Facts):
        return name
    if name not in CATALOG:
        raise BadEntry(f"no data set {name!r}.{did_you_mean(name, CATALOG)}")
    return CATALOG[name]
