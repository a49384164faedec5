"""The golden case passes here, and notices each thing that could be wrong."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dbp_bench import noise
from dbp_bench.checks import environment
from dbp_bench.noise import Tape
from dbp_bench.weights import places as weight_places


@pytest.fixture
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the files that ship, which a test may spoil."""
    folder = tmp_path / "assets"
    shutil.copytree(weight_places.ASSETS, folder)
    monkeypatch.setattr(weight_places, "ASSETS", folder)
    monkeypatch.setattr(environment, "GOLDEN", folder / "golden.json")
    return folder


def edit(assets: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = assets / "golden.json"
    golden = json.loads(path.read_text())
    change(golden)
    path.write_text(json.dumps(golden))


def detail(ok: bool) -> str:
    """What the golden case says, its verdict being `ok`."""
    findings = environment.examine()
    assert findings["ok"] is findings["golden"]["ok"] is ok, findings["golden"]
    return str(findings["golden"]["detail"])


def test_the_golden_case_passes_here() -> None:
    findings = environment.examine()
    assert findings["ok"] is True
    assert findings["golden"]["detail"].startswith("draws on cpu: bit-equal; files: ")


def test_findings_say_what_is_installed() -> None:
    findings = environment.examine()
    assert json.loads(json.dumps(findings)) == findings
    assert findings["torch"]["version"] == torch.__version__
    assert findings["devices"][0].startswith("cpu: ")
    assert findings["threads"]["torch"] == torch.get_num_threads()
    assert {extra["name"] for extra in findings["extras"]} >= {"autoattack", "robustbench"}


def test_an_extra_that_does_not_import_is_not_called_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in {
        "timm/__init__.py": "raise RuntimeError('operator torchvision::nms does not exist')",
        "timm/models/__init__.py": "",
        "timm-1.0.9.dist-info/METADATA": "Name: timm\nVersion: 1.0.9\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    extras = {found["name"]: found for found in environment.examine()["extras"]}
    assert extras["timm"]["state"] == "broken"
    assert "operator torchvision::nms does not exist" in extras["timm"]["hint"]


def test_render_has_a_line_for_each_finding() -> None:
    findings = environment.examine() | {"device_warnings": ["the driver is too old"]}
    lines = environment.render(findings).splitlines()
    names = [line[:12].strip() for line in lines]
    assert names[:5] == ["dbp-bench", "Python", "torch", "device", "warning"]
    assert names.count("extra") == len(findings["extras"])
    assert lines[-1].startswith("golden case  pass (")
    failed = findings | {"golden": {"ok": False, "detail": "why", "seconds": 1.0}}
    assert environment.render(failed).splitlines()[-1] == "golden case  FAIL (1 s): why"


def test_the_stored_numbers_were_made_by_this_code(assets: Path) -> None:
    """All but the rounding of the machine."""
    stored = json.loads((assets / "golden.json").read_text())
    environment.write_golden(assets / "again.json")
    again = json.loads((assets / "again.json").read_text())
    for key in ("about", "draws", "case"):
        assert again[key] == stored[key], key
    assert again["attack"]["right"] == stored["attack"]["right"]


def test_the_case_can_tell_an_attack_from_none() -> None:
    clean, adversarial = json.loads(environment.GOLDEN.read_text())["attack"]["right"]
    assert sum(clean) == 8
    assert 0 < sum(adversarial) < 8


# --------------------------------------------------------------------------- what must be noticed


@pytest.mark.parametrize("kind", ["clean", "adversarial"])
def test_doctored_logits_are_noticed(assets: Path, kind: str) -> None:
    edit(assets, lambda golden: golden["attack"][kind][3].__setitem__(0, 99.0))
    assert f"attack on cpu: {kind} logits are off by" in detail(False)


def test_rounding_is_told_but_allowed(assets: Path) -> None:
    def nudge(golden: dict[str, Any]) -> None:
        golden["attack"]["clean"][0][0] += 1e-4

    edit(assets, nudge)
    assert "attack on cpu: equal within 0.0001, not to the last bit" in detail(True)


def test_doctored_outcomes_are_noticed(assets: Path) -> None:
    edit(assets, lambda golden: golden["attack"]["right"][1].reverse())
    assert "another image is classified correctly" in detail(False)


def test_a_missing_image_is_noticed(assets: Path) -> None:
    edit(assets, lambda golden: golden["attack"]["clean"].pop())
    assert "of another shape" in detail(False)


def test_not_a_number_is_noticed(assets: Path) -> None:
    edit(assets, lambda golden: golden["attack"]["clean"][0].__setitem__(0, float("nan")))
    assert "off by nan" in detail(False)


@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_other_draws_are_noticed(assets: Path, kind: str) -> None:
    edit(assets, lambda golden: golden["draws"].__setitem__(kind, "0" * 64))
    assert f"draws on cpu: {kind} noise isn't the stored one" in detail(False)


def test_draws_that_depend_on_the_machine_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    true = Tape.normal

    def normal(self: Tape, site: Any, step: int, like: Tensor) -> Tensor:
        return true(self, site, step, like) * (1 + 2**-23)

    monkeypatch.setattr(Tape, "normal", normal)
    assert "normal noise isn't the stored one" in detail(False)


def test_other_bits_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    true = noise.philox

    def broken(*arguments: Any) -> list[Any]:
        words = true(*arguments)
        return [words[0] + (1 << 20), *words[1:]]

    monkeypatch.setattr(noise, "philox", broken)
    assert "draws on cpu: normal and uniform noise isn't the stored one" in detail(False)


def test_another_case_is_not_compared(assets: Path) -> None:
    edit(assets, lambda golden: golden["case"]["options"].__setitem__("steps", 11))
    assert "environment --write stores it anew" in detail(False)


@pytest.mark.parametrize(
    "file", ["digits-ddpm", "digits-addt", "digits-classifier", "digits"], ids=str
)
def test_a_damaged_file_is_noticed(assets: Path, file: str) -> None:
    path = assets / f"{file}.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    found = detail(False)
    assert found.startswith(f"files: {path}: sha256 is")
    assert "attack" not in found


def test_a_missing_file_is_noticed(assets: Path) -> None:
    (assets / "digits-addt.safetensors").unlink()
    assert "no weights file 'digits-addt.safetensors'" in detail(False)
    shutil.copy(assets / "digits-ddpm.safetensors", assets / "digits-addt.safetensors")
    (assets / "digits.safetensors").unlink()
    assert "digits.safetensors can't be read" in detail(False)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_unreadable_numbers_are_noticed(assets: Path, content: str) -> None:
    (assets / "golden.json").write_text(content)
    assert "Install dbp-bench again" in detail(False)
    (assets / "golden.json").unlink()
    assert "Install dbp-bench again" in detail(False)


def test_a_device_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(environment, "_run", fail)
    assert detail(False) == "attack on cpu: RuntimeError: no kernel image is available"


def test_warnings_of_the_driver_are_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable() -> bool:
        import warnings

        warnings.warn("The NVIDIA driver on your system is too old", UserWarning, stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", unavailable)
    warned = environment.examine()["device_warnings"]
    assert warned == ["The NVIDIA driver on your system is too old"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_golden_case_passes_on_a_gpu() -> None:
    assert "attack on cuda:0: " in detail(True)
