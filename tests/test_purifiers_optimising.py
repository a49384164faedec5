"""LM, ScoreOpt and the diffusion classifier, on data whose denoiser is known exactly."""

import gc
from collections.abc import Callable
from math import exp, pi, sqrt
from typing import Any
from weakref import WeakSet

import pytest
import torch
from torch import Tensor, nn

from closed_forms import F64, ImageNet, Mixture, NoiseNet, gaussian
from dbp_bench import memory
from dbp_bench.checks.conformance import CHECKS, fault
from dbp_bench.defense import Defense, Purifier, StraightThrough
from dbp_bench.errors import BadEntry
from dbp_bench.networks.parts import sinusoids
from dbp_bench.noise import FORWARD, Noise, Site, seeded
from dbp_bench.purifiers.lm import LEVEL, LM, minimised, slope, squares
from dbp_bench.purifiers.rdc import LOSSES, RDC
from dbp_bench.purifiers.scoreopt import ScoreOptN
from dbp_bench.purifiers.sigma import AtSigma, step_at
from toys import LoggedNoise, Silent, Small, discrete_signal, distinct, tape, uniform

MEAN, VARIANCE = 0.2, 0.09
DATA = gaussian(MEAN, VARIANCE)
LEVELS: dict[str, Any] = {"sigma_min": 0.4, "sigma_max": 0.6}
PUBLISHED: dict[str, Any] = {**LEVELS, "steps": 5, "rate": 0.1, "clamp_output": True}
NOISY: dict[str, Any] = {"sigma": 0.5, "steps": 4, "rate": 0.1, "clamp_output": True}


class SmallSigma(nn.Module):
    """A denoiser D(z; sigma) with weights and curvature, conditional if labels come; no meaning."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        with seeded(3):
            self.first = nn.Conv2d(1, 6, 3, padding=1)
            self.level = nn.Linear(8, 6)
            self.label = nn.Embedding(classes, 6)
            self.last = nn.Conv2d(6, 1, 3, padding=1)

    def forward(self, z: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        emb = self.level(sinusoids(sigma, 8).to(z))
        if labels is not None:
            emb = emb + self.label(labels)
        h = nn.functional.silu(self.first(z) + emb[:, :, None, None])
        out: Tensor = z + 0.3 * self.last(h)
        return out


def images(n: int = 3) -> Tensor:
    return 0.3 + 0.4 * uniform(n, 1, 4, 4, dtype=F64)


def lm(denoiser: nn.Module, **changes: Any) -> LM:
    return LM(denoiser, **{"predicts": "image", **PUBLISHED, **changes})


def scoreopt(denoiser: nn.Module, **changes: Any) -> ScoreOptN:
    return ScoreOptN(denoiser, **{"predicts": "image", **NOISY, **changes})


CLASSIFIER: dict[str, Any] = {"sigma_min": 0.2, "sigma_max": 1.0, "levels": 2}


def rdc(conditional: nn.Module, denoiser: nn.Module | None = None, **changes: Any) -> RDC:
    more = {} if denoiser is None else {"lm": PUBLISHED, "lm_gradient": "exact"}
    options = {"classes": 3, "predicts": "image", "weighting": "training", **CLASSIFIER}
    return RDC(conditional, denoiser=denoiser, **{**options, **more, **changes})


MADE: dict[str, Callable[[nn.Module], Purifier]] = {
    "lm": lm,
    "scoreopt-n": scoreopt,
    "rdc": rdc,
    "rdc-lm": lambda network: rdc(network, network),
}


# ---------------------------------------------------------------------------- the noise levels


def test_a_network_that_predicts_the_noise_gives_the_same_image() -> None:
    """At a level of the schedule, both kinds of exact networks give E[x | z]."""
    z = 2 * images() - 1
    for level in (1, 60, 100, 700):
        a = discrete_signal(level)
        sigma = torch.full((3,), ((1 - a) / a) ** 0.5, dtype=F64)
        torch.testing.assert_close(step_at(sigma), torch.full((3,), level - 1.0, dtype=F64))
        rounded = NoiseNet(DATA, lambda at: discrete_signal(round(at)))
        got = AtSigma(rounded, "noise")(z, sigma)
        torch.testing.assert_close(got, ImageNet(DATA)(z, sigma), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(got, AtSigma(ImageNet(DATA), "image")(z, sigma))


def test_steps_between_two_are_in_proportion_to_log_sigma() -> None:
    low, high = (((1 - a) / a) ** 0.5 for a in map(discrete_signal, (100, 101)))
    between = torch.tensor([(low * high) ** 0.5], dtype=F64)
    torch.testing.assert_close(step_at(between), torch.tensor([99.5], dtype=F64))


# ------------------------------------------------------------------------------- the optimiser


def test_adam_is_that_of_torch() -> None:
    """Published: torch.optim.Adam, at its defaults but for the rate."""
    net, x = SmallSigma().double(), 2 * images() - 1
    sigma = torch.full((3,), 0.5, dtype=F64)
    parameter = nn.Parameter(x.clone())
    optimiser = torch.optim.Adam([parameter], lr=0.1)
    for _ in range(5):
        optimiser.zero_grad()
        torch.autograd.backward(squares(net(parameter, sigma) - parameter).sum())
        optimiser.step()
    got = minimised(lambda _, z: squares(net(z, sigma) - z), x, 5, 0.1)
    torch.testing.assert_close(got, parameter.detach(), rtol=1e-10, atol=1e-10)


def test_a_slope_of_zero_has_a_gradient() -> None:
    x = images().requires_grad_()
    moved = minimised(lambda _, z: 0 * squares(z), x, 3, 0.1)
    (found,) = torch.autograd.grad(moved.sum(), x)
    torch.testing.assert_close(found, torch.ones_like(x))


def test_the_slope_of_the_loss_of_a_gaussian() -> None:
    """D(z + s n) - z = (s^2 (m - z) + v s n) / (v + s^2), whose square's slope is known."""
    z, n, s = 2 * images() - 1, tape().normal(FORWARD, 0, images()), 0.5
    sigma = torch.full((3,), s, dtype=F64)

    def loss(x: Tensor) -> Tensor:
        return squares(ImageNet(DATA)(x + s * n, sigma) - x)

    away = (s**2 * (MEAN - z) + VARIANCE * s * n) / (VARIANCE + s**2)
    want = -2 / 16 * away * s**2 / (VARIANCE + s**2)
    torch.testing.assert_close(slope(loss, z), want)
    # Its own derivative, diagonal here: 2 / 16 (s^2 / (v + s^2))^2.
    x = z.clone().requires_grad_()
    (second,) = torch.autograd.grad(slope(loss, x).sum(), x)
    want = torch.full_like(z, 2 / 16 * (s**2 / (VARIANCE + s**2)) ** 2)
    torch.testing.assert_close(second, want)


# ------------------------------------------------------------------------------ fixed points


class Same:
    """One noise for all steps, and a level in the middle of the range."""

    def __init__(self, of: Noise) -> None:
        self.of = of

    def normal(self, site: Site, step: int, like: Tensor) -> Tensor:
        if site == LEVEL:  # the direction that becomes 1/2
            return torch.ones_like(like)
        return self.of.normal(site, 0, like)


def settled(purifier: Purifier, noise: Noise) -> Tensor:
    return 2 * purifier(images(), noise) - 1


LONG: dict[str, Any] = {"steps": 600, "rate": 0.02, "clamp_output": False}


def test_lm_ends_at_the_mean_of_a_gaussian() -> None:
    """Without noise the loss is least at the mode of the data."""
    found = settled(lm(ImageNet(DATA), **LONG), Silent())
    torch.testing.assert_close(found, torch.full_like(found, MEAN), rtol=0, atol=1e-4)


def test_lm_ends_where_one_noise_is_undone() -> None:
    """With the noise n at level s in every step: at m + v n / s."""
    n = tape().normal(FORWARD, 0, images())
    net = ImageNet(DATA)
    found = settled(lm(net, **LONG), Same(tape()))
    assert net.seen == pytest.approx([0.5] * 600, abs=1e-6)
    torch.testing.assert_close(found, MEAN + VARIANCE * n / 0.5, rtol=0, atol=1e-3)


def test_scoreopt_n_ends_where_the_noise_is_seen() -> None:
    """(z - D) / s = s (z - m) / (v + s^2) is n at m + (v + s^2) n / s, where D is m + v n / s."""
    n = tape().normal(FORWARD, 0, images())
    found = settled(scoreopt(ImageNet(DATA), **LONG), tape())
    torch.testing.assert_close(found, MEAN + VARIANCE * n / 0.5, rtol=0, atol=1e-3)


# --------------------------------------------------------------------------- the draws and calls


@pytest.mark.parametrize(
    ("name", "calls", "drawn"),
    [
        ("lm", 5, {(FORWARD, i) for i in range(5)} | {(LEVEL, i) for i in range(5)}),
        ("scoreopt-n", 5, {(FORWARD, 0)}),
        ("rdc", 2 * 3, {(LOSSES, 0), (LOSSES, 1)}),
    ],
)
def test_calls_and_draws(name: str, calls: int, drawn: set[tuple[Site, int]]) -> None:
    net = SmallSigma().double()
    purifier = MADE[name](net)
    whole = name == "rdc"
    defense = Defense(purifier, nn.Identity() if whole else Small().double(), [net])
    noise = LoggedNoise(tape())
    x = images().requires_grad_()
    torch.autograd.grad(defense.logits(x, noise).sum(), x)
    assert defense.counter.images == 3 * calls
    assert {(site, step) for site, step, _ in noise.log} == drawn
    assert {site for site, _ in drawn} == purifier.sites


def test_levels_of_lm_are_uniform_and_each_image_has_its_own() -> None:
    seen: list[Tensor] = []

    class Seeing(nn.Module):
        def forward(self, z: Tensor, sigma: Tensor) -> Tensor:
            seen.append(sigma)
            return 0.9 * z

    lm(Seeing())(uniform(2000, 1, 1, 1), tape(2000))
    levels = torch.stack(seen).double()
    assert levels.shape == (5, 2000)
    assert 0.4 < float(levels.min()) < 0.401
    assert 0.599 < float(levels.max()) < 0.6
    assert abs(float(levels.mean()) - 0.5) < 4 * 0.2 / 12**0.5 / 10_000**0.5
    assert distinct(levels.view(-1, 1)) > 9_000


# ------------------------------------------------------------------------ the diffusion classifier


class Conditional(nn.Module):
    """The exact denoisers of Gaussians around `means`, one for each class."""

    def __init__(self, means: Tensor) -> None:
        super().__init__()
        self.means = means

    def forward(self, z: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        (y,) = set(labels.tolist())
        return Mixture(self.means[y : y + 1], VARIANCE).expected(z, 1.0, float(sigma[0]) ** 2)


MEANS = torch.linspace(-0.5, 0.5, 3 * 16, dtype=F64).view(3, 1, 4, 4)


def posterior(z: Tensor) -> Tensor:
    """The log-probabilities of the classes of a mixture with equal weights."""
    away = (z[:, None] - MEANS).flatten(2).square().sum(2)
    return (-away / (2 * VARIANCE)).log_softmax(1)


def test_at_the_weights_of_the_likelihood_it_is_the_posterior() -> None:
    """Without noise: the integral of s / (v + s^2)^2 is 1 / 2v, up to the ends of the grid."""
    fine: dict[str, Any] = {
        "sigma_min": 1e-3,
        "sigma_max": 8.0,
        "levels": 1500,
        "weighting": "likelihood",
    }
    found = rdc(Conditional(MEANS), **fine)(images(), Silent())
    torch.testing.assert_close(
        found.log_softmax(1), posterior(2 * images() - 1), rtol=5e-3, atol=1e-2
    )


@pytest.mark.parametrize("weighting", ["training", "released", "likelihood"])
def test_its_logits_are_those_of_the_posterior_at_a_temperature(weighting: str) -> None:
    """Logits differ by those of the posterior, times 2 v / d sum_k w ds (s^2 / (v + s^2))^2."""
    made = rdc(Conditional(MEANS), levels=5, weighting=weighting)
    sigmas = [0.2 + 0.16 * k for k in range(5)]
    heat = sum(made.weight(s, 16) * 0.16 * (s**2 / (VARIANCE + s**2)) ** 2 for s in sigmas)
    found = made(images(), Silent())
    want = (2 * VARIANCE / 16 * heat * posterior(2 * images() - 1)).log_softmax(1)
    torch.testing.assert_close(found.log_softmax(1), want)
    # The noise, shared by all classes, adds 2 v s^3 n (m - m') / d (v + s^2)^2 to a difference.
    noisy = made(images(), tape())
    extra = torch.zeros_like(found)
    for k, s in enumerate(sigmas):
        n = tape().normal(LOSSES, k, images())
        cross = torch.einsum("bchw,kchw->bk", n, MEANS)
        extra += (
            made.weight(s, 16) * 0.16 * 2 * VARIANCE * s**3 / 16 / (VARIANCE + s**2) ** 2 * (-cross)
        )
    torch.testing.assert_close((noisy - found - extra).diff(dim=1), torch.zeros(3, 2, dtype=F64))


def test_the_weights_of_levels() -> None:
    """At s = exp(-1.2) both densities are 1 / (s 1.2 sqrt(2 pi)); away, the exponents differ."""
    ours, theirs = (rdc(SmallSigma(), weighting=w) for w in ("training", "released"))
    s = exp(-1.2)
    peak = (s**2 + 0.25) / (0.5 * s) ** 2 / (s * 1.2 * sqrt(2 * pi))
    assert ours.weight(s, 64) == pytest.approx(peak)
    assert theirs.weight(s, 64) == pytest.approx(peak)
    # At s = 1: ln s + 1.2 = 1.2, so exp(-1/2) and exp(-1.2^4 / 2).
    rest = 5 / (1.2 * sqrt(2 * pi))
    assert ours.weight(1.0, 64) == pytest.approx(rest * exp(-0.5))
    assert theirs.weight(1.0, 64) == pytest.approx(rest * exp(-(1.2**4) / 2))


# ---------------------------------------------------------------------------- what must hold


@pytest.mark.parametrize("name", list(MADE))
def test_it_conforms(name: str) -> None:
    """Among the checks: finite differences in float64, batches, replay, the same program."""
    for dtype in (torch.float32, torch.float64):
        net = SmallSigma().to(dtype)
        whole = name.startswith("rdc")
        defense = Defense(MADE[name](net), nn.Identity() if whole else Small().to(dtype), [net])
        for title, check in CHECKS.items():
            if dtype == torch.float32 and "finite" in title:
                continue
            assert fault(check, defense, images().to(dtype)) is None, title


@pytest.mark.parametrize("name", list(MADE))
def test_evaluation_needs_no_gradient_and_is_the_same_program(name: str) -> None:
    net = SmallSigma()
    for weight in net.parameters():
        weight.requires_grad_(False)
    made, x = MADE[name](net), images().float()
    with torch.no_grad():
        evaluated = made(x, tape())
    attacked = made(x.clone().requires_grad_(), tape())
    assert not evaluated.requires_grad
    assert attacked.requires_grad
    assert torch.equal(evaluated, attacked)


def test_the_identity_in_place_of_lm() -> None:
    """The published attack: the classifier's gradient at the likelier image."""
    net, x = SmallSigma().double(), images().requires_grad_()
    attacked = rdc(net, net, lm_gradient="identity")
    logits = attacked(x, tape())
    (found,) = torch.autograd.grad(logits[:, 0].sum(), x)
    assert torch.equal(logits, rdc(net, net)(x, tape()))
    with torch.no_grad():
        likelier = lm(net)(x, tape())
    at = likelier.clone().requires_grad_()
    (want,) = torch.autograd.grad(rdc(net)(at, tape())[:, 0].sum(), at)
    torch.testing.assert_close(found, want)
    exact = torch.autograd.grad(rdc(net, net)(x, tape())[:, 0].sum(), x)[0]
    assert float((exact - found).abs().max()) > 1e-4


def test_lm_under_bpda() -> None:
    x = images().requires_grad_()
    purified = StraightThrough(lm(SmallSigma().double()))(x, tape())
    (found,) = torch.autograd.grad(purified.sum(), x)
    assert torch.equal(found, torch.ones_like(x))


class Held(nn.Module):
    """A network, and its activations that are still in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.activations: WeakSet[Tensor] = WeakSet()

    def forward(self, z: Tensor, sigma: Tensor) -> Tensor:
        self.activations.add(h := z.sin())
        return z * h


@pytest.mark.parametrize(("by_step", "kept"), [(True, 0), (False, 5)])
def test_by_steps_no_graph_of_a_step_is_kept(by_step: bool, kept: int) -> None:
    net = Held()
    x = images(1).float().requires_grad_()
    with memory.checkpointing(by_step, memory.CallCounter()):
        out = lm(net)(x, tape(1))
    gc.collect()
    assert len(net.activations) == kept
    assert out.requires_grad


# ------------------------------------------------------------------------------- bad options


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda n: lm(n, steps=0), r"^steps: 0 is not in 1 ... 10,000\.$"),
        (lambda n: lm(n, rate=0.0), r"^rate: 0\.0 is not positive and finite\.$"),
        (lambda n: lm(n, sigma_min=0.6), r"^sigma_min: 0\.6 is sigma_max: no level is drawn\.$"),
        (lambda n: lm(n, sigma_min=0.7), r"^sigma_min: 0\.7 is not above 0 and at most sigma_max"),
        (
            lambda n: lm(n, sigma_min=1e-4, predicts="noise"),
            r"^sigma_min, sigma_max: 0\.0001 \.\.\. 0\.6 is not in 0\.01 \.\.\. 157\.4, the levels",
        ),
        (lambda n: scoreopt(n, sigma=0.0), r"^sigma_min: 0\.0 is not above 0"),
        (
            lambda n: scoreopt(n, sigma=158.0, predicts="noise"),
            r"^sigma: 158 is not in 0\.01 \.\.\. 157\.4, the levels of .* in \[-1, 1\]\.$",
        ),
        (lambda n: scoreopt(n, steps=-1), r"^steps: -1 is not in 1 ... 10,000\.$"),
        (lambda n: rdc(n, levels=0), r"^levels: 0 is not in 1 ... 10,000\.$"),
        (lambda n: rdc(n, classes=1), r"^classes: 1 is not two or more\.$"),
        (lambda n: rdc(n, sigma_max=0.2), r"^sigma_min: 0\.2 is sigma_max: there is no level"),
        (lambda n: rdc(n, lm=PUBLISHED), r"go together; missing: lm_gradient, denoiser\.$"),
        (lambda n: rdc(n, n, lm={**PUBLISHED, "steps": 0}), r"^lm: steps: 0 is not in 1 "),
        (lambda n: rdc(n, n, lm={**PUBLISHED, "stepz": 3}), r"^lm: .*unexpected keyword .*'stepz'"),
        (lambda n: rdc(n, n, lm={**PUBLISHED, "steps": 2.5}), r"^lm: steps: 2\.5 is no integer\.$"),
        (lambda n: rdc(n, n, lm={**PUBLISHED, "steps": True}), r"^lm: steps: True is no integer"),
        (lambda n: rdc(n, n, lm={**PUBLISHED, "rate": "x"}), r"^lm: rate: 'x' is no number\.$"),
        (
            lambda n: rdc(n, n, lm={**PUBLISHED, "clamp_output": "no"}),
            r"^lm: clamp_output: 'no' is neither true nor false\.$",
        ),
        (lambda n: lm(n, rate=float("inf")), r"^rate: inf is not positive and finite\.$"),
        (lambda n: lm(n, rate=float("nan")), r"^rate: nan is not positive and finite\.$"),
        (lambda n: lm(n, sigma_max=float("nan")), r"^sigma_min: 0\.4 is not above 0 and at most"),
        (lambda n: scoreopt(n, sigma=float("inf")), r"^sigma_max: inf is not finite\.$"),
    ],
)
def test_bad_options_are_refused(make: Callable[[nn.Module], Purifier], message: str) -> None:
    with pytest.raises(BadEntry, match=message):
        make(SmallSigma())
