"""PGD reaches the known optimum, and knowing more draws never helps the defense."""

from collections.abc import Sequence
from functools import cache
from statistics import NormalDist
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from dbp_bench.attacks import make
from dbp_bench.attacks.common.objectives import OBJECTIVES, SELECTION, cross_entropy
from dbp_bench.attacks.common.options import AnyLoss
from dbp_bench.attacks.pgd import PGD
from dbp_bench.defense import Defense, Identity
from dbp_bench.errors import AttackFailed
from dbp_bench.evaluation import Group, attack
from dbp_bench.noise import FORWARD, REVERSE, Site
from dbp_bench.threat import L2, AttackerView, Budget, Gradient, Linf, Objective, Setup
from toys import BOTH, SUBSETS, Echo, Linear, Noisy, TwoSided, is_right, normal, uniform

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
    found = attack(of, method, group, ball, knows, seed=0, victim_draw=victim_draw, max_batch=4096)
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
    robust = is_right(Defense(Identity(), classifier), found, group)
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
    robust = is_right(defense, found, group)
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
            right = [is_right(defense, found, group, d) for d in range(draws)]
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
def measured(knows: frozenset[Site], n: int = 300, draws: int = 6) -> float:
    """The share of (image, draw) that survives PGD; one attack a draw where draws are known."""
    direction = (WEIGHT / WEIGHT.square().sum()).view(1, 1, 4, 4)
    images = (0.5 + START * direction).expand(n, -1, -1, -1)
    group = Group(images, torch.zeros(n, dtype=torch.int64), range(n))
    norm = float(WEIGHT.norm())
    defense = Defense(Noisy(FORWARD_STD / norm, REVERSE_STD / norm), TwoSided(WEIGHT, BOUND))
    right = []
    for draw in range(draws):
        if knows or not draw:
            found = search(defense, PGD(2, 1.0, 64), group, Linf(EPS), knows, draw)
        right.append(is_right(defense, found, group, draw))
    return float(torch.stack(right).double().mean())


@pytest.mark.parametrize("knows", SUBSETS)
def test_pgd_is_as_strong_as_its_knowledge_allows(knows: frozenset[Site]) -> None:
    want = robust_accuracy(knows)
    assert abs(measured(knows) - want) < 4 * (want * (1 - want) / 1800) ** 0.5


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
        none = torch.zeros(len(images), len(draws))
        return Gradient(torch.ones_like(images), none, none[:, :, None])


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


# ------------------------------------------------------------------------------ targeted losses

FAMILIES = ["ce", "margin", "dlr"]


class Notes:
    """A view of ten classes without a gradient, which remembers what it was asked.

    Logits are those of a table: of the clean image first, then of what each restart found.
    """

    deterministic = False

    def __init__(self, table: list[Tensor]) -> None:
        self.table = table
        self.aims: list[Tensor] = []
        self.looked: list[list[int]] = []
        self.asked: list[int] = []

    def logits(self, images: Tensor, draws: Sequence[int]) -> Tensor:
        self.looked.append(list(draws))
        return self.table[len(self.looked) - 1][:, None].expand(-1, len(draws), -1)

    def gradient(
        self, images: Tensor, labels: Tensor, objective: Objective, draws: Sequence[int]
    ) -> Gradient:
        # The class that is aimed at is the one whose logit alone raises the loss most.
        alone = torch.eye(self.table[0].shape[1])
        losses = [objective(one.expand(len(images), -1), labels) for one in alone]
        self.aims.append(torch.stack(losses).argmax(0))
        self.asked += draws
        # Moves the whole image towards 1 by an amount that tells the restart.
        none = torch.zeros(len(images), len(draws))
        return Gradient(torch.ones_like(images), none, none[:, :, None])


def test_each_restart_aims_at_the_next_most_likely_wrong_class() -> None:
    """Nine restarts on ten classes aim at all nine, whose order the clean image fixes."""
    logits = normal(2, 10, seed=3)
    labels = logits.argsort(dim=1)[:, -2]  # the second most likely
    notes = Notes([logits] * 10)
    images = 0.5 * torch.ones(2, 1, 4, 4)
    PGD(2, 0.1, 3, "margin-targeted", restarts=9)(
        cast(AttackerView, notes), images, labels, Linf(0.1)
    )
    wrong = [
        [c for c in row if c != label]
        for row, label in zip(logits.argsort(dim=1, descending=True).tolist(), labels, strict=True)
    ]
    assert torch.stack(notes.aims[::2], 1).tolist() == wrong
    assert torch.stack(notes.aims[1::2], 1).tolist() == wrong, "to the end of the restart"

    assert notes.asked == list(range(9 * 2 * 3)), "fresh guesses at every step"
    order, *compared = notes.looked
    assert all(looked == list(range(SELECTION, SELECTION + 3)) for looked in compared)
    assert len(compared) == 9
    assert not set(order) & {*notes.asked, *compared[0]}
    assert len(order) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_restarts_are_compared_by_the_untargeted_loss_of_the_family(family: str) -> None:
    """Judged by logits for which the three families disagree on which restart is best."""
    clean = torch.tensor([[9.0, 1.0, 2.0, 3.0, 0.0]])
    # Margins -4, -4.5, -5; but cross-entropy and dlr prefer other restarts.
    found = [
        torch.tensor([[4.0, 0.0, -20.0, -20.0, -20.0]]),
        torch.tensor([[4.5, 0.0, 0.0, 0.0, 0.0]]),
        torch.tensor([[5.0, 0.0, 0.0, -90.0, -90.0]]),
    ]
    labels = torch.tensor([0])
    values = torch.cat([OBJECTIVES[family](one, labels) for one in found])
    assert int(values.argmax()) == {"ce": 1, "margin": 0, "dlr": 0}[family]

    class Moving(Notes):
        """Whose restarts end at other images each."""

        def gradient(self, *args: Any) -> Gradient:
            gradient = super().gradient(*args)
            return gradient._replace(mean=torch.zeros_like(args[0]))

        def random_start(self, images: Tensor, budget: Budget, number: int) -> Tensor:
            return images + 0.01 * (number + 1)

    notes = Moving([clean, *found])
    images = torch.zeros(1, 1, 2, 2)
    loss = cast(AnyLoss, f"{family}-targeted")
    method = PGD(1, 0.1, 2, loss, random_start=True, restarts=3)
    got = method(cast(AttackerView, notes), images, labels, Linf(0.1))
    torch.testing.assert_close(got, images + 0.01 * (int(values.argmax()) + 1))


class Guarded(nn.Module):
    """Ten classes at the pixels' values; the nearest wrong one cannot be reached, the next can."""

    def forward(self, images: Tensor) -> Tensor:
        flat = images.flatten(1)[:, :10]
        return torch.cat([flat[:, :1], flat[:, 1:2].clamp(max=0.75), flat[:, 2:]], 1)


def test_a_class_that_an_untargeted_search_never_tries_is_found() -> None:
    """The margin's gradient stays at the most likely wrong class, which gives way no further."""
    images = torch.tensor([0.9, 0.76, 0.7, *[0.1] * 13]).view(1, 1, 4, 4)
    group = Group(images, torch.tensor([0]), [0])
    defense = Defense(Identity(), Guarded())
    wrong = []
    for method in (
        PGD(1, 1.0, 1, "margin"),
        PGD(1, 1.0, 1, "margin-targeted"),
        PGD(1, 1.0, 1, "margin-targeted", restarts=2),
    ):
        found = attack(
            defense, method, group, Linf(0.13), BOTH, seed=0, victim_draw=0, max_batch=64
        )
        wrong.append(int(defense.classifier(found.images).argmax()) != 0)
    assert wrong == [False, False, True]


@pytest.mark.parametrize("knows", SUBSETS)
@pytest.mark.parametrize("restarts", [1, 3])
def test_a_targeted_search_takes_what_its_effort_says(
    knows: frozenset[Site], restarts: int
) -> None:
    images = uniform(3, 1, 4, 4)
    group = Group(images, torch.tensor([0, 5, 9]), range(3))
    method = PGD(2, 0.5, 2, "dlr-targeted", restarts=restarts)
    found = attack(
        Defense(Noisy(0.1, 0.1), Echo()),
        method,
        group,
        Linf(0.1),
        knows,
        seed=0,
        victim_draw=0,
        max_batch=64,
    )
    planned = method.evaluations(Setup(hidden=knows != BOTH))
    assert found.gradient.tolist() == [planned.gradient] * 3
    assert found.forward.tolist() == [planned.forward] * 3


def test_more_targets_than_wrong_classes_are_refused() -> None:
    classifier, group = linear()
    with pytest.raises(
        AttackFailed, match=r"restarts: 2, .* this classifier has 1; give 1 at most"
    ):
        search(
            Defense(Identity(), classifier), PGD(1, 1.0, 1, "ce-targeted", False, 2), group, L2(0.1)
        )
    search(Defense(Identity(), classifier), PGD(1, 1.0, 1, "ce-targeted"), group, L2(0.1))


@pytest.mark.parametrize("name", ["pgd", "low-frequency", "diffattack"])
def test_restarts_need_something_that_differs(name: str) -> None:
    for changes in ({"random_start": True}, {"loss": "dlr-targeted"}):
        make(name, {"restarts": 9, **changes})
    with pytest.raises(ValueError, match="needs random_start: true or a targeted loss"):
        make(name, {"restarts": 9, "loss": "dlr"})


def test_cross_entropy_is_per_image() -> None:
    logits, labels = normal(5, 3), torch.tensor([0, 1, 2, 1, 0])
    want = logits.exp().sum(1).log() - logits[range(5), labels]
    torch.testing.assert_close(cross_entropy(logits, labels), want)


def test_an_attack_by_name() -> None:
    assert make("pgd", {"steps": 2, "step_size": "1/10", "eot": 3}) == PGD(2, 0.1, 3)
