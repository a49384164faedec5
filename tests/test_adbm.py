"""ADBM: the bridge in discrete time, its adversarial end, and the sampler that goes down it."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from closed_forms import F64, NoiseNet, gaussian
from dbp_bench.checks.conformance import CHECKS, fault
from dbp_bench.defense import Defense
from dbp_bench.errors import BadEntry, BadRequest
from dbp_bench.networks.songunet import DDPMpp
from dbp_bench.noise import FORWARD, Site
from dbp_bench.purifiers.adbm import ADBM as Purifier
from dbp_bench.purifiers.ddpm import DDIM
from dbp_bench.purifiers.schedule import Schedule
from dbp_bench.training import recipes
from dbp_bench.training.adbm import ADBM, bridging
from dbp_bench.training.diffusion import fooling
from dbp_bench.training.processes import DDPM, VPSDE, Level
from toys import (
    LoggedNoise,
    MixtureDenoiser,
    Small,
    SmallDenoiser,
    Zero,
    batch,
    continuous_signal,
    discrete_signal,
    images,
    normal,
    tape,
)

NOISE, START = Site("noise"), Site("start")
SIGNALS = {DDPM: discrete_signal, VPSDE: continuous_signal}


def bridge(process: DDPM | VPSDE | None = None, **changes: Any) -> ADBM:
    released: dict[str, Any] = {"eps": 8 / 255, "rounds": 3, "shortest": 100, "levels": 200}
    return ADBM(**{**released, **changes}, process=process or DDPM(200))


def levels(process: DDPM | VPSDE, *times: int) -> Level:
    return process.at_time(torch.tensor(times, dtype=F64))


def signals(level: Level) -> Tensor:
    """The signal ``(b, 1, 1, 1)`` at the levels of a DDPM."""
    return torch.tensor([discrete_signal(int(t) + 1) for t in level.told]).view(-1, 1, 1, 1)


# ----------------------------------------------------------------------------------- the bridge


@pytest.mark.parametrize("kind", [DDPM, VPSDE])
@pytest.mark.parametrize(("t", "end"), [(1, 100), (37, 150), (100, 101), (150, 150), (200, 200)])
def test_the_bridge_is_that_of_the_paper(kind: type[Any], t: int, end: int) -> None:
    """What is shown and what is to be predicted, as the paper writes them in continuous time."""
    made, (a, b) = bridge(kind()), (SIGNALS[kind](t), SIGNALS[kind](end))
    x, z, delta = (normal(2, 1, 4, 4, seed=s, dtype=F64) for s in range(3))
    level, top = levels(made.process, t), levels(made.process, end)
    target = made.push(z, delta, level, top)
    shown = a**0.5 * x + (1 - a) ** 0.5 * z + delta * b * (1 - a) / ((1 - b) * a**0.5)
    close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}  # the tables of levels are in float32
    torch.testing.assert_close(level.diffuse(x, target), shown, **close)
    torch.testing.assert_close(target, z + delta * (1 / a - 1) ** 0.5 * b / (1 - b), **close)
    if t == end:
        diffused = level.mean * (x + delta) + level.std * z
        torch.testing.assert_close(level.diffuse(x, target), diffused, rtol=1e-12, atol=1e-12)


def test_the_perturbation_vanishes_at_the_clean_end() -> None:
    made = bridge()
    level, end = levels(made.process, 1, 50, 100, 200), levels(made.process, 200)
    share = (level.std * made.push(torch.zeros(1), torch.ones(1), level, end)).flatten()
    assert bool((share.diff() > 0).all())
    assert float(share[0]) < 2e-4
    assert float(share[-1]) == pytest.approx(discrete_signal(200) ** 0.5, rel=1e-5)


def test_bridges_begin_and_are_trained_where_they_should() -> None:
    end, level = bridge().draw(batch(20_000))
    tops, steps = end.told + 1, level.told + 1
    assert (float(tops.min()), float(tops.max())) == (101, 200)
    assert abs(float(tops.double().mean()) - 150.5) < 4 * 100 / 12**0.5 / 20_000**0.5
    assert float(steps.min()) == 1
    assert bool((steps <= tops).all())
    reached = float((steps == tops).double().mean())
    assert reached == pytest.approx(sum(1 / n for n in range(101, 201)) / 100, rel=0.3)
    end, level = bridge(VPSDE()).draw(batch(2000))
    assert bool((level.told <= end.told).all())
    assert float(level.std.min()) > 0


# --------------------------------------------------------------------------- the adversarial end


def test_the_attack_is_signed_ascent_under_the_noise_that_is_trained() -> None:
    """Each round written anew: full steps from a uniform start, back into the ball and the box."""
    denoiser, classifier, given, made = SmallDenoiser(), Small(), batch(), bridge(eps=0.1)
    x, tape = 2 * given.images - 1, given.tape
    end, level = made.draw(given)
    z = tape.normal(NOISE, 0, x)
    got = made.perturb(denoiser, fooling(classifier), given, z, level, end)

    a, b = signals(level), signals(end)
    delta = (0.2 * (2 * tape.uniform(START, 0, x) - 1)).clamp(-1 - x, 1 - x)
    for _ in range(3):
        leaf = delta.clone().requires_grad_()
        shown = a.sqrt() * x + (1 - a).sqrt() * z + leaf * b * (1 - a) / ((1 - b) * a.sqrt())
        x0 = (shown - (1 - a).sqrt() * denoiser(shown, level.told)) / a.sqrt()
        logits = classifier((x0 + 1) / 2)
        value = (logits.logsumexp(1) - logits[range(6), given.labels]).sum()
        (gradient,) = torch.autograd.grad(value, leaf)
        delta = (delta + 0.2 * gradient.sign()).clamp(-0.2, 0.2).clamp(-1 - x, 1 - x)
    assert float((got - delta).abs().gt(1e-5).double().mean()) <= 0.03, "signs near 0 may differ"
    assert float(got.abs().max()) <= 0.2 + 1e-6
    assert float((x + got).abs().max()) <= 1 + 1e-6
    assert all(w.grad is None for w in [*denoiser.parameters(), *classifier.parameters()])
    assert not got.requires_grad


def test_all_of_the_noise_is_to_be_predicted() -> None:
    zero, given, made = Zero(), batch(), bridge(eps=0.1)
    loss = bridging(made, zero, fooling(Small()))(given)
    assert len(zero.seen) == 3 + 1, "one call a round, and that which is trained"
    shown, told = zero.seen[-1]
    assert all(torch.equal(t, told) for _, t in zero.seen)
    end, level = made.draw(given)
    assert torch.equal(level.told, told)
    x = 2 * given.images - 1
    z = given.tape.normal(NOISE, 0, x)
    target = (shown - level.mean * x) / level.std
    torch.testing.assert_close(loss, target.square().mean(), rtol=1e-3, atol=0)
    delta = (target - z) * level.ratio / end.ratio**2
    assert float(delta.abs().max()) <= 0.2 + 1e-3
    assert float(delta.abs().mean()) > 0.1, "the attack went to the border"


def test_the_loss_reaches_the_denoiser_alone() -> None:
    denoiser, classifier = SmallDenoiser(), Small()
    torch.autograd.backward(bridging(bridge(), denoiser, fooling(classifier))(batch()))
    assert all(w.grad is not None and bool(w.grad.any()) for w in denoiser.parameters())
    assert all(w.grad is None for w in classifier.parameters())


def test_its_recipes() -> None:
    made = recipes.recipe("adbm", "cifar10", "ddpmpp")
    assert made.bridge() == bridge(VPSDE())
    assert (made.settings.iterations, made.settings.batch_size) == (30_000, 128)
    assert (made.settings.learning_rate, made.settings.ramp) == (2e-4, 5000)
    assert recipes.recipe("adbm", "cifar10-jpeg", "tiny").bridge() == bridge(DDPM(200))
    assert recipes.recipe("adbm", "digits").bridge() == bridge(DDPM(200), eps=0.2)
    with pytest.raises(BadRequest, match="--network edm: adbm trains networks of ddpm or vpsde"):
        recipes.recipe("adbm", "cifar10", "edm")


# ----------------------------------------------------------------------------------- the sampler


def mixture() -> MixtureDenoiser:
    means = torch.stack([normal(4, 4, seed=s, dtype=F64) * 0.5 for s in range(3)])[:, None]
    return MixtureDenoiser(means)


def test_it_is_ddim_that_clips_and_keeps_the_networks_noise() -> None:
    options: dict[str, Any] = {"t_star": 100, "steps": 5}
    want = DDIM(mixture(), **options, clip_x0=True, clamp_output=True, consistent_noise=False)
    x = 3 * images() - 1
    got = Purifier(mixture(), **options)(x, tape())
    assert torch.equal(got, want(x, tape()))
    assert float(got.detach().max()) == 1, "something is clipped"


class Bridged(nn.Module):
    """The exact prediction for Gaussian data, all of which were moved by `delta`."""

    def __init__(self, delta: Tensor, end: int) -> None:
        super().__init__()
        self.delta, self.end = delta, end
        self.plain = NoiseNet(gaussian(0.2, 0.09), discrete_signal)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        a, b = discrete_signal(float(t[0]) + 1), discrete_signal(self.end)
        push = self.delta * (1 / a - 1) ** 0.5 * b / (1 - b)
        out: Tensor = self.plain(z - (1 - a) ** 0.5 * push, t) + push
        return out


def test_one_step_takes_the_perturbation_off() -> None:
    """What is left is what plain DDIM makes of the clean image."""
    x = 0.5 + 0.1 * (images() - 0.5)
    delta = 0.05 * normal(3, 1, 4, 4, seed=5, dtype=F64)
    net = Bridged(2 * delta, 100)
    got = Purifier(net, t_star=100, steps=1)(x + delta, tape())
    plain = NoiseNet(gaussian(0.2, 0.09), discrete_signal)
    want = Purifier(plain, t_star=100, steps=1)(x, tape())
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


class Push(nn.Module):
    """The exact prediction where every image is as likely as any other: what was pushed."""

    def __init__(self, delta: Tensor, end: int) -> None:
        super().__init__()
        self.delta, self.end = delta, end

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        a, b = discrete_signal(float(t[0]) + 1), discrete_signal(self.end)
        out: Tensor = self.delta * (1 / a - 1) ** 0.5 * b / (1 - b)
        return out


@pytest.mark.parametrize("steps", [1, 5, 100])
def test_more_steps_leave_up_to_half_of_it(steps: int) -> None:
    """Where data say nothing: DDIM goes by sigma / sigma_T^2, the bridge falls by twice that."""
    x, delta = 0.5 + 0.1 * (images() - 0.5), torch.full((3, 1, 4, 4), 0.02, dtype=F64)
    sigmas = [(1 / discrete_signal(t) - 1) ** 0.5 for t in range(100, -1, -100 // steps)]
    taken = sum(high * (high - low) for high, low in pairwise(sigmas)) / sigmas[0] ** 2
    noise = LoggedNoise(tape())
    got = Purifier(Push(2 * delta, 100), t_star=100, steps=steps)(x + delta, noise)
    want = x + delta - taken * delta + sigmas[0] / 2 * noise.log[0][2]
    inside = (want > 0.05) & (want < 0.95)  # nothing was clipped on the way
    torch.testing.assert_close(got[inside], want[inside], rtol=1e-9, atol=1e-9)
    assert taken == pytest.approx({1: 1, 5: 0.6, 100: 0.5}[steps], abs=0.06)


def test_the_released_sampler() -> None:
    """Another table, noise one level higher, and labels 99, 79, ..., 19 for DDPM++."""
    seen: list[tuple[Tensor, float]] = []

    class Model(nn.Module):
        def forward(self, z: Tensor, label: Tensor) -> Tensor:
            seen.append((z, float(label[0])))
            return 0.3 * z

    network = DDPMpp(Model())  # type: ignore[arg-type]
    x, noise = images(), LoggedNoise(tape())
    got = Purifier(network, t_star=100, steps=5, published=True)(x, noise)
    assert [label for _, label in seen] == pytest.approx([99, 79, 59, 39, 19], abs=1e-9)
    a = Schedule(beta_first=1e-6).signal()
    assert a[1] == pytest.approx(1 - 1e-6, abs=1e-12)
    z = a[101] ** 0.5 * (2 * x - 1) + (1 - a[101]) ** 0.5 * noise.log[0][2]
    for t, s in ((100, 80), (80, 60), (60, 40), (40, 20), (20, 0)):
        x0 = ((z - (1 - a[t]) ** 0.5 * 0.3 * z) / a[t] ** 0.5).clamp(-1, 1)
        z = a[s] ** 0.5 * x0 + (1 - a[s]) ** 0.5 * 0.3 * z
    torch.testing.assert_close(2 * got - 1, z, rtol=1e-12, atol=1e-12)
    assert [(site, step) for site, step, _ in noise.log] == [(FORWARD, 0)]
    with pytest.raises(BadEntry, match="t_star: 1000 has no level above it"):
        Purifier(network, t_star=1000, steps=5, published=True)


@pytest.mark.parametrize("title", CHECKS)
def test_it_conforms(title: str) -> None:
    net = mixture()
    defense = Defense(Purifier(net, t_star=100, steps=5), Small().double(), [net])
    assert fault(CHECKS[title], defense, 0.5 + 0.3 * (images() - 0.5)) is None
