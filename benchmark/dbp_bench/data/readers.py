"""Files that hold labelled images: parquet, npz, CIFAR's binary version, folders, what ships.

Labels are read at once; pixels only of the rows that are asked for. Nothing read here can run code.
"""

import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dbp_bench.data.catalog import Facts
from dbp_bench.errors import BadData, DbpError
from dbp_bench.extras import BadExtra
from dbp_bench.weights.files import verify
from dbp_bench.weights.places import ASSETS

Pixels = NDArray[np.uint8]
"""An image ``(h, w, c)`` of whole numbers in 0 ... 255."""

INSTALL = 'pip install "dbp-bench[data]"'
ABSENT = -1
"""The label of a row whose image isn't there."""
SUFFIXES = {".png", ".jpg", ".jpeg"}
_ORIENTATION = 0x0112
"""The tag of EXIF that says how an image is to be turned."""


@dataclass(frozen=True, slots=True)
class Source:
    """Images and labels, by row."""

    where: Path
    """The file or folder, for messages."""
    labels: NDArray[np.int64]
    """The label of each row; ABSENT where there is no image."""
    image: Callable[[int], Pixels]
    """Reads the image of a row."""


def shipped(facts: Facts) -> Source:
    """The images that ship with the package, with the pixels compressed.

    Raises:
        BadWeights: The file is damaged.
    """
    from safetensors.numpy import load_file

    path = ASSETS / f"{facts.name}.safetensors"
    assert facts.shipped is not None
    verify(path, facts.shipped)
    tensors = load_file(path)
    raw = np.frombuffer(zlib.decompress(tensors["pixels_zlib"].tobytes()), np.uint8)
    images = raw.reshape(-1, *facts.shape).transpose(0, 2, 3, 1)
    return Source(path, tensors["labels"].astype(np.int64), images.__getitem__)


def parquet(files: Sequence[Path], facts: Facts) -> Source:
    """Parquet in the layout of the Hugging Face hub: encoded images, and a column of labels.

    Raises:
        BadData: A file is damaged, or has other columns.
        BadExtra: pyarrow is missing.
    """
    arrow = need("pyarrow.parquet", "reading parquet")
    groups: list[tuple[Path, Any, str, int]] = []
    labels = []
    for path in files:
        with _reading(path):
            file = arrow.ParquetFile(path)
            column, label = _columns(file.schema_arrow, facts, path)
            found = file.read(columns=[label])[label]
            labels.append(_whole_numbers(found.to_numpy(), path))
        groups += [(path, file, column, group) for group in range(file.num_row_groups)]
    sizes = [file.metadata.row_group(group).num_rows for _, file, _, group in groups]
    starts = np.cumsum([0, *sizes])

    @lru_cache(maxsize=1)
    def encoded(number: int) -> Any:
        path, file, column, group = groups[number]
        with _reading(path):
            # One array: finding a row among many chunks takes longer than decoding it.
            return file.read_row_group(group, columns=[column])[column].combine_chunks()

    def image(row: int) -> Pixels:
        number = int(np.searchsorted(starts, row, side="right")) - 1
        where = f"{groups[number][0]}: row {row}"
        cell = encoded(number)[row - int(starts[number])].as_py()
        raw = cell.get("bytes") if isinstance(cell, dict) else cell
        if not isinstance(raw, bytes):
            raise BadData(f"{where}: no image bytes in it.")
        return decode(raw, where, facts)

    return Source(_place(files), np.concatenate(labels), image)


def npz(path: Path, part: str, facts: Facts) -> Source:
    """Arrays ``x_test`` and ``y_test``, or ``images`` and ``labels``; uint8, NHWC or NCHW.

    Grey images may also be ``(n, h, w)``.

    Raises:
        BadData: An array is missing or of another type or shape, or the file is damaged.
    """
    names = [(f"x_{part}", f"y_{part}"), ("images", "labels")][: 2 if part == "test" else 1]
    with (
        _reading(path),
        path.open("rb") as file,
        # No pickles: an array of objects could run code.
        np.load(file, allow_pickle=False) as arrays,
    ):
        pair = next((pair for pair in names if {*pair} <= {*arrays.files}), None)
        if pair is None:
            want = " or ".join(f"{images} and {labels}" for images, labels in names)
            raise BadData(f"{path}: it has {', '.join(arrays.files)}, not {want}.")
        images, labels = arrays[pair[0]], arrays[pair[1]]
        if not (isinstance(images, np.ndarray) and isinstance(labels, np.ndarray)):
            raise ValueError("a member is no array")  # its first bytes are others
    if images.dtype != np.uint8:
        raise BadData(f"{path}: {pair[0]} is {images.dtype}: give uint8 in 0 ... 255.")
    c = facts.shape[0]
    if images.ndim == 3 and c == 1:
        images = images[..., None]
    if images.ndim == 4 and images.shape[-1] != c and images.shape[1] == c:
        images = images.transpose(0, 2, 3, 1)
    if images.ndim != 4 or images.shape[-1] != c:
        raise BadData(f"{path}: {pair[0]} is {images.shape}, not (n, h, w, {c}) or (n, {c}, h, w).")
    if labels.size != len(images):
        raise BadData(f"{path}: {labels.size} labels for {len(images)} images.")
    return Source(path, _whole_numbers(labels.ravel(), path), images.__getitem__)


def binary(files: Sequence[Path], facts: Facts) -> Source:
    """The binary version of CIFAR: of each image its labels, a byte each, then 3 x 32 x 32 bytes.

    Raises:
        BadData: A file ends inside an image.
    """
    size = facts.label_bytes + int(np.prod(facts.shape))
    parts = []
    for path in files:
        raw = np.fromfile(path, dtype=np.uint8)
        if raw.size == 0 or raw.size % size:
            raise BadData(
                f"{path}: {raw.size} bytes are not whole images of {size} bytes: the file is "
                f"damaged, or not the binary version of {facts.name}."
            )
        parts.append(raw.reshape(-1, size))
    records = np.concatenate(parts)
    images = records[:, facts.label_bytes :].reshape(-1, *facts.shape).transpose(0, 2, 3, 1)
    labels = records[:, facts.label_bytes - 1].astype(np.int64)
    return Source(_place(files), labels, images.__getitem__)


def _place(files: Sequence[Path]) -> Path:
    return files[0] if len(files) == 1 else files[0].parent


def folder(root: Path, facts: Facts) -> Source | None:
    """PNG or JPEG files in a folder for each class; None where there are no such folders.

    ImageNet's can also lie in one folder, with a file of their WordNet ids beside them. The images
    are put in the order of their file names over all classes, and ImageNet's take the number in the
    name: copies that keep the published names keep the published order.

    Raises:
        BadData: The folders aren't those of the classes, or an image has no class.
    """
    found = class_folders(root)
    classes = sorted(set(found.values()))
    if facts.name == "imagenet":
        classes = wordnet_ids()
        if not found and (images := _images_in(root)):
            names = _wordnet_ids_by_image(root)
            found = {path: names.get(path.stem, "") for path in images}
    if not found:
        return None
    number = {name: label for label, name in enumerate(classes)}
    unknown = next((path for path, name in found.items() if name not in number), None)
    if unknown is not None and unknown.parent == root:
        raise BadData(f"{unknown}: no WordNet id of ImageNet is given for it.")
    if unknown is not None or len(classes) != facts.classes:
        what = f"{len(classes)} found"
        if unknown is not None:
            what = f"{unknown.parent.name!r} is no WordNet id of ImageNet"
        raise BadData(f"{root}: {facts.name} has {facts.classes} classes, one folder each: {what}.")
    files: dict[int, Path] = {}
    for rank, path in enumerate(sorted(found, key=lambda path: (path.name, number[found[path]]))):
        at = re.fullmatch(r"ILSVRC2012_val_(\d{8})", path.stem)
        files[int(at[1]) - 1 if at and facts.name == "imagenet" else rank] = path
    if len(files) < len(found) or not 0 <= min(files) <= max(files) < max(facts.test, facts.train):
        raise BadData(f"{root}: an image stands there twice, or has a number out of range.")
    labels = np.full(max(files) + 1, ABSENT, dtype=np.int64)
    for row, path in files.items():
        labels[row] = number[found[path]]
    return Source(root, labels, lambda row: decode(files[row].read_bytes(), str(files[row]), facts))


def class_folders(root: Path) -> dict[Path, str]:
    """Each image in a folder for its class, and the name of the folder."""
    folders = sorted(path for path in _visible(root) if path.is_dir())
    return {path: place.name for place in folders for path in _images_in(place)}


def parquet_head(path: Path) -> tuple[bytes, list[str]]:
    """The first image of a parquet file, encoded, and the names of the classes that it declares.

    Raises:
        BadData: The file is damaged, empty, or has other columns.
        BadExtra: pyarrow is missing.
    """
    arrow = need("pyarrow.parquet", "reading parquet")
    with _reading(path):
        schema = (file := arrow.ParquetFile(path)).schema_arrow
        column, label = _columns(schema, Facts("a track", 2, (1, 1, 1), 0, 0), path)
        batch = next(file.iter_batches(1, columns=[column]), None)
        cell = batch[column][0].as_py() if batch else None
        raw = cell.get("bytes") if isinstance(cell, dict) else cell
        if not isinstance(raw, bytes):
            raise BadData(f"{path}: row 0: no image bytes in it.")
        # As the library of data sets of the Hugging Face hub writes them.
        said = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        feature = said.get("info", {}).get("features", {}).get(label, {})
        return raw, [str(name) for name in feature.get("names") or ()]


def npz_shape(path: Path) -> tuple[int, int, int]:
    """The shape ``(c, h, w)`` of the images of an npz file.

    Raises:
        BadData: The file is damaged, or holds no images.
    """
    with (
        _reading(path),
        path.open("rb") as file,
        np.load(file, allow_pickle=False) as arrays,
    ):
        name = next((name for name in ("x_test", "images") if name in arrays.files), None)
        if name is None:
            raise BadData(
                f"{path}: it has {', '.join(arrays.files)}, not x_test and y_test or images and "
                "labels."
            )
        shape = arrays[name].shape
    match shape:
        case (_, h, w):
            return 1, h, w
        case (_, h, w, 1 | 3 as c) | (_, 1 | 3 as c, h, w):
            return c, h, w
    raise BadData(
        f"{path}: {name} is {shape}, not (n, h, w), (n, h, w, c) or (n, c, h, w) with 1 or 3 "
        "channels."
    )


def shape_of(raw: bytes, where: str) -> tuple[int, int, int]:
    """The shape ``(c, h, w)`` of an encoded image: grey ones have one channel, others three.

    Raises:
        BadData: It isn't a PNG or JPEG file.
        BadExtra: Pillow is missing.
    """
    pillow = need("PIL.Image", "decoding images")
    try:
        with pillow.open(BytesIO(raw), formats=("PNG", "JPEG")) as opened:
            grey = opened.mode in ("1", "L")
            return (1 if grey else 3), opened.height, opened.width
    # What a decoder raises for a damaged file is anything.
    except Exception:
        raise BadData(f"{where}: neither PNG nor JPEG, or damaged.") from None


def wordnet_ids() -> list[str]:
    """The classes of ImageNet in the order of their labels, which is alphabetical."""
    return (ASSETS / "ids" / "imagenet-classes.txt").read_text(encoding="ascii").split()


def decode(raw: bytes, where: str, facts: Facts) -> Pixels:
    """The pixels of a PNG or JPEG file, in RGB, or in grey where the data set has one channel.

    Where the data set says so, the shorter side is resized (bilinear) and the centre cut out, as
    torchvision's ``Resize`` and ``CenterCrop`` do, and with them RobustBench.

    What can't be converted exactly is refused: more than 8 bits a channel, an alpha channel that
    isn't opaque everywhere, and a photograph that its camera says to turn. Only ImageNet's are
    taken as they are stored, unturned, as all who report numbers on it take them.

    Raises:
        BadData: It isn't one, is damaged, or can't be converted exactly.
        BadExtra: Pillow is missing.
    """
    pillow = need("PIL.Image", "decoding images")
    try:
        with pillow.open(BytesIO(raw), formats=("PNG", "JPEG")) as opened:
            # Pillow opens a PNG of 16 bits as one of 8 where it has colours or an alpha channel.
            if opened.mode[:1] in ("I", "F") or (opened.format == "PNG" and raw[24:25] == b"\x10"):
                raise BadData(f"{where}: pixels of 16 bits or more: give 8 bits for each channel.")
            _check_shown_as_stored(opened, where, facts)
            if facts.shape[0] == 1 and opened.mode not in ("1", "L"):
                raise BadData(f"{where}: an image of colours; {facts.name} has grey ones.")
            image = opened.convert("L" if facts.shape[0] == 1 else "RGB")
    except BadData:
        raise
    # What a decoder raises for a damaged file is anything.
    except Exception as error:
        cause = "neither PNG nor JPEG" if "cannot identify" in str(error) else str(error)
        raise BadData(f"{where}: a damaged image ({cause}). Fetch it again.") from None
    if facts.resize is not None:
        short, (width, height) = min(image.size), image.size
        size = (facts.resize * width // short, facts.resize * height // short)
        image = image.resize(size, pillow.Resampling.BILINEAR)
        _, h, w = facts.shape
        left, top = round((image.width - w) / 2), round((image.height - h) / 2)
        image = image.crop((left, top, left + w, top + h))
    return np.asarray(image).reshape(image.height, image.width, -1)


def _check_shown_as_stored(opened: Any, where: str, facts: Facts) -> None:
    """Refuse an image that a viewer doesn't show as its pixels are stored."""
    if opened.mode in ("LA", "RGBA", "PA", "La", "RGBa") or "transparency" in opened.info:
        alpha = opened.convert("RGBA").getchannel("A")
        if alpha.getextrema() != (255, 255):
            raise BadData(
                f"{where}: transparent pixels: what is behind them isn't said. Flatten the image."
            )
    turn = 1 if facts.resize is not None else opened.getexif().get(_ORIENTATION, 1)
    if turn != 1:
        raise BadData(
            f"{where}: its EXIF says to turn or mirror it (orientation {turn}): store the pixels "
            "as they are to be seen, without EXIF."
        )


def need(module: str, what: str) -> Any:
    """A module of the `data` extra.

    Raises:
        BadExtra: It is missing.
    """
    try:
        return import_module(module)
    except ImportError:
        name = {"PIL": "Pillow"}.get(module.split(".")[0], module.split(".")[0])
        raise BadExtra(f"{what} needs {name}. Install: {INSTALL}.") from None


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn the errors of a reader, which can be any for a damaged file, into one line."""
    try:
        yield
    except DbpError:
        raise
    except Exception as error:
        cause = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        raise BadData(f"{path}: cannot be read ({cause}). Fetch it again.") from None


def _columns(schema: Any, facts: Facts, path: Path) -> tuple[str, str]:
    """The columns of images and of labels."""
    names = list(schema.names)
    image = next((name for name in ("img", "image") if name in names), None)
    label = next((name for name in facts.label_columns if name in names), None)
    if image is None or label is None:
        want = f"img or image, and {' or '.join(facts.label_columns)}"
        raise BadData(f"{path}: columns {', '.join(names)}; {facts.name} needs {want}.")
    return image, label


def _whole_numbers(labels: Any, path: Path) -> NDArray[np.int64]:
    if not np.issubdtype(labels.dtype, np.integer):
        raise BadData(f"{path}: labels are {labels.dtype}, not whole numbers.")
    return np.asarray(labels, dtype=np.int64)


def _visible(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


def _images_in(folder: Path) -> list[Path]:
    return sorted(p for p in _visible(folder) if p.suffix.lower() in SUFFIXES)


_GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_SYNSETS = "imagenet_2012_validation_synset_labels.txt"
_SOLUTION = "LOC_val_solution.csv"


def _wordnet_ids_by_image(root: Path) -> dict[str, str]:
    """The WordNet id of each image, by its name without suffix."""
    for folder in (root, root.parent):
        if (path := folder / _SOLUTION).is_file():
            rows = [line.split(",", 1) for line in _lines(path)[1:]]
            return {row[0]: row[1].split()[0] for row in rows if len(row) == 2 and row[1].strip()}
        if (path := folder / _SYNSETS).is_file():
            return {f"ILSVRC2012_val_{i:08d}": name for i, name in enumerate(_lines(path), 1)}
    why = ""
    if any((folder / _GROUND_TRUTH).is_file() for folder in (root, root.parent)):
        why = f" ({_GROUND_TRUTH} counts classes in an order of its own)"
    raise BadData(
        f"{root}: images without classes. Put {_SOLUTION} or {_SYNSETS} beside them{why}, or the "
        "images into one folder for each WordNet id."
    )


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").split("\n")
