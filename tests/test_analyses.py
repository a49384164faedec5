"""Analyses on toys whose answers are known in closed form, and against the runs they generalise."""

from collections.abc import Sequence
from dataclasses import replace
from math import sqrt
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dbp_bench import evaluation
from dbp_bench.analyses import efficacy, eot_curve, immobilise, landscape, stochasticity, trajectory
from dbp_bench.analyses.record import Row, row
from dbp_bench.analyses.stochasticity import Mixed, PartlyFresh, beside
from dbp_bench.analyses.target import NOTHING, Target, fresh
from dbp_bench.attacks.common.objectives import cross_entropy
from dbp_bench.attacks.pgd import PGD
from dbp_bench.attacks.standard import Standard
from dbp_bench.checks.gradients import cosines
from dbp_bench.defense import Defense, Purifier
from dbp_bench.evaluation import Group
from dbp_bench.noise import ATTACKER, FORWARD, REVERSE, VICTIM, Noise, Site, Tape
from dbp_bench.threat import Linf, Revealed
from toys import BOTH, Linear, Made, Noisy, TwoSided, group, normal, uniform

SMALL: dict[str, Any] = {"steps": 4, "step_size": 0.5, "eot": 3}
SEARCH = PGD(**SMALL)
BUDGET = 20
STANDARD = Standard(BUDGET)
SEED = 5
TWO_SIDED = TwoSided(normal(1, 16, seed=3)[0], 0.8)


def measured(analysis: Any, whole: Target, **options: Any) -> list[Row]:
    """The rows of an analysis."""
    found = analysis.measure(whole, analysis.Options(**options))
    return [row(whole.name, *each) for each in found]


def target(purifier: Purifier, classifier: nn.Module, images: Group, votes: int = 1) -> Target:
    defense = Defense(purifier, classifier, votes=votes)
    return Target("toy", defense, [images], Linf(0.1), SEED, max_batch=64)


def stochastic(votes: int = 1) -> Target:
    """A defense that draws at two sites, where which way to push depends on the draw."""
    return target(Noisy(0.3, 0.2), TWO_SIDED, group(12), votes)


WEIGHT = torch.tensor([1.0, -2.0, 0.5, 1.5])
SHIFT = 0.1 * float(WEIGHT.abs().sum())
"""By how much a step of eps moves the score of the linear toy, whatever the noise."""


def linear(n: int) -> Target:
    images = Group(0.4 + 0.2 * uniform(n, 1, 2, 2), torch.arange(n) % 2, range(n))
    return target(Noisy(0.2, 0.1), Linear(WEIGHT, -0.2), images)


def margins(whole: Target, noises: Sequence[Noise]) -> Tensor:
    """The label's lead ``(noises, n)`` at the clean images: the loss is softplus(-lead)."""
    images = whole.groups[0]
    with torch.no_grad():
        score = torch.stack(
            [Linear(WEIGHT, -0.2).score(Noisy(0.2, 0.1)(images.images, n)) for n in noises]
        )
    return torch.where(images.labels == 1, score, -score).double()


def victim(whole: Target, draw: int) -> Tape:
    return Tape.make(SEED, VICTIM, whole.groups[0].ids, draw)


def right(defense: Defense, images: Tensor, group: Group, *, seed: int, draw: int) -> Tensor:
    return evaluation.predict(defense, images, group.ids, seed=seed, draw=draw) == group.labels


def value(rows: Sequence[Row], quantity: str, series: str, *at: float) -> float:
    (found,) = [r for r in rows if (r.quantity, r.series, r.at) == (quantity, series, at)]
    return found.value


# ------------------------------------------------------------------------------- stochasticity


def mixed(whole: Target, k: float, draw: int, number: int) -> dict[str, Tensor]:
    """The accuracies that STANDARD and SEARCH leave at `k`, on `number` evaluation draws."""
    options = stochasticity.Options(**SMALL, budget=BUDGET, fresh=number)
    return stochasticity.mixed_run(whole, options, k, draw, whole.groups[0])


def test_mixed_noise_is_standard_normal_and_has_the_stated_correlation() -> None:
    like = torch.zeros(200, 1, 10, 10)
    known = Tape.make(0, VICTIM, range(200))
    for k in (0.3, 0.6, 0.9):
        found = Mixed(known, k).normal(FORWARD, 0, like).flatten()
        assert abs(float(found.mean())) < 0.03
        assert abs(float(found.var()) - 1) < 0.03
        part = float((found * known.normal(FORWARD, 0, like).flatten()).mean())
        assert abs(part - sqrt(1 - k * k)) < 0.03


@pytest.mark.parametrize("votes", [1, 3])
@pytest.mark.parametrize("draw", [0, 2])
def test_without_fresh_noise_it_is_the_dw_box(draw: int, votes: int) -> None:
    """Bit for bit: the images, and the outcomes at the known draw."""
    whole = stochastic(votes)
    images = whole.groups[0]
    found = mixed(whole, 0.0, draw, 2)
    want = whole.attacked(images, STANDARD, BOTH, draw)
    assert torch.equal(found["images"], want)
    assert torch.equal(found["of-pgd"], whole.attacked(images, SEARCH, BOTH, draw))
    evaluated = right(whole.defense, want, images, seed=SEED, draw=draw)
    assert torch.equal(found["right"], evaluated[:, None].expand(-1, 2).double())
    clean = right(whole.defense, images.images, images, seed=SEED, draw=draw)
    assert torch.equal(found["clean-right"], clean[:, None].expand(-1, 2).double())


@pytest.mark.parametrize("votes", [1, 3])
def test_without_known_noise_it_is_eot(votes: int) -> None:
    whole = stochastic(votes)
    images = whole.groups[0]
    found = mixed(whole, 1.0, 0, 4)
    want = whole.attacked(images, STANDARD, frozenset(), 0)
    assert torch.equal(found["images"], want)
    assert torch.equal(found["of-pgd"], whole.attacked(images, SEARCH, frozenset(), 0))
    evaluated = [right(whole.defense, want, images, seed=SEED, draw=d) for d in fresh(4)]
    assert torch.equal(found["right"], torch.stack(evaluated, 1).double())


def test_the_judge_of_a_mixture_draws_its_fresh_part_anew() -> None:
    whole = stochastic()
    images = whole.groups[0]
    found = mixed(whole, 0.7, 0, 3)
    assert len({tuple(c) for c in found["loss"].T.tolist()}) == 3
    tape = Tape.make(SEED, VICTIM, images.ids)
    first = Tape.make(SEED, VICTIM, images.ids, fresh(1)[0])
    logits = whole.defense.logits(found["of-pgd"], Mixed(Revealed(tape, first, BOTH), 0.7))
    want = cross_entropy(logits, images.labels)
    assert torch.allclose(found["loss"][:, 0], want.double(), atol=1e-6)


def test_no_attack_on_a_mixture_depends_on_the_fresh_part_of_the_victim() -> None:
    """It guesses from its own tape: an owner that is not the victim's."""
    asked: list[Tensor] = []

    def run(images: Tensor, noise: Noise) -> Tensor:
        drawn = noise.normal(FORWARD, 0, images)
        asked.append(drawn.detach())
        return images + 0.3 * drawn

    whole = target(Made(run), TWO_SIDED, group(3))
    images = whole.groups[0]
    mixture = Defense(PartlyFresh(whole.defense.purifier, 0.6), TWO_SIDED)
    replace(whole, defense=mixture).attacked(images, SEARCH, BOTH, 0)
    fixed = Tape.make(SEED, VICTIM, images.ids).normal(FORWARD, 0, images.images)
    guess = Tape.make(SEED, f"{ATTACKER}/0", images.ids).copies([0, 1, 2])
    copies = images.images.repeat_interleave(3, 0)
    want = 0.8 * fixed.repeat_interleave(3, 0) + 0.6 * guess.normal(beside(FORWARD), 0, copies)
    first = next(noise for noise in asked if len(noise) == 9)
    assert torch.allclose(first, want, atol=1e-6)


def test_nothing_is_left_to_guess_where_all_noise_is_known() -> None:
    for k in (0.0, 1.0):
        assert PartlyFresh(Noisy(0.3, 0.2), k).sites == BOTH
    hidden = PartlyFresh(Noisy(0.3, 0.2), 0.1).sites - BOTH
    assert hidden == {beside(FORWARD), beside(REVERSE)}


def test_robustness_loss_of_a_linear_defense() -> None:
    """The score is weight . x + noise: PGD moves it by eps |weight|_1, whatever the noise."""
    whole = linear(8)
    options = stochasticity.Options(steps=4, eot=2, budget=4, levels=(0, 0.5, 1))
    rows = measured(stochasticity, whole, **options.model_dump())
    for k in options.levels:
        noises = [
            Mixed(Revealed(victim(whole, draw), victim(whole, j), BOTH if k < 1 else NOTHING), k)
            for draw in range(options.known)
            for j in fresh(options.fresh)
        ]
        margin = margins(whole, noises)
        clean, moved = F.softplus(-margin).mean(), F.softplus(SHIFT - margin).mean()
        assert value(rows, "clean-loss", "", k) == pytest.approx(float(clean), abs=2e-5)
        want = float(moved - clean)
        assert value(rows, "robustness-loss", "", k) == pytest.approx(want, abs=2e-5)


# ---------------------------------------------------------------------------------- immobilise


def test_the_subsets_form_a_lattice() -> None:
    three = frozenset({FORWARD, REVERSE, Site("vote")})
    found = immobilise.subsets(three)
    assert len(found) == len(set(found)) == 8
    assert found[0] == frozenset()
    assert found[-1] == three
    assert [len(s) for s in found] == [0, 1, 1, 1, 2, 2, 2, 3]
    assert immobilise.called(found[-1]) == "forward+reverse+vote"


def test_each_subset_has_the_outcomes_of_a_run() -> None:
    """As a run evaluates: attack d at victim draw d; one attack where nothing is known."""
    whole = stochastic()
    images = whole.groups[0]
    options = immobilise.Options(budget=BUDGET, draws=5)
    for known in immobilise.subsets(BOTH):
        found = immobilise.outcomes(whole, options, known, images)
        evaluated = []
        for draw in range(options.known if known else options.draws):
            adversarial = evaluation.attack(
                whole.defense,
                STANDARD,
                images,
                whole.budget,
                known,
                seed=SEED,
                victim_draw=draw if known else 0,
                max_batch=whole.max_batch,
            ).images
            evaluated.append(right(whole.defense, adversarial, images, seed=SEED, draw=draw))
        assert torch.equal(found["robust"], torch.stack(evaluated, 1).double()), known


def test_only_the_site_that_matters_matters() -> None:
    """Noise at the reverse site is drawn but not used: knowing it gives nothing."""
    whole = target(Noisy(0.4, 0.0), TWO_SIDED, group(16))
    rows = measured(immobilise, whole, budget=BUDGET, draws=3)
    known = {
        name: value(rows, "accuracy", name, n)
        for name, n in (("forward", 1), ("forward+reverse", 2))
    }
    # The search is another one where a draw is hidden: up to two outcomes of 48 differ.
    assert known["forward"] == pytest.approx(known["forward+reverse"], abs=0.05)
    assert value(rows, "accuracy", "nothing", 0) > known["forward"]
    fall = value(rows, "fall", "forward", 1)
    want = value(rows, "accuracy", "nothing", 0) - known["forward"]
    assert fall == pytest.approx(want, abs=1e-5)


# ----------------------------------------------------------------------------------- eot-curve


class Scattered(nn.Module):
    """Class scores whose gradient is a fixed direction: the purifier adds the scatter."""

    def forward(self, images: Tensor) -> Tensor:
        score = images.flatten(1).sum(1)
        return torch.stack([torch.zeros_like(score), score], 1)


def scattered(spread: float, n: int, size: int) -> Target:
    """Gradients proportional to 1 + spread x noise at every pixel.

    By cross-entropy, the gradient is a positive number times the weights that were drawn; the mean
    over draws is over weights that scatter about one direction.
    """

    def run(images: Tensor, noise: Noise) -> Tensor:
        weights = 1 + spread * noise.normal(FORWARD, 0, images)
        return images * weights / 1e4

    images = Group(uniform(n, 1, size, size), torch.zeros(n, dtype=torch.int64), range(n))
    return replace(target(Made(run), Scattered(), images), max_batch=512)


def test_cosines_follow_the_formula_where_gradients_scatter_about_a_mean() -> None:
    """Mu of length sqrt(d), noise of variance spread^2 a pixel: rho = 1 / (1 + spread^2)."""
    spread = 2.0
    counts = (1, 2, 4, 16)
    rows = measured(eot_curve, scattered(spread, 3, 40), steps=1, counts=counts, budget=2, draws=1)
    rho = 1 / (1 + spread**2)
    for scale in eot_curve.SCALES:
        for n in counts:
            want = rho / sqrt(rho + (1 - rho) / n)
            assert value(rows, "cosine", scale, n) == pytest.approx(want, abs=0.02), (scale, n)
        assert value(rows, "rho", scale) == pytest.approx(rho, abs=0.01)


def test_the_lines_beside_the_curve_are_those_of_the_protocol() -> None:
    """As a run has them; PGD's differences from the DW-box are of the same images."""
    whole = stochastic()
    rows = measured(eot_curve, whole, steps=4, step_size=0.5, counts=(1, 3), budget=BUDGET, draws=5)
    lattice = measured(immobilise, whole, budget=BUDGET, draws=5)
    known = value(rows, "accuracy", "dwbox")
    assert known == value(lattice, "accuracy", "forward+reverse", 2)
    assert value(rows, "accuracy", "hidden") == value(lattice, "accuracy", "nothing", 0)
    adversarial = whole.attacked(whole.groups[0], SEARCH, frozenset(), 0)
    want = float(whole.correct(adversarial, whole.groups[0], range(5)).mean())
    assert value(rows, "accuracy", "eot", 3) == pytest.approx(want, abs=1e-6)
    assert value(rows, "above-dwbox", "eot", 3) == pytest.approx(want - known, abs=1e-6)


def test_the_fit_finds_the_rho_it_was_made_from() -> None:
    counts = np.array([1.0, 2, 8, 64, 512])
    rho = np.array([0.03, 0.106, 0.5, 0.97])
    curves = eot_curve.similarity(rho[:, None], counts[None])
    assert eot_curve.fit(curves, counts) == pytest.approx(rho, abs=1e-4)
    # The published curve, read off its figure, against the stated numbers of the formula.
    assert eot_curve.similarity(0.106, np.array([10.0, 100.0])) == pytest.approx(
        [0.240, 0.313], abs=1e-3
    )


def test_gradients_of_single_draws_average_to_what_an_attack_takes() -> None:
    whole = stochastic()
    images = whole.groups[0]
    from dbp_bench.threat import AttackerView

    each = torch.cat(list(whole.gradients(images, f"{ATTACKER}/0", 7)), 1)
    victim = Tape.make(SEED, VICTIM, images.ids)
    guess = Tape.make(SEED, f"{ATTACKER}/0", images.ids)
    view = AttackerView(whole.defense, frozenset(), victim, guess, 64)
    want = view.gradient(images.images, images.labels, cross_entropy, range(7)).mean
    assert torch.allclose(each.mean(1), want, atol=1e-6)
    alone = AttackerView(whole.defense, BOTH, guess, guess, 64)
    first = alone.gradient(images.images, images.labels, cross_entropy, [0]).mean
    assert torch.allclose(each[:, 0], first, atol=1e-6)


# ------------------------------------------------------------------------------------ efficacy


def test_loss_along_a_step_of_a_linear_defense() -> None:
    """Steps of eps / 16 move the score by k eps |weight|_1 / 16, at every draw alike."""
    whole = linear(8)
    rows = measured(efficacy, whole, sets=4, fresh=2)
    for at, draws in (("known", range(3)), ("fresh", fresh(2))):
        margin = margins(whole, [victim(whole, d) for d in draws])
        for k in (-16, -3, 0, 5, 16):
            want = F.softplus(k * SHIFT / 16 - margin).mean()
            for series in efficacy.DIRECTIONS[:2]:
                found = value(rows, f"loss-{at}", series, k)
                assert found == pytest.approx(float(want), abs=2e-5), (at, series, k)


def test_the_known_draw_is_the_steepest_at_that_draw_only() -> None:
    """Where the gradient has the draw's signs, it beats the mean at its draw, not elsewhere."""

    def run(images: Tensor, noise: Noise) -> Tensor:
        return images * noise.normal(FORWARD, 0, images)

    images = Group(0.3 + 0.4 * uniform(20, 1, 5, 5), torch.zeros(20, dtype=torch.int64), range(20))
    whole = target(Made(run), Scattered(), images)
    rows = measured(efficacy, whole, sets=32, fresh=4)
    known = {s: value(rows, "loss-known", s, 16) for s in efficacy.DIRECTIONS}
    assert known["known draw"] > known["mean over known draws"] + 0.5
    assert known["known draw"] > known["random"] + 0.5
    others = {s: value(rows, "loss-fresh", s, 16) for s in efficacy.DIRECTIONS}
    start = value(rows, "loss-fresh", "random", 0)
    assert abs(others["known draw"] - start) < 0.5


def test_random_steps_have_the_size_of_the_others() -> None:
    whole = stochastic()
    steps = efficacy.directions(whole, efficacy.Options(sets=4), whole.groups[0])
    for name, step in steps.items():
        assert bool((step.abs() == 1).all()), name
    assert steps["single"].shape[1] == 3


# ------------------------------------------------------------------- landscape and trajectories


def test_what_lies_beside_is_at_a_right_angle_and_adds_up() -> None:
    eot, dw = normal(5, 1, 3, 3, seed=1), normal(5, 1, 3, 3, seed=2)
    rest, along = landscape.beside(eot, dw)
    assert torch.allclose((rest * dw).flatten(1).sum(1), torch.zeros(5), atol=1e-5)
    assert torch.allclose(rest + along.view(-1, 1, 1, 1) * dw, eot, atol=1e-6)
    still, none = landscape.beside(eot, torch.zeros_like(dw))
    assert torch.equal(still, eot)
    assert torch.equal(none, torch.zeros(5))


def test_the_surface_of_a_linear_defense() -> None:
    """EoT finds what DW finds: nothing lies beside it, and loss is the softplus of a line."""
    whole = linear(6)
    rows = measured(landscape, whole, points=6, steps=4, known=3, fresh=1)
    margin = margins(whole, [victim(whole, d) for d in range(3)])
    for a in landscape.grid(6):
        want = F.softplus(a * SHIFT - margin)
        for b in (0.0, 2.0):
            found = value(rows, "loss-known", "mean", a, b)
            assert found == pytest.approx(float(want.mean()), abs=2e-5)
        one = value(rows, "loss-known", "draw 2", a, 0.0)
        assert one == pytest.approx(float(want[2].mean()), abs=2e-5)
    assert value(rows, "cosine", "eot") == pytest.approx(1, abs=1e-5)
    assert value(rows, "along", "eot") == pytest.approx(1, abs=1e-5)


def test_the_iterates_are_those_of_the_attack() -> None:
    whole = stochastic()
    images = whole.groups[0]
    for knows, draw, eot in ((frozenset[Site](), 2, 3), (BOTH, 1, 1)):
        path = trajectory.iterates(whole, images, replace(SEARCH, eot=eot), knows, draw)
        assert path.shape[1] == SEARCH.steps + 1
        assert torch.equal(path[:, 0], images.images)
        assert torch.equal(
            path[:, -1], whole.attacked(images, replace(SEARCH, eot=eot), knows, draw)
        )
        assert not torch.equal(path[:, 1], path[:, 0])


def test_all_paths_of_a_linear_defense_are_one() -> None:
    """Every attack goes where the DW-box goes, whose loss is the softplus of a line."""
    whole = linear(6)
    rows = measured(trajectory, whole, steps=4, eot=2, runs=2, fresh=2)
    for kind in ("white-box", "eot", "dwbox-other"):
        for quantity in ("cosine-dwbox", "cosine-runs"):
            assert value(rows, quantity, kind) == pytest.approx(1, abs=1e-5)
    for kind in ("white-box", "eot", "dwbox", "dwbox-other"):
        for at, draws in (("known", range(1)), ("fresh", fresh(2))):
            margin = margins(whole, [victim(whole, d) for d in draws])
            for step in range(5):
                want = float(F.softplus(step / 4 * SHIFT - margin).mean())
                found = value(rows, f"loss-{at}", kind, step)
                assert found == pytest.approx(want, abs=2e-5), (kind, at, step)
            assert value(rows, f"end-loss-{at}", kind) == found
    assert {r.at[1] for r in rows if len(r.at) == 2} == {0, 1}


def test_paths_end_where_the_plane_says() -> None:
    """Dwbox 0 ends on the x axis, at its own length; the mean of the eot ends has no third part."""
    whole = target(Noisy(0.3, 0.2), TWO_SIDED, group(2))
    rows = measured(trajectory, whole, steps=4, step_size=0.5, eot=2, runs=2, fresh=3)
    images = whole.groups[0]
    for index, image in enumerate(images.ids):
        last = whole.attacked(images, replace(SEARCH, eot=1), BOTH, 0)[index]
        length = float((last - images.images[index]).norm())
        assert value(rows, "x", "dwbox 0", 4, image) == pytest.approx(length, abs=1e-5)
        assert value(rows, "y", "dwbox 0", 4, image) == pytest.approx(0, abs=1e-5)
        ends = torch.stack(
            [whole.attacked(images, replace(SEARCH, eot=2), frozenset(), r) for r in range(2)]
        )
        moved = (ends.mean(0) - images.images)[index]
        placed = [
            sum(value(rows, axis, f"eot {r}", 4, image) for r in range(2)) / 2 for axis in "xy"
        ]
        assert np.hypot(placed[0], placed[1]) == pytest.approx(float(moved.norm()), abs=1e-5)
    assert (
        cosines(
            *[
                torch.stack(trajectory.plane(normal(1, 9)[0], normal(1, 9, seed=1)[0]))[[i]]
                for i in (0, 1)
            ]
        ).abs()
        < 1e-5
    )
