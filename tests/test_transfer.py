"""Transfer attacks search in the source and never call the victim."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from dbp_bench.attacks import make
from dbp_bench.attacks.pgd import PGD
from dbp_bench.attacks.transfer import Transfer
from dbp_bench.defense import Defense, Identity
from dbp_bench.entries.registry import Registry
from dbp_bench.errors import AttackFailed
from dbp_bench.evaluation import Group, attack
from dbp_bench.noise import FORWARD, Noise, Tape
from dbp_bench.result import Result
from dbp_bench.runs.execute import execute
from dbp_bench.runs.job import Overrides, resolve
from dbp_bench.threat import AttackerView, Evaluations, Linf, Setup
from toys import Linear, Made, normal, uniform

if TYPE_CHECKING:
    from conftest import Command

EPS = 0.05
WEIGHT = normal(1, 16, seed=5)[0]
TAPE = Tape.make(0, "toy", range(8))


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
        Transfer("toy", {"attack": "pgd", "steps": 4, "step_size": 0.5, "eot": 2}),
        group,
        Linf(EPS),
        frozenset({FORWARD}),
        seed=0,
        victim_draw=0,
        max_batch=64,
        sources={"toy": source},
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
            Transfer("toy", {"attack": "pgd", "steps": 1, "step_size": 1.0, "eot": 1}),
            batch(),
            Linf(EPS),
            frozenset(),
            seed=0,
            victim_draw=0,
            max_batch=8,
            sources={"toy": source},
        )


def test_a_source_that_the_attacker_does_not_have_is_refused() -> None:
    view = AttackerView(Defense(Identity(), Silent()), frozenset(), TAPE, TAPE, 8, sources={})
    with pytest.raises(AttackFailed, match="asks for the defense 'toy', which its `sources` do"):
        Transfer("toy")(view, batch().images, batch().labels, Linf(EPS))


SEARCH = {"attack": "pgd", "steps": 2, "step_size": 0.5, "eot": 3}


def test_its_declaration() -> None:
    made = make("transfer", {"source": "none", "search": SEARCH})
    assert isinstance(made, Transfer)
    assert made.sources == ("none",)
    # How many draws its search is averaged over, the source decides, not the victim.
    for hidden in (False, True):
        plain = Setup(hidden, sources={"none": False})
        assert made.evaluations(plain) == Evaluations(2, 0, exact=True)
        noisy = Setup(hidden, sources={"none": True})
        assert made.evaluations(noisy) == Evaluations(6, 0, exact=True)
    # It records every option of its search, and is the same when made of what it records.
    assert made.search == {"attack": "pgd", **asdict(PGD(2, 0.5, 3))}
    assert make("transfer", asdict(made)) == made


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({**SEARCH, "attack": "transfer"}, "transfer: attacks made of attacks are not put into"),
        ({**SEARCH, "gradient": "bpda"}, "pgd: gradient: is unknown"),
        ({"attack": "pgd", "steps": 0}, "pgd: steps: input should be greater than or equal to 1"),
    ],
)
def test_a_bad_search_is_refused(search: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make("transfer", {"source": "none", "search": search})
    assert "\n" not in str(caught.value)


def test_what_does_not_fit_its_source_is_refused() -> None:
    """A victim whose draws are known does not make the source deterministic."""
    made = make("transfer", {"source": "toy", "search": {"attack": "square"}})
    assert made.unfit(Setup(hidden=False, sources={"toy": True})) is None
    assert "not in l1" in str(made.unfit(Setup(hidden=False, norm="l1", sources={"toy": True})))


def test_a_run_of_it(tmp_path: Path) -> None:
    """The record names the source's weights and counts no query to the victim's networks."""
    asked = Overrides(
        {"source": "ddpm", "search": {"attack": "pgd", "steps": 2, "eot": 1}},
        examples=2,
        batch_size=2,
        draws=3,
    )
    job = resolve(
        Registry(),
        "digits-linf",
        "oneshot",
        "eot",
        attack="transfer",
        seed=0,
        device="cpu",
        overrides=asked,
    )
    path = execute(job, tmp_path)
    assert path == tmp_path / "digits-linf/oneshot/eot/transfer/seed-0.json"
    result = Result.read(path)
    assert result.evaluations.gradient == result.evaluations.forward == [0, 0]
    assert result.evaluations.searched_nfe == 0
    assert set(result.provenance.weights) == {"classifier", "denoiser", "ddpm.denoiser"}
    assert "source.ddpm" in result.provenance.entries
    assert result.effort["source"] == "ddpm"
    # It asks the victim for no gradient, so that a gradient of zero would say nothing.
    assert result.gradient is None
    assert result.zero_gradient is None


def test_an_unknown_source_is_refused(tmp_path: Path, command: "Command") -> None:
    asked = ["--defense", "oneshot", "--threat", "eot", "--attack", "transfer"]
    said = command("run", *asked, "--set", "source=ddpn", "--out", tmp_path / "out")
    assert said.code == 2
    assert "no defense 'ddpn'. Did you mean 'ddpm'" in said.err
    assert not (tmp_path / "out").exists()
