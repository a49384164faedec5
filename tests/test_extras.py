"""Missing, shadowed and damaged extras are told apart; the message says what mends them."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dbp_bench import extras
from dbp_bench.errors import DbpError
from dbp_bench.extras import BadExtra, Status, load_extra, status
from dbp_bench.weights import catalog
from dbp_bench.weights.convert import network_of, renamed
from dbp_bench.weights.files import check_fit
from layouts import drawn, shapes
from toys import uniform

Install = Callable[..., None]

AUTOATTACK = {"__init__.py": "", "autopgd_base.py": "", "fab_pt.py": "", "square.py": ""}
ROBUSTBENCH = {"__init__.py": "", "eval.py": "", "model_zoo/__init__.py": ""}


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """A search path with nothing on it but the packages that the returned function writes."""
    packages = {"autoattack", "pyautoattack", "torchattacks", "robustbench", "timm"}
    packages.add("diffusers")
    for name in list(sys.modules):
        if name.partition(".")[0] in packages:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])

    def write(package: str, files: dict[str, str], version: str | None = None) -> None:
        for name, text in files.items():
            path = tmp_path / package / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        if version is not None:
            folder = tmp_path / f"{package}-{version}.dist-info"
            folder.mkdir()
            (folder / "METADATA").write_text(
                f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n", encoding="utf-8"
            )

    return write


def of(name: str) -> Status:
    return next(found for found in status() if found.name == name)


def test_missing_extras_are_reported_with_the_command_that_installs_them(install: Install) -> None:
    assert [found.state for found in status()] == ["missing"] * 5
    for name, command in {
        "autoattack": 'pip install "dbp-bench[autoattack]"',
        "torchattacks": "pip install --no-deps torchattacks==3.5.1",
        "robustbench": 'pip install "dbp-bench[robustbench]"',
        "timm": 'pip install "dbp-bench[timm]"',
        "diffusers": 'pip install "dbp-bench[diffusers]"',
    }.items():
        with pytest.raises(DbpError) as caught:
            load_extra(name)
        message = str(caught.value)
        assert message.startswith(f"{name}: not installed.")
        assert command in message
        assert "\n" not in message


def test_an_unknown_extra_gets_a_suggestion() -> None:
    with pytest.raises(BadExtra, match="Did you mean 'autoattack'"):
        load_extra("autoatack")


def test_the_original_autoattack_goes_before_the_registrys(install: Install) -> None:
    install("pyautoattack", AUTOATTACK, "0.2.0")
    assert load_extra("autoattack")["square"].__name__ == "pyautoattack.square"
    install("autoattack", AUTOATTACK, "0.1")
    assert set(load_extra("autoattack")) == {"autopgd_base", "fab_pt", "square"}
    assert load_extra("autoattack")["square"].__name__ == "autoattack.square"
    assert of("autoattack") == Status("autoattack", "0.1", "ready", "")


def test_a_folder_of_the_same_name_does_not_hide_the_registrys_package(install: Install) -> None:
    install("autoattack", {"notes.txt": ""})
    assert of("autoattack").state == "shadowed"
    install("pyautoattack", AUTOATTACK, "0.2.0")
    assert load_extra("autoattack")["fab_pt"].__name__ == "pyautoattack.fab_pt"


def test_a_folder_of_the_same_name_alone_is_told(install: Install) -> None:
    install("torchattacks", {"results.csv": ""})
    with pytest.raises(BadExtra, match=r"has no attack\.py: it is something else of that name"):
        load_extra("torchattacks")


def test_robustbench_overwritten_by_torchattacks_is_told(install: Install) -> None:
    install("robustbench", ROBUSTBENCH, "1.1.1")
    found = of("robustbench")
    assert (found.version, found.state) == ("1.1.1", "shadowed")
    with pytest.raises(
        BadExtra, match=r"torchattacks.*--force-reinstall --no-deps robustbench==1\.1\.1"
    ):
        load_extra("robustbench")


def test_the_copy_inside_torchattacks_does_not_count_as_robustbench(install: Install) -> None:
    install("robustbench", ROBUSTBENCH)
    found = of("robustbench")
    assert (found.version, found.state) == (None, "shadowed")
    assert 'pip install "dbp-bench[robustbench]"' in found.hint


def test_robustbench_half_removed_with_torchattacks_is_told(install: Install) -> None:
    install("robustbench", {"helper_files/readme": ""}, "1.1.1")
    with pytest.raises(BadExtra, match=r"has no __init__\.py: it is damaged"):
        load_extra("robustbench")


def test_a_package_that_fails_to_import_is_one_line_with_the_cause(install: Install) -> None:
    broken = AUTOATTACK | {"square.py": "import no_such_module_at_all"}
    install("pyautoattack", broken, "0.2.0")
    with pytest.raises(BadExtra, match=r"0\.2\.0.*no_such_module_at_all.*pip install") as caught:
        load_extra("autoattack")
    assert "\n" not in str(caught.value)


def test_stubs_last_as_long_as_the_import(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "pkg_resources", raising=False)
    for name in ("torchvision", "robustbench"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    install("torchvision", {"__init__.py": ""})
    install(
        "robustbench",
        {
            "__init__.py": "from . import eval",
            "eval.py": (
                "import pkg_resources\n"
                "from autoattack import AutoAttack\n"
                "from autoattack.state import EvaluationState\n"
                "aa_state_path = pkg_resources.resource_filename(__name__, 'ids.txt')\n"
            ),
            "model_zoo/__init__.py": "",
            "utils.py": "",
        },
        "1.1.1",
    )
    loaded = load_extra("robustbench")
    assert set(loaded) == {"robustbench", "model_zoo", "utils"}
    evaluation = loaded["robustbench"].eval
    assert Path(evaluation.aa_state_path) == Path(evaluation.__file__).parent / "ids.txt"
    assert not {"pkg_resources", "autoattack", "autoattack.state"} & set(sys.modules)
    with pytest.raises(BadExtra, match="model zoo only"):
        evaluation.AutoAttack(None, log_path=None)


# -------------------------------------------------------------------- the packages themselves


def real(name: str) -> dict[str, object]:
    """The extra, which must be there if the environment variable DBP_EXTRA names it."""
    found = of(name)
    if found.state != "ready" and os.environ.get("DBP_EXTRA") != name:
        pytest.skip(f"{name}: {found.hint}")
    return dict(load_extra(name))


def linear() -> tuple[nn.Module, Tensor, Tensor]:
    """A linear classifier, and images at l-inf distance 0.1 from its boundary, with labels.

    The first two logits are the sum of the eight pixels minus 4, and its negative: the boundary
    is where pixels are 0.5 on average, and the images are 0.1 away from it everywhere.
    """
    layer = nn.Linear(8, 4)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0], [-1.0], [0.0], [0.0]]).expand(4, 8))
        layer.bias.copy_(torch.tensor([-4.0, 4.0, -9.0, -9.0]))
    images = torch.tensor([0.6, 0.4, 0.6]).reshape(3, 1, 1, 1).expand(3, 1, 2, 4).contiguous()
    return nn.Sequential(nn.Flatten(), layer).eval(), images, torch.tensor([0, 1, 0])


@pytest.mark.extras
def test_autoattack_breaks_exactly_what_is_in_reach() -> None:
    modules = real("autoattack")
    model, images, labels = linear()
    for eps, left in ((0.09, 3), (0.11, 0)):
        attack = modules["autopgd_base"].APGDAttack(  # type: ignore[attr-defined]
            model, n_iter=10, norm="Linf", eps=eps, seed=0, loss="ce", device="cpu"
        )
        with torch.random.fork_rng():
            adversarial = attack.perturb(images, labels, best_loss=True)
        assert (adversarial - images).abs().max() <= eps + 1e-6
        assert int((model(adversarial).argmax(1) == labels).sum()) == left
    assert callable(modules["fab_pt"].FABAttack_PT)  # type: ignore[attr-defined]
    assert callable(modules["square"].SquareAttack)  # type: ignore[attr-defined]


@pytest.mark.extras
def test_torchattacks_breaks_exactly_what_is_in_reach() -> None:
    torchattacks = real("torchattacks")["torchattacks"]
    model, images, labels = linear()
    for eps, left in ((0.09, 3), (0.11, 0)):
        attack = torchattacks.PGD(  # type: ignore[attr-defined]
            model, eps=eps, alpha=eps / 4, steps=10, random_start=False
        )
        adversarial = attack(images, labels)
        assert int((model(adversarial).argmax(1) == labels).sum()) == left


def zoo() -> dict[str, Any]:
    """The models of robustbench, by the names that they have here."""
    found: Any = real("robustbench")["model_zoo"]
    return {
        f"{dataset.value}/{threat.value}/{name}": entry
        for dataset, threats in found.model_dicts.items()
        for threat, entries in threats.items()
        for name, entry in entries.items()
    }


@pytest.mark.extras
def test_robustbench_lists_its_models() -> None:
    models = zoo()
    assert sum(name.startswith("cifar10/Linf/") for name in models) == 76
    assert len(models) == 206
    assert "autoattack" not in sys.modules or extras.status()[0].version is not None


@pytest.mark.extras
def test_our_networks_are_those_of_robustbench() -> None:
    """Our list has the file of each, and our network takes every name and shape of theirs."""
    models = zoo()
    for name, row in catalog.robustbench()["models"].items():
        entry = catalog.find(f"robustbench:{name}")
        assert entry.layout is not None
        assert models[name]["gdrive_id"] == row[4]
        with torch.device("meta"):
            theirs, ours = models[name]["model"](), network_of(entry)
        check_fit(ours, renamed(entry.layout, theirs.state_dict(), ours), Path(name))


@pytest.mark.extras
@pytest.mark.parametrize("name", ["cifar10/Linf/Standard", "cifar10/Linf/Wang2023Better_WRN-28-10"])
def test_our_networks_compute_what_robustbench_s_do(name: str) -> None:
    theirs = zoo()[name]["model"]().eval()
    theirs.load_state_dict(drawn(shapes(theirs.state_dict())))
    entry = catalog.find(f"robustbench:{name}")
    assert entry.layout is not None
    ours = network_of(entry).eval()
    ours.load_state_dict(renamed(entry.layout, theirs.state_dict(), ours))
    images = uniform(2, 3, 32, 32)
    torch.testing.assert_close(ours(images), theirs(images))


# ------------------------------------------------------- a torchvision of another build than torch

OF_ANOTHER_BUILD = """
import torch
for name in ("made_up_nms", "made_up_qnms"):
    if not torch._C._jit_get_schemas_for_operator(f"torchvision::{name}"):
        raise RuntimeError(f"operator torchvision::{name} does not exist")
"""
"""It fails to import for want of one operator, then of the next."""


@pytest.mark.parametrize("extra", ["timm", "robustbench", "torchattacks"])
def test_torchvision_beside_a_cpu_torch(
    install: Install, monkeypatch: pytest.MonkeyPatch, extra: str
) -> None:
    """The registry's torchvision is of a CUDA build; no network that we use calls its operators."""
    operators = [f"{extra}_nms", f"{extra}_qnms"]
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    text = OF_ANOTHER_BUILD.replace("made_up", extra)
    install("torchvision", {"__init__.py": text})
    files = {
        "timm": {"__init__.py": "import torchvision", "models/__init__.py": ""},
        "torchattacks": {
            "__init__.py": "import torchvision",
            "attack.py": "",
            "attacks/pgd.py": "",
        },
        "robustbench": {
            "__init__.py": "import torchvision",
            "eval.py": "aa_state_path = 1",
            "model_zoo/__init__.py": "",
            "utils.py": "",
        },
    }[extra]
    install(extra, files, "1.1.1")
    assert of(extra).state == "ready"
    assert extra in load_extra(extra)
    assert all(torch._C._jit_get_schemas_for_operator(f"torchvision::{o}") for o in operators)


@pytest.mark.parametrize("raised", ["ImportError('no')", "ValueError('dtype size changed')"])
def test_an_extra_that_does_not_import_is_not_ready(
    install: Install, raised: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"__init__.py": f"raise {raised}", "models/__init__.py": ""}
    install("timm", files, "1.0.9")
    found = of("timm")
    assert (found.state, found.version) == ("broken", "1.0.9")
    assert found.hint.startswith("is installed but does not import (")
    assert "--force-reinstall --no-deps timm" in found.hint
