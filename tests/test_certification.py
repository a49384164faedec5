"""Votes and their bound: golden values, a known smoothed classifier, and each public mistake."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from math import sqrt
from statistics import NormalDist
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from closed_forms import NoiseNet, gaussian
from dbp_bench.certificate import (
    ABSTAIN,
    Certified,
    certified,
    dataset_bound,
    largest_radius,
    lower_bound,
    radius,
)
from dbp_bench.certification import (
    ESTIMATION,
    Counts,
    Smoothing,
    check_classes,
    check_votes,
    count,
    group_size,
    is_smoothing,
    passes,
)
from dbp_bench.defense import Defense, Identity, Purifier
from dbp_bench.errors import AttackFailed, BadRequest, NotConforming
from dbp_bench.noise import FORWARD, REVERSE, Noise, Site, Tape
from dbp_bench.purifiers.controls import OneShot
from dbp_bench.purifiers.ddpm import DDIM, DDPM
from dbp_bench.purifiers.resize import Resized
from dbp_bench.purifiers.schedule import LINEAR

# ------------------------------------------------------------------------------- golden values


@pytest.mark.parametrize(
    ("k", "n", "chance", "radii"),
    [
        (100, 100, 0.9332543, (0.37512, 0.75024, 1.50048)),
        (99, 100, 0.9113731, (0.33731, 0.67463, 1.34926)),
        (990, 1000, 0.9760362, (0.49450, 0.98900, 1.97801)),
        (9900, 10_000, 0.9865312, (0.55310, 1.10621, 2.21242)),
        (60_000, 100_000, 0.5952010, (0.06024, 0.12047, 0.24094)),
        (5155, 10_000, 0.4999999, (0.0, 0.0, 0.0)),
    ],
)
def test_golden_values(k: int, n: int, chance: float, radii: Sequence[float]) -> None:
    found = lower_bound(k, n, 0.001)
    assert found == pytest.approx(chance, abs=5e-8)
    for sigma, wanted in zip((0.25, 0.5, 1.0), radii, strict=True):
        assert radius(found, sigma) == pytest.approx(wanted, abs=5e-6)


@pytest.mark.parametrize(
    ("n", "radii"),
    [
        (1000, (0.6158, 1.2316, 1.8474, 2.4633)),
        (10_000, (0.7996, 1.5993, 2.3989, 3.1986)),
        (100_000, (0.9529, 1.9057, 2.8586, 3.8115)),
    ],
)
def test_the_largest_radius_in_reach(n: int, radii: Sequence[float]) -> None:
    for sigma, wanted in zip((0.25, 0.5, 0.75, 1.0), radii, strict=True):
        assert largest_radius(n, sigma) == pytest.approx(wanted, abs=5e-5)


def test_the_bound_is_the_inverse_of_the_binomial_tail() -> None:
    """The chance of as many votes or more, at the bound, is alpha; 0 without a vote."""
    from scipy.stats import binom

    for k, n, alpha in ((1, 10, 0.05), (7, 10, 0.001), (10, 10, 0.2), (300, 1000, 1e-6)):
        assert binom.sf(k - 1, n, lower_bound(k, n, alpha)) == pytest.approx(alpha, rel=1e-6)
    assert lower_bound(0, 10) == 0
    assert lower_bound(10, 10, 0.2) == pytest.approx(0.2 ** (1 / 10))
    assert lower_bound([0, 5, 10], 10).shape == (3,)
    with pytest.raises(ValueError, match="votes"):
        lower_bound(11, 10)


def test_the_bound_of_the_dataset() -> None:
    """The three terms, worked out by hand for 500 images at alpha = rho = 0.001."""
    terms = 0.001 + 0.00371506 + 0.00460517
    assert dataset_bound(0.6, 500) == pytest.approx(0.6 - terms, abs=1e-7)
    assert dataset_bound(0.001, 500) == 0


# ------------------------------------------------------------- what counted votes certify


def _rows(*rows: Sequence[int]) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    return np.array(rows, dtype=np.int64)


def test_the_selection_names_the_class_and_only_fresh_votes_count() -> None:
    """Each image by hand: ties to the lowest class; the selection's own votes bound nothing."""
    selection = _rows([60, 40], [50, 50], [0, 100], [100, 0])
    estimation = _rows([990, 10], [10, 990], [990, 10], [515, 485])
    found = certified(selection, estimation, [0, 1, 1, 0], n=1000, sigma=0.5)
    assert found.classes.tolist() == [0, ABSTAIN, ABSTAIN, ABSTAIN]
    assert found.radii[0] == pytest.approx(0.98900, abs=5e-6)
    assert found.radii[1:].tolist() == [0, 0, 0]
    assert found.right.tolist() == [True, False, False, False]


def test_abstentions_are_wrong_and_stay_in_the_denominator() -> None:
    """Two of four images abstain: a quarter is certified, not a half of those that answered."""
    selection, labels = _rows([9, 1], [9, 1], [9, 1], [1, 9]), [0, 0, 0, 0]
    estimation = _rows([990, 10], [500, 500], [480, 520], [10, 990])
    found = certified(selection, estimation, labels, n=1000, sigma=1.0)
    assert found.holds(0).mean() == 0.25
    assert found.holds(0).shape == (4,)


def test_an_abstention_is_never_right() -> None:
    """Not even for a label that no class has."""
    found = certified(_rows([9, 1]), _rows([500, 500]), [ABSTAIN], n=1000, sigma=1.0)
    assert found.holds(0).tolist() == [False]


def test_radii_are_not_rounded() -> None:
    """0.49999 is not 0.5; 0.5 itself is."""
    ones = np.ones(2, dtype=np.int64)
    found = Certified(ones, np.array([0.49999, 0.5]), np.ones(2), ones)
    assert found.holds(0.5).tolist() == [False, True]


def test_votes_for_no_class_are_votes_against() -> None:
    """990 of 1000 votes with 10 that name none are no more than 990 of 1000."""
    some = certified(_rows([9, 1]), _rows([990, 0]), [0], n=1000, sigma=1.0)
    assert some.radii[0] == pytest.approx(1.97801, abs=5e-6)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, 2.0])
def test_alpha_is_a_probability(alpha: float) -> None:
    with pytest.raises(BadRequest, match=r"--alpha .*between 0 and 1"):
        lower_bound(1, 2, alpha)


@pytest.mark.parametrize(
    ("sigma", "n0", "n", "said"),
    [
        (0.5, 100, 100, "--n0 100 --n 100: fewer"),
        (0.5, 0, 100, "--n0 0"),
        (0.0, 10, 100, "--sigma 0"),
        (-1.0, 10, 100, "--sigma -1"),
        (float("inf"), 10, 100, "--sigma inf"),
        (float("nan"), 10, 100, "--sigma nan"),
        (0.5, 10, 1 << 41, "--n 2199023255552: more votes"),
    ],
)
def test_numbers_that_certify_nothing(sigma: float, n0: int, n: int, said: str) -> None:
    with pytest.raises(BadRequest, match=said):
        Smoothing(sigma, n0, n)


# -------------------------------------------------------------------------------------- votes

IMAGES = torch.tensor([0.0, 0.2, 1.0]).view(3, 1, 1, 1).expand(3, 1, 2, 2).contiguous()
IDS = [5, 3, 900]
SMALL = Smoothing(0.5, 10, 45)


def _run(
    classify: Callable[[Tensor, Tape], Tensor],
    images: Tensor = IMAGES,
    smoothing: Smoothing = SMALL,
    *,
    max_batch: int = 1000,
    seed: int = 0,
    ids: Sequence[int] = IDS,
    classes: int = 2,
    added: bool = True,
) -> Counts:
    *_, last = count(
        classify,
        images,
        ids[: len(images)],
        smoothing,
        classes=classes,
        seed=seed,
        max_batch=max_batch,
        added=added,
    )
    return last


def _seen(smoothing: Smoothing = SMALL, max_batch: int = 1000) -> tuple[Tensor, Tensor]:
    """What a base classifier is given: noisy images by phase, ``(3, votes, 4)`` each."""
    seen: list[Tensor] = []

    def classify(images: Tensor, tape: Tape) -> Tensor:
        seen.append(images.view(3, -1, 4))
        return torch.zeros(len(images), dtype=torch.int64)

    _run(classify, smoothing=smoothing, max_batch=max_batch)
    both = torch.cat(seen, dim=1)
    return both[:, : smoothing.n0], both[:, smoothing.n0 :]


def _different(rows: Tensor) -> int:
    """The number of rows that differ, to five digits."""
    return len({tuple(row) for row in rows.round(decimals=5).tolist()})


def test_no_two_votes_share_gaussian_noise() -> None:
    """Neither within a phase, nor between the two, nor between images."""
    selection, estimation = _seen()
    assert (selection.shape[1], estimation.shape[1]) == (10, 45)
    noise = torch.cat([selection, estimation], dim=1) - IMAGES.view(3, 1, 4)
    assert _different(noise.reshape(-1, 4)) == 3 * 55
    assert float(noise.mean()) == pytest.approx(0, abs=4 * 0.5 / sqrt(noise.numel()))


def test_noise_is_not_clipped_and_has_the_size_that_was_asked() -> None:
    """On black and white images, half of the pixels leave [0, 1]."""
    _, noisy = _seen(Smoothing(0.5, 10, 2000), 30_000)
    for image, outside in ((noisy[0], noisy[0] < 0), (noisy[2], noisy[2] > 1)):
        assert float(outside.float().mean()) == pytest.approx(0.5, abs=0.03)
        assert float(image.std()) == pytest.approx(0.5, rel=0.03)


def test_the_defense_draws_afresh_for_each_vote() -> None:
    """Its noise differs between votes, phases and images, and isn't the Gaussian noise."""
    drawn: list[Tensor] = []
    gaussian: list[Tensor] = []

    def classify(images: Tensor, tape: Tape) -> Tensor:
        for site in (REVERSE, Site("smoothing")):
            drawn.append(tape.normal(site, 0, images).flatten(1))
        part = IMAGES.repeat_interleave(len(images) // 3, 0)
        gaussian.append(((images - part) / 0.5).flatten(1))
        return torch.zeros(len(images), dtype=torch.int64)

    _run(classify)
    rows = torch.cat([*drawn, *gaussian])
    assert _different(rows) == len(rows) == 3 * 55 * 3


def test_votes_do_not_depend_on_the_batch_or_on_other_images() -> None:
    def classify(images: Tensor, tape: Tape) -> Tensor:
        moved = images + 0.3 * tape.normal(REVERSE, 0, images)
        return (moved.flatten(1).sum(1) > 2).long()

    whole = _run(classify)
    for max_batch in (1, 7, 50):
        again = _run(classify, max_batch=max_batch)
        assert torch.equal(whole.estimation, again.estimation)
        assert torch.equal(whole.selection, again.selection)
    alone = _run(classify, IMAGES[1:2], ids=IDS[1:])
    assert torch.equal(alone.estimation[0], whole.estimation[1])
    assert not torch.equal(_run(classify, seed=1).estimation, whole.estimation)


def test_a_run_that_stops_goes_on() -> None:
    """After any pass, what is missing gives the same counts."""

    def classify(images: Tensor, tape: Tape) -> Tensor:
        return (images.flatten(1).sum(1) > 2).long()

    whole, parts = _run(classify), passes(SMALL, 3, 20)
    number = len(list(parts))
    assert number == 2 + 8
    for stop in range(1, number):
        running = count(classify, IMAGES, IDS, SMALL, classes=2, seed=0, max_batch=20)
        held = next(islice(running, stop - 1, None))
        *_, last = count(classify, IMAGES, IDS, SMALL, classes=2, seed=0, max_batch=20, counts=held)
        assert torch.equal(last.estimation, whole.estimation)
        assert last.done == {"selection": 10, "estimation": 45}


def test_passes_are_full_and_cover_every_vote_once() -> None:
    smoothing = Smoothing(1.0, 100, 1001)
    for max_batch in (30, 4096):
        images = group_size(smoothing, max_batch)
        found = list(passes(smoothing, images, max_batch))
        for phase, last in (("selection", 100), ("estimation", 1001)):
            numbers = [v for each in found if each.phase == phase for v in each.votes]
            assert numbers == list(range(last))
        assert max(images * len(each.votes) for each in found) in (30, 4080)
    assert smoothing.n0 < ESTIMATION


def test_votes_without_a_class_are_counted_for_none() -> None:
    def classify(images: Tensor, tape: Tape) -> Tensor:
        named = torch.zeros(len(images), dtype=torch.int64)
        named[::2] = -1
        return named

    found = _run(classify, smoothing=Smoothing(1.0, 10, 40))
    assert found.estimation.tolist() == [[20, 0]] * 3
    assert found.selection.tolist() == [[5, 0]] * 3


def test_no_graph_is_built() -> None:
    asked: list[bool] = []

    def classify(images: Tensor, tape: Tape) -> Tensor:
        asked.append(torch.is_grad_enabled())
        return torch.zeros(len(images), dtype=torch.int64)

    _run(classify)
    assert asked == [False, False]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda n: torch.zeros(n, dtype=torch.float64), "not the number of a class"),
        (lambda n: torch.zeros(n + 1, dtype=torch.int64), "not the number of a class"),
        (lambda n: torch.full((n,), 2), "not in 0 ... 1"),
        (lambda n: torch.full((n,), -2), "not in 0 ... 1"),
    ],
)
def test_what_is_no_class_is_refused(answer: Callable[[int], Tensor], said: str) -> None:
    with pytest.raises(AttackFailed, match=said):
        _run(lambda images, tape: answer(len(images)))


# ---------------------------------------------------------- a smoothed classifier that is known


def test_the_certificate_of_a_known_smoothed_classifier() -> None:
    """Two Gaussians of equal variance: the best classifier is a half space.

    An image at the distance m of its border keeps its class with probability Phi(m / sigma) under
    noise, so that the true radius of the smoothed classifier is m itself. With noise of the size
    tau inside, the probability is Phi(m / sqrt(sigma^2 + tau^2)): the true radius is m still, and
    the theorem gives sigma m / sqrt(sigma^2 + tau^2).
    """
    sigma, tau, n = 0.5, 0.4, 20_000
    means = torch.stack([torch.full((1, 2, 2), 0.2), torch.full((1, 2, 2), 0.8)])
    normal = (means[1] - means[0]).flatten()
    border = float(((means[0] + means[1]) / 2).flatten() @ normal)
    distances = torch.tensor([0.05, 0.3, 0.6, 0.9])
    unit = (normal / normal.norm()).view(1, 2, 2)
    images = (means[0] + means[1]) / 2 + distances.view(-1, 1, 1, 1) * unit

    def bayes(images: Tensor) -> Tensor:
        return (images.flatten(1) @ normal > border).long()

    def random(images: Tensor, tape: Tape) -> Tensor:
        return bayes(images + tau * tape.normal(REVERSE, 0, images))

    plain, noisy = sigma, sqrt(sigma**2 + tau**2)
    for spread, classify in ((plain, lambda images, _: bayes(images)), (noisy, random)):
        counts = _run(
            classify,
            images,
            Smoothing(sigma, 100, n),
            max_batch=20_000,
            ids=range(4),
        )
        shares = counts.estimation[:, 1] / n
        found = certified(
            counts.selection.numpy(), counts.estimation.numpy(), [1] * 4, n=n, sigma=sigma
        )
        for i, m in enumerate(distances.tolist()):
            chance = NormalDist().cdf(m / spread)
            off = sqrt(chance * (1 - chance) / n)
            assert float(shares[i]) == pytest.approx(chance, abs=4 * off)
            assert found.chances[i] < chance
            limit = sigma * m / spread
            assert found.radii[i] <= limit <= m + 1e-6
            assert found.radii[i] == pytest.approx(limit, abs=0.05)
        assert found.right.all()


def test_a_bound_fails_about_as_often_as_alpha_says() -> None:
    """Of 3,000 certificates at alpha = 0.05, between 3 and 6 % are above the true probability."""
    share = 0.8
    rng = np.random.default_rng(0)
    votes = rng.binomial(400, share, 3000)
    failed = (lower_bound(votes, 400, 0.05) > share).mean()
    assert 0.03 < failed <= 0.06


# ------------------------------------------------------------------------------------ refused


@dataclass(frozen=True)
class _Shared:
    """A purifier that gives every image of a batch the noise of its first one."""

    sites: ClassVar[frozenset[Site]] = frozenset({REVERSE})

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        return images + 0.1 * noise.normal(REVERSE, 0, images)[:1]


@dataclass(frozen=True)
class _OneRow:
    """A purifier that draws one row for the whole batch."""

    sites: ClassVar[frozenset[Site]] = frozenset({REVERSE})

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        return images + 0.1 * noise.normal(REVERSE, 0, images[:1])


@dataclass(frozen=True)
class _FourRows:
    """A purifier that draws a row for each image, and uses the first four for all."""

    sites: ClassVar[frozenset[Site]] = frozenset({REVERSE})

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        drawn = noise.normal(REVERSE, 0, images)
        return images + 0.1 * drawn[torch.arange(len(images)) % 4]


@dataclass(frozen=True)
class _LaterRows:
    """A purifier that draws a row for each image, and lets a pair in the batch share one."""

    sites: ClassVar[frozenset[Site]] = frozenset({REVERSE})

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        drawn = noise.normal(REVERSE, 0, images)
        if len(drawn) > 20:
            drawn[20] = drawn[10]
        return images + 0.1 * drawn


@dataclass(frozen=True)
class _ByRow:
    """A purifier whose noise is the same in every call, another for each row."""

    sites: ClassVar[frozenset[Site]] = frozenset()

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        fixed = Tape.make(0, "fixed", range(len(images))).normal(REVERSE, 0, images)
        return images + 0.1 * fixed


@dataclass(frozen=True)
class _OfTheBatch:
    """A purifier that takes away the mean of the batch."""

    sites: ClassVar[frozenset[Site]] = frozenset({REVERSE})

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        noisy = images + 0.1 * noise.normal(REVERSE, 0, images)
        return noisy - noisy.mean(0, keepdim=True)


@dataclass(frozen=True)
class _Own:
    """A purifier as it should be."""

    sites: ClassVar[frozenset[Site]] = frozenset({REVERSE})

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        return images + 0.1 * noise.normal(REVERSE, 0, images)


@pytest.mark.parametrize(
    "purifier", [_Shared(), _OneRow(), _FourRows(), _LaterRows(), _ByRow(), _OfTheBatch()]
)
def test_votes_that_share_noise_are_refused(purifier: Purifier) -> None:
    with pytest.raises(NotConforming, match=r"\AI?its votes are not independent|share noise"):
        check_votes(Defense(purifier, nn.Flatten()), IMAGES[1:2], 64)


def test_votes_with_noise_of_their_own_are_not() -> None:
    for copies in (1, 2, 3, 64):
        check_votes(Defense(_Own(), nn.Flatten()), IMAGES[1:2], copies)
        check_votes(Defense(Identity(), nn.Flatten()), IMAGES[1:2], copies)


@dataclass(frozen=True)
class _Forward:
    """A purifier of the noisy image, or of `more` than that."""

    size: float
    more: float = 0.0
    clipped: bool = False

    sites: ClassVar[frozenset[Site]] = frozenset({FORWARD, REVERSE})

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        noisy = images + self.size * noise.normal(FORWARD, 0, images)
        if self.clipped:
            noisy = noisy.clamp(0, 1)
        return (noisy + noise.normal(REVERSE, 0, images)).sin() + self.more * images


def _is_smoothing(purifier: Purifier, size: float, votes: int = 1) -> bool:
    return is_smoothing(Defense(purifier, nn.Flatten(), votes=votes), IMAGES, size)


def test_forward_noise_that_smooths_is_seen_from_outside() -> None:
    assert _is_smoothing(_Forward(0.25), 0.25)
    assert _is_smoothing(_Forward(0.25, clipped=True), 0.25)  # clipped afterwards: no harm
    assert not _is_smoothing(_Forward(0.25), 0.26)
    # In float64, as a run tries it, a size is told from one of another schedule.
    exact = Defense(_Forward(0.25), nn.Flatten())
    assert is_smoothing(exact, IMAGES.double(), 0.25)
    assert not is_smoothing(exact, IMAGES.double(), 0.25 * 1.0003)
    assert not _is_smoothing(_Forward(0.25, more=0.05), 0.25)  # a guide sees the clean image
    assert not _is_smoothing(Resized(_Forward(0.25), 4), 0.25)
    assert not _is_smoothing(_Forward(0.25), 0.25, votes=2)  # each vote has noise of its own
    assert not _is_smoothing(_Own(), 0.1)
    assert not _is_smoothing(Identity(), 0.1)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "one shot"])
def test_the_forward_noise_of_samplers_smooths(sampler: str) -> None:
    """At level t it is ``sqrt((1 - a) / a) / 2`` in pixels, whatever follows."""
    network = NoiseNet(gaussian(0.2, 0.3), lambda t: LINEAR.signal()[round(t)])
    purifiers: dict[str, Purifier] = {
        "ddpm": DDPM(network, 100, 4, "large", clip_x0=True, clamp_output=True),
        "ddim": DDIM(network, 100, 4, clip_x0=True, clamp_output=True),
        "one shot": OneShot(network, 100, clamp_output=True),
    }
    images = IMAGES.double()
    defense = Defense(purifiers[sampler], nn.Flatten())
    for level in (99, 100, 101):
        a = LINEAR.signal()[level]
        assert is_smoothing(defense, images, sqrt((1 - a) / a) / 2) == (level == 100)


def test_the_votes_of_a_defense_that_smooths_are_its_draws() -> None:
    """No noise is added, and each vote has draws of its own."""
    drawn: list[Tensor] = []

    def classify(images: Tensor, tape: Tape) -> Tensor:
        assert torch.equal(images, IMAGES.repeat_interleave(len(images) // 3, 0))
        drawn.append(tape.normal(FORWARD, 0, images).flatten(1))
        return torch.zeros(len(images), dtype=torch.int64)

    _run(classify, added=False)
    assert _different(torch.cat(drawn)) == 3 * 55


def test_a_list_that_is_sorted_by_class_is_refused() -> None:
    """The first 500 of a list of 1,000 classes with 50 images each are of 10 classes."""
    ordered = [label for label in range(1000) for _ in range(50)]
    with pytest.raises(BadRequest, match="10 of 1000 classes"):
        check_classes(ordered[:500], ordered)
    check_classes(ordered[::100], ordered)
    check_classes(ordered, ordered)
    digits = [0] * 36 + [1] * 36 + [2] * 36 + [3] * 36
    with pytest.raises(BadRequest, match="--examples 40"):
        check_classes(digits[:40], digits)
    check_classes([7, 7, 1], [*digits, 7, 7])  # too few to tell
    # A whole list may be of few classes; in `of`, a class stands as often as it is expected.
    with pytest.raises(BadRequest):
        check_classes(ordered[:500], range(1000))
    check_classes(ordered[::100], range(1000))
