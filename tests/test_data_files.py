"""Data sets in files of the published layouts, generated here: formats, order, and bad input."""

import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits

import id_lists
from dbp_bench.data import catalog, load_data, places, readers, split_ids, splits
from dbp_bench.data.catalog import Facts, facts_of
from dbp_bench.data.readers import decode
from dbp_bench.errors import BadData, BadEntry, BadWeights
from dbp_bench.extras import BadExtra
from dbp_bench.result import Result
from own_entries import folder as entries_folder
from own_entries import toy_defense

if TYPE_CHECKING:
    from conftest import Command

Pixels = NDArray[np.uint8]

TEST, TRAIN = 30, 40
LABELS = [int(label) for label in np.random.default_rng(1).permutation(np.arange(TEST) % 10)]
TRAIN_LABELS = [int(label) for label in np.random.default_rng(2).permutation(np.arange(TRAIN) % 10)]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Facts:
    """A data set with CIFAR-10's layouts and 30 + 40 images, its lists, and no network."""
    monkeypatch.delenv(places.VARIABLE, raising=False)
    facts = Facts("small", 10, (3, 32, 32), TEST, TRAIN, binary=catalog.CATALOG["cifar10"].binary)
    monkeypatch.setitem(catalog.CATALOG, "small", facts)
    folder = tmp_path / "lists"
    folder.mkdir()
    monkeypatch.setattr(splits, "LISTS", folder)
    monkeypatch.setattr(id_lists, "FIRST", 20)
    monkeypatch.setattr(id_lists, "STRATIFIED", 13)
    id_lists.write_lists("small", LABELS + TRAIN_LABELS, folder)
    return facts


def pictures(count: int, seed: int, size: int = 32) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


IMAGES, TRAIN_IMAGES = pictures(TEST, 3), pictures(TRAIN, 4)


def encoded(pixels: Pixels, form: str = "PNG", mode: str = "RGB") -> bytes:
    buffer = BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, form)
    return buffer.getvalue()


def parquet(
    path: Path,
    images: Pixels = IMAGES,
    labels: Any = LABELS,
    names: tuple[str, str] = ("img", "label"),
    rows: int = 7,
) -> Path:
    cells = [{"bytes": encoded(image), "path": None} for image in images]
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({names[0]: pa.array(cells, struct), names[1]: pa.array(labels)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows)
    return path


def as_parquet(folder: Path) -> Path:
    """As a clone of the hub's repository is laid out; the test images in two files."""
    half = TEST // 2
    parquet(folder / "plain_text/test-00000-of-00002.parquet", IMAGES[:half], LABELS[:half])
    parquet(folder / "plain_text/test-00001-of-00002.parquet", IMAGES[half:], LABELS[half:])
    parquet(folder / "plain_text/train-00000-of-00001.parquet", TRAIN_IMAGES, TRAIN_LABELS)
    return folder


def as_npz(folder: Path) -> Path:
    folder.mkdir(parents=True)
    arrays = {"x_test": IMAGES, "y_test": np.array(LABELS, np.uint8)[:, None]}
    arrays |= {"x_train": TRAIN_IMAGES.transpose(0, 3, 1, 2), "y_train": np.array(TRAIN_LABELS)}
    np.savez(folder / "small.npz", **arrays)  # type: ignore[arg-type]
    return folder / "small.npz"


def as_binary(folder: Path) -> Path:
    inside = folder / "cifar-10-batches-bin"
    inside.mkdir(parents=True)
    (inside / "test_batch.bin").write_bytes(records(IMAGES, LABELS))
    for i in range(5):
        part = slice(8 * i, 8 * i + 8)
        raw = records(TRAIN_IMAGES[part], TRAIN_LABELS[part])
        (inside / f"data_batch_{i + 1}.bin").write_bytes(raw)
    return folder


def records(images: Pixels, labels: list[int]) -> bytes:
    pairs = zip(images, labels, strict=True)
    return b"".join(bytes([y]) + x.transpose(2, 0, 1).tobytes() for x, y in pairs)


def as_folders(folder: Path) -> Path:
    """A folder for each class; the file names keep the published order."""
    parts = (("test", IMAGES, LABELS), ("train", TRAIN_IMAGES, TRAIN_LABELS))
    for part, images, labels in parts:
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = folder / part / f"class{label}" / f"{i:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(image))
            (path.parent / "._00000.png").write_bytes(b"an editor's or a Mac's")
    return folder


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "parquet": as_parquet,
    "npz": as_npz,
    "binary": as_binary,
    "folders": as_folders,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_images(layout: str, small: Facts, tmp_path: Path) -> None:
    place = LAYOUTS[layout](tmp_path / "data")
    data = load_data("small", place, "stratified-512")
    ids = [29, 0, 7, TEST + 39, 8, TEST]
    want = np.stack([IMAGES[29], IMAGES[0], IMAGES[7], TRAIN_IMAGES[39], IMAGES[8]])
    images, labels = data.select(ids)
    assert images.dtype == torch.float32
    assert images.shape == (6, 3, 32, 32)
    assert np.array_equal((255 * images[:5].permute(0, 2, 3, 1)).numpy(), want.astype(np.float32))
    both = LABELS + TRAIN_LABELS
    assert labels.tolist() == data.labels_of(ids) == [both[i] for i in ids]
    assert labels.dtype == torch.int64
    total = sha256()
    for i in (29, TEST):
        total.update(f"{both[i]},(32, 32, 3);".encode())
        total.update((IMAGES[29] if i == 29 else TRAIN_IMAGES[0]).tobytes())
    assert data.digest([29, TEST]) == total.hexdigest()
    for split in ("test", "train", "first-1024", "stratified-512", "validation"):
        load_data("small", place, split)
        assert data.ids[split] == split_ids("small", split)


def test_values_are_whole_numbers_of_255(small: Facts, tmp_path: Path) -> None:
    ramp = np.arange(32 * 32 * 3, dtype=np.uint32).reshape(1, 32, 32, 3) % 256
    path = parquet(tmp_path / "test.parquet", np.repeat(ramp.astype(np.uint8), TEST, 0))
    image = load_data("small", path).select([5])[0][0]
    assert image.min() == 0
    assert image.max() == 1
    assert torch.equal(image, (torch.from_numpy(ramp[0].astype(np.float32)) / 255).permute(2, 0, 1))


def test_only_the_images_asked_for_are_decoded(
    small: Facts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    decode = readers.decode

    def listening(raw: bytes, where: str, facts: Facts) -> readers.Pixels:
        seen.append(where.rsplit(" ", 1)[-1])
        return decode(raw, where, facts)

    monkeypatch.setattr(readers, "decode", listening)
    load_data("small", as_parquet(tmp_path), "first-1024").select([17, 2])
    assert seen == ["17", "2"]


def test_one_folder_for_several_data_sets(
    small: Facts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_npz(tmp_path / "inner").rename(tmp_path / "small.npz")
    (tmp_path / "cifar10").mkdir()
    monkeypatch.setenv(places.VARIABLE, str(tmp_path))
    assert load_data("small").labels_of([3]) == [LABELS[3]]
    with pytest.raises(BadData, match=r"DBP_BENCH_DATA .*cifar10: no test images of cifar10 there"):
        load_data("cifar10").labels_of([3])
    # What is given goes before the variable.
    with pytest.raises(BadData, match=r"--data /nowhere: no such file or folder"):
        load_data("small", Path("/nowhere")).labels_of([3])


def test_a_folder_of_another_data_set_is_left_alone(small: Facts, tmp_path: Path) -> None:
    parquet(tmp_path / "cifar10" / "test.parquet")
    assert "no test images of small there" in told(tmp_path)
    assert load_data("small", tmp_path / "cifar10").labels_of([3]) == [LABELS[3]]
    parquet(tmp_path / "deep" / "small" / "below" / "test.parquet")
    assert "no test images of small there" in told(tmp_path / "deep" / "..")
    assert load_data("small", tmp_path / "deep").labels_of([3]) == [LABELS[3]]


def test_fine_labels_of_cifar100(tmp_path: Path) -> None:
    table = {"img": [{"bytes": encoded(IMAGES[0])}], "fine_label": [71], "coarse_label": [3]}
    pq.write_table(pa.table(table), tmp_path / "test-00000-of-00001.parquet")
    assert load_data("cifar100", tmp_path).labels_of([0]) == [71]
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    (folder / "test.bin").write_bytes(b"\x03\x47" + IMAGES[0].transpose(2, 0, 1).tobytes())
    data = load_data("cifar100", folder)
    assert data.labels_of([0]) == [71]
    assert torch.equal(data.select([0])[0], load_data("cifar100", tmp_path).select([0])[0])


# ----------------------------------------------------------------------------------------- ImageNet

VAL = "ILSVRC2012_val_{:08d}"


def photo(path: Path, width: int, height: int) -> Pixels:
    """A JPEG whose red is its column and whose green is its row, and the pixels it decodes to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 // width, y * 255 // height, 0 * x], -1).astype(np.uint8)
    Image.fromarray(pixels).save(path, "JPEG", quality=100, subsampling=0)
    return np.asarray(Image.open(path))


def test_imagenet_in_class_folders(tmp_path: Path) -> None:
    names = readers.wordnet_ids()
    photo(tmp_path / "val" / names[999] / f"{VAL.format(7)}.JPEG", 500, 256)
    photo(tmp_path / "val" / names[0] / f"{VAL.format(3)}.JPEG", 256, 400)
    data = load_data("imagenet", tmp_path)
    assert data.labels_of([6, 2]) == [999, 0]
    wide, tall = data.select([6, 2])[0]
    # 500 x 256 isn't resized: columns 138 ... 361, rows 16 ... 239; then 256 x 400.
    assert float(wide[0, 100, 0]) * 255 == pytest.approx(138 * 255 // 500, abs=2)
    assert float(wide[0, 100, 223]) * 255 == pytest.approx(361 * 255 // 500, abs=2)
    assert float(wide[1, 0, 100]) * 255 == pytest.approx(16 * 255 // 256, abs=2)
    assert float(tall[1, 0, 100]) * 255 == pytest.approx(88 * 255 // 400, abs=2)
    assert float(tall[0, 100, 223]) * 255 == pytest.approx(239 * 255 // 256, abs=2)
    with pytest.raises(BadData, match=r"2 images, and number 4 \(from 0\) is not there"):
        data.labels_of([4])
    photo(tmp_path / "val" / "n00000000" / f"{VAL.format(9)}.JPEG", 300, 300)
    with pytest.raises(BadData, match=r"1000 classes, one folder each: 'n00000000' is no WordNet"):
        load_data("imagenet", tmp_path).labels_of([6])


def test_imagenet_is_resized_to_256(tmp_path: Path) -> None:
    pixels = photo(tmp_path / readers.wordnet_ids()[5] / f"{VAL.format(1)}.JPEG", 768, 512)
    image = load_data("imagenet", tmp_path).select([0])[0][0]
    want = np.asarray(Image.fromarray(pixels).resize((384, 256), Image.Resampling.BILINEAR))
    assert np.array_equal((255 * image).round().permute(1, 2, 0).numpy(), want[16:240, 80:304])


@pytest.mark.parametrize("beside", ["LOC_val_solution.csv", "synsets"])
def test_imagenet_flat(beside: str, tmp_path: Path) -> None:
    names = readers.wordnet_ids()
    for number in (2, 1):
        photo(tmp_path / f"{VAL.format(number)}.JPEG", 260, 260)
    if beside == "synsets":
        path = tmp_path / "imagenet_2012_validation_synset_labels.txt"
        path.write_text(f"{names[40]}\n{names[41]}\n")
    else:
        rows = [f"{VAL.format(2)},{names[41]} 1 2 3 4 ", f"{VAL.format(1)},{names[40]} 0 0 9 9"]
        (tmp_path / beside).write_text("\n".join(["ImageId,PredictionString", *rows, ""]))
    assert load_data("imagenet", tmp_path).labels_of([0, 1]) == [40, 41]


def test_imagenet_flat_without_its_classes(tmp_path: Path) -> None:
    photo(tmp_path / f"{VAL.format(1)}.JPEG", 260, 260)
    with pytest.raises(BadData, match=r"images without classes\. Put LOC_val_solution\.csv or"):
        load_data("imagenet", tmp_path).labels_of([0])
    (tmp_path / "ILSVRC2012_validation_ground_truth.txt").write_text("490\n")
    with pytest.raises(BadData, match="counts classes in an order of its own"):
        load_data("imagenet", tmp_path).labels_of([0])
    (tmp_path / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n")
    with pytest.raises(BadData, match="no WordNet id of ImageNet is given for it"):
        load_data("imagenet", tmp_path).labels_of([0])


# ---------------------------------------------------------------------------------------- bad input


def told(place: Path, split: str = "stratified-512", ids: list[int] | None = None) -> str:
    """The one line that refuses the data set at `place`."""
    with pytest.raises(BadData) as refused:
        load_data("small", place, split).select(ids or split_ids("small", split))
    message = str(refused.value)
    assert "\n" not in message
    return message


def test_another_order_is_refused(small: Facts, tmp_path: Path) -> None:
    backwards = parquet(tmp_path / "test.parquet", IMAGES[::-1], LABELS[::-1])
    assert "not those of small in its published order" in told(backwards)
    assert "not those of small in its published order" in told(backwards, "first-1024")


def test_too_few_and_too_many_images(small: Facts, tmp_path: Path) -> None:
    few = parquet(tmp_path / "test.parquet", IMAGES[:9], LABELS[:9])
    assert "9 images, and number 9 (from 0) is not there: small has 30 in its test" in told(
        few, "test"
    )
    many = parquet(tmp_path / "more" / "test.parquet", np.repeat(IMAGES, 2, 0), 2 * LABELS)
    assert "60 images; small has 30 in its test part" in told(many)


def test_a_test_file_has_no_training_images(small: Facts, tmp_path: Path) -> None:
    path = parquet(tmp_path / "test-00000-of-00001.parquet")
    assert "no training images of small there" in told(path, "validation")


def test_labels_out_of_range(small: Facts, tmp_path: Path) -> None:
    for wrong in (10, -3):
        path = parquet(tmp_path / f"{wrong}.parquet", IMAGES, [wrong, *LABELS[1:]])
        assert f"image 0 has label {wrong}; small has 0 ... 9" in told(path, "test")
    path = parquet(tmp_path / "words.parquet", IMAGES, [str(label) for label in LABELS])
    assert "not whole numbers" in told(path)


def test_images_of_another_size(small: Facts, tmp_path: Path) -> None:
    path = parquet(tmp_path / "test.parquet", pictures(TEST, 0, size=28))
    assert "image 0 is 28 x 28 pixels; small has 32 x 32" in told(path, "test")


def test_parquet_without_the_columns(small: Facts, tmp_path: Path) -> None:
    path = parquet(tmp_path / "test.parquet", names=("picture", "label"))
    assert "columns picture, label; small needs img or image, and label" in told(path)
    path = parquet(tmp_path / "b" / "test.parquet", names=("image", "class"))
    assert "columns image, class; small needs" in told(path)


def test_parquet_that_only_names_its_images(small: Facts, tmp_path: Path) -> None:
    cells = pa.array([{"path": "0.png"}] * TEST, pa.struct([("path", pa.string())]))
    pq.write_table(pa.table({"img": cells, "label": LABELS}), tmp_path / "test.parquet")
    assert "row 0: no image bytes in it" in told(tmp_path, "test")


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_damaged_images(form: str, small: Facts, tmp_path: Path) -> None:
    whole = encoded(IMAGES[0], form)
    damaged = {"half": whole[: len(whole) // 2], "text": b"<html>not found</html>", "none": b""}
    for name, raw in damaged.items():
        cells = [{"bytes": raw if i == 4 else encoded(IMAGES[i])} for i in range(TEST)]
        path = tmp_path / f"test-{name}.parquet"
        pq.write_table(pa.table({"img": cells, "label": LABELS}), path)
        assert f"{path}: row 4: a damaged image" in told(path, "test", [0, 4])
        assert len(load_data("small", path).select([3])[1]) == 1


def test_damaged_files(small: Facts, tmp_path: Path) -> None:
    whole = parquet(tmp_path / "whole.parquet").read_bytes()
    for name, raw in {"half": whole[:900], "page": b"<html>", "none": b""}.items():
        path = tmp_path / name / "test.parquet"
        path.parent.mkdir()
        path.write_bytes(raw)
        assert f"{path}: cannot be read" in told(path)
        path.rename(path.with_suffix(".npz"))
        assert f"{path.with_suffix('.npz')}: cannot be read" in told(path.with_suffix(".npz"))
    short = tmp_path / "test_batch.bin"
    short.write_bytes(records(IMAGES, LABELS)[:-1])
    assert "are not whole images of 3073 bytes" in told(short)


def test_npz_of_another_kind(small: Facts, tmp_path: Path) -> None:
    def refused(**arrays: Any) -> str:
        np.savez(tmp_path / "a.npz", **arrays)
        return told(tmp_path / "a.npz")

    labels = np.array(LABELS)
    assert "it has pictures, not x_test and y_test or images and labels" in refused(pictures=labels)
    floats = (IMAGES / 255).astype(np.float32)
    assert "images is float32: give uint8 in 0 ... 255" in refused(images=floats, labels=labels)
    assert "not (n, h, w, 3)" in refused(images=IMAGES[..., 0], labels=labels)
    assert "29 labels for 30 images" in refused(images=IMAGES, labels=labels[:29])
    hostile = np.array([Bomb()], dtype=object)
    assert "cannot be read" in refused(images=hostile, labels=labels)
    assert not Bomb.exploded


class Bomb:
    exploded = False

    def __reduce__(self) -> tuple[Any, ...]:
        return (setattr, (Bomb, "exploded", True))


def test_the_python_version_of_cifar_is_refused(small: Facts, tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "test_batch").write_bytes(b"\x80\x04N.")
    for place in (tmp_path, folder, folder / "test_batch"):
        message = told(place)
        assert "is a pickle" in message
        assert "cifar-10-binary.tar.gz" in message


def test_folders_of_the_wrong_number_of_classes(small: Facts, tmp_path: Path) -> None:
    as_folders(tmp_path)
    (tmp_path / "test" / "class9").rename(tmp_path / "class9")
    assert "small has 10 classes, one folder each: 9 found" in told(tmp_path)


def test_sixteen_bits(small: Facts, tmp_path: Path) -> None:
    as_folders(tmp_path)
    path = next((tmp_path / "test").glob("*/00004.png"))
    Image.fromarray(IMAGES[4, :, :, 0].astype(np.uint16) * 256).save(path)
    assert "give 8 bits for each channel" in told(tmp_path, "test", [4])


def test_nothing_there(small: Facts, tmp_path: Path) -> None:
    message = told(tmp_path)
    assert "no test images of small there" in message
    assert "npz" in message
    with pytest.raises(BadData, match=r"not on this machine\. Give --data PATH \(or DBP_BENCH_DAT"):
        load_data("small", None, "test")


@pytest.mark.parametrize("module", ["pyarrow", "PIL"])
def test_missing_extra(
    module: str, small: Facts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = parquet(tmp_path / "test.parquet")
    for name in {"pyarrow": ["pyarrow", "pyarrow.parquet"], "PIL": ["PIL.Image"]}[module]:
        monkeypatch.setitem(__import__("sys").modules, name, None)
    known = {"pyarrow": "pyarrow", "PIL": "Pillow"}[module]
    with pytest.raises(BadExtra, match=rf'needs {known}\. Install: pip install "dbp-bench\[data\]'):
        load_data("small", path).select([0])


def test_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(places.VARIABLE, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BadData) as refused:
        load_data("cifar10", None, "stratified-512")
    message = str(refused.value)
    for part in ("uoft-cs/cifar10", "HF_HUB_OFFLINE is set", "Give --data PATH"):
        assert part in message
    assert "\n" not in message
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_cache_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In the layout of huggingface_hub's cache, at the pinned commit; nothing is asked for."""
    monkeypatch.delenv(places.VARIABLE, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.get_hf_file_metadata", None)
    hub = catalog.CATALOG["cifar10"].hub
    assert hub is not None
    folder = tmp_path / "datasets--uoft-cs--cifar10" / "snapshots" / hub.revision
    parquet(folder / hub.file("test"))
    assert load_data("cifar10").labels_of([0, 29]) == [LABELS[0], LABELS[29]]
    with pytest.raises(BadData, match="not there"):
        load_data("cifar10", None, "test")


# ------------------------------------------------------------------------------- from the commands

TOY = """
import torch


class Linear(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3 * 32 * 32, 10)

    def forward(self, images):
        return self.layer(images.flatten(1) - 0.5)
"""


@pytest.fixture
def own(small: Facts, tmp_path: Path) -> Path:
    """Entries of one's own: a track on the small data set, and a defense for it."""
    folder = tmp_path / "own"
    weights = torch.sin(torch.arange(10 * 3072.0)).view(10, 3072)
    (folder / "tracks").mkdir(parents=True)
    file = folder / "tracks" / "linear.safetensors"
    save_file({"layer.weight": weights, "layer.bias": torch.zeros(10)}, file)
    (folder / "toy_small.py").write_text(TOY)
    track = {
        "title": "Small",
        "data": "small",
        "split": "stratified-512",
        "classifier": {
            "network": "toy_small:Linear",
            "file": file.name,
            "sha256": sha256(file.read_bytes()).hexdigest(),
        },
        "norm": "linf",
        "eps": "8/255",
        "batch_size": 4,
        "max_batch": 8,
        "demonstration": True,
        "note": "A toy.",
    }
    defense = toy_defense("dbp_bench.purifiers.controls:Unpurified", [])
    defense["settings"][0]["tracks"] = ["small-linf"]
    return entries_folder(folder, tracks={"small-linf": track}, defenses={"bare": defense})


ASK = ("--track", "small-linf", "--defense", "bare", "--threat", "dwbox", "--trust-code")


def test_run_on_files(own: Path, tmp_path: Path, command: "Command") -> None:
    files = {}
    for layout in ("parquet", "npz"):
        place, out = LAYOUTS[layout](tmp_path / layout), tmp_path / f"results-{layout}"
        said = command("run", *ASK, "--entries", own, "--out", out, "--data", place)
        assert said.code == 0, said.err
        (path,) = out.glob("small-linf/*/*/*/seed-0.json")
        files[layout] = path.read_bytes()
    # The record is a function of the images, not of the file they came from.
    assert files["parquet"] == files["npz"]
    result = Result.read(path)
    assert result.ids == split_ids("small", "stratified-512")
    assert result.labels == [LABELS[i] for i in result.ids]
    data = load_data("small", place)
    assert result.provenance.data == data.digest(result.ids)
    # A linear classifier is right where the largest product with the image is that of its label.
    x = data.select(result.ids)[0].flatten(1) - 0.5
    right = (x @ torch.sin(torch.arange(10 * 3072.0)).view(10, 3072).T).argmax(1)
    want = (right == torch.tensor(result.labels)).tolist()
    assert result.right("clean")[:, 0].tolist() == want


def test_plan_needs_no_data_and_run_says_so(own: Path, tmp_path: Path, command: "Command") -> None:
    said = command("run", "--dry-run", *ASK, "--entries", own)
    assert said.code == 0, said.err
    assert "13" in said.out
    said = command("run", *ASK, "--entries", own, "--out", tmp_path / "out")
    assert said.code == 2
    assert said.err.count("\n") == 1
    assert "data set 'small' is not on this machine. Give --data PATH" in said.err
    assert not list((tmp_path / "out").rglob("*.json.tmp"))
    assert not list((tmp_path / "out").rglob("seed-0.json"))


def test_a_damaged_image_is_found_before_the_attack(
    own: Path, tmp_path: Path, command: "Command", monkeypatch: pytest.MonkeyPatch
) -> None:
    as_folders(tmp_path / "data")
    last = split_ids("small", "stratified-512")[-1]
    path = next((tmp_path / "data/test").glob(f"*/{last:05d}.png"))
    path.write_bytes(path.read_bytes()[:200])
    monkeypatch.setattr("dbp_bench.runs.execute.evaluation.attack", None)
    said = command(
        "run", *ASK, "--entries", own, "--out", tmp_path / "out", "--data", tmp_path / "data"
    )
    assert said.code == 2
    assert f"{path}: a damaged image" in said.err


# ----------------------------------------------------------------------------------------- splits

FROZEN = {
    "cifar10-first-1024": ("bac9947d667ebc4a", "9dfe4f4dc94664d8"),
    "cifar10-jpeg-first-1024": ("bac9947d667ebc4a", "2f9f519144b42109"),
    "cifar10-jpeg-stratified-512": ("272607e5e100cd2e", "7586bca917ef3cd9"),
    "cifar10-jpeg-validation": ("c8b34a81b1dd885a", "7586bca917ef3cd9"),
    "cifar10-stratified-512": ("8b62b13bafccad91", "42e0f564e1322f8d"),
    "cifar10-validation": ("8897307b66ce7600", "42e0f564e1322f8d"),
    "cifar100-first-1024": ("bac9947d667ebc4a", "d2803493c1028b18"),
    "cifar100-stratified-512": ("4d43205eaca1a0c7", "e6db29f99583b34b"),
    "cifar100-validation": ("499d8097fe0df611", "e6db29f99583b34b"),
    "digits-validation": ("58399aa39bd6ee3e", "3b89a39f21318373"),
    "imagenet-first-1024": ("bac9947d667ebc4a", "01ad3b96b3789589"),
    "imagenet-stratified-512": ("f6fcae616d0bde11", "7ba119e24692c886"),
    "imagenet-validation": ("ab5d7327c873a080", "7ba119e24692c886"),
}
"""Start of the sha256 of the ids, and of the labels, of every list."""


def test_rounds_by_hand() -> None:
    labels = [2, 0, 0, 1, 2, 0]
    turns = sorted((0, 1, 2), key=lambda y: sha256(f"toy/{y}".encode()).digest())
    first = {0: 1, 1: 3, 2: 0}
    second = {0: 2, 2: 4}
    want = [first[y] for y in turns] + [second[y] for y in turns if y in second] + [5]
    assert id_lists.stratified("toy", labels, range(6), 9) == want
    assert id_lists.stratified("toy", labels, range(6), 4) == want[:4]


def test_unknown_splits() -> None:
    with pytest.raises(
        BadEntry, match=r"no split 'train'.*Known: first-1024, stratified-512, test"
    ):
        split_ids("imagenet", "train")
    with pytest.raises(BadEntry, match=r"no data set 'cifar'\. Did you mean 'cifar10'\?"):
        split_ids("cifar", "test")


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "cifar10-jpeg", "imagenet"])
def test_lists(name: str) -> None:
    facts = catalog.facts_of(name)
    assert split_ids(name, "test") == list(range(facts.test))
    assert split_ids(name, "first-1024") == list(range(1024))
    chosen, held_out = split_ids(name, "stratified-512"), split_ids(name, "validation")
    assert len(set(chosen)) == len(chosen) == len(set(held_out)) == len(held_out) == 512
    assert set(chosen) <= set(range(facts.test))
    if facts.train:
        train = split_ids(name, "train")
        last = facts.test + facts.train
        assert sorted(train + held_out) == list(range(facts.test, last))
    else:
        assert not set(held_out) & ({*chosen} | {*range(1024)})


def test_frozen_lists() -> None:
    """Ids and labels of every committed list."""
    found = {}
    for path in sorted(splits.LISTS.glob("*-*.txt")):
        if path.stem == "imagenet-classes":
            continue
        name = max((n for n in catalog.CATALOG if path.stem.startswith(f"{n}-")), key=len)
        split = path.stem.removeprefix(f"{name}-")
        entry = splits.frozen(name, split)
        assert entry is not None
        assert path.read_text().startswith(f"# {name}, split {split}: ids of {len(entry.ids)} im")
        found[path.stem] = (splits.digest_of(entry.ids)[:16], entry.labels[:16])
    assert found == FROZEN


def test_the_digits_list_follows_from_its_rule(tmp_path: Path) -> None:
    data = load_data("digits")
    labels = data.labels_of(range(1797))
    (path,) = id_lists.write_lists("digits", labels, tmp_path)
    assert path.read_text() == (splits.LISTS / path.name).read_text()
    chosen = split_ids("digits", "validation")
    assert set(chosen) <= set(data.ids["train"])
    assert np.bincount(data.labels_of(chosen)).tolist() == [18] * 10


def test_wordnet_ids() -> None:
    names = readers.wordnet_ids()
    assert len(set(names)) == 1000
    assert names == sorted(names)
    assert (names[0], names[-1]) == ("n01440764", "n15075141")


@pytest.mark.skipif("DBP_TEST_DATA" not in os.environ, reason="DBP_TEST_DATA names no data")
@pytest.mark.parametrize("name", ["cifar10", "cifar100", "cifar10-jpeg", "imagenet"])
def test_real_data(name: str, tmp_path: Path) -> None:
    """The lists follow from the labels of real files: one folder for each data set."""
    place = Path(os.environ["DBP_TEST_DATA"]) / name
    if not place.exists():
        pytest.skip(f"no {name} there")
    facts = catalog.facts_of(name)
    data = load_data(name, place, "stratified-512")
    labels = data.labels_of(range(facts.test + facts.train))
    for path in id_lists.write_lists(name, labels, tmp_path):
        assert path.read_text() == (splits.LISTS / path.name).read_text()
    images, _ = data.select(split_ids(name, "stratified-512")[:64])
    assert images.shape == (64, *facts.shape)
    assert 0 <= float(images.min()) < 0.1 < 0.9 < float(images.max()) <= 1


# ------------------------------------------------------------------ what can't be converted exactly


def _png(mode: str, tmp_path: Path, **options: object) -> bytes:
    buffer = BytesIO()
    Image.new(mode, (32, 32)).save(buffer, "PNG", **options)
    return buffer.getvalue()


def _png_16(colour: int, channels: int) -> bytes:
    """A black PNG of 16 bits a channel, of a kind that Pillow doesn't write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    header = struct.pack(">IIBBBBB", 32, 32, 16, colour, 0, 0, 0)
    body = zlib.compress((b"\0" + bytes(32 * 2 * channels)) * 32)
    start = b"\x89PNG\r\n\x1a\n"
    return start + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sixteen_bits_are_refused(colour: int, channels: int) -> None:
    with pytest.raises(BadData, match="x: pixels of 16 bits or more: give 8 bits"):
        decode(_png_16(colour, channels), "x", facts_of("cifar10"))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_is_refused_and_what_is_opaque_is_kept(
    mode: str, tmp_path: Path
) -> None:
    raw = _png(mode, tmp_path)
    with pytest.raises(BadData, match="x: transparent pixels"):
        decode(raw, "x", facts_of("cifar10"))
    pixels = np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)
    opaque = Image.fromarray(pixels).convert(mode)
    buffer = BytesIO()
    opaque.save(buffer, "PNG")
    want = np.asarray(opaque.convert("RGB"))
    assert np.array_equal(decode(buffer.getvalue(), "x", facts_of("cifar10")), want)


@pytest.mark.parametrize("mode", ["P", "RGB", "L"])
def test_a_transparent_colour_is_refused(mode: str, tmp_path: Path) -> None:
    transparent = (0, 0, 0) if mode == "RGB" else 0
    with pytest.raises(BadData, match="x: transparent pixels"):
        decode(_png(mode, tmp_path, transparency=transparent), "x", facts_of("cifar10"))


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_a_turn_that_exif_asks_for_is_refused(form: str, turn: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    buffer = BytesIO()
    Image.new("RGB", (32, 32)).save(buffer, form, exif=exif)
    if turn == 1:
        decode(buffer.getvalue(), "x", facts_of("cifar10"))
        return
    with pytest.raises(BadData, match=rf"x: its EXIF says .* \(orientation {turn}\)"):
        decode(buffer.getvalue(), "x", facts_of("cifar10"))


def test_imagenet_is_taken_as_it_is_stored() -> None:
    """As torchvision takes it: its published accuracies are of unturned images."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = pictures(1, 5, 256)[0]
    found = []
    for options in ({}, {"exif": exif}):
        buffer = BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", **options)
        found.append(decode(buffer.getvalue(), "x", facts_of("imagenet")))
    assert np.array_equal(found[0], found[1])


def test_a_place_for_the_digits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadData, match=r"the images of data set 'digits' come with the package"):
        load_data("digits", tmp_path / "my.npz")


def test_digits_that_were_changed_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = replace(facts_of("digits"), shipped="0" * 64)
    monkeypatch.setitem(catalog.CATALOG, "digits", facts)
    with pytest.raises(BadWeights, match="sha256"):
        load_data("digits").labels_of([0])


# ------------------------------------------------------------------------------- digests of pixels


def test_the_pixels_of_the_digits_are_those_of_the_catalog() -> None:
    """The digests follow from scikit-learn's copy of the data, by the stated rule."""
    theirs = load_digits()
    pixels = theirs.images.astype(np.uint8)[..., None]
    found = {}
    for split in ("test", "train", "validation"):
        total = sha256()
        for i in split_ids("digits", split):
            total.update(f"{theirs.target[i]},(8, 8, 1);".encode() + pixels[i].tobytes())
        found[split] = total.hexdigest()
        load_data("digits", None, split)
    assert facts_of("digits").pixels == found


def test_pixels_of_others_are_refused_where_the_catalog_has_a_digest(
    small: Facts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = as_npz(tmp_path / "data")
    data = load_data("small", place)
    pixels = {"first-1024": data.pixel_digest(split_ids("small", "first-1024"))}
    monkeypatch.setitem(catalog.CATALOG, "small", replace(small, pixels=pixels))
    for layout in LAYOUTS:
        load_data("small", LAYOUTS[layout](tmp_path / layout), "first-1024")
    other = IMAGES.copy()
    other[3, 5, 7, 1] ^= 1  # as an image that was encoded anew can be
    path = parquet(tmp_path / "other.parquet", other)
    message = told(path, "first-1024")
    assert f"{path}: the pixels of split 'first-1024' are not those of small as it is" in message
    load_data("small", path, "stratified-512")  # the catalog says nothing of it


def test_digests_are_of_splits_that_there_are_and_of_lossless_files() -> None:
    for name, facts in catalog.CATALOG.items():
        assert set(facts.pixels) <= set(splits.split_names(name))
        assert not facts.pixels or (name != "imagenet" and "jpeg" not in name)
