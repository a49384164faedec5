"""Entries that name published networks: from the cache, from robustbench, from timm."""

import json
import sys
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from dbp_bench.declaration import read_yaml
from dbp_bench.entries.build import Builder
from dbp_bench.entries.fields import CheckpointRef, NetworkRef
from dbp_bench.entries.registry import Registry
from dbp_bench.entries.track import Track
from dbp_bench.errors import BadEntry, BadWeights, DbpError, UnknownName
from dbp_bench.networks import wrn
from dbp_bench.weights import catalog, store
from dbp_bench.weights.convert import convert, network_of, renamed
from dbp_bench.weights.fetch import fetch
from dbp_bench.weights.files import check_fit, digest
from layouts import drawn, hollow, on_meta, shapes
from test_networks_wrn import deepmind, robustbench

if TYPE_CHECKING:
    from conftest import Command

PACKAGED = "robustbench:cifar10/Linf/Wong2020Fast"
"""A model that only the package has."""
OURS = "robustbench:cifar10/Linf/Wang2023Better_WRN-28-10"
"""A model that our own network takes."""
ENTRY = Path("entry.yaml")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DBP_BENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def track(folder: Path, classifier: object) -> Path:
    """A folder of entries with a copy of digits-linf whose classifier is another."""
    table = yaml.safe_load(Registry().tracks["digits-linf"].read_text())
    path = folder / "tracks" / "mine.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(yaml.safe_dump(table | {"classifier": classifier}))
    return path


def with_defense(track: Path) -> Path:
    """The folder of `track`, with the defense ddpm2 for it."""
    folder = track.parents[1]
    text = Registry().defenses["ddpm"].read_text().replace("digits-linf", "mine")
    (folder / "defenses").mkdir()
    (folder / "defenses" / "ddpm2.yaml").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("classifier", "says"),
    [
        (
            {"checkpoint": "cifar10-wrn-28-1"},
            "classifier.checkpoint: no checkpoint 'cifar10-wrn-28-1'. Did you mean 'cifar10-wrn-",
        ),
        ({"checkpoint": "robustbench:Standard"}, "write it as robustbench:cifar10/Linf/Standard"),
        ({"checkpoint": "cifar10-ddpm", "file": "f"}, "classifier.file: is unknown"),
        ({"file": "f", "network": "a:b"}, "classifier.sha256: is missing"),
        ({}, "classifier.network: is missing"),
        ("cifar10-ddpm", "classifier.network: is missing"),
    ],
)
def test_mistakes_in_an_entry(tmp_path: Path, classifier: object, says: str) -> None:
    path = track(tmp_path, classifier)
    if isinstance(classifier, str):
        says = "classifier: "
    with pytest.raises(BadEntry) as caught:
        read_yaml(path, Track)
    assert says in str(caught.value)
    assert "<" not in str(caught.value).replace(
        "robustbench:<dataset>/<threat>/<model>", ""
    ).replace("timm:<model>", "")


def test_a_checkpoint_that_is_not_there_names_the_command(
    tmp_path: Path, command: "Command"
) -> None:
    entries = with_defense(track(tmp_path / "entries", {"checkpoint": "cifar10-wrn-28-10"}))
    said = command(
        *("run", "--defense", "ddpm2", "--threat", "null", "--track", "mine"),
        *("--entries", entries, "--out", tmp_path / "out"),
    )
    assert said.code == 2
    assert "Run: dbp-bench weights fetch cifar10-wrn-28-10; or, with a local file: dbp-" in said.err
    assert said.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_in_an_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wrn, "wrn_28_10", wrn.wrn_16_4)
    state = {
        name: (torch.arange(prod(shape)) % 251 / 256).half().view(shape)
        for name, shape in shapes(on_meta(wrn.wrn_28_10).state_dict()).items()
    }
    save_file(state, tmp_path / "weights.safetensors")
    record = convert("cifar10-wrn-28-10", tmp_path / "weights.safetensors")
    ref = CheckpointRef(checkpoint="cifar10-wrn-28-10")
    built = Builder().network(ref, ENTRY)
    for name, value in built.state_dict().items():
        assert value.equal(state[name].to(value.dtype))
    assert ref.sha256 == record.sha256 == digest(store.file("cifar10-wrn-28-10"))

    entries = with_defense(track(tmp_path / "entries", {"checkpoint": "cifar10-wrn-28-10"}))
    subject = Registry([entries]).subject("ddpm2", "mine")
    held = subject.weights()
    assert held["classifier"] == record.sha256
    denoiser = subject.setting.networks["denoiser"]
    assert isinstance(denoiser, NetworkRef)
    assert held["denoiser"] == denoiser.sha256


# ----------------------------------------------------------------- RobustBench's files, our network

MODELS = catalog.robustbench()["models"]
SHAPES = {(*row[:3], model[:8]): f"robustbench:{model}" for model, row in MODELS.items()}
"""A model of each depth, width, layout and data set."""


def test_which_models_of_robustbench_are_ours() -> None:
    assert len(MODELS) == 90
    assert sum(row[2] == "deepmind" for row in MODELS.values()) == 40
    # Their statistics or names are not those of a plain file: the package loads them.
    for model in ("Linf/Ding2020MMA", "Linf/Rice2020Overfitting", "L2/Rony2019Decoupling"):
        assert catalog.find(f"robustbench:cifar10/{model}").network is None
    wang = catalog.find(OURS)
    assert wang.options == {
        "depth": 28,
        "width": 10,
        "classes": 10,
        "layout": "deepmind",
        "normalise": [[0.4914, 0.4822, 0.4465], [0.2471, 0.2435, 0.2616]],
    }
    assert wang.licence.name.startswith("MIT")
    for model in ("Gowal2020Uncovering_70_16", "Rebuffi2021Fixing_28_10_cutmix_ddpm"):
        assert catalog.find(f"robustbench:cifar10/Linf/{model}").licence.name.startswith("Apache-2")
    # Images of Hendrycks2019Using are taken to [-1, 1]; TRADES and its descendants take [0, 1].
    hendrycks = catalog.find("robustbench:cifar100/Linf/Hendrycks2019Using")
    assert hendrycks.options["normalise"] == [[0.5] * 3] * 2
    assert catalog.find("robustbench:cifar10/Linf/Standard").options["normalise"] is None


@pytest.mark.parametrize("name", SHAPES.values())
def test_every_published_name_and_shape_is_taken(name: str) -> None:
    entry = catalog.find(name)
    assert entry.layout is not None
    names = deepmind if entry.layout == "deepmind" else robustbench
    size = [entry.options[key] for key in ("depth", "width", "classes")]
    held = hollow(names(*size), 0.25)
    network = on_meta(lambda: network_of(entry))
    check_fit(network, renamed(entry.layout, held, network), Path("f"))


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks of the zoo are small ones of the same layout."""
    real = wrn.WideResNet

    def small(depth: int, width: int, classes: int, **options: Any) -> wrn.WideResNet:
        return real(10, 1, classes, **options)

    monkeypatch.setattr(wrn, "WideResNet", small)


@pytest.mark.parametrize("layout", ["deepmind", "robustbench"])
def test_a_file_of_robustbench_fills_our_network(
    layout: str, narrow: None, tmp_path: Path, command: "Command"
) -> None:
    if layout == "deepmind":
        name, held = OURS, drawn(deepmind(10, 1))
        want = wrn.from_deepmind(held)
    else:
        name, held = "robustbench:cifar100/Linf/Sehwag2021Proxy", drawn(robustbench(10, 1, 100))
        want = wrn.from_robustbench(held)
        held = {f"module.{key}": value for key, value in held.items()}
    file = tmp_path / "published.pt"
    torch.save({"state_dict": held, "epoch": 400}, file)
    said = command("weights", "convert", name, "--from", file)
    assert said.code == 0, said.err
    ref = CheckpointRef(checkpoint=name)
    torch.testing.assert_close(dict(Builder().network(ref, ENTRY).state_dict()), want)
    assert ref.sha256 == digest(store.file(name))
    assert name in json.loads(command("weights", "list", "--json").out)
    assert f"{name}: sound" in command("weights", "verify").out

    key, value = held.popitem()
    torch.save(held, file)
    with pytest.raises(BadWeights, match=r"architecture than WideResNet: fc\.\w+ is missing\.$"):
        convert(name, file)
    torch.save(held | {key: value, "mu": torch.ones(3)}, file)
    with pytest.raises(BadWeights, match=r"architecture than WideResNet: mu is unknown\.$"):
        convert(name, file)


# ---------------------------------------------------------------------------------------- zoos

ROBUSTBENCH = {
    "__init__.py": "",
    "eval.py": "aa_state_path = None",
    "model_zoo/__init__.py": """
from enum import Enum
class BenchmarkDataset(Enum):
    cifar_10 = "cifar10"
class ThreatModel(Enum):
    Linf = "Linf"
model_dicts = {BenchmarkDataset.cifar_10: {ThreatModel.Linf: {"Wong2020Fast": {}, "Broken": {}}}}
""",
    "utils.py": """
from pathlib import Path
import torch
def load_model(model_name, model_dir, dataset, threat_model):
    folder = Path(model_dir) / dataset / threat_model
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (model_name + ".pt")
    if model_name == "Broken":
        path.write_text("<!DOCTYPE html>")
        raise RuntimeError("invalid load key, '<'.\\nsecond line")
    if not path.is_file():
        path.write_bytes(b"1")
    model = torch.nn.Linear(2, 3)
    with torch.no_grad():
        for value in model.parameters():
            value.fill_(float(path.read_bytes()[0]))
    return model
""",
}

TIMM = {
    "__init__.py": """
import torch
from timm import data
class Sum(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))
    def forward(self, images):
        return (images * self.weight.view(3, 1, 1)).flatten(1)
def create_model(name, pretrained):
    assert pretrained
    if name != "resnet50.tv_in1k":
        raise RuntimeError(f"Unknown model ({name})")
    return Sum()
""",
    "data.py": """
def resolve_model_data_config(model):
    return {"mean": (0.5, 0.25, 0.0), "std": (0.5, 0.25, 1.0), "input_size": (3, 224, 224)}
""",
    "models/__init__.py": "",
}

STUBBED = {"robustbench", "timm", "torchvision"}
Install = Callable[[str, dict[str, str]], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Packages of these names, before any that is installed."""
    for name in list(sys.modules):
        if name.partition(".")[0] in STUBBED:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))

    def write(package: str, files: dict[str, str]) -> None:
        for name, text in files.items():
            path = tmp_path / "site" / package / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    write("torchvision", {"__init__.py": ""})
    yield write
    for name in list(sys.modules):
        if name.partition(".")[0] in STUBBED:
            del sys.modules[name]


def test_a_model_of_robustbench(install: Install, cache: Path, command: "Command") -> None:
    install("robustbench", ROBUSTBENCH)
    ref = CheckpointRef(checkpoint=PACKAGED)
    with pytest.raises(BadWeights, match=rf"Run: dbp-bench weights fetch {PACKAGED}\.$"):
        Builder().network(ref, ENTRY)
    said = command("weights", "fetch", PACKAGED, "--accept-licence")
    assert said.code == 0, said.err
    assert "licence: the model's own" in said.out
    network = Builder().network(ref, ENTRY)
    assert not network.training
    assert network(torch.ones(1, 2)).tolist() == [[147.0] * 3]
    assert PACKAGED in command("weights", "list").out
    assert command("weights", "verify").code == 0

    save_file(network.state_dict(), cache / "f.safetensors")
    assert ref.sha256 == digest(cache / "f.safetensors")
    (cache / "robustbench" / "cifar10" / "Linf" / "Wong2020Fast.pt").write_bytes(b"2")
    with pytest.raises(BadWeights, match=r"recorded is .*\.\.\.: the package loads others now"):
        Builder().network(ref, ENTRY)


def test_a_model_that_robustbench_lacks(install: Install) -> None:
    install("robustbench", ROBUSTBENCH)
    with pytest.raises(UnknownName, match=r"Near it: cifar10/Linf/Wong2020Fast"):
        fetch("robustbench:cifar10/Linf/Wong2020Fats")


def test_a_web_page_that_robustbench_kept_is_deleted(install: Install, cache: Path) -> None:
    install("robustbench", ROBUSTBENCH)
    with pytest.raises(
        BadWeights, match=r"robustbench can't load it \(RuntimeError: inva"
    ) as caught:
        fetch("robustbench:cifar10/Linf/Broken")
    assert "\n" not in str(caught.value)
    assert list((cache / "robustbench" / "cifar10" / "Linf").iterdir()) == []
    assert not (cache / "weights").exists()


@pytest.mark.parametrize("name", ["timm:resnet50.tv_in1k", "imagenet-resnet50"])
def test_a_model_of_timm_normalises_inside(install: Install, name: str) -> None:
    install("timm", TIMM)
    record = fetch(name)
    network = Builder().network(CheckpointRef(checkpoint=name), ENTRY)
    logits = network(torch.ones(1, 3, 1, 1))
    assert logits.tolist() == [[1.0, 3.0, 1.0]]
    assert network.double()(torch.ones(1, 3, 1, 1).double()).dtype == torch.float64
    assert record.network is None
    assert CheckpointRef(checkpoint=name).sha256 == record.sha256


def test_a_model_that_timm_lacks(install: Install) -> None:
    install("timm", TIMM)
    with pytest.raises(BadWeights, match=r"timm can't load it \(RuntimeError: Unknown model"):
        fetch("timm:resnet51")


@pytest.mark.parametrize("name", [PACKAGED, "timm:resnet50"])
def test_a_missing_package_names_its_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dbp_bench.extras._folders", lambda _: [])
    with pytest.raises(DbpError, match=r'pip install "dbp-bench\[(robustbench|timm)\]"'):
        fetch(name)
