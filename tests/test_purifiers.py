"""Samplers against the closed forms of Gaussian data, the papers' formulas, and their own grids."""

from collections.abc import Callable
from math import exp
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from closed_forms import F64
from dbp_bench.defense import Defense, Purifier
from dbp_bench.errors import BadEntry
from dbp_bench.noise import FORWARD, GUIDANCE, REVERSE, Site, Tape
from dbp_bench.purifiers.controls import NoiseOnly, OneShot, Unpurified
from dbp_bench.purifiers.ddpm import DDPM, Posterior, Variance
from dbp_bench.purifiers.guided import GDMP, mse_gradient, ssim_gradient
from dbp_bench.purifiers.schedule import Schedule, times, to_diffusion, to_images
from toys import (
    SAMPLERS,
    Echo,
    GaussianDenoiser,
    Impulse,
    LoggedNoise,
    MixtureDenoiser,
    Recorder,
    Silent,
    continuous_signal,
    discrete_signal,
    images,
    normal,
    sampler,
    ssim,
    tape,
)

BETAS = np.linspace(1e-4, 2e-2, 1000)
ABAR = np.cumprod(1 - BETAS)


# -------------------------------------------------------------------------- levels and grids


@pytest.mark.parametrize(
    ("t", "signal", "sigma"),
    [
        (30, 0.98840, 0.1083),
        (36, 0.98398, 0.1276),
        (75, 0.93912, 0.2546),
        (100, 0.89702, 0.3388),
        (125, 0.84618, 0.4264),
        (150, 0.78832, 0.5182),
        (200, 0.65904, 0.7193),
        (500, 0.07859, 3.4241),
    ],
)
def test_noise_levels(t: int, signal: float, sigma: float) -> None:
    """Signal and noise-to-signal ratio of the linear schedule after t noising steps."""
    got = Schedule().signal()[t]
    assert got == pytest.approx(signal, abs=5e-6)
    assert ((1 - got) / got) ** 0.5 == pytest.approx(sigma, abs=5e-5)


@pytest.mark.parametrize(("sigma", "index"), [(0.25, 145), (0.5, 259), (0.75, 339), (1.0, 396)])
def test_levels_of_randomized_smoothing(sigma: float, index: int) -> None:
    """The first 0-based step whose noise, over the signal, reaches 2 sigma (Carlini et al.)."""
    table = Schedule().signal()[1:]
    assert next(i for i, a in enumerate(table) if ((1 - a) / a) ** 0.5 >= 2 * sigma) == index


def test_the_signal_is_that_of_numpy() -> None:
    table = Schedule().signal()
    assert table[0] == 1
    np.testing.assert_allclose(table[1:], ABAR, rtol=1e-13)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 7, 10, 20, 50, 100, "t*"])
def test_grids_are_integers_that_fall_from_t_star_to_zero(steps: int | str) -> None:
    for t_star in range(1, 201):
        count = t_star if isinstance(steps, str) else steps
        if count > t_star:
            continue
        pairs = Schedule().grid(t_star, count)
        assert len(pairs) == count
        assert pairs[0][0] == t_star
        assert pairs[-1][1] == 0
        assert all(type(t) is int and t > s for t, s in pairs)
        assert [s for _, s in pairs[:-1]] == [t for t, _ in pairs[1:]]
        # Evenly spaced: no level is further than half a level from where it should be.
        assert all(abs(t - t_star * (1 - i / count)) < 0.5 + 1e-9 for i, (t, _) in enumerate(pairs))


def test_the_network_step_is_one_below_the_level() -> None:
    like = torch.empty(3, 1, 2, 2, dtype=F64)
    assert times(100, like).tolist() == [99.0] * 3
    assert times(100, like).dtype == F64


def test_to_and_from_diffusion_space() -> None:
    x = images()
    torch.testing.assert_close(to_images(to_diffusion(x), clamp=False), x)
    assert to_diffusion(torch.tensor([0.0, 0.5, 1.0])).tolist() == [-1, 0, 1]
    z = torch.tensor([-1.5, 1.5])
    assert to_images(z, clamp=True).tolist() == [0, 1]
    assert to_images(z, clamp=False).tolist() == [-0.25, 1.25]


# ----------------------------------------------------------------------- calls of the network


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(("t_star", "steps"), [(1, 1), (36, 5), (75, 7), (100, 100), (150, 11)])
def test_levels_and_number_of_network_calls(name: str, t_star: int, steps: int) -> None:
    """First call at the level of the forward noise, calls counted, one at each grid point."""
    network = Recorder(GaussianDenoiser())
    purifier = sampler(name, network, t_star=t_star, steps=steps)
    defense = Defense(purifier, Echo(), [network])
    noise = LoggedNoise(tape())
    x = images()
    defense.logits(x, noise)

    rounds = 2 if name == "gdmp" else 1
    grid = [t - 1 for t, _ in Schedule().grid(t_star, steps)]
    assert network.levels == grid * rounds
    assert defense.counter.images == 3 * steps * rounds
    forward = [n for site, _, n in noise.log if site == FORWARD]
    assert len(forward) == rounds
    abar = ABAR[t_star - 1]
    want = abar**0.5 * (2 * x - 1) + (1 - abar) ** 0.5 * forward[0]
    torch.testing.assert_close(network.seen[0][0], want)


@pytest.mark.parametrize("name", SAMPLERS)
def test_noise_is_drawn_where_it_is_declared_and_never_twice(name: str) -> None:
    purifier = sampler(name, GaussianDenoiser(), steps=4)
    noise = LoggedNoise(tape())
    purifier(images(), noise)
    asked = [(site, step) for site, step, _ in noise.log]
    assert len(set(asked)) == len(asked)
    assert {site for site, _ in asked} == purifier.sites
    rounds = 2 if name == "gdmp" else 1
    counts = {site: sum(s == site for s, _ in asked) for site in purifier.sites}
    # Every step but the last draws; the last one returns its mean.
    per_site = {FORWARD: 1, REVERSE: 3, GUIDANCE: 3}
    assert counts == {site: rounds * per_site[site] for site in purifier.sites}


def test_the_guidance_site_is_declared_only_where_the_target_is_noised() -> None:
    quiet = sampler("gdmp", GaussianDenoiser(), noisy_target=False)
    assert quiet.sites == {FORWARD, REVERSE}
    noise = LoggedNoise(tape())
    quiet(images(), noise)
    assert {site for site, _, _ in noise.log} == quiet.sites
    assert sampler("gdmp", GaussianDenoiser()).sites == {FORWARD, REVERSE, GUIDANCE}


# -------------------------------------------------------------------------- the exact answers


def error_ratios(error: Callable[[int], float], steps: int) -> list[float]:
    """How much the error shrinks at each doubling of `steps`, twice."""
    errors = [error(steps * 2**i) for i in range(3)]
    return [errors[i] / errors[i + 1] for i in range(2)]


def out_of(purifier: Purifier, x: Tensor, noise: Any) -> Tensor:
    return 2 * purifier(x, noise) - 1


SOFT = {"clamp_output": False}
RAW = {"clip_x0": False, "clamp_output": False}


@pytest.mark.parametrize("variance", ["large", "small"])
def test_ddpm_samples_the_posterior_of_gaussian_data(variance: Variance) -> None:
    """Given z at level t*, mean and variance tend to those of the clean image's posterior."""
    denoiser = GaussianDenoiser()

    def errors(steps: int) -> tuple[float, float]:
        purifier = sampler("ddpm", denoiser, t_star=200, steps=steps, variance=variance, **RAW)
        x = images(1).expand(steps, -1, -1, -1)
        start = discrete_signal(200) ** 0.5 * (2 * x - 1)
        want, spread = denoiser.posterior(start, 200)
        quiet = out_of(purifier, x, Silent())
        # The purifier is linear: row i answers a unit impulse of noise at step i.
        response = out_of(purifier, x, Impulse(REVERSE)) - quiet
        variances = response.square().sum(0)
        return float((quiet - want).abs().max()), float((variances - spread).abs().max())

    assert errors(200)[1] < 0.03 * denoiser.posterior(torch.zeros(()), 200)[1]
    assert error_ratios(lambda k: errors(k)[1], 50) == pytest.approx([2, 2], abs=0.3)
    # The mean of a mean is the mean: exact at any number of steps.
    assert max(errors(steps)[0] for steps in (1, 7, 200)) < 1e-12


def test_one_step_of_ddpm() -> None:
    """Ho et al. 2020, algorithm 2, with either variance of section 3.2, from level t to t - 1."""
    denoiser = Recorder(GaussianDenoiser())
    variances: tuple[Variance, ...] = ("large", "small")
    for variance in variances:
        for t_star in (2, 3, 50, 200):
            denoiser.seen.clear()
            noise = LoggedNoise(tape())
            chain = DDPM(denoiser, t_star, t_star, variance, clip_x0=False, clamp_output=False)
            chain(images(), noise)
            (z, t), (after, _) = denoiser.seen[:2]
            assert t == t_star - 1
            i = t_star - 1  # Ho et al. number their betas from 1
            beta, abar, before = BETAS[i], ABAR[i], ABAR[i - 1]
            eps = denoiser.denoiser(z, torch.full((3,), t, dtype=F64))
            mean = (z - beta / (1 - abar) ** 0.5 * eps) / (1 - beta) ** 0.5
            spread = beta if variance == "large" else beta * (1 - before) / (1 - abar)
            reverse = next(n for site, step, n in noise.log if (site, step) == (REVERSE, 0))
            torch.testing.assert_close(after, mean + spread**0.5 * reverse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("t", "s"), [(100, 80), (100, 99), (37, 5), (200, 1)])
def test_strided_posterior(t: int, s: int) -> None:
    """q(z_s | z_t, x0) by Bayes' rule, from the two Gaussians that it combines."""
    a_t, a_s = ABAR[t - 1], ABAR[s - 1]
    alpha = a_t / a_s
    precision = alpha / (1 - alpha) + 1 / (1 - a_s)  # z_t given z_s, and z_s given x0
    small = Posterior.between(t, s, "small")
    assert small.sigma**2 == pytest.approx(1 / precision)
    assert small.z_weight == pytest.approx(alpha**0.5 / (1 - alpha) / precision)
    assert small.x0_weight == pytest.approx(a_s**0.5 / (1 - a_s) / precision)
    large = Posterior.between(t, s, "large")
    assert large.sigma**2 == pytest.approx(1 - alpha)
    assert (large.x0_weight, large.z_weight) == (small.x0_weight, small.z_weight)


@pytest.mark.parametrize("variance", ["large", "small"])
def test_the_step_to_level_zero_is_the_denoised_image(variance: Variance) -> None:
    law = Posterior.between(25, 0, variance)
    assert law.x0_weight == pytest.approx(1)
    assert (law.z_weight, law.sigma) == (0, 0)


def test_one_step_of_diffpure() -> None:
    """Euler-Maruyama on dz = (-beta z / 2 - beta score) dt + sqrt(beta) dw, backwards in time."""
    denoiser = Recorder(GaussianDenoiser(signal=continuous_signal))
    noise = LoggedNoise(tape())
    sampler("diffpure", denoiser, t_star=100, steps=4, **SOFT)(images(), noise)
    for i, (level, to) in enumerate([(100, 75), (75, 50), (50, 25)]):
        z, after = denoiser.seen[i][0], denoiser.seen[i + 1][0]
        t, dt = level / 1000, (level - to) / 1000
        beta = 0.1 + t * (20 - 0.1)
        std = (1 - exp(-0.25 * t**2 * (20 - 0.1) * 2 - t * 0.1)) ** 0.5
        score = -denoiser.denoiser(z, torch.full((3,), level - 1.0, dtype=F64)) / std
        drift = -0.5 * beta * z - beta * score
        (fresh,) = [n for site, step, n in noise.log if (site, step) == (REVERSE, i)]
        want = z - drift * dt + beta**0.5 * dt**0.5 * fresh
        torch.testing.assert_close(after, want, rtol=1e-12, atol=1e-12)


def test_clipping_and_clamping_are_what_the_options_say() -> None:
    denoiser, x = GaussianDenoiser(mean=5.0, variance=0.01), images()  # far outside [-1, 1]
    for name in ("ddpm", "ddim", "gdmp"):
        free = sampler(name, denoiser, **RAW)
        clipped = sampler(name, denoiser, clip_x0=True, clamp_output=False)
        clamped = sampler(name, denoiser, clip_x0=False, clamp_output=True)
        assert float(free(x, tape()).min()) > 1.1
        assert float(clipped(x, tape()).max()) <= 1 + 1e-12
        torch.testing.assert_close(clamped(x, tape()), torch.ones_like(x))


# ------------------------------------------------------------------------------------ controls


def test_noise_only() -> None:
    """The forward noise of level t*, scaled back: sigma / 2 in [0, 1] pixels, and no more."""
    x, t = images(), 100
    got = NoiseOnly(t_star=t, clamp_output=False)(x, tape())
    sigma = ((1 - ABAR[t - 1]) / ABAR[t - 1]) ** 0.5
    assert sigma / 2 == pytest.approx(0.1694, abs=5e-5)
    torch.testing.assert_close(got, x + sigma / 2 * tape().normal(FORWARD, 0, x))
    clamped = NoiseOnly(t_star=t, clamp_output=True)(x, tape())
    torch.testing.assert_close(clamped, got.clamp(0, 1))


def test_one_shot_is_the_posterior_mean() -> None:
    denoiser, x, t = Recorder(GaussianDenoiser()), images(), 150
    got = OneShot(denoiser, t_star=t, clamp_output=False)(x, tape())
    z = ABAR[t - 1] ** 0.5 * (2 * x - 1) + (1 - ABAR[t - 1]) ** 0.5 * tape().normal(FORWARD, 0, x)
    assert isinstance(denoiser.denoiser, GaussianDenoiser)
    torch.testing.assert_close(2 * got - 1, denoiser.denoiser.posterior(z, t)[0])
    assert denoiser.levels == [149]
    one_step = sampler("ddim", denoiser, t_star=t, steps=1, **RAW)
    torch.testing.assert_close(one_step(x, tape()), got)


def test_no_purification() -> None:
    x = images()
    nothing = Unpurified()
    assert torch.equal(nothing(x, tape()), x)
    assert nothing.sites == frozenset()


# ---------------------------------------------------------------------------------------- GDMP


def mse(z: Tensor, target: Tensor) -> Tensor:
    """The sum over the batch of each image's mean squared error."""
    return torch.stack([F.mse_loss(a, b) for a, b in zip(z, target, strict=True)]).sum()


def negative_ssim(z: Tensor, target: Tensor, window: int) -> Tensor:
    """Minus the sum over the batch of each image's mean SSIM (Wang et al. 2004, equation 13).

    Written with patches instead of convolutions: one row of `weights` for each window.
    """
    c1, c2 = 0.01**2, 0.03**2
    gaussian = np.exp(-((np.arange(window) - window // 2) ** 2) / (2 * 1.5**2))
    weights = torch.from_numpy(np.outer(gaussian, gaussian).ravel() / gaussian.sum() ** 2)

    def patches(x: Tensor) -> Tensor:
        h = x.shape[-1]
        out = F.unfold(x.flatten(0, 1)[:, None], window, padding=window // 2)
        return out.view(*x.shape[:2], window**2, h * h)

    def mean(x: Tensor) -> Tensor:
        return torch.einsum("bcwp,w->bcp", x, weights)

    p, q = patches(z), patches(target)
    m, n = mean(p), mean(q)
    var_p, var_q, cov = mean(p * p) - m * m, mean(q * q) - n * n, mean(p * q) - m * n
    score = (2 * m * n + c1) * (2 * cov + c2)
    score = score / ((m * m + n * n + c1) * (var_p + var_q + c2))
    return -score.flatten(1).mean(1).sum()


@pytest.mark.parametrize("channels", [1, 3])
def test_guidance_gradients_are_those_of_autograd(channels: int) -> None:
    z = (2 * images(2, 8, channels) - 1).requires_grad_()
    target = 0.7 * z.detach() + 0.3 * normal(2, channels, 8, 8, dtype=F64)
    (want,) = torch.autograd.grad(mse(z, target), z)
    torch.testing.assert_close(mse_gradient(z.detach(), target), want, rtol=1e-12, atol=1e-14)
    for window in (1, 3, 7, 11):
        (want,) = torch.autograd.grad(negative_ssim(z, target, window), z)
        got = ssim_gradient(z.detach(), target, window)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
        assert float(got.abs().max()) > 1e-3


def test_ssim_is_highest_at_the_target() -> None:
    z = 2 * images(2, 8) - 1
    assert float(negative_ssim(z, z, 7)) == pytest.approx(-2)
    torch.testing.assert_close(ssim_gradient(z, z, 7), torch.zeros_like(z), atol=1e-12, rtol=0)


def test_one_guided_step() -> None:
    """The mean moves by -sigma^2 * scale * noise/signal * gradient, towards a noised target."""
    denoiser = Recorder(GaussianDenoiser())
    scale, x = 300.0, images()
    noise = LoggedNoise(tape())
    options = {**RAW, "t_star": 60, "steps": 60, "iterations": 1, "scale": scale}
    sampler("gdmp", denoiser, **options)(x, noise)
    z, after = denoiser.seen[0][0], denoiser.seen[1][0]
    drawn = {(site, step): n for site, step, n in noise.log}
    abar, beta = ABAR[59], BETAS[59]
    eps = denoiser.denoiser(z, torch.full((3,), 59.0, dtype=F64))
    mean = (z - beta / (1 - abar) ** 0.5 * eps) / (1 - beta) ** 0.5
    target = abar**0.5 * (2 * x - 1) + (1 - abar) ** 0.5 * drawn[GUIDANCE, 0]
    s = scale * ((1 - abar) / abar) ** 0.5
    want = mean - beta * s * 2 * (z - target) / 16 + beta**0.5 * drawn[REVERSE, 0]
    torch.testing.assert_close(after, want, rtol=1e-12, atol=1e-12)


def test_every_iteration_of_gdmp_starts_from_the_last_and_is_guided_to_the_first() -> None:
    targets: list[Tensor] = []

    def keep(z: Tensor, target: Tensor) -> Tensor:
        targets.append(target)
        return torch.zeros_like(z)

    denoiser, x = Recorder(GaussianDenoiser()), images()
    noise = LoggedNoise(tape())
    options = {**RAW, "distance_gradient": keep, "noisy_target": False, "iterations": 3}
    sampler("gdmp", denoiser, **options)(x, noise)
    chain = sampler("ddpm", denoiser, **RAW)
    want = x
    for k in range(3):

        class Later:
            def normal(self, site: Site, step: int, like: Tensor, k: int = k) -> Tensor:
                return tape().normal(site, step + k * (4 if site == REVERSE else 1), like)

        want = chain(want, Later())
    torch.testing.assert_close(sampler("gdmp", denoiser, **options)(x, tape()), want)
    grid = [60, 45, 30]  # the last step, to level zero, is not guided
    for level, target in zip(grid * 3, targets, strict=False):
        torch.testing.assert_close(target, ABAR[level - 1] ** 0.5 * (2 * x - 1))


def mixture_gdmp(**changes: Any) -> GDMP:
    means = torch.stack([normal(4, 4, seed=s, dtype=F64) * 0.5 for s in range(3)])[:, None]
    options = {**RAW, "t_star": 150, "steps": 3, "scale": 300.0, **changes}
    purifier = sampler("gdmp", MixtureDenoiser(means), **options)
    assert isinstance(purifier, GDMP)
    return purifier


DISTANCES = {"mse": mse_gradient, "ssim": ssim}


def slope_error(purifier: Purifier, x: Tensor) -> float:
    """The largest relative error of autograd's slope, against finite differences, in float64."""
    n, weights = len(x), normal(*x.shape, seed=9, dtype=F64)

    def value(x: Tensor) -> Tensor:
        return (weights * purifier(x, tape(n))).sum()

    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(leaf), leaf)
    errors = []
    for seed in range(3):
        direction = normal(*x.shape, seed=20 + seed, dtype=F64)
        with torch.no_grad():
            # Richardson: SSIM curves so sharply that one central difference is off by 1e-7.
            wide, narrow = (
                float(value(x + h * direction) - value(x - h * direction)) / (2 * h)
                for h in (2e-6, 1e-6)
            )
        slope = (4 * narrow - wide) / 3
        size = float(gradient.norm() * direction.norm())
        errors.append(abs(slope - float((gradient * direction).sum())) / size)
    return max(errors)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("noisy_target", [True, False])
def test_the_gradient_of_gdmp_is_exact(distance: str, iterations: int, noisy_target: bool) -> None:
    """Finite differences through every step, along the state and along the guide."""
    scale = 300.0 if distance == "mse" else 30.0
    options = {"iterations": iterations, "noisy_target": noisy_target, "scale": scale}
    x = images(2)
    whole = mixture_gdmp(distance=distance, window=3 if distance == "ssim" else None, **options)
    assert slope_error(whole, x) < 1e-7


class ScalarPath(torch.autograd.Function):
    """The identity, whose backward pass returns one number for all pixels of an image."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        return gradient.mean((1, 2, 3), keepdim=True).expand_as(gradient)


def scalar_path(x: Tensor) -> Tensor:
    return ScalarPath.apply(x)  # type: ignore[no-any-return, no-untyped-call]


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("iterations", [1, 3])
def test_a_broken_guidance_gradient_would_be_noticed(distance: str, iterations: int) -> None:
    """Three published mistakes: the guide detached, the second order lost, a scalar for a VJP."""
    exact = DISTANCES[distance]
    scale = 300.0 if distance == "mse" else 30.0
    mutants: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "guide detached": lambda z, target: exact(z, target.detach()),
        "state detached": lambda z, target: exact(z.detach(), target),
        "scalar": lambda z, target: exact(z, scalar_path(target)),
    }
    for name, mutant in mutants.items():
        broken = mixture_gdmp(distance_gradient=mutant, iterations=iterations, scale=scale)
        assert slope_error(broken, images(2)) > 1e-3, name


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_image_is_purified_the_same_in_any_batch(name: str) -> None:
    """Guidance above all: a distance that is a mean over the batch would fail here."""
    means = torch.stack([normal(4, 4, seed=s, dtype=F64) * 0.5 for s in range(3)])[:, None]
    purifier = sampler(name, MixtureDenoiser(means))
    x = images(5)
    whole = purifier(x, tape(5))
    for i in range(5):
        alone = purifier(x[i : i + 1], Tape.make(0, "test", [i]))
        torch.testing.assert_close(alone[0], whole[i], rtol=1e-12, atol=1e-12)
    # Neighbours do not weigh in the gradient either.
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(purifier(leaf, tape(5))[0].sum(), leaf)
    assert float(gradient[0].abs().max()) > 0
    assert torch.equal(gradient[1:], torch.zeros_like(gradient[1:]))


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm-solver", "diffpure"])
def test_the_gradient_of_a_sampler_is_exact(name: str) -> None:
    means = torch.stack([normal(4, 4, seed=s, dtype=F64) * 0.5 for s in range(3)])[:, None]
    options = SOFT if name == "diffpure" else RAW
    purifier = sampler(name, MixtureDenoiser(means), t_star=150, steps=5, **options)
    assert slope_error(purifier, images(2)) < 1e-7


# ----------------------------------------------------------------------------- bad options


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(
    ("t_star", "steps", "message"),
    [
        (1500, 10, r"t_star: 1500 is not in 1 \.\.\. 1000"),
        (0, 1, "t_star: 0 is not in"),
        (-1, 1, "t_star: -1 is not in"),
        (100, 101, r"steps: 101 is not in 1 \.\.\. t_star = 100"),
        (100, 0, "steps: 0 is not in"),
    ],
)
def test_grids_that_cannot_be_are_refused(name: str, t_star: int, steps: int, message: str) -> None:
    sampler(name, nn.Identity(), t_star=100, steps=10)
    with pytest.raises(BadEntry, match=message):
        sampler(name, nn.Identity(), t_star=t_star, steps=steps)


@pytest.mark.parametrize("t_star", [0, 1001])
def test_levels_that_cannot_be_are_refused(t_star: int) -> None:
    with pytest.raises(BadEntry, match="t_star"):
        NoiseOnly(t_star=t_star, clamp_output=True)
    with pytest.raises(BadEntry, match="t_star"):
        OneShot(GaussianDenoiser(), t_star=t_star, clamp_output=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distance": "ssim", "window": 4}, "window: 4 is not odd"),
        ({"distance": "ssim", "window": -1}, "window: -1 is not odd and positive"),
        ({"distance": "ssim"}, "window: goes with distance: ssim"),
        ({"window": 7}, "window: goes with distance: ssim, and is left out elsewhere"),
        ({"iterations": 0}, "iterations: 0 is not in 1 ... 10,000"),
    ],
)
def test_guidance_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadEntry, match=message):
        sampler("gdmp", nn.Identity(), **changes)
