"""Gradual noise scheduling: its published grids and calls, and the formulas it is made of."""

from typing import Any

import pytest
import torch
from torch import Tensor

from closed_forms import F64, Mixture, NoiseNet, gaussian
from dbp_bench.checks.conformance import CHECKS, fault
from dbp_bench.defense import Defense, Purifier
from dbp_bench.errors import BadEntry
from dbp_bench.noise import FORWARD, REVERSE, Noise, Site
from dbp_bench.purifiers.gradual import Gradual
from toys import LoggedNoise, Small, discrete_signal, images, normal, sampler, tape

Stages = list[dict[str, int]]


def stages(*rows: tuple[int, int, int]) -> Stages:
    return [{"t_star": t, "steps": steps, "times": times} for t, steps, times in rows]


PUBLISHED: dict[str, tuple[Stages, int]] = {
    "svhn": (stages((30, 30, 4), (50, 50, 2), (80, 80, 2)), 380),
    "surrogate": (stages((30, 1, 1), (50, 1, 1), (125, 5, 1)), 7),
}
"""Those of CIFAR-10 and ImageNet are entries: their calls are counted with the entries'."""


def network() -> NoiseNet:
    return NoiseNet(gaussian(0.2, 0.09), discrete_signal)


def made(rows: Stages, net: NoiseNet | None = None, eta: float = 1.0) -> Purifier:
    return Gradual(net or network(), stages=rows, eta=eta, clamp_output=False)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_calls_and_integer_grids(name: str) -> None:
    """The grid n-1, 2n-1, ..., T-1 of 0-based steps, downwards, once for each time."""
    rows, calls = PUBLISHED[name]
    net, noise = network(), LoggedNoise(tape())
    purifier = Gradual(net, stages=rows, eta=1.0, clamp_output=False)
    defense = Defense(purifier, Small().double(), [net])
    defense.logits(images(), noise)
    assert defense.counter.images == 3 * calls
    want = []
    for row in rows:
        n = row["t_star"] // row["steps"]
        want += row["times"] * [float(i) for i in range(row["t_star"] - 1, -1, -n)]
    assert net.seen == want
    runs = sum(row["times"] for row in rows)
    drawn = [(site, step) for site, step, _ in noise.log]
    assert [step for site, step in drawn if site == FORWARD] == list(range(runs))
    # The step to level 0, the last of each run, has no noise.
    assert len(drawn) == runs + calls - runs
    assert len(set(drawn)) == len(drawn)


def test_every_run_begins_at_the_level_of_its_noise() -> None:
    seen: list[Tensor] = []

    class Keep(NoiseNet):
        def forward(self, z: Tensor, t: Tensor) -> Tensor:
            seen.append(z)
            return super().forward(z, t)

    x = images()
    net = Keep(gaussian(0.2, 0.09), discrete_signal)
    Gradual(net, stages=stages((30, 30, 1)), eta=1.0, clamp_output=False)(x, tape())
    a = discrete_signal(30)
    want = a**0.5 * (2 * x - 1) + (1 - a) ** 0.5 * tape().normal(FORWARD, 0, x)
    torch.testing.assert_close(seen[0], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_one_step(eta: float) -> None:
    """Song et al. 2021, equations 12 and 16, from index 124 to index 99."""
    net, noise, x = network(), LoggedNoise(tape()), images()
    seen: list[Tensor] = []
    net.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    made(stages((125, 5, 1)), net, eta)(x, noise)
    a, b = discrete_signal(125), discrete_signal(100)
    e = net(seen[0], torch.full((3,), 124.0, dtype=F64))
    x0 = (seen[0] - (1 - a) ** 0.5 * e) / a**0.5
    c1 = eta * ((1 - a / b) * (1 - b) / (1 - a)) ** 0.5
    c2 = (1 - b - c1**2) ** 0.5
    want = b**0.5 * x0 + c2 * e
    if eta:
        want = want + c1 * next(n for site, step, n in noise.log if (site, step) == (REVERSE, 0))
    torch.testing.assert_close(seen[1], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("eta", "name"), [(1.0, "ddpm"), (0.0, "ddim")])
def test_eta_one_is_ddpm_with_the_small_variance_and_eta_zero_is_ddim(
    eta: float, name: str
) -> None:
    x = images()
    options: dict[str, Any] = {"t_star": 60, "steps": 12, "clip_x0": False, "clamp_output": False}
    if name == "ddpm":
        options["variance"] = "small"
    want = sampler(name, network(), **options)(x, tape())
    got = made(stages((60, 12, 1)), eta=eta)(x, tape())
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_each_stage_begins_where_the_last_one_ended() -> None:
    """Three runs in a row are three purifications with the numbering of their draws moved on."""
    x = images()

    class Later:
        def __init__(self, run: int, calls: int) -> None:
            self.run, self.calls = run, calls

        def normal(self, site: Site, step: int, like: Tensor) -> Tensor:
            return tape().normal(site, step + (self.run if site == FORWARD else self.calls), like)

    want = x
    for run, (calls, row) in enumerate([(0, (30, 5, 1)), (5, (30, 5, 1)), (10, (60, 4, 1))]):
        noise: Noise = Later(run, calls)
        want = made(stages(row))(want, noise)
    got = made(stages((30, 5, 2), (60, 4, 1)))(x, tape())
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_sites_are_where_there_is_noise() -> None:
    assert made(stages((30, 1, 1), (50, 1, 1))).sites == {FORWARD}
    assert made(stages((30, 1, 1), (50, 2, 1))).sites == {FORWARD, REVERSE}
    assert made(stages((30, 30, 1)), eta=0.0).sites == {FORWARD}


@pytest.mark.parametrize("title", CHECKS)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_it_conforms(title: str, eta: float) -> None:
    data = Mixture(0.5 * normal(3, 1, 4, 4, seed=3, dtype=F64), 0.09)
    net = NoiseNet(data, discrete_signal)
    purifier = made(stages((30, 3, 2), (60, 2, 1)), net, eta)
    assert fault(CHECKS[title], Defense(purifier, Small().double(), [net]), images()) is None


@pytest.mark.parametrize(
    ("rows", "eta", "message"),
    [
        ([], 1.0, "stages: there is none"),
        (stages((30, 4, 1)), 1.0, "number 1: steps: 4 does not divide t_star = 30"),
        (stages((30, 30, 1), (50, 50, 0)), 1.0, "number 2: times: 0 is not in 1 ... 10,000"),
        (stages((1500, 1, 1)), 1.0, r"t_star: 1500 is not in 1 ... 1000"),
        (stages((30, 31, 1)), 1.0, "steps: 31 is not in 1"),
        ([{"t_star": 30, "steps": 30}], 1.0, "number 1 is .* it takes t_star, steps, times"),
        (stages((30, 30, 1)), 1.5, r"eta: 1.5 is not in 0 ... 1"),
    ],
)
def test_options_that_cannot_be_right(rows: Stages, eta: float, message: str) -> None:
    with pytest.raises(BadEntry, match=message):
        made(rows, eta=eta)
