"""AutoAttack is driven faithfully: every image at its own draw, and its verdict beside ours."""

import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from dbp_bench.attacks import autoattack, make
from dbp_bench.attacks.autoattack import AutoAttack, Search, package_verdict
from dbp_bench.attacks.common.third_party import Model, Tracked
from dbp_bench.defense import Defense, Identity
from dbp_bench.entries.registry import Registry
from dbp_bench.errors import AttackFailed
from dbp_bench.evaluation import Group, attack
from dbp_bench.noise import ATTACKER, FORWARD, VICTIM, Noise, Site, Tape, seeded
from dbp_bench.result import Result
from dbp_bench.runs.execute import execute
from dbp_bench.runs.job import Overrides, resolve
from dbp_bench.threat import L2, AttackerView, Evaluations, Linf, Setup
from toys import Linear, Made, Noisy, Small, group, is_right, normal, uniform

EPS = 0.03
SIDE = 6
"""Pixels a side; the package's Square needs 5 or more in l2."""
ALL, NONE = frozenset({FORWARD}), frozenset[Site]()


class Scores(nn.Module):
    """`k` linear scores, with a curvature that depends on the image."""

    def __init__(self, k: int, pixels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(k, pixels, seed=3))

    def forward(self, images: Tensor) -> Tensor:
        return (images - 0.5).flatten(1) @ self.weight.T


def noisy(images: Tensor, noise: Noise) -> Tensor:
    return images + 0.2 * noise.normal(FORWARD, 0, images)


def view_of(defense: Defense, batch: Group, knows: frozenset[Site]) -> AttackerView:
    victim = Tape.make(0, VICTIM, batch.ids, 1)
    return AttackerView(defense, knows, victim, Tape.make(0, ATTACKER, batch.ids), 64)


# ------------------------------------------------------------------ which rows a call is about


def test_rows_ride_along_with_the_images() -> None:
    x = Tracked.of(uniform(6, 1, 4, 4))
    part = x[torch.tensor([4, 1, 3])]
    moved = torch.clamp(torch.min(part + 0.1 * torch.sign(part), part + 1), 0.0, 1.0)
    moved = moved + moved * torch.ones(3, 1, 1, 1)
    for images, want in (
        (moved, [4, 1, 3]),
        (moved.clone().detach().float().requires_grad_(), [4, 1, 3]),
        (moved[moved.flatten(1).sum(1) > -1], [4, 1, 3]),
        (moved[torch.tensor(1)].unsqueeze(0), [1]),
        (moved[1:], [1, 3]),
        (torch.cat((moved.reshape([3, -1]), moved.reshape([3, -1])), 0)[-3:], [4, 1, 3]),
    ):
        assert isinstance(images, Tracked)
        assert images.rows is not None
        assert images.rows.tolist() == want


def test_rows_are_lost_rather_than_wrong() -> None:
    x = Tracked.of(uniform(4, 1, 4, 4))
    lost = [
        x.flip(0),
        x[torch.tensor([1, 0, 2, 3])] + x,
        x.sort(dim=0).values,
        x.transpose(0, 2),
        torch.stack([x[0], x[1]]),
        x.reshape(2, 2, 4, 4),
        x[:, 0, 0, :].T,
        x[:, 0, 0, 0] + torch.zeros(4, 4),
    ]
    assert all(getattr(images, "rows", None) is None for images in lost)
    model = Model(view_of(Defense(Identity(), Small()), group(4), NONE), x)
    with pytest.raises(AttackFailed, match="which is which"):
        model(x.flip(0))


@pytest.mark.parametrize("one", [torch.tensor(1), 1])
def test_images_are_written_one_by_one(one: Tensor | int) -> None:
    """As APGD of torchattacks does, where it then may write none."""
    found = Tracked.of(uniform(3, 1, 4, 4))
    other = Tracked.of(uniform(3, 1, 4, 4, seed=1)).requires_grad_()
    want = found.clone()
    found[one] = other[one] + 0.0
    none = torch.tensor([], dtype=torch.int64)
    found[none] = other[none] + 0.0
    assert torch.equal(found.detach()[1], other.detach()[1])
    assert torch.equal(found.detach()[[0, 2]], want[[0, 2]])
    assert isinstance(found, Tracked)
    assert found.rows is not None
    assert found.rows.tolist() == [0, 1, 2]


@pytest.mark.parametrize("knows", [ALL, NONE])
def test_each_part_of_a_batch_is_seen_at_its_own_draws(knows: frozenset[Site]) -> None:
    batch = group(5)
    network = Scores(4, 16)
    defense = Defense(Made(noisy), network)
    view = view_of(defense, batch, knows)
    model = Model(view, batch.images)
    x = Tracked.of(batch.images)
    part = torch.tensor([3, 0, 2])
    guess = Tape.make(0, ATTACKER, batch.ids, 1)  # the second call is at guess 1
    tape = Tape.make(0, VICTIM, batch.ids, 1) if knows else guess
    model(x)
    leaf = x[part].requires_grad_()
    logits = model(leaf)
    assert type(logits) is Tensor
    torch.testing.assert_close(logits, defense.logits(batch.images[part], tape[part]))
    (gradient,) = torch.autograd.grad(logits[:, 1].sum(), [leaf])
    want = network.weight[1].view(1, 1, 4, 4).expand(3, -1, -1, -1)
    torch.testing.assert_close(gradient.as_subclass(Tensor), want)
    assert view.log.gradient.tolist() == [1, 0, 1, 1, 0]
    assert view.log.forward.tolist() == [1] * 5
    assert view.log.nonzero.tolist() == [True, False, True, True, False]


# -------------------------------------------------------------------------- the package's verdict


class Coin:
    """Right with probability `p`, independently at each call."""

    def __init__(self, p: float, n: int) -> None:
        self.p, self.n, self.calls = p, n, 0

    def __call__(self, images: Tensor) -> Tensor:
        tape = Tape.make(0, "coin", range(len(images)), self.calls)
        self.calls += 1
        right = tape.uniform(Site("coin"), 0, torch.empty(len(images), 1)) < self.p
        return torch.cat([right, ~right], 1).float()


@pytest.mark.parametrize("attacks", [0, 2, 4])
@pytest.mark.parametrize("p", [0.7, 0.9])
def test_the_packages_verdict_multiplies_draws(attacks: int, p: float) -> None:
    """Attacks that find nothing leave p^(n+1) of the images, not p."""
    n = 20_000
    images, labels = torch.zeros(n, 1, 1, 1), torch.zeros(n, dtype=torch.int64)
    null = [lambda images, labels: images] * attacks
    found, robust = package_verdict(Coin(p, n), null, images, labels)
    want = p ** (attacks + 1)
    assert abs(float(robust.double().mean()) - want) < 4 * (want * (1 - want) / n) ** 0.5
    assert torch.equal(found, images)


def test_the_packages_verdict_of_a_deterministic_model_is_the_accuracy() -> None:
    """The second attack gets only what the first left, and its success counts."""
    images = torch.arange(6.0).view(6, 1, 1, 1)
    labels = torch.tensor([0, 0, 0, 0, 0, 1])
    seen: list[list[float]] = []

    def model(x: Tensor) -> Tensor:
        return torch.cat([torch.zeros(len(x), 1), x.flatten(1) - 10], 1)

    def push(limit: float) -> Search:
        def search(x: Tensor, labels: Tensor) -> Tensor:
            seen.append(x.flatten().tolist())
            return torch.where(x < limit, x + 20, x)

        return search

    found, robust = package_verdict(model, [push(2), push(4)], images, labels)
    assert seen == [[0.0, 1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 4.0]]
    assert robust.tolist() == [False, False, False, False, True, False]
    assert found.flatten().tolist() == [20.0, 21.0, 22.0, 23.0, 4.0, 5.0]


# ------------------------------------------------------------------------------- the real package


def run(
    defense: Defense,
    batch: Group,
    method: AutoAttack,
    eps: float = EPS,
    knows: frozenset[Site] = ALL,
    *,
    l2: bool = False,
) -> tuple[Tensor, Tensor]:
    """Adversarial images, and the package's flags."""
    ball = L2(eps) if l2 else Linf(eps)
    out = attack(defense, method, batch, ball, knows, seed=0, victim_draw=0, max_batch=64)
    assert out.verdict is not None
    return out.images, out.verdict


def cloud(n: int, k: int = 5) -> Group:
    """Images near the middle, labelled as :class:`Scores` sees them."""
    images = 0.25 + 0.5 * uniform(n, 1, SIDE, SIDE)
    return Group(images, Scores(k, SIDE**2)(images).argmax(1), range(n))


@pytest.mark.extras
@pytest.mark.parametrize("l2", [False, True])
def test_standard_at_known_draws_is_the_packages_own_evaluation(l2: bool) -> None:
    """Robust as the closed form says: no class gains on the label by as much as is between."""
    batch = cloud(50)
    network = Scores(5, SIDE**2)
    defense = Defense(Made(noisy), network)
    weight = network.weight.detach()
    method = AutoAttack("standard", steps=12, queries=20, eot=1)
    eps = 0.1 if l2 else EPS
    found, flags = run(defense, batch, method, eps, l2=l2)
    logits = defense.logits(batch.images, Tape.make(0, VICTIM, batch.ids, 0))
    apart = weight[batch.labels][:, None] - weight
    reach = apart.norm(dim=2) if l2 else apart.abs().sum(2)
    own = logits.gather(1, batch.labels[:, None])
    margin = (own - logits - eps * reach).scatter(1, batch.labels[:, None], torch.inf).amin(1)
    clear = margin.abs() > 0.02 * reach.amax(1) * eps  # further from the boundary than the search
    assert int(clear.sum()) > 40
    robust = is_right(defense, found, batch)
    assert torch.equal(robust[clear], (margin > 0)[clear])
    assert torch.equal(robust, flags), "where all is known, the two verdicts are one"
    assert 0.1 < float(robust.float().mean()) < 0.9


@pytest.mark.extras
def test_our_drive_gives_the_packages_images_bit_for_bit() -> None:
    """A deterministic model and one seed: the same images as the package given a plain module."""
    from dbp_bench.extras import load_extra

    batch = cloud(24)
    network = Scores(5, SIDE**2)
    defense = Defense(Identity(), network)
    module = load_extra("autoattack")["autopgd_base"].__name__.partition(".")[0]
    if module != "pyautoattack" and os.environ.get("DBP_EXTRA") != "autoattack":
        pytest.skip("autoattack is installed, too, and its wrapper takes other arguments")
    import pyautoattack  # type: ignore[import-not-found, import-untyped, unused-ignore]

    with seeded(0):
        whole = pyautoattack.AutoAttack(network, eps=EPS, norm="Linf", seed=7)
        for part in (whole.apgd, whole.apgd_targeted, whole.fab):
            part.n_iter = 10
        for part in (whole.apgd, whole.apgd_targeted):
            part.__init__(
                network, n_iter=10, eps=EPS, norm="Linf", seed=7, device="cpu", logger=part.logger
            )
        whole.apgd_targeted.n_target_classes = whole.fab.n_target_classes = 4
        whole.square.n_queries = 20
        want, _ = whole.run_standard_evaluation(batch.images, batch.labels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autoattack, "seed_of", lambda *_: 7)
        found, _ = run(defense, batch, AutoAttack("standard", 10, 20, 1), knows=NONE)
    torch.testing.assert_close(found, Linf(EPS).project(want, batch.images), atol=0, rtol=0)


@pytest.mark.extras
def test_a_null_attack_counts_p_cubed_in_the_package_and_p_here() -> None:
    n, p = 1500, 0.85
    quantile = 1.0364333894937896  # of a standard normal, at p
    weight = torch.ones(16)
    three = Three(weight, quantile * 0.2 * 4)
    defense = Defense(Made(noisy), three)
    batch = Group(0.5 * torch.ones(n, 1, 4, 4), torch.zeros(n, dtype=torch.int64), range(n))
    found, flags = run(defense, batch, AutoAttack("rand", 2, 1, 2), eps=0.0, knows=NONE)
    assert torch.equal(found, batch.images)
    assert abs(float(flags.double().mean()) - p**3) < 4 * (p**3 * (1 - p**3) / n) ** 0.5
    right = is_right(defense, found, batch).double().mean()
    assert abs(float(right) - p) < 4 * (p * (1 - p) / n) ** 0.5


class Three(nn.Module):
    """Class 0 where the sum of the pixels is above its value at 0.5, less `slack`; else class 1."""

    def __init__(self, weight: Tensor, slack: float) -> None:
        super().__init__()
        self.weight, self.slack = nn.Parameter(weight), slack

    def forward(self, images: Tensor) -> Tensor:
        score = (images - 0.5).flatten(1) @ self.weight + self.slack
        return torch.stack([score, -score, -100 - score], 1)


@pytest.mark.extras
def test_the_processs_random_state_and_the_weights_are_left_alone() -> None:
    batch = cloud(6)
    network = Scores(5, SIDE**2)
    state = torch.get_rng_state()
    run(Defense(Made(noisy), network), batch, AutoAttack("standard", 5, 5, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert network.weight.grad is None


@pytest.mark.extras
@pytest.mark.parametrize(
    ("classes", "version", "message"),
    [
        (2, "standard", "apgd-t needs 4 classes, the classifier has 2"),
        (2, "rand", "apgd-dlr needs 3 classes, the classifier has 2"),
        (3, "standard", "apgd-t needs 4 classes, the classifier has 3"),
    ],
)
def test_losses_that_need_more_classes_are_refused(
    classes: int, version: Literal["standard", "rand"], message: str
) -> None:
    batch = cloud(8, classes)
    method = AutoAttack(version, 2, 2, 1)
    with pytest.raises(AttackFailed, match=message):
        run(Defense(Made(noisy), Scores(classes, SIDE**2)), batch, method, eps=0.0)


@pytest.mark.extras
def test_a_defense_that_returns_nan_is_refused() -> None:
    def broken(images: Tensor, noise: Noise) -> Tensor:
        return images * torch.where(images == images[0], images, torch.nan)

    with pytest.raises(AttackFailed, match="not finite"):
        run(
            Defense(Made(broken), Scores(5, SIDE**2)),
            cloud(8),
            AutoAttack("rand", 3, 2, 1),
            knows=NONE,
        )


def test_standard_is_refused_where_draws_are_hidden() -> None:
    with pytest.raises(AttackFailed, match=r"standard .* hidden: use autoattack:rand"):
        run(
            Defense(Noisy(0.1, 0.1), Linear(torch.ones(16))),
            group(2),
            AutoAttack("standard", 1, 1, 1),
            knows=NONE,
        )


@dataclass(frozen=True)
class Cube:
    """A budget in a norm that nobody else knows."""

    eps: float = 0.1


def test_an_unknown_norm_is_refused() -> None:
    from dbp_bench.attacks.common.third_party import norm_of

    with pytest.raises(AttackFailed, match="searches in linf, l2, not in cube"):
        norm_of(Cube(), ("Linf", "L2"), "APGD")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------ the record


class Still:
    """An attack of the package that finds nothing."""

    def __init__(self, model: nn.Module, **options: object) -> None:
        self.model = model

    def perturb(self, images: Tensor, labels: Tensor) -> Tensor:
        return images


def test_the_packages_verdict_stands_in_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = SimpleNamespace(APGDAttack=Still, APGDAttack_targeted=Still)
    fake = {"autopgd_base": module, "fab_pt": module, "square": module}
    monkeypatch.setattr(autoattack, "load_extra", lambda _: fake)
    job = resolve(
        Registry(),
        "digits-linf",
        "oneshot",
        "eot",
        attack="autoattack:rand",
        seed=0,
        device="cpu",
        overrides=Overrides(examples=3, batch_size=2, draws=4),
    )
    path = execute(job, tmp_path)
    assert path == tmp_path / "digits-linf/oneshot/eot/autoattack-rand/seed-0.json"
    result = Result.read(path)
    assert result.package_robust is not None
    assert [len(row) for row in result.package_robust] == [1, 1, 1], "an image is attacked once"
    predicted = result.predicted
    assert predicted.adversarial == predicted.clean, "the attack found nothing, and so do we"


# --------------------------------------------------------------------------------- its declaration


def test_its_versions() -> None:
    """Each has the package's own options where none are given."""
    assert make("autoattack:standard", {}) == AutoAttack("standard", 100, 5000, 1)
    assert make("autoattack:rand", {"queries": 1}) == AutoAttack("rand", 100, 1, 20)
    rand = AutoAttack("rand", steps=1, queries=1, eot=2)
    assert rand.evaluations(Setup(hidden=True)) == Evaluations(2 * 2 * 2, 5, exact=False)
    assert rand.evaluations(Setup(hidden=False)) == Evaluations(2 * 2, 5, exact=False)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("autoattack", {}, "no version ''; write autoattack:standard or autoattack:rand"),
        ("autoattack:plus", {}, "no version 'plus'; write autoattack:standard or"),
        ("autoattack:standard", {"eot": 2}, "eot: standard averages over nothing"),
        ("autoattack:rand", {"stepz": 2}, "stepz: is unknown. Did you mean 'steps'"),
        ("autoattack:rand", {"queries": 0}, "queries: input should be greater than or equal to 1"),
    ],
)
def test_bad_options_are_refused_in_one_line(
    name: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make(name, options)
    assert "\n" not in str(caught.value)
