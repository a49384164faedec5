"""Every attack, at every knowledge and in every norm: it runs, and its result stays in the ball.

Nothing is expected of one attack here that isn't of every other. What each finds, and the mistakes
that it could make, are in the tests of its module.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from dbp_bench import attacks
from dbp_bench.defense import Defense, Identity
from dbp_bench.entries.registry import Registry
from dbp_bench.errors import AttackFailed
from dbp_bench.evaluation import Group, attack, predict
from dbp_bench.noise import FORWARD, VICTIM, Noise, Site, Tape
from dbp_bench.result import Result
from dbp_bench.runs.execute import execute
from dbp_bench.runs.job import Overrides, resolve
from dbp_bench.threat import (
    L1,
    L2,
    Attack,
    AttackerView,
    Budget,
    Linf,
    Method,
    Norm,
    Setup,
    budget,
)
from own_entries import folder
from packages import need
from toys import BOTH, Linear, Made, Noisy, SmallDenoiser, is_right, normal, sampler, uniform

SOME = frozenset({FORWARD})
KNOWLEDGE = {"none known": frozenset[Site](), "forward known": SOME, "all known": BOTH}

_STEPS = {"steps": 3, "step_size": 0.5, "eot": 2, "loss": "ce"}
_STARTS = {"random_start": True, "restarts": 2}
_SPSA = {"steps": 4, "directions": 3}
_SQUARE = {"n_queries": 8, "p_init": 0.8, "eot": 2}
_APGD = {"steps": 5, "loss": "ce", **_STARTS}

_SMALL: Mapping[str, Mapping[str, Any]] = {
    "pgd": {**_STEPS, **_STARTS},
    "apgd": {**_APGD, "eot": 2},
    "low-frequency": {**_STEPS, **_STARTS, "band": 0.5},
    "selective": {**_STEPS, "sharpness": 1, "rounds": 2},
    "diffattack": {**_STEPS, **_STARTS, "weight": 1, "levels": None},
    "square": _SQUARE,
    "rays": {"n_queries": 60, "eot": 1},
    "spsa": _SPSA,
    "standard": {"budget": 24},
    "autoattack:rand": {"steps": 4, "queries": 12, "eot": 2},
    "torchattacks:PGD": {"alpha": 0.2, "steps": 4},
    "ensemble": {
        "eot": 2,
        "compare": 4,
        "members": [{"attack": "apgd", **_APGD}, {"attack": "square", **_SQUARE}],
    },
    "transfer": {"source": "toy", "search": {"attack": "pgd", **_STEPS, **_STARTS}},
}
_ATTACKS = {name.partition(":")[0] for name in _SMALL}
_APART = {"stadv", "lpips"}
"""Attacks that no ball holds, which have a bound and tests of their own."""
EFFORT = {**_SMALL, **{name: {} for name in set(attacks.names()) - _ATTACKS - _APART}}
"""A small effort of each attack; an attack that isn't named has its own."""

_L1 = {
    *("pgd", "apgd", "low-frequency", "selective", "standard"),
    *("diffattack", "transfer", "autoattack:rand"),
}
"""Attacks that also search in l1."""
_FOLLOW = (
    *("pgd", "apgd", "low-frequency", "selective", "standard"),
    *("autoattack:rand", "torchattacks:PGD"),
)
"""Attacks that follow a gradient of the logits."""
_PACKAGES = {"autoattack:rand": "pyautoattack", "torchattacks:PGD": "torchattacks"}


class Scores(nn.Module):
    """Five linear scores."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(5, 64, seed=3))

    def forward(self, images: Tensor) -> Tensor:
        return (images - 0.5).flatten(1) @ self.weight.T


def tiny() -> Defense:
    """Two steps of ancestral sampling before the scores."""
    denoiser = SmallDenoiser()
    return Defense(sampler("ddpm", denoiser, steps=2, t_star=30), Scores(), [denoiser], "none")


@cache
def group(n: int = 8) -> Group:
    """Images with pixels at the edges of the box, all right at draw 0."""
    images = (1.2 * uniform(n, 1, 8, 8) - 0.1).clamp(0, 1)
    labels = tiny().logits(images, Tape.make(0, VICTIM, range(n), 0)).argmax(1)
    return Group(images, labels, range(n))


def made(name: str) -> Attack:
    """The attack at its small effort; skipped where its package isn't there and wasn't promised."""
    need(_PACKAGES.get(name), name.partition(":")[0])
    return attacks.make(name, EFFORT[name])


def search(
    method: Method,
    batch: Group,
    ball: Budget,
    knows: frozenset[Site] = frozenset(),
    *,
    of: Defense | None = None,
    draw: int = 0,
) -> Tensor:
    """The adversarial images of `method`, which has a source to search in."""
    sources = {"toy": Defense(Identity(), Scores())}
    found = attack(
        of or tiny(),
        method,
        batch,
        ball,
        knows,
        seed=0,
        victim_draw=draw,
        max_batch=64,
        sources=sources,
    )
    return found.images


BALLS: Mapping[Norm, Budget] = {"linf": Linf(0.1), "l2": L2(0.6), "l1": L1(3.0)}


def norms(name: str) -> list[Norm]:
    if name in ("rays", "torchattacks:PGD"):  # there is one of its own for l2
        return ["linf"]
    return ["linf", "l2", "l1"] if name in _L1 else ["linf", "l2"]


def marks(name: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.extras] if name in _PACKAGES else []


CASES = [
    pytest.param(name, norm, id=f"{name}-{norm}", marks=marks(name))
    for name in sorted(EFFORT)
    for norm in norms(name)
]


@pytest.mark.parametrize("name", [pytest.param(n, marks=marks(n)) for n in EFFORT])
def test_an_attack_fits_where_it_searches(name: str) -> None:
    for norm in BALLS:
        assert (made(name).unfit(Setup(hidden=True, norm=norm)) is None) == (norm in norms(name))


@pytest.mark.parametrize("knows", KNOWLEDGE.values(), ids=KNOWLEDGE)
@pytest.mark.parametrize(("name", "norm"), CASES)
def test_every_attack_runs_at_every_knowledge_and_stays_in_the_ball(
    name: str, norm: Norm, knows: frozenset[Site]
) -> None:
    """Its own images, before the harness projects them; and where all is known, it hurts."""
    batch, method, ball = group(), made(name), BALLS[norm]
    returned: list[Tensor] = []

    def watched(view: AttackerView, images: Tensor, labels: Tensor, budget: Budget) -> Tensor:
        found = method(view, images, labels, budget)
        returned.append(found.detach().clone())
        return found

    out = search(watched, batch, ball, knows)
    (own,) = returned
    for images, slack in ((own, 1e-5), (out, 1e-6)):
        assert images.shape == batch.images.shape
        assert bool(images.isfinite().all())
        assert float(ball.size(images - batch.images).max()) <= ball.eps + slack
        assert float(images.min()) >= -slack
        assert float(images.max()) <= 1 + slack
    assert bool((out != batch.images).flatten(1).any(1).sum() >= 4), "most images moved"
    if knows == BOTH:
        assert not bool(is_right(tiny(), out, batch).all()), "every image was right before"


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_no_ball_no_attack(name: str, norm: Norm) -> None:
    """At eps = 0 there are the clean images, bit for bit, whatever the attack."""
    batch = group(4)
    assert torch.equal(search(made(name), batch, budget(norm, 0.0)), batch.images)


@dataclass(frozen=True)
class Lost:
    """Logits that are NaN at every image but the clean one."""

    clean: Tensor

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        noisy = images + 0.1 * noise.normal(FORWARD, 0, images)
        moved = (images[:, None] != self.clean).flatten(2).any(2).all(1)
        return torch.where(moved.view(-1, 1, 1, 1), noisy * torch.nan, noisy)


@pytest.mark.parametrize("name", [pytest.param(n, marks=marks(n)) for n in _FOLLOW])
def test_a_defense_that_turns_nan_under_attack_is_refused(name: str) -> None:
    """Not taken for a robust one: comparisons with NaN are false, so that no image would move."""
    batch = group(4)
    defense = Defense(Made(Lost(batch.images)), Scores())
    with pytest.raises(AttackFailed, match="not finite"):
        search(made(name), batch, Linf(0.1), of=defense)


def test_groups_draw_as_their_images_do_and_not_as_their_places() -> None:
    """What a worker is given decides nothing: image 9 has one noise, alone or in any company."""
    batch = group(12)
    method = made("pgd")

    def searched(rows: list[int]) -> Tensor:
        part = Group(batch.images[rows], batch.labels[rows], rows)
        return search(method, part, L2(0.6), SOME, draw=2)

    whole = searched(list(range(12)))
    for rows in ([9], [9, 3], [3, 9, 11, 0]):
        torch.testing.assert_close(searched(rows), whole[rows], atol=1e-5, rtol=0)
    swapped = Group(batch.images[[9]], batch.labels[[9]], [0])
    other = search(method, swapped, L2(0.6), SOME, draw=2)
    assert float((other - whole[[9]]).abs().max()) > 1e-3, "the control: an id that is another's"


# ------------------------------------------------------- success that is tested while searching


def test_success_in_the_loop_is_caught_by_the_null_attack_in_every_metric() -> None:
    """A search that does nothing meets wrong draws, too; they must not count."""
    n = 300
    images = uniform(n, 1, 4, 4)
    batch = Group(images, torch.arange(n) % 2, range(n))
    defense = Defense(Noisy(0.3, 0.0), Linear(torch.linspace(-1, 1, 16)))
    method, fell = made("pgd"), torch.zeros(n, dtype=torch.bool)

    def watched(view: AttackerView, images: Tensor, labels: Tensor, budget: Budget) -> Tensor:
        found = method(view, images, labels, budget)
        fell.copy_((view.logits(found, range(10)).argmax(2) != labels[:, None]).any(1))
        return found

    out = search(watched, batch, Linf(0.0), of=defense)
    assert 0.3 * n < int(fell.sum()) < n

    def predicted(images: Tensor) -> Tensor:
        draws = [predict(defense, images, batch.ids, seed=0, draw=d) for d in range(9)]
        return torch.stack(draws, 1)

    clean, adversarial = predicted(images), predicted(out)
    in_the_loop = torch.where(fell[:, None], 1 - batch.labels[:, None], adversarial)

    # Every outcome is compared; see the null attack among the leaderboard's checks.
    assert torch.equal(adversarial, clean)
    assert not torch.equal(in_the_loop, clean)


@pytest.mark.parametrize(
    ("threat", "attack_name"), [("null", None), ("dwbox", None), ("eot", "square")]
)
def test_the_null_attack_gives_clean_outcomes_where_draws_disagree(
    tmp_path: Path, threat: str, attack_name: str | None
) -> None:
    """Of a run as a whole; on images that are always right, there would be nothing to see."""
    table = yaml.safe_load(Registry().defense("noise-only").path.read_text())
    table["settings"] = [table["settings"][0] | {"tracks": ["digits-linf"]}]
    table["settings"][0]["options"] = {**table["settings"][0]["options"], "t_star": 300}
    registry = Registry([folder(tmp_path / "entries", defenses={"noisy": table})])
    effort = {"n_queries": 2} if attack_name == "square" else {"budget": 2}
    job = resolve(
        registry,
        "digits-linf",
        "noisy",
        threat,
        attack=attack_name,
        seed=0,
        device="cpu",
        overrides=Overrides(effort, eps=0.0, examples=10, batch_size=10),
    )
    result = Result.read(execute(job, tmp_path / "out"))
    rights = [sum(row) for row in result.right("clean")]
    assert any(0 < right < len(result.draws) for right in rights)
    assert result.predicted.adversarial == result.predicted.clean
