"""Weights of one's own: files as training code writes them, made into what an entry names."""

from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from dbp_bench.networks.digits import DigitsCNN
from dbp_bench.weights import catalog, store

if TYPE_CHECKING:
    from conftest import Command

DIGITS = "dbp_bench.networks.digits:DigitsCNN"
CODE = """
from torch import nn


def normed():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10))
"""


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DBP_BENCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def state() -> dict[str, Tensor]:
    return DigitsCNN().state_dict()


def renamed(state: Mapping[str, Tensor], before: str) -> dict[str, Tensor]:
    return {f"{before}{name}": value for name, value in state.items()}


LAYOUTS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "plain": (lambda s: s, ""),
    "state_dict": (lambda s: {"state_dict": s, "epoch": 3}, "dropped: epoch"),
    "model": (
        lambda s: {"model": s, "optimizer": {"state": {0: {"step": 1, "lr": 2.0}}}},
        "dropped: optimizer (2 values)",
    ),
    "net, of two devices": (
        lambda s: {"net": renamed(s, "module."), "acc": 94.1},
        "taken from: net.module.",
    ),
    "module.": (lambda s: renamed(s, "module."), "taken from: module."),
    "compiled": (lambda s: renamed(s, "_orig_mod."), "taken from: _orig_mod."),
    "beside a normalisation": (
        lambda s: {**renamed(s, "1."), "0.mean": torch.zeros(3), "0.std": torch.ones(3)},
        "dropped: 0 (2 values)",
    ),
    "a head that is not taken": (
        lambda s: {**s, "projection.weight": torch.ones(2, 2)},
        "dropped: projection",
    ),
}


@pytest.mark.parametrize("suffix", [".pt", ".th"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_state_dict_of_torch(
    layout: str, suffix: str, state: dict[str, Tensor], command: "Command"
) -> None:
    make, says = LAYOUTS[layout]
    torch.save(make(state), f"cnn{suffix}", _use_new_zipfile_serialization=suffix == ".pt")
    said = command(
        "weights", "convert", f"cnn{suffix}", "--network", DIGITS, "--to", "m.safetensors"
    )
    assert (said.code, said.err) == (0, "")
    assert says in said.out
    held = load_file("m.safetensors")
    assert {*held} == {*state}
    assert all(torch.equal(held[name], state[name]) for name in state)
    lines = yaml.safe_load("\n".join(said.out.splitlines()[-3:]))
    digest = sha256(Path("m.safetensors").read_bytes()).hexdigest()
    assert lines == {"network": DIGITS, "file": "m.safetensors", "sha256": digest}


def test_counters_that_old_files_lack(command: "Command") -> None:
    Path("mine").mkdir()
    Path("mine/nets.py").write_text(CODE)
    space: dict[str, Any] = {}
    exec(CODE, space)
    state = space["normed"]().state_dict()
    assert state.pop("1.num_batches_tracked") is not None
    torch.save(state, "bn.pth")
    ask = ("weights", "convert", "bn.pth", "--network", "nets:normed", "--to", "bn.safetensors")
    assert "Add --trust-code" in command(*ask, "--entries", "mine").err
    said = command(*ask, "--entries", "mine", "--trust-code")
    assert said.code == 0, said.err
    assert "set to 0, for they were missing: 1.num_batches_tracked" in said.out
    assert load_file("bn.safetensors")["1.num_batches_tracked"] == 0


def test_one_of_several_networks(state: dict[str, Tensor], command: "Command") -> None:
    averaged = {name: value + 1 for name, value in state.items()}
    torch.save({"model": state, "ema": averaged}, "both.pt")
    ask = ("weights", "convert", "both.pt", "--network", DIGITS, "--to", "m.safetensors")
    said = command(*ask)
    assert said.code == 2
    assert "holds such a network 2 times. Add --prefix with one of: ema., model." in said.err
    said = command(*ask, "--prefix", "ema.")
    assert said.code == 0, said.err
    assert "dropped: model (8 values)" in said.out
    assert torch.equal(load_file("m.safetensors")["out.bias"], averaged["out.bias"])
    said = command(*ask, "--prefix", "emo.", "--force")
    assert "--prefix 'emo.': both.pt has 'ema.', 'model.'" in said.err


class Foreign:
    """Opcodes with which a pickle can run code."""


WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], Any], list[str], str]] = {
    "code": (lambda s: {"net": s, "args": Foreign()}, [], "Foreign"),
    "another layer": (lambda s: {**s, "out.more": torch.ones(1)}, [], "out.more is unknown"),
    "a layer less": (
        lambda s: {k: v for k, v in s.items() if k != "out.bias"},
        [],
        "out.bias is missing",
    ),
    "another size": (lambda s: {**s, "out.bias": torch.ones(7)}, [], "out.bias is (7,), not (10,)"),
    "NaN": (lambda s: {**s, "out.bias": torch.full((10,), torch.nan)}, [], "NaN or infinity"),
    "no tensors": (lambda s: {"epoch": 3}, [], "is missing"),
    "a list": (lambda s: [1, 2], [], "holds list, not values by name"),
    "suffix": (lambda s: s, ["--to", "m.pt"], "call it m.safetensors"),
    "there": (lambda s: s, ["--to", "there.safetensors"], "Add --force"),
    "dotted": (lambda s: s, ["--network", "DigitsCNN"], "write it as module:callable"),
    "no such class": (lambda s: s, ["--network", f"{DIGITS}x"], "cannot be imported"),
    "not a network": (lambda s: s, ["--network", "dbp_bench.noise:Noise"], "not in dbp_bench.net"),
    "from": (lambda s: s, ["--from", "x.pt"], "--from and --unpublished are of published"),
}


@pytest.mark.parametrize("what", WRONG)
def test_one_line_for_what_can_t_be_taken(
    what: str, state: dict[str, Tensor], command: "Command"
) -> None:
    make, options, says = WRONG[what]
    torch.save(make(state), "cnn.pt")
    save_file(state, "there.safetensors")
    ask = {"--network": DIGITS, "--to": "m.safetensors"}
    ask |= dict(zip(options[::2], options[1::2], strict=True))
    said = command("weights", "convert", "cnn.pt", *(word for pair in ask.items() for word in pair))
    assert said.code == 2, said
    assert says in said.err
    assert said.err.count("\n") == 1
    assert not Path("m.safetensors").exists()


def test_what_is_missing_is_said(command: "Command") -> None:
    assert "give --from FILE" in command("weights", "convert", "cifar10-ddpm").err
    assert "--to is missing" in command("weights", "convert", "x.pt", "--network", DIGITS).err
    assert "--network is missing" in command("weights", "convert", "x.pt", "--to", "x").err
    ask = ("--network", DIGITS, "--to", "m.safetensors")
    assert "there is no such file" in command("weights", "convert", "x.pt", *ask).err


def test_all_that_a_row_needs_is_fetched(
    command: "Command", monkeypatch: pytest.MonkeyPatch
) -> None:
    row = ("--defense", "diffpure", "--track", "cifar10-linf")
    said = command("weights", "fetch", *row)
    assert said.code == 2
    for name in ("cifar10-ddpmpp-deep-vp", "cifar10-wrn-28-10"):
        assert f"{name}: licence {catalog.find(name).licence.name}" in said.err
    assert "to accept them, add --accept-licence. Nothing was downloaded" in said.err
    got = []

    def fetched(name: str, *, keep: bool) -> store.Record:
        got.append(name)
        return store.write(name, "0" * 64)

    monkeypatch.setattr("dbp_bench.weights.fetch.fetch", fetched)
    said = command("weights", "fetch", *row, "--accept-licence")
    assert said.code == 0, said.err
    assert sorted(got) == ["cifar10-ddpmpp-deep-vp", "cifar10-wrn-28-10"]
    # One with a classifier of its own is recorded with the track's, too.
    got.clear()
    own = ("--defense", "at-gowal2021", "--track", "cifar10-linf", "--accept-licence", "--force")
    assert command("weights", "fetch", *own).code == 0
    assert sorted(got) == [
        "cifar10-wrn-28-10",
        "robustbench:cifar10/Linf/Gowal2021Improving_28_10_ddpm_100m",
    ]


def test_rows_that_need_nothing_or_are_not_there(command: "Command") -> None:
    said = command("weights", "fetch", "--defense", "ddpm", "--track", "digits-linf")
    assert (said.code, said.err) == (0, "")
    assert "nothing to fetch, all weights are files" in said.out
    for ask in (
        [],
        ["--defense", "ddpm"],
        ["--track", "digits-linf"],
        ["cifar10-ddpm", "--defense", "ddpm", "--track", "digits-linf"],
    ):
        said = command("weights", "fetch", *ask)
        assert (said.code, said.err.count("\n")) == (2, 1)
        assert "--defense NAMES and --track NAME" in said.err
    assert "no defense" in command("weights", "fetch", "--defense", "x", "--track", "digits-l2").err
