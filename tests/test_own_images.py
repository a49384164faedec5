"""Images of one's own: a track is written of them, and all commands take it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from dbp_bench import data
from dbp_bench.networks.digits import DigitsCNN

if TYPE_CHECKING:
    from conftest import Command

N = 64


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DBP_BENCH_CACHE", str(tmp_path / "cache"))


def digits() -> tuple[Any, Any]:
    """The first digits of the test images, in whole numbers ``(n, h, w)`` in 0 ... 255."""
    ids = data.split_ids("digits", "test")[:N]
    images, labels = data.digits().select(ids)
    return (255 * images[:, 0]).round().to(torch.uint8).numpy(), labels.numpy()


def as_npz(path: Path) -> Path:
    images, labels = digits()
    np.savez(path.with_suffix(".npz"), images=images, labels=labels)
    return path.with_suffix(".npz")


def as_folders(path: Path) -> Path:
    images, labels = digits()
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        place = path / f"{'abcdefghij'[label]}-class" / f"{i:03d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place)
    return path


def as_parquet(path: Path, names: list[str] | None = None) -> Path:
    """As the hub's library writes one; called as training images are."""
    _, labels = digits()
    scratch = as_folders(path.with_name("scratch"))
    files = sorted(scratch.rglob("*.png"), key=lambda p: p.name)
    cells = [{"bytes": p.read_bytes(), "path": None} for p in files]
    shutil.rmtree(scratch)
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(cells, struct), "label": pa.array(labels)})
    if names:
        features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    place = path.with_name("train.parquet")
    pq.write_table(table, place)
    return place


FORMS: dict[str, Callable[[Path], Path]] = {
    "npz": as_npz,
    "folders": as_folders,
    "parquet": as_parquet,
}
RUN = ("run", "--defense", "none", "--threat", "null", "--track", "own", "--entries", "mine")


@pytest.mark.parametrize("form", FORMS)
def test_a_track_of_each_form_runs(form: str, command: "Command", tmp_path: Path) -> None:
    place = FORMS[form](tmp_path / "images")
    said = command("new", "track", "own", "--images", place, "--out", "mine")
    assert said.code == 0, said.err
    assert "dbp-bench run --defense none --threat null --track own --entries mine" in said.out
    held = yaml.safe_load(Path("mine/tracks/own.yaml").read_text())
    assert held["data"]["images"] == N
    assert held["data"]["shape"] == [1, 8, 8]
    assert held["data"]["classes"][0] == ("a-class" if form == "folders" else "0")
    assert (held["split"], held["settings_of"], held["norm"]) == ("all", "digits-linf", "linf")
    assert held["classifier"]["file"] == "digits-classifier.safetensors"
    said = command(*RUN)
    assert said.code == 0, said.err
    result = json.loads(Path("results/own/none/null/standard/seed-0.json").read_text())
    assert len(result["ids"]) == N


def test_all_forms_are_the_same_images(command: "Command", tmp_path: Path) -> None:
    digests = set()
    for form, write in FORMS.items():
        assert command("new", "track", form, "--images", write(tmp_path / "images")).code == 0
        digests.add(
            yaml.safe_load(Path(f"{form}/tracks/{form}.yaml").read_text())["data"]["sha256"]
        )
    assert len(digests) == 1


def test_names_of_a_parquet_files_features(command: "Command", tmp_path: Path) -> None:
    names = [f"digit {i}" for i in range(10)]
    place = as_parquet(tmp_path / "images", names)
    assert command("new", "track", "own", "--images", place).code == 0
    assert yaml.safe_load(Path("own/tracks/own.yaml").read_text())["data"]["classes"] == names


@pytest.fixture
def own(command: "Command", tmp_path: Path) -> Path:
    """A track called own in the folder mine, of an npz file in it."""
    Path("mine").mkdir()
    place = as_npz(tmp_path / "mine/images")
    said = command("new", "track", "own", "--images", place, "--out", "mine", "--first", "12")
    assert said.code == 0, said.err
    return place


def test_other_images_are_refused(own: Path, command: "Command") -> None:
    with np.load(own) as held:
        images, labels = held["images"].copy(), held["labels"].copy()
    images[3, 2, 2] ^= 1
    np.savez(own, images=images, labels=labels)
    said = command(*RUN)
    assert said.code == 2
    assert "their digest is another" in said.err
    np.savez(own, images=images[:60], labels=labels[:60])
    assert "60 images; the track declares 64" in command(*RUN).err


def test_images_elsewhere(own: Path, command: "Command", tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere.npz"
    own.rename(moved)
    said = command(*RUN)
    assert said.code == 2
    assert "no such file" in said.err
    assert command(*RUN, "--data", moved).code == 0


def test_what_is_made_of_a_result(own: Path, command: "Command") -> None:
    run = ("run", "--defense", "ddpm,none", "--threat", "eot,dwbox", "--track", "own")
    small = ("--examples", "6", "--batch-size", "3", "--budget", "2")
    more = ("--draws", "8", "--save-adversarial", "--entries", "mine")
    said = command(*run, *small, *more)
    assert said.code == 0, said.err
    for entries in ([], ["--entries", "mine"]):
        said = command("report", *entries)
        assert said.code == 0, said.err
        text = Path("leaderboards/own.md").read_text()
        assert "| ddpm" in text
    assert "12 images of one's own" in text
    result = "results/own/ddpm/eot/standard/seed-0.json"
    said = command("verify", result, "--entries", "mine")
    assert said.code == 0, said.err
    said = command("verify", result, "--entries", "mine", "--replay")
    assert said.code == 0, said.err
    assert command("check", "ddpm", "--track", "own", "--entries", "mine").code == 0
    assert "own" in command("list", "tracks", "--entries", "mine").out


def test_a_classifier_of_ones_own(command: "Command", tmp_path: Path) -> None:
    place = as_npz(tmp_path / "images")
    with np.load(place) as held:
        np.savez(place, images=np.repeat(held["images"], 2, axis=1), labels=held["labels"])
    ask = ("new", "track", "own", "--images", place, "--out", "mine")
    said = command(*ask)
    assert said.code == 2
    assert "1 x 16 x 8 and 10 classes" in said.err
    assert "--network module:callable and --weights FILE.safetensors" in said.err
    save_file(DigitsCNN().state_dict(), "cnn.safetensors")
    mine = ("--network", "wide:Wide", "--weights", "cnn.safetensors", "--eps", "8/255")
    code = "from dbp_bench.networks.digits import DigitsCNN\nclass Wide(DigitsCNN):\n"
    code += "    def forward(self, images):\n        return super().forward(images[:, :, ::2])\n"
    Path("mine").mkdir()
    Path("mine/wide.py").write_text(code)
    said = command(*ask, *mine)
    assert said.code == 2
    assert "Add --trust-code" in said.err
    assert not Path("mine/tracks").exists()
    assert not Path("mine/cnn.safetensors").exists()
    said = command(*ask, *mine, "--trust-code")
    assert said.code == 0, said.err
    said = command(*RUN, "--trust-code")
    assert said.code == 0, said.err


WRONG: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "no such file": ({}, ["--images", "nowhere.npz"], "--images nowhere.npz: no such file"),
    "floats": ({"images": np.zeros((4, 8, 8))}, [], "give uint8"),
    "no labels": (
        {"labels": None},
        [],
        "not x_test and y_test or images and labels",
    ),
    "another number of labels": ({"labels": np.arange(3)}, [], "3 labels for"),
    "negative label": ({"labels": np.full(N, -2)}, [], "label -2"),
    "one class": ({"labels": np.zeros(N, int)}, [], "one class only"),
    "shape": ({"images": np.zeros((N, 2, 8, 8), np.uint8)}, [], "with 1 or 3 channels"),
    "none": (
        {"images": np.zeros((0, 8, 8), np.uint8), "labels": np.zeros(0, int)},
        [],
        "no images",
    ),
    "first": ({}, ["--first", "65"], "--first 65: there are 64 images"),
    "few names": ({}, ["--classes", "a,b"], "a label is 9, and there are 2 names"),
    "like": ({}, ["--like", "cifar10-linf"], "its images are 3 x 32 x 32 of 10 classes"),
    "no such track": ({}, ["--like", "digit-linf"], "no track 'digit-linf'. Did you mean"),
    "norm": ({}, ["--norm", "l1"], "--eps: give the radius in l1"),
    "bad norm": ({}, ["--norm", "l7", "--eps", "1"], "norm"),
    "eps": ({}, ["--eps", "8"], "Did you mean 8/255?"),
    "half a network": ({}, ["--network", "a:b"], "give both, or neither"),
    "name": ({}, ["--out", "x", "--eps", "0.1", "--norm", "linf", "--classes", "a,a"], "names"),
}


@pytest.mark.parametrize("what", WRONG)
def test_one_line_for_bad_input(what: str, command: "Command", tmp_path: Path) -> None:
    arrays, options, says = WRONG[what]
    place = as_npz(tmp_path / "images")
    with np.load(place) as held:
        kept = {**held, **arrays}
    np.savez(place, **{key: value for key, value in kept.items() if value is not None})
    images = [] if "--images" in options else ["--images", str(place)]
    said = command("new", "track", "own", *images, *options)
    assert said.code == 2, said
    assert says in said.err
    assert said.err.count("\n") == 1
    assert not Path("own").exists()


BAD_YAML: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "digest": (lambda t: t["data"].update(sha256="0" * 63), "data"),
    "no digest": (lambda t: t["data"].pop("sha256"), "sha256"),
    "classes": (lambda t: t["data"].update(classes=["one"]), "classes"),
    "shape": (lambda t: t["data"].update(shape=[8, 8]), "shape"),
    "shape of others": (lambda t: t["data"].update(shape=[3, 8, 8]), "images is (64, 8, 8)"),
    "split": (lambda t: t.update(split="first-65"), "first-N with N in 1 ... 64"),
    "other split": (lambda t: t.update(split="all"), "their digest is another"),
    "unknown key": (lambda t: t["data"].update(labels="x"), "labels"),
    "settings_of": (lambda t: t.update(settings_of="Not a name"), "settings_of"),
}


@pytest.mark.parametrize("what", BAD_YAML)
def test_a_declaration_that_was_edited(what: str, own: Path, command: "Command") -> None:
    change, says = BAD_YAML[what]
    path = Path("mine/tracks/own.yaml")
    held = yaml.safe_load(path.read_text())
    change(held)
    path.write_text(yaml.safe_dump(held))
    said = command(*RUN)
    assert said.code == 2, said
    assert says in said.err
    assert said.err.count("\n") == 1
