"""What published code does otherwise, as options: exactly so where they are set, and else not."""

from math import exp, log
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from closed_forms import F64, NoiseNet, gaussian
from dbp_bench.checks.conformance import check_batch, check_gradient
from dbp_bench.defense import Defense, Purifier
from dbp_bench.errors import BadEntry, NotConforming
from dbp_bench.noise import FORWARD, GUIDANCE, REVERSE, Noise, Site
from dbp_bench.purifiers.controls import OneShot
from dbp_bench.purifiers.ddpm import DDIM, DDPM, Posterior
from dbp_bench.purifiers.guided import GDMP, published_scale
from dbp_bench.purifiers.resize import Resized
from dbp_bench.purifiers.schedule import Schedule, predict
from dbp_bench.purifiers.vpsde import DiffPure
from toys import LoggedNoise, Small, continuous_signal, discrete_signal, images, tape

BETAS = np.linspace(1e-4, 2e-2, 1000)
ABAR = np.cumprod(1 - BETAS)
RAW = {"clip_x0": False, "clamp_output": False}
Draws = dict[tuple[Site, int], Tensor]


class Net(NoiseNet):
    """The exact denoiser, with a memory of what it was shown."""

    def __init__(self, signal: Any = discrete_signal) -> None:
        super().__init__(gaussian(0.2, 0.09), signal)
        self.states: list[Tensor] = []

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        self.states.append(z)
        return super().forward(z, t)


class Learned(nn.Module):
    """Noise, and a share of the variance that is `share` everywhere or, if None, made from z."""

    def __init__(self, share: float | None) -> None:
        super().__init__()
        self.net, self.share = Net(), share

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        share = torch.sin(3 * z) if self.share is None else torch.full_like(z, self.share)
        return torch.cat([self.net(z, t), share], 1)


def run(purifier: Purifier, x: Tensor | None = None) -> tuple[Tensor, Draws]:
    """The purified images in [-1, 1] space, and every draw by its address."""
    noise = LoggedNoise(tape())
    out = 2 * purifier(images() if x is None else x, noise) - 1
    return out, {(site, step): n for site, step, n in noise.log}


# ----------------------------------------------------------------------------------- DDPM and DDIM


@pytest.mark.parametrize(("published", "steps"), [(1000, 100), (500, 50), (100, 10), (50, 5)])
@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_the_grid_published_with_addt(name: str, published: int, steps: int) -> None:
    """S steps of 1000, of which the slice from round(0.9 S) - 1 on is called: steps + 1."""
    net, x = Net(), images()
    options: dict[str, Any] = {**RAW, "t_star": 100, "steps": steps, "published_grid": True}
    make: Any = DDIM
    if name == "ddpm":
        make, options["variance"] = DDPM, "large"
    _, drawn = run(make(net, **options))
    whole = list(range(0, 1000, 1000 // published))[::-1]
    assert net.seen == whole[round((1 - 0.1) * len(whole)) - 1 :]
    assert len(net.seen) == steps + 1
    a = ABAR[100]
    assert a**0.5 == pytest.approx(0.946, abs=5e-4)
    assert (1 - a) ** 0.5 == pytest.approx(0.324, abs=5e-4)
    want = a**0.5 * (2 * x - 1) + (1 - a) ** 0.5 * drawn[FORWARD, 0]
    torch.testing.assert_close(net.states[0], want, rtol=1e-12, atol=1e-12)
    if name == "ddpm":
        assert set(drawn) == {(FORWARD, 0), *((REVERSE, i) for i in range(steps))}


def test_a_step_of_the_published_ddpm() -> None:
    """From step 100 to step 90 with the strided beta as variance; the last, at 0, is the image."""
    net = Net()
    options: dict[str, Any] = {**RAW, "t_star": 100, "steps": 10, "variance": "large"}
    options["published_grid"] = True
    out, drawn = run(DDPM(net, **options))
    a, b = ABAR[100], ABAR[90]
    beta = 1 - a / b
    z, after = net.states[:2]
    eps = net(z, torch.full((3,), 100.0, dtype=F64))
    mean = (z - beta / (1 - a) ** 0.5 * eps) / (1 - beta) ** 0.5
    torch.testing.assert_close(after, mean + beta**0.5 * drawn[REVERSE, 0], rtol=1e-9, atol=1e-9)
    z = net.states[10]
    eps = net(z, torch.zeros(3, dtype=F64))
    want = (z - (1 - ABAR[0]) ** 0.5 * eps) / ABAR[0] ** 0.5
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)


def test_ddim_keeps_the_networks_own_noise_on_request() -> None:
    net = Net()
    big = nn.Module()
    big.forward = lambda z, t: 5 * net(z, t)
    options: dict[str, Any] = {"t_star": 100, "steps": 2, "clip_x0": True, "clamp_output": False}
    run(DDIM(big, **options, consistent_noise=False))
    z, after = net.states[:2]
    eps = big(z, torch.full((3,), 99.0, dtype=F64))
    a, b = ABAR[99], ABAR[49]
    x0 = (z - (1 - a) ** 0.5 * eps) / a**0.5
    assert float(x0.abs().max()) > 1.1, "something is clipped"
    want = b**0.5 * x0.clamp(-1, 1) + (1 - b) ** 0.5 * eps
    torch.testing.assert_close(after, want, rtol=1e-12, atol=1e-12)
    net.states.clear()
    run(DDIM(big, **options))
    assert float((net.states[1] - want).abs().max()) > 0.01


@pytest.mark.parametrize(("share", "variance"), [(-1.0, "small"), (1.0, "large")])
def test_the_bounds_of_a_learned_variance(share: float, variance: str) -> None:
    options: dict[str, Any] = {**RAW, "t_star": 60, "steps": 6}
    want, _ = run(DDPM(Net(), variance=variance, **options))  # type: ignore[arg-type]
    got, _ = run(DDPM(Learned(share), variance="learned", **options))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_a_learned_variance_is_in_between_on_a_log_scale() -> None:
    law = Posterior.between(60, 50, "learned")
    small = Posterior.between(60, 50, "small").sigma ** 2
    large = Posterior.between(60, 50, "large").sigma ** 2
    share = torch.tensor([-1.0, 0.0, 0.5, 1.0], dtype=F64)
    want = [exp((1 - v) * log(small) + v * log(large)) for v in (0, 0.5, 0.75, 1)]
    got = law.deviation(share)
    assert isinstance(got, Tensor)
    assert got.square().tolist() == pytest.approx(want)


def test_a_learned_variance_needs_a_network_that_says_it() -> None:
    with pytest.raises(BadEntry, match="variance: learned, but the denoiser predicts none"):
        run(DDPM(Net(), t_star=60, steps=6, variance="learned", **RAW))


def test_channels_of_variance_are_dropped_where_none_is_asked_for() -> None:
    options: dict[str, Any] = {**RAW, "t_star": 60, "steps": 6}
    want, _ = run(DDIM(Net(), **options))
    got, _ = run(DDIM(Learned(None), **options))
    torch.testing.assert_close(got, want)
    want, _ = run(OneShot(Net(), t_star=60, clamp_output=False))
    got, _ = run(OneShot(Learned(None), t_star=60, clamp_output=False))
    torch.testing.assert_close(got, want)
    odd = nn.Conv2d(1, 3, 1).double()
    with pytest.raises(BadEntry, match="the denoiser gives 3 channels for 1"):
        predict(lambda z, _: odd(z), images(), torch.zeros(3))


# ---------------------------------------------------------------------------------------- DiffPure


@pytest.mark.parametrize("t_star", [75, 150])
def test_the_published_grid_of_diffpure(t_star: int) -> None:
    """Times t*, t* - 0.001, ..., 0.001, told to the network as 999 t, or as the integer 1000 t."""
    labels = {
        "step": [t - 1.0 for t in range(t_star, 0, -1)],
        "score-sde": [999 * t / 1000 for t in range(t_star, 0, -1)],
        "adm": [float(t) for t in range(t_star, 0, -1)],
    }
    for label, want in labels.items():
        net = Net()
        options = {"t_star": t_star, "steps": t_star, "clamp_output": False}
        run(DiffPure(net, **options, label=label))  # type: ignore[arg-type]
        assert net.seen == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("solver", ["sde", "ode"])
def test_the_last_step_of_the_published_diffpure(solver: str) -> None:
    """It ends at 1e-5, so it is 9.9e-4 long, and the SDE's has noise like all others."""
    net = Net(continuous_signal)
    options: dict[str, Any] = {"t_star": 3, "steps": 3, "clamp_output": False, "t_end": 1e-5}
    if solver == "sde":
        out, drawn = run(DiffPure(net, **options, last_noise=True))
        assert (REVERSE, 2) in drawn
    else:
        out, drawn = run(DiffPure(net, **options, ode=True))
        assert set(drawn) == {(FORWARD, 0)}
    z, t = net.states[2], 0.001
    dt, beta = 0.001 - 1e-5, 0.1 + 19.9 * t
    spread = 1 - exp(-0.5 * 19.9 * t * t - 0.1 * t)
    score = -net(z, torch.zeros(3, dtype=F64)) / spread**0.5
    if solver == "sde":
        fresh = drawn[REVERSE, 2]
        want = z - dt * (-0.5 * beta * z - beta * score) + (beta * dt) ** 0.5 * fresh
    else:
        want = z - dt * (-0.5 * beta * z - 0.5 * beta * score)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)


def test_the_forward_noise_of_the_continuous_process() -> None:
    """ADDT's scripts begin at t = 0.101: mean 0.9457, deviation 0.3250."""
    net, x = Net(continuous_signal), images()
    options: dict[str, Any] = {"t_star": 101, "steps": 101, "clamp_output": False}
    _, drawn = run(DiffPure(net, **options, forward="continuous", label="score-sde"))
    want = 0.9457 * (2 * x - 1) + 0.3250 * drawn[FORWARD, 0]
    torch.testing.assert_close(net.states[0], want, rtol=0, atol=3e-4)
    assert len(net.seen) == 101
    assert net.seen[0] == pytest.approx(999 * 0.101)
    assert net.seen[-1] == pytest.approx(0.999)
    assert (REVERSE, 100) not in drawn, "the last step returns its mean"


@pytest.mark.parametrize("t_end", [-1e-5, 0.01, 1.0])
def test_an_end_after_the_last_step_begins_is_refused(t_end: float) -> None:
    for ode in (False, True):
        with pytest.raises(BadEntry, match=r"t_end: .* is not in 0 \.\.\. 0\.01"):
            DiffPure(Net(), t_star=100, steps=10, clamp_output=True, t_end=t_end, ode=ode)


def test_the_ode_has_no_last_noise() -> None:
    with pytest.raises(BadEntry, match="last_noise: the ODE adds no noise"):
        DiffPure(Net(), t_star=100, steps=10, clamp_output=True, ode=True, last_noise=True)


# -------------------------------------------------------------------------------------------- GDMP

GUIDED: dict[str, Any] = {
    **RAW,
    "distance": "mse",
    "t_star": 36,
    "steps": 36,
    "iterations": 1,
    "scale": 30.0,
    "noisy_target": True,
    "variance": "large",
}


def gdmp(net: nn.Module, **changes: Any) -> GDMP:
    return GDMP(net, **{**GUIDED, **changes})


def test_the_published_strength_of_the_guidance() -> None:
    """At index 35 it pulls z by 0.19 of the distance, of one image; by a hundredth, of 100."""
    scale = published_scale(60000, 8)
    assert scale == 2868750
    pull = 2 * BETAS[35] * scale * ((1 - ABAR[35]) / ABAR[35]) ** 0.5 / 3072
    assert pull == pytest.approx(0.19, abs=0.005)
    assert published_scale(1000, 4) == 95625


def test_the_forward_noise_of_gdmp_is_one_level_ahead_on_request() -> None:
    """On CIFAR-10: noise to index 36, then steps 35 ... 0."""
    net, x = Net(), images()
    _, drawn = run(gdmp(net, noise_ahead=True))
    want = ABAR[36] ** 0.5 * (2 * x - 1) + (1 - ABAR[36]) ** 0.5 * drawn[FORWARD, 0]
    torch.testing.assert_close(net.states[0], want, rtol=1e-12, atol=1e-12)
    assert net.seen == list(range(35, -1, -1))


def test_the_last_step_of_gdmp_is_guided_on_request() -> None:
    """With the posterior's variance of index 1 in place of that of index 0, and without noise."""
    net, x = Net(), images()
    out, drawn = run(gdmp(net, guide_last=True, steps=36))
    z = net.states[35]
    x0 = (z - (1 - ABAR[0]) ** 0.5 * net(z, torch.zeros(3, dtype=F64))) / ABAR[0] ** 0.5
    variance = BETAS[1] * (1 - ABAR[0]) / (1 - ABAR[1])
    target = ABAR[0] ** 0.5 * (2 * x - 1) + (1 - ABAR[0]) ** 0.5 * drawn[GUIDANCE, 35]
    s = 30.0 * ((1 - ABAR[0]) / ABAR[0]) ** 0.5
    want = x0 - variance * s * 2 * (z - target) / 16
    torch.testing.assert_close(out, want, rtol=1e-10, atol=1e-10)
    assert (REVERSE, 35) not in drawn
    assert float((out - x0).abs().max()) > 1e-7


def test_a_batch_mean_divides_the_guidance_by_the_batch_and_does_not_conform() -> None:
    x = images()
    whole, _ = run(gdmp(Net(), batch_mean=True), x)
    third, _ = run(gdmp(Net(), scale=10.0), x)
    torch.testing.assert_close(whole, third, rtol=1e-10, atol=1e-10)
    free = Defense(gdmp(Net(), scale=300.0), Small().double())
    check_batch(free, x)
    coupled = Defense(gdmp(Net(), scale=300.0, batch_mean=True), Small().double())
    with pytest.raises(NotConforming, match="Look for a sum or a mean over the batch"):
        check_batch(coupled, x)


@pytest.mark.parametrize("share", [None, 1.0])
def test_gdmp_of_imagenet(share: float | None) -> None:
    """45 of 250 levels, a learned variance, the target the input as it is; every step guided."""
    net, x = Learned(share), images()
    options: dict[str, Any] = {"t_star": 45, "steps": 45, "respaced": 250, "variance": "learned"}
    options |= {"noisy_target": False, "scale_target": False, "guide_last": True}
    out, drawn = run(gdmp(net, **options))
    seen, states = list(net.net.seen), list(net.net.states)
    kept = [round(i * 999 / 249) for i in range(45)]
    assert kept[44] == 177
    assert seen == kept[::-1]
    sigma = ((1 - ABAR[177]) / ABAR[177]) ** 0.5
    assert sigma == pytest.approx(0.6275, abs=5e-5)
    want = ABAR[177] ** 0.5 * (2 * x - 1) + (1 - ABAR[177]) ** 0.5 * drawn[FORWARD, 0]
    torch.testing.assert_close(states[0], want, rtol=1e-12, atol=1e-12)
    assert set(drawn) == {(FORWARD, 0), *((REVERSE, i) for i in range(44))}
    for i, after in ((0, states[1]), (44, out)):
        z, index = states[i], kept[44 - i]
        a, b = ABAR[index], ABAR[kept[43 - i]] if i < 44 else 1.0
        beta = 1 - a / b
        eps, v = net(z, torch.full((3,), float(index), dtype=F64)).chunk(2, 1)
        x0 = (z - (1 - a) ** 0.5 * eps) / a**0.5
        mean = b**0.5 * beta / (1 - a) * x0 + (a / b) ** 0.5 * (1 - b) / (1 - a) * z
        low = beta * (1 - b) / (1 - a)
        if i == 44:  # in place of a posterior variance of 0, that of the step before
            c = ABAR[kept[1]]
            low = (1 - c / a) * (1 - a) / (1 - c)
        variance = torch.exp((v + 1) / 2 * log(beta) + (1 - v) / 2 * log(low))
        s = 30.0 * ((1 - a) / a) ** 0.5
        step = mean - variance * s * 2 * (z - (2 * x - 1)) / 16
        if i < 44:
            step = step + variance**0.5 * drawn[REVERSE, i]
        torch.testing.assert_close(after, step, rtol=1e-10, atol=1e-10)


def test_respaced_levels() -> None:
    """The integer steps of guided-diffusion's `timestep_respacing` of one section."""
    for count in (2, 25, 100, 250, 1000):
        levels = Schedule().respaced(count)
        stride, at, kept = 999 / (count - 1), 0.0, []
        for _ in range(count):
            kept.append(round(at))
            at += stride
        assert levels == (0, *(t + 1 for t in kept))
        assert levels[-1] == 1000
    for count in (1, 1001):
        with pytest.raises(BadEntry, match=f"respaced: {count} is not in 2"):
            Schedule().respaced(count)


@pytest.mark.parametrize(
    "changes",
    [
        {"noise_ahead": True, "guide_last": True},
        {"respaced": 250, "variance": "learned", "noisy_target": False, "scale_target": False},
        {
            "respaced": 250,
            "variance": "learned",
            "guide_last": True,
            "distance": "ssim",
            "window": 3,
        },
    ],
)
def test_the_gradient_is_exact_with_every_option(changes: dict[str, Any]) -> None:
    purifier = gdmp(Learned(None), **{"t_star": 20, "steps": 3, "iterations": 2, **changes})
    check_gradient(Defense(purifier, Small().double()), images())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guide_last": True, "variance": "small"}, "guide_last: makes no difference"),
        ({"guide_last": True, "steps": 1}, "needs two steps"),
        ({"scale_target": False}, "scale_target: false goes with noisy_target: false"),
        ({"respaced": 20}, "t_star: 36 is not in 1 ... 20"),
        ({"t_star": 1000, "noise_ahead": True}, r"t_star: 1000 has no level above it"),
    ],
)
def test_options_of_gdmp_that_cannot_be_right(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadEntry, match=message):
        gdmp(Net(), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 7, "published_grid": True}, "steps: 7 does not divide t_star = 100"),
        ({"t_star": 1000, "published_grid": True}, "t_star: 1000 has no level above it"),
        ({"clip_x0": False, "consistent_noise": False}, "makes no difference without clip_x0"),
    ],
)
def test_options_of_ddim_that_cannot_be_right(changes: dict[str, Any], message: str) -> None:
    options = {"t_star": 100, "steps": 10, "clip_x0": True, "clamp_output": True, **changes}
    with pytest.raises(BadEntry, match=message):
        DDIM(Net(), **options)


# ------------------------------------------------------------------------------------------ resize


def test_a_purifier_at_another_size() -> None:
    """Bilinear, pixel centres aligned: up, purify, down."""
    seen: list[Tensor] = []

    class Shift:
        sites = frozenset({FORWARD})
        clamp_output = False

        def __call__(self, images: Tensor, noise: Noise) -> Tensor:
            seen.append(images)
            return images + noise.normal(FORWARD, 0, images)

    x = images(size=7)
    purifier = Resized(Shift(), 8)
    assert purifier.sites == {FORWARD}
    assert purifier.clamp_output is False
    got = purifier(x, tape())
    # The first of 8 pixels across 7 is centred at 0.4375 - 0.5 < 0: the first pixel's own value.
    assert seen[0].shape == (3, 1, 8, 8)
    torch.testing.assert_close(seen[0][..., 0, 0], x[..., 0, 0])
    # The second, at 7 / 8 * 1.5 - 0.5 = 0.8125, between the first and the second.
    row = 0.1875 * x[..., 0, 0] + 0.8125 * x[..., 0, 1]
    torch.testing.assert_close(seen[0][..., 0, 1], row)
    noisy = seen[0] + tape().normal(FORWARD, 0, seen[0])
    want = F.interpolate(noisy, size=(7, 7), mode="bilinear", align_corners=False)
    torch.testing.assert_close(got, want)
    check_gradient(Defense(purifier, Small().double()), x)
