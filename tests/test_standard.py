"""The standard attack: known optima in each norm, its budget, and where gradients are masked."""

import pytest
import torch
from torch import Tensor, nn

from dbp_bench.attacks import make
from dbp_bench.attacks.pgd import PGD
from dbp_bench.attacks.standard import Standard
from dbp_bench.defense import Defense, Identity
from dbp_bench.evaluation import Attacked, Group, attack
from dbp_bench.noise import FORWARD, Noise, Site
from dbp_bench.threat import L1, L2, Budget, Linf, Setup
from toys import BOTH, Linear, Made, Noisy, TwoSided, is_right, normal, uniform

WEIGHT = normal(1, 16, seed=5)[0]


def searched(
    of: Defense,
    group: Group,
    ball: Budget,
    budget: int = 200,
    knows: frozenset[Site] = BOTH,
) -> Attacked:
    return attack(
        of,
        Standard(budget),
        group,
        ball,
        knows & of.sites,
        seed=0,
        victim_draw=0,
        max_batch=4096,
    )


def linear() -> tuple[Linear, Group]:
    """A linear classifier and 200 images, most of which it gets right."""
    images = uniform(200, 1, 4, 4)
    classifier = Linear(WEIGHT, -float(WEIGHT.sum()) / 2)
    labels = (classifier.score(images) + normal(200, 1)[:, 0] * 0.3 > 0).long()
    return classifier, Group(images, labels, range(200))


def test_the_optimum_of_a_linear_classifier_in_linf() -> None:
    classifier, group = linear()
    defense = Defense(Identity(), classifier)
    found = searched(defense, group, Linf(0.05))
    sign = (2 * group.labels - 1).float()
    worst = group.images - 0.05 * sign.view(-1, 1, 1, 1) * WEIGHT.sign().view(4, 4)
    margin = sign * classifier.score(worst.clamp(0, 1)).detach()
    assert torch.equal(is_right(defense, found.images, group), margin > 0)


def test_the_optimum_of_a_linear_classifier_in_l2() -> None:
    classifier, group = linear()
    group = Group(0.4 + 0.2 * group.images, group.labels, group.ids)  # the box never binds
    defense = Defense(Identity(), classifier)
    found = searched(defense, group, L2(0.1))
    sign = (2 * group.labels - 1).float()
    margin = sign * classifier.score(group.images).detach() - 0.1 * float(WEIGHT.norm())
    apart = margin.abs() > 1e-4
    assert torch.equal(is_right(defense, found.images, group)[apart], (margin > 0)[apart])


def test_the_optimum_among_a_hundred_classes() -> None:
    """A linear classifier: each wrong class has an optimum of its own, and few are aimed at."""
    weights = normal(100, 64, seed=7) / 8

    class Hundred(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1) @ weights.T

    images = 0.3 + 0.4 * uniform(200, 1, 8, 8)  # the box never binds
    logits = images.flatten(1) @ weights.T
    labels = logits.argmax(1)
    apart = weights[:, None] - weights[None, :]
    reach = logits + 0.03 * apart[:, labels].abs().sum(2).T
    best = reach - logits.gather(1, labels[:, None])
    foolable = best.scatter(1, labels[:, None], -torch.inf).amax(1) > 1e-4
    found = searched(
        Defense(Identity(), Hundred()), Group(images, labels, range(200)), Linf(0.03)
    ).images
    fooled = (found.flatten(1) @ weights.T).argmax(1) != labels
    assert 0.3 < float(foolable.float().mean()) < 0.9
    assert torch.equal(fooled, foolable)


def test_an_image_is_finished_once_it_is_misclassified() -> None:
    classifier, group = linear()
    found = searched(Defense(Identity(), classifier), group, Linf(0.05))
    right = is_right(Defense(Identity(), classifier), found.images, group)
    clean = is_right(Defense(Identity(), classifier), group.images, group)
    assert (found.gradient[right] == 200).all()
    assert (found.gradient[~right] < 200).all()
    assert (found.gradient[~clean] == 0).all()


@pytest.mark.parametrize("budget", [1, 7, 20, 100, 200, 333])
@pytest.mark.parametrize("classes", [2, 3, 10, 100])
def test_known_draws_take_the_budget_and_no_more(budget: int, classes: int) -> None:
    """Nothing fools a classifier whose label's logit is far above: every leg is walked."""

    class Sure(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            rest = images.flatten(1)[:, :1] * torch.linspace(0, 1, classes)
            return rest + 100 * torch.eye(classes)[0]

    group = Group(uniform(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64), range(2))
    found = searched(Defense(Identity(), Sure()), group, Linf(0.1), budget)
    planned = Standard(budget).evaluations(Setup(hidden=False, classes=classes))
    assert found.gradient.tolist() == [budget, budget]
    assert (found.forward <= planned.forward).all()
    assert planned.gradient == budget


def test_the_last_leg_begins_at_the_best_image_so_far() -> None:
    """Six legs of 10 steps begin at the clean image; the one of 40 goes on from what they found."""
    weights = normal(10, 16, seed=3)
    seen: list[Tensor] = []
    ahead: list[Tensor] = []

    class Waves(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            rest = torch.sin(3 * images.flatten(1) @ weights.T)
            logits = rest + 100 * torch.eye(10)[0]
            if len(images) == 5:  # there is a first pass of one image
                seen.append(images.detach().clone())
                ahead.append(logits[:, 1:].amax(1).detach() - logits[:, 0].detach())
            return logits

    images = uniform(5, 1, 4, 4)
    group = Group(images, torch.zeros(5, dtype=torch.int64), range(5))
    searched(Defense(Identity(), Waves()), group, Linf(0.2), 100)
    starts = [1 + 11 * leg for leg in range(7)]
    assert all(torch.equal(seen[start], images) for start in starts[:-1])
    best = torch.stack(ahead[: starts[-1]]).argmax(0)
    assert torch.equal(seen[starts[-1]], torch.stack([seen[i][n] for n, i in enumerate(best)]))
    assert (best > 0).all()


def test_hidden_draws_take_two_samples_a_step() -> None:
    defense = Defense(Noisy(0.1, 0.1), TwoSided(WEIGHT, 1.0))
    group = Group(uniform(3, 1, 4, 4), torch.ones(3, dtype=torch.int64), range(3))
    assert searched(defense, group, Linf(0.1), 21, frozenset()).gradient.tolist() == [20, 20, 20]
    assert Standard(1).unfit(Setup(hidden=True)) is not None
    assert Standard(1).unfit(Setup(hidden=False)) is None


@pytest.mark.parametrize("budget", [799, 800, 803])
def test_a_long_search_takes_the_budget_and_no_more(budget: int) -> None:
    """Nothing fools a classifier whose label's logit is far above; a part of the draws is known."""

    class Sure(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1)[:, :4] * torch.linspace(0, 1, 4) + 100 * torch.eye(4)[0]

    group = Group(uniform(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64), range(2))
    defense = Defense(Noisy(0.1, 0.1), Sure())
    found = searched(defense, group, Linf(0.1), budget, frozenset({FORWARD}))
    planned = Standard(budget).evaluations(Setup(hidden=True, classes=4))
    assert (budget - 2 < found.gradient).all()
    assert (found.gradient <= planned.gradient).all()
    assert planned.gradient <= budget
    assert (found.forward <= planned.forward).all()


def test_a_long_search_aims_where_a_hidden_draw_hardly_matters() -> None:
    """The nearest wrong class rises first, and stops short; another one is in reach behind it."""

    class Two(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            s = 40 * (images - 0.5).flatten(1).mean(1)
            return torch.stack([torch.zeros_like(s), torch.tanh(s) - 1.05, -s - 2], 1)

    images = 0.5 + 0.02 * (uniform(20, 1, 4, 4) - 0.5)
    group = Group(images, torch.zeros(20, dtype=torch.int64), range(20))
    defense = Defense(Noisy(0.001, 0.001), Two())

    def left(budget: int, knows: frozenset[Site]) -> float:
        found = searched(defense, group, Linf(0.1), budget, knows).images
        draws = range(1 << 32, (1 << 32) + 8)
        return float(
            torch.stack([is_right(defense, found, group, d) for d in draws]).float().mean()
        )

    assert left(800, frozenset({FORWARD})) == 0
    assert left(799, frozenset({FORWARD})) == left(800, frozenset()) == 1


@pytest.mark.parametrize("scale", [1e-3, 1e3])
@pytest.mark.parametrize("knows", [frozenset(), frozenset({FORWARD})])
def test_the_scale_of_the_logits_changes_nothing(scale: float, knows: frozenset[Site]) -> None:
    """Twenty classes: the log-odds of close logits are above 0 where the label is still ahead."""
    weights = 10 * normal(20, 16, seed=3)

    class Some(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, images: Tensor) -> Tensor:
            return self.factor * (images.flatten(1) @ weights.T)

    images = uniform(100, 1, 4, 4)
    group = Group(images, Some(1.0)(images).argmax(1), range(100))
    usual, other = (
        searched(Defense(Noisy(0.05, 0.05), Some(factor)), group, Linf(0.05), 100, knows)
        for factor in (1.0, scale)
    )
    assert torch.allclose(usual.images, other.images, atol=1e-4)
    assert torch.equal(usual.gradient, other.gradient)
    draw = 1 << 32
    defense = Defense(Noisy(0.05, 0.05), Some(scale))
    clean = is_right(defense, group.images, group, draw).float().mean()
    left = is_right(defense, other.images, group, draw).float().mean()
    assert float(clean) > 0.8
    assert float(left) < 0.5


def test_an_image_that_hidden_draws_cannot_save_is_finished() -> None:
    """Some images are lost under any draw; those that a draw may save take the whole budget."""
    classifier, group = linear()
    defense = Defense(Noisy(0.02, 0.02), classifier)
    found = searched(defense, group, Linf(0.05), 200, frozenset())
    draws = range(1 << 32, (1 << 32) + 32)
    right = torch.stack([is_right(defense, found.images, group, draw) for draw in draws])
    robust = right.float().mean(0)
    finished = found.gradient < 200
    assert 0.2 < float(finished.float().mean()) < 0.9
    assert 20 <= found.gradient.min() <= 40
    assert float(robust[finished].max()) <= 1 / 32
    assert (found.gradient[robust > 0.1] == 200).all()


@pytest.mark.parametrize("knows", [frozenset(), BOTH])
@pytest.mark.parametrize("label", [0, 1])
def test_no_weaker_than_pgd_at_equal_evaluations(knows: frozenset[Site], label: int) -> None:
    """A defense for which the way to push depends on the noise, from both of its sides."""
    defense = Defense(Noisy(0.1, 0.1), TwoSided(WEIGHT, 1.0))
    group = Group(uniform(300, 1, 4, 4), torch.full((300,), label), range(300))
    own = searched(defense, group, Linf(0.1), 200, knows)
    other = attack(defense, PGD(20), group, Linf(0.1), knows, seed=0, victim_draw=0, max_batch=4096)
    draws = [0] if knows else range(1 << 32, (1 << 32) + 32)

    def accuracy(found: Tensor) -> float:
        right = torch.stack([is_right(defense, found, group, draw) for draw in draws])
        return float(right.float().mean())

    assert accuracy(own.images) <= accuracy(other.images) + 0.003


@pytest.mark.parametrize("size", [0.0, 1e4])
def test_gradients_that_explode_now_and_then_do_not_lead_astray(size: float) -> None:
    """In a third of the draws the gradient is enormous, and points anywhere."""
    classifier, group = linear()

    def purify(images: Tensor, noise: Noise) -> Tensor:
        drawn = noise.normal(FORWARD, 0, images)
        huge = size * (drawn[:, :, :1, :1] > 0.4) * drawn.sign()
        return images + 0.02 * drawn + huge * (images - images.detach())

    found = searched(Defense(Made(purify), classifier), group, Linf(0.05), 200, frozenset())
    draws = range(1 << 32, (1 << 32) + 32)
    best = searched(Defense(Identity(), classifier), group, Linf(0.05)).images
    defense = Defense(Made(purify), classifier)

    def accuracy(images: Tensor) -> float:
        right = torch.stack([is_right(defense, images, group, draw) for draw in draws])
        return float(right.float().mean())

    assert accuracy(found.images) <= accuracy(best) + 0.01


class Rounded(nn.Module):
    """A linear classifier of images that were rounded to a few levels: no gradient anywhere."""

    def forward(self, images: Tensor) -> Tensor:
        score = ((images * 16).round() / 16).flatten(1) @ WEIGHT - WEIGHT.sum() / 2
        score = score + 0 * images.flatten(1).sum(1)
        return torch.stack([-score, score], 1)


@pytest.mark.parametrize("ball", [Linf(0.2), L2(0.5), L1(1.0)])
def test_a_masked_gradient_is_searched_without(ball: Budget) -> None:
    _, group = linear()
    defense = Defense(Identity(), Rounded())
    found = searched(defense, group, ball, 100)
    right = is_right(defense, group.images, group)
    assert not found.nonzero.any()
    fooled = float((right & ~is_right(defense, found.images, group)).float().sum() / right.sum())
    assert fooled == 0 if isinstance(ball, L1) else fooled > 0.5


def test_the_budget_is_its_only_option() -> None:
    with pytest.raises(ValueError, match="steps"):
        make("standard", {"steps": 20})
