"""ADDT: rank-based Gaussian mapping, the mix, the guidance loop, against what the paper states."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dbp_bench.noise import Site, Tape
from dbp_bench.training import diffusion
from dbp_bench.training.batches import Batch
from dbp_bench.training.diffusion import ADDT, adversarial, classification, denoising, fooling
from dbp_bench.training.diffusion import rank_based_gaussian as rbgm
from dbp_bench.training.processes import DDPM, Level
from toys import MixtureDenoiser, Small, SmallDenoiser, Zero, batch, discrete_signal, normal

PAPER = ADDT(lambda_unit=0.03, lambda_max=0.3, rounds=5, process=DDPM())
NOISE, START = Site("noise"), Site("start")


def signal_at(*steps: int) -> Tensor:
    """Signal ``(b, 1, 1, 1)`` of 0-based steps."""
    return torch.tensor([discrete_signal(t + 1) for t in steps]).view(-1, 1, 1, 1)


def level_at(*steps: int) -> Level:
    return DDPM().at(torch.tensor(steps, dtype=torch.float32))


# ------------------------------------------------------------------------------------- RBGM


def test_rbgm_puts_the_same_values_in_the_order_of_the_gradient() -> None:
    gradient, gaussian = normal(5, 3, 4, 4, seed=1), normal(5, 3, 4, 4, seed=2)
    out = rbgm(gradient, gaussian)
    assert out.shape == gradient.shape
    for i in range(5):
        for c in range(3):
            o, g, v = out[i, c].flatten(), gradient[i, c].flatten(), gaussian[i, c].flatten()
            assert sorted(o.tolist()) == sorted(v.tolist())
            assert torch.equal(o.argsort(), g.argsort())


def test_rbgm_by_hand() -> None:
    gradient = torch.tensor([0.1, -5.0, 3.0, 0.2]).view(1, 1, 2, 2)
    gaussian = torch.tensor([0.7, -0.4, 1.5, -2.0]).view(1, 1, 2, 2)
    assert rbgm(gradient, gaussian).flatten().tolist() == pytest.approx([-0.4, -2.0, 1.5, 0.7])


def test_rbgm_knows_the_ranks_alone() -> None:
    gradient, gaussian = normal(5, 1, 4, 4, seed=1), normal(5, 1, 4, 4, seed=2)
    assert torch.equal(rbgm(gradient, gaussian), rbgm(1e3 * gradient + 7, gaussian))
    assert torch.equal(rbgm(gradient, gaussian), rbgm(gradient.exp(), gaussian))
    assert torch.equal(rbgm(gradient, gaussian.flip(2, 3)), rbgm(gradient, gaussian))
    assert torch.equal(rbgm(-gradient, gaussian), -rbgm(gradient, -gaussian))


# ------------------------------------------------------------------------------ share and mix


def test_the_share_of_the_adversarial_part() -> None:
    """lambda_t = clip(0.03 sqrt(a / (1 - a)), 0, 0.3): .170, .088, .042, .009 and the cap."""
    share = PAPER.share(level_at(50, 100, 200, 500).ratio).flatten().tolist()
    assert share == pytest.approx([0.170, 0.088, 0.042, 0.009], abs=6e-4)
    all_shares = PAPER.share(level_at(*range(1000)).ratio).flatten()
    capped = (all_shares == torch.tensor(0.3)).nonzero().flatten().tolist()
    assert capped == list(range(27)), "the cap is active for t <= 26"
    assert bool((all_shares.diff() <= 0).all())
    assert float(all_shares.min()) > 0


def test_below_the_cap_the_perturbation_has_one_size_in_image_space() -> None:
    """0.03 in [-1, 1] units, 3.8 / 255 in [0, 1]; less where the cap is active."""
    steps = (0, 10, 27, 100, 500, 999)
    signal = signal_at(*steps)
    size = (PAPER.share(level_at(*steps).ratio) * ((1 - signal) / signal).sqrt()).flatten()
    torch.testing.assert_close(size[2:], torch.full((4,), 0.03))
    assert (size[:2] / 2 * 255).tolist() == pytest.approx([0.4, 1.8], abs=0.05)
    assert float(size[2]) / 2 * 255 == pytest.approx(3.8, abs=0.03)


@pytest.mark.parametrize("share", [0.0, 0.009, 0.3, 0.8, 1.0])
def test_the_mix_has_unit_variance(share: float) -> None:
    n = 200_000
    noise, perturbation = normal(100, n // 100, seed=1), normal(100, n // 100, seed=2)
    level = Level(*[torch.tensor(share)] * 4)  # its ratio is the share
    mixed = ADDT(1.0, 1.0, 5, DDPM()).mix(noise, perturbation, level).double()
    assert abs(float(mixed.mean())) < 4 / n**0.5
    assert abs(float(mixed.square().mean()) - 1) < 4 * (2 / n) ** 0.5
    overlap = float((mixed * perturbation.double()).mean())
    assert abs(overlap - share) < 4 * 1.5 / n**0.5
    if share in (0.0, 1.0):
        assert torch.equal(mixed, (perturbation if share else noise).double())


# -------------------------------------------------------------------------------------- CGPO


class Traced:
    """`rank_based_gaussian`, remembering what it was given and what it returned."""

    def __init__(self) -> None:
        self.totals: list[Tensor] = []
        self.values: list[Tensor] = []
        self.out: list[Tensor] = []

    def __call__(self, gradient: Tensor, gaussian: Tensor) -> Tensor:
        self.totals.append(gradient.clone())
        self.values.append(gaussian)
        self.out.append(rbgm(gradient, gaussian))
        return self.out[-1]


def test_cgpo_sums_the_raw_gradients_of_its_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each round's own gradient, written anew, is what its sum grew by; fresh noise in each."""
    traced = Traced()
    monkeypatch.setattr(diffusion, "rank_based_gaussian", traced)
    denoiser, classifier, given = SmallDenoiser(), Small(), batch()
    steps = (5, 20, 50, 100, 200, 400)
    signal, t = signal_at(*steps), torch.tensor(steps, dtype=torch.float32)
    found = PAPER.perturb(denoiser, fooling(classifier), given, level_at(*steps))
    assert len(traced.out) == 5
    assert torch.equal(found, traced.out[-1]), "the last round's perturbation, not drawn again"

    x = 2 * given.images - 1
    like = torch.empty_like(x)
    perturbation, total = given.tape.normal(START, 0, like), torch.zeros_like(x)
    share = (0.03 * (signal / (1 - signal)).sqrt()).clamp(0, 0.3)
    for k in range(5):
        delta = perturbation.clone().requires_grad_()
        noise = given.tape.normal(NOISE, 1 + k, like)
        mixed = (1 - share * share).sqrt() * noise + share * delta
        z = signal.sqrt() * x + (1 - signal).sqrt() * mixed
        x0 = (z - (1 - signal).sqrt() * denoiser(z, t)) / signal.sqrt()
        logits = classifier(x0 / 2 + 0.5)
        loss = (logits.logsumexp(1) - logits[range(6), given.labels]).sum()
        (gradient,) = torch.autograd.grad(loss, delta)
        total = total + gradient
        torch.testing.assert_close(traced.totals[k], total, rtol=1e-4, atol=1e-7)
        assert torch.equal(traced.values[k], given.tape.normal(START, 1 + k, like))
        perturbation = traced.out[k]
    assert not torch.equal(traced.totals[0].argsort(), traced.totals[4].argsort())


def test_cgpo_leaves_no_gradient_anywhere() -> None:
    denoiser, classifier, given = SmallDenoiser(), Small(), batch()
    steps = (5, 20, 50, 100, 200, 400)
    found = PAPER.perturb(denoiser, fooling(classifier), given, level_at(*steps))
    weights = [*denoiser.parameters(), *classifier.parameters()]
    assert all(w.requires_grad for w in weights), "nothing is frozen for good"
    assert all(w.grad is None for w in weights)
    assert not found.requires_grad


def gain(rounds: int, n: int = 200) -> tuple[float, float]:
    """What CGPO adds to the loss after one-step denoising, over a random draw; standard error."""
    means = torch.stack([torch.full((1, 4, 4), value) for value in (-0.4, 0.4)])
    denoiser, classifier, given = MixtureDenoiser(means, 0.3), Small(), batch(n)
    signal, t = signal_at(*[20] * n), torch.full((n,), 20.0)
    addt = ADDT(lambda_unit=0.03, lambda_max=0.3, rounds=rounds, process=DDPM())
    x = 2 * given.images - 1
    noise = given.tape.normal(Site("fresh"), 0, x)

    @torch.no_grad()
    def loss(perturbation: Tensor) -> Tensor:
        mixed = addt.mix(noise, perturbation, level_at(20))
        z = signal.sqrt() * x + (1 - signal).sqrt() * mixed
        x0 = (z - (1 - signal).sqrt() * denoiser(z, t)) / signal.sqrt()
        return F.cross_entropy(classifier((x0 + 1) / 2), given.labels, reduction="none")

    found = addt.perturb(denoiser, fooling(classifier), given, level_at(*[20] * n))
    gains = loss(found) - loss(given.tape.normal(Site("random"), 0, x))
    return float(gains.mean()), float(gains.std()) / n**0.5


def test_cgpo_raises_the_loss_and_without_rounds_does_not() -> None:
    """The perturbation is a Gaussian sample like any other, but it fools the classifier."""
    value, error = gain(rounds=5)
    assert value > 8 * error
    value, error = gain(rounds=0)
    assert abs(value) < 3 * error


# ------------------------------------------------------------------------------------ losses


def noise_shown(x: Tensor, z: Tensor, t: Tensor) -> Tensor:
    signal = signal_at(*(int(step) for step in t))
    return (z - signal.sqrt() * (2 * x - 1)) / (1 - signal).sqrt()


def test_addt_predicts_the_whole_mixed_noise() -> None:
    """The target of equation 8 is what the network was shown, adversarial part and all."""
    zero, given = Zero(), batch()
    loss = adversarial(PAPER, zero, fooling(Small()))(given)
    assert len(zero.seen) == 5 + 1
    z, t = zero.seen[-1]
    mixed = noise_shown(given.images, z, t)
    torch.testing.assert_close(loss, mixed.square().mean(), rtol=1e-4, atol=0)
    fresh = given.tape.normal(NOISE, 0, mixed)
    assert not torch.allclose(mixed, fresh, atol=1e-3)
    level = level_at(*(int(step) for step in t))
    share = PAPER.share(level.ratio)
    rest = (mixed - (1 - share**2).sqrt() * fresh) / share
    ranks = PAPER.perturb(Zero(), fooling(Small()), given, level)
    torch.testing.assert_close(rest, ranks, rtol=0, atol=0.05)
    # One level for all six calls: the rounds are at the level that is trained.
    assert all(torch.equal(other, t) for _, other in zero.seen)


def test_noise_prediction_predicts_the_noise() -> None:
    zero, given = Zero(), batch()
    loss = denoising(zero, DDPM())(given)
    ((z, t),) = zero.seen
    noise = noise_shown(given.images, z, t)
    torch.testing.assert_close(noise, given.tape.normal(NOISE, 0, noise), rtol=0, atol=1e-3)
    torch.testing.assert_close(loss, noise.square().mean(), rtol=1e-4, atol=0)


def test_classification_is_the_mean_cross_entropy() -> None:
    given, small = batch(), Small()
    want = F.cross_entropy(small(given.images), given.labels)
    assert torch.equal(classification(small)(given), want)


@pytest.mark.parametrize("count", [1, 7, 200, 1000])
def test_levels_are_uniform_over_all_steps(count: int) -> None:
    n = 20_000
    images = Batch(torch.empty(n, 1), torch.empty(n), Tape.make(0, "x", range(n)))
    levels = DDPM(count).draw(images).told
    assert float(levels.min()) == 0
    assert float(levels.max()) == count - 1
    assert torch.equal(levels, levels.round())
    std = ((count**2 - 1) / 12) ** 0.5
    assert abs(float(levels.double().mean()) - (count - 1) / 2) <= 4 * std / n**0.5


@pytest.mark.parametrize("pushed", [True, False])
def test_losses_reach_the_denoiser_alone(pushed: bool) -> None:
    denoiser, classifier = SmallDenoiser(), Small()
    plain, addt = denoising(denoiser, DDPM()), adversarial(PAPER, denoiser, fooling(classifier))
    loss = (addt if pushed else plain)(batch())
    torch.autograd.backward(loss)
    for weight in denoiser.parameters():
        assert weight.grad is not None
        assert bool(weight.grad.any())
    assert all(weight.grad is None for weight in classifier.parameters())
