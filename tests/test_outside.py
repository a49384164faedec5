"""What lies outside the package is found, and told apart, without running it."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from dbp_bench.entries import outside
from dbp_bench.entries.registry import Registry
from dbp_bench.errors import BadEntry, NotComparable
from dbp_bench.reporting.records import check_comparable, load
from dbp_bench.runs.job import Overrides, resolve
from own_entries import folder, toy_defense
from records import make, save

if TYPE_CHECKING:
    from conftest import Command


def write(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where an installed package lies that cannot be imported, with entries."""
    top = tmp_path / "site"
    write(top / "plugged_in/__init__.py", "raise RuntimeError('imported')")
    write(top / "plugged_in/make.py", "raise RuntimeError('imported')")
    entry = toy_defense("plugged_in.make:build", [])
    folder(top / "plugged_in/entries", defenses={"plugged": entry})
    write(top / "plugged_in-1.0.dist-info/METADATA", "Name: plugged-in\nVersion: 1.0\n")
    _point(top, "plugged_in:entries")
    monkeypatch.syspath_prepend(top)
    return top


def _point(site: Path, value: str) -> None:
    write(site / "plugged_in-1.0.dist-info/entry_points.txt", f"[dbp_bench.entries]\nx = {value}\n")


def test_entries_of_an_installed_package(site: Path) -> None:
    registry = Registry()
    assert registry.defense("plugged").path.is_relative_to(site)
    assert "plugged_in" not in sys.modules


def test_to_install_is_not_to_trust(site: Path) -> None:
    for trust, reason in ((False, "Add --trust-code to run it"), (True, "imported")):
        registry = Registry(trust_code=trust)
        with pytest.raises((BadEntry, RuntimeError), match=reason):
            registry.subject("plugged", "digits-linf").defense()
    assert "plugged_in" not in sys.modules


@pytest.mark.parametrize("verb", ["check", "run"])
def test_an_entry_of_an_installed_package_runs_no_command_of_ours(
    site: Path, command: "Command", verb: str
) -> None:
    """Such as a check of the same entry, with its code trusted by the entry itself."""
    factory = "dbp_bench.cli.check:check"
    hostile = toy_defense(factory, [], defense="plugged", trust_code=True)
    folder(site / "plugged_in/entries", defenses={"hostile": hostile})
    asked = {"check": ["check", "hostile"], "run": ["run", "--defense", "hostile"]}[verb]
    said = command(*asked, *(["--threat", "null", "--out", site] if verb == "run" else []))
    assert said.code == 2
    assert said.err.endswith(f"hostile.yaml: {factory} is not in dbp_bench.purifiers.\n")
    assert "plugged_in" not in sys.modules


def test_the_same_folder_counts_once(site: Path) -> None:
    registry = Registry([site / "plugged_in/entries"])
    assert "plugged" in registry.defenses


@pytest.mark.parametrize("value", ["plugged_in:nowhere", "not_there_at_all:entries", "json:x"])
def test_an_entry_point_that_leads_nowhere(value: str, site: Path) -> None:
    _point(site, value)
    with pytest.raises(BadEntry, match=r"plugged-in: its entry point x = .* leads to no folder"):
        Registry().defenses  # noqa: B018


def test_a_digest_follows_the_source_and_what_it_imports(tmp_path: Path) -> None:
    write(tmp_path / "top_a.py", "import top_b\nfrom top_c.part import x\nimport json, numpy\n")
    write(tmp_path / "top_b.py", "raise RuntimeError\n")
    write(tmp_path / "top_c/__init__.py")
    write(tmp_path / "top_c/part.py", "x = 1\n")
    write(tmp_path / "top_d.py", "x = 1\n")

    def found() -> outside.Source:
        source = outside.source("top_a", [tmp_path])
        assert source is not None
        return source

    first = found()
    assert set(first.files) == {"top_a.py", "top_b.py", "top_c/__init__.py", "top_c/part.py"}
    write(tmp_path / "top_d.py", "x = 2\n")
    assert found().sha256 == first.sha256
    seen = {first.sha256}
    for name in ("top_a.py", "top_b.py", "top_c/part.py"):
        with (tmp_path / name).open("a") as file:
            file.write("\n")
        seen.add(found().sha256)
    assert len(seen) == 4
    assert outside.source("top_e", [tmp_path]) is None


def test_a_job_of_changed_code_is_another_job(tmp_path: Path) -> None:
    folder(tmp_path, defenses={"mine": toy_defense("changing_code:build", [])})
    module = write(tmp_path / "changing_code.py", "def build(): ...\n")

    def identity() -> dict[str, object]:
        job = resolve(
            *(Registry([tmp_path]), "digits-linf", "mine", "eot"),
            seed=0,
            device="cpu",
            overrides=Overrides(),
        )
        return job.identity()

    before = identity()
    assert identity() == before
    module.write_text("def build(): return 1\n")
    assert {key for key, value in identity().items() if before[key] != value} == {"code"}


def test_results_of_two_codes_are_not_compared(tmp_path: Path) -> None:
    made = [make("mine", threat, 0.5) for threat in ("null", "eot")]
    coded = [
        each.model_copy(
            update={"provenance": each.provenance.model_copy(update={"code": {"mine": code * 64}})}
        )
        for each, code in zip(made, "ab", strict=True)
    ]
    with pytest.raises(NotComparable, match=r"provenance\.code\.mine"):
        check_comparable(load(save(tmp_path, *coded)))
    check_comparable(load(save(tmp_path, *made)))


def test_a_job_of_our_own_code_says_nothing_of_it() -> None:
    job = resolve(
        *(Registry(), "digits-linf", "ddpm", "eot"), seed=0, device="cpu", overrides=Overrides()
    )
    assert "code" not in job.identity()
