"""Files that others wrote: none leads to a traceback, runs code, or writes where it shouldn't."""

import copy
import json
import os
import pickle
import random
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save, save_file

import dbp_bench.data
from conftest import Command
from dbp_bench.data import facts_of, load_data
from dbp_bench.data.readers import npz
from dbp_bench.declaration import LARGEST_ENTRY, parse_json, value_of
from dbp_bench.entries.registry import Registry
from dbp_bench.errors import LONGEST, BadData, BadEntry, BadResult, BadWeights, DbpError, plain
from dbp_bench.reporting.records import load
from dbp_bench.result import Result
from dbp_bench.runs.execute import execute
from dbp_bench.runs.job import Job, Overrides, plan, resolve
from dbp_bench.runs.saved import adversarial_path, read_saved
from dbp_bench.submission import again, archive, verify
from dbp_bench.submission.submit import submit
from dbp_bench.training.state import Checkpoint, Settings, State
from dbp_bench.weights import formats
from dbp_bench.weights.files import fill
from dbp_bench.weights.files import load as load_weights
from own_entries import dump, folder, toy_defense
from records import make, matrix

SHIPPED = Registry()
ENTRY = toy_defense("dbp_bench.purifiers.controls:NoiseOnly", ["forward"], t_star=9)


# ------------------------------------------------------------------------------------------ YAML

BILLION = "a: &a [x,x]\n" + "".join(
    f"{b}: &{b} [*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a}]\n"
    for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
TAGGED = [
    *("!!bool zz", "!!timestamp q", "!!map [1]", "!!set [1]", "!!int ''", "!!float ''"),
    *("!!python/object/apply:os.system [x]", "! x", "!own x", "!!str x", "!!omap [1]"),
]


@pytest.mark.parametrize("value", TAGGED)
def test_a_tag_is_refused_wherever_it_stands(value: str, tmp_path: Path) -> None:
    assert value_of(value) == value
    path = tmp_path / "defenses/x.yaml"
    path.parent.mkdir()
    for text in (f"title: {value}\n", f"? {value}\n: x\n", f"settings: [{{options: {value}}}]\n"):
        path.write_text(text)
        with pytest.raises(BadEntry, match=r"x\.yaml: not YAML: line 1: a tag"):
            Registry([tmp_path]).defense("x")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (BILLION, "line 2: an alias (*a)"),
        ("title: &t x\npaper: *t\n", "line 2: an alias (*t)"),
        ("<<: {title: x}\n", "a merge (<<)"),
        ("title: 1e-400\n", "too small for a number"),
        ("a: 1\na: 2\n", "key 'a' stands twice"),
        ("title: " + "[" * 80 + "]" * 80, "nested more than"),
        ('title: "\\e[31mred"\n', "a control character"),
        ('"\\u202e": x\n', "a control character"),
        ("#" * LARGEST_ENTRY + "\n", "larger than an entry is"),
    ],
)
def test_what_is_not_plain_data_is_refused(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "defenses/x.yaml"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(BadEntry) as caught:
        Registry([tmp_path]).defense("x")
    assert says in str(caught.value)


def test_a_long_value_is_not_said_in_full(tmp_path: Path) -> None:
    folder(tmp_path, defenses={"x": ENTRY | {"kind": "x" * 9000, "sites": [1] * 9000}})
    with pytest.raises(BadEntry) as caught:
        Registry([tmp_path]).defense("x")
    assert len(str(caught.value)) < LONGEST
    assert len(str(DbpError("x" * 10**6))) <= LONGEST + 3


# ------------------------------------------------------------------------------------------ JSON


@pytest.mark.parametrize(
    "text",
    [
        *("[" * 500 + "]" * 500, "[" * 10**5, "NaN", "[1e999]", "-Infinity", "{", "9" * 5000),
        *('"\\ud800"', '{"\\u001b[31m": 1}', '"\\u202e"', "1" + "0" * 30),
    ],
)
def test_what_is_not_plain_json(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        parse_json(text)


def test_a_result_with_half_a_character(tmp_path: Path) -> None:
    path = tmp_path / "seed-0.json"
    text = make("both", "eot", 0.5).to_json()
    path.write_text(text.replace('"defense": "both"', '"defense": "\\ud800"'))
    with pytest.raises(BadResult, match="a control character"):
        Result.read(path)


# -------------------------------------------------------------------------------- work and images


def job(**changes: Any) -> Job:
    small: dict[str, Any] = {"examples": 4, "batch_size": 2, "draws": 3, "effort": {"budget": 2}}
    return resolve(
        *(SHIPPED, "digits-linf", "oneshot", "dwbox"),
        seed=0,
        device="cpu",
        overrides=Overrides(**small | changes),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A finished run with its work and images, and its result's bytes."""
    out = tmp_path_factory.mktemp("run")
    return out, execute(job(), out, save_adversarial=True).read_bytes()


@pytest.fixture
def unfinished(run: tuple[Path, bytes], tmp_path: Path) -> Path:
    """A copy of the run without its result."""
    import shutil

    out = tmp_path / "out"
    shutil.copytree(run[0], out)
    job().path(out).unlink()
    return out


def _groups(out: Path) -> list[Path]:
    return sorted((out / ".work").rglob("group-*.safetensors"))


def _metadata(path: Path) -> dict[str, str]:
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return dict(header.get("__metadata__") or {})


@pytest.mark.parametrize("part", ["clean/0", "images/0", "nonzero/0", "nfe"])
def test_work_that_was_edited_is_done_again(
    part: str, unfinished: Path, run: tuple[Path, bytes]
) -> None:
    path = _groups(unfinished)[0]
    tensors, metadata = load_file(path), _metadata(path)
    tensors[part] = (tensors[part].double() * 0 + 1).to(tensors[part].dtype)
    save_file(tensors, path, metadata)
    assert execute(job(), unfinished).read_bytes() == run[1]


def test_work_of_another_group_is_done_again(unfinished: Path, run: tuple[Path, bytes]) -> None:
    first, second = _groups(unfinished)
    first.write_bytes(second.read_bytes())
    assert execute(job(), unfinished).read_bytes() == run[1]


def test_images_outside_the_ball_are_made_again_whatever_the_digest_says(
    unfinished: Path, run: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dbp_bench.runs.pieces._digest", lambda *_: "forged")
    for path in _groups(unfinished):
        tensors = load_file(path)
        tensors["images/0"] = torch.ones_like(tensors["images/0"])
        save_file(tensors, path, {"digest": "forged"})
    result = execute(job(), unfinished)
    assert result.read_bytes() == run[1]
    own = adversarial_path(job().path(run[0]))
    assert adversarial_path(result).read_bytes() == own.read_bytes()


DEEP = "[" * 1000 + "]" * 1000
ODD = ["[]", "7", "null", '"x"', DEEP, f'{{"seed": {DEEP}}}', "{", '{"seed": "\\ud800"}', ""]


@pytest.mark.parametrize("text", ODD)
def test_a_request_that_is_damaged(text: str, unfinished: Path, run: tuple[Path, bytes]) -> None:
    for path in (unfinished / ".work").rglob("request.json"):
        path.write_text(text)
    assert execute(job(), unfinished).read_bytes() == run[1]


@pytest.mark.parametrize("text", ODD)
def test_images_whose_request_is_damaged(text: str, unfinished: Path) -> None:
    path = adversarial_path(job().path(unfinished))
    save_file(load_file(path), path, {"request": text})
    with pytest.raises(BadWeights, match="not a file of adversarial images"):
        read_saved(path, job())


# ------------------------------------------------------------------------------------- npz, state


def test_an_npz_with_a_damaged_header(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, images=np.zeros((3, 32, 32, 3), np.uint8), labels=np.zeros(3, int))
    whole = path.read_bytes()
    for header in (b"{'descr':", b"{'descr': (((", b"{'shape': (1e9", b"\x00" * 9, b"{[" * 4):
        at = whole.index(b"{'descr'")
        damaged = whole[:at] + header + whole[at + len(header) :]
        with zipfile.ZipFile(path, "w") as made:  # with the right checksums
            made.writestr("images.npy", _member(whole, "images.npy", damaged, path))
            made.writestr("labels.npy", b"\x93NUMPY\x01\x00\x08\x00" + header)
        with pytest.raises(BadData, match=r"x\.npz: cannot be read"):
            npz(path, "test", facts_of("cifar10"))


@pytest.mark.parametrize("name", ["images", "labels"])
def test_an_npz_with_a_member_that_is_no_array(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, images=np.zeros((3, 32, 32, 3), np.uint8), labels=np.zeros(3, int))
    with zipfile.ZipFile(path) as held:
        members = {each: held.read(each) for each in held.namelist()}
    with zipfile.ZipFile(path, "w") as made:
        for each, content in members.items():
            made.writestr(each, content[1:] if each == f"{name}.npy" else content)
    with pytest.raises(BadData, match=r"x\.npz: cannot be read \(a member is no array\)"):
        npz(path, "test", facts_of("cifar10"))


def _member(whole: bytes, name: str, damaged: bytes, path: Path) -> bytes:
    path.write_bytes(whole)
    with zipfile.ZipFile(path) as held:
        content = held.read(name)
    at = whole.index(content)
    return damaged[at : at + len(content)]


def _state() -> State:
    network = torch.nn.Linear(3, 2)
    for parameter in network.parameters():
        torch.nn.init.constant_(parameter, 0.5)
    return State.start(network, Settings(9, 2, 0.1, 0.0, (0.9, 0.999), 0.9, anneal=True))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """A training state after two updates."""
    state = _state()
    for _ in range(2):
        state.network(torch.ones(1, 3)).sum().backward()
        state.optimizer.step()
        assert state.scheduler is not None
        state.scheduler.step()
        state.average.update(state.network)
    kept = Checkpoint(tmp_path / "s.safetensors", 1, {"recipe": "x"})
    kept.save(2, state)
    return kept


Damage = Callable[[dict[str, torch.Tensor], dict[str, Any]], object]
DAMAGES: dict[str, Damage] = {
    "unknown part": lambda t, n: t.update({"foreign/x": torch.zeros(1)}),
    "unknown tensor": lambda t, n: t.update({"network/x": torch.zeros(1)}),
    "no parameter": lambda t, n: t.update({"optimizer/7/step": torch.zeros(())}),
    "no number": lambda t, n: t.update({"optimizer/x/step": torch.zeros(())}),
    "moment of no parameter": lambda t, n: t.update({"optimizer/7/exp_avg": torch.zeros(2, 3)}),
    "unknown moment": lambda t, n: t.update({"optimizer/0/x": torch.zeros(2, 3)}),
    "another shape": lambda t, n: t.update({"optimizer/0/exp_avg": torch.zeros(9)}),
    "a moment lacks": lambda t, n: t.pop("optimizer/0/exp_avg"),
    "integers": lambda t, n: t.update({"network/bias": torch.zeros(2, dtype=torch.int64)}),
    "no update": lambda t, n: n.pop("update"),
    "update is text": lambda t, n: n.update(update="x"),
    "negative update": lambda t, n: n.update(update=-1),
    "no groups": lambda t, n: n.update(groups=[]),
    "groups of text": lambda t, n: n.update(groups=["x"]),
    "rate is text": lambda t, n: n["groups"][0].update(lr="x"),
    "no scheduler": lambda t, n: n.update(scheduler=None),
    "scheduler of others": lambda t, n: n.update(scheduler={"__class__": "x"}),
    "request is text": lambda t, n: n.update(request="x"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_training_state_that_is_damaged(name: str, checkpoint: Checkpoint) -> None:
    assert checkpoint.restore(_state()) == 2
    tensors, key = load_file(checkpoint.path), "dbp-bench training state"
    numbers = json.loads(_metadata(checkpoint.path)[key])
    DAMAGES[name](tensors, numbers)
    save_file(tensors, checkpoint.path, {key: json.dumps(numbers)})
    with pytest.raises(BadWeights):
        checkpoint.restore(_state())


# --------------------------------------------------------------------------------------- terminal


def test_no_control_character_reaches_the_terminal(command: Command, tmp_path: Path) -> None:
    hostile = "\x1b[31mred\x9b2J\u202e[/b][red]x"
    said = [
        command("list", hostile),
        command("run", "--defense", hostile, "--threat", "eot", "--dry-run"),
        command("run", "--defense", "oneshot", "--threat", "eot", "--entries", tmp_path / hostile),
        command("verify", tmp_path / f"{hostile}.json"),
    ]
    path = tmp_path / "defenses/x.yaml"
    path.parent.mkdir()
    path.write_text(dump(ENTRY | {"title": hostile}))
    said.append(command("list", "--entries", tmp_path))
    for each in said:
        assert each.code == (0 if each is said[-1] else 2)
        assert plain(each.out + each.err) == each.out + each.err
    shown = "\\x1b[31mred\\x9b2J\\u202e[/b][red]x"
    out, small = tmp_path / hostile, ("--examples", "2", "--batch-size", "2")
    for asked in (
        ("run", "--defense", "none", "--threat", "null", *small, "--out", out),
        ("report", "--results", out, "--out", out),
        ("verify", out / "digits-linf/none/null/standard/seed-0.json"),
    ):
        each = command(*asked)
        assert each.code == 0
        assert shown in each.out
        assert plain(each.out + each.err) == each.out + each.err
    assert shown in said[0].err


def test_brackets_are_text(command: Command, tmp_path: Path) -> None:
    out = tmp_path / "a[/b]res[red]a"
    run = ("run", "--defense", "none", "--threat", "null", "--examples", "2", "--out", out)
    said = command(*run)
    assert (said.code, said.err) == (0, "")
    assert str(out) in said.out
    title = "a [/b] of [red]brackets"
    folder(tmp_path, defenses={"x": ENTRY | {"title": title}})
    assert title in command("list", "--entries", tmp_path).out


# -------------------------------------------------------------------------- generated, all kinds


class Foe:
    """Makes hostile files, the same ones for a seed."""

    def __init__(self, seed: int, trace: Path) -> None:
        self.random = random.Random(seed)
        self.trace = trace

    def value(self) -> Any:
        """A value that nobody expects."""
        choose = self.random
        deep: Any = "x"
        for _ in range(choose.choice((3, 40, 900))):
            deep = [deep] if choose.random() < 0.5 else {"k": deep}
        plain_values = [
            *(None, True, False, 0, -1, 10**30, -(10**400), 1.5, -1e308, "", "x", "all", [], {}),
            *("../../x", "/etc/passwd", "a\x1b[31m", "\u202e", "x" * 5000, "8/0", "1e999", [[]]),
            *("os:system", "dbp_bench.cli.submit:submit", "dbp_bench.cli.run:run", "trap:build"),
            *("dbp_bench.networks.digits:import_module", "trap.py:x", "robustbench:../x", [None]),
            *("dbp_bench.weights.store:put", {"checkpoint": "timm:../x"}, {"votes": [1]}, deep),
        ]
        return choose.choice(plain_values)

    def changed(self, table: Any) -> Any:
        """`table` with one to three of its values, or keys, changed."""
        table = copy.deepcopy(table)
        for _ in range(self.random.randint(1, 3)):
            at, steps = table, self.random.randint(1, 5)
            while True:
                keys = list(at) if isinstance(at, dict) else list(range(len(at)))
                if not keys:
                    break
                key = self.random.choice(keys)
                steps -= 1
                if steps and isinstance(at[key], dict | list) and at[key]:
                    at = at[key]
                    continue
                act = self.random.random()
                if act < 0.7:
                    at[key] = self.value()
                elif act < 0.85:
                    del at[key]
                elif isinstance(at, dict):
                    at[str(self.value())[:50]] = self.value()
                else:
                    at.append(self.value())
                break
        return table

    def damaged(self, raw: bytes) -> bytes:
        """`raw` with some bytes changed, cut or doubled."""
        out = bytearray(raw)
        for _ in range(self.random.randint(1, 6)):
            if not out:
                break
            # The head of a file says most.
            end = min(len(out), self.random.choice((16, 400, len(out))))
            at = self.random.randrange(end)
            act = self.random.random()
            if act < 0.6:
                out[at] = self.random.randrange(256)
            elif act < 0.8:
                del out[at : at + self.random.randint(1, 200)]
            else:
                out[at:at] = out[at : at + self.random.randint(1, 50)]
        return bytes(out)

    def text(self, table: Any) -> str:
        """`table` in JSON or YAML, sometimes with something that isn't plain data."""
        try:
            text = json.dumps(self.changed(table))
        except (RecursionError, ValueError):
            text = "[" * 5000
        if self.random.random() < 0.3:
            at = self.random.randrange(len(text))
            odd = [
                *TAGGED,
                "*a",
                "&a ",
                "\\ud800",
                "\x00",
                "NaN",
                "\n\t",
                "{" * 200,
                "1_0:3:9",
                "=",
            ]
            text = text[:at] + self.random.choice(odd) + text[at:]
        return text


def _read_entry(foe: Foe, top: Path) -> None:
    kind, name, read = foe.random.choice(
        [
            ("defenses", "ddpm", "defense"),
            ("attacks/threats", "dwbox", "threat"),
            ("attacks/settings", "ensemble-known", "setting"),
            ("tracks", "digits-linf", "track"),
        ]
    )
    source = getattr(SHIPPED, read)(name).path
    text = foe.text(yaml.safe_load(source.read_text()))
    path = top / kind / "hostile.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(text, errors="surrogatepass")
    (top / "trap.py").write_text(f"open({str(foe.trace)!r}, 'w')\n")
    registry = Registry([top])
    getattr(registry, read)("hostile")
    names = {"track": "digits-linf", "defense": "ddpm", "threat": "dwbox", "setting": None}
    names[read] = "hostile"
    asked = resolve(
        *(registry, str(names["track"]), str(names["defense"]), str(names["threat"])),
        attack=names["setting"],
        seed=0,
        device="cpu",
        overrides=Overrides(examples=1),
    )
    asked.identity()
    asked.defense()


def _read_result(foe: Foe, top: Path) -> None:
    made = foe.random.choice(matrix())
    path = made.path(top)
    path.parent.mkdir(parents=True)
    raw = made.to_json().encode()
    raw = foe.damaged(raw) if foe.random.random() < 0.3 else foe.text(json.loads(raw)).encode()
    path.write_bytes(raw)
    for record in load(top):
        record.result.to_json().encode()
        record.result.right("adversarial")


class _Bomb:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


def _read_weights(foe: Foe, top: Path) -> None:
    top.mkdir()
    network = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    path = top / "w.safetensors"
    raw = save(network.state_dict(), {"dbp-bench": "{}"})
    form = foe.random.randrange(4)
    if form == 0:
        raw = foe.damaged(raw)
    elif form == 1:
        size = int.from_bytes(raw[:8], "little")
        header = foe.text(json.loads(raw[8 : 8 + size])).encode(errors="replace")
        raw = struct.pack("<Q", len(header)) + header + raw[8 + size :]
    elif form == 2:
        raw = foe.damaged(pickle.dumps({"a": _Bomb(foe.trace)}, foe.random.randrange(6)))
        path = top / "w.pkl"
    else:
        path = top / "w.pt"
        torch.save({"state": network.state_dict(), "bomb": _Bomb(foe.trace)}, path)
        raw = foe.damaged(path.read_bytes())
    path.write_bytes(raw)
    with suppress(DbpError):
        formats.read(path)
    fill(network, load_weights(path), path)


def _read_state(foe: Foe, top: Path) -> None:
    top.mkdir()
    kept = Checkpoint(top / "s.safetensors", 1, {"recipe": "x"})
    kept.save(2, _state())
    raw = kept.path.read_bytes()
    if foe.random.random() < 0.5:
        raw = foe.damaged(raw)
    else:
        key = "dbp-bench training state"
        numbers = json.loads(_metadata(kept.path)[key])
        text = foe.text(numbers).encode("ascii", "replace").decode()
        raw = save(load_file(kept.path), {key: text})
    kept.path.write_bytes(raw)
    kept.restore(_state())


def _read_bundle(foe: Foe, top: Path) -> None:
    top.mkdir()
    files = {
        "entries/defenses/hostile.yaml": foe.text(ENTRY).encode(errors="replace"),
        "entries/trap.py": f"open({str(foe.trace)!r}, 'w')\n".encode(),
        "results/digits-linf/hostile/eot/standard/seed-0.json": make("hostile", "eot", 0.5)
        .to_json()
        .encode(),
    }
    if foe.random.random() < 0.3:
        names = ("../x", "/tmp/hostile-x", "a/../../x", "C:\\x", "entries/\x1b", "a//b")
        files[foe.random.choice(names)] = b""
    manifest: Any = {
        **{"schema": 1, "dbp_bench": "0.1.0", "track": "digits-linf", "defense": "hostile"},
        **{"environment": {}, "summary": {}},
    }
    from hashlib import sha256

    manifest["files"] = {
        name: {"sha256": sha256(raw).hexdigest(), "bytes": len(raw)} for name, raw in files.items()
    }
    text = json.dumps(manifest) if foe.random.random() < 0.5 else foe.text(manifest)
    path = top / "b.zip"
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("manifest.json", text.encode(errors="replace"))
        for name, raw in files.items():
            info = zipfile.ZipInfo(name)
            if foe.random.random() < 0.05:
                info.external_attr = 0o120777 << 16
            made.writestr(info, raw)
    if foe.random.random() < 0.4:
        path.write_bytes(foe.damaged(path.read_bytes()))
    with archive.opened(path) as bundle:
        verify.check(bundle, Registry())


@cache
def _few_images() -> tuple[Job, bytes]:
    """A job of two images, and a file of images that could be its own."""
    asked = job(examples=2)
    clean, _ = asked.data().select(asked.track_ids[:2])
    images = torch.stack([clean] * asked.attacks)
    tensors = {"images": images, "ids": torch.tensor(asked.track_ids[:2])}
    return asked, save(tensors, {"request": json.dumps(asked.identity())})


def _read_images(foe: Foe, top: Path) -> None:
    top.mkdir()
    asked, raw = _few_images()
    path = top / "adversarial-seed-0.safetensors"
    if foe.random.random() < 0.5:
        path.write_bytes(foe.damaged(raw))
    else:
        path.write_bytes(raw)
        tensors, request = load_file(path), json.loads(_metadata(path)["request"])
        text = foe.text(request).encode("ascii", "replace").decode()
        save_file(tensors, path, {"request": text})
    assert torch.equal(read_saved(path, asked).images, load_file(path)["images"])


def _read_data(foe: Foe, top: Path) -> None:
    """Images for a track: a file of arrays, one of encoded images, or a folder of these."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    top.mkdir()
    pixels = np.random.default_rng(foe.random.randrange(99)).integers(0, 256, (12, 32, 32, 3))
    pixels, labels = pixels.astype(np.uint8), np.arange(12) % 10
    encoded = []
    for image in pixels:
        buffer = BytesIO()
        Image.fromarray(image).save(buffer, foe.random.choice(["PNG", "JPEG"]))
        encoded.append(buffer.getvalue())
    form = foe.random.choice(["npz", "members", "parquet", "folder"])
    path = top / "test.npz"
    if form == "folder":
        for number, content in enumerate(encoded):
            path = top / f"test/{labels[number]}/{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    elif form == "parquet":
        path = top / "test.parquet"
        cells = [{"bytes": content, "path": None} for content in encoded]
        pq.write_table(pa.table({"img": cells, "label": labels}), path)
    else:
        np.savez(path, images=pixels, labels=labels)
    if form == "members":  # with the right checksums
        with zipfile.ZipFile(path) as held:
            members = {name: held.read(name) for name in held.namelist()}
        name = foe.random.choice(list(members))
        members[name] = foe.damaged(members[name][:128]) + members[name][128:]
        with zipfile.ZipFile(path, "w") as made:
            for each, content in members.items():
                made.writestr(each, content)
    else:
        path.write_bytes(foe.damaged(path.read_bytes()))
    data = load_data("cifar10", top)
    images, _ = data.select(range(12))
    assert images.shape == (12, 3, 32, 32)
    data.digest(range(12))


KINDS = [
    *(_read_entry, _read_result, _read_weights, _read_state, _read_bundle),
    *(_read_images, _read_data),
]


# What Python tells of itself, while `_watched` says where files may be written.
_watched: list[Path] = []
_seen: list[str] = []
_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.chmod")
_STARTS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen")
_REACHES = ("socket.connect", "socket.sendto", "socket.bind", "urllib.Request")


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    """Notes each file that is written elsewhere, each process started, each connection opened."""
    if not _watched:
        return
    if event in (*_STARTS, *_REACHES):
        _seen.append(f"{event} {arguments}"[:300])
        return
    # Below an open folder, a path says nothing of where it is; opening that folder did.
    writes = event in _CHANGES and arguments[-1] == -1
    if event == "open" and isinstance(arguments[2], int):
        writes = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
    for path in arguments[: 2 if event in ("os.rename", "os.link") else 1] if writes else ():
        if isinstance(path, str | bytes | os.PathLike):
            place = Path(os.path.realpath(os.fsdecode(path)))
            if place != Path(os.devnull) and not any(map(place.is_relative_to, _watched)):
                _seen.append(f"{event} {place}")


sys.addaudithook(_hook)


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to be in, beside which nothing may be written."""
    here = tmp_path / "here"
    here.mkdir()
    (tmp_path / "scratch").mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.setenv("DBP_BENCH_CACHE", str(here / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    monkeypatch.delenv("DBP_BENCH_DATA", raising=False)
    _seen.clear()
    yield tmp_path
    _watched.clear()
    assert [path.name for path in here.iterdir()] in ([], ["cache"])
    left = [path.name for path in (tmp_path / "scratch").iterdir()]
    assert not [name for name in left if not name.startswith("torchinductor_")], "PyTorch's cache"


def _refusal(read: Callable[[Foe, Path], object], foe: Foe, top: Path) -> str:
    """The message about a hostile file; empty where it does no harm."""
    _watched[:] = [top, foe.trace.parent / "scratch"]
    try:
        read(foe, top)
    except DbpError as error:
        return str(error)
    finally:
        _watched.clear()
    return ""


def _generated(seeds: range, alone: Path) -> None:
    trace = alone / "trace"
    refused = 0
    for seed in seeds:
        for read in KINDS:
            said = _refusal(read, Foe(seed, trace), alone / f"{read.__name__}-{seed}")
            refused += bool(said)
            assert plain(said) == said
            assert len(said) <= LONGEST + 3
            assert not trace.exists(), f"{read.__name__} {seed} ran code"
            assert not _seen, f"{read.__name__} {seed} did more than read"
    assert refused > len(seeds) * len(KINDS) / 2


def test_a_few_generated_files(alone: Path) -> None:
    _generated(range(4), alone)


def test_code_and_writes_are_seen(alone: Path) -> None:
    """The harm that hostile files would do, if they could."""
    acts: list[Callable[[Foe, Path], object]] = [
        lambda *_: (alone / "elsewhere").write_text("x"),
        lambda *_: (alone / "folder").mkdir(),
        lambda *_: os.system("true"),
        lambda *_: subprocess.run(["true"], check=True),
    ]
    for number, act in enumerate(acts):
        assert _refusal(act, Foe(0, alone / "trace"), alone / f"{number}") == ""
        assert _seen, number
        _seen.clear()


@pytest.mark.slow
def test_five_hundred_generated_files(alone: Path) -> None:
    _generated(range(100, 200), alone)


# ------------------------------------------------------------------------------- a whole bundle


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with all files of a bundle that can be verified, of a purifier of ours."""
    top = tmp_path_factory.mktemp("honest")
    folder(top / "mine", defenses={"hostile": ENTRY | {"settings": [ONE_TRACK]}})
    registry, ids = Registry([top / "mine"]), dbp_bench.data.split_ids("digits", "test")[:4]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dbp_bench.data, "split_ids", lambda *_: list(ids))
        patch.setattr("dbp_bench.provenance._git", lambda: (None, None))
        for item in plan(
            *(registry, "digits-linf", ["hostile"], ["all"]),
            seed=0,
            device="cpu",
            overrides=Overrides(batch_size=2),
        ):
            if item.instead is None:
                execute(item.job, top / "results", save_adversarial=True)
        submit(registry, "hostile", "digits-linf", top / "results", top / "b.zip")
        with zipfile.ZipFile(top / "b.zip") as held:
            held.extractall(top / "files")
        yield top / "files"


ONE_TRACK: dict[str, Any] = {
    "tracks": ["digits-linf"],
    "options": {"t_star": 9, "clamp_output": False},
    "networks": {},
}


def _zipped(files: Path, path: Path, *, remake: bool) -> Path:
    """A bundle of these files; `remake` makes the hashes in its manifest fit, as a forger would."""
    names = {f.relative_to(files).as_posix(): f for f in sorted(files.rglob("*")) if f.is_file()}
    manifest = names.pop(archive.MANIFEST)
    text = manifest.read_text(errors="replace")
    if remake:
        with suppress(ValueError, TypeError):
            table = json.loads(text)
            table["files"] = {
                name: archive.facts(each).model_dump() for name, each in names.items()
            }
            text = json.dumps(table)
    with zipfile.ZipFile(path, "w") as made:
        made.writestr(archive.MANIFEST, text)
        for name, each in names.items():
            made.write(each, name)
    return path


def test_the_honest_bundle_is_sound(honest: Path, tmp_path: Path) -> None:
    with archive.opened(_zipped(honest, tmp_path / "b.zip", remake=True)) as bundle:
        verify.check(bundle, Registry())


@pytest.mark.slow
def test_a_hundred_bundles_with_one_hostile_file(honest: Path, alone: Path) -> None:
    """All else is as an honest author has it, so that every check is reached by some."""
    said: set[str] = set()
    (alone / "here/out").mkdir()
    for seed in range(100):
        foe, files = Foe(seed, alone / "trace"), alone / f"files-{seed}"
        shutil.copytree(honest, files)
        path = foe.random.choice(sorted(p for p in files.rglob("*") if p.is_file()))
        raw = path.read_bytes()
        if path.suffix == ".safetensors" or foe.random.random() < 0.2:
            path.write_bytes(foe.damaged(raw))
        else:
            table = yaml.safe_load(raw) if path.suffix == ".yaml" else json.loads(raw)
            path.write_bytes(foe.text(table).encode(errors="replace"))
        bundle = _zipped(files, alone / f"{seed}.zip", remake=foe.random.random() < 0.8)
        shutil.rmtree(files)

        def read(_: Foe, top: Path, bundle: Path = bundle) -> None:
            with archive.opened(bundle) as held:
                found = verify.check(held, Registry())
                record = again.compute(found)
                verify.place(held, record, top)

        text = _refusal(read, foe, alone / f"placed-{seed}")
        assert plain(text) == text
        assert not _seen, f"bundle {seed} did more than read"
        said.add(re.sub(r"[^a-z ]", "", text)[:60])
    (alone / "here/out").rmdir()
    assert len(said) > 15, "hardly any check is reached"
