"""The deviation's gradient is the known one, and without its weight the attack is PGD."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dbp_bench import memory
from dbp_bench.attacks import described, make
from dbp_bench.attacks.common.objectives import cross_entropy
from dbp_bench.attacks.diffattack import DiffAttack
from dbp_bench.attacks.pgd import PGD
from dbp_bench.defense import Defense, Identity, StraightThrough
from dbp_bench.errors import AttackFailed
from dbp_bench.evaluation import Attacked, Group, attack
from dbp_bench.memory import Policy, State
from dbp_bench.noise import ATTACKER, FORWARD, VICTIM, Noise, Site, Tape
from dbp_bench.purifiers.controls import NoiseOnly, OneShot
from dbp_bench.purifiers.schedule import Diffusion, Schedule, to_diffusion, to_images
from dbp_bench.threat import Attack, AttackerView, Evaluations, Gradient, Linf, Setup
from toys import BOTH, SAMPLERS, SUBSETS, Made, Small, SmallDenoiser, group, sampler, uniform

GROUP = group(4)
BALL = Linf(0.05)
NONE = frozenset[Site]()
LEVELS, SHRINK = (60, 30, 0), 0.7


@dataclass(frozen=True)
class Shrinking:
    """A linear sampler of two reverse steps, each of which multiplies the state."""

    sites: frozenset[Site] = frozenset({FORWARD})

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        source = to_diffusion(images)
        forward = Diffusion(Schedule().signal(), source, noise.normal(FORWARD, 0, source))
        start, grid = forward(LEVELS[0]), pairwise(LEVELS)
        z = memory.descend(lambda i, t, s, z: SHRINK * z, start, grid, forward=forward)
        return to_images(z, clamp=False)


class Indifferent(nn.Module):
    """Two equal logits whatever the image, with a gradient: zero."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.zeros(len(images), 2) + 0 * images.flatten(1)[:, :2]


def tape(owner: str, draw: int = 0) -> Tape:
    return Tape.make(0, owner, GROUP.ids, draw)


def view(of: Defense, knows: frozenset[Site] = NONE, max_batch: int = 4096) -> AttackerView:
    return AttackerView(of, knows, tape(VICTIM), tape(f"{ATTACKER}/0"), max_batch)


def run(
    of: Defense, method: Attack, knows: frozenset[Site] = NONE, images: Group = GROUP
) -> Attacked:
    return attack(of, method, images, BALL, knows, seed=0, victim_draw=0, max_batch=4096)


def deviations(images: Tensor, fresh: Tensor) -> tuple[Tensor, Tensor]:
    """What :class:`Shrinking` has of deviation, and its gradient, written out.

    At step i the state is ``r^i (b s + c n)`` for the source s and the noise n, the forward process
    ``b_i s + c_i n``: their difference is linear in s.
    """
    table, source = Schedule().signal(), 2 * images - 1
    value, slope = torch.zeros(len(images)), torch.zeros_like(images)
    b, c = table[LEVELS[0]] ** 0.5, (1 - table[LEVELS[0]]) ** 0.5
    pixels = images[0].numel()
    for i, level in enumerate(LEVELS[1:], start=1):
        by_source = SHRINK**i * b - table[level] ** 0.5
        away = by_source * source + (SHRINK**i * c - (1 - table[level]) ** 0.5) * fresh
        value += away.square().flatten(1).sum(1) / pixels / 2
        slope += 2 * by_source * away / pixels / 2 * 2  # images are half the size of their source
    return value, slope


def noise_of(knows: frozenset[Site], draw: int) -> Tensor:
    """The forward noise that an attacker sees: the victim's, or its own guess."""
    own = tape(VICTIM) if FORWARD in knows else tape(f"{ATTACKER}/0").copies([draw])
    return own.normal(FORWARD, 0, GROUP.images)


# ------------------------------------------------------------------------ the gradient is known


@pytest.mark.parametrize("knows", [NONE, frozenset({FORWARD})])
def test_the_deviation_of_a_linear_sampler_is_the_known_one(knows: frozenset[Site]) -> None:
    """With the noise that the purifier itself is given, at every draw."""
    defense = Defense(Shrinking(), Indifferent(), [], "none")
    draws = [3, 5]
    found = view(defense, knows).gradient(
        GROUP.images, GROUP.labels, cross_entropy, draws, DiffAttack(weight=4.0).deviation
    )
    want = [deviations(GROUP.images, noise_of(knows, draw)) for draw in draws]
    torch.testing.assert_close(found.mean, 4 * (want[0][1] + want[1][1]) / 2)
    log2 = torch.tensor(2.0).log()
    losses = torch.stack([log2 + 4 * value for value, _ in want], 1)
    torch.testing.assert_close(found.losses, losses)


@pytest.mark.parametrize("knows", [NONE, frozenset({FORWARD})])
def test_the_search_climbs_the_deviation(knows: frozenset[Site]) -> None:
    """Where the classifier is indifferent, a step goes to the corner that deviates most."""
    defense = Defense(Shrinking(), Indifferent(), [], "none")
    found = run(defense, DiffAttack(1, 1.0, 1), knows)
    fresh = noise_of(knows, 0)
    value, slope = deviations(GROUP.images, fresh)
    assert float(slope.abs().min()) > 1e-6
    want = BALL.project(GROUP.images + BALL.eps * slope.sign(), GROUP.images)
    torch.testing.assert_close(found.images, want)
    assert bool((deviations(found.images, fresh)[0] > value).all())


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("policy", ["none", "step"])
def test_the_joint_gradient_agrees_with_finite_differences(name: str, policy: Policy) -> None:
    """In float64, through every sampler; that of the logits alone doesn't."""
    network = SmallDenoiser().double()
    purifier = sampler(name, network, clamp_output=False, **_smooth(name))
    defense = Defense(purifier, Small().double(), [network], policy)
    images = 0.2 + 0.6 * uniform(4, 1, 4, 4, dtype=torch.float64)
    direction = uniform(4, 1, 4, 4, seed=7, dtype=torch.float64) - 0.5

    def at(x: Tensor, weight: float = 3.0) -> Gradient:
        deviation = DiffAttack(weight=weight, levels=2).deviation
        return view(defense).gradient(x, GROUP.labels, cross_entropy, [1, 2], deviation)

    h = 1e-5
    rise = at(images + h * direction).losses - at(images - h * direction).losses
    want = (rise / (2 * h)).mean(1)
    got = (at(images).mean * direction).flatten(1).sum(1)
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)
    alone = (at(images, 0.0).mean * direction).flatten(1).sum(1)
    assert float(((alone - want) / want).abs().min()) > 1e-3


def _smooth(name: str) -> dict[str, Any]:
    """Options without a kink."""
    return {} if name == "diffpure" else {"clip_x0": False}


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("knows", SUBSETS)
def test_policies_agree_bit_for_bit_at_every_knowledge(name: str, knows: frozenset[Site]) -> None:
    found = []
    for policy in ("none", "step", "auto"):
        network = SmallDenoiser()
        defense = Defense(sampler(name, network, steps=3), Small(), [network], policy)
        found.append(run(defense, DiffAttack(2, 0.4, 2, "margin", weight=2.0, levels=2), knows))
    assert all(torch.equal(found[0].images, other.images) for other in found[1:])
    assert not torch.equal(found[0].images, GROUP.images)


# --------------------------------------------------------------------------- it is PGD otherwise

SEARCHES: list[dict[str, Any]] = [
    {},
    {"loss": "margin", "random_start": True, "restarts": 2},
    {"loss": "ce-targeted"},
]


@pytest.mark.parametrize("knows", SUBSETS)
@pytest.mark.parametrize("options", SEARCHES)
def test_without_weight_it_is_pgd_and_costs_the_same(
    knows: frozenset[Site], options: dict[str, Any]
) -> None:
    """Bit for bit; and with a weight it asks for as much, but finds another image."""
    found = []
    weighted = [DiffAttack(2, 0.4, 3, weight=w, **options) for w in (0.0, 50.0)]
    methods: list[Attack] = [PGD(2, 0.4, 3, **options), *weighted]
    for method in methods:
        network = SmallDenoiser()
        defense = Defense(sampler("ddpm", network), Small(), [network], "none")
        found.append((run(defense, method, knows), defense.counter.images))
    (pgd, cost), (same, as_much), (other, too) = found
    assert torch.equal(same.images, pgd.images)
    assert not torch.equal(other.images, pgd.images)
    assert cost == as_much == too
    for one in (same, other):
        assert torch.equal(one.gradient, pgd.gradient)
        assert torch.equal(one.forward, pgd.forward)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_deviation_that_weighs_nothing_leaves_the_gradient_bit_for_bit(name: str) -> None:
    network = SmallDenoiser()
    defense = Defense(sampler(name, network), Small(), [network], "none")
    sight = view(defense, max_batch=6)
    args = GROUP.images, GROUP.labels, cross_entropy, range(5)
    weightless = DiffAttack(weight=0.0).deviation
    plain, watched = sight.gradient(*args), sight.gradient(*args, weightless)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))


def test_restarts_are_compared_by_the_classifier_alone() -> None:
    """Of two starts it keeps the better for the classifier, though the other deviates more."""
    network = SmallDenoiser()
    defense = Defense(sampler("ddim", network), Small(), [network], "none")
    knows = frozenset({FORWARD})
    single = [
        run(defense, DiffAttack(2, 0.2, 1, random_start=True, restarts=n, weight=1e4), knows).images
        for n in (1, 2)
    ]
    sight = view(defense, knows)
    losses = [sight.gradient(x, GROUP.labels, cross_entropy, [0]).losses[:, 0] for x in single]
    assert bool((losses[1] >= losses[0]).all())
    assert bool((losses[1] > losses[0]).any())


# ----------------------------------------------------------------------------------- which levels


def states(levels: Sequence[int]) -> list[State]:
    """States whose mean squares are powers of 2, so that their sum tells which they are."""
    return [
        State(n, torch.zeros(2, 1, 2, 2), torch.full((2, 1, 2, 2), 2.0 ** (n / 2))) for n in levels
    ]


@pytest.mark.parametrize(
    ("levels", "want"),
    [
        (None, [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]),
        (10, [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]),
        (5, [8, 6, 4, 2, 0]),
        (3, [7, 4, 0]),
        (1, [0]),
    ],
)
def test_levels_are_spread_evenly(levels: int | None, want: list[int]) -> None:
    found = DiffAttack(weight=2.0, levels=levels).deviation(states(range(9, -1, -1)))
    mean = 2.0 * sum(2.0**level for level in want) / len(want)
    torch.testing.assert_close(found, torch.full((2,), mean))


def test_more_levels_than_steps_are_refused() -> None:
    network = SmallDenoiser()
    defense = Defense(sampler("ddpm", network, steps=3), Small(), [network], "none")
    with pytest.raises(AttackFailed, match="levels: 4, but this purifier takes 3 reverse steps"):
        run(defense, DiffAttack(1, 0.4, 1, levels=4))


# ------------------------------------------------------------------------------ what it is not for


def unlabelled(images: Tensor, noise: Noise) -> Tensor:
    """A purifier of a user's own, whose steps say no level."""
    return memory.step(lambda z: 0.9 * z, images + 0.1 * noise.normal(FORWARD, 0, images))


def voting(images: Tensor, noise: Noise) -> Tensor:
    """A purifier of a user's own, which takes the mean of two copies of each image."""
    copies = Shrinking()(images.repeat(2, 1, 1, 1), Twice(noise))
    return copies.view(2, *images.shape).mean(0)


@dataclass(frozen=True)
class Twice:
    """Noise for two copies of a batch."""

    noise: Noise

    def normal(self, site: Site, step: int, like: Tensor) -> Tensor:
        half = like[: len(like) // 2]
        return torch.cat([self.noise.normal(site, step + k, half) for k in (0, 1)])


@pytest.mark.parametrize(
    "purifier",
    [
        Made(voting),
        Identity(),
        NoiseOnly(60, False),
        OneShot(SmallDenoiser(), 60, False),
        Made(unlabelled),
        StraightThrough(sampler("ddpm", SmallDenoiser())),
    ],
)
def test_a_purifier_that_shows_nothing_is_refused(purifier: Any) -> None:
    defense = Defense(purifier, Small(), [], "none")
    with pytest.raises(
        AttackFailed, match=r"shows no states .* take attack standard .*eot"
    ) as failed:
        run(defense, DiffAttack(1, 0.4, 2))
    assert "\n" not in str(failed.value)
    run(defense, DiffAttack(1, 0.4, 2, weight=0.0))


def test_its_declaration() -> None:
    made = make("diffattack", {"steps": 2, "step_size": 0.5, "eot": 3, "levels": 4})
    assert made == DiffAttack(2, 0.5, 3, weight=1.0, levels=4)
    assert made.evaluations(Setup(hidden=False)) == Evaluations(2, 0, exact=True)


@pytest.mark.parametrize(("key", "value"), [("weight", -1), ("levels", 0)])
def test_a_bad_option_is_refused(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{key}: input should be"):
        make("diffattack", {key: value})


def test_a_gradient_that_does_not_go_through_the_purifier_is_unfit() -> None:
    bpda = Setup(hidden=True, gradient="bpda")
    assert "bpda has none inside the purifier" in str(DiffAttack().unfit(bpda))
    assert DiffAttack(weight=0.0).unfit(bpda) is None
    assert DiffAttack().unfit(Setup(hidden=True, gradient="surrogate:3")) is None
    targeted = DiffAttack(loss="ce-targeted", restarts=10)
    assert "give 9 at most" in str(targeted.unfit(Setup(hidden=True))), "as PGD"


def test_it_asks_for_as_much_as_pgd() -> None:
    own, pgd = (described(name, make(name, {})) for name in ("diffattack", "pgd"))
    assert own == {**pgd, "weight": 1.0, "levels": None}


def test_known_draws_make_it_deterministic() -> None:
    network = SmallDenoiser()
    defense = Defense(sampler("ddpm", network), Small(), [network], "none")
    one, ten = (run(defense, DiffAttack(2, 0.4, n), BOTH) for n in (1, 10))
    assert torch.equal(one.images, ten.images)
    assert ten.gradient.tolist() == [2] * 4
