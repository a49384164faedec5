"""FlowPure: its target, the exact flow of Gaussian data, and a defense without any draw."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from closed_forms import F64, orders
from dbp_bench.checks.conformance import CHECKS, fault
from dbp_bench.defense import Defense
from dbp_bench.entries.registry import Registry
from dbp_bench.errors import BadEntry, BadRequest
from dbp_bench.noise import FORWARD, Site, Tape
from dbp_bench.purifiers.flow import FlowPure
from dbp_bench.result import Result
from dbp_bench.runs.execute import execute
from dbp_bench.runs.job import Overrides, resolve
from dbp_bench.training import recipes
from dbp_bench.training.batches import Batch
from dbp_bench.training.flow import attacked, matching, noisy
from toys import LoggedNoise, Small, SmallDenoiser, batch, images, normal, tape, uniform

MEAN, VARIANCE = 0.2, 0.09


class Exact(nn.Module):
    """The mean velocity from ``x + sigma noise`` to x, for Gaussian x; sigma in [-1, 1] units."""

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.sigma = sigma
        self.told: list[float] = []

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (len(z),)
        self.told.append(float(t[0]))
        left = 1 - float(t[0]) / 1000
        return -left * self.sigma**2 * (z - MEAN) / (VARIANCE + (left * self.sigma) ** 2)


# ------------------------------------------------------------------------------------- training


class Half(nn.Module):
    """Says half of what it is shown, and remembers it."""

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        self.seen = z.detach(), t
        return z / 2


def test_the_velocity_leads_from_the_perturbed_image_to_the_clean_one() -> None:
    half, given = Half(), batch()
    loss = matching(half, noisy(0.3))(given)
    state, told = half.seen
    clean = 2 * given.images - 1
    start = clean + 0.6 * given.tape.normal(Site("noise"), 0, clean)
    t = (told / 1000).view(-1, 1, 1, 1)
    assert float(t.min()) > 0
    assert float(t.max()) < 1
    assert len(set(told.tolist())) == 6, "each image has a time of its own"
    torch.testing.assert_close(state, (1 - t) * start + t * clean)
    torch.testing.assert_close(loss, (clean - start - state / 2).square().mean())


def test_no_network_has_a_lower_loss_than_the_exact_velocity() -> None:
    """Trained on Gaussian data, the purifier's closed form is where a network is drawn to."""
    n = 2000
    x = (1 + MEAN + VARIANCE**0.5 * normal(n, 1, 4, 4, seed=3)) / 2
    given = Batch(x, torch.zeros(n), Tape.make(0, "recipe", range(n)))

    class Scaled(nn.Module):
        def __init__(self, by: float) -> None:
            super().__init__()
            self.by = by

        def forward(self, z: Tensor, t: Tensor) -> Tensor:
            left = 1 - t.view(-1, 1, 1, 1) / 1000
            exact = -left * 0.36 * (z - MEAN) / (VARIANCE + left**2 * 0.36)
            return self.by * exact + (self.by - 1) * 0.1

    losses = [float(matching(Scaled(by), noisy(0.3))(given)) for by in (0.9, 1.0, 1.1)]
    assert losses[1] < min(losses[0], losses[2]) - 1e-4


def test_attacked_images_are_within_a_bound_of_their_own() -> None:
    classifier, given = Small().requires_grad_(False), batch(200)
    found = attacked(classifier, 0.3, 0.1, 5)(given)
    clean = 2 * given.images - 1
    bound = 0.3 * given.uniform(Site("bound"))
    size = (found - clean).flatten(1).abs().max(1).values / 2
    assert bool((size <= bound + 1e-6).all())
    assert float((size / bound).mean()) > 0.95, "signs lead to the border"
    assert float(found.abs().max()) <= 1 + 1e-6
    before, after = (F.cross_entropy(classifier((z + 1) / 2), given.labels) for z in (clean, found))
    assert float(after) > 1.2 * float(before)
    assert not found.requires_grad


def test_pgd_by_hand() -> None:
    classifier, given = Small().requires_grad_(False), batch()
    tape, clean = given.tape, 2 * given.images - 1
    bound = (2 * 0.3 * given.uniform(Site("bound"))).view(-1, 1, 1, 1)
    delta = bound * (2 * tape.uniform(Site("start"), 0, clean) - 1)
    delta = delta.clamp(-1 - clean, 1 - clean)
    for _ in range(2):
        leaf = delta.clone().requires_grad_()
        logits = classifier((clean + leaf + 1) / 2)
        value = (logits.logsumexp(1) - logits[range(6), given.labels]).sum()
        (gradient,) = torch.autograd.grad(value, leaf)
        delta = delta + 2 * 0.05 * gradient.sign()
        delta = torch.minimum(torch.maximum(delta, -bound), bound).clamp(-1 - clean, 1 - clean)
    got = attacked(classifier, 0.3, 0.05, 2)(given)
    torch.testing.assert_close(got, clean + delta, rtol=0, atol=1e-5)


def test_the_loss_reaches_the_velocity_alone() -> None:
    velocity, classifier = SmallDenoiser(), Small().requires_grad_(False)
    torch.autograd.backward(matching(velocity, attacked(classifier, 0.3, 0.1, 2))(batch()))
    assert all(w.grad is not None and bool(w.grad.any()) for w in velocity.parameters())


def test_its_recipes() -> None:
    made = recipes.recipe("flow", "cifar10")
    assert made.objective == {"sigma": 0.3}
    assert (made.settings.iterations, made.settings.batch_size) == (300_000, 64)
    assert made.init is None
    assert made.classifier is None
    pgd = recipes.recipe("flow-pgd", "cifar10-jpeg", "tiny")
    assert pgd.file == "cifar10-jpeg-ddpm-tiny-flow-pgd.safetensors"
    assert pgd.classifier == "cifar10-jpeg-wrn-16-2.safetensors"
    assert recipes.recipe("flow", "digits").file == "digits-flow.safetensors"
    with pytest.raises(BadRequest, match="--network ddpmpp: flow trains networks of ddpm, not of"):
        recipes.recipe("flow", "cifar10", "ddpmpp")


# ----------------------------------------------------------------------------------- the purifier


def test_euler_has_order_one_on_the_exact_flow() -> None:
    """Standard scores, by sqrt(variance + (1 - t)^2 sigma^2), stay what they are."""
    x, sigma, t0 = images(), 0.3, 0.25
    start = 2 * x - 1 + (1 - t0) * 2 * sigma * tape().normal(FORWARD, 0, x)
    total = VARIANCE + ((1 - t0) * 2 * sigma) ** 2
    want = MEAN + (start - MEAN) * (VARIANCE / total) ** 0.5

    def error(steps: int) -> float:
        purifier = FlowPure(Exact(2 * sigma), sigma, t0, steps, clamp_output=False)
        return float((2 * purifier(x, tape()) - 1 - want).abs().max())

    assert orders(error, [64, 128, 256]) == pytest.approx([2, 2], abs=0.2)


def test_noise_and_times() -> None:
    net, noise, x = Exact(0.6), LoggedNoise(tape()), images()
    purifier = FlowPure(net, sigma=0.3, t0=0.5, steps=9, clamp_output=False)
    got = purifier(x, noise)
    assert net.told == pytest.approx([1000 * (0.5 + i / 18) for i in range(9)])
    assert [(site, step) for site, step, _ in noise.log] == [(FORWARD, 0)]
    z = 2 * x - 1 + 0.3 * noise.log[0][2]  # 0.15 for images in [0, 1]
    for i in range(9):
        z = z + net(z, torch.full((3,), 1000 * (0.5 + i / 18), dtype=F64)) / 18
    torch.testing.assert_close(2 * got - 1, z, rtol=1e-12, atol=1e-12)
    assert purifier.sites == {FORWARD}


def test_without_noise_nothing_is_drawn() -> None:
    class Deaf:
        def normal(self, site: Site, step: int, like: Tensor) -> Tensor:
            raise AssertionError("a draw")

    purifier = FlowPure(Exact(0.6), sigma=0.0, t0=0.0, steps=4, clamp_output=True)
    assert purifier.sites == frozenset()
    assert torch.equal(purifier(images(), Deaf()), purifier(images(), Deaf()))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sigma": -0.1}, "sigma: -0.1 is not 0 or more, and finite"),
        ({"sigma": float("nan")}, "sigma: nan is not 0 or more, and finite"),
        ({"sigma": float("inf")}, "sigma: inf is not 0 or more, and finite"),
        ({"t0": 1.0}, "t0: 1.0 is not from 0 and below 1"),
        ({"t0": -0.1}, "t0: -0.1 is not from 0"),
        ({"steps": 0}, "steps: 0 is not in 1 ... 10,000"),
        ({"steps": 10**9}, "steps: 1000000000 is not in 1 ... 10,000"),
    ],
)
def test_options_that_cannot_be_right(changes: dict[str, Any], says: str) -> None:
    options: dict[str, Any] = {"sigma": 0.3, "t0": 0.5, "steps": 9, "clamp_output": True}
    with pytest.raises(BadEntry, match=says):
        FlowPure(Exact(0.6), **{**options, **changes})


@pytest.mark.parametrize("title", CHECKS)
@pytest.mark.parametrize("sigma", [0.3, 0.0])
def test_it_conforms(title: str, sigma: float) -> None:
    net = SmallDenoiser().double()
    purifier = FlowPure(net, sigma, 0.5 if sigma else 0.0, steps=4, clamp_output=False)
    defense = Defense(purifier, Small().double(), [net])
    assert fault(CHECKS[title], defense, 0.5 + 0.3 * (images() - 0.5)) is None


@pytest.mark.parametrize("track", ["digits-linf", "digits-l2"])
@pytest.mark.parametrize("name", ["flow", "flow-pgd"])
def test_what_was_attacked_in_its_place_is_declared(name: str, track: str) -> None:
    """The released attack differentiates a flow over 5 points, where the defense takes 10."""
    subject = Registry().subject(name, track)
    evaluated = subject.defense()
    searched = subject.searched(evaluated, "declared-surrogate")
    calls = []
    for each in (evaluated, searched):
        before = each.counter.images
        with torch.no_grad():
            each.logits(uniform(1, 1, 8, 8), Tape.make(0, "test", [0]))
        calls.append(each.counter.images - before)
    assert calls == [10 - 1, 5 - 1]


def test_the_dw_box_is_the_white_box_without_a_draw(tmp_path: Path) -> None:
    """The shipped `flow-pgd`: the same adversarial outcomes, whatever the attacker is shown."""
    found = []
    for threat in ("eot", "dwbox", "dw-fwd"):
        job = resolve(
            Registry(),
            *("digits-linf", "flow-pgd", threat),
            seed=0,
            device="cpu",
            overrides=Overrides(examples=8, effort={"budget": 8}),
        )
        assert job.subject.sites == []
        found.append(Result.read(execute(job, tmp_path)))
    for result in found:
        assert result.predicted.clean == found[0].predicted.clean
        assert result.predicted.adversarial == found[0].predicted.adversarial
