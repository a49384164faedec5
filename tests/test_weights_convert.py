"""Published layouts are converted without running anything; the cache says what is damaged."""

import io
import json
import pickle
import re
import sys
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dbp_bench import __version__
from dbp_bench.errors import BadEntry, BadRequest, BadWeights, DbpError, UnknownName
from dbp_bench.networks import ho, songunet, wrn
from dbp_bench.weights import catalog, formats, store
from dbp_bench.weights import files as weight_files
from dbp_bench.weights.build import build
from dbp_bench.weights.convert import convert, network_of, renamed
from layouts import (
    Malicious,
    hollow,
    narrow_networks,
    narrow_shapes,
    of_version_20,
    on_meta,
    own_catalog,
    published,
)
from layouts import shapes as shapes_of

if TYPE_CHECKING:
    from conftest import Command

Shapes = Mapping[str, tuple[int, ...]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("DBP_BENCH_CACHE", str(folder))
    return folder / "weights"


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """A catalog with one small checkpoint, `tiny`; called, with other values of its entry."""
    monkeypatch.setattr(
        ho, "small32", lambda: ho.HoUNet(channels=24, multipliers=(1, 2), blocks=1, groups=8)
    )
    with own_catalog(tmp_path / "catalog.yaml") as write:
        yield write


def numbers(wanted: Shapes, dtype: torch.dtype = torch.half) -> dict[str, Tensor]:
    """Cheap tensors of these shapes, of which no two are equal."""
    found = {}
    for index, (name, shape) in enumerate(wanted.items()):
        if name.endswith("resample_filter"):
            found[name] = torch.full(shape, 0.25, dtype=dtype)
        else:
            row = torch.arange(prod(shape)) % 499
            found[name] = ((row + index) / 1024).to(dtype).view(shape)
    return found


def small(dtype: torch.dtype = torch.half) -> dict[str, Tensor]:
    """Weights of the network of `tiny`."""
    return numbers(shapes_of(on_meta(ho.small32).state_dict()), dtype)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The networks of the catalog have the published depth, and few channels."""
    narrow_networks(monkeypatch)


def converted(name: str) -> dict[str, Tensor]:
    return load_file(store.file(name))


def assert_equal(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert found[name].equal(value), name


def refused(name: str, path: Path, cache: Path, **options: Any) -> str:
    """The one line that refuses the file; nothing of it is in the cache."""
    with pytest.raises(DbpError) as caught:
        convert(name, path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert not cache.is_dir() or list(cache.iterdir()) == []
    return message


# ------------------------------------------------------------------------------------- catalog


def test_the_catalog_names_what_the_papers_use() -> None:
    entries = catalog.entries()
    assert len(entries) == 23
    assert entries["cifar10-ddpm-pesser"].md5 == "1fa350b952534ae442b1d5235cce5cd3"
    assert entries["cifar10-ddpmpp-deep-vp"].size == 1_707_310_559
    assert entries["imagenet256-adm"].size == 2_211_383_297
    link = f"{catalog.DRIVE}1t98aEuzeTL8P7Kpd5DIrCoCL21BNZUhC"
    assert entries["cifar10-wrn-28-10"].source.what == link
    assert catalog.find("robustbench:cifar10/Linf/Standard").source.what == link
    restricted = {n for n, e in entries.items() if e.licence.restriction == "non-commercial"}
    of_edm = ("vp", "vp-conditional", "vp-plain", "addt")
    assert restricted == {f"cifar10-edm-{name}" for name in of_edm}
    assert entries["imagenet256-adm"].licence.restriction == "research"


PARAMETERS = {
    "cifar10-ddpm": 35_746_307,
    "cifar10-ddpm-pesser": 35_746_307,
    "cifar10-ddpm-ema": 35_746_307,
    "cifar10-ddpmpp-deep-vp": 106_632_579,
    "cifar10-edm-vp": 55_733_891,
    "cifar10-edm-vp-plain": 55_733_891,
    "cifar10-edm-vp-conditional": 55_735_299,
    "cifar10-iddpm": 52_546_438,
    "imagenet256-adm": 552_814_086,
    "cifar10-wrn-28-10": 36_479_194,
}

LISTS = {
    "cifar10-ddpm": "ddpm_cifar10_32_diffusers",
    "cifar10-ddpm-pesser": "ddpm_cifar10_pesser",
    "cifar10-edm-vp": "edm_cifar10_uncond_vp_songunet",
    "cifar10-iddpm": "iddpm_cifar10_uncond",
    "imagenet256-adm": "adm_256x256_uncond",
    "cifar10-ddpmpp-deep-vp": "score_sde_cifar10_ddpmpp_deep",
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_networks_of_the_catalog_have_the_published_size(name: str) -> None:
    network = on_meta(lambda: network_of(catalog.find(name)))
    assert sum(value.numel() for value in network.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", LISTS)
def test_every_published_name_and_shape_fits(name: str) -> None:
    entry = catalog.find(name)
    assert entry.layout is not None
    held: dict[str, Any] = hollow(published(LISTS[name]), 0.25)
    if entry.layout == "score-sde":
        held = {"model": held, "ema": {"shadow_params": list(held.values())[1:]}}
    network = on_meta(lambda: network_of(entry))
    weight_files.check_fit(network, renamed(entry.layout, held, network), Path("f"))


def test_an_unknown_name_gets_a_suggestion() -> None:
    with pytest.raises(UnknownName, match=r"no checkpoint 'cifar10-dppm'\. Did you mean 'cifar10-"):
        catalog.find("cifar10-dppm")


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("robustbench:Standard", "robustbench:cifar10/Linf/Standard"),
        ("robustbench:cifar10/Linf/../x", "robustbench:cifar10/Linf/Standard"),
        ("timm:../x", "timm:resnet50"),
    ],
)
def test_a_zoo_s_model_has_a_form(name: str, form: str) -> None:
    with pytest.raises(UnknownName, match=f"write it as {form}"):
        catalog.find(name)


def test_code_outside_this_package_is_no_network_of_the_catalog(tiny: Callable[..., None]) -> None:
    tiny(network="os:system")
    with pytest.raises(BadEntry, match=r"tiny\.network: string should match"):
        catalog.find("tiny")


# ------------------------------------------------------------------------------------- layouts


def test_pesser_s_file(tmp_path: Path, narrow: None) -> None:
    state = numbers(narrow_shapes(published("ddpm_cifar10_pesser")))
    path = tmp_path / "model-790000.ckpt"
    torch.save(state, path, _use_new_zipfile_serialization=False)  # as files of 2020 are
    record = convert("cifar10-ddpm-pesser", path, unpublished=True)
    assert_equal(converted(record.name), ho.from_pesser(state))
    assert record.published is False


@pytest.mark.parametrize("form", ["safetensors", "bin", "pipeline", "zip"])
def test_diffusers_folder(tmp_path: Path, tiny: Callable[..., None], form: str) -> None:
    wanted = small()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {re.sub(r"to_(q|k|v|out\.0)", lambda n: old[n[0]], k): v for k, v in wanted.items()}
    top = tmp_path / "ddpm"
    folder = top / "unet" if form in ("pipeline", "zip") else top
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"flip_sin_to_cos": false, "freq_shift": 1}')
    if form == "safetensors":
        save_file(state, folder / "diffusion_pytorch_model.safetensors")
    else:
        torch.save(state, folder / "diffusion_pytorch_model.bin")
    path = top
    if form == "zip":
        path = tmp_path / "ddpm.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            noise = np.random.default_rng(0).bytes(1_000_000)  # as weights, it doesn't compress
            archive.writestr("ddpm/vae/noise.bin", noise)
            for file in folder.iterdir():
                archive.write(file, f"ddpm/unet/{file.name}")
    record = convert("tiny", path)
    assert_equal(converted(record.name), wanted)
    assert record.published is None
    assert record.source_size == (path if form == "zip" else next(folder.glob("d*"))).stat().st_size


def test_score_sde_s_checkpoint_gives_its_averages(tmp_path: Path, narrow: None) -> None:
    names = narrow_shapes(published("score_sde_cifar10_ddpmpp_deep"))
    model = hollow(names, 0.5)
    model["module.sigmas"] = torch.ones(1000, dtype=torch.float64)
    averages = numbers({k: v for k, v in names.items() if k != "module.sigmas"})
    path = tmp_path / "checkpoint_8.pth"
    torch.save(
        {
            "optimizer": {"state": {0: {"step": 1, "exp_avg": torch.zeros(3)}}, "param_groups": []},
            "model": OrderedDict(model),
            "ema": {
                "decay": 0.9999,
                "num_updates": 400_005,
                "shadow_params": list(averages.values()),
            },
            "step": 400_005,
        },
        path,
    )
    record = convert("cifar10-ddpmpp-deep-vp", path, unpublished=True)
    found = converted(record.name)
    assert found["model.map_layer0.weight"].equal(averages["module.all_modules.0.weight"])
    attention = averages["module.all_modules.13.NIN_1.W"]
    key = found["model.enc.16x16_block0.qkv.weight"][1::3, :, 0, 0]
    assert key.equal(attention.T)


def test_plain_weights_and_the_networks_own_names(
    tmp_path: Path, tiny: Callable[..., None]
) -> None:
    state = small()
    for layout in ("plain", "pesser"):
        tiny(layout=layout)
        torch.save({"state_dict": state} if layout == "plain" else state, tmp_path / "f.pt")
        convert("tiny", tmp_path / "f.pt")
        assert_equal(converted("tiny"), state)


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_robustbench_s_and_meliketoy_s_classifiers(
    tmp_path: Path, tiny: Callable[..., None], form: str
) -> None:
    tiny(layout="robustbench", network="dbp_bench.networks.wrn:wrn_16_4")
    state = numbers(shapes_of(on_meta(wrn.wrn_16_4).state_dict()), torch.float32)
    counts = {k: torch.tensor(0) for k in state if k.endswith("num_batches_tracked")}
    held = {f"module.{k}": v for k, v in state.items() if k not in counts}
    path = tmp_path / "Standard.pt"
    torch.save({"state_dict": held}, path, _use_new_zipfile_serialization=form == "zip")
    convert("tiny", path)
    assert_equal(converted("tiny"), state | counts)

    tiny(layout="meliketoy", network="dbp_bench.networks.wrn:meliketoy_28_10")
    entry = catalog.find("tiny")
    network = on_meta(lambda: network_of(entry))
    theirs = {
        re.sub(r"^block(\d)\.layer\.", r"layer\1.", k)
        .replace(".convShortcut.", ".shortcut.0.")
        .replace("fc.", "linear."): v
        for k, v in hollow(shapes_of(network.state_dict()), 0.25).items()
    }
    weight_files.check_fit(network, renamed("meliketoy", theirs, network), path)


# ------------------------------------------------------------------------------- EDM's pickles


@contextmanager
def nvidia() -> Iterator[tuple[Callable[..., Any], type]]:
    """The two names that EDM's pickles refer to, importable while they are written."""
    modules = {n: ModuleType(n) for n in ("torch_utils", "torch_utils.persistence", "dnnlib")}
    modules["dnnlib.util"] = ModuleType("dnnlib.util")

    def _reconstruct_persistent_obj(meta: dict[str, Any]) -> None:
        exec(meta["module_src"])  # what the real one does

    class EasyDict(dict[str, Any]):
        pass

    for made, home in (
        (_reconstruct_persistent_obj, "torch_utils.persistence"),
        (EasyDict, "dnnlib.util"),
    ):
        made.__module__, made.__qualname__ = home, made.__name__
        setattr(modules[home], made.__name__, made)
    sys.modules.update(modules)
    try:
        yield _reconstruct_persistent_obj, EasyDict
    finally:
        for name in modules:
            del sys.modules[name]


def edm_pickle(state: Mapping[str, Tensor], source: str, path: Path, protocol: int = 4) -> None:
    """`state` as EDM's training code writes it: persistent objects around their source code."""
    with nvidia() as (reconstruct, easy_dict):

        class Persistent(nn.Module):
            def __reduce__(self) -> tuple[Any, ...]:
                meta = {
                    "type": "class",
                    "version": 6,
                    "module_src": source,
                    "class_name": "SongUNet",
                    "state": self.__dict__,
                }
                return reconstruct, (meta,), None

        top = Persistent()
        for name, value in state.items():
            *parts, leaf = name.split(".")
            module: nn.Module = top
            for depth, part in enumerate(parts):
                if part not in module._modules:
                    plain = depth == 1 and part in ("enc", "dec")
                    module.add_module(part, nn.ModuleDict() if plain else Persistent())
                inner = module._modules[part]
                assert inner is not None
                module = inner
            if leaf == "resample_filter":
                module.register_buffer(leaf, value)
            else:
                module.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
        vars(top)["_init_kwargs"] = easy_dict(sigma_data=np.float64(0.5), img_resolution=32)
        loss = Persistent()
        whole = {
            "ema": top,
            "loss_fn": loss,
            "augment_pipe": None,
            "dataset_kwargs": easy_dict(path="cifar10.zip", use_labels=False),
        }
        path.write_bytes(pickle.dumps(whole, protocol=protocol))


def test_edm_s_pickle_is_read_and_its_source_is_not_run(tmp_path: Path, narrow: None) -> None:
    state = numbers(narrow_shapes(published("edm_cifar10_uncond_vp_songunet")))
    trace, path = tmp_path / "trace", tmp_path / "edm-cifar10-32x32-uncond-vp.pkl"
    edm_pickle(state, f"__import__('pathlib').Path({str(trace)!r}).touch()", path)
    convert("cifar10-edm-vp", path)
    kept = {name: value for name, value in state.items() if "resample_filter" not in name}
    assert len(state) == 425
    assert len(kept) == 417
    assert_equal(converted("cifar10-edm-vp"), kept)
    assert not trace.exists()
    with nvidia() as (reconstruct, _):
        reconstruct({"module_src": f"__import__('pathlib').Path({str(trace)!r}).touch()"})
    assert trace.exists(), "its source does run where it is run"


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_edm_s_pickle_of_any_protocol(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "f.pkl"
    state = {"model.enc.a.weight": torch.ones(2, 3), "model.map.bias": torch.zeros(1)}
    edm_pickle(state, "", path, protocol)
    assert_equal(formats.read(path).values["ema"], state)


def test_edm_s_state_dict(tmp_path: Path, tiny: Callable[..., None]) -> None:
    network = on_meta(songunet.edm_cifar10)
    held = hollow(published(LISTS["cifar10-edm-vp"]), 0.25)
    assert set(renamed("edm", held, network)) == set(network.state_dict())
    assert set(renamed("edm", {"ema": held}, network)) == set(network.state_dict())


@pytest.mark.parametrize(("levels", "says"), [(80, "a network inside a network"), (60, "missing")])
def test_an_edm_network_without_end(tmp_path: Path, cache: Path, levels: int, says: str) -> None:
    """Each level is in the one above twice: there are more paths than anybody can walk."""
    path = tmp_path / "f.pkl"
    with nvidia() as (reconstruct, _):

        class Persistent:
            def __init__(self) -> None:
                self.inner: dict[str, Any] = {}

            def __reduce__(self) -> tuple[Any, ...]:
                return reconstruct, ({"state": {"_modules": self.inner}},), None

        level = top = Persistent()
        for _ in range(levels):
            below = Persistent()
            level.inner.update(a=below, b=below)
            level = below
        path.write_bytes(pickle.dumps({"ema": top}))
    assert says in refused("cifar10-edm-vp", path, cache)


# ------------------------------------------------------------------------------- hostile files


def _pkl(held: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(held, protocol=4))


def _legacy(held: Any, path: Path) -> None:
    torch.save(held, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("write", [torch.save, _legacy, _pkl])
@pytest.mark.parametrize("name", ["cifar10-edm-vp", "cifar10-iddpm", "cifar10-wrn-28-10"])
def test_a_foreign_global_is_named_and_nothing_runs(
    tmp_path: Path, cache: Path, name: str, write: Callable[[Any, Path], None]
) -> None:
    trace, path = tmp_path / "trace", tmp_path / "weights"
    write({"ema": Malicious(trace), "a": torch.zeros(1)}, path)
    message = refused(name, path, cache)
    assert "posix.mkdir" in message
    assert "only running code could read: refused" in message
    assert "state_dict()" in message
    assert not trace.exists()


@pytest.mark.parametrize(
    "name", ["getattr", "eval", "exec", "__import__", "open", "bytearray", "dict", "type"]
)
def test_no_builtin_but_set_is_resolved_in_a_pickle(tmp_path: Path, cache: Path, name: str) -> None:
    path = tmp_path / "f.pkl"
    path.write_bytes(b"\x80\x04c" + f"builtins\n{name}\n".encode() + b"(tR.")
    assert f"holds 'builtins.{name}'," in refused("cifar10-edm-vp", path, cache)


def test_numbers_inside_a_pickle_are_read_as_safely(tmp_path: Path, cache: Path) -> None:
    trace, path, inner = tmp_path / "trace", tmp_path / "f.pkl", io.BytesIO()
    torch.save(Malicious(trace), inner, _use_new_zipfile_serialization=False)

    class Outer:
        def __reduce__(self) -> tuple[Any, ...]:
            return (torch.storage._load_from_bytes, (inner.getvalue(),))

    _pkl({"ema": Outer()}, path)
    assert "a damaged pickle" in refused("cifar10-edm-vp", path, cache)
    assert not trace.exists()


def test_one_pickle_cannot_prepare_the_next(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "f.pkl"
    # Sets __setstate__ of the class of inert objects to the class itself.
    name = b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n"
    path.write_bytes(b"\x80\x04" + name + b"N}\x8c\x0c__setstate__" + name + b"s\x86b.")
    with pytest.raises(BadWeights):
        formats.read(path)
    edm_pickle({"a": torch.ones(1)}, "", path)
    assert formats.read(path).values["ema"]["a"].tolist() == [1]


def test_a_pickle_cannot_ask_for_more_room_than_it_fills(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "f.pkl"
    # An empty table, put at place 64 million of the list of what was read.
    path.write_bytes(b"\x80\x04}r\x00\x00\x00\x04.")
    tracemalloc.start()
    try:
        assert formats.read(path).values == {}
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


def test_a_whole_object_of_a_classifier_tells_how_to_export_it(tmp_path: Path, cache: Path) -> None:
    module = ModuleType("networks.wide_resnet")
    made = type("Wide_ResNet", (nn.Linear,), {"__module__": module.__name__})
    vars(module)["Wide_ResNet"] = made
    sys.modules |= {"networks": ModuleType("networks"), module.__name__: module}
    try:
        torch.save({"net": made(2, 2), "acc": 95.0, "epoch": 200}, tmp_path / "origin.t7")
    finally:
        del sys.modules[module.__name__], sys.modules["networks"]
    message = refused("cifar10-wrn-28-10-meliketoy", tmp_path / "origin.t7", cache)
    assert "networks.wide_resnet.Wide_ResNet" in message
    assert "save the network's state_dict() with torch.save, and convert that" in message


def test_a_tensor_larger_than_its_file(
    tmp_path: Path, cache: Path, tiny: Callable[..., None]
) -> None:
    path = tmp_path / "f.pt"
    torch.save({"conv_in.weight": torch.zeros(1).expand(10**12)}, path)
    assert path.stat().st_size < 2000
    message = refused("tiny", path, cache)
    assert "conv_in.weight is (1000000000000,): more numbers than the file holds" in message


def test_zip_bombs(tmp_path: Path, cache: Path, tiny: Callable[..., None]) -> None:
    path, packed = tmp_path / "f.zip", tmp_path / "f.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("unet/config.json", "{}")
        archive.writestr("unet/diffusion_pytorch_model.bin", bytes(50_000_000))
    assert "would unpack to 5000000" in refused("tiny", path, cache)
    torch.save({"a": torch.zeros(1000)}, packed)
    with zipfile.ZipFile(packed) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.namelist():
            new.writestr(member, old.read(member))
    assert "is compressed, which torch never does" in refused("tiny", path, cache)


def test_a_zip_file_is_unpacked_nowhere_else(
    tmp_path: Path, tiny: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, scratch, inner = tmp_path / "f.zip", tmp_path / "a" / "b" / "c", io.BytesIO()
    scratch.mkdir(parents=True)
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    torch.save(small(), inner)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../unet/config.json", "{}")
        archive.writestr("../../unet/diffusion_pytorch_model.bin", inner.getvalue())
        archive.writestr("../../unet/other", "x")
    before = set(tmp_path.rglob("*"))
    assert_equal(formats.read(path).values, small())
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "value", [torch.zeros(2, 2).to_sparse(), torch.zeros(2, device="meta"), "text"]
)
def test_what_is_not_numbers(
    tmp_path: Path, cache: Path, tiny: Callable[..., None], value: object
) -> None:
    path = tmp_path / "f.pt"
    torch.save(small() | {"conv_in.weight": value}, path)
    assert "conv_in.weight is" in refused("tiny", path, cache)


# ------------------------------------------------------------------------------- damaged files


def _write(state: dict[str, Tensor], form: str, path: Path) -> None:
    match form:
        case "torch":
            torch.save(state, path)
        case "legacy":
            _legacy(state, path)
        case "safetensors":
            save_file(state, path)
        case "pickle":
            edm_pickle({f"model.{k}": v for k, v in state.items()}, "", path)
        case "zip":
            inner = io.BytesIO()
            torch.save(state, inner)
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("unet/config.json", "{}")
                archive.writestr("unet/diffusion_pytorch_model.bin", inner.getvalue())


FORMS = ["torch", "legacy", "safetensors", "pickle", "zip"]


@pytest.mark.parametrize("form", FORMS)
def test_half_a_download(tmp_path: Path, cache: Path, tiny: Callable[..., None], form: str) -> None:
    path = tmp_path / "weights"
    _write(small(), form, path)
    if form != "pickle":
        convert("tiny", path)
        store.file("tiny").unlink()
        store.record_file("tiny").unlink()
    content = path.read_bytes()
    for kept in (0.0, 1e-6, 1e-4, 0.5, 0.999):
        path.write_bytes(content[: int(kept * len(content))])
        refused("tiny", path, cache)


def changed(form: str, path: Path, every: int, masks: Sequence[int]) -> None:
    """Change each `every`-th byte of a small file: it is read, or one line says why not."""
    _write({"conv_in.weight": torch.arange(6.0).view(2, 3), "b": torch.zeros(1)}, form, path)
    content = path.read_bytes()
    for place in range(0, len(content), every):
        for mask in masks:
            broken = bytearray(content)
            broken[place] ^= mask
            path.write_bytes(broken)
            message = ""
            try:
                formats.read(path)
            except DbpError as error:
                message = str(error)
            assert "\n" not in message


@pytest.mark.parametrize("form", FORMS)
def test_a_changed_byte_is_one_line_or_harmless(tmp_path: Path, form: str) -> None:
    changed(form, tmp_path / "weights", every=11, masks=[0x55])


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_any_changed_byte_is_one_line_or_harmless(tmp_path: Path, form: str) -> None:
    changed(form, tmp_path / "weights", every=1, masks=[0x01, 0x55, 0x80])


def test_a_zip_file_of_another_version(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    _write(small(), "zip", path)
    path.write_bytes(of_version_20(path.read_bytes()))
    with pytest.raises(BadWeights, match=r"damaged, or half a file \(zip file version 20"):
        formats.read(path)


@pytest.mark.parametrize(
    "name", ["cifar10-edm-vp", "cifar10-ddpm-pesser", "cifar10-ddpmpp-deep-vp"]
)
def test_a_web_page(tmp_path: Path, cache: Path, name: str) -> None:
    path = tmp_path / "weights.pt"
    path.write_text("\n <!DOCTYPE html><title>Google Drive - Quota exceeded</title>")
    assert "a web page, not weights" in refused(name, path, cache)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x04", b"PK\x03\x04", b"GIF89a" * 99])
def test_other_content(
    tmp_path: Path, cache: Path, tiny: Callable[..., None], content: bytes
) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    refused("tiny", path, cache)


def test_another_architecture_names_the_first_keys(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "f.pt"
    torch.save(small(), path)
    message = refused("cifar10-wrn-28-10", path, cache)
    assert "made for another architecture than WideResNet: conv1.weight is missing" in message
    message = refused("cifar10-ddpm", path, cache)
    assert "made for another architecture than HoUNet: down_blocks.0.resnets.1." in message
    for name in ("cifar10-ddpmpp-deep-vp", "cifar10-edm-vp", "cifar10-iddpm"):
        refused(name, path, cache, unpublished=True)


def test_another_configuration_of_equal_names(
    tmp_path: Path, cache: Path, tiny: Callable[..., None]
) -> None:
    save_file(small(), tmp_path / "diffusion_pytorch_model.safetensors")
    assert "no config.json beside" in refused("tiny", tmp_path, cache)
    (tmp_path / "config.json").write_text('{"flip_sin_to_cos": true}')
    message = refused("tiny", tmp_path, cache)
    assert "config.json: flip_sin_to_cos is True, not False" in message
    (tmp_path / "config.json").write_text("[1]")
    assert "config.json: not a table in JSON" in refused("tiny", tmp_path, cache)
    (tmp_path / "config.json").unlink()
    convert("tiny", tmp_path / "diffusion_pytorch_model.safetensors")


def test_numbers_that_are_none(tmp_path: Path, cache: Path, tiny: Callable[..., None]) -> None:
    state = small()
    state["conv_in.bias"][3] = float("nan")
    torch.save(state, tmp_path / "f.pt")
    assert "conv_in.bias holds NaN or infinity" in refused("tiny", tmp_path / "f.pt", cache)


def test_the_published_digest_and_size(
    tmp_path: Path, cache: Path, tiny: Callable[..., None]
) -> None:
    path = tmp_path / "f.pt"
    torch.save(small(), path)
    size = path.stat().st_size
    others: list[dict[str, Any]] = [{"size": size + 1}, {"md5": "1" * 32}, {"sha256": "1" * 64}]
    for other in others:
        tiny(**other)
        message = refused("tiny", path, cache)
        assert "published" in message
        assert "convert it with --unpublished" in message
    assert convert("tiny", path, unpublished=True).published is False
    md5 = weight_files.digest(path, "md5")
    tiny(size=size, md5=md5, sha256=weight_files.digest(path))
    assert convert("tiny", path).published is True


def test_no_room(
    tmp_path: Path, cache: Path, tiny: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(small(), tmp_path / "f.pt")
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10**5})())
    with pytest.raises(BadRequest, match=r"1 MB are needed, 0 MB are free\. Make room, or set DBP"):
        convert("tiny", tmp_path / "f.pt")
    assert not cache.exists()


def test_a_crash_while_writing_leaves_nothing(
    tmp_path: Path, cache: Path, tiny: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(small(), tmp_path / "f.pt")
    monkeypatch.setattr(weight_files, "digest", _full_disk)
    with pytest.raises(OSError, match="No space left"):
        convert("tiny", tmp_path / "f.pt")
    assert list(cache.iterdir()) == []


def _full_disk(*_: object) -> str:
    raise OSError(28, "No space left on device")


# ----------------------------------------------------------------------------------- the cache


def test_the_record_and_equal_bytes(tmp_path: Path, tiny: Callable[..., None]) -> None:
    state, path = small(), tmp_path / "f.pt"
    torch.save(state, path)
    record = convert("tiny", path)
    first = store.file("tiny").read_bytes()
    assert json.loads(store.record_file("tiny").read_text()) == {
        "name": "tiny",
        "network": "dbp_bench.networks.ho:small32",
        "layout": "diffusers",
        "source_sha256": weight_files.digest(path),
        "source_size": path.stat().st_size,
        "published": None,
        "sha256": weight_files.digest(store.file("tiny")),
        "licence": "MIT",
        "dbp_bench": __version__,
    }
    torch.save(dict(reversed(state.items())), path)
    assert convert("tiny", path).source_sha256 != record.source_sha256
    assert store.file("tiny").read_bytes() == first
    assert store.file("tiny").stat().st_mode & 0o044 == 0o044


def test_built_from_the_cache(tmp_path: Path, tiny: Callable[..., None]) -> None:
    torch.save(small(), tmp_path / "f.pt")
    convert("tiny", tmp_path / "f.pt")
    network = build("tiny")
    assert_equal(network.state_dict(), {k: v.float() for k, v in small().items()})


def test_missing_names_the_command() -> None:
    with pytest.raises(BadWeights) as caught:
        build("cifar10-ddpmpp-deep-vp")
    assert "Run: dbp-bench weights fetch cifar10-ddpmpp-deep-vp; or, with a local file" in str(
        caught.value
    )
    with pytest.raises(
        BadWeights, match=r"Get a state dict .* then: dbp-bench weights convert cifar"
    ):
        build("cifar100-wrn-28-10-meliketoy")


def test_damage_in_the_cache_is_found(
    tmp_path: Path, tiny: Callable[..., None], command: "Command"
) -> None:
    torch.save(small(), tmp_path / "f.pt")
    convert("tiny", tmp_path / "f.pt")
    file, record = store.file("tiny"), store.record_file("tiny")
    whole, said = file.read_bytes(), record.read_text()
    assert command("weights", "verify").code == 0
    breaks: list[tuple[str, Callable[[], object]]] = [
        ("sha256 is", lambda: file.write_bytes(whole[:-1] + b"\x00")),
        ("sha256 is", lambda: file.write_bytes(whole[:1000])),
        ("is missing, but not its record", file.unlink),
        ("not a record", lambda: record.write_text(said[:-9])),
        (
            "the record of other, not of tiny",
            lambda: record.write_text(said.replace("tiny", "other", 1)),
        ),
    ]
    for says, act in breaks:
        file.write_bytes(whole)
        record.write_text(said)
        act()
        with pytest.raises(BadWeights, match=says):
            build("tiny")
        verdict = command("weights", "verify")
        assert (verdict.code, says in verdict.out) == (1, True)
        assert command("weights", "list").code == 0
    file.write_bytes(whole)
    record.write_text(said)
    (file.parent / "old.safetensors").write_bytes(whole)
    verdict = command("weights", "verify")
    assert verdict.code == 0
    assert "old.safetensors: belongs to no checkpoint" in verdict.out


# ------------------------------------------------------------------------------------ commands


@pytest.mark.parametrize("text", ['{"name": "nobody\'s"}', '{"name": "cifar10-ddpm"}', "[]", "{"])
def test_a_record_of_nothing_stops_no_list(text: str, command: "Command", cache: Path) -> None:
    cache.mkdir(parents=True)
    (cache / "zoo-x.json").write_text(text)
    assert store.names() == []
    assert command("weights", "list").code == 0
    assert "zoo-x.json: belongs to no checkpoint" in command("weights", "verify").out


def test_convert_and_list(tmp_path: Path, tiny: Callable[..., None], command: "Command") -> None:
    torch.save(small(), tmp_path / "f.pt")
    said = command("weights", "convert", "tiny", "--from", tmp_path / "f.pt")
    assert said.code == 0
    assert str(store.file("tiny")) in said.out
    listed = json.loads(command("weights", "list", "--json").out)
    assert listed["tiny"]["cached"]["sha256"] == weight_files.digest(store.file("tiny"))
    assert "1 MB" in command("weights", "list").out


def test_the_whole_catalog_is_listed_with_its_licences(command: "Command") -> None:
    out = command("weights", "list").out
    assert all(name in out for name in catalog.entries())
    assert "CC BY-NC-SA 4.0 (non-commercial)" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("convert", "cifar10-dpm", "--from", "f"), "Did you mean 'cifar10-ddpm'"),
        (("convert", "cifar10-ddpm", "--from", "/nowhere/f"), "/nowhere/f: there is no such file"),
        (
            ("convert", "imagenet-resnet50", "--from", "f"),
            "Run: dbp-bench weights fetch imagenet-r",
        ),
        (
            ("fetch", "cifar10-edm-vp"),
            "CC BY-NC-SA 4.0 (non-commercial): to accept it, add --accept",
        ),
        (("fetch", "cifar10-edm-vp-plain"), "no link leads to it. Get edm_cifar_uncond_vp.pt"),
        (("fetch", "timm:resnet50", "--accept-licence"), 'pip install "dbp-bench[timm]"'),
    ],
)
def test_mistakes_are_one_line(
    command: "Command", arguments: tuple[str, ...], says: str, cache: Path
) -> None:
    said = command("weights", *arguments)
    assert said.code == 2
    assert says in said.err
    assert said.err.count("\n") == 1
    assert not cache.exists()
