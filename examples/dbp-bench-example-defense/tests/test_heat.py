"""What an author would test: known answers of the purifier, and dbp-bench's own checks."""

import sys
from typing import Any

import pytest
import torch
from dbp_bench_example.heat import Heat, laplacian

from dbp_bench.checks.conformance import check_subject
from dbp_bench.entries.registry import Registry
from dbp_bench.noise import VICTIM, Tape


def test_the_laplacian_of_a_parabola_is_constant() -> None:
    x = torch.arange(6.0)
    images = (x**2).expand(1, 1, 6, 6)
    assert torch.equal(laplacian(images)[..., 1:-1], torch.full((1, 1, 6, 4), 2.0))


def test_without_noise_a_grey_image_stays() -> None:
    grey = torch.full((2, 1, 4, 4), 0.3)
    assert torch.allclose(Heat(0.0, 3, 0.25)(grey, Tape.make(0, VICTIM, range(2))), grey)


def test_heat_is_kept() -> None:
    """The border is repeated, so that nothing flows out: the mean stays."""
    images = 0.4 + 0.2 * torch.eye(6).expand(1, 1, 6, 6)
    out = Heat(0.0, 2, 0.2)(images, Tape.make(0, VICTIM, [0]))
    assert torch.allclose(out.mean(), images.mean())
    assert out.std() < images.std()


@pytest.mark.parametrize("wrong", [{"level": -1.0}, {"steps": 0}, {"rate": 0.3}])
def test_options_that_cannot_be_right(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Heat(**{"level": 0.1, "steps": 1, "rate": 0.1, **wrong})


def test_dbp_bench_finds_the_entry_and_all_checks_pass() -> None:
    registry = Registry(trust_code=True)
    assert "example-heat" in registry.defenses
    faults = dict(check_subject(registry.subject("example-heat", "digits-linf")))
    assert set(faults.values()) == {None}


def test_it_is_installed_not_found_by_chance() -> None:
    assert "site-packages" in str(sys.modules["dbp_bench_example.heat"].__file__)
