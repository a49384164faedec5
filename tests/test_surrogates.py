"""Set-ups of an entry beside its options: a surrogate that it declares, and another image size."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from dbp_bench.checks.gradients import check, differentiated, request
from dbp_bench.entries.registry import Registry
from dbp_bench.errors import BadEntry, BadRequest
from dbp_bench.noise import Tape
from dbp_bench.purifiers.gradual import Gradual
from dbp_bench.purifiers.resize import Resized
from dbp_bench.result import Result
from dbp_bench.runs.execute import execute
from dbp_bench.runs.job import Job, Overrides, identity_of, resolve
from own_entries import folder
from toys import uniform

DECLARED = {"gradient": "declared-surrogate"}
STAGES = [{"t_star": 30, "steps": 2, "times": 2}, {"t_star": 60, "steps": 3, "times": 1}]
SHORT = [{"t_star": 30, "steps": 1, "times": 1}, {"t_star": 60, "steps": 2, "times": 1}]
ENTRY = yaml.safe_load(
    """
title: Gradual
kind: defense
paper: https://arxiv.org/abs/2303.09051
factory: dbp_bench.purifiers.gradual:Gradual
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
    monkeypatch.setattr("dbp_bench.runs.provenance._git", lambda: (None, None))


def entries(path: Path, **setting: Any) -> Registry:
    """A registry with the defense `gradual` on the digits."""
    (own,) = ENTRY["settings"]
    own = {**own, "options": {**own["options"], "stages": STAGES}, **setting}
    return Registry([folder(path, defenses={"mine": {**ENTRY, "settings": [own]}})])


def job(registry: Registry, effort: dict[str, Any], defense: str = "mine") -> Job:
    overrides = Overrides({"steps": 1, "eot": 1, **effort}, draws=2, examples=4, batch_size=4)
    return resolve(
        registry, "digits-linf", defense, "eot", seed=0, device="cpu", overrides=overrides
    )


def test_what_is_attacked_is_the_surrogate_that_is_declared(tmp_path: Path) -> None:
    registry = entries(tmp_path, surrogate={"options": {"stages": SHORT}})
    defense, track = registry.defense("mine"), registry.track("digits-linf")
    judged = registry.build_defense(defense, track)
    searched = differentiated(registry, defense, track, judged, DECLARED)
    for made, stages, votes in ((judged, STAGES, 3), (searched, SHORT, 1)):
        assert isinstance(made.purifier, Gradual)
        assert made.purifier.stages == stages
        assert made.votes == votes
    assert isinstance(searched.purifier, Gradual)
    assert searched.purifier.eta == 1
    exact = differentiated(registry, defense, track, judged, {"gradient": "exact"})
    assert exact is judged


def test_a_run_records_it_and_nothing_where_none_is_used(tmp_path: Path) -> None:
    registry = entries(tmp_path, surrogate={"options": {"stages": SHORT}})
    paths, calls = {}, {}
    for gradient in ("exact", "declared-surrogate"):
        asked = job(registry, {"gradient": gradient})
        paths[gradient] = execute(asked, registry, tmp_path / gradient)
        result = Result.read(paths[gradient])
        assert identity_of(result) == asked.identity()
        assert result.options == {"eta": 1, "clamp_output": False, "stages": STAGES, "votes": 3}
        calls[gradient] = result.network_calls
        execute(asked, registry, tmp_path / gradient)  # continues what is there
    assert "surrogate" not in paths["exact"].read_text().replace("surrogate_steps", "")
    result = Result.read(paths["declared-surrogate"])
    assert result.surrogate == {"options": {"stages": SHORT}, "votes": 1}
    assert result.effort["gradient"] == "declared-surrogate"
    assert result.effort["surrogate_steps"] is None
    (exact, short) = calls.values()
    assert exact.per_purification == short.per_purification == 3 * (2 + 2 + 3)
    assert (exact.gradient, short.gradient) == (4 * 21, 4 * 3)
    assert result.gradient_check is not None
    assert all(c is not None and c < 0.999 for c in result.gradient_check.cosine)


def test_another_surrogate_is_another_request(tmp_path: Path) -> None:
    one = entries(tmp_path / "one", surrogate={"options": {"stages": SHORT}})
    two = entries(tmp_path / "two", surrogate={"options": {"stages": SHORT}, "votes": 2})
    out = tmp_path / "out"
    execute(job(one, DECLARED), one, out)
    with pytest.raises(BadRequest, match="surrogate is"):
        execute(job(two, DECLARED), two, out)


def test_it_is_measured_beside_the_other_modes(tmp_path: Path) -> None:
    registry = entries(tmp_path, surrogate={"options": {"stages": SHORT}}, votes=1)
    asked = request(registry, "mine", "digits-linf", images=2)
    findings = check(registry, asked)
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


def test_the_steps_of_a_surrogate_still_go_with_its_mode(tmp_path: Path) -> None:
    for effort in ({**DECLARED, "surrogate_steps": 3}, {"gradient": "surrogate"}):
        with pytest.raises(BadRequest, match="surrogate_steps: goes with gradient: surrogate"):
            job(entries(tmp_path), effort)


def test_an_entry_names_the_size_that_its_purifier_takes(tmp_path: Path) -> None:
    """A network for 8 x 8 images behind a resize: 11 x 11 images come and go."""
    registry = entries(tmp_path, resize=8, votes=1)
    built = registry.build_defense(registry.defense("mine"), registry.track("digits-linf"))
    assert isinstance(built.purifier, Resized)
    plain = entries(tmp_path / "plain", votes=1)
    inner = plain.build_defense(plain.defense("mine"), plain.track("digits-linf")).purifier
    tape = Tape.make(0, "test", range(2))
    x = uniform(2, 1, 11, 11)

    def resized(images: Tensor, side: int) -> Tensor:
        return torch.nn.functional.interpolate(images, size=(side, side), mode="bilinear")

    with torch.no_grad():
        want = resized(inner(resized(x, 8), tape), 11)
        torch.testing.assert_close(built.purifier(x, tape), want)
    assert job(registry, {}).options["resize"] == 8
