"""An entry may name a torch module that draws by itself: it runs under a tape, and is probed."""

import json
from pathlib import Path

import pytest

from conftest import Command
from dbp_bench.entries.registry import Registry
from dbp_bench.errors import BadEntry
from dbp_bench.result import Result
from own_entries import folder, toy_defense

MODULE = """
import torch
from torch import nn


class Noisy(nn.Module):
    def __init__(self, scale: float):
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, images):
        noisy = images + self.scale * torch.randn_like(images)
        noisy = noisy + self.scale * torch.randn_like(images)
        return noisy.clamp(0, 1)


class Shared(Noisy):
    def forward(self, images):
        return images + self.scale * torch.randn(1, *images.shape[1:]).expand_as(images)


class Fixed(Noisy):
    def forward(self, images):
        torch.manual_seed(0)
        return images + self.scale * torch.randn_like(images)
"""


def entries(path: Path, factory: str, sites: list[str], **lines: str) -> Path:
    (path / "noisy.py").write_text(MODULE)
    table = toy_defense(f"noisy:{factory}", sites, scale=0.1)
    if lines:
        table["settings"][0]["lines"] = {f"noisy.py:{n[1:]}": site for n, site in lines.items()}
    return folder(path, defenses={"mine": table})


def line_of(text: str, nth: int = 0) -> int:
    return [i for i, line in enumerate(MODULE.splitlines(), 1) if text in line][nth]


def test_it_runs_and_the_result_keeps_the_record(tmp_path: Path, command: Command) -> None:
    (tmp_path / "in").mkdir()
    place = entries(tmp_path / "in", "Noisy", ["forward", "reverse"])
    said = command(
        *("run", "--defense", "mine", "--threat", "dwbox", "--examples", "6"),
        *("--batch-size", "6", "--out", tmp_path / "out", "--entries", place, "--trust-code"),
    )
    assert said.err == ""
    (path,) = (tmp_path / "out").rglob("seed-0.json")
    result = Result.read(path)
    assert result.sites == result.knows == ["forward", "reverse"]
    assert result.conformance is not None
    assert set(result.conformance.checks.values()) == {"pass"}
    assert result.conformance.taped is not None
    drawn = {each["line"]: each["site"] for each in result.conformance.taped["lines"]}
    first, second = (f"noisy.py:{line_of('randn_like', i)}" for i in (0, 1))
    assert drawn == {first: "forward", second: "reverse"}
    assert command("check", "mine", "--entries", place, "--trust-code").code == 0
    # A result without a tape doesn't have the key.
    native = json.loads(path.read_text())
    native["conformance"]["taped"] = None
    assert "taped" not in json.loads(Result.model_validate(native).to_json())["conformance"]


def test_lines_have_the_sites_that_the_entry_says(tmp_path: Path) -> None:
    line = line_of("randn_like", 1)
    place = entries(tmp_path, "Noisy", ["forward", "guidance"], **{f"l{line}": "guidance"})
    subject = Registry([place], trust_code=True).subject("mine", "digits-linf")
    assert subject.defense().sites == {"forward", "guidance"}


def test_other_sites_than_the_entry_says(tmp_path: Path) -> None:
    place = entries(tmp_path, "Noisy", ["forward"])
    subject = Registry([place], trust_code=True).subject("mine", "digits-linf")
    with pytest.raises(BadEntry, match=r"declares \['forward', 'reverse'\]"):
        subject.defense()


def test_what_a_batch_shares_is_run_one_image_at_a_time(tmp_path: Path) -> None:
    place = entries(tmp_path, "Shared", ["forward"])
    purifier = Registry([place], trust_code=True).subject("mine", "digits-linf").defense().purifier
    assert purifier.record.one_at_a_time  # type: ignore[attr-defined]


def test_a_fixed_seed_is_a_constant(tmp_path: Path) -> None:
    place = entries(tmp_path, "Fixed", [])
    subject = Registry([place], trust_code=True).subject("mine", "digits-linf")
    record = subject.defense().purifier.record  # type: ignore[attr-defined]
    assert [line.kind for line in record.lines] == ["constant"]
    assert record.sites == frozenset()
