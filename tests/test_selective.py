"""The selective attack follows the draws it can win; it is PGD where there is no choice."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from dbp_bench.attacks import make
from dbp_bench.attacks.pgd import PGD
from dbp_bench.attacks.selective import Selective, shares
from dbp_bench.defense import Defense
from dbp_bench.evaluation import Attacked, Group, attack
from dbp_bench.noise import FORWARD, Noise, Site
from dbp_bench.threat import L2, Attack, Budget, Evaluations, Linf, Setup
from toys import BOTH, Noisy, Small, group, is_right, normal

BALLS: list[Budget] = [Linf(0.05), L2(0.3)]
NONE = frozenset[Site]()


def search(
    of: Defense, method: Attack, images: Group, ball: Budget, knows: frozenset[Site] = NONE
) -> Attacked:
    return attack(of, method, images, ball, knows, seed=0, victim_draw=0, max_batch=4096)


# --------------------------------------------------------------------- nothing to choose from


@pytest.mark.parametrize("ball", BALLS)
def test_one_draw_is_pgd(ball: Budget) -> None:
    of, defense = group(6, size=8), Defense(Noisy(0.1, 0.1), Small())
    want = search(defense, PGD(3, 0.4, 1, "margin"), of, ball)
    found = search(defense, Selective(3, 0.4, 1, "margin"), of, ball)
    assert torch.equal(found.images, want.images)
    assert torch.equal(found.gradient, want.gradient)


@pytest.mark.parametrize("ball", BALLS)
def test_known_draws_are_pgd_at_the_same_cost(ball: Budget) -> None:
    of, defense = group(6, size=8), Defense(Noisy(0.1, 0.1), Small())
    want = search(defense, PGD(3, 0.4, 4, "margin"), of, ball, BOTH)
    found = search(defense, Selective(3, 0.4, 4), of, ball, BOTH)
    assert torch.equal(found.images, want.images)
    assert found.gradient.tolist() == [3] * 6


def test_without_sharpness_it_is_pgd_with_eot_at_the_same_cost() -> None:
    of, defense = group(6, size=8), Defense(Noisy(0.1, 0.1), Small())
    want = search(defense, PGD(3, 0.4, 4, "margin"), of, L2(0.3))
    found = search(defense, Selective(3, 0.4, 4, sharpness=0.0), of, L2(0.3))
    torch.testing.assert_close(found.images, want.images, atol=1e-5, rtol=0)
    assert found.gradient.tolist() == [12] * 6


# ------------------------------------------------------------------------ what draws weigh


AXES = torch.eye(4).view(4, 1, 1, 2, 2)


def test_weights_of_two_equal_draws_and_one_across() -> None:
    """Along the direction that two share, the losses become 1, 1 and 0."""
    each = torch.stack([AXES[1], AXES[0], AXES[0]])
    weights = shares(each, torch.zeros(3, 1), L2(1.0), 2.0, 1)[:, 0]
    want = torch.sigmoid(2.0 * torch.tensor([0.0, 1.0, 1.0]))
    torch.testing.assert_close(weights, want / want.sum())


def test_the_direction_follows_the_weights() -> None:
    """In the second round it is the ascent of the weighted mean, here at an angle to both."""
    each = torch.stack([AXES[0], AXES[1]])
    losses = torch.tensor([[1.0], [0.5]])
    # The second draw's direction starts: it promises 0.73 + 0.82 wins, the first's 0.88 + 0.62.
    first = torch.sigmoid(torch.tensor([1.0, 1.5]))
    direction = first / first.norm()
    want = torch.sigmoid(torch.tensor([1.0, 0.5]) + direction)
    weights = shares(each, losses, L2(1.0), 1.0, 2)[:, 0]
    torch.testing.assert_close(weights, want / want.sum())


def test_a_number_of_draws_counts_and_not_their_size() -> None:
    """One draw with a large gradient promises one win, two with small ones promise two."""
    each = torch.stack([100 * AXES[1], AXES[0], AXES[0]])
    weights = shares(each, torch.full((3, 1), -0.5), L2(1.0), 50.0, 1)[:, 0]
    torch.testing.assert_close(weights, torch.tensor([0.0, 0.5, 0.5]))


def test_draws_that_cannot_be_won_do_not_count() -> None:
    each = torch.stack([AXES[0], AXES[0], AXES[1]])
    losses = torch.tensor([[-1.0], [-1.0], [-50.0]])
    weights = shares(each, losses, L2(2.0), 5.0, 3)[:, 0]
    torch.testing.assert_close(weights, torch.tensor([0.5, 0.5, 0.0]))


@pytest.mark.parametrize("level", [-1e4, 1e4])
def test_far_from_the_boundary_weights_are_finite(level: float) -> None:
    each = torch.stack([AXES[0], AXES[0]])
    weights = shares(each, torch.full((2, 1), level), Linf(0.1), 10.0, 2)[:, 0]
    torch.testing.assert_close(weights, torch.tensor([0.5, 0.5]))


def test_images_do_not_mix() -> None:
    each, losses = normal(5, 2 * 16).view(5, 2, 1, 4, 4), normal(5, 2, seed=1)
    weights = shares(each, losses, Linf(0.1), 2.0, 3)
    torch.testing.assert_close(weights.sum(0), torch.ones(2))
    for i in range(2):
        alone = shares(each[:, [i]], losses[:, [i]], Linf(0.1), 2.0, 3)
        torch.testing.assert_close(alone[:, 0], weights[:, i])


# -------------------------------------------------------------------------------- two kinds
#
# Half of the draws are lost to the attacker: there the gradient is noise, large, and without an
# effect on the label. At all others, the label changes as soon as a pixel of the right kind moves
# far enough along one direction that is common to these draws.

PIXELS = 64
COMMON = normal(1, PIXELS, seed=7)[0].sign()
EPS = 0.1


@dataclass(frozen=True)
class TwoKinds:
    """Writes the kind of the draw, and its noise, into a second and a third channel."""

    sites: frozenset[Site] = frozenset({FORWARD})

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        kind = (noise.normal(FORWARD, 0, images[:, :1, :1, :1]) > 0).float()
        return torch.cat([images, kind.expand_as(images), noise.normal(FORWARD, 1, images)], 1)


class Halves(nn.Module):
    """Label 0 survives while the pixels along COMMON stay below a bound, or at half the draws."""

    def forward(self, images: Tensor) -> Tensor:
        x, kind, noise = (images[:, i].flatten(1) for i in range(3))
        common = (x - 0.5) @ COMMON / (EPS * PIXELS) - 0.8
        lost = 6 * ((x - 0.5) * noise).sum(1) / (EPS * PIXELS) - 9
        return torch.stack([torch.zeros(len(x)), torch.where(kind[:, 0] > 0, common, lost)], 1)


def robust(method: Attack) -> float:
    of = Group(torch.full((60, 1, 8, 8), 0.5), torch.zeros(60).long(), range(60))
    defense = Defense(TwoKinds(), Halves())
    found = search(defense, method, of, Linf(EPS))
    assert found.gradient.tolist() == [8 * 10] * 60
    right = [is_right(defense, found.images, of, d) for d in range(40)]
    return float(torch.stack(right).double().mean())


def test_half_of_the_draws_are_noise() -> None:
    """No attack gets below 1/2. At equal effort plain EoT stays far above, this one does not."""
    plain, even, chosen = (
        robust(method)
        for method in (
            PGD(8, 0.25, 10, "margin"),
            Selective(8, 0.25, 10, "margin", sharpness=0.0),
            Selective(8, 0.25, 10, "margin", sharpness=5.0),
        )
    )
    assert plain > 0.9
    assert even > 0.9
    assert chosen < 0.6


# --------------------------------------------------------------------------- its declaration


def test_its_declaration() -> None:
    options = {"steps": 3, "step_size": 0.5, "eot": 2, "sharpness": 5, "rounds": 2}
    made = make("selective", options)
    assert made == Selective(3, 0.5, 2, "margin", 5.0, 2)
    assert made.evaluations(Setup(hidden=False)) == Evaluations(3, 0, exact=True)
    assert made.evaluations(Setup(hidden=True)) == Evaluations(6, 0, exact=True)


@pytest.mark.parametrize(
    ("key", "value"), [("sharpness", -1), ("rounds", 0), ("loss", "ce-targeted")]
)
def test_a_bad_option_is_refused(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{key}: input should be"):
        make("selective", {key: value})
