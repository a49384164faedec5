"""EDM purification against the formulas of Karras et al. 2022, its grid and its published calls."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from closed_forms import F64, ImageNet, Mixture, gaussian
from dbp_bench.checks.conformance import CHECKS, fault
from dbp_bench.defense import Defense
from dbp_bench.errors import BadEntry
from dbp_bench.noise import FORWARD, REVERSE
from dbp_bench.purifiers.edm import EDM
from toys import LoggedNoise, Silent, Small, images, normal, tape

GRID: dict[str, Any] = {"sigma_max": 0.5, "sigma_min": 0.002, "rho": 7.0, "steps": 50}
ODE: dict[str, Any] = {**GRID, "solver": "heun", "clamp_output": True}
CHURN = {"s_churn": 6.0, "s_min": 0.01, "s_max": 0.46, "s_noise": 1.007}
SDE: dict[str, Any] = {**ODE, **CHURN}
"""As published with ADDT."""


def network() -> ImageNet:
    return ImageNet(gaussian(0.2, 0.09))


def karras(i: int, n: int = 50) -> float:
    """Equation 5."""
    high, low = 0.5 ** (1 / 7), 0.002 ** (1 / 7)
    return float((high + i / (n - 1) * (low - high)) ** 7)


def test_the_grid_is_that_of_equation_5() -> None:
    levels = EDM(network(), **ODE).levels()
    assert len(levels) == 51
    assert levels[:0:-1] == pytest.approx([karras(i) for i in range(50)], rel=1e-12)
    assert levels[50] == 0.5
    assert levels[0] == 0


@pytest.mark.parametrize(("solver", "calls"), [("heun", 99), ("euler", 50)])
@pytest.mark.parametrize("churned", [False, True])
def test_network_calls(solver: str, calls: int, churned: bool) -> None:
    net = network()
    options = {**(SDE if churned else ODE), "solver": solver}
    purifier = EDM(net, **options)
    defense = Defense(purifier, Small().double(), [net])
    defense.logits(images(), tape())
    assert defense.counter.images == 3 * calls
    assert len(net.seen) == calls


def test_noise_is_drawn_at_the_steps_within_the_limits_alone() -> None:
    """At 0.5, above S_max, and below S_min there is none: sites say so, and so do the addresses."""
    purifier, noise = EDM(network(), **SDE), LoggedNoise(tape())
    purifier(images(), noise)
    churned = [i for i in range(50) if 0.01 <= karras(i) <= 0.46]
    assert 0 not in churned
    assert 49 not in churned
    drawn = [(site, step) for site, step, _ in noise.log]
    assert drawn == [(FORWARD, 0), *((REVERSE, i) for i in churned)]
    assert purifier.sites == {FORWARD, REVERSE}
    noise = LoggedNoise(tape())
    quiet = EDM(network(), **ODE)
    quiet(images(), noise)
    assert [(site, step) for site, step, _ in noise.log] == [(FORWARD, 0)]
    assert quiet.sites == {FORWARD}


def test_the_noise_is_not_scaled_with_the_image() -> None:
    seen: list[Tensor] = []

    class First(nn.Module):
        def forward(self, z: Tensor, sigma: Tensor) -> Tensor:
            seen.append(z)
            return torch.zeros_like(z)

    x = images()
    EDM(First(), **ODE)(x, tape())
    want = 2 * x - 1 + 0.5 * tape().normal(FORWARD, 0, x)
    torch.testing.assert_close(seen[0], want, rtol=1e-12, atol=1e-12)


def test_two_steps_of_algorithm_2() -> None:
    """From 0.5 to the lowest level with Heun's correction, and from there to 0 without."""
    net = network()
    options = {**SDE, "steps": 2, "s_max": 1.0, "s_min": 0.0, "s_churn": 0.3, "clamp_output": False}
    noise = LoggedNoise(tape())
    x = images()
    got = 2 * EDM(net, **options)(x, noise) - 1
    drawn = {(site, step): n for site, step, n in noise.log}
    z = 2 * x - 1 + 0.5 * drawn[FORWARD, 0]
    for i, (t, after) in enumerate([(0.5, 0.002), (0.002, 0.0)]):
        gamma = min(0.3 / 2, 2**0.5 - 1)
        t_hat = t + gamma * t
        z_hat = z + (t_hat**2 - t**2) ** 0.5 * 1.007 * drawn[REVERSE, i]
        d = (z_hat - net(z_hat, torch.full((3,), t_hat, dtype=F64))) / t_hat
        z = z_hat + (after - t_hat) * d
        if after:
            d_after = (z - net(z, torch.full((3,), after, dtype=F64))) / after
            z = z_hat + (after - t_hat) * (d / 2 + d_after / 2)
    torch.testing.assert_close(got, z, rtol=1e-12, atol=1e-12)


def test_the_growth_of_a_level_has_a_limit() -> None:
    """Algorithm 2, line 4: sqrt(2) - 1 at most, however much is to be churned."""
    purifier = EDM(network(), **{**SDE, "s_churn": 1000.0})
    purifier(images(), Silent())
    net = purifier.denoiser
    assert isinstance(net, ImageNet)
    assert net.seen[4] == pytest.approx(2**0.5 * karras(2)), "0.462 is above S_max too"


def test_one_step_is_the_denoised_image() -> None:
    net, x = network(), images()
    got = EDM(net, **{**ODE, "steps": 1, "clamp_output": False})(x, tape())
    z = 2 * x - 1 + 0.5 * tape().normal(FORWARD, 0, x)
    want = (net(z, torch.full((3,), 0.5, dtype=F64)) + 1) / 2
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def curved() -> ImageNet:
    return ImageNet(Mixture(0.5 * normal(3, 1, 4, 4, seed=3, dtype=F64), 0.09))


@pytest.mark.parametrize("title", CHECKS)
@pytest.mark.parametrize("churned", [False, True])
def test_it_conforms(title: str, churned: bool) -> None:
    options = {**(SDE if churned else ODE), "steps": 5, "clamp_output": False}
    net = curved()
    purifier = EDM(net, **options)
    defense = Defense(purifier, Small().double(), [net])
    assert fault(CHECKS[title], defense, images()) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps: 0 is not in 1 ... 10,000"),
        ({"steps": 10**9}, "steps: 1000000000 is not in 1 ... 10,000"),
        ({"rho": 0.0}, "rho: 0.0 is not positive"),
        ({"sigma_min": 0.0}, "sigma_min: 0.0 is not above 0"),
        ({"sigma_min": 0.6}, "sigma_min: 0.6 is not above 0 and below sigma_max = 0.5"),
        ({"s_noise": 0.0}, "s_noise: 0.0 is not positive"),
        ({"s_churn": 0.0}, r"s_churn: 0.0 at levels 0.01 ... 0.46 adds noise at no step; leave"),
        ({"s_min": 0.47}, "adds noise at no step"),
    ],
)
def test_options_that_cannot_be_right(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadEntry, match=message):
        EDM(network(), **{**SDE, **changes})


def test_the_output_is_clamped_on_request() -> None:
    x = 4 * images() - 1.5
    assert float(EDM(network(), **SDE)(x, tape()).max()) <= 1
    assert float(EDM(network(), **{**SDE, "clamp_output": False})(x, tape()).max()) > 1
