"""A majority of several purifications: draws, decision, logits, attacks, entries and records."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dbp_bench.attacks.apgd import APGD
from dbp_bench.attacks.common.objectives import cross_entropy
from dbp_bench.attacks.ensemble import strongest
from dbp_bench.attacks.square import Square
from dbp_bench.checks.conformance import CHECKS, fault
from dbp_bench.defense import NO_MAJORITY, Defense, StraightThrough
from dbp_bench.entries.registry import Registry
from dbp_bench.errors import AttackFailed, BadEntry
from dbp_bench.evaluation import Group, attack, predict
from dbp_bench.noise import ATTACKER, FORWARD, REVERSE, STEPS_PER_VOTE, VICTIM, Noise, Site, Tape
from dbp_bench.result import Result
from dbp_bench.runs.execute import execute
from dbp_bench.runs.job import Job, Overrides, resolve
from dbp_bench.threat import AttackerView, Budget, Linf
from own_entries import folder, toy_defense
from toys import (
    Echo,
    GaussianDenoiser,
    Linear,
    LoggedNoise,
    Made,
    MixtureDenoiser,
    Noisy,
    Recorder,
    Small,
    distinct,
    normal,
    sampler,
    uniform,
)

F64 = torch.float64


def tape(n: int, draw: int = 0, owner: str = VICTIM) -> Tape:
    return Tape.make(0, owner, range(n), draw)


class Rows(nn.Module):
    """Logits ``(b, k)`` of each vote, in turn, whatever the image: vote v gives ``rows[v]``."""

    def __init__(self, rows: Sequence[Sequence[Sequence[float]]]) -> None:
        super().__init__()
        self.rows, self.next = torch.tensor(rows), 0

    def forward(self, images: Tensor) -> Tensor:
        row = self.rows[self.next % len(self.rows)]
        self.next += 1
        return row


def still(images: Tensor, noise: Noise) -> Tensor:
    return images


def voting(rows: Sequence[Sequence[Sequence[float]]]) -> Defense:
    return Defense(Made(still, frozenset()), Rows(rows), votes=len(rows))


# -------------------------------------------------------------------------------- the decision


def test_the_class_with_the_most_votes_wins_however_sure_the_others_are() -> None:
    """Two votes of three name class 1, barely; the third names class 0 with all its weight."""
    defense = voting([[[0.0, 0.1, 0.0]], [[9.0, 0.0, 0.0]], [[0.0, 0.1, 0.0]]])
    x = uniform(1, 1, 2, 2)
    assert defense.classes(x, tape(1)).tolist() == [1]
    assert defense.logits(x, tape(1)).argmax(1).tolist() == [0], "the logits may not agree"
    assert not defense.decided_by_logits


@pytest.mark.parametrize(
    ("named", "winner"),
    [
        ([0, 0, 1, 1], NO_MAJORITY),  # published defenses would say 0
        ([2, 0, 1, 2], 2),
        ([0, 1, 2, 3], NO_MAJORITY),
        ([3, 3, 3, 0], 3),
    ],
)
def test_a_tie_has_no_winner_and_counts_as_wrong(named: list[int], winner: int) -> None:
    defense = voting([[[float(k == name) for k in range(4)]] for name in named])
    x = uniform(1, 1, 2, 2)
    assert defense.classes(x, tape(1)).tolist() == [winner]
    for label in range(4):
        right = predict(defense, x, [0], seed=0, draw=0) == label
        assert right.tolist() == [label == winner]


def test_without_votes_the_class_is_that_of_the_largest_logit() -> None:
    defense = voting([[[0.0, 2.0, 1.0], [3.0, 3.0, 1.0]]])
    assert defense.classes(uniform(2, 1, 2, 2), tape(2)).tolist() == [1, 0]
    assert defense.decided_by_logits


def test_a_vote_that_is_not_finite_is_refused() -> None:
    defense = voting([[[0.0, 1.0]], [[0.0, float("nan")]], [[0.0, 1.0]]])
    with pytest.raises(AttackFailed, match="logits that are not finite"):
        predict(defense, uniform(1, 1, 2, 2), [0], seed=0, draw=0)


def test_logits_are_those_of_the_mean_probability() -> None:
    rows = normal(5, 3, 4, dtype=F64)  # vote, image, class
    defense = voting(rows.tolist())
    logits = defense.logits(uniform(3, 1, 2, 2), tape(3)).double()
    mean = rows.softmax(2).mean(0)
    torch.testing.assert_close(logits.exp(), mean, rtol=1e-6, atol=1e-7)
    labels = torch.tensor([0, 3, 1])
    want = -mean.gather(1, labels[:, None]).log()[:, 0]
    torch.testing.assert_close(cross_entropy(logits, labels), want, rtol=1e-5, atol=1e-6)


def test_sure_votes_keep_a_gradient_in_single_precision() -> None:
    """As of one purification: at margins where softmax - 1 would be exactly 0."""
    gradients = []
    for dtype in (torch.float32, F64):
        classifier = Linear(2 * torch.ones(16, dtype=dtype))
        defense = Defense(Noisy(0.01, 0.01), classifier, votes=3)
        x = (0.8 + 0.1 * uniform(2, 1, 4, 4)).to(dtype).requires_grad_()
        loss = cross_entropy(defense.logits(x, tape(2)), torch.tensor([1, 1]))
        assert float(loss.detach().max()) < 1e-10
        gradients.append(torch.autograd.grad(loss.sum(), x)[0])
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=1e-4, atol=0)


@pytest.mark.parametrize("votes", [0, -1])
def test_a_number_of_votes_that_cannot_be(votes: int) -> None:
    with pytest.raises(ValueError, match="is not positive"):
        Defense(Noisy(1, 1), Echo(), votes=votes)


# --------------------------------------------------------------------------------- the draws


def test_each_vote_has_noise_of_its_own_and_the_first_that_of_no_vote() -> None:
    x, noise = uniform(3, 1, 2, 2), LoggedNoise(tape(3))
    Defense(Noisy(1, 1), Small(), votes=4).logits(x, noise)
    steps = [step for site, step, _ in noise.log if site == REVERSE]
    assert steps == [0, STEPS_PER_VOTE, 2 * STEPS_PER_VOTE, 3 * STEPS_PER_VOTE]
    assert distinct(torch.cat([drawn for _, _, drawn in noise.log])) == 3 * 4 * 2
    plain = LoggedNoise(tape(3))
    Defense(Noisy(1, 1), Small()).logits(x, plain)
    for (site, step, one), (other, number, two) in zip(plain.log, noise.log[:2], strict=True):
        assert (site, step) == (other, number)
        assert torch.equal(one, two)
    assert STEPS_PER_VOTE > 10**9


def test_shown_draws_are_those_of_every_vote() -> None:
    """Whoever knows both sites computes the victim's very logits; whoever knows one, others."""
    defense, x = Defense(Noisy(0.5, 0.5), Small(), votes=3), uniform(4, 1, 4, 4)
    want = defense.logits(x, tape(4, draw=2))

    def seen(*sites: Site) -> Tensor:
        knows = frozenset(sites)
        view = AttackerView(defense, knows, tape(4, 2), tape(4, owner=ATTACKER), 4096)
        return view.logits(x, [0])[:, 0]

    assert torch.equal(seen(FORWARD, REVERSE), want)
    for sites in ((FORWARD,), (REVERSE,), ()):
        assert float((seen(*sites) - want).abs().min()) > 0


def test_copies_of_a_vote_are_draws_like_any_other() -> None:
    """A pass over many draws gives what each draw gives alone."""
    defense, x = Defense(Noisy(0.5, 0.5), Small(), votes=3), uniform(4, 1, 4, 4)
    view = AttackerView(defense, frozenset(), tape(4), tape(4, owner=ATTACKER), 4096)
    together = view.logits(x, [0, 1, 5])
    for i, draw in enumerate([0, 1, 5]):
        alone = defense.logits(x, tape(4, draw, ATTACKER))
        torch.testing.assert_close(together[:, i], alone, rtol=1e-5, atol=1e-6)
    assert distinct(together.flatten(0, 1)) == 12


def test_every_vote_is_counted_and_every_activation() -> None:
    denoiser = Recorder(GaussianDenoiser())
    x = uniform(2, 1, 4, 4)
    sizes = []
    for votes in (1, 5):
        purifier = sampler("ddpm", denoiser, t_star=60, steps=4)
        defense = Defense(purifier, Small(), [denoiser], votes=votes)
        defense.logits(x, tape(2))
        defense.classes(x, tape(2))
        assert defense.counter.images == 2 * 2 * 4 * votes
        sizes.append(defense.activation_bytes(x))
    assert sizes[1] > 4 * sizes[0]


@pytest.mark.parametrize("title", CHECKS)
@pytest.mark.parametrize("name", ["ddpm", "gdmp"])
def test_it_conforms(title: str, name: str) -> None:
    means = torch.stack([normal(4, 4, seed=s, dtype=F64) * 0.5 for s in range(3)])[:, None]
    denoiser = MixtureDenoiser(means)
    purifier = sampler(name, denoiser, t_star=60, steps=2, clip_x0=False, clamp_output=False)
    defense = Defense(purifier, Small().double(), [denoiser], votes=3)
    assert fault(CHECKS[title], defense, uniform(3, 1, 4, 4, dtype=F64)) is None


def test_a_vote_without_steps_of_its_own_would_not_conform() -> None:
    x = uniform(3, 1, 4, 4)

    class Again(Defense):
        def _votes(self, images: Tensor, noise: Noise) -> Tensor:
            return torch.stack([self.classifier(self.purifier(images, noise)) for _ in "12"], 1)

    found = fault(CHECKS["asks for each draw once"], Again(Noisy(1, 1), Small(), votes=2), x)
    assert found is not None
    assert "more than once" in found


# ------------------------------------------------------------------------------------ attacks


def torn(votes: int) -> tuple[Defense, Group]:
    """Images near a boundary, under noise that often puts votes on either side of it."""
    weight = torch.ones(16)
    defense = Defense(Noisy(0.5, 0.2), Linear(weight, -8.0), votes=votes)
    labels = torch.arange(60) % 2
    images = 0.5 + (labels * 2 - 1)[:, None, None, None] * 0.04 + 0 * uniform(60, 1, 4, 4)
    return defense, Group(images, labels, range(60))


@pytest.mark.parametrize(("votes", "retires"), [(1, True), (3, False)])
@pytest.mark.parametrize("name", ["apgd", "square", "ensemble"])
def test_no_image_of_a_vote_retires(name: str, votes: int, retires: bool) -> None:
    """Every draw is known. Logits end the search of an image only where they decide."""
    defense, group = torn(votes)
    right = predict(defense, group.images, group.ids, seed=0, draw=0) == group.labels
    with torch.no_grad():
        soft = defense.logits(group.images, tape(60)).argmax(1) == group.labels
    # This is what must not be taken for the end: wrong by the logits, right by the majority.
    assert bool((right & ~soft).any()) == (votes == 3)
    seen: list[int] = []

    def member(view: AttackerView, images: Tensor, labels: Tensor, budget: Budget) -> Tensor:
        seen.append(len(images))
        return images

    members: list[Any] = [member, member]
    methods: dict[str, Any] = {
        "apgd": APGD(steps=6, eot=1, restarts=2, random_start=True),
        "square": Square(n_queries=12, eot=1),
        "ensemble": partial(strongest, members, 1),
    }
    found = attack(
        defense,
        methods[name],
        group,
        Linf(0.02),
        defense.sites,
        seed=0,
        victim_draw=0,
        max_batch=4096,
    )
    if name == "ensemble":
        assert (min(seen) < 60) == retires
        return
    work = found.gradient if name == "apgd" else found.forward
    full = {"apgd": 2 * 6, "square": 12 + 2}[name]
    assert int(work.max()) == full
    assert (int(work.min()) < full) == retires


def test_bpda_votes_as_often_as_the_defense(tmp_path: Path) -> None:
    subject = entries(tmp_path, votes=3).subject("voter", "digits-linf")
    evaluated = subject.defense()
    assert evaluated.votes == 3
    bpda = subject.searched(evaluated, "bpda")
    assert isinstance(bpda.purifier, StraightThrough)
    x = uniform(2, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(bpda.logits(x, tape(2)), evaluated.logits(x, tape(2)))


# ----------------------------------------------------------------------------------- entries


def entries(path: Path, **setting: Any) -> Registry:
    """A registry with the defense `voter`, forward noise on the digits."""
    table = toy_defense("dbp_bench.purifiers.controls:NoiseOnly", ["forward"])
    table["settings"][0]["options"] = {"t_star": 400, "clamp_output": False}
    table["settings"][0] |= setting
    registry = Registry([folder(path, defenses={"voter": table})])
    registry.defense("voter")
    return registry


def job(registry: Registry, **changes: Any) -> Job:
    effort = {"budget": 2}
    overrides = Overrides(effort, examples=8, batch_size=4, **changes)
    return resolve(
        registry, "digits-linf", "voter", "dwbox", seed=0, device="cpu", overrides=overrides
    )


def test_an_entry_says_how_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dbp_bench.provenance._git", lambda: (None, None))
    once = entries(tmp_path / "once")
    same = entries(tmp_path / "same", votes=1)
    thrice = entries(tmp_path / "thrice", votes=3)
    assert job(once).identity() == job(same).identity()
    assert job(once).identity() != job(thrice).identity()
    results = {}
    for name, registry in (("once", once), ("thrice", thrice)):
        results[name] = Result.read(execute(job(registry), tmp_path / f"out-{name}"))
    plain = {"t_star": 400, "clamp_output": False}
    assert results["once"].options == plain
    assert results["thrice"].options == {**plain, "votes": 3}
    assert results["thrice"].predicted.clean != results["once"].predicted.clean
    # Continued from its own file: the identity of a record is that of its request.
    execute(job(thrice), tmp_path / "out-thrice")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"votes": 0}, r"votes: input should be greater than or equal to 1, not 0"),
        ({"votes": "ten"}, r"votes: input should be a valid integer, not 'ten'"),
        (
            {"options": {"t_star": 400, "clamp_output": False, "votes": 3}},
            "options: votes: stands beside options, not among them",
        ),
    ],
)
def test_an_entry_that_cannot_be_right(
    tmp_path: Path, setting: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadEntry, match=message):
        entries(tmp_path, **setting)
