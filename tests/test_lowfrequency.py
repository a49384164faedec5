"""The low-frequency attack stays in its band, and is PGD where the band is everything."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from dbp_bench.attacks import make
from dbp_bench.attacks.low_frequency import Banded, LowFrequency, cosines, low_pass
from dbp_bench.attacks.pgd import PGD
from dbp_bench.defense import Defense, Identity
from dbp_bench.evaluation import Group, attack
from dbp_bench.noise import ATTACKER, VICTIM, Tape
from dbp_bench.threat import L1, L2, AttackerView, Budget, Evaluations, Linf, Setup
from toys import BOTH, Linear, Noisy, Small, TwoSided, group, normal, uniform

BALLS = [Linf(0.05), L2(0.3), L1(0.5)]


def above(perturbation: Tensor, rows: int, columns: int) -> Tensor:
    """The coefficients of the DCT that a band of `rows` x `columns` leaves out."""
    height, width = perturbation.shape[2:]
    found = cosines(height) @ perturbation.double() @ cosines(width).T
    found[:, :, :rows, :columns] = 0
    return found


# ------------------------------------------------------------------------------ the transform


def test_the_transform_is_orthonormal_and_starts_with_the_constant() -> None:
    for size in (1, 5, 8):
        torch.testing.assert_close(cosines(size) @ cosines(size).T, torch.eye(size).double())
        torch.testing.assert_close(cosines(size)[0], torch.full((size,), size**-0.5).double())


def test_the_fourth_frequency_of_eight_pixels() -> None:
    """cos(pi / 8 * 4 * (x + 1 / 2)) / 2: two pixels up, two pixels down."""
    want = torch.tensor([1, -1, -1, 1, 1, -1, -1, 1]).double() / 8**0.5
    torch.testing.assert_close(cosines(8)[4], want)


@pytest.mark.parametrize(("band", "rows", "columns"), [(0.5, 4, 3), (0.01, 1, 1), (0.8, 6, 5)])
def test_what_a_band_keeps(band: float, rows: int, columns: int) -> None:
    """On 8 x 6 pixels: the lowest frequencies unchanged, nothing else, and it is idempotent."""
    images = normal(3, 2 * 8 * 6).view(3, 2, 8, 6).double()
    kept = low_pass(images, band)
    assert above(kept, rows, columns).abs().max() < 1e-12
    full, part = (cosines(8) @ x @ cosines(6).T for x in (images, kept))
    torch.testing.assert_close(part[:, :, :rows, :columns], full[:, :, :rows, :columns])
    torch.testing.assert_close(low_pass(kept, band), kept)


# ------------------------------------------------------------------------------- the attack


@dataclass(frozen=True)
class Recorded:
    """A budget that remembers what it was given to project."""

    budget: Budget
    seen: list[Tensor] = field(default_factory=list)

    @property
    def eps(self) -> float:
        return self.budget.eps

    def project(self, images: Tensor, clean: Tensor) -> Tensor:
        self.seen.append(images - clean)
        return self.budget.project(images, clean)

    def ascent(self, gradient: Tensor) -> Tensor:
        return self.budget.ascent(gradient)

    def size(self, perturbation: Tensor) -> Tensor:
        return self.budget.size(perturbation)

    def sample(self, like: Tensor, tape: Tape, step: int) -> Tensor:
        return self.budget.sample(like, tape, step)


def view(defense: Defense, of: Group) -> AttackerView:
    guess, victim = Tape.make(0, ATTACKER, of.ids), Tape.make(0, VICTIM, of.ids)
    return AttackerView(defense, frozenset(), victim, guess, 4096)


@pytest.mark.parametrize("ball", BALLS)
@pytest.mark.parametrize("random_start", [False, True])
def test_before_its_projection_no_perturbation_leaves_the_band(
    ball: Budget, random_start: bool
) -> None:
    of = group(6, size=8, channels=2)
    defense, recorded = Defense(Noisy(0.1, 0.1), Small(channels=2)), Recorded(ball)
    method = LowFrequency(4, 0.4, 2, "margin", random_start, band=0.5)
    found = method(view(defense, of), of.images, of.labels, recorded)
    assert len(recorded.seen) == 4 + random_start
    for perturbation in recorded.seen:
        assert perturbation.abs().max() > 1e-3
        assert above(perturbation, 4, 4).abs().max() < 1e-6
    assert bool((ball.size(found - of.images) <= ball.eps * (1 + 1e-5)).all())


def test_in_l2_nothing_but_the_pixel_box_leaves_the_band() -> None:
    of = group(6, size=8)
    inner = Group(0.3 + 0.4 * of.images, of.labels, of.ids)
    defense = Defense(Noisy(0.1, 0.1), Small())
    found = LowFrequency(5, 0.5, 2, "ce", band=0.25)(
        view(defense, inner), inner.images, inner.labels, L2(0.2)
    )
    change = found - inner.images
    assert above(change, 2, 2).abs().max() < 1e-6
    torch.testing.assert_close(L2(0.2).size(change), torch.full((6,), 0.2), rtol=1e-4, atol=0)


@pytest.mark.parametrize("ball", BALLS)
def test_the_whole_band_is_pgd(ball: Budget) -> None:
    """Bit for bit, with random starts and restarts, where half the band is another attack."""
    of = group(6, size=8)
    defense = Defense(Noisy(0.1, 0.1), Small())
    want, same, half = (
        attack(defense, m, of, ball, frozenset(), seed=0, victim_draw=0, max_batch=99).images
        for m in (
            PGD(3, 0.4, 2, "margin", True, 2),
            LowFrequency(3, 0.4, 2, "margin", True, 2, band=1.0),
            LowFrequency(3, 0.4, 2, "margin", True, 2, band=0.5),
        )
    )
    assert torch.equal(want, same)
    assert not torch.allclose(want, half, atol=1e-3)


def waves(*frequencies: tuple[int, int]) -> Tensor:
    """A weight ``(64,)`` made of products of these cosines of 8 pixels."""
    c = cosines(8).float()
    return sum(
        ((i + 1) * torch.outer(c[a], c[b]).flatten() for i, (a, b) in enumerate(frequencies)),
        torch.zeros(64),
    )


def linear(weight: Tensor) -> tuple[Defense, Group]:
    images = 0.3 + 0.4 * uniform(20, 1, 8, 8)
    classifier = Linear(weight)
    return Defense(Identity(), classifier), Group(images, torch.ones(20).long(), range(20))


def scores(defense: Defense, of: Group, images: Tensor) -> Tensor:
    """How much the score fell, in units of the largest fall that L2 allows (1 is the optimum)."""
    assert isinstance(defense.classifier, Linear)
    classifier = defense.classifier
    fall = classifier.score(of.images) - classifier.score(images)
    share: Tensor = fall / (0.2 * classifier.weight.norm())
    return share


@pytest.mark.parametrize(
    ("weight", "reached"),
    [(waves((0, 1), (2, 3)), 1.0), (waves((0, 1), (2, 5)), 5**-0.5)],
)
def test_l2_optimum_of_a_linear_classifier(weight: Tensor, reached: float) -> None:
    """That of PGD where the weight is in the band; else the share of the weight that is in it."""
    defense, of = linear(weight)
    found = attack(
        defense,
        LowFrequency(8, 0.25, 1, "ce", band=0.5),
        of,
        L2(0.2),
        BOTH,
        seed=0,
        victim_draw=0,
        max_batch=99,
    ).images
    torch.testing.assert_close(
        scores(defense, of, found), torch.full((20,), reached), rtol=1e-4, atol=0
    )


def test_linf_optimum_of_a_linear_classifier() -> None:
    """Where the sign of the weight is in the band, that of PGD: here it darkens every pixel."""
    defense, of = linear(waves((0, 0)))
    method = LowFrequency(4, 0.5, 1, "ce", band=0.25)
    found = attack(defense, method, of, Linf(0.1), BOTH, seed=0, victim_draw=0, max_batch=99).images
    torch.testing.assert_close(found, of.images - 0.1, atol=1e-6, rtol=0)


def test_several_restarts_are_at_least_as_good_as_one() -> None:
    images = uniform(40, 1, 4, 4)
    of = Group(images, torch.zeros(40).long(), range(40))
    defense = Defense(Identity(), TwoSided(normal(1, 16, seed=5)[0], 1.0))
    falls = []
    for restarts in (1, 4):
        method = LowFrequency(3, 0.4, 1, "margin", True, restarts, band=0.5)
        found = attack(
            defense, method, of, Linf(0.1), BOTH, seed=0, victim_draw=0, max_batch=99
        ).images
        falls.append(defense.classifier(found)[:, 1].detach())
    assert bool((falls[1] >= falls[0]).all())
    assert bool((falls[1] > falls[0]).any())


# --------------------------------------------------------------------------- its declaration


def test_its_declaration() -> None:
    options = {"steps": 3, "step_size": 0.5, "eot": 2, "random_start": True, "restarts": 2}
    made = make("low-frequency", options)
    assert made == LowFrequency(3, 0.5, 2, "margin", True, 2, 0.5)
    assert made.evaluations(Setup(hidden=False)) == Evaluations(6, 2, exact=True)


@pytest.mark.parametrize("band", [0, 1.5, -0.1])
def test_a_bad_band_is_refused(band: float) -> None:
    with pytest.raises(ValueError, match=r"^band: input should be"):
        make("low-frequency", {"band": band})


def test_a_band_is_a_budget() -> None:
    banded = Banded(L2(0.2), 0.5)
    assert banded.eps == 0.2
    torch.testing.assert_close(banded.size(torch.ones(1, 1, 2, 2)), torch.tensor([2.0]))
