"""RayS and SPSA ask for no gradient, reach known optima, and count exactly."""

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from dbp_bench.attacks import make
from dbp_bench.attacks.common.adam import Adam
from dbp_bench.attacks.common.objectives import cross_entropy, margin
from dbp_bench.attacks.rays import RayS
from dbp_bench.attacks.spsa import SPSA
from dbp_bench.defense import Defense, Identity
from dbp_bench.errors import AttackFailed
from dbp_bench.evaluation import Attacked, Group
from dbp_bench.noise import ATTACKER, FORWARD, VICTIM, Site, Tape
from dbp_bench.threat import L1, L2, AttackerView, Budget, Linf, Setup
from toys import BOTH, NOTHING, Echo, Linear, Made, Noisy, Small, normal, search, uniform, view_of

WEIGHT = normal(1, 16, seed=5)[0]


def linear(n: int) -> tuple[Defense, Group, Tensor]:
    """A linear classifier, images that it gets right, and their distance to its boundary."""
    images = 0.3 + 0.4 * uniform(n, 1, 4, 4)
    classifier = Linear(WEIGHT, -float(WEIGHT.sum()) / 2)
    score = classifier.score(images)
    group = Group(images, (score > 0).long(), range(n))
    return Defense(Identity(), classifier), group, (score.abs() / WEIGHT.abs().sum()).detach()


def wrong(of: Defense, found: Attacked, group: Group) -> Tensor:
    return view_of(of, len(group.ids)).logits(found.images, [0])[:, 0].argmax(1) != group.labels


# ------------------------------------------------------------------------------- known optima


def test_rays_finds_the_nearest_boundary_in_linf() -> None:
    """No image closer than it exists, and 1 % beyond it the search ends, but for its tolerance."""
    defense, group, distance = linear(8)
    side = (2 * group.labels - 1)[:, None] * WEIGHT.sign()
    # All of them equally far from the boundary.
    images = group.images + ((0.05 - distance)[:, None] * side).view(group.images.shape)
    equal = Group(images, group.labels, range(8))
    enough = search(defense, RayS(400), equal, Linf(0.05 * 1.01 + 1e-3))
    too_little = search(defense, RayS(100), equal, Linf(0.05 * 0.99))
    assert wrong(defense, enough, equal).all()
    assert not wrong(defense, too_little, equal).any()


def test_spsa_reaches_the_optimum_of_a_linear_classifier() -> None:
    defense, group, distance = linear(8)
    ball = Linf(float(distance.min()) * 0.9)
    noisy = Defense(Noisy(0.05, 0.05), defense.classifier)
    for of, knows in ((defense, BOTH), (noisy, NOTHING)):
        found = search(of, SPSA(20, 24), group, ball, knows).images
        gained = margin(defense.classifier(found), group.labels)
        gained = gained - margin(defense.classifier(group.images), group.labels)
        assert float((gained / (ball.eps * WEIGHT.abs().sum())).min()) > 0.9


@pytest.mark.parametrize("loss", ["margin", "ce"])
@pytest.mark.parametrize("knows", [BOTH, NOTHING])
def test_spsa_estimates_the_true_gradient(
    loss: Literal["margin", "ce"], knows: frozenset[Site]
) -> None:
    """The estimate of n directions in d dimensions is off by sqrt((d - 1) / n)."""
    n, directions = 4, 200
    images = 0.3 + 0.4 * uniform(n, 1, 4, 4)
    labels = torch.arange(n) % 2
    defense = Defense(Noisy(0.02, 0.0), Small())
    method = SPSA(1, directions, 1e-3, loss=loss)
    found = method.gradient(view_of(defense, n, knows), images, labels, step=0)
    objective = {"margin": margin, "ce": cross_entropy}[loss]
    true = view_of(defense, n, knows).gradient(images, labels, objective, range(directions)).mean
    error = (found - true).flatten(1).norm(dim=1) / true.flatten(1).norm(dim=1)
    assert float(error.max()) < 2 * (15 / directions) ** 0.5
    assert float(error.mean()) > 0.2 * (15 / directions) ** 0.5, "it is an estimate"


def test_clipping_halves_the_derivative_at_the_edge_of_the_box() -> None:
    defense, _, _ = linear(1)
    images = torch.full((1, 1, 4, 4), 0.5)
    images[..., 0], images[..., 1] = 0, 1
    found = SPSA(1, 300, 0.01).gradient(view_of(defense, 1), images, torch.zeros(1).long(), 0)
    true = WEIGHT.view(4, 4)
    share = (found[0, 0] * true).sum(0) / true.square().sum(0)
    torch.testing.assert_close(share, torch.tensor([0.5, 0.5, 1, 1]), atol=0.2, rtol=0)


def test_adam_is_that_of_torch() -> None:
    x = torch.zeros(5, requires_grad=True)
    theirs = torch.optim.Adam([x], lr=0.1, maximize=True, foreach=False)
    ours, moved = Adam.of(0.1, torch.zeros(5)), torch.zeros(5)
    for step in range(6):
        x.grad = normal(1, 5, seed=step)[0]
        theirs.step()
        ours = ours.after(x.grad)
        moved = moved + ours.step
    torch.testing.assert_close(moved, x.detach())


# ---------------------------------------------------------------------------------- what decides


class Stairs(torch.nn.Module):
    """A linear classifier whose logits are whole numbers: no gradient anywhere."""

    def forward(self, images: Tensor) -> Tensor:
        score = (images - 0.5).flatten(1) @ WEIGHT
        return torch.stack([-(20 * score).round(), (20 * score).round()], 1) + 0 * score[:, None]


@pytest.mark.parametrize("method", [RayS(200), SPSA(15, 16, 0.05)])
def test_a_masked_gradient_hides_nothing(method: Any) -> None:
    _, group, distance = linear(8)
    defense = Defense(Identity(), Stairs())
    found = search(defense, method, group, Linf(float(distance.max()) + 0.05))
    assert wrong(defense, found, group).all()
    assert found.gradient.tolist() == [0] * 8


def test_rays_follows_the_class_alone() -> None:
    """Logits that tell nothing but the class change nothing."""
    defense, group, _ = linear(6)

    class Bits(torch.nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.nn.functional.one_hot(defense.classifier(images).argmax(1), 2).float()

    plain = search(defense, RayS(200), group, Linf(0.1))
    bits = search(Defense(Identity(), Bits()), RayS(200), group, Linf(0.1))
    assert torch.equal(plain.images, bits.images)
    assert torch.equal(plain.forward, bits.forward)


@pytest.mark.parametrize("method", [RayS(60), SPSA(5, 4)])
def test_an_image_is_searched_alike_in_any_batch(method: Any) -> None:
    """And twice alike: nothing is drawn but by address."""
    bare, group, _ = linear(6)
    defense = Defense(Noisy(0.1, 0.1), bare.classifier)
    for knows in (BOTH, NOTHING):
        whole = method(view_of(defense, 6, knows), group.images, group.labels, Linf(0.1))
        again = method(view_of(defense, 6, knows), group.images, group.labels, Linf(0.1))
        part = torch.tensor([4, 1])
        own = view_of(defense, 6, knows)[part]
        found = method(own, group.images[part], group.labels[part], Linf(0.1))
        assert torch.equal(again, whole)
        torch.testing.assert_close(found, whole[part])


class Spy(AttackerView):
    """Notes the images and the guesses that are asked for."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.asked: list[tuple[Tensor, list[int]]] = []

    def logits(self, images: Tensor, draws: Any) -> Tensor:
        self.asked.append((images.clone(), list(draws)))
        return super().logits(images, draws)


def spied(method: Any, knows: frozenset[Site]) -> list[tuple[Tensor, list[int]]]:
    tapes = Tape.make(0, VICTIM, range(3)), Tape.make(0, ATTACKER, range(3))
    spy = Spy(Defense(Noisy(0.1, 0.1), Echo()), knows, *tapes, 4096)
    method(spy, uniform(3, 1, 4, 4), torch.arange(3), Linf(0.1))
    return spy.asked


def test_hidden_decisions_are_on_fresh_guesses() -> None:
    draws = [asked for _, asked in spied(RayS(7, eot=3), NOTHING)]
    assert draws == [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(7)]


def test_pairs_share_guesses_that_are_fresh_for_each_pair() -> None:
    draws = [asked for _, asked in spied(SPSA(2, 3, eot=2), NOTHING)]
    pairs = [draws[i : i + 2] for i in range(0, 12, 2)]
    assert pairs == [[[2 * i, 2 * i + 1]] * 2 for i in range(6)]


@pytest.mark.parametrize("knows", [BOTH, NOTHING])
@pytest.mark.parametrize("method", [RayS(40), SPSA(4, 4, 0.3)])
def test_only_images_are_asked_about(method: Any, knows: frozenset[Site]) -> None:
    for images, _ in spied(method, knows):
        assert float(images.min()) >= 0
        assert float(images.max()) <= 1


def majority(self: RayS, view: AttackerView, images: Tensor, labels: Tensor, query: int) -> Tensor:
    draws = range(query * self.eot, (query + 1) * self.eot)
    return (view.logits(images, draws).argmax(2) != labels[:, None]).float().mean(1) > 0.5


def test_where_draws_are_hidden_rays_needs_every_guess_and_goes_on_to_eps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The mutant asks for a majority: its radius is 0 where half of the draws are wrong anyway."""
    bare, group, _ = linear(32)
    defense = Defense(Noisy(0.0, 0.05), bare.classifier)
    ball, left = Linf(0.05), []
    for decision in (RayS._decision, majority):
        monkeypatch.setattr(RayS, "_decision", decision)
        found = search(defense, RayS(150), group, ball, NOTHING).images
        size = (found - group.images).abs().amax((1, 2, 3))
        torch.testing.assert_close(size, torch.full((32,), ball.eps), atol=1e-6, rtol=0)
        logits = view_of(defense, 32, NOTHING).logits(found, range(5000, 5050))
        left.append(float((logits.argmax(2) == group.labels[:, None]).float().mean()))
    assert left[0] < 0.35
    assert left[1] > left[0] + 0.1


# --------------------------------------------------------------------------------- what they cost


@pytest.mark.parametrize(
    ("method", "known", "hidden"),
    [(RayS(9, eot=4), 9 + 1, 9 * 4), (SPSA(3, 5, eot=2), 3 * (10 + 1), 3 * 5 * 2 * 2)],
)
def test_evaluations_are_counted_for_each_image(method: Any, known: int, hidden: int) -> None:
    """An image that falls takes fewer; one that is wrong from the start takes one."""
    bare, group, _ = linear(6)
    defense = Defense(Noisy(1e-3, 1e-3), bare.classifier)
    labels = torch.where(torch.arange(6) < 4, group.labels, 1 - group.labels)
    mixed = Group(group.images, labels, range(6))
    here = search(defense, method, mixed, Linf(1e-4))
    assert here.forward.tolist() == [known] * 4 + [1] * 2
    assert method.evaluations(Setup(hidden=False)).forward == known
    for knows in (NOTHING, frozenset({FORWARD})):
        there = search(defense, method, mixed, Linf(1e-4), knows)
        assert there.forward.tolist() == [hidden] * 6
    assert method.evaluations(Setup(hidden=True)).forward == hidden
    assert torch.equal(here.images[4:], group.images[4:])


@pytest.mark.parametrize("method", [RayS(200), SPSA(40, 8)])
def test_finished_images_cost_no_more_and_stay_wrong(method: Any) -> None:
    defense, group, distance = linear(12)
    found = search(defense, method, group, Linf(float(distance.median())))
    fell = wrong(defense, found, group)
    most = method.evaluations(Setup(hidden=False)).forward
    assert found.forward[~fell].tolist() == [most] * int((~fell).sum())
    assert bool((found.forward[fell] < most).all())
    assert 2 < int(fell.sum()) < 12


@pytest.mark.parametrize("method", [RayS(20), SPSA(3, 4)])
def test_no_image_is_finished_by_the_logits_of_a_vote(method: Any) -> None:
    bare, group, _ = linear(4)
    defense = Defense(Noisy(0.01, 0.01), bare.classifier, votes=3)
    found = search(defense, method, group, Linf(0.3))
    assert len(set(found.forward.tolist())) == 1


@pytest.mark.parametrize(
    ("method", "ball", "says"),
    [
        (RayS(2), L2(1.0), "rays: searches linf budgets only"),
        (SPSA(2), L1(1.0), "spsa: searches linf and l2 budgets only"),
    ],
)
def test_a_budget_that_is_not_searched_is_refused(method: Any, ball: Budget, says: str) -> None:
    defense, group, _ = linear(2)
    with pytest.raises(AttackFailed, match=says):
        search(defense, method, group, ball)


def test_attacks_by_name() -> None:
    options: dict[str, Any] = {"n_queries": 9, "tolerance": "1/255", "eot": 2}
    assert make("rays", options) == RayS(9, 1 / 255, 2)
    assert make("spsa", {"steps": 3, "loss": "ce"}) == SPSA(3, loss="ce")


def test_no_progress_is_made_up_where_logits_are_noise() -> None:
    """A mean of differences over shared guesses is exactly zero there."""
    defense = Defense(Made(lambda x, n: n.normal(FORWARD, 0, x)), Echo())
    images = uniform(5, 1, 4, 4)
    estimate = SPSA(1, 8).gradient(view_of(defense, 5, NOTHING), images, torch.arange(5), 0)
    assert torch.equal(estimate, torch.zeros_like(images))


def test_blocks_halve_down_to_single_pixels() -> None:
    """Where no flip helps, each decision is about the next block (Chen and Gu, algorithm 3)."""
    right = Linear(torch.zeros(12), -1.0)
    images = torch.full((1, 1, 3, 4), 0.5)
    tapes = Tape.make(0, VICTIM, [0]), Tape.make(0, ATTACKER, [0])
    spy = Spy(Defense(Identity(), right), BOTH, *tapes, 4096)
    RayS(1 + 2 + 4 + 6 + 12 + 12)(spy, images, torch.zeros(1).long(), Linf(0.1))
    sizes = [int((asked < 0.5).sum()) for asked, _ in spy.asked[1:]]
    assert sizes == [12] + [6] * 2 + [3] * 4 + [2] * 6 + [1] * 24
