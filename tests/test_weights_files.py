import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from dbp_bench.entries.build import Builder
from dbp_bench.entries.fields import NetworkRef
from dbp_bench.errors import BadWeights
from dbp_bench.networks.digits import DigitsCNN
from dbp_bench.weights import places as weight_places
from dbp_bench.weights.files import digest, fill, load, verify
from dbp_bench.weights.places import ASSETS, find
from layouts import Malicious

CLASSIFIER = ASSETS / "digits-classifier.safetensors"
NETWORK = "dbp_bench.networks.digits:DigitsCNN"


def build(file: Path, sha256: str | None = None, network: str = NETWORK) -> torch.nn.Module:
    """The network of an entry beside `file`, whose sha256 is right where none is given."""
    ref = NetworkRef(network=network, file=file.name, sha256=sha256 or digest(file))
    return Builder().network(ref, file.parent / "entry.yaml")


def refused(file: Path, **changes: Any) -> str:
    """The one line that refuses the file."""
    with pytest.raises(BadWeights) as caught:
        build(file, **changes)
    message = str(caught.value)
    assert "\n" not in message
    assert str(file) in message
    return message


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The classifier's weights, in a folder of one's own."""
    return Path(shutil.copy(CLASSIFIER, tmp_path / "mine.safetensors"))


def test_the_right_file_fills_the_network(copy: Path) -> None:
    network = build(copy)
    tensors = load_file(CLASSIFIER)
    assert set(tensors) == set(network.state_dict())
    for name, value in network.state_dict().items():
        assert value.equal(tensors[name])


def test_wrong_sha256(copy: Path) -> None:
    message = refused(copy, sha256="0" * 64)
    assert f"sha256 is {digest(copy)[:16]}..., the entry says {'0' * 16}..." in message


def test_one_changed_bit(copy: Path) -> None:
    sha256 = digest(copy)
    content = bytearray(copy.read_bytes())
    content[-1] ^= 1
    copy.write_bytes(content)
    assert "damaged" in refused(copy, sha256=sha256)


@pytest.mark.parametrize("kept", [0, 4, 100, 30_000])
def test_truncated_file_whose_sha256_matches(copy: Path, kept: int) -> None:
    copy.write_bytes(copy.read_bytes()[:kept])
    assert "not a complete safetensors file" in refused(copy)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_is_not_executed(tmp_path: Path, protocol: int) -> None:
    trace = tmp_path / "trace"
    file = tmp_path / "weights.pkl"
    file.write_bytes(pickle.dumps(Malicious(trace), protocol=protocol))
    says = "a pickle" if protocol >= 2 else "not a complete safetensors file"
    assert says in refused(file)
    assert "Convert it" in refused(file, sha256="0" * 64) or protocol < 2
    assert not trace.exists()
    pickle.loads(file.read_bytes())
    assert trace.exists(), "this pickle does execute code when it is read as one"


def test_a_zip_of_torch_is_not_executed(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    file = tmp_path / "weights.pt"
    torch.save({"a": Malicious(trace)}, file)
    assert "a pickle (.pt, .pth, .pkl), which can run code" in refused(file)
    assert not trace.exists()


def test_web_page(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    file.write_text("\n<!DOCTYPE html><title>Quota exceeded</title>")
    assert "a web page, not weights" in refused(file)
    assert "a web page, not weights" in refused(file, sha256="0" * 64)


@pytest.mark.parametrize("length", [640, 896, 1152, 1408, 19_280, 15_392])
def test_a_header_whose_length_looks_like_another_format(tmp_path: Path, length: int) -> None:
    file = tmp_path / "weights.safetensors"
    tensors = {"a": torch.ones(2)}
    padding = length - _header(save(tensors, metadata={"p": ""}))
    content = save(tensors, metadata={"p": "x" * padding})
    assert _header(content) == length
    file.write_bytes(content)
    assert load(file)["a"].tolist() == [1, 1]
    with pytest.raises(BadWeights, match="damaged, or not the one"):
        verify(file, "0" * 64)


def _header(content: bytes) -> int:
    return int.from_bytes(content[:8], "little")


def test_another_architecture(copy: Path) -> None:
    message = refused(copy, network="dbp_bench.networks.digits:ResidualMLP")
    assert "made for another architecture than ResidualMLP" in message
    assert "embed.0.weight is missing" in message
    assert message.endswith("more.")


def test_names_and_shapes(tmp_path: Path) -> None:
    tensors = load_file(CLASSIFIER)
    tensors["out.bias"] = torch.zeros(11)
    tensors["extra"] = torch.zeros(1)
    del tensors["out.weight"]
    with pytest.raises(BadWeights) as caught:
        fill(DigitsCNN(), tensors, tmp_path / "f")
    assert str(caught.value) == (
        f"{tmp_path / 'f'}: made for another architecture than DigitsCNN: out.weight is missing; "
        "extra is unknown; out.bias is (11,), not (10,)."
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: value.to(dtype) for name, value in load_file(CLASSIFIER).items()}
    file = tmp_path / "half.safetensors"
    save_file(tensors, file)
    for name, value in build(file).state_dict().items():
        assert value.dtype == torch.float32
        assert value.equal(tensors[name].float())


@pytest.mark.parametrize("name", ["../weights.safetensors", "/etc/hostname", "a/../../b"])
def test_path_that_leaves_its_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadWeights, match="give a path inside the entry's own folder"):
        find(name, [tmp_path])


def test_where_files_are_looked_for(tmp_path: Path) -> None:
    mine = tmp_path / "digits-ddpm.safetensors"
    mine.write_text("mine")
    assert find(mine.name, [tmp_path]) == mine
    assert find("digits-addt.safetensors", [tmp_path]).parent == weight_places.ASSETS
    with pytest.raises(BadWeights, match=r"no weights file 'nowhere'\. Looked in: "):
        find("nowhere", [tmp_path])
