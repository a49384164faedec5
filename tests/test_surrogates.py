"""Set-ups of an entry beside its options: a surrogate that it declares, and another image size."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from dbp_bench.checks import gradients
from dbp_bench.checks.gradients import check
from dbp_bench.defense import Defense
from dbp_bench.entries.registry import Registry
from dbp_bench.errors import BadEntry, BadRequest
from dbp_bench.noise import Tape
from dbp_bench.purifiers.resize import Resized
from dbp_bench.result import Result
from dbp_bench.runs.execute import execute
from dbp_bench.runs.job import Job, Overrides, identity_of, refuse_other_request, resolve
from own_entries import folder
from toys import uniform

DECLARED = "declared-surrogate"
STAGES = [{"t_star": 30, "steps": 2, "times": 2}, {"t_star": 60, "steps": 3, "times": 1}]
SHORT = [{"t_star": 30, "steps": 1, "times": 1}, {"t_star": 60, "steps": 2, "times": 1}]
ENTRY = yaml.safe_load(
    """
title: Gradual
kind: defense
paper: https://arxiv.org/abs/2303.09051
sites: [forward, reverse]
settings:
  - tracks: [digits-linf]
    options: {eta: 1, clamp_output: false}
    votes: 3
    networks:
      denoiser:
        network: dbp_bench.networks.digits:ResidualMLP
        file: digits-ddpm.safetensors
        sha256: 6f30865675d4d9ba19370149a4e25579a82eb56068d16a2655087b5193b54f54
"""
)


@pytest.fixture(autouse=True)
def _no_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dbp_bench.provenance._git", lambda: (None, None))


ENTRY["factory"] = Registry().defense("gradual").entry.factory


def entries(path: Path, **setting: Any) -> Registry:
    """A registry with the defense `gradual` on the digits."""
    (own,) = ENTRY["settings"]
    own = {**own, "options": {**own["options"], "stages": STAGES}, **setting}
    return Registry([folder(path, defenses={"mine": {**ENTRY, "settings": [own]}})])


def job(registry: Registry, gradient: str | None = None, defense: str = "mine") -> Job:
    overrides = Overrides({"budget": 2}, gradient=gradient, draws=2, examples=2, batch_size=2)
    return resolve(
        registry, "digits-linf", defense, "eot", seed=0, device="cpu", overrides=overrides
    )


def nfe(defense: Defense) -> int:
    """Calls of the denoising networks in one evaluation of an image."""
    before = defense.counter.images
    with torch.no_grad():
        defense.logits(torch.zeros(1, 1, 8, 8), Tape.make(0, "test", [0]))
    return defense.counter.images - before


def test_what_is_attacked_is_the_surrogate_that_is_declared(tmp_path: Path) -> None:
    registry = entries(tmp_path, surrogate={"options": {"stages": SHORT}})
    subject = registry.subject("mine", "digits-linf")
    evaluated = subject.defense()
    searched = subject.searched(evaluated, DECLARED)
    assert (evaluated.votes, nfe(evaluated)) == (3, 3 * (2 + 2 + 3))
    assert (searched.votes, nfe(searched)) == (1, 1 + 2)
    # What the surrogate does not say is the entry's.
    assert getattr(searched.purifier, "eta", None) == 1
    assert subject.searched(evaluated, "exact") is evaluated


def test_a_run_records_it_and_nothing_where_none_is_used(tmp_path: Path) -> None:
    registry = entries(tmp_path, surrogate={"options": {"stages": SHORT}})
    paths, evaluations = {}, {}
    for gradient in ("exact", DECLARED):
        asked = job(registry, gradient)
        paths[gradient] = execute(asked, tmp_path / gradient)
        result = Result.read(paths[gradient])
        assert identity_of(result) == asked.identity()
        assert result.options == {"eta": 1, "clamp_output": False, "stages": STAGES, "votes": 3}
        assert result.gradient == gradient
        assert result.overrides == ["batch_size", "budget", "draws", "gradient"]
        evaluations[gradient] = result.evaluations
        execute(asked, tmp_path / gradient)  # continues what is there
    assert "surrogate" not in paths["exact"].read_text()
    result = Result.read(paths[DECLARED])
    assert result.surrogate == {"options": {"stages": SHORT}, "votes": 1}
    exact, short = evaluations.values()
    assert exact.nfe == short.nfe == exact.searched_nfe == 3 * (2 + 2 + 3)
    assert short.searched_nfe == 1 + 2
    assert exact.gradient == short.gradient == [2, 2]
    assert result.conformance is not None
    assert result.conformance.gradient is not None
    assert all(c is not None and c < 0.999 for c in result.conformance.gradient.cosine)


def test_what_was_attacked_instead_stands_beside_the_exact_row(tmp_path: Path) -> None:
    registry = entries(tmp_path, surrogate={"options": {"stages": SHORT}})
    names = (registry, "digits-linf", "mine", "eot")
    exact, instead = (
        resolve(*names, attack=attack, seed=0, device="cpu", overrides=Overrides())
        for attack in (None, DECLARED)
    )
    assert (exact.search.gradient, instead.search.gradient) == ("exact", DECLARED)
    assert exact.search.effort == instead.search.effort, "the standard attack, with its budget"
    paths = [job.path(tmp_path).relative_to(tmp_path) for job in (exact, instead)]
    assert [str(path) for path in paths] == [
        "digits-linf/mine/eot/standard/seed-0.json",
        f"digits-linf/mine/eot/{DECLARED}/seed-0.json",
    ]


def test_another_surrogate_is_another_request(tmp_path: Path) -> None:
    one = entries(tmp_path / "one", surrogate={"options": {"stages": SHORT}})
    two = entries(tmp_path / "two", surrogate={"options": {"stages": SHORT}, "votes": 2})
    held, asked = (job(registry, DECLARED).identity() for registry in (one, two))
    with pytest.raises(BadRequest, match=r"surrogate\.votes is 1 there, 2 asked"):
        refuse_other_request(asked, held, tmp_path)


def test_it_is_measured_beside_the_other_modes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "COUNTS", (1,))
    registry = entries(tmp_path, surrogate={"options": {"stages": SHORT}}, votes=1)
    findings, _ = check(registry.subject("mine", "digits-linf"), images=2)
    modes = {row.mode for row in findings.modes}
    assert modes == {"exact", "bpda", "declared-surrogate"}


def test_a_defense_that_declares_none_is_refused(tmp_path: Path) -> None:
    registry = entries(tmp_path)
    message = "gradient: declared-surrogate, but .*{}.yaml declares none for 'digits-linf'"
    with pytest.raises(BadRequest, match=message.format("mine")):
        job(registry, DECLARED)
    with pytest.raises(BadRequest, match=message.format("ddim")):
        job(registry, DECLARED, "ddim")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"surrogate": {"options": {"stage": SHORT}}}, "no option 'stage'. Did you mean 'stages'?"),
        ({"surrogate": {"options": {}}}, "surrogate.options: "),
        ({"surrogate": {"options": {"stages": SHORT}, "votes": 0}}, "surrogate.votes: "),
        ({"resize": 0}, "resize: input should be greater than or equal to 1"),
    ],
)
def test_an_entry_that_cannot_be_right(
    tmp_path: Path, setting: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadEntry) as error:
        entries(tmp_path, **setting).defense("mine")
    assert message in str(error.value)


def test_an_entry_names_the_size_that_its_purifier_takes(tmp_path: Path) -> None:
    """A network for 8 x 8 images behind a resize: 11 x 11 images come and go."""
    registry = entries(tmp_path, resize=8, votes=1)
    built = registry.subject("mine", "digits-linf").defense()
    assert isinstance(built.purifier, Resized)
    plain = entries(tmp_path / "plain", votes=1)
    inner = plain.subject("mine", "digits-linf").defense().purifier
    tape = Tape.make(0, "test", range(2))
    x = uniform(2, 1, 11, 11)

    def resized(images: Tensor, side: int) -> Tensor:
        return torch.nn.functional.interpolate(images, size=(side, side), mode="bilinear")

    with torch.no_grad():
        want = resized(inner(resized(x, 8), tape), 11)
        torch.testing.assert_close(built.purifier(x, tape), want)
    assert job(registry).identity()["options"]["resize"] == 8
