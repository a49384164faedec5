"""The savings that `bench` measures are of the same work, and its ratios are of pairs."""

from collections.abc import Callable
from itertools import accumulate, count
from typing import Any

import pytest
import torch
from torch import Tensor

from dbp_bench import bench
from dbp_bench.attacks import Attack
from dbp_bench.attacks.apgd import APGD
from dbp_bench.attacks.objectives import cross_entropy
from dbp_bench.bench import Apart
from dbp_bench.defense import Defense
from dbp_bench.errors import AttackFailed
from dbp_bench.evaluate import Attacked, Group, attack
from dbp_bench.noise import ATTACKER, VICTIM, Tape
from dbp_bench.threat import AttackerView, Linf
from toys import BOTH, Linear, Noisy, normal, uniform

WEIGHT = normal(1, 16, seed=5)[0]


def search(method: Attack) -> Attacked:
    images = uniform(24, 1, 4, 4)
    defense = Defense(Noisy(0.1, 0.1), Linear(WEIGHT, -float(WEIGHT.sum()) / 2))
    own = defense.logits(images, Tape.make(0, VICTIM, range(24))).argmax(1)
    group = Group(images, own, range(24))
    return attack(defense, method, group, Linf(0.05), BOTH, seed=0, victim_draw=0, rows=64)


@pytest.mark.parametrize("retire", [True, False])
def test_logits_in_passes_of_their_own_are_the_same_attack_bit_for_bit(retire: bool) -> None:
    """One look more for each gradient of each image, and nothing else."""
    method = APGD(10, 1, restarts=2, retire=retire)
    own, apart = search(method), search(Apart(method))
    assert torch.equal(own.images, apart.images)
    assert torch.equal(own.gradients, apart.gradients)
    assert torch.equal(apart.looks, own.looks + own.gradients)
    assert retire == bool((own.gradients < 20).any()), "some images retire, some stay"
    assert bool((own.gradients == 20).any())


def test_what_is_forgotten_is_looked_for_at_the_same_draws() -> None:
    """Also where draws are hidden: the view's own losses and logits again."""
    images, labels = uniform(3, 1, 4, 4), torch.tensor([0, 1, 0])
    defense = Defense(Noisy(0.3, 0.1), Linear(WEIGHT))
    tapes = Tape.make(0, VICTIM, range(3)), Tape.make(0, ATTACKER, range(3))
    seen: list[Any] = []

    def remember(view: AttackerView, images: Tensor, labels: Tensor, budget: Any) -> Tensor:
        part = view[torch.tensor([2, 0])]
        rows = images[[2, 0]], labels[[2, 0]]
        seen.append(part.gradient(*rows, cross_entropy, [4, 1, 7]))
        return images

    for method in (remember, Apart(remember)):
        view = AttackerView(defense, frozenset(), *tapes, 64)
        method(view, images, labels, Linf(0.1))
    for mine, its in zip(*seen, strict=True):
        torch.testing.assert_close(its, mine)
    assert seen[0].losses.shape == (2, 3)


def test_the_savings_of_ddpm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes are counted, not timed: each image takes every step where none retires."""
    monkeypatch.setattr(bench, "_ATTACK", APGD(steps=6, eot=1))
    savings = bench._savings("cpu", 1, 6)
    own, stay, apart = (savings["passes"][name] for name in ("as it is", *bench._WITHOUT.values()))
    assert stay == 6 * (6 + 1)
    assert own < stay
    assert own < apart < 2 * own + 1
    assert set(savings["ratio"]) == {"retirement", "reuse"}


def test_a_saving_that_changes_an_outcome_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(Apart):
        def __call__(
            self, view: AttackerView, images: Tensor, labels: Tensor, budget: Any
        ) -> Tensor:
            return images

    monkeypatch.setattr(bench, "_ATTACK", APGD(steps=6, eot=1))
    monkeypatch.setattr(bench, "Apart", Other)
    with pytest.raises(AttackFailed, match=r"[1-6] outcomes .* if a pass of its own looks"):
        bench._savings("cpu", 1, 6)


def test_ratios_are_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that slows down tenfold changes the seconds, and no ratio."""
    lasting = {"a": 1.0, "b": 4.0}
    order: list[str] = []
    slow = [factor for factor in (1, 2, 10) for _ in lasting]
    times = accumulate(
        (step for i in count() for step in (0.0, lasting["ab"[i % 2]] * slow[i])), initial=0.0
    )
    next(times)
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    contenders: dict[str, Callable[[], object]] = {
        name: lambda name=name: order.append(name)  # type: ignore[misc]
        for name in lasting
    }
    seconds = bench._in_turn(contenders, "cpu", 3)
    assert order == ["a", "b"] * 3
    assert seconds == {"a": [1, 2, 10], "b": [4, 8, 40]}
    ratio = bench._ratio(seconds["a"], [4, 8, 20], "reuse")
    assert ratio == {"median": 0.25, "low": 0.25, "high": 0.5, "bound": bench.BOUNDS["reuse"]}


def test_what_is_shown() -> None:
    """Every ratio with its pairs and its bound, and how many passes are saved."""

    def ratio(median: float) -> dict[str, float]:
        return {"median": median, "low": median - 0.01, "high": median + 0.02, "bound": 0.99}

    without = bench._WITHOUT
    shown = bench.render(
        {
            "device": "a CPU",
            "threads": 1,
            "setting": {"defense": "ddpm", "steps": 20, "images": 60, "copies": 10},
            "seconds": {"by hand": 0.1, "none": 0.11, "step": 0.15},
            "ratio": {"none": ratio(1.1), "step": ratio(1.5)},
            "savings": {
                "steps": 40,
                "images": 60,
                "right": 11,
                "seconds": {"as it is": 1.0},
                "passes": {"as it is": 30, without["retirement"]: 60, without["reuse"]: 40},
                "ratio": {"retirement": ratio(0.45), "reuse": ratio(0.75)},
            },
        }
    )
    retire, reuse = shown.splitlines()[-2:]
    assert "0.45 x" in retire
    assert "pairs 0.44 to 0.47; bound 0.99" in retire
    assert "0.50 x its passes" in retire
    assert "0.75 x" in reuse
    assert "0.75 x its passes" in reuse
    assert "11 images stay right" in shown
