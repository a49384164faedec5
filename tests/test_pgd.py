"""PGD reaches the known optimum, and knowing more draws never helps the defense."""

from collections.abc import Sequence
from functools import cache
from statistics import NormalDist
from typing import cast

import pytest
import torch
from torch import Tensor

from dbp_bench.attacks import build
from dbp_bench.attacks.objectives import cross_entropy
from dbp_bench.attacks.pgd import PGD
from dbp_bench.defense import Defense, Identity
from dbp_bench.evaluate import Group, attack, judge
from dbp_bench.noise import FORWARD, REVERSE, Site
from dbp_bench.threat import L2, AttackerView, Budget, Gradient, Linf, Objective
from toys import BOTH, SUBSETS, Linear, Noisy, TwoSided, normal, uniform

PIXELS = 16
WEIGHT = normal(1, PIXELS, seed=5)[0]
PHI = NormalDist().cdf


def search(
    of: Defense,
    method: PGD,
    group: Group,
    ball: Budget,
    knows: frozenset[Site] = BOTH,
    victim_draw: int = 0,
) -> Tensor:
    """The adversarial images of `method`."""
    found = attack(of, method, group, ball, knows, seed=0, victim_draw=victim_draw, rows=4096)
    return found.images


# ------------------------------------------------------------------------ a linear classifier


def linear() -> tuple[Linear, Group]:
    """A linear classifier and 400 images, most of which it gets right."""
    images = uniform(400, 1, 4, 4)
    classifier = Linear(WEIGHT, -float(WEIGHT.sum()) / 2)
    # Labels by the score with an error added to it, so that a few are wrong.
    labels = (classifier.score(images) + normal(400, 1)[:, 0] * 0.3 > 0).long()
    return classifier, Group(images, labels, range(400))


@pytest.mark.parametrize("eps", [0.02, 0.05, 0.1, 0.5])
@pytest.mark.parametrize("method", [PGD(1, 1.0, 1), PGD(10, 0.25, 1), PGD(20, 0.1, 3)])
def test_linf_accuracy_of_a_linear_classifier(eps: float, method: PGD) -> None:
    """The worst image has every pixel at the edge of the cube, or of the box, that hurts."""
    classifier, group = linear()
    sign = (2 * group.labels - 1).float()
    worst = (group.images - eps * sign.view(-1, 1, 1, 1) * WEIGHT.sign().view(4, 4)).clamp(0, 1)
    margin = sign * classifier.score(worst).detach()
    assert float(margin.abs().min()) > 1e-4, "no image so near the boundary that rounding decides"

    found = search(Defense(Identity(), classifier), method, group, Linf(eps))
    torch.testing.assert_close(found, worst, atol=1e-6, rtol=0)
    robust = judge(Defense(Identity(), classifier), found, group, seed=0, draw=0)
    assert torch.equal(robust, margin > 0)
    inside = ((group.images >= eps) & (group.images <= 1 - eps)).flatten(1).all(1)
    dual = sign * classifier.score(group.images).detach() - eps * WEIGHT.abs().sum()
    torch.testing.assert_close(margin[inside], dual[inside])


@pytest.mark.parametrize("eps", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("method", [PGD(1, 1.0, 1), PGD(10, 0.25, 1)])
def test_l2_accuracy_of_a_linear_classifier(eps: float, method: PGD) -> None:
    """Right and robust where the margin exceeds eps times the norm of the weights."""
    classifier, group = linear()
    group = Group(0.3 + 0.4 * group.images, group.labels, group.ids)  # no pixel reaches the box
    sign = (2 * group.labels - 1).float()
    margin = sign * classifier.score(group.images).detach() - eps * WEIGHT.norm()
    assert float(margin.abs().min()) > 1e-4

    defense = Defense(Identity(), classifier)
    found = search(defense, method, group, L2(eps))
    want = group.images - eps * sign.view(-1, 1, 1, 1) * (WEIGHT / WEIGHT.norm()).view(4, 4)
    torch.testing.assert_close(found, want, atol=1e-5, rtol=0)
    robust = judge(defense, found, group, seed=0, draw=0)
    assert torch.equal(robust, margin > 0)
    assert 0 < float(robust.float().mean()) < 1


def test_noise_before_a_linear_classifier() -> None:
    """The noise blurs the score: accuracy Phi(margin / sigma), and knowing it is no use."""
    eps, sigma, tau, n, draws = 0.05, 0.3, 0.2, 400, 8
    scale = (sigma**2 + tau**2) ** 0.5 * float(WEIGHT.norm())
    margin = eps * float(WEIGHT.abs().sum()) + 0.6 * scale
    images = 0.5 + margin * (WEIGHT / WEIGHT.square().sum()).view(1, 1, 4, 4)
    assert float((images - 0.5).abs().max()) < 0.5 - eps
    group = Group(images.expand(n, -1, -1, -1), torch.ones(n, dtype=torch.int64), range(n))
    defense = Defense(Noisy(sigma, tau), Linear(WEIGHT, -float(WEIGHT.sum()) / 2))
    for ball, dual in ((Linf(eps), WEIGHT.abs().sum()), (L2(0.1), WEIGHT.norm())):
        want = PHI((margin - ball.eps * float(dual)) / scale)
        for knows in SUBSETS:
            found = search(defense, PGD(2, 1.0, 2), group, ball, knows)
            right = [judge(defense, found, group, seed=0, draw=d) for d in range(draws)]
            error = float(torch.stack(right).double().mean()) - want
            assert abs(error) < 4 * (want * (1 - want) / (n * draws)) ** 0.5


# ------------------------------------------------------------------- where knowledge is power
#
# The noisy image is in class 0 where |u + sF + rR| < c, with u = w . (x - 0.5), and an attacker
# moves u by up to e = eps ||w||_1. One who knows a part k of u + sF + rR pushes to the side of k.

FORWARD_STD, REVERSE_STD, EPS = 0.5, 0.7, 0.05
E = EPS * float(WEIGHT.abs().sum())
START, BOUND = 0.3, 1.0


def inside(known: float, unknown_std: float) -> float:
    """P(|known + unknown| < c) after the push away from zero."""
    u = abs(known) + E
    if not unknown_std:
        return float(u < BOUND)
    return PHI((BOUND - u) / unknown_std) - PHI((-BOUND - u) / unknown_std)


@cache
def robust_accuracy(knows: frozenset[Site]) -> float:
    """The exact robust accuracy, by an integral over what is known."""
    stds = {FORWARD: FORWARD_STD, REVERSE: REVERSE_STD}
    known = sum(stds[s] ** 2 for s in knows) ** 0.5
    unknown = sum(stds[s] ** 2 for s in BOTH - knows) ** 0.5
    if not known:
        return inside(START, unknown)
    cells = 20_000
    quantiles = (NormalDist(START, known).inv_cdf((i + 0.5) / cells) for i in range(cells))
    return sum(inside(q, unknown) for q in quantiles) / cells


@cache
def measured(knows: frozenset[Site], n: int = 600, draws: int = 6) -> float:
    """The share of (image, draw) that survives PGD; one attack a draw where draws are known."""
    direction = (WEIGHT / WEIGHT.square().sum()).view(1, 1, 4, 4)
    images = (0.5 + START * direction).expand(n, -1, -1, -1)
    group = Group(images, torch.zeros(n, dtype=torch.int64), range(n))
    norm = float(WEIGHT.norm())
    defense = Defense(Noisy(FORWARD_STD / norm, REVERSE_STD / norm), TwoSided(WEIGHT, BOUND))
    right = []
    for draw in range(draws):
        if knows or not draw:
            found = search(defense, PGD(2, 1.0, 96), group, Linf(EPS), knows, draw)
        right.append(judge(defense, found, group, seed=0, draw=draw))
    return float(torch.stack(right).double().mean())


@pytest.mark.parametrize("knows", SUBSETS)
def test_pgd_is_as_strong_as_its_knowledge_allows(knows: frozenset[Site]) -> None:
    want = robust_accuracy(knows)
    assert abs(measured(knows) - want) < 4 * (want * (1 - want) / 3600) ** 0.5


def test_knowing_more_never_helps_the_defense() -> None:
    exact = [robust_accuracy(knows) for knows in SUBSETS]
    found = [measured(knows) for knows in SUBSETS]
    for none, forward, reverse, both in (exact, found):
        assert none > forward + 0.03
        assert forward > reverse + 0.03, "the reverse draw weighs more here"
        assert reverse > both + 0.03


# ------------------------------------------------------------------------------ what PGD asks


class Spy:
    """A view whose gradient is constant, which remembers the draws that it was asked for."""

    def __init__(self) -> None:
        self.draws: list[list[int]] = []

    def gradient(
        self, images: Tensor, labels: Tensor, objective: Objective, draws: Sequence[int]
    ) -> Gradient:
        self.draws.append(list(draws))
        losses = torch.zeros(len(images), len(draws))
        return Gradient(torch.ones_like(images), losses, losses[:, :, None])


def test_every_step_averages_over_fresh_draws() -> None:
    spy = Spy()
    images = 0.5 * torch.ones(2, 1, 4, 4)
    found = PGD(3, 0.25, 4)(cast(AttackerView, spy), images, torch.tensor([0, 1]), Linf(0.1))
    assert spy.draws == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    torch.testing.assert_close(found, images + 0.075, msg="a step is 0.25 eps long")


def test_of_several_restarts_the_best_counts() -> None:
    """Where all is known, no image's loss falls as restarts are added, and some rise."""
    images = uniform(60, 1, 4, 4)
    group = Group(images, torch.zeros(60, dtype=torch.int64), range(60))
    defense = Defense(Identity(), TwoSided(WEIGHT, BOUND))
    losses = []
    for restarts in (1, 2, 6):
        method = PGD(1, 0.2, 1, random_start=True, restarts=restarts)
        found = search(defense, method, group, Linf(EPS))
        losses.append(cross_entropy(defense.classifier(found), group.labels))
    assert bool((losses[0] <= losses[1]).all() & (losses[1] <= losses[2]).all())
    assert bool((losses[0] < losses[1]).any() & (losses[1] < losses[2]).any())


def test_no_step_is_no_attack() -> None:
    classifier, group = linear()
    found = search(Defense(Identity(), classifier), PGD(0, 1.0, 1), group, Linf(0.1))
    assert torch.equal(found, group.images)


def test_cross_entropy_is_per_image() -> None:
    logits, labels = normal(5, 3), torch.tensor([0, 1, 2, 1, 0])
    want = logits.exp().sum(1).log() - logits[range(5), labels]
    torch.testing.assert_close(cross_entropy(logits, labels), want)


def test_an_attack_by_name() -> None:
    assert build("pgd", {"steps": 2, "step_size": 0.1, "eot": 3}) == PGD(2, 0.1, 3)
