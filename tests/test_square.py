"""Square needs no gradient, reaches known optima, and is not taken in by lucky draws."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dbp_bench.attacks import make
from dbp_bench.attacks.common.objectives import SELECTION, margin
from dbp_bench.attacks.square import Square, side
from dbp_bench.defense import Defense, Identity
from dbp_bench.errors import AttackFailed
from dbp_bench.evaluation import Group
from dbp_bench.extras import load_extra
from dbp_bench.noise import ATTACKER, FORWARD, VICTIM, Noise, Site, Tape, seeded
from dbp_bench.threat import L1, L2, AttackerView, Budget, Linf
from toys import BOTH, NOTHING, Echo, Linear, Made, Noisy, normal, search, uniform, view_of

WEIGHT = normal(1, 16, seed=5)[0]
BALLS = [Linf(0.1), L2(0.4)]


def linear(n: int) -> tuple[Defense, Group]:
    """A linear classifier and images that it gets right, by a margin."""
    images = 0.3 + 0.4 * uniform(n, 1, 4, 4)
    classifier = Linear(WEIGHT, -float(WEIGHT.sum()) / 2)
    labels = (classifier.score(images) > 0).long()
    return Defense(Identity(), classifier), Group(images, labels, range(n))


# ------------------------------------------------------------------------------- known optima


@pytest.mark.parametrize(("ball", "share"), [(Linf(0.1), 0.99), (L2(0.3), 0.55)])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_optimum_of_a_linear_classifier(
    monkeypatch: pytest.MonkeyPatch, ball: Budget, share: float, noise: float
) -> None:
    """Within 1 % in the cube, whose corners it visits.

    Not so in the l2 ball: there its bumps are 3 pixels wide at least, which is most of this image.
    """
    bare, group = linear(8)
    defense = Defense(Noisy(noise, noise), bare.classifier)
    monkeypatch.setattr(Square, "retire", False)
    found = Square(200, 0.8, 1)(view_of(defense, 8, NOTHING), group.images, group.labels, ball)
    dual = WEIGHT.abs().sum() if isinstance(ball, Linf) else WEIGHT.norm()
    clean, new = (margin(bare.classifier(x), group.labels) for x in (group.images, found))
    gained = (new - clean) / (ball.eps * dual)
    assert float(gained.max()) <= 1 + 1e-5
    # Noise in the score of a linear classifier is the same for candidate and incumbent.
    assert float(gained.min()) >= share


def test_no_gradient_is_asked_for() -> None:
    defense, group = linear(6)
    found = search(defense, Square(20, 0.8, 3), group, Linf(1e-4))
    assert found.gradient.tolist() == [0] * 6
    assert found.forward.tolist() == [22] * 6, "the clean image, the stripes, and each candidate"
    hidden = search(
        Defense(Noisy(0.1, 0.1), defense.classifier), Square(20, 0.8, 3), group, Linf(0.01), NOTHING
    )
    assert hidden.forward.tolist() == [21 * 2 * 3] * 6, "two at each comparison, and two at the end"


# --------------------------------------------------------------------------------- the search


def test_squares_shrink_as_in_the_paper() -> None:
    """Shares: p = 0.8 of 32 x 32 pixels at first, halved at 10, 50, 200, ... of 10,000 queries."""
    sides = [side(q, 10_000, 0.8, 32, 32) for q in (0, 10, 11, 51, 201, 501, 8001)]
    assert sides == [29, 29, 20, 14, 10, 7, 1]
    assert side(600, 1000, 0.8, 32, 32) == side(6000, 10_000, 0.8, 32, 32), "rescaled"
    assert side(0, 10, 1.0, 4, 9) == 4, "never larger than the image"


@pytest.mark.parametrize("knows", [NOTHING, BOTH])
@pytest.mark.parametrize("ball", BALLS)
@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 8, 8), (2, 7, 11)])
def test_every_candidate_is_feasible(
    monkeypatch: pytest.MonkeyPatch,
    ball: Budget,
    knows: frozenset[Site],
    shape: tuple[int, int, int],
) -> None:
    images = uniform(5, *shape)
    seen: list[Tensor] = []

    def look(x: Tensor, noise: Noise) -> Tensor:
        seen.append(x.detach().clone())
        return x + 0.1 * noise.normal(FORWARD, 0, x)

    weight = normal(1, images[0].numel())[0]
    defense = Defense(Made(look), Linear(weight), (), "none")
    monkeypatch.setattr(Square, "retire", False)
    Square(40, 0.8, 1)(view_of(defense, 5, knows), images, torch.arange(5) % 2, ball)
    moved = 0
    for x in seen:
        assert bool(((x >= 0) & (x <= 1)).all())
        assert bool((ball.size(x - images) <= ball.eps + 1e-6).all())
        moved += bool((ball.size(x - images) > 0.5 * ball.eps).all())
    assert moved >= 30


def test_an_image_is_searched_alike_in_any_batch() -> None:
    defense, group = linear(6)
    balls: list[Budget] = [Linf(0.1), L2(0.4)]
    for ball in balls:
        whole = Square(30, 0.8, 1)(view_of(defense, 6), group.images, group.labels, ball)
        part = torch.tensor([4, 1])
        own = Square(30, 0.8, 1)(
            view_of(defense, 6)[part], group.images[part], group.labels[part], ball
        )
        torch.testing.assert_close(own, whole[part])


# ----------------------------------------------------------------------------- hidden, known


@pytest.mark.parametrize("ball", BALLS)
def test_no_progress_on_a_constant_model(ball: Budget) -> None:
    """Logits that are noise alone: the clean image must come out."""
    defense = Defense(Made(lambda x, n: n.normal(FORWARD, 0, x)), Echo())
    images = uniform(20, 1, 4, 4)
    found = Square(30, 0.8, 2)(view_of(defense, 20, NOTHING), images, torch.arange(20) % 16, ball)
    assert torch.equal(found, images)


def test_a_remembered_lucky_draw_is_caught() -> None:
    """The mutant compares each candidate, on draws of its own, with the best loss so far."""
    defense = Defense(Made(lambda x, n: n.normal(FORWARD, 0, x)), Echo())
    images, labels = uniform(20, 1, 4, 4), torch.arange(20) % 16

    class Mutant(AttackerView):
        """Gives every evaluation draws of its own."""

        asked = 0

        def logits(self, images: Tensor, draws: Any) -> Tensor:
            Mutant.asked += 1
            shift = 1000 * Mutant.asked
            return super().logits(images, [draw + shift for draw in draws])

    tapes = Tape.make(0, VICTIM, range(20)), Tape.make(0, ATTACKER, range(20))
    found = Square(30, 0.8, 2)(Mutant(defense, NOTHING, *tapes, 4096), images, labels, Linf(0.1))
    assert not torch.equal(found, images)


def test_candidate_and_incumbent_share_draws_that_are_fresh_at_each_query() -> None:
    asked: list[list[int]] = []

    class Spy(AttackerView):
        def logits(self, images: Tensor, draws: Any) -> Tensor:
            asked.append(list(draws))
            return super().logits(images, draws)

    tapes = Tape.make(0, VICTIM, range(3)), Tape.make(0, ATTACKER, range(3))
    spy = Spy(Defense(Noisy(0.1, 0.1), Echo()), NOTHING, *tapes, 4096)
    Square(5, 0.8, 4)(spy, uniform(3, 1, 4, 4), torch.arange(3), Linf(0.1))
    pairs = [asked[i : i + 2] for i in range(0, len(asked), 2)]
    assert len(pairs) == 6
    assert all(one == other and len(one) == 4 for one, other in pairs)
    assert len({draw for one, _ in pairs for draw in one}) == 6 * 4
    assert min(pairs[-1][0]) == SELECTION, "the last verdict is on draws of its own"


@pytest.mark.parametrize("ball", BALLS)
def test_retirement_changes_nothing_but_the_calls(
    monkeypatch: pytest.MonkeyPatch, ball: Budget
) -> None:
    images = uniform(24, 1, 4, 4)
    defense = Defense(Noisy(0.1, 0.1), Linear(WEIGHT, -float(WEIGHT.sum()) / 2))
    own = view_of(defense, 24).logits(images, [0])[:, 0].argmax(1)
    group = Group(images, torch.where(torch.arange(24) < 20, own, 1 - own), range(24))
    soon = search(defense, Square(60, 0.8, 3), group, ball)
    monkeypatch.setattr(Square, "retire", False)
    late = search(defense, Square(60, 0.8, 3), group, ball)
    torch.testing.assert_close(soon.images, late.images, atol=1e-6, rtol=0)
    wrong = view_of(defense, 24).logits(soon.images, [0])[:, 0].argmax(1) != group.labels
    assert late.forward.tolist() == [62] * 24
    assert soon.forward[~wrong].tolist() == [62] * int((~wrong).sum())
    assert soon.forward[20:].tolist() == [1] * 4, "wrong without any change"
    assert torch.equal(soon.images[20:], images[20:])
    assert 4 < int(wrong.sum()) < 24


@pytest.mark.extras
@pytest.mark.parametrize(("norm", "ball"), [("Linf", Linf(0.05)), ("L2", L2(0.5))])
def test_at_equal_queries_as_strong_as_pyautoattack(norm: str, ball: Budget) -> None:
    """Theirs draws one place for the whole batch, so that only means can be compared."""
    n, queries = 60, 300
    images = 0.2 + 0.6 * uniform(n, 1, 8, 8)
    first, last = normal(64, 32, seed=7) * 0.5, normal(32, 5, seed=8) * 0.6

    def model(x: Tensor) -> Tensor:
        return ((x - 0.5).flatten(1) @ first).tanh() @ last

    class Smooth(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return model(x)

    labels = model(images).argmax(1)
    package = load_extra("autoattack")["square"]
    method = package.SquareAttack(
        model, norm=norm, n_queries=queries, eps=ball.eps, p_init=0.8, device="cpu"
    )
    with seeded(0):
        theirs = method.perturb(images, labels)
    own = Square(queries, 0.8, 1)(view_of(Defense(Identity(), Smooth()), n), images, labels, ball)
    right, wanted = (float((model(x).argmax(1) == labels).float().mean()) for x in (own, theirs))
    assert 0.05 < wanted < 0.95
    assert right <= wanted + 0.1


def test_a_budget_that_it_does_not_search_is_refused() -> None:
    defense, group = linear(2)
    with pytest.raises(AttackFailed, match="square: searches linf and l2"):
        search(defense, Square(2, 0.8, 1), group, L1(1.0))


def test_an_attack_by_name() -> None:
    assert make("square", {"n_queries": 9, "p_init": 0.3, "eot": 2}) == Square(9, 0.3, 2)
