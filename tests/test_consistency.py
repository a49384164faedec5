"""Consistency: the condition at the boundary, distillation's target, and the exact path."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from closed_forms import F64, NoiseNet, gaussian
from dbp_bench.checks.conformance import CHECKS, fault
from dbp_bench.defense import Defense
from dbp_bench.errors import BadEntry, BadRequest
from dbp_bench.noise import FORWARD, REVERSE, Site, Tape
from dbp_bench.purifiers.consistency import Consistency
from dbp_bench.purifiers.controls import OneShot
from dbp_bench.training import recipes
from dbp_bench.training.batches import Batch
from dbp_bench.training.consistency import distilling
from dbp_bench.training.processes import DDPM
from toys import LoggedNoise, Small, SmallDenoiser, discrete_signal, images, normal, tape

MEAN, VARIANCE = 0.2, 0.09
NOISE = Site("noise")


def signals(t: Tensor) -> Tensor:
    """The signal ``(b, 1, 1, 1)`` at 0-based steps `t` ``(b,)``."""
    return torch.tensor([discrete_signal(int(s) + 1) for s in t], dtype=F64).view(-1, 1, 1, 1)


class ExactPath(nn.Module):
    """The noise prediction whose image is the end of the path, for Gaussian data.

    On a path of the probability flow, ``(z / sqrt(a) - mean) / sqrt(variance + (1 - a) / a)`` stays
    what it is.
    """

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        a = signals(t)
        end = MEAN + (z / a.sqrt() - MEAN) * (VARIANCE / (VARIANCE + (1 - a) / a)).sqrt()
        return ((z - a.sqrt() * end) / (1 - a).sqrt()).nan_to_num()


class Posterior(nn.Module):
    """The exact noise prediction for Gaussian data at steps that may differ within a batch."""

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        a = signals(t)
        return (1 - a).sqrt() * (z - a.sqrt() * MEAN) / (a * VARIANCE + 1 - a)


def batch(n: int = 6) -> Batch:
    x = (1 + MEAN + VARIANCE**0.5 * normal(n, 1, 4, 4, seed=3, dtype=F64)) / 2
    return Batch(x, torch.zeros(n), Tape.make(0, "recipe", range(n)))


# ------------------------------------------------------------------------------------- training


def test_at_level_zero_the_student_is_the_identity() -> None:
    """Whatever its weights: nothing that the network says counts there."""
    process, z = DDPM(200), normal(3, 1, 4, 4)
    level = process.at(torch.tensor([-1.0, -1.0, 0.0]))
    x0 = process.predict(SmallDenoiser(), z, level).x0
    assert torch.equal(x0[:2], z[:2])
    assert not torch.equal(x0[2], z[2])
    assert torch.equal(level.diffuse(z, torch.ones_like(z))[:2], z[:2])


class Spy(nn.Module):
    """A network that remembers the steps that it is told."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        self.seen.append((z.detach(), t))
        return self.network(z, t)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("levels", "skip"), [(200, 10), (5, 10)])
def test_the_target_is_further_down_the_teachers_path(levels: int, skip: int) -> None:
    """Where the piece ends at level 0, the target is the image that the teacher predicts."""
    given = batch(40)
    student, teacher = Spy(SmallDenoiser().double()), Spy(Posterior())
    loss = distilling(student, teacher, DDPM(levels), skip)(given)
    (shown, told), (low_z, low_told), (high_z, high_told) = *teacher.seen, *student.seen
    assert torch.equal(told, high_told)
    assert torch.equal(shown, high_z)
    assert torch.equal(low_told, (told - skip).clamp(min=-1))
    assert bool((low_told == -1).all()) == (levels == 5)
    a, b = signals(told), signals(low_told)
    x = 2 * given.images - 1
    z = a.sqrt() * x + (1 - a).sqrt() * given.tape.normal(NOISE, 0, x)
    close: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-4}  # the tables of levels are in float32
    torch.testing.assert_close(shown, z, **close)
    eps = Posterior()(z, told)
    x0 = (z - (1 - a).sqrt() * eps) / a.sqrt()
    low = b.sqrt() * x0 + (1 - b).sqrt() * eps
    torch.testing.assert_close(low_z, low, **close)
    network = student.network
    target = low if levels == 5 else (low - (1 - b).sqrt() * network(low, low_told)) / b.sqrt()
    got = (z - (1 - a).sqrt() * network(z, told)) / a.sqrt()
    if levels == 5:
        torch.testing.assert_close(low, x0, rtol=1e-12, atol=1e-12)
    within = low_told.view(-1, 1, 1, 1) >= 0
    target = torch.where(within, target, low)
    torch.testing.assert_close(loss, (got - target).square().mean(), rtol=1e-2, atol=0)


def test_the_exact_path_is_where_the_loss_is_least() -> None:
    """Its loss falls with the piece, by the square of DDIM's error; the teacher's own stays."""

    def loss(student: nn.Module, skip: int) -> float:
        return float(distilling(student, Posterior(), DDPM(200), skip)(batch(200)))

    exact = [loss(ExactPath(), skip) for skip in (20, 10, 5)]
    assert exact[0] / exact[1] > 6
    assert exact[1] / exact[2] > 6
    assert exact[1] < 0.02 * loss(Posterior(), 10)


def test_gradients_reach_the_student_alone_by_the_upper_end() -> None:
    student, teacher = SmallDenoiser(), SmallDenoiser()
    given = batch()
    given = Batch(given.images.float(), given.labels, given.tape)
    teacher.requires_grad_(True)
    torch.autograd.backward(distilling(student, teacher, DDPM(200), 10)(given))
    assert all(w.grad is not None and bool(w.grad.any()) for w in student.parameters())
    assert all(w.grad is None for w in teacher.parameters())
    process = DDPM(200)
    high = process.draw(given)
    low = process.at((high.told - 10).clamp(min=-1))
    z = 2 * given.images - 1
    z_high = high.diffuse(z, given.tape.normal(NOISE, 0, z))
    with torch.no_grad():
        path = process.predict(teacher, z_high, high)
        target = process.predict(student, low.diffuse(path.x0, path.noise), low).x0
    copy = SmallDenoiser()
    value = (process.predict(copy, z_high, high).x0 - target).square().mean()
    torch.autograd.backward(value)
    for one, other in zip(student.parameters(), copy.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_its_recipes() -> None:
    made = recipes.recipe("consistency", "digits")
    assert made.distillation() == (DDPM(200), 10)
    assert made.init == "digits-ddpm.safetensors"
    assert made.classifier is None
    assert recipes.recipe("consistency", "cifar10").distillation() == (DDPM(200), 10)
    with pytest.raises(BadRequest, match="--network edm: consistency trains networks of ddpm"):
        recipes.recipe("consistency", "cifar10", "edm")


# ----------------------------------------------------------------------------------- the purifier


def test_one_step_is_the_end_of_the_path() -> None:
    x, t = images(), 145
    a = discrete_signal(t)
    z = 2 * x - 1 + (1 / a - 1) ** 0.5 * tape().normal(FORWARD, 0, x)
    want = MEAN + (z - MEAN) * (VARIANCE / (VARIANCE + 1 / a - 1)) ** 0.5
    purifier = Consistency(ExactPath(), t_star=t, steps=1, clamp_output=False)
    torch.testing.assert_close(2 * purifier(x, tape()) - 1, want, rtol=1e-9, atol=1e-9)
    assert purifier.sites == {FORWARD}
    plain = OneShot(ExactPath(), t_star=t, clamp_output=False)
    assert torch.equal(purifier(x, tape()), plain(x, tape()))


def test_several_steps() -> None:
    """Algorithm 1: noise of its own before each call but the first."""
    x, noise = images(), LoggedNoise(tape())
    net = NoiseNet(gaussian(MEAN, VARIANCE), discrete_signal)
    purifier = Consistency(net, t_star=90, steps=3, clamp_output=False)
    got = 2 * purifier(x, noise) - 1
    assert net.seen == [89, 59, 29]
    drawn = {(site, step): n for site, step, n in noise.log}
    assert list(drawn) == [(FORWARD, 0), (REVERSE, 0), (REVERSE, 1)]
    z = 2 * x - 1
    for t, fresh in zip((90, 60, 30), drawn.values(), strict=True):
        a = discrete_signal(t)
        z = a**0.5 * z + (1 - a) ** 0.5 * fresh
        z = (z - (1 - a) ** 0.5 * net(z, torch.full((3,), t - 1.0, dtype=F64))) / a**0.5
    torch.testing.assert_close(got, z, rtol=1e-12, atol=1e-12)
    assert purifier.sites == {FORWARD, REVERSE}


@pytest.mark.parametrize("title", CHECKS)
@pytest.mark.parametrize("steps", [1, 3])
def test_it_conforms(title: str, steps: int) -> None:
    net = SmallDenoiser().double()
    purifier = Consistency(net, t_star=100, steps=steps, clamp_output=False)
    defense = Defense(purifier, Small().double(), [net])
    assert fault(CHECKS[title], defense, 0.5 + 0.1 * (images() - 0.5)) is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"t_star": 0}, "t_star: 0 is not in"), ({"steps": 0}, "steps: 0 is not in")],
)
def test_options_that_cannot_be_right(changes: dict[str, Any], says: str) -> None:
    options: dict[str, Any] = {"t_star": 100, "steps": 1, "clamp_output": True}
    with pytest.raises(BadEntry, match=says):
        Consistency(ExactPath(), **{**options, **changes})
