"""The ensemble returns the candidate that really hurts most, and never the luckiest."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from dbp_bench.attacks import make
from dbp_bench.attacks.apgd import APGD
from dbp_bench.attacks.common.objectives import SELECTION
from dbp_bench.attacks.ensemble import COMPARISON, Ensemble, strongest
from dbp_bench.attacks.pgd import PGD
from dbp_bench.attacks.square import Square
from dbp_bench.defense import Defense, Identity
from dbp_bench.errors import AttackFailed
from dbp_bench.evaluation import Group, attack
from dbp_bench.noise import FORWARD, Noise
from dbp_bench.threat import AttackerView, AttackLog, Budget, Evaluations, Linf, Method, Setup
from toys import Made, TwoSided, is_right, normal, uniform

PIXELS = 16


class Brightness(nn.Module):
    """Class 1 where the mean pixel exceeds 0.5, by a steep margin."""

    def forward(self, images: Tensor) -> Tensor:
        score = 20 * (images.flatten(1).mean(1) - 0.5)
        return torch.stack([-score, score], 1)


@dataclass
class Shift:
    """Moves all pixels of the images it is given by `amount(images)`; remembers how many."""

    amount: Callable[[Tensor], Tensor]
    seen: list[int] = field(default_factory=list)

    def __call__(
        self, view: AttackerView, images: Tensor, labels: Tensor, budget: Budget
    ) -> Tensor:
        self.seen.append(len(images))
        return images + self.amount(images).view(-1, 1, 1, 1)


def constant(value: float) -> Callable[[Tensor], Tensor]:
    return lambda images: torch.full((len(images),), value)


def bright(n: int, levels: Sequence[float]) -> Group:
    values = torch.tensor(list(levels)).repeat(n).view(-1, 1, 1, 1)
    images = values.expand(-1, 1, 4, 4).contiguous()
    return Group(images, torch.ones(len(images), dtype=torch.int64), range(len(images)))


def static(images: Tensor, noise: Noise) -> Tensor:
    """Noise on the mean pixel, of standard deviation 0.1."""
    return images + 0.4 * noise.normal(FORWARD, 0, images)


def together(members: Sequence[Method], compare: int) -> Method:
    """The search of an ensemble of any `members`."""
    return partial(strongest, members, compare)


def run(method: Method, batch: Group, *, hidden: bool, eps: float = 0.2) -> Tensor:
    defense = Defense(Made(static) if hidden else Identity(), Brightness())
    out = attack(
        defense, method, batch, Linf(eps), frozenset(), seed=0, victim_draw=0, max_batch=1 << 14
    )
    return out.images - batch.images


@pytest.mark.parametrize("hidden", [False, True])
def test_the_candidate_that_hurts_most_is_returned(hidden: bool) -> None:
    """Of shifts by -0.05, -0.1 and +0.1, the second; in whatever order they come."""
    batch = bright(20, [0.62])
    for order in ([-0.05, -0.1, 0.1], [0.1, -0.1, -0.05], [-0.1, 0.1, -0.05]):
        method = together([Shift(constant(value)) for value in order], 64)
        moved = run(method, batch, hidden=hidden)
        torch.testing.assert_close(moved, torch.full_like(moved, -0.1))


def test_each_image_has_its_own_best_member() -> None:
    batch = bright(1, [0.55, 0.65, 0.75])

    def only(level: float) -> Callable[[Tensor], Tensor]:
        return lambda images: -0.2 * ((images[:, 0, 0, 0] - level).abs() < 0.01)

    moved = run(together([Shift(only(0.55)), Shift(only(0.65))], 1), batch, hidden=False)
    want = torch.tensor([-0.2, -0.2, 0.0])
    torch.testing.assert_close(moved[:, 0, 0, 0], want, msg="the clean image is a candidate, too")


def test_members_that_change_nothing_make_no_progress() -> None:
    """Best of many equal candidates: accuracy on other draws stays what it was."""
    batch = bright(1500, [0.6])
    defense = Defense(Made(static), Brightness())
    method = together([Shift(constant(0.0)) for _ in range(6)], 4)
    moved = run(method, batch, hidden=True)
    assert not moved.any()
    right = is_right(defense, batch.images + moved, batch).double().mean()
    assert abs(float(right) - 0.8413) < 4 * (0.8413 * 0.1587 / 1500) ** 0.5


def test_luck_of_a_noisy_choice_does_not_lower_the_accuracy() -> None:
    """Members that only re-arrange the pixels are equally good: fresh draws must tell so."""
    batch = bright(1500, [0.6])
    tilt = 0.1 * torch.linspace(-1, 1, 16).view(1, 1, 4, 4)

    def turn(k: int) -> Callable[..., Tensor]:
        return lambda view, images, labels, budget: images + tilt.flatten().roll(k).view(tilt.shape)

    defense = Defense(Made(static), Brightness())
    moved = run(together([turn(k) for k in range(5)], 3), batch, hidden=True)
    assert len({tuple(row) for row in moved.flatten(1).tolist()}) > 3, "the choices differ"
    right = is_right(defense, batch.images + moved, batch).double().mean()
    assert abs(float(right) - 0.8413) < 4 * (0.8413 * 0.1587 / 1500) ** 0.5


def test_finished_images_retire_only_where_nothing_is_hidden() -> None:
    batch = bright(1, [0.55, 0.65, 0.75])
    for hidden, want in ((False, [3, 2, 1]), (True, [3, 3, 3])):
        members = [Shift(constant(value)) for value in (-0.1, -0.19, -0.2)]
        run(together(members, 8), batch, hidden=hidden)
        assert [seen for member in members for seen in member.seen] == want


class Spy:
    """A view that remembers which draws it was asked for."""

    deterministic = False

    def __init__(self) -> None:
        self.draws: list[int] = []
        self.log = AttackLog(2)

    def logits(self, images: Tensor, draws: Sequence[int]) -> Tensor:
        self.draws += list(draws)
        return torch.zeros(len(images), len(draws), 2)


def test_members_are_compared_on_draws_of_their_own() -> None:
    """Common to all, and far from those that restarts or runs of a member are compared on."""
    spy = Spy()
    images = uniform(2, 1, 4, 4)
    method = together([Shift(constant(0.1))], 3)
    method(cast(AttackerView, spy), images, torch.tensor([0, 1]), Linf(0.1))
    assert spy.draws == 2 * list(range(COMPARISON, COMPARISON + 3))
    assert COMPARISON - SELECTION > 100_000_000


def test_what_a_member_returns_outside_the_ball_is_not_what_is_compared() -> None:
    """A member that cheats by -0.3 ties with an honest -0.1 once projected; it can't win by it."""
    batch = bright(4, [0.65])
    members = [Shift(constant(-0.3)), Shift(constant(-0.08))]
    moved = run(together(members, 1), batch, hidden=False, eps=0.1)
    torch.testing.assert_close(moved, torch.full_like(moved, -0.1))
    seen: list[Tensor] = []

    def watched(view: AttackerView, images: Tensor, labels: Tensor, budget: Budget) -> Tensor:
        found = together(members, 1)(view, images, labels, budget)
        seen.append(found)
        return found

    attack(
        Defense(Identity(), Brightness()),
        watched,
        batch,
        Linf(0.1),
        frozenset(),
        seed=0,
        victim_draw=0,
        max_batch=8,
    )
    assert float((seen[0] - batch.images).abs().max()) < 0.1 + 1e-6


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("others", [0, 1])
def test_a_members_own_verdict_is_not_the_ensembles(hidden: bool, others: int) -> None:
    """Whether the member got all images or only those that an earlier one left."""

    def boast(view: AttackerView, images: Tensor, labels: Tensor, budget: Budget) -> Tensor:
        view.log.verdict = torch.ones(len(images), dtype=torch.bool)
        return images - 0.1

    batch = bright(4, [0.55, 0.65])
    defense = Defense(Made(static) if hidden else Identity(), Brightness())

    def verdict(method: Method) -> Tensor | None:
        out = attack(
            defense, method, batch, Linf(0.2), frozenset(), seed=0, victim_draw=0, max_batch=256
        )
        return out.verdict

    assert verdict(boast) is not None, "the control: on its own its verdict is told"
    assert verdict(together([*others * [Shift(constant(-0.08))], boast], 4)) is None


def test_a_member_that_returns_nan_is_refused() -> None:
    with pytest.raises(AttackFailed, match="not finite"):
        run(together([Shift(constant(float("nan")))], 1), bright(2, [0.6]), hidden=False)


def test_real_members_together_are_as_strong_as_the_best() -> None:
    weight = normal(1, PIXELS, seed=5)[0]
    images = uniform(40, 1, 4, 4)
    group = Group(images, torch.zeros(40, dtype=torch.int64), range(40))
    defense = Defense(Identity(), TwoSided(weight, 1.0))
    members: list[Method] = [PGD(3, 0.5, 1), APGD(10, 1), Square(20, 0.8, 1)]

    def accuracy(method: Method) -> Tensor:
        out = attack(
            defense, method, group, Linf(0.05), frozenset(), seed=0, victim_draw=0, max_batch=64
        )
        return is_right(defense, out.images, group)

    alone = torch.stack([accuracy(member) for member in members])
    assert torch.equal(accuracy(together(members, 1)), alone.all(0))
    assert 0 < int(alone.all(0).sum()) < 40


# --------------------------------------------------------------------------------- its declaration

PART: Mapping[str, Any] = {"attack": "pgd", "steps": 2, "step_size": "1/4"}
WHOLE: Mapping[str, Any] = {
    "eot": 3,
    "compare": 5,
    "members": [PART, {"attack": "square", "n_queries": 7, "p_init": 0.5, "eot": 2}],
}


def test_a_declaration_makes_its_members() -> None:
    made = make("ensemble", WHOLE)
    assert isinstance(made, Ensemble)
    assert made.attacks == [PGD(2, 0.25, 3), Square(7, 0.5, 2)]
    assert made.evaluations(Setup(hidden=False)) == Evaluations(2, 3 + 9, exact=False)
    hidden = Evaluations(2 * 3, 3 * 5 + 2 * 2 * 8, exact=True)
    assert made.evaluations(Setup(hidden=True)) == hidden, "Square takes no gradient"
    # It records every option of every member, and is the same when made of what it records.
    recorded = asdict(made)
    assert recorded["members"][0] == {"attack": "pgd", **asdict(PGD(2, 0.25, 3))}
    assert make("ensemble", recorded) == made


def test_it_attacks_with_its_members() -> None:
    """The attack by its options is the search of the members that these make."""
    batch = bright(3, [0.55, 0.65, 0.75])
    made = make("ensemble", WHOLE)
    assert isinstance(made, Ensemble)
    own = run(made, batch, hidden=True)
    assert torch.equal(own, run(together(made.attacks, 5), batch, hidden=True))
    assert bool(own.flatten(1).any(1).all())


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({**PART, "attack": "pdg"}, "no attack 'pdg' of this package. Did you mean 'pgd'"),
        ({**PART, "attack": "my_package:Attack"}, "no attack 'my_package:Attack' of this package"),
        ({"attack": "ensemble"}, "ensemble: attacks made of attacks are not put into one another"),
        ({**PART, "stepz": 2}, "pgd: stepz: is unknown. Did you mean 'steps'"),
        ({**PART, "steps": 0}, "pgd: steps: input should be greater than or equal to 1, not 0"),
        ({"steps": 2}, "attack: is missing"),
    ],
)
def test_a_bad_member_is_refused(part: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        make("ensemble", {**WHOLE, "members": [part]})
    assert "\n" not in str(caught.value)


def test_no_members_are_no_attack() -> None:
    with pytest.raises(ValueError, match="members: there is none"):
        make("ensemble", {"members": []})
