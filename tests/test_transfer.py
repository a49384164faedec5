"""Transfer attacks search in the source and never call the victim."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from dbp_bench.passes import Passes, Setup
from pydantic import ValidationError
from torch import Tensor, nn

from dbp_bench.attacks import build
from dbp_bench.attacks.pgd import PGD
from dbp_bench.attacks.transfer import Transfer
from dbp_bench.defense import Defense, Identity
from dbp_bench.entries.registry import EFFORTS
from dbp_bench.errors import AttackFailed
from dbp_bench.evaluate import Group, attack
from dbp_bench.noise import FORWARD, Noise
from dbp_bench.threat import Linf
from toys import Linear, Made, normal, uniform

if TYPE_CHECKING:
    from conftest import Command

EPS = 0.05
WEIGHT = normal(1, 16, seed=5)[0]


class Silent(nn.Module):
    """A victim that must not be called."""

    def forward(self, images: Tensor) -> Tensor:
        raise AssertionError("the victim was called")


def batch(n: int = 8) -> Group:
    return Group(0.25 + 0.5 * uniform(n, 1, 4, 4), torch.arange(n) % 2, range(n))


@pytest.mark.parametrize("noisy", [False, True])
def test_the_worst_image_of_the_source_is_found_without_the_victim(noisy: bool) -> None:
    """For a linear source: every pixel by eps against the label, whatever its noise."""

    def static(images: Tensor, noise: Noise) -> Tensor:
        return images + 0.1 * noise.normal(FORWARD, 0, images)

    source = Defense(Made(static) if noisy else Identity(), Linear(WEIGHT))
    victim = Defense(Made(static), Silent())
    group = batch()
    out = attack(
        victim,
        Transfer(source, PGD(4, 0.5, 2)),
        group,
        Linf(EPS),
        frozenset({FORWARD}),
        seed=0,
        victim_draw=0,
        max_batch=64,
    )
    sign = (1 - 2 * group.labels).view(-1, 1, 1, 1)
    want = group.images + EPS * sign * WEIGHT.sign().view(1, 1, 4, 4)
    torch.testing.assert_close(out.images, want, atol=1e-6, rtol=0)
    assert not out.gradient.any()
    assert not out.forward.any()


def test_a_source_that_masks_its_gradient_is_refused() -> None:
    source = Defense(Made(lambda images, noise: images * 0, frozenset()), Linear(WEIGHT))
    with pytest.raises(AttackFailed, match="source is zero"):
        attack(
            Defense(Identity(), Silent()),
            Transfer(source, PGD(1, 1.0, 1)),
            batch(),
            Linf(EPS),
            frozenset(),
            seed=0,
            victim_draw=0,
            max_batch=8,
        )


SEARCH = {
    "attack": "pgd",
    "steps": 2,
    "step_size": 0.5,
    "eot": 3,
    "loss": "ce",
    "random_start": False,
    "restarts": 1,
}


def test_its_declaration() -> None:
    effort = EFFORTS["transfer"].model_validate({"source": "none", "search": SEARCH})
    assert effort.passes(Setup(hidden=False)) == Passes(2, 0, exact=True)
    assert effort.passes(Setup(hidden=True)) == Passes(6, 0, exact=True)
    source = Defense(Identity(), Silent())
    assert build("transfer", effort.model_dump(), source) == Transfer(source, PGD(2, 0.5, 3))
    with pytest.raises(ValueError, match="needs the defense"):
        build("transfer", effort.model_dump())


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({**SEARCH, "attack": "transfer"}, "no attack 'transfer'"),
        ({**SEARCH, "gradient": "bpda"}, "pgd: gradient: is the same for all"),
        ({"attack": "pgd", "steps": 2}, "pgd: step_size: is missing"),
    ],
)
def test_a_bad_search_is_refused(search: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        EFFORTS["transfer"].model_validate({"source": "none", "search": search})
    assert message in str(caught.value)


ENTRY = """\
title: From a defense of choice
knows: none
attack: transfer
effort:
  source: {source}
  search:
    {{attack: pgd, steps: 2, step_size: 0.5, eot: 1, loss: ce, random_start: false, restarts: 1}}
draws: 3
eps: null
protocol: false
"""


def entries(folder: Path, source: str) -> Path:
    (folder / "attacks").mkdir(parents=True)
    (folder / "attacks" / "moved.yaml").write_text(ENTRY.format(source=source))
    return folder


def test_from_the_command_line(tmp_path: Path, command: "Command") -> None:
    """The record names the source's weights and counts no query to the victim's networks."""
    common = ["--defense", "oneshot", "--threat", "moved", "--examples", "2", "--batch-size", "2"]
    mine = entries(tmp_path / "mine", "ddpm")
    said = command("run", "--entries", mine, *common, "--out", tmp_path / "out")
    assert said.code == 0, said.err
    (path,) = (tmp_path / "out").glob("*/*/*/seed-0.json")
    record = json.loads(path.read_text())
    assert record["network_calls"]["gradient"] == 0
    assert set(record["provenance"]["weights"]) == {"classifier", "denoiser", "source.denoiser"}
    assert "source" in record["provenance"]["entries"]
    assert record["effort"]["source"] == "ddpm"


def test_an_unknown_source_is_refused(tmp_path: Path, command: "Command") -> None:
    mine = entries(tmp_path / "mine", "ddpn")
    out = ["--out", tmp_path / "out"]
    said = command("run", "--entries", mine, "--defense", "oneshot", "--threat", "moved", *out)
    assert said.code != 0
    assert "no defense 'ddpn'. Did you mean 'ddpm'" in said.err
