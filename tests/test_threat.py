"""An attacker has what its threat model shows, stays in its budget, and fails out loud."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dbp_bench import noise
from dbp_bench.attacks.common.objectives import cross_entropy
from dbp_bench.attacks.pgd import PGD
from dbp_bench.defense import Defense, Identity
from dbp_bench.errors import AttackFailed
from dbp_bench.evaluation import FRESH, Attacked, attack, predict
from dbp_bench.noise import ATTACKER, FORWARD, REVERSE, VICTIM, Noise, Site, Tape
from dbp_bench.threat import L1, L2, AttackerView, Budget, Linf, Method, budget
from toys import (
    BOTH,
    SUBSETS,
    Echo,
    GaussianDenoiser,
    Linear,
    Made,
    Noisy,
    Recorder,
    Small,
    SmallDenoiser,
    distinct,
    group,
    normal,
    sampler,
    uniform,
)

GROUP = group(6)
PIXELS = 16
BALL = Linf(0.05)


def assert_close(got: Tensor, want: Tensor) -> None:
    """Equal up to the rounding of float32."""
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


def defense() -> Defense:
    """Two sites, two steps, and gradients that depend on every draw."""
    denoiser = SmallDenoiser()
    return Defense(sampler("ddpm", denoiser, steps=2, t_star=200), Small(), [denoiser], "none")


def echo() -> Defense:
    """Logits that are the forward noise."""
    return Defense(Made(lambda x, n: n.normal(FORWARD, 0, x)), Echo())


def view(
    of: Defense, knows: frozenset[Site], *, max_batch: int = 64, draw: int = 0
) -> AttackerView:
    victim = Tape.make(0, VICTIM, GROUP.ids, draw)
    guess = Tape.make(0, f"{ATTACKER}/{draw}", GROUP.ids)
    return AttackerView(of, knows, victim, guess, max_batch)


def run(of: Defense, knows: frozenset[Site], *, eot: int = 3, victim_draw: int = 0) -> Attacked:
    return search(PGD(2, 0.5, eot), of=of, knows=knows, victim_draw=victim_draw)


def search(
    method: Method,
    *,
    of: Defense | None = None,
    knows: frozenset[Site] = BOTH,
    ball: Budget = BALL,
    victim_draw: int = 0,
) -> Attacked:
    return attack(
        of or defense(), method, GROUP, ball, knows, seed=0, victim_draw=victim_draw, max_batch=64
    )


# ------------------------------------------------------------------------ what an attacker sees


@pytest.mark.parametrize("knows", SUBSETS)
@pytest.mark.parametrize("method", [PGD(2, 0.5, 3), PGD(2, 0.5, 3, "ce", True, 2)])
def test_an_attack_is_not_touched_by_draws_that_it_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, knows: frozenset[Site], method: PGD
) -> None:
    """Non-interference: other hidden draws of the victim, the same attack to the last bit."""
    want = search(method, knows=knows).images
    key = noise._key

    def other_where(
        altered: Callable[[Site], bool],
    ) -> Callable[[int, str, Site], tuple[int, int]]:
        def other(seed: int, owner: str, site: Site) -> tuple[int, int]:
            return key(seed + (owner == VICTIM and altered(site)), owner, site)

        return other

    monkeypatch.setattr(noise, "_key", other_where(lambda site: site not in knows))
    assert torch.equal(search(method, knows=knows).images, want)
    for shown in knows:  # the control: a draw that is shown does steer the attack
        monkeypatch.setattr(noise, "_key", other_where(shown.__eq__))
        assert not torch.equal(search(method, knows=knows).images, want)


def test_only_what_is_hidden_is_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every site that is known is asked of the victim's tape, every other of the attacker's."""
    asked: set[tuple[str, Site]] = set()
    normal_of = Tape.normal

    def spy(self: Tape, site: Site, step: int, like: Tensor) -> Tensor:
        asked.add((self.owner, site))
        return normal_of(self, site, step, like)

    monkeypatch.setattr(Tape, "normal", spy)
    for knows in SUBSETS:
        asked.clear()
        run(defense(), knows, victim_draw=2)
        assert asked == {(VICTIM if s in knows else f"{ATTACKER}/2", s) for s in BOTH}


def test_a_guess_is_never_one_of_the_victims_draws() -> None:
    x = GROUP.images
    victims = [*range(6), *range(FRESH, FRESH + 6)]
    secrets = [Tape.make(0, VICTIM, GROUP.ids, d).normal(FORWARD, 0, x) for d in victims]
    guesses = []

    def spy(view: AttackerView, images: Tensor, labels: Tensor, budget: Budget) -> Tensor:
        guesses.append(view.logits(images, [*range(20), *victims[6:]]).flatten(0, 1))
        return images

    for draw in (0, 1, 2, FRESH):
        search(spy, of=echo(), knows=frozenset(), victim_draw=draw)
    # Nor does an attacker guess twice the same, against another draw or under another number.
    draws = torch.cat([*guesses, *(secret.flatten(1) for secret in secrets)])
    assert len(draws) == 6 * (4 * 26 + 12)
    assert distinct(draws) == len(draws)


def test_where_all_is_known_the_view_is_the_defense() -> None:
    for draw in (0, 3):
        toy = defense()
        sight = view(toy, BOTH, draw=draw)
        assert sight.deterministic
        logits = sight.logits(GROUP.images, range(5))
        want = toy.logits(GROUP.images, Tape.make(0, VICTIM, GROUP.ids, draw))
        assert torch.equal(logits, want[:, None].expand(-1, 5, -1))


@pytest.mark.parametrize("knows", SUBSETS[:-1])
def test_where_something_is_hidden_every_guess_differs(knows: frozenset[Site]) -> None:
    sight = view(defense(), knows)
    assert not sight.deterministic
    logits = sight.logits(GROUP.images, range(5))
    assert distinct(logits[0]) == 5


@pytest.mark.parametrize("knows", SUBSETS[:-1])
def test_a_guess_may_stand_for_the_hidden_draws(knows: frozenset[Site]) -> None:
    sight = view(defense(), knows)
    supposed = sight.supposing(7)
    assert supposed.deterministic
    assert sight.decided_by_logits
    assert not supposed.decided_by_logits
    want = sight.logits(GROUP.images, [7])
    assert torch.equal(supposed.logits(GROUP.images, range(3)), want.expand(-1, 3, -1))
    part = supposed[torch.tensor([2, 0])]
    assert part.deterministic
    few = GROUP.images[[2, 0]]
    assert torch.allclose(part.logits(few, [0]), want[[2, 0]], atol=1e-6)
    part.gradient(few, GROUP.labels[[2, 0]], cross_entropy, [0, 1])
    # It is the same attacker's search, whose evaluations are counted once: copies are one pass.
    assert sight.log.forward[:3].tolist() == [3, 2, 3]
    assert sight.log.gradient[:3].tolist() == [1, 0, 1]


def test_sites_that_a_defense_lacks_are_known_in_vain() -> None:
    """DDIM draws forward noise only: dw-fwd and dwbox are one setting, to the last bit."""
    denoiser = SmallDenoiser()
    toy = Defense(sampler("ddim", denoiser), Small(), [denoiser])
    assert toy.sites == {FORWARD}
    assert view(toy, frozenset({FORWARD})).deterministic
    assert view(toy, BOTH).deterministic
    none, forward, reverse, box = (run(toy, knows).images for knows in SUBSETS)
    assert torch.equal(forward, box)
    assert torch.equal(none, reverse)
    assert not torch.equal(none, box)


def test_a_defense_without_noise_has_nothing_to_hide() -> None:
    toy = Defense(Identity(), Small())
    assert view(toy, frozenset()).deterministic


# ----------------------------------------------------------------------------------- gradients


def plain_gradient(of: Defense, noise: Noise) -> tuple[Tensor, Tensor]:
    """By autograd, one copy of each image, without the view."""
    x = GROUP.images.clone().requires_grad_()
    loss = cross_entropy(of.logits(x, noise), GROUP.labels)
    return torch.autograd.grad(loss.sum(), x)[0], loss.detach()


def test_a_gradient_is_the_mean_over_the_guesses() -> None:
    toy, draws = defense(), [4, 0, 7]
    each = [plain_gradient(toy, Tape.make(0, f"{ATTACKER}/0", GROUP.ids, draw)) for draw in draws]
    gradient, losses, _ = view(toy, frozenset()).gradient(
        GROUP.images, GROUP.labels, cross_entropy, draws
    )
    assert_close(gradient, torch.stack([g for g, _ in each]).mean(0))
    assert_close(losses, torch.stack([loss for _, loss in each], 1))


@pytest.mark.parametrize("knows", SUBSETS)
@pytest.mark.parametrize("most", [1, 12, 13])
def test_chunks_of_copies_change_nothing_but_rounding(knows: frozenset[Site], most: int) -> None:
    toy, draws = defense(), range(5)
    args = GROUP.images, GROUP.labels, cross_entropy, draws
    whole, chunked = view(toy, knows, max_batch=1000), view(toy, knows, max_batch=most)
    for want, got in zip(whole.gradient(*args), chunked.gradient(*args), strict=True):
        assert_close(got, want)
    logits = whole.logits(GROUP.images, draws)
    assert_close(chunked.logits(GROUP.images, draws), logits)


@pytest.mark.parametrize(("most", "batches"), [(1, [6] * 5), (12, [12, 12, 6]), (1000, [30])])
def test_no_pass_is_larger_than_allowed(most: int, batches: list[int]) -> None:
    denoiser = Recorder(GaussianDenoiser())
    toy = Defense(sampler("ddpm", denoiser, steps=1), Small(), [denoiser], "none")
    args = GROUP.images, GROUP.labels, cross_entropy, range(5)
    view(toy, frozenset(), max_batch=most).gradient(*args)
    assert [len(z) for z, _ in denoiser.seen] == batches


def test_where_all_is_known_ten_copies_cost_one() -> None:
    toy = defense()
    sight = view(toy, BOTH)
    args = GROUP.images, GROUP.labels, cross_entropy
    one, losses, _ = sight.gradient(*args, range(1))
    cost = toy.counter.images
    assert cost == 6 * 2
    ten, ten_losses, _ = sight.gradient(*args, range(10))
    assert toy.counter.images == 2 * cost
    assert torch.equal(ten, one)
    assert torch.equal(ten_losses, losses.expand(6, 10))
    assert torch.equal(run(toy, BOTH, eot=10).images, run(toy, BOTH, eot=1).images)
    hidden = view(toy, frozenset())
    before = toy.counter.images
    hidden.gradient(*args, range(10))
    assert toy.counter.images - before == 10 * cost


@pytest.mark.parametrize("knows", SUBSETS)
@pytest.mark.parametrize(
    "rows", [torch.tensor([4, 1]), torch.tensor([False, True, False, False, True, False])]
)
def test_the_view_of_some_images(knows: frozenset[Site], rows: Tensor) -> None:
    toy = defense()
    whole = view(toy, knows)
    x, y = GROUP.images, GROUP.labels
    want, *_ = whole.gradient(x, y, cross_entropy, range(3))
    got, *_ = whole[rows].gradient(x[rows], y[rows], cross_entropy, range(3))
    assert_close(got, want[rows])
    assert torch.equal(
        view(echo(), knows)[rows].logits(x[rows], range(3)),
        view(echo(), knows).logits(x, range(3))[rows],
    )


# --------------------------------------------------------------------------------- the budget


BUDGETS = [Linf(0.1), Linf(8 / 255), L2(0.5), L2(0.1), Linf(0.0), L2(0.0)]


def far(n: int = 200) -> tuple[Tensor, Tensor]:
    """Clean images, some pixels at the edge of the box, and points up to far outside the ball."""
    clean = (1.4 * uniform(n, 1, 4, 4, seed=1) - 0.2).clamp(0, 1)
    size = torch.logspace(-3, 2, n).view(-1, 1, 1, 1)
    return clean, clean + size * normal(n, 1, 4, 4, seed=2)


@pytest.mark.parametrize("ball", BUDGETS)
def test_a_projection_is_inside_the_ball_and_the_box(ball: Budget) -> None:
    clean, away = far()
    got = ball.project(away, clean)
    assert float(got.min()) >= 0
    assert float(got.max()) <= 1
    sizes = ball.size((got - clean).double())
    assert float(sizes.max()) <= ball.eps * (1 + 1e-6) + 1e-7
    assert float(sizes.max()) >= ball.eps * 0.99, "none reaches the edge"
    torch.testing.assert_close(ball.project(got, clean), got, atol=2e-7, rtol=0)
    assert torch.equal(ball.project(clean, clean), clean)


@pytest.mark.parametrize("ball", [Linf(0.1), L2(0.5)])
def test_what_is_allowed_is_not_moved(ball: Budget) -> None:
    clean = 0.5 + 0.02 * uniform(50, 1, 4, 4)
    change = ball.ascent(normal(50, 1, 4, 4))
    inside = clean + 0.99 * ball.eps * uniform(50, 1, 1, 1, seed=3) * change
    torch.testing.assert_close(ball.project(inside, clean), inside, atol=1e-7, rtol=0)


def test_the_linf_projection_is_the_nearest_allowed_point() -> None:
    """Against brute force over a grid of every pixel's allowed values."""
    clean, away = far(40)
    eps = 0.1
    candidates = torch.linspace(-0.5, 1.5, 20_001)
    got = Linf(eps).project(away, clean)
    for c, a, g in zip(clean.flatten(), away.flatten(), got.flatten(), strict=True):
        ok = candidates[(candidates >= 0) & (candidates <= 1) & ((candidates - c).abs() <= eps)]
        nearest = ok[(ok - a).abs().argmin()]
        assert abs(float(nearest - g)) <= 1.01e-4


def test_the_l2_projection_is_radial_where_the_box_does_not_bind() -> None:
    clean = 0.4 + 0.2 * uniform(50, 1, 4, 4)
    away = clean + 10 * normal(50, 1, 4, 4)
    change = away - clean
    want = clean + 0.3 * change / change.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(L2(0.3).project(away, clean), want, atol=1e-6, rtol=0)


def test_ascent_is_the_steepest_of_unit_size() -> None:
    gradient = normal(20, 1, 4, 4)
    flat = gradient.flatten(1)
    for ball, dual in ((Linf(0.1), flat.abs().sum(1)), (L2(0.1), flat.norm(dim=1))):
        step = ball.ascent(gradient)
        torch.testing.assert_close(ball.size(step), torch.ones(20))
        torch.testing.assert_close((step * gradient).flatten(1).sum(1), dual)
        assert torch.equal(ball.ascent(torch.zeros(1, 1, 4, 4)), torch.zeros(1, 1, 4, 4))


@pytest.mark.parametrize("ball", [Linf(0.1), L2(0.5)])
def test_random_starts_are_uniform_in_the_ball(ball: Budget) -> None:
    n = 20_000
    drawn = ball.sample(torch.empty(n, 1, 2, 2), Tape.make(0, ATTACKER, range(n)), 3)
    change = drawn.double().flatten(1)
    if isinstance(ball, Linf):
        values = (change / ball.eps + 1).flatten() / 2
    else:
        assert float((change / ball.eps).mean(0).abs().max()) < 4 * (1 / 6 / n) ** 0.5
        values = (change.norm(dim=1) / ball.eps) ** 4  # the volume inside this radius
    values = values.sort().values
    uniform_cdf = torch.arange(1, len(values) + 1, dtype=torch.float64) / len(values)
    assert float((values - uniform_cdf).abs().max()) < 1.36 / len(values) ** 0.5
    assert float(ball.size(drawn).max()) <= ball.eps
    other = ball.sample(torch.empty(n, 1, 2, 2), Tape.make(0, ATTACKER, range(n)), 4)
    assert not torch.equal(drawn, other)


def test_budgets_by_name() -> None:
    assert budget("linf", 0.3) == Linf(0.3)
    assert budget("l2", 0.3) == L2(0.3)
    assert budget("l1", 0.3) == L1(0.3)


# ------------------------------------------------------------------- what evaluate guarantees


def returning(change: Callable[[Tensor], Tensor]) -> Method:
    return lambda view, images, labels, budget: change(images)


@pytest.mark.parametrize("ball", BUDGETS)
@pytest.mark.parametrize(
    "cheat", [lambda x: 1 - x, lambda x: x + 5, lambda x: x - 1e6, lambda x: x + 0.1 * x.sign()]
)
def test_an_attack_is_held_to_its_budget(ball: Budget, cheat: Callable[[Tensor], Tensor]) -> None:
    got = search(returning(cheat), ball=ball).images
    assert float(ball.size(got - GROUP.images).max()) <= ball.eps + 1e-7
    assert 0 <= float(got.min()) <= float(got.max()) <= 1
    if ball.eps == 0:
        assert torch.equal(got, GROUP.images)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda x: x[:1], r"images of shape \(1, 1, 4, 4\), not \(6, 1, 4, 4\)"),
        (lambda x: x.flatten(1), r"images of shape \(6, 16\)"),
        (lambda x: x * float("nan"), "attack returned images that are not finite"),
        (lambda x: x / 0, "attack returned images that are not finite"),
    ],
)
def test_what_an_attack_may_not_return(bad: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(AttackFailed, match=message):
        search(returning(bad))


@torch.no_grad()
def masked(x: Tensor, noise: Noise) -> Tensor:
    return x + 0.1 * noise.normal(FORWARD, 0, x)


@pytest.mark.parametrize(
    ("purify", "message"),
    [
        (masked, "the logits carry no gradient: look for no_grad"),
        (lambda x, n: x.detach() + 0.1 * n.normal(FORWARD, 0, x), "carry no gradient"),
        (lambda x, n: (4 * x).round() / 4, "the gradient of every image is zero at every step"),
        (lambda x, n: torch.full_like(x, 0.5).requires_grad_(), "gradient of every image is zero"),
        (lambda x, n: x * float("nan"), "the loss or its gradient is not finite"),
        # A finite loss whose gradient is infinite.
        (lambda x, n: x + (x - x.detach()).clamp(min=0).sqrt(), "loss or its gradient is not fin"),
    ],
)
def test_a_defense_that_cannot_be_attacked_is_refused(
    purify: Callable[[Tensor, Noise], Tensor], message: str
) -> None:
    with pytest.raises(AttackFailed, match=message):
        run(Defense(Made(purify), Small()), frozenset())


def flat_but_for_the_first(x: Tensor, noise: Noise) -> Tensor:
    return torch.cat([x[:1], x[1:] * 0 + 0.5])


def test_some_zero_gradients_are_no_failure_but_are_told() -> None:
    """Only where no image of the group has a gradient was nothing searched."""
    got = run(Defense(Made(flat_but_for_the_first), Small()), frozenset(), eot=1)
    assert not torch.equal(got.images[0], GROUP.images[0])
    assert torch.equal(got.images[1:], GROUP.images[1:])
    assert got.nonzero.tolist() == [True, False, False, False, False, False]


@pytest.mark.parametrize(
    "rows", [torch.tensor([4, 1]), torch.tensor([False, True, False, False, True, False])]
)
def test_gradients_seen_through_a_part_of_the_view_count(rows: Tensor) -> None:
    def ask_for_some(view: AttackerView, images: Tensor, labels: Tensor, budget: Budget) -> Tensor:
        view[rows].gradient(images[rows], labels[rows], cross_entropy, [0])
        return images

    seen = search(ask_for_some)
    assert seen.nonzero.tolist() == [False, True, False, False, True, False]
    assert seen.gradient.tolist() == [0, 1, 0, 0, 1, 0]
    assert not search(returning(lambda x: x)).gradient.any(), "no gradient was asked for"


def test_an_evaluation_uses_the_draw_it_is_given() -> None:
    classifier = Linear(torch.ones(PIXELS) / PIXELS, -0.5)
    toy = Defense(Noisy(0.3, 0.3), classifier)
    found = [predict(toy, GROUP.images, GROUP.ids, seed=0, draw=d) for d in range(8)]
    for draw, classes in enumerate(found):
        tape = Tape.make(0, VICTIM, GROUP.ids, draw)
        x = GROUP.images
        noisy = x + 0.3 * tape.normal(FORWARD, 0, x) + 0.3 * tape.normal(REVERSE, 0, x)
        assert torch.equal(classes, (classifier.score(noisy) > 0).long())
    assert distinct(torch.stack(found)) > 1


def test_logits_that_are_not_finite_are_no_prediction() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1) / 0

    with pytest.raises(AttackFailed, match="logits that are not finite"):
        predict(Defense(Identity(), Broken()), GROUP.images, GROUP.ids, seed=0, draw=0)


def test_an_attack_does_not_change_the_images_it_is_given() -> None:
    before = GROUP.images.clone()
    run(defense(), BOTH)
    assert torch.equal(GROUP.images, before)
    assert not GROUP.images.requires_grad
