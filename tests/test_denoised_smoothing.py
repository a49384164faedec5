"""Denoised smoothing: levels, grids and chains, closed forms, votes that share, and the rule."""

import itertools
from collections.abc import Callable
from math import log, pi, sqrt
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from closed_forms import F64, Impulses, Mixture, NoiseNet, gaussian, moments
from dbp_bench.checks.conformance import CHECKS, fault
from dbp_bench.defense import NO_MAJORITY, Decision, Defense, Purifier, StraightThrough
from dbp_bench.entries.registry import Registry
from dbp_bench.errors import BadEntry
from dbp_bench.noise import FORWARD, REVERSE, STEPS_PER_VOTE, Site
from dbp_bench.purifiers.denoised_smoothing import (
    DDS,
    LOCAL,
    DensePure,
    DiffSmooth,
    Smoothing,
    chain,
    least_step,
    matching_time,
    noise_of,
)
from dbp_bench.purifiers.schedule import COSINE, LINEAR, ScheduleName
from own_entries import folder, toy_defense
from toys import LoggedNoise, Made, Small, discrete_signal, distinct, images, tape, uniform

COS: ScheduleName = "cosine-4000"
LIN: ScheduleName = "linear-1000"


def cosine_signal(level: float) -> float:
    """The cosine's signal as published, by the product of its clipped betas."""

    def exact(t: float) -> float:
        return float(np.cos((t + 0.008) / 1.008 * pi / 2) ** 2)

    betas = [min(1 - exact((i + 1) / 4000) / exact(i / 4000), 0.999) for i in range(round(level))]
    return float(np.prod(1 - np.array(betas)))


SIGNALS = {LIN: discrete_signal, COS: cosine_signal}


def network(schedule: ScheduleName = LIN, data: Mixture | None = None) -> NoiseNet:
    """The exact noise prediction; of one Gaussian, far from the borders, unless told."""
    return NoiseNet(data or gaussian(0.2, 0.01), SIGNALS[schedule])


def dense(steps: int = 3, net: nn.Module | None = None, **options: Any) -> DensePure:
    usual: dict[str, Any] = {"sigma": 0.25, "schedule": LIN, "variance": "small"}
    return DensePure(net or network(), steps=steps, **(usual | options))


def made(name: str, net: nn.Module | None = None) -> Any:
    net = net or network()
    purifiers: dict[str, Purifier] = {
        "smoothing": Smoothing(0.25),
        "dds": DDS(net, 0.25, LIN),
        "densepure": dense(net=net),
        "diffsmooth": DiffSmooth(net, 0.25, LIN, 0.1),
    }
    return purifiers[name]


NAMES = ("smoothing", "dds", "densepure", "diffsmooth")


# ------------------------------------------------------------------------------ levels and grids


@pytest.mark.parametrize(
    ("sigma", "first", "exact", "first_linear", "nearest"),
    [
        (0.25, 1158, 1158.51, 145, 144),
        (0.5, 1984, 1984.20, 259, 258),
        (0.75, 2490, 2490.82, 339, 338),
        (1.0, 2809, 2809.99, 396, 396),
    ],
)
def test_sigma_is_a_step_of_the_network(
    sigma: float, first: int, exact: float, first_linear: int, nearest: int
) -> None:
    assert least_step(COS, sigma, first=1) == first
    assert matching_time(COS, sigma) == pytest.approx(exact, abs=0.005)
    assert least_step(LIN, sigma, first=1) == first_linear
    assert matching_time(LIN, sigma) == nearest
    signal = COSINE.continuous(matching_time(COS, sigma))
    assert signal == pytest.approx(1 / (1 + 4 * sigma**2), rel=1e-12)
    # The noise of DDS: at least sigma, by less than one step's.
    assert noise_of(SIGNALS[LIN](first_linear + 1)) >= sigma > noise_of(SIGNALS[LIN](first_linear))


def test_noise_at_the_nearest_step() -> None:
    for step, noise in ((144, 0.24971), (258, 0.49976), (338, 0.74955), (396, 1.00024)):
        assert noise_of(LINEAR.signal()[step + 1]) == pytest.approx(noise, abs=5e-6)


@pytest.mark.parametrize(
    ("schedule", "sigma", "steps", "grid"),
    [
        (COS, 0.25, 10, "1159 1043 927 811 695 579 463 348 232 116"),
        (COS, 0.5, 10, "1984 1786 1587 1389 1191 992 794 595 397 198"),
        (COS, 1.0, 10, "2810 2529 2248 1967 1686 1405 1124 843 562 281"),
        (COS, 0.25, 2, "1159 579"),
        (COS, 0.5, 2, "1984 992"),
        (COS, 1.0, 2, "2810 1405"),
        (COS, 0.25, 5, "1159 927 695 463 232"),
        (LIN, 0.25, 10, "144 130 115 101 86 72 58 43 29 14"),
        (LIN, 0.5, 10, "258 232 206 181 155 129 103 77 52 26"),
        (LIN, 1.0, 10, "396 356 317 277 238 198 158 119 79 40"),
        (LIN, 0.25, 2, "144 72"),
        (LIN, 0.5, 2, "258 129"),
        (LIN, 1.0, 2, "396 198"),
        (LIN, 0.25, 5, "144 115 86 58 29"),
    ],
)
def test_published_grids_are_what_the_network_is_told(
    schedule: ScheduleName, sigma: float, steps: int, grid: str
) -> None:
    net = network(schedule)
    purifier = dense(steps, net, sigma=sigma, schedule=schedule)
    want = [int(step) for step in grid.split()]
    assert purifier.grid() == want
    purifier(images(), tape())
    assert net.seen == want


def test_the_cosine_schedule_is_the_published_one() -> None:
    signal = COSINE.signal()
    assert len(signal) == 4001
    assert signal[0] == COSINE.continuous(0) == 1
    for level in (1, 2, 1159, 2500, 3990, 3999, 4000):
        assert signal[level] == pytest.approx(cosine_signal(level), rel=1e-9)
    # The last beta is clipped, the one before it isn't.
    assert signal[4000] / signal[3999] == pytest.approx(0.001)
    assert signal[3999] == pytest.approx(COSINE.continuous(3999), rel=1e-9)
    for exact in (0.0, 0.5, 1158.51, 3999.0):
        assert COSINE.level_of(COSINE.continuous(exact)) == pytest.approx(exact, abs=1e-6)


# ------------------------------------------------------------------------------------- the chain


@pytest.mark.parametrize("schedule", [COS, LIN])
def test_each_link_is_the_law_of_its_strided_chain(schedule: ScheduleName) -> None:
    """By Gaussian conditioning: of z_below on z_above, where z_below has its law given x0."""
    grid = (579, 348, 116)
    links = chain(schedule, grid, "small")
    large = chain(schedule, grid, "large")

    def at(step: int) -> float:
        if schedule == COS:
            return float(np.cos((step / 4000 + 0.008) / 1.008 * pi / 2) ** 2)
        return discrete_signal(step + 1)

    assert [link.step for link in links] == [116, 348, 579]
    below = 1.0
    for i, (link, other) in enumerate(zip(links, large, strict=True)):
        # Step 0 stands for the image.
        above = at(link.step) / at(0)
        assert link.signal == pytest.approx(above, rel=1e-10)
        beta = 1 - above / below
        spread, gain = 1 - below, sqrt(1 - beta)
        pull = spread * gain / (gain**2 * spread + beta)
        assert link.law.z_weight == pytest.approx(pull, rel=1e-9, abs=1e-12)
        assert link.law.x0_weight == pytest.approx(sqrt(below) - pull * sqrt(above), rel=1e-9)
        if i:
            assert link.law.sigma**2 == pytest.approx(spread - pull * gain * spread, rel=1e-8)
            assert other.law.sigma**2 == pytest.approx(beta, rel=1e-9)
        else:
            assert link.law.sigma == other.law.sigma == 0
            assert link.law.x0_weight == pytest.approx(1)
            assert link.law.z_weight == 0
        below = above


def test_a_learned_variance_is_between_its_bounds() -> None:
    grid = (144, 72)
    first, second = chain(LIN, grid, "learned")
    assert first.law.bounds is None
    high = chain(LIN, grid, "large")[1].law.sigma ** 2
    low = chain(LIN, grid, "small")[1].law.sigma ** 2
    for share in (-1.0, -0.2, 1.0):
        u = (share + 1) / 2
        want = np.exp(0.5 * (u * log(high) + (1 - u) * log(low)))
        assert float(second.law.deviation(torch.tensor(share, dtype=F64))) == pytest.approx(want)


def test_the_largest_beta_is_limited() -> None:
    """A stride from step 4000 to 1: the beta is 0.999, and so is the noise of the chain."""
    links = chain(COS, (4000, 1), "large")
    assert links[1].law.sigma ** 2 == pytest.approx(0.999)
    assert links[1].signal == pytest.approx(links[0].signal * 0.001)


# -------------------------------------------------------------------------------- closed forms


def posterior(data: Mixture, z: Tensor, signal: float) -> tuple[Tensor, float]:
    """Mean and variance of x given z = sqrt(signal) x + sqrt(1 - signal) noise, one Gaussian."""
    total = signal * data.variance + 1 - signal
    return data.expected(z, signal, 1 - signal), data.variance * (1 - signal) / total


@pytest.mark.parametrize("schedule", [COS, LIN])
def test_one_step_is_the_posterior_mean(schedule: ScheduleName) -> None:
    data, x = gaussian(0.2, 0.01), images()
    step = {COS: 1158, LIN: 145}[schedule]
    signal = SIGNALS[schedule](step + 1)
    purifier = DDS(network(schedule), 0.25, schedule)
    noise = tape().normal(FORWARD, 0, x)
    z = signal**0.5 * (2 * x - 1) + (1 - signal) ** 0.5 * noise
    want = (data.expected(z, signal, 1 - signal) + 1) / 2
    torch.testing.assert_close(purifier(x, tape()), want)
    assert purifier.smoothing_sigma == pytest.approx(noise_of(signal))
    # DiffSmooth denoises so too, but its noise is sigma, a little less.
    local = DiffSmooth(network(schedule), 0.25, schedule, 0.1)
    z = signal**0.5 * (2 * (x + 0.25 * noise) - 1)
    denoised = (data.expected(z, signal, 1 - signal) + 1) / 2
    torch.testing.assert_close(local.shared(x, tape()), denoised)
    want = denoised + 0.1 * tape().normal(LOCAL, 0, x)
    torch.testing.assert_close(local(x, tape()), want)


@pytest.mark.parametrize("schedule", [COS, LIN])
def test_the_chain_tends_to_the_posterior(schedule: ScheduleName) -> None:
    """Reverse runs of one noisy image draw from p(x | noisy image), in the limit of many steps."""
    data, sigma = gaussian(0.2, 0.04), 0.25
    noisy = torch.full((1, 1, 1, 1), 0.95, dtype=F64)
    signal = 1 / (1 + 4 * sigma**2)
    mean, variance = posterior(data, signal**0.5 * (2 * noisy - 1), signal)
    errors = []
    for steps in (8, 16, 32, 64):
        purifier = dense(steps, network(schedule, data), schedule=schedule)
        found = moments(Made(purifier.single, purifier.sites), noisy)
        # The mean of a Gaussian is right at any number of steps, but for the step it counts from.
        assert float((found[0] - mean).abs().max()) < 5e-4
        errors.append(abs(float(found[1]) / variance - 1))
    for coarse, fine in itertools.pairwise(errors):
        assert fine < 0.7 * coarse
    assert errors[-1] < 0.1


def test_the_estimated_image_is_clipped() -> None:
    far = network(data=gaussian(3.0, 1e-6))
    for purifier in (DDS(far, 0.25, LIN), dense(net=far)):
        assert torch.equal(purifier(images(), tape()), torch.ones_like(images()))


# ----------------------------------------------------------------------- the rule of a certificate


class Moved:
    """The draws of a tape, of which the first forward one is moved by `by`."""

    def __init__(self, by: Tensor) -> None:
        self.by = by

    def normal(self, site: Site, step: int, like: Tensor) -> Tensor:
        out = tape(len(like)).normal(site, step, like)
        return out + self.by if (site, step) == (FORWARD, 0) else out


@pytest.mark.parametrize("name", NAMES)
def test_it_reads_the_noisy_image_alone(name: str) -> None:
    """Moving an image and, as far, its noise the other way changes nothing."""
    purifier, x = made(name), images()
    d = 0.3 * uniform(3, 1, 4, 4, seed=5, dtype=F64)
    moved = purifier(x + d, Moved(-d / purifier.smoothing_sigma))
    torch.testing.assert_close(purifier(x, tape()), moved, rtol=0, atol=1e-12)


def test_the_noise_is_not_clipped() -> None:
    x = images()
    out = Smoothing(1.0)(x, tape())
    torch.testing.assert_close(out, x + tape().normal(FORWARD, 0, x), rtol=0, atol=0)
    assert float(out.min()) < -0.5
    assert float(out.max()) > 1.5


# ------------------------------------------------------------------------------------------ votes


def defended(name: str, votes: int, decision: Decision = "majority") -> tuple[Defense, NoiseNet]:
    net = network()
    return Defense(made(name, net), Small().double(), [net], votes=votes, decision=decision), net


def test_votes_share_the_noisy_image_and_no_reverse_noise() -> None:
    defense, _ = defended("densepure", 4)
    noise = LoggedNoise(tape())
    defense.classes(images(), noise)
    drawn = [(site, step) for site, step, _ in noise.log]
    assert drawn.count((FORWARD, 0)) == 1
    assert [step for site, step in drawn if site == FORWARD] == [0]
    want = [vote * STEPS_PER_VOTE + i for vote in range(4) for i in range(2)]
    assert [step for site, step in drawn if site == REVERSE] == want
    reverse = torch.cat([values for site, _, values in noise.log if site == REVERSE])
    assert distinct(reverse) == 3 * 4 * 2


def test_another_draw_has_other_noise_everywhere() -> None:
    logs = [LoggedNoise(tape(draw=draw)) for draw in (0, 1)]
    for log_ in logs:
        defended("densepure", 2)[0].classes(images(), log_)
    rows = torch.cat([values for log_ in logs for _, _, values in log_.log])
    assert distinct(rows) == 2 * 3 * (1 + 2 * 2)


@pytest.mark.parametrize(
    ("name", "votes", "calls"),
    [("smoothing", 1, 0), ("dds", 1, 1), ("densepure", 4, 12), ("diffsmooth", 5, 1)],
)
def test_what_is_shared_is_computed_once(name: str, votes: int, calls: int) -> None:
    defense, net = defended(name, votes)
    defense.classes(images(), tape())
    assert defense.counter.images == 3 * calls
    assert len(net.seen) == calls


def test_votes_are_those_of_each_reverse_run_of_one_noisy_image() -> None:
    defense, _ = defended("densepure", 3)
    purifier, x = defense.purifier, images()
    assert isinstance(purifier, DensePure)
    noisy = x + 0.25 * tape().normal(FORWARD, 0, x)

    class Run:
        def __init__(self, vote: int) -> None:
            self.vote = vote

        def normal(self, site: Site, step: int, like: Tensor) -> Tensor:
            return tape().normal(site, self.vote * STEPS_PER_VOTE + step, like)

    each = [defense.classifier(purifier.single(noisy, Run(vote))) for vote in range(3)]
    want = torch.stack(each).softmax(2).mean(0)
    torch.testing.assert_close(defense.logits(x, tape()).exp(), want)


def test_local_smoothing_is_decided_by_the_mean_probability() -> None:
    defense, _ = defended("diffsmooth", 5, "mean")
    assert defense.decided_by_logits
    x = images(3)
    shared = made("diffsmooth").shared(x, tape())
    total = torch.zeros(3, 2, dtype=F64)
    for vote in range(5):
        local = shared + 0.1 * tape().normal(LOCAL, vote * STEPS_PER_VOTE, x)
        total += defense.classifier(local).softmax(1) / 5
    torch.testing.assert_close(defense.logits(x, tape()).exp(), total)
    assert torch.equal(defense.classes(x, tape()), total.argmax(1))


class Rows(nn.Module):
    """The logits of each vote, in turn, whatever the image."""

    def __init__(self, rows: list[list[float]]) -> None:
        super().__init__()
        self.rows, self.next = torch.tensor(rows), 0

    def forward(self, x: Tensor) -> Tensor:
        row = self.rows[self.next % len(self.rows)]
        self.next += 1
        return row.expand(len(x), -1)


@pytest.mark.parametrize(
    ("named", "none", "first"),
    [
        ([2, 1, 1, 2], NO_MAJORITY, 2),
        ([3, 1, 2, 2, 1], NO_MAJORITY, 1),
        ([0, 1, 1], 1, 1),
        ([3, 2, 1, 0], NO_MAJORITY, 3),
    ],
)
def test_a_tie_goes_to_nobody_or_to_the_earliest_vote(
    named: list[int], none: int, first: int
) -> None:
    rows = [[float(k == name) for k in range(4)] for name in named]
    still = Made(lambda x, _: x, frozenset())
    for decision, want in (("majority", none), ("first", first)):
        defense = Defense(still, Rows(rows), votes=len(rows), decision=decision)  # type: ignore[arg-type]
        assert defense.classes(uniform(2, 1, 2, 2), tape(2)).tolist() == [want, want]
        assert not defense.decided_by_logits


@pytest.mark.parametrize(("name", "votes"), [("densepure", 3), ("diffsmooth", 5), ("dds", 2)])
def test_bpda_shares_what_the_defense_shares(name: str, votes: int) -> None:
    defense, _ = defended(name, votes)
    other = defense.around(StraightThrough(defense.purifier), "auto")
    x = images().requires_grad_()
    torch.testing.assert_close(other.logits(x, tape()), defense.logits(x, tape()))
    moved = StraightThrough(defense.purifier)(x, tape())
    (gradient,) = torch.autograd.grad(moved.sum(), x)
    torch.testing.assert_close(gradient, torch.ones_like(x))


@pytest.mark.parametrize("title", CHECKS)
@pytest.mark.parametrize("name", NAMES)
def test_it_conforms(title: str, name: str) -> None:
    mixture = Mixture(0.4 * uniform(3, 1, 4, 4, seed=2, dtype=F64) - 0.2, 0.02)
    net = network(data=mixture)
    votes = {"densepure": 3, "diffsmooth": 3}.get(name, 1)
    defense = Defense(made(name, net), Small().double(), [net], votes=votes)
    assert fault(CHECKS[title], defense, images()) is None


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Smoothing(0.0), "sigma: 0.0 is not a number above 0"),
        (lambda: Smoothing(float("nan")), "sigma: nan is not a number above 0"),
        (lambda: DDS(network(), -0.25, LIN), "sigma: -0.25 is not a number above 0"),
        (lambda: DDS(network(), 80.0, LIN), "sigma: 80.0 is beyond the schedule linear-1000"),
        (
            lambda: dense(sigma=80.0),
            "sigma: 80.0 is beyond the schedule linear-1000, which ends at",
        ),
        (lambda: dense(sigma=1e6, schedule=COS), "beyond the schedule cosine-4000"),
        (lambda: dense(steps=1), "steps: 1 is not 2 or more; one step is"),
        (lambda: dense(steps=300), "steps: 300 are more than the 144 levels"),
        (lambda: dense(steps=2, sigma=1e-4), "steps: 2 are more than the 0 levels"),
        (lambda: DiffSmooth(network(), 0.25, LIN, 0.0), "local_sigma: 0.0 is not a number above"),
    ],
)
def test_options_out_of_range_are_refused(make: Callable[[], Purifier], message: str) -> None:
    with pytest.raises(BadEntry, match=message):
        make()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"decision": "first"}, "decision: first makes no difference to one vote"),
        ({"decision": "mean", "votes": 1}, "decision: mean makes no difference to one vote"),
        ({"decision": "lowest", "votes": 2}, "decision: "),
        ({"resize": 16}, "a certificate is about noise in the track's own pixels"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    setting: dict[str, Any], message: str, tmp_path: Any
) -> None:
    table = toy_defense("dbp_bench.purifiers.denoised_smoothing:Smoothing", ["forward"])
    table["settings"][0]["options"] = {"sigma": 0.25}
    table["settings"][0] |= setting
    with pytest.raises(BadEntry, match=message):
        Registry([folder(tmp_path, defenses={"mine": table})]).subject(
            "mine", "digits-l2"
        ).defense()


def test_a_record_has_the_decision() -> None:
    setting = Registry().subject("densepure", "digits-l2").setting
    assert setting.recorded["decision"] == "first"
    assert setting.recorded["votes"] == setting.votes


def test_impulses_reach_every_reverse_step() -> None:
    heard = Impulses()
    dense(5).single(images(1), heard)
    assert list(heard.rows) == [(REVERSE, i) for i in range(4)]
