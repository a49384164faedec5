"""Published defenses on the tracks of papers, offline: random weights in the exact layouts."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

import id_lists
from dbp_bench import memory
from dbp_bench.data import catalog as data_catalog
from dbp_bench.data import places, splits
from dbp_bench.data.catalog import Facts
from dbp_bench.defense import Defense, Identity, parts
from dbp_bench.entries.defense import OWN_CLASSIFIER, Setting
from dbp_bench.entries.fields import CheckpointRef
from dbp_bench.entries.registry import Registry
from dbp_bench.errors import BadWeights
from dbp_bench.networks import ho
from dbp_bench.networks.wrn import WideResNet
from dbp_bench.noise import Tape
from dbp_bench.purifiers.edm import EDM
from dbp_bench.purifiers.guided import published_scale
from dbp_bench.purifiers.resize import Resized
from dbp_bench.purifiers.schedule import Schedule
from dbp_bench.reporting.report import write_leaderboards
from dbp_bench.result import Conformance, Result
from dbp_bench.runs.estimate import _PROBES, estimate
from dbp_bench.runs.execute import execute
from dbp_bench.runs.job import Job, Overrides, resolve
from dbp_bench.weights import catalog, store
from dbp_bench.weights import files as weight_files
from dbp_bench.weights.convert import convert, network_of, renamed
from dbp_bench.weights.fetch import fetch
from layouts import (
    NARROW,
    drawn,
    filled,
    hollow,
    narrow_networks,
    narrow_shapes,
    on_meta,
    published,
)
from test_networks_wrn import deepmind, meliketoy, robustbench
from test_weights_convert import edm_pickle
from test_weights_entries import ROBUSTBENCH, TIMM
from toys import uniform

if TYPE_CHECKING:
    from conftest import Command

SHIPPED = Registry()
TRACKS = (
    "cifar10-linf",
    "cifar10-l2",
    "cifar100-linf",
    "cifar100-l2",
    "imagenet-linf",
    "imagenet-l2",
)
PAIRS = [
    (name, track)
    for name in sorted(SHIPPED.defenses)
    for setting in SHIPPED.defense(name).entry.settings
    for track in setting.tracks
    if track in TRACKS
]
CALLS = {
    "none": 0,
    "ddpm": 101,
    "ddim": 11,
    "addt": 101,
    "addt-ddim": 11,
    "diffpure": {"cifar10-linf": 100, "cifar10-l2": 75, "imagenet-linf": 150},
    "addt-diffpure": {"cifar10-linf": 100, "cifar10-l2": 75},
    "diffpure-ode": {"cifar10-linf": 100, "cifar10-l2": 75},
    "adbm": 5,
    "flow": 9,
    "flow-pgd": 9,
    "consistency": 1,
    # As many of its guide as of its denoiser.
    "coup": {"cifar10-linf": 200, "cifar10-l2": 150},
    "purify-plus": 9,
    # Two calls tell the level of each image.
    "ssni": 2 + 50,
    "edm": 99,
    "edm-ode": 99,
    "addt-edm": 99,
    "gdmp": 4 * 36,
    "gdmp-ssim": 2 * 60,
    "gdmp-imagenet": 45,
    "lm": 5,
    "scoreopt-o": 20,
    "scoreopt-n": 21,
    "rdc": 125 * 10,
    "rdc-lm": 5 + 125 * 10,
    "gradual": {"cifar10-linf": 4700, "cifar10-l2": 4700, "imagenet-linf": 6200},
    "smoothing": 0,
    "noisy-classifier": 0,
    "dds": 1,
    "densepure": 400,
    "densepure-cheap": 20,
    "diffsmooth": 1,
    "at-gowal2021": 0,
    "at-rebuffi2021": 0,
    "at-salman2020": 0,
    "at-wang2023": 0,
}
"""Network calls of one purification, as published; of all votes."""


def setting_of(registry: Registry, name: str, track: str) -> Setting:
    return registry.subject(name, track).setting


def checkpoints(registry: Registry = SHIPPED) -> list[str]:
    """Every checkpoint that an entry of these tracks names."""
    refs: list[Any] = [registry.track(track).entry.classifier for track in TRACKS]
    for name, track in PAIRS:
        refs += setting_of(registry, name, track).refs.values()
    return list(dict.fromkeys(ref.checkpoint for ref in refs if isinstance(ref, CheckpointRef)))


# --------------------------------------------------------------------- full size, without numbers


@lru_cache
def full_size(name: str) -> nn.Module:
    entry = catalog.find(name)
    return nn.Identity() if entry.network is None else on_meta(lambda: network_of(entry))


class Counting(nn.Module):
    """Answers 0, and counts."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels, self.count = channels, 0

    def forward(self, z: Tensor, *_: Tensor) -> Tensor:
        self.count += 1
        return z[:, :1].expand(-1, self.channels, -1, -1) * 0.1


@pytest.mark.parametrize(("name", "track"), PAIRS)
def test_the_entry_builds_with_the_full_networks(
    name: str, track: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dbp_bench.weights.build.build", full_size)
    monkeypatch.setattr(nn.Module, "to", lambda self, *_: self)  # nothing on meta can be moved
    subject = SHIPPED.subject(name, track)
    built, setting = subject.defense(), subject.setting
    assert built.sites == frozenset(SHIPPED.defense(name).entry.sites)
    assert built.votes == setting.votes
    if setting.classifies:
        assert isinstance(built.classifier, nn.Identity)
    else:
        own = setting.classifier or SHIPPED.track(track).entry.classifier
        assert isinstance(own, CheckpointRef)
        assert built.classifier is full_size(own.checkpoint)
    if setting.resize:
        assert isinstance(built.purifier, Resized)
        assert built.purifier.size == 256
    if setting.surrogate:
        subject.defense(options=setting.surrogate.options)


@pytest.mark.parametrize(("name", "track"), PAIRS)
def test_the_entry_makes_as_many_calls_as_published(
    name: str, track: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = SHIPPED.subject(name, track)
    two_each = track.startswith("imagenet") or subject.setting.options.get("variance") == "learned"
    network = Counting(6 if two_each else 3)
    monkeypatch.setattr("dbp_bench.weights.build.build", lambda _: network)
    built = subject.defense()
    inner = built.purifier.purifier if isinstance(built.purifier, Resized) else built.purifier
    small = uniform(1, 3, 16, 16, seed=1).float()
    shared, single = parts(inner)
    state = shared(small, Tape.make(0, "test", [0]))
    once = network.count
    purified = single(state, Tape.make(0, "test", [0]))
    classifies = subject.setting.classifies
    assert purified.shape == ((1, 10) if classifies else small.shape)
    assert bool(purified.isfinite().all())
    want: Any = CALLS[name]
    found = once + built.votes * (network.count - once)
    assert found == (want[track] if isinstance(want, dict) else want)


@pytest.mark.parametrize(
    ("t", "signal", "sigma"),
    [
        (30, 0.98840, 0.1083),
        (36, 0.98398, 0.1276),
        (50, 0.97102, 0.1728),
        (60, 0.95956, 0.2053),
        (75, 0.93912, 0.2546),
        (100, 0.89702, 0.3388),
        (125, 0.84618, 0.4264),
        (145, 0.80037, 0.4994),
        (150, 0.78832, 0.5182),
        (200, 0.65904, 0.7193),
    ],
)
def test_noise_levels_of_the_entries(t: int, signal: float, sigma: float) -> None:
    found = Schedule().signal()[t]
    assert found == pytest.approx(signal, abs=5e-6)
    assert ((1 - found) / found) ** 0.5 == pytest.approx(sigma, abs=5e-5)


def test_levels_for_each_image_are_around_that_of_the_wrapped_defense() -> None:
    """Where all have as many steps, DiffPure's at its own level are half as many."""
    inner = setting_of(SHIPPED, "ssni", "cifar10-linf").inner
    assert inner is not None
    plain = setting_of(SHIPPED, "diffpure", "cifar10-linf").options
    assert inner.options == {**plain, "steps": 50}


def test_the_levels_of_the_entries_are_among_them() -> None:
    def levels(options: Mapping[str, Any]) -> set[int]:
        return {options["t_star"]} if "t_star" in options else set()

    found: set[int] = set()
    for name, track in PAIRS:
        setting = setting_of(SHIPPED, name, track)
        if "respaced" not in setting.options:
            found |= levels(setting.options)
        for stage in setting.options.get("stages", []):
            found |= levels(stage)
    assert found == {30, 36, 50, 60, 75, 100, 125, 145, 150, 200}


def test_the_guidance_of_gdmp_is_that_of_a_shipped_batch() -> None:
    scales = {"gdmp": (60000, 8, 100), "gdmp-ssim": (1000, 8, 100), "gdmp-imagenet": (1000, 4, 60)}
    for name, (guide, ptb, batch) in scales.items():
        track = "imagenet-linf" if name == "gdmp-imagenet" else "cifar10-linf"
        options = setting_of(SHIPPED, name, track).options
        assert options["scale"] == published_scale(guide, ptb) / batch
        assert "batch_mean" not in options


_LISTS = {
    ("dbp_bench.networks.ho:cifar10", "diffusers"): "ddpm_cifar10_32_diffusers",
    ("dbp_bench.networks.ho:cifar10", "pesser"): "ddpm_cifar10_pesser",
    (
        "dbp_bench.networks.songunet:ddpmpp_deep_cifar10",
        "score-sde",
    ): "score_sde_cifar10_ddpmpp_deep",
    ("dbp_bench.networks.songunet:edm_cifar10", "edm"): "edm_cifar10_uncond_vp_songunet",
    ("dbp_bench.networks.songunet:edm_cifar10_conditional", "edm"): "edm_cifar10_cond_vp_songunet",
    ("dbp_bench.networks.adm:imagenet256", "plain"): "adm_256x256_uncond",
    ("dbp_bench.networks.adm:iddpm_cifar10", "plain"): "iddpm_cifar10_uncond",
}
DENOISERS = [
    name
    for name in checkpoints()
    if (catalog.find(name).network or "wrn").partition(":")[0].rpartition(".")[2] != "wrn"
    and catalog.find(name).network
]


def list_of(name: str) -> str:
    """The list of the published names that the checkpoint has."""
    entry = catalog.find(name)
    return _LISTS[entry.network or "", entry.layout or ""]


def as_published(name: str, held: dict[str, Any]) -> dict[str, Any]:
    """`held` as the published file of the checkpoint has it."""
    if catalog.find(name).layout != "score-sde":
        return held
    averages = [value for key, value in held.items() if key != "module.sigmas"]
    return {"model": OrderedDict(held), "ema": {"shadow_params": averages}, "step": 1}


@pytest.mark.parametrize("name", DENOISERS)
def test_the_published_keys_fit_every_denoiser(name: str) -> None:
    entry = catalog.find(name)
    assert entry.layout is not None
    held = as_published(name, hollow(published(list_of(name)), 0.25))
    network = full_size(name)
    weight_files.check_fit(network, renamed(entry.layout, held, network), Path("f"))


# ------------------------------------------------- narrow networks, through the whole pipeline

ZOO = {"imagenet/Linf": ["Salman2020Do_R50"]}
"""Models that are left to the package robustbench."""

_LINEAR = """
import torch
class Linear(torch.nn.Module):
    def __init__(self):
        super().__init__()
        weight = torch.sin(torch.arange(10 * 3072.0)).view(10, 3072)
        self.weight = torch.nn.Parameter(weight)
    def forward(self, images):
        x = (images - 0.5).flatten(1)
        return x @ self.weight[:, : x.shape[1]].T
"""
_ROBUSTBENCH = {
    **ROBUSTBENCH,
    "model_zoo/__init__.py": f"{_LINEAR}model_dicts = {{}}\nfor place, names in {ZOO!r}.items():\n"
    "    data, norm = place.split('/')\n"
    "    models = model_dicts.setdefault(data, {}).setdefault(norm, {})\n"
    "    models.update({name: {'model': Linear} for name in names})\n",
    "utils.py": "from robustbench.model_zoo import model_dicts\n"
    "def load_model(model_name, model_dir, dataset, threat_model):\n"
    "    return model_dicts[dataset][threat_model][model_name]['model']()\n",
}
_TIMM = {
    **TIMM,
    "__init__.py": f"{_LINEAR}from timm import data\ncreate_model = lambda n, **_: Linear()\n",
}


@lru_cache
def published_weights(names: str, by: int) -> dict[str, Tensor]:
    """Drawn weights in the published names of a list, that many times narrower."""
    held = drawn(narrow_shapes(published(names), by))
    return {k: torch.full_like(v, 0.25) if "resample" in k else v for k, v in held.items()}


@lru_cache
def published_classifier(layout: str, classes: int) -> dict[str, Any]:
    """Drawn weights of a narrow classifier, as published files of the layout hold them."""
    names = {"robustbench": robustbench, "deepmind": deepmind, "meliketoy": meliketoy}[layout]
    held = drawn(names(10, 1, classes))
    if layout == "robustbench":
        return {"state_dict": {f"module.{key}": value for key, value in held.items()}}
    return dict(held)


def write_checkpoint(name: str, folder: Path) -> Path:
    """A file or folder in the published layout, with drawn weights."""
    entry = catalog.find(name)
    path = folder / f"{store.stem(name)}.pt"
    if entry.layout in ("robustbench", "deepmind", "meliketoy"):
        classes = 100 if "cifar100" in name else 10
        torch.save(published_classifier(entry.layout, classes), path)
        return path
    narrow = {"imagenet256-adm": NARROW // 2, "cifar10-iddpm": NARROW // 4}
    held = published_weights(list_of(name), narrow.get(name, NARROW))
    if entry.layout == "diffusers":
        top = folder / name
        top.mkdir()
        (top / "config.json").write_text('{"flip_sin_to_cos": false, "freq_shift": 1}')
        save_file(held, top / "diffusion_pytorch_model.safetensors")
        return top
    if entry.layout == "edm":
        path = folder / f"{name}.pkl"
        edm_pickle(held, "raise SystemError", path)
        return path
    torch.save(as_published(name, held), path)
    return path


SIDE = 16
"""The side of the images that stand for CIFAR's."""


def generated_data(patch: pytest.MonkeyPatch, folder: Path) -> Path:
    """Images and labels under the names of the real data sets, and their lists."""
    rng = np.random.default_rng(0)
    patch.delenv(places.VARIABLE, raising=False)
    lists = folder / "lists"
    lists.mkdir()
    patch.setattr(splits, "LISTS", lists)
    patch.setattr(id_lists, "FIRST", 20)
    patch.setattr(id_lists, "STRATIFIED", 10)
    (folder / "data").mkdir()
    for name in ("cifar10", "cifar100", "imagenet"):
        size = 24 if name == "imagenet" else SIDE
        patch.setitem(
            data_catalog.CATALOG,
            name,
            Facts(name, 100 if name == "cifar100" else 10, (3, size, size), 30, 40),
        )
        labels = rng.permutation(np.arange(70) % 10)
        images = rng.integers(0, 256, (70, size, size, 3), dtype=np.uint8)
        id_lists.write_lists(name, labels.tolist(), lists)
        np.savez(
            folder / "data" / f"{name}.npz",
            x_test=images[:30],
            y_test=labels[:30],
            x_train=images[30:],
            y_train=labels[30:],
        )
    return folder / "data"


def shortened(options: dict[str, Any]) -> dict[str, Any]:
    """The same sampler in a few steps."""
    short = dict(options)
    if "steps" in short:
        odd = {"sigma", "sigma_max"} & short.keys() or short.get("t_star", 0) % 2
        short["steps"] = min(short["steps"], 3 if odd else 2)
    if "levels" in short:
        short["levels"] = 2
    if "lm" in short:
        short["lm"] = {**short["lm"], "steps": 2}
    if "iterations" in short:
        short["iterations"] = min(2, short["iterations"])
    if "stages" in short:
        short["stages"] = [
            {**stage, "steps": 2 if stage["t_star"] == 30 else 1, "times": 1}
            for stage in short["stages"]
        ]
    return short


def short_entry(path: Path, folder: Path) -> Path:
    table = yaml.safe_load(path.read_text())
    table["settings"] = [s for s in table["settings"] if set(s["tracks"]) & set(TRACKS)]
    for setting in table["settings"]:
        setting["options"] = shortened(setting["options"])
        if "surrogate" in setting and "stages" in setting["surrogate"]["options"]:
            surrogate = setting["surrogate"]["options"]
            stages = [
                {**stage, "steps": 2 if stage["t_star"] == 30 else 1}
                for stage in surrogate["stages"]
            ]
            setting["surrogate"]["options"] = {"stages": stages}
        if "votes" in setting:
            setting["votes"] = 2
        if "resize" in setting:
            setting["resize"] = 32
    made = folder / path.name
    made.write_text(yaml.safe_dump(table))
    return made


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """The shipped entries in few steps, all weights converted and cached, and generated images."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DBP_BENCH_CACHE", str(folder / "cache"))
        patch.setattr("dbp_bench.provenance._git", lambda: (None, None))
        for package, files in (("robustbench", _ROBUSTBENCH), ("timm", _TIMM), ("torchvision", {})):
            for name, text in {"__init__.py": "", **files}.items():
                path = folder / "site" / package / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
        forget_stubs()
        patch.syspath_prepend(str(folder / "site"))
        narrow_networks(patch)
        data = generated_data(patch, folder)
        (folder / "files").mkdir()
        for name in checkpoints():
            if catalog.find(name).network is None:
                fetch(name)
            else:
                convert(name, write_checkpoint(name, folder / "files"), unpublished=True)
        (folder / "short").mkdir()
        paths = {name: SHIPPED.defenses[name] for name, _ in PAIRS}
        short = {name: short_entry(path, folder / "short") for name, path in paths.items()}
        yield Registry(data=data, instead=short)
        forget_stubs()
    _PROBES.clear()


def forget_stubs() -> None:
    import sys

    for name in list(sys.modules):
        if name.partition(".")[0] in ("robustbench", "timm", "torchvision"):
            del sys.modules[name]


IMAGES = 2


def job_of(
    registry: Registry,
    name: str,
    track: str,
    *,
    attack: str | None = None,
    gradient: str | None = None,
    **effort: Any,
) -> Job:
    """A job of one gradient evaluation of each image, where nothing is known."""
    options = {"steps": 1, "eot": 1, **effort}
    overrides = Overrides(options, gradient, examples=IMAGES, batch_size=IMAGES, draws=1)
    return resolve(
        registry, track, name, "pgd20-eot", attack=attack, seed=0, device="cpu", overrides=overrides
    )


SLOW = {("gradual", "imagenet-linf", None), ("gradual", "cifar10-linf", None)}
"""The same networks, sampler and attack are in other combinations."""


def every_data_set() -> list[Any]:
    """For every entry, one track of each data set; and the surrogates and an attack of others.

    The images that stand for ImageNet's are of 24 x 24: its network takes them where it is resized,
    which a certificate is not.
    """
    tracks = {
        (name, track if name.startswith("at-") else track.partition("-")[0]): track
        for name, track in PAIRS
        if track != "imagenet-l2"
    }
    found: list[tuple[str, str, str | None, str | None]] = [
        (name, track, None, None) for (name, _), track in tracks.items()
    ]
    found += [
        ("gradual", "cifar10-linf", "pgd", "declared-surrogate"),
        ("rdc-lm", "cifar10-linf", "pgd", "declared-surrogate"),
        ("gradual", "imagenet-linf", "gradual-published", None),
        ("edm", "cifar10-l2", "diffattack", None),
    ]
    return [
        pytest.param(*case, marks=[pytest.mark.slow] if case[:3] in SLOW else []) for case in found
    ]


def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs make no conformance record, which is many passes; other tests are about it."""
    empty = Conformance(checks={}, gradient=None)
    monkeypatch.setattr("dbp_bench.runs.execute.record", lambda *_: empty)


@pytest.mark.parametrize(("name", "track", "attack", "gradient"), every_data_set())
def test_from_the_published_file_to_a_result(
    name: str,
    track: str,
    attack: str | None,
    gradient: str | None,
    world: Registry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unchecked(monkeypatch)
    job = job_of(world, name, track, attack=attack, gradient=gradient)
    result = Result.read(execute(job, tmp_path))
    setting = setting_of(world, name, track)
    want = {
        key: store.read(ref.checkpoint).sha256
        for key, ref in {**setting.refs, "classifier": world.track(track).entry.classifier}.items()
        if isinstance(ref, CheckpointRef)
    }
    assert result.provenance.weights == want
    assert (OWN_CLASSIFIER in want) == (setting.classifier is not None or name.startswith("rdc"))
    assert result.options == setting.recorded
    assert result.sites == sorted(SHIPPED.defense(name).entry.sites)
    assert result.classes("adversarial").shape == (IMAGES, 1)
    if gradient or attack == "gradual-published":
        assert result.gradient == "declared-surrogate"
        assert result.surrogate is not None
        assert result.evaluations.gradient == [1] * IMAGES
        assert result.evaluations.searched_nfe == (2 + 20 if name == "rdc-lm" else 2 + 1 + 1)


def test_a_defense_with_a_classifier_of_its_own(world: Registry) -> None:
    built = world.subject("at-wang2023", "cifar10-linf").defense()
    assert isinstance(built.purifier, Identity)
    assert isinstance(built.classifier, WideResNet)
    tracks = world.subject("none", "cifar10-linf").defense().classifier
    assert isinstance(tracks, WideResNet)
    assert [float(net.std[0]) for net in (tracks, built.classifier)] == pytest.approx([1, 0.2471])
    built = world.subject("at-salman2020", "imagenet-linf").defense()
    assert type(built.classifier).__module__ == "robustbench.model_zoo"


def test_the_rows_stand_in_one_leaderboard(
    world: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unchecked(monkeypatch)
    for name in ("none", "ddim", "at-wang2023"):
        execute(job_of(world, name, "cifar10-linf"), tmp_path / "r")
    written = write_leaderboards(tmp_path / "r", tmp_path / "boards")
    (board,) = (p for p in written if p.name == "cifar10-linf.md")
    rows = [line for line in board.read_text().splitlines() if "| at-wang2023 |" in line]
    assert rows


# ------------------------------------------------------------------------------------------ plans


@pytest.mark.parametrize(
    ("name", "gradient"),
    [
        ("ddim", None),
        ("edm", None),
        ("coup", None),
        ("gradual", "declared-surrogate"),
        ("densepure", None),
        ("diffsmooth", None),
    ],
)
def test_a_plan_counts_the_calls_of_the_run(
    name: str,
    gradient: str | None,
    world: Registry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unchecked(monkeypatch)
    monkeypatch.setattr("dbp_bench.runs.estimate.MOMENT", 0.0)
    track = "cifar10-linf" if (name, "cifar10-linf") in PAIRS else "cifar10-l2"
    job = job_of(world, name, track, gradient=gradient, steps=2)
    cost = estimate(job, tmp_path, "auto")
    assert cost.random_weights == ()
    counts = Result.read(execute(job, tmp_path)).evaluations
    assert counts.gradient == [2] * IMAGES
    assert counts.searched_nfe is not None
    # Two steps, and clean and adversarial images evaluated at one draw.
    assert cost.nfe == 2 * IMAGES * (counts.searched_nfe + counts.nfe)


@pytest.mark.parametrize(
    ("name", "policy"),
    [("ddim", "none"), ("edm", "none"), ("gradual", "none"), ("ddim", "step"), ("edm", "step")],
)
def test_a_plan_tells_the_memory_of_a_pass(
    name: str,
    policy: memory.Policy,
    world: Registry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dbp_bench.runs.estimate.MOMENT", 0.0)
    job = job_of(world, name, "cifar10-linf")
    cost = estimate(job, tmp_path, policy)
    assert cost.by_step == (policy == "step")
    built = job.defense(policy=policy)
    x = uniform(IMAGES, 3, SIDE, SIDE, seed=2).float().requires_grad_()
    tape = Tape.make(0, "test", range(IMAGES))
    kept = memory.activation_bytes(lambda: built.logits(x, tape))
    if policy == "step":
        z, t = torch.zeros(IMAGES, 3, SIDE, SIDE, requires_grad=True), torch.ones(IMAGES)
        kept += memory.activation_bytes(lambda: built.networks[0](z, t))
    assert 0.8 < cost.bytes / kept < 1.25


def test_a_plan_without_weights_says_so(
    world: Registry, tmp_path: Path, command: "Command", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DBP_BENCH_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr("dbp_bench.runs.estimate.MOMENT", 0.0)
    _PROBES.clear()
    registry = Registry(instead=world.defenses)
    job = job_of(registry, "ddim", "cifar10-linf", steps=2)
    cost = estimate(job, tmp_path, "none")
    assert cost.random_weights == ("cifar10-ddpm-ema", "cifar10-wrn-28-10")
    assert cost.nfe == 3 * IMAGES * (2 + 2)
    assert cost.seconds > 0
    with pytest.raises(BadWeights, match="Run: dbp-bench weights fetch cifar10-wrn-28-10"):
        execute(job, tmp_path / "out")
    said = command(
        *("run", "--dry-run", "--track", "cifar10-linf", "--defense", "none,at-wang2023"),
        *("--threat", "eot,dwbox", "--device", "cpu", "--json"),
    )
    assert (said.code, said.err) == (0, "")
    said = command(
        *("run", "--dry-run", "--track", "cifar10-linf", "--defense", "none,at-wang2023"),
        *("--threat", "eot", "--device", "cpu", "--examples", "4", "--batch-size", "4"),
    )
    assert (
        "timed with random weights: cifar10-wrn-28-10, "
        "robustbench:cifar10/Linf/Wang2023Better_WRN-28-10 not in the cache"
        in " ".join(said.out.split())
    )
    assert not (tmp_path / "empty").exists()
    said = command("run", "--track", "cifar10-linf", "--defense", "none", "--threat", "eot")
    assert said.code == 2
    assert "weights fetch cifar10-wrn-28-10" in said.err


def test_the_automatic_policy_needs_no_room_for_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stops measuring where it is clear that not everything fits."""
    network = filled(ho.HoUNet(channels=16, multipliers=(1, 2), blocks=1, groups=16))
    purifier = SHIPPED.subject("none", "digits-linf").defense().purifier
    assert isinstance(purifier, Identity)
    calls = []

    class Deep:
        sites = frozenset[Any]()

        def __call__(self, images: Tensor, noise: Any) -> Tensor:
            for _ in range(50):
                calls.append(len(images))
                images = memory.step(lambda z: network(z, torch.ones(len(z))), images)
            return images

    defense = Defense(Deep(), nn.Flatten(), [network])
    x = uniform(2, 3, 16, 16, seed=1).float()
    per_call = memory.activation_bytes(lambda: network(x[:1].requires_grad_(), torch.ones(1)))
    monkeypatch.setattr(memory, "free_bytes", lambda _: 2 * 2 * 3 * per_call)
    with torch.enable_grad():
        assert defense._by_step(x.detach().requires_grad_())
    assert calls == [1] * 4
    assert defense.activation_bytes(x) > 45 * per_call


def test_the_states_of_edm_are_those_of_its_levels() -> None:
    """With a network that knows the image, the reverse process is the forward process."""
    images = uniform(1, 3, 8, 8, seed=3).double()
    purifier = EDM(
        lambda z, sigma: 2 * images - 1,
        sigma_max=0.5,
        sigma_min=0.002,
        rho=7.0,
        steps=4,
        solver="heun",
        clamp_output=True,
    )
    with memory.recording() as states:
        purifier(images, Tape.make(0, "test", [0]))
    assert [state.level for state in states] == [3, 2, 1, 0]
    for state in states:
        torch.testing.assert_close(state.forward, state.reverse, atol=1e-12, rtol=0)
    assert float((states[0].forward - states[-1].forward).std()) > 0.1
