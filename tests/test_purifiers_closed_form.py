"""Every sampler tends to the exact answer, at its order, where the exact denoiser is known.

Nothing here is sampled. The ODEs are compared with a fourth-order solution of their own, on a
mixture of Gaussians; the chains with noise are affine on Gaussian data, so that their mean and
variance are computed exactly and compared with those of their continuous limit.
"""

from collections.abc import Callable
from functools import cache
from math import exp, log, log2
from typing import Any

import pytest
import torch
from torch import Tensor

from closed_forms import (
    F64,
    ImageNet,
    Mixture,
    NoiseNet,
    State,
    gaussian,
    moments,
    orders,
    runge_kutta,
)
from dbp_bench import memory
from dbp_bench.defense import Purifier
from dbp_bench.noise import FORWARD, Tape
from dbp_bench.purifiers.ddpm import DDIM
from dbp_bench.purifiers.edm import EDM, Solver
from dbp_bench.purifiers.gradual import Gradual
from dbp_bench.purifiers.guided import GDMP
from dbp_bench.purifiers.vpsde import DiffPure
from toys import continuous_signal, discrete_signal, normal, sampler, uniform

MEAN, VARIANCE = 0.2, 0.09
DATA = gaussian(MEAN, VARIANCE)
LEVEL = 512
RAW: dict[str, Any] = {"clip_x0": False, "clamp_output": False}


def two_pixels(n: int = 4) -> Tensor:
    return uniform(n, 1, 1, 2, dtype=F64)


def mixture() -> Mixture:
    """Three Gaussians in the plane of two pixels, near enough to one another to be confused."""
    return Mixture(0.5 * normal(3, 1, 1, 2, seed=4, dtype=F64), 0.04)


def tape(n: int = 4) -> Tape:
    return Tape.make(0, "test", range(n))


def distance(purifier: Purifier, x: Tensor, want: Tensor) -> float:
    return float((2 * purifier(x, tape(len(x))) - 1 - want).abs().max())


# ---------------------------------------------------------------------------- without new noise


def vp_slope(data: Mixture) -> Callable[[float, State], State]:
    """dz/dt of the probability-flow ODE of the VP-SDE (Song et al. 2021, equation 13)."""

    def slope(t: float, state: State) -> State:
        (z,) = state
        a, beta = continuous_signal(1000 * t), 0.1 + 19.9 * t
        score = (a**0.5 * data.expected(z, a, 1 - a) - z) / (1 - a)
        return (-0.5 * beta * z - 0.5 * beta * score,)

    return slope


def test_the_ode_of_diffpure_has_order_one() -> None:
    data, x = mixture(), two_pixels()
    t, a = LEVEL / 1000, continuous_signal(LEVEL)
    start = a**0.5 * (2 * x - 1) + (1 - a) ** 0.5 * tape().normal(FORWARD, 0, x)
    # The score is not defined at time 0; what is left from 1e-6 on moves by less than 1e-6.
    (want,) = runge_kutta(vp_slope(data), (start,), t, 1e-6, 300)

    def error(steps: int) -> float:
        net = NoiseNet(data, continuous_signal)
        purifier = DiffPure(
            net, t_star=LEVEL, steps=steps, clamp_output=False, forward="continuous", ode=True
        )
        return distance(purifier, x, want)

    assert orders(error, [128, 256, 512]) == pytest.approx([2, 2], abs=0.2)
    assert error(512) < 0.02 * float((want - start).abs().max())


def test_the_ode_of_diffpure_keeps_standard_scores_of_gaussian_data() -> None:
    """The exact flow in closed form, without a solver."""
    x, a = two_pixels(), continuous_signal(LEVEL)
    start = a**0.5 * (2 * x - 1) + (1 - a) ** 0.5 * tape().normal(FORWARD, 0, x)
    want = MEAN + VARIANCE**0.5 * (start - a**0.5 * MEAN) / (a * VARIANCE + 1 - a) ** 0.5

    def error(steps: int) -> float:
        net = NoiseNet(DATA, continuous_signal)
        purifier = DiffPure(
            net, t_star=LEVEL, steps=steps, clamp_output=False, forward="continuous", ode=True
        )
        return distance(purifier, x, want)

    assert orders(error, [128, 256, 512]) == pytest.approx([2, 2], abs=0.2)


def signal_slope(data: Mixture) -> Callable[[float, State], State]:
    """The same flow by the depth -log(signal), which the grids of integer levels follow."""

    def slope(depth: float, state: State) -> State:
        (z,), a = state, exp(-depth)
        score = (a**0.5 * data.expected(z, a, 1 - a) - z) / (1 - a)
        return (-0.5 * z - 0.5 * score,)

    return slope


@pytest.mark.parametrize("name", ["ddim", "gradual"])
def test_ddim_has_order_one(name: str) -> None:
    """Its limit is the probability flow in the logarithm of the signal, which its grid follows."""
    data, x = mixture(), two_pixels()
    top = -log(discrete_signal(LEVEL))
    start = discrete_signal(LEVEL) ** 0.5 * (2 * x - 1)
    start = start + (1 - discrete_signal(LEVEL)) ** 0.5 * tape().normal(FORWARD, 0, x)
    # The score is not defined at depth 0; what is left from 1e-6 on moves by less than 1e-6.
    (want,) = runge_kutta(signal_slope(data), (start,), top, 1e-6, 300)

    def error(steps: int) -> float:
        net = NoiseNet(data, discrete_signal)
        purifier: Purifier
        if name == "ddim":
            purifier = DDIM(net, t_star=LEVEL, steps=steps, **RAW)
        else:
            stages = [{"t_star": LEVEL, "steps": steps, "times": 1}]
            purifier = Gradual(net, stages=stages, eta=0.0, clamp_output=False)
        return distance(purifier, x, want)

    assert orders(error, [128, 256, 512]) == pytest.approx([2, 2], abs=0.2)


def after_half_way(name: str, steps: int, x: Tensor, data: Mixture) -> Tensor:
    """Where a sampler that begins at level 512 is at level 256."""
    purifier = sampler(name, NoiseNet(data, discrete_signal), t_star=512, steps=steps, **RAW)
    with memory.recording() as states:
        purifier(x, tape())
    (found,) = [state.reverse for state in states if state.level == 256]
    return found


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("dpm-solver", 2)])
def test_the_order_between_two_noise_levels(name: str, order: int) -> None:
    """The error at level 256 falls as steps^-1 and as steps^-2, the first of which is DDIM's."""
    data, x = mixture(), two_pixels()
    top, half = discrete_signal(512), discrete_signal(256)
    start = top**0.5 * (2 * x - 1) + (1 - top) ** 0.5 * tape().normal(FORWARD, 0, x)
    (want,) = runge_kutta(signal_slope(data), (start,), -log(top), -log(half), 100)

    def error(steps: int) -> float:
        return float((after_half_way(name, steps, x, data) - want).abs().max())

    exponents = [log2(ratio) for ratio in orders(error, [16, 32, 64])]
    assert exponents == pytest.approx([order] * 2, abs=0.05)


def test_dpm_solver_begins_and_ends_with_ddim() -> None:
    """Its first step, and all of it where there is one step alone."""
    data, x = mixture(), two_pixels()
    torch.testing.assert_close(
        after_half_way("dpm-solver", 2, x, data), after_half_way("ddim", 2, x, data)
    )
    one, other = (
        sampler(name, NoiseNet(data, discrete_signal), t_star=LEVEL, steps=1, **RAW)(x, tape())
        for name in ("dpm-solver", "ddim")
    )
    torch.testing.assert_close(one, other)


def test_two_steps_of_dpm_solver() -> None:
    """Lu et al. 2022, algorithm 2, lines 5 to 9, by hand; the last step is the prediction."""
    data, x = mixture(), two_pixels()
    net = NoiseNet(data, discrete_signal)
    with memory.recording() as states:
        sampler("dpm-solver", net, t_star=60, steps=3, **RAW)(x, tape())
    alpha = {t: discrete_signal(t) ** 0.5 for t in (60, 40, 20)}
    sigma = {t: (1 - discrete_signal(t)) ** 0.5 for t in alpha}
    lam = {t: log(alpha[t] / sigma[t]) for t in alpha}

    def predicted(z: Tensor, t: int) -> Tensor:
        eps = net(z, torch.full((4,), t - 1.0, dtype=F64))
        image: Tensor = (z - sigma[t] * eps) / alpha[t]
        return image

    z0 = alpha[60] * (2 * x - 1) + sigma[60] * tape().normal(FORWARD, 0, x)
    first = predicted(z0, 60)
    h1, h2 = lam[40] - lam[60], lam[20] - lam[40]
    z1 = sigma[40] / sigma[60] * z0 - alpha[40] * (exp(-h1) - 1) * first
    torch.testing.assert_close(states[0].reverse, z1, rtol=1e-10, atol=1e-10)
    second, r = predicted(z1, 40), h1 / h2
    image = (1 + 1 / (2 * r)) * second - 1 / (2 * r) * first
    z2 = sigma[20] / sigma[40] * z1 - alpha[20] * (exp(-h2) - 1) * image
    torch.testing.assert_close(states[1].reverse, z2, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(states[2].reverse, predicted(z2, 20), rtol=1e-10, atol=1e-10)


HIGH, LOW = 2.0, 0.1
KARRAS: dict[str, Any] = {"sigma_max": HIGH, "sigma_min": LOW, "rho": 7.0, "clamp_output": False}


@pytest.mark.parametrize(("solver", "shrinks"), [("euler", 2), ("heun", 4)])
@pytest.mark.parametrize("kind", ["mixture", "gaussian"])
def test_the_solvers_of_edm_have_their_orders(kind: str, solver: Solver, shrinks: int) -> None:
    """Down to the lowest level; from there the last step is the denoiser, in both."""
    data, x = (mixture() if kind == "mixture" else DATA), two_pixels()
    start = 2 * x - 1 + HIGH * tape().normal(FORWARD, 0, x)
    if kind == "mixture":

        def slope(sigma: float, state: State) -> State:
            (z,) = state
            return ((z - data.expected(z, 1.0, sigma**2)) / sigma,)

        (lowest,) = runge_kutta(slope, (start,), HIGH, LOW, 200)
    else:
        ratio = ((VARIANCE + LOW**2) / (VARIANCE + HIGH**2)) ** 0.5
        lowest = MEAN + ratio * (start - MEAN)
    want = data.expected(lowest, 1.0, LOW**2)

    def error(steps: int) -> float:
        net = ImageNet(data)
        return distance(EDM(net, steps=steps, solver=solver, **KARRAS), x, want)

    # The grid has one interval less than steps.
    counts = [33, 65, 129] if solver == "euler" else [17, 33, 65]
    assert orders(error, counts) == pytest.approx([shrinks] * 2, rel=0.1)


# ------------------------------------------------------------------------------- with new noise


def worst(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """The largest error of the means, and of the variances."""
    mean, variance = ((a - b).abs().max() for a, b in zip(got, want, strict=True))
    return float(mean), float(variance)


def each_order(errors: Callable[[int], tuple[float, float]], steps: list[int]) -> list[list[float]]:
    found = cache(errors)
    return [orders(lambda k: found(k)[0], steps), orders(lambda k: found(k)[1], steps)]


def test_the_sde_of_diffpure_has_weak_order_one() -> None:
    """From z at level t*, mean and variance tend to those of the clean image's posterior."""
    width = 1.0  # at 0.09 the leading terms of the variance's error cancel
    x, a = two_pixels(1), continuous_signal(256)
    total = a * width + 1 - a
    gain = a**0.5 * width / total
    source = (2 * x - 1)[0]
    mean = MEAN + gain * a**0.5 * (source - MEAN)
    variance = torch.full_like(mean, width * (1 - a) / total + gain**2 * (1 - a))

    def errors(steps: int) -> tuple[float, float]:
        net = NoiseNet(gaussian(MEAN, width), continuous_signal)
        purifier = DiffPure(net, t_star=256, steps=steps, clamp_output=False, forward="continuous")
        return worst(moments(purifier, x), (mean, variance))

    for ratios in each_order(errors, [64, 128, 256]):
        assert ratios == pytest.approx([2, 2], abs=0.2)


def test_the_sde_of_edm_has_weak_order_one() -> None:
    """Its limit, as the steps grow: noise at the rate that S_churn says, along the exact flow."""
    x, churn, size = two_pixels(1), 3.0, 1.1
    ends = HIGH ** (1 / 7), LOW ** (1 / 7)

    def slope(u: float, state: State) -> State:
        away, variance = state
        root = ends[0] + u * (ends[1] - ends[0])
        sigma, falls = root**7, 7 * root**6 * (ends[1] - ends[0])
        rate = (sigma * falls - churn * sigma**2) / (VARIANCE + sigma**2)
        return rate * away, 2 * rate * variance + 2 * churn * (size * sigma) ** 2

    begin = (2 * x - 1)[0] - MEAN
    away, variance = runge_kutta(slope, (begin, torch.full_like(begin, HIGH**2)), 0.0, 1.0, 200)
    last = VARIANCE / (VARIANCE + LOW**2)
    want = MEAN + last * away, last**2 * variance

    def errors(steps: int) -> tuple[float, float]:
        noise: dict[str, Any] = {"s_churn": churn, "s_min": 0.0, "s_max": 100.0, "s_noise": size}
        purifier = EDM(ImageNet(DATA), steps=steps, solver="heun", **KARRAS, **noise)
        return worst(moments(purifier, x), want)

    for ratios in each_order(errors, [65, 129, 257]):
        assert ratios == pytest.approx([2, 2], abs=0.2)


def limit(
    mean: Tensor,
    variance: Tensor,
    source: Tensor,
    level: int,
    eta: float = 1.0,
    pull: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Mean and variance that a chain tends to as its steps grow, forward noise included.

    In the depth -log(signal), of which the chain takes differences h: the mean moves by
    ``h (z / 2 + (1 + eta^2) / 2 score - pull sqrt((1 - a) / a) 2 (z - sqrt(a) source))``, and the
    noise has variance ``eta^2 h``.
    """
    top = discrete_signal(level)

    def slope(depth: float, state: State) -> State:
        mean, variance = state
        a = exp(-depth)
        total, drift = a * VARIANCE + 1 - a, (1 + eta**2) / 2
        guide = 2 * pull * (max(1 - a, 0.0) / a) ** 0.5
        score = -(mean - a**0.5 * MEAN) / total
        moves = mean / 2 + drift * score - guide * (mean - a**0.5 * source)
        grows = 2 * variance * (0.5 - drift / total - guide) + eta**2
        return -moves, -grows

    begin = top**0.5 * mean, top * variance + 1 - top
    ended = runge_kutta(slope, begin, -log(top), 0.0, 200)
    return ended[0], ended[1]


def test_the_limit_without_guidance_is_the_posterior() -> None:
    x = (2 * two_pixels(1) - 1)[0]
    a = discrete_signal(LEVEL)
    total = a * VARIANCE + 1 - a
    gain = a**0.5 * VARIANCE / total
    mean, variance = limit(x, torch.zeros_like(x), x, LEVEL)
    torch.testing.assert_close(mean, MEAN + gain * a**0.5 * (x - MEAN), rtol=1e-6, atol=1e-6)
    want = torch.full_like(x, VARIANCE * (1 - a) / total + gain**2 * (1 - a))
    torch.testing.assert_close(variance, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_generalised_ddim_has_weak_order_one(eta: float) -> None:
    """Two stages: what the first leaves is where the second begins."""
    x = two_pixels(1)
    source = (2 * x - 1)[0]
    first = limit(source, torch.zeros_like(source), source, 256, eta)
    want = limit(*first, source, 384, eta)

    def errors(steps: int) -> tuple[float, float]:
        stages = [
            {"t_star": 256, "steps": steps, "times": 1},
            {"t_star": 384, "steps": steps, "times": 1},
        ]
        net = NoiseNet(DATA, discrete_signal)
        purifier = Gradual(net, stages=stages, eta=eta, clamp_output=False)
        return worst(moments(purifier, x), want)

    mean_ratios, variance_ratios = each_order(errors, [32, 64, 128])
    assert variance_ratios == pytest.approx([2, 2], abs=0.3)
    if eta == 1:  # the mean of a mean is the mean: exact at any number of steps
        assert errors(2)[0] < 1e-6
    else:
        assert mean_ratios == pytest.approx([2, 2], abs=0.3)


PULL = 0.7


def gdmp(steps: int, **changes: Any) -> GDMP:
    """Guided by the mean squared error of two pixels."""
    options = {"variance": "large", "noisy_target": False, "iterations": 2, "scale": 2 * PULL}
    net = NoiseNet(DATA, discrete_signal)
    return GDMP(net, distance="mse", t_star=256, steps=steps, **RAW, **{**options, **changes})


@pytest.mark.parametrize("variance", ["large", "small"])
def test_guided_sampling_has_weak_order_one(variance: str) -> None:
    x = two_pixels(1)
    source = (2 * x - 1)[0]
    first = limit(source, torch.zeros_like(source), source, 256, pull=PULL)
    want = limit(*first, source, 256, pull=PULL)
    free = limit(*limit(source, torch.zeros_like(source), source, 256), source, 256)
    assert worst(want, free)[0] > 0.05, "the guidance matters"

    def errors(steps: int) -> tuple[float, float]:
        return worst(moments(gdmp(steps, variance=variance), x), want)

    for ratios in each_order(errors, [32, 64, 128]):
        assert ratios == pytest.approx([2, 2], abs=0.3)


def test_guided_sampling_is_its_linear_recursion() -> None:
    """Mean and variance, step by step, in plain numbers."""
    x, steps = two_pixels(1), 8
    source = (2 * x - 1)[0]
    mean, variance = source, torch.zeros_like(source)
    for _ in range(2):
        a = discrete_signal(256)
        mean, variance = a**0.5 * mean, a * variance + 1 - a
        for i in range(steps):
            a, b = (discrete_signal(256 - 32 * k) for k in (i, i + 1))
            beta = 1 - a / b
            # The denoised image is an affine function of z: E[x | z] = gain z + rest.
            gain = a**0.5 * VARIANCE / (a * VARIANCE + 1 - a)
            rest = MEAN - gain * a**0.5 * MEAN
            of_image, of_z = b**0.5 * beta / (1 - a), (a / b) ** 0.5 * (1 - b) / (1 - a)
            slope, shift = of_image * gain + of_z, of_image * rest
            spread = 0.0
            if i < steps - 1:
                pull = beta * 2 * PULL * ((1 - a) / a) ** 0.5  # 2 (z - target) / 2 pixels
                slope, shift, spread = slope - pull, shift + pull * a**0.5 * source, beta
            mean, variance = slope * mean + shift, slope**2 * variance + spread
    got = moments(gdmp(steps), x)
    torch.testing.assert_close(got[0], mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got[1], variance, rtol=1e-12, atol=1e-12)
