import json
import sys
from collections.abc import Callable
from dataclasses import replace
from math import cos, radians, sin
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from dbp_bench.checks import gradients
from dbp_bench.checks.conformance import difference_errors
from dbp_bench.checks.gradients import FLOOR, Findings, cosines, measure
from dbp_bench.checks.record import record
from dbp_bench.defense import Defense, Identity, Purifier, StraightThrough
from dbp_bench.entries.registry import Registry
from dbp_bench.evaluation import Group
from dbp_bench.noise import FORWARD, Noise, Tape
from dbp_bench.result import GradientCheck, Result
from dbp_bench.runs.execute import execute
from dbp_bench.runs.job import Job, Overrides, resolve
from own_entries import folder, toy_defense
from toys import Linear, Made, Small, SmallDenoiser, normal, sampler, uniform

if TYPE_CHECKING:
    from conftest import Command

SHIPPED = Registry()


def group(n: int, size: int) -> Group:
    images = uniform(n, 1, size, size, dtype=torch.float64)
    return Group(images, torch.arange(n) % 2, range(n))


def linear(purifier: Purifier, size: int) -> Defense:
    """`purifier` before a linear classifier of images of this size."""
    weight = normal(1, size * size, dtype=torch.float64)[0]
    return Defense(purifier, Linear(weight).double())


def compare(
    purifier: Purifier, size: int = 8, images: int = 6, counts: tuple[int, ...] = (1, 4)
) -> Findings:
    """Exact and BPDA gradients of the margin."""
    exact = linear(purifier, size)
    modes = {"exact": exact, "bpda": Defense(StraightThrough(purifier), exact.classifier)}
    return measure(
        exact, modes, group(images, size), seed=3, max_batch=7, loss="margin", counts=counts
    )


def found(findings: Findings, mode: str, draws: int) -> tuple[float, float]:
    (row,) = [a for a in findings.modes if (a.mode, a.draws) == (mode, draws)]
    assert row.cosine is not None
    assert row.sign is not None
    assert row.cosine.low <= row.cosine.value <= row.cosine.high
    return row.cosine.value, row.sign.value


# ------------------------------------------------------------------- answers in closed form


def test_of_a_scaling_bpda_has_the_exact_direction() -> None:
    findings = compare(Made(lambda x, n: 0.3 * x + 0.1 * n.normal(FORWARD, 0, x)))
    for draws in (1, 4):
        assert found(findings, "bpda", draws) == pytest.approx((1, 1))
        assert found(findings, "exact", draws) == pytest.approx((1, 1))
    assert findings.exact


@pytest.mark.parametrize("degrees", [30, 60, 90, 120])
def test_of_a_rotation_bpda_is_off_by_its_angle(degrees: int) -> None:
    angle = radians(degrees)

    def rotate(x: Tensor, noise: Noise) -> Tensor:
        """Each pair of pixels, by one angle; a gradient is turned back by as much."""
        a, b = (x - 0.5).flatten(1).view(len(x), -1, 2).unbind(2)
        turned = (cos(angle) * a - sin(angle) * b, sin(angle) * a + cos(angle) * b)
        return 0.5 + torch.stack(turned, 2).view_as(x) + 0.1 * noise.normal(FORWARD, 0, x)

    findings = compare(Made(rotate))
    for draws in (1, 4):
        assert found(findings, "bpda", draws)[0] == pytest.approx(cos(angle))
    assert found(findings, "exact", 1) == pytest.approx((1, 1))


def test_signs_agree_at_a_known_share() -> None:
    """The gradient of a quarter of the pixels is turned round."""
    sign = torch.ones(8, 8, dtype=torch.float64)
    sign[:2] = -1
    cosine, signs = found(
        compare(Made(lambda x, n: sign * x + 0 * n.normal(FORWARD, 0, x))), "bpda", 1
    )
    assert signs == 0.75
    assert cosine < 1


@pytest.mark.parametrize("spread", [0.5, 2.0, 6.0])
def test_noise_floor_is_that_of_the_signal_to_noise_ratio(spread: float) -> None:
    """Cosine of two means of N: rho / (rho + (1 - rho) / N), rho the signal's share of the power.

    The gradient of each pixel is its weight times 1 + spread x noise, so rho = 1 / (1 + spread^2).
    """
    speckle = Made(lambda x, noise: x * (1 + spread * noise.normal(FORWARD, 0, x)))
    findings = compare(speckle, size=32, images=12, counts=(1, 10, 64))
    rho = 1 / (1 + spread**2)
    for row in findings.noise_floor:
        assert row.cosine is not None
        want = rho / (rho + (1 - rho) / row.draws)
        assert row.cosine.value == pytest.approx(want, abs=0.02), row.draws
    assert [row.draws for row in findings.noise_floor] == [1, 10, 64]


def test_without_noise_there_is_no_floor() -> None:
    findings = compare(Identity())
    for row in findings.noise_floor:
        assert row.cosine is not None
        assert row.cosine.value == pytest.approx(1)


def test_zero_gradients_are_left_out_and_counted() -> None:
    """Dark images meet a flat purifier."""
    purifier = Made(
        lambda x, n: x * (x.mean((1, 2, 3), keepdim=True) > 0.5) + 0 * n.normal(FORWARD, 0, x)
    )
    exact = linear(purifier, 4)
    images = torch.stack([torch.full((1, 4, 4), v, dtype=torch.float64) for v in (0.2, 0.8, 0.9)])
    some = Group(images, torch.tensor([0, 1, 0]), range(3))
    findings = measure(
        exact, {"exact": exact}, some, seed=0, max_batch=9, loss="margin", counts=[1]
    )
    assert [row.images for row in findings.modes + findings.noise_floor] == [2, 2]
    none = Group(images[:1], torch.tensor([0]), [0])
    (row,) = measure(exact, {"exact": exact}, none, seed=0, max_batch=9, counts=[1]).modes
    assert (row.images, row.cosine, row.sign) == (0, None, None)


def test_cosine() -> None:
    a = torch.tensor([[3.0, 4.0], [1e-200, 0.0], [0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    b = torch.tensor([[4.0, 3.0], [1e-200, 1e-200], [1.0, 0.0], [-2.0, 0.0]], dtype=torch.float64)
    got = cosines(a, b)
    assert got[[0, 1, 3]].tolist() == pytest.approx([0.96, 0.5**0.5, -1])
    assert bool(got[2].isnan())


# --------------------------------------------------------------------- finite differences


@pytest.mark.parametrize("name", ["ddpm", "gdmp"])
def test_finite_differences_find_a_gradient_that_is_another(name: str) -> None:
    purifier = sampler(name, SmallDenoiser().double())
    images = uniform(2, 1, 6, 6, dtype=torch.float64)
    right = difference_errors(Defense(purifier, Small().double()), images)
    wrong = difference_errors(Defense(StraightThrough(purifier), Small().double()), images)
    assert all(error is not None and error < 1e-6 for error in right)
    assert all(error is not None and error > 1e-2 for error in wrong)
    assert Findings([], [], right).exact
    assert not Findings([], [], wrong).exact
    assert difference_errors(linear(Made(lambda x, n: x.round()), 6), images) == [None, None]


# ----------------------------------------------------------------------------- of an entry


def test_what_each_kind_of_gradient_differentiates() -> None:
    subject = SHIPPED.subject("ddpm", "digits-linf")
    evaluated = subject.defense()
    assert subject.searched(evaluated, "exact") is evaluated
    bpda = subject.searched(evaluated, "bpda")
    assert isinstance(bpda.purifier, StraightThrough)
    assert bpda.purifier.purifier is evaluated.purifier
    short = subject.searched(evaluated, "surrogate:3")
    short.activation_bytes(torch.zeros(1, 1, 8, 8))
    before = short.counter.images
    short.logits(torch.zeros(2, 1, 8, 8), Tape.make(0, "test", [0, 1]))
    assert short.counter.images - before == 2 * 3


CHECK = ["check", "--gradients"]


@pytest.fixture
def _few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "COUNTS", (1, 3))


@pytest.mark.usefixtures("_few_draws")
def test_command(command: "Command") -> None:
    said = command(*CHECK, "ddim", "--images", "2", "--seed", "5", "--json")
    assert (said.code, said.err) == (0, "")
    table = json.loads(said.out)
    assert (table["seed"], table["dtype"], table["loss"]) == (5, "float64", "ce")
    assert (table["steps"], table["surrogate_steps"], table["exact"]) == (10, 5, True)
    assert [(row["mode"], row["draws"]) for row in table["modes"]] == [
        (mode, n) for mode in ("exact", "bpda", "surrogate") for n in (1, 3)
    ]
    assert all(row["images"] == 2 for row in table["modes"])
    assert all(0 < error < 1e-6 for error in table["difference_errors"])
    text = command(*CHECK, "ddim", "--images", "2", "--seed", "5").out
    assert "surrogate, 5 of 10 steps" in text
    assert "float64, seed 5" in text
    bpda = table["modes"][2]["cosine"]
    assert f"{bpda['value']:.3f} [{bpda['low']:.3f}, {bpda['high']:.3f}]" in text


@pytest.mark.usefixtures("_few_draws")
def test_a_defense_without_steps_has_no_surrogate(command: "Command") -> None:
    table = json.loads(command(*CHECK, "noise-only", "--images", "2", "--json").out)
    assert {row["mode"] for row in table["modes"]} == {"exact", "bpda"}
    assert table["surrogate_steps"] is None


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["adt"], "no defense 'adt'"),
        (["ddpm", "--surrogate-steps", "10"], "must be in 1 ... 9, since ddpm has 10"),
        (["ddpm", "--surrogate-steps", "0"], "must be in 1 ... 9"),
        (["none", "--surrogate-steps", "1"], "none has no option `steps` to shorten"),
        (["ddpm", "--loss", "cw"], "--loss 'cw': one of ce"),
        (["ddpm", "--images", "0"], "--images 0: this track has 1 to"),
    ],
)
def test_mistake(command: "Command", arguments: list[str], says: str) -> None:
    said = command(*CHECK, *arguments)
    assert said.code == 2
    assert says in said.err
    assert len(said.err.splitlines()) == 1


ODD = """
from dbp_bench.noise import FORWARD

class Odd:
    sites = frozenset({FORWARD})

    def __init__(self, kind):
        self.kind = kind

    def __call__(self, images, noise):
        noisy = images + 0.1 * noise.normal(FORWARD, 0, images)
        if self.kind == "straight-through":
            return noisy + (noisy.square() - noisy).detach()
        if self.kind == "single":
            assert images.dtype.itemsize == 4
        return noisy.round() if self.kind == "rounded" else noisy

def make(*, kind):
    return Odd(kind)
"""


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Callable[[str], Registry]":
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "odd_toy", raising=False)
    (tmp_path / "odd_toy.py").write_text(ODD)

    def of(kind: str) -> Registry:
        folder(tmp_path, defenses={"odd": toy_defense("odd_toy:make", ["forward"], kind=kind)})
        return Registry([tmp_path], trust_code=True)

    return of


@pytest.mark.usefixtures("_few_draws")
def test_a_gradient_that_is_called_exact_but_is_not(
    command: "Command", odd: Callable[[str], Registry], tmp_path: Path
) -> None:
    odd("straight-through")
    said = command(*CHECK, "odd", "--images", "2", "--entries", tmp_path, "--trust-code")
    assert said.code == 1
    assert said.out.rstrip().endswith("FAIL")


# ------------------------------------------------------------------------------- of a run


def job(
    gradient: str | None = None,
    defense: str = "ddim",
    registry: Registry = SHIPPED,
    attack: str | None = None,
    **changes: Any,
) -> Job:
    overrides = Overrides(gradient=gradient, **{"examples": 2, "batch_size": 2, **changes})
    return resolve(
        registry,
        "digits-linf",
        defense,
        "eot",
        attack=attack,
        seed=0,
        device="cpu",
        overrides=overrides,
    )


def quick(asked: Job) -> GradientCheck | None:
    """The gradient check in the conformance record of a run."""
    return record(asked.built, asked.first_images(asked.data()), asked.approach).gradient


def test_the_quick_check_compares_the_attack_s_gradient_with_the_exact_one() -> None:
    cosine: dict[str, list[float | None]] = {}
    for kind in ("exact", "bpda", "surrogate:5"):
        asked = job(kind)
        check = quick(asked)
        assert check is not None
        assert check.ids == asked.track_ids[:2]
        assert check.difference_errors == [FLOOR, FLOOR]
        cosine[kind] = check.cosine
    assert cosine["exact"] == [1, 1]
    for bpda, surrogate in zip(cosine["bpda"], cosine["surrogate:5"], strict=True):
        assert bpda is not None
        assert surrogate is not None
        assert 0.5 < bpda < surrogate < 1


def test_every_run_stores_a_quick_check(tmp_path: Path) -> None:
    asked = job("bpda", "oneshot", effort={"budget": 2})
    made = Result.read(execute(asked, tmp_path)).conformance
    assert made is not None
    assert made.gradient is not None
    assert made.gradient == quick(asked)


def test_the_quick_check_depends_on_the_request_alone() -> None:
    first = quick(job("bpda", "oneshot"))
    assert first == quick(job("bpda", "oneshot", examples=1))
    assert first == quick(job("bpda", "oneshot", draws=3))
    assert first != quick(replace(job("bpda", "oneshot"), seed=1))


def test_an_attack_without_gradients_has_none() -> None:
    assert quick(job(attack="square")) is None


def test_the_quick_check_leaves_blanks_where_there_is_no_answer(
    odd: Callable[[str], Registry],
) -> None:
    check = quick(job("bpda", "odd", odd("rounded")))
    assert check is not None
    assert (check.difference_errors, check.cosine) == ([None, None], [None, None])
    check = quick(job(None, "odd", odd("single")))
    assert check is not None
    assert (check.difference_errors, check.cosine) == ([None, None], [None, None])
    check = quick(job(None, "odd", odd("straight-through")))
    assert check is not None
    assert check.cosine == [1, 1]
    assert all(error is not None and error > 0.01 for error in check.difference_errors)
