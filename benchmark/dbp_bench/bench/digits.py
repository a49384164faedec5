"""Speed and memory of an attack step on the digits, as ratios to a loop written by hand.

The reference is what one would write in a notebook: ancestral sampling with ``torch.randn``, every
activation stored, one gradient, one sign step. Same network, batch and number of steps. The two are
timed in turn, so that a drift of the machine's speed cancels in each pair.

Where every draw is known, a whole attack is also timed against itself without what saves passes:
finished images that retire, and logits that come with the gradient.
"""

import multiprocessing
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from dbp_bench.attacks.apgd import APGD
from dbp_bench.bench.byhand import as_run, by_hand, defense
from dbp_bench.bench.timing import in_turn, ratio
from dbp_bench.data import digits
from dbp_bench.entries.registry import Registry
from dbp_bench.errors import AttackFailed
from dbp_bench.evaluate import Attacked, Group, attack, judge
from dbp_bench.memory import Policy
from dbp_bench.networks.digits import DigitsCNN, ResidualMLP
from dbp_bench.noise import ATTACKER, Tape
from dbp_bench.threat import Attack, AttackerView, Budget, Gradient, Linf, Objective

STEPS, IMAGES, COPIES, EPS = 20, 60, 10, 0.2
BOUNDS = {"none": 1.10, "step": 1.75, "memory": 1.10, "retirement": 0.80, "reuse": 0.90}
"""What the ratios are expected to stay below."""


def measure(device: str, repeats: int) -> dict[str, Any]:
    """Ratios of an attack step of `ddpm` to the hand-written loop, and the growth of memory.

    Args:
        device: ``cpu`` or ``cuda``.
        repeats: Pairs that are timed; the medians are of their ratios.
    """
    denoiser, classifier = _networks(device)
    images, labels, ids = _batch(device)
    rows = images.repeat_interleave(COPIES, 0), labels.repeat_interleave(COPIES, 0)
    contenders: dict[str, Callable[[], object]] = {
        "by hand": lambda: by_hand(
            denoiser, classifier, *rows, steps=STEPS, copies=COPIES, eps=EPS
        ),
    }
    policies: tuple[Policy, ...] = ("none", "step")
    for policy in policies:
        target = defense(denoiser, classifier, policy, STEPS)
        contenders[policy] = as_run(target, images, labels, ids, copies=COPIES, eps=EPS)
    for contender in contenders.values():
        contender()
    seconds = in_turn(contenders, device, repeats)
    table: dict[str, Any] = {
        "setting": {"defense": "ddpm", "steps": STEPS, "images": IMAGES, "copies": COPIES},
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "ratio": {
            name: _ratio(times, seconds["by hand"], name)
            for name, times in seconds.items()
            if name != "by hand"
        },
        "savings": _savings(device, repeats),
    }
    if device == "cpu" and Path("/proc/self/status").exists():
        table["memory"] = _memory_growth()
    return table


def render(table: dict[str, Any]) -> str:
    """For a terminal."""
    setting = table["setting"]
    lines = [
        (
            f"one attack step of {setting['defense']}, {setting['steps']} reverse steps, "
            f"{setting['images']} images x {setting['copies']} draws:"
        ),
        f"  by hand, all stored        {1e3 * table['seconds']['by hand']:8.1f} ms",
    ]
    titles = {"none": "dbp-bench, all stored", "step": "dbp-bench, checkpointed"}
    for name, title in titles.items():
        ratio = table["ratio"][name]
        lines.append(
            f"  {title:<26} {1e3 * table['seconds'][name]:8.1f} ms  {ratio['median']:.2f} x by hand"
            f"  (pairs {ratio['low']:.2f} to {ratio['high']:.2f}; bound {ratio['bound']:.2f})"
        )
    savings = table["savings"]
    lines.append(
        f"APGD-{savings['steps']} on {savings['images']} images, every draw known: "
        f"{savings['seconds'][_AS_IT_IS]:.2f} s; {savings['right']} images stay right, the same "
        "without each of:"
    )
    titles = {"retirement": "finished images retire", "reuse": "logits come with the gradient"}
    for name, title in titles.items():
        ratio, other = savings["ratio"][name], _WITHOUT[name]
        calls = savings["passes"][_AS_IT_IS] / savings["passes"][other]
        lines.append(
            f"  {title:<30} {ratio['median']:.2f} x the time if {other}"
            f"  (pairs {ratio['low']:.2f} to {ratio['high']:.2f}; bound {ratio['bound']:.2f}); "
            f"{calls:.2f} x its passes"
        )
    if "memory" in table:
        memory = table["memory"]
        lines.append(
            f"  checkpointed, {memory['steps'][0]} to {memory['steps'][1]} steps: peak memory "
            f"grows by {memory['growth_bytes'] / 2**20:.1f} MiB, stored states by "
            f"{memory['states_bytes'] / 2**20:.1f} MiB: {memory['ratio']:.2f} x "
            f"(bound {memory['bound']:.2f})"
        )
    return "\n".join(lines)


def _networks(device: str) -> tuple[ResidualMLP, DigitsCNN]:
    registry = Registry()
    track, entry = registry.track("digits-linf"), registry.defense("ddpm")
    ref = entry.entry.setting(track.name, entry.name, str(entry.path)).networks["denoiser"]
    denoiser = registry.build_network(ref, entry.path).to(device)
    classifier = registry.build_network(track.entry.classifier, track.path).to(device)
    assert isinstance(denoiser, ResidualMLP)
    assert isinstance(classifier, DigitsCNN)
    return denoiser.eval().requires_grad_(False), classifier.eval().requires_grad_(False)


def _batch(device: str, count: int = IMAGES) -> tuple[Tensor, Tensor, list[int]]:
    data = digits()
    ids = data.ids["test"][:count]
    images, labels = data.select(ids)
    return images.to(device), labels.to(device), ids


def _ratio(times: Sequence[float], others: Sequence[float], name: str) -> dict[str, float]:
    return {**ratio(times, others), "bound": BOUNDS[name]}


_AS_IT_IS = "as it is"
_WITHOUT = {
    "retirement": "every image stays to the end",
    "reuse": "a pass of its own looks for them",
}
_ATTACK = APGD(steps=40, eot=1)


def _savings(device: str, repeats: int, count: int = IMAGES) -> dict[str, Any]:
    """Ratios of an attack at known draws to the same attack without what saves passes.

    Raises:
        AttackFailed: The outcomes differ, so that what is saved isn't the same work.
    """
    registry = Registry()
    track = registry.track("digits-linf")
    target = registry.build_defense(registry.defense("ddpm"), track, device=device)
    group = Group(*_batch(device, count))
    searches: dict[str, Attack] = {
        _AS_IT_IS: _ATTACK,
        _WITHOUT["retirement"]: replace(_ATTACK, retire=False),
        _WITHOUT["reuse"]: Apart(_ATTACK),
    }

    def search(method: Attack) -> Attacked:
        return attack(
            target,
            method,
            group,
            Linf(track.entry.eps),
            target.sites,
            seed=0,
            victim_draw=0,
            rows=track.entry.rows,
        )

    found = {name: search(method) for name, method in searches.items()}
    right = {
        name: judge(target, each.images, group, seed=0, draw=0) for name, each in found.items()
    }
    for name, outcomes in right.items():
        if not torch.equal(outcomes, right[_AS_IT_IS]):
            differing = int((outcomes != right[_AS_IT_IS]).sum())
            raise AttackFailed(f"bench: {differing} outcomes of the attack change if {name}.")
    contenders = {name: lambda method=method: search(method) for name, method in searches.items()}
    seconds = in_turn(contenders, device, repeats)
    return {
        "steps": _ATTACK.steps,
        "images": count,
        "right": int(right[_AS_IT_IS].sum()),
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "passes": {name: int((each.gradients + each.looks).sum()) for name, each in found.items()},
        "ratio": {
            name: _ratio(seconds[_AS_IT_IS], seconds[other], name)
            for name, other in _WITHOUT.items()
        },
    }


@dataclass(frozen=True)
class Apart:
    """An attack that evaluates logits in passes of their own, at the draws of its gradients."""

    attack: Attack

    def __call__(
        self, view: AttackerView, images: Tensor, labels: Tensor, budget: Budget
    ) -> Tensor:
        """What the attack finds."""
        return self.attack(cast(AttackerView, _Forgetful(view)), images, labels, budget)


class _Forgetful:
    """A view whose gradients come alone: it looks again for the logits and losses."""

    def __init__(self, view: AttackerView) -> None:
        self._view = view

    def __getattr__(self, name: str) -> Any:
        return getattr(self._view, name)

    def __getitem__(self, rows: Tensor) -> "_Forgetful":
        return _Forgetful(self._view[rows])

    def gradient(
        self, images: Tensor, labels: Tensor, objective: Objective, draws: Sequence[int]
    ) -> Gradient:
        mean = self._view.gradient(images, labels, objective, draws).mean
        logits = self._view.logits(images, draws)
        losses = objective(logits.flatten(0, 1), labels.repeat_interleave(len(draws)))
        return Gradient(mean, losses.view(len(images), -1), logits)


_THRESHOLD = "MALLOC_MMAP_THRESHOLD_"
_MEMORY_IMAGES, _MEMORY_STEPS = 3000, (20, 100)


def _memory_growth() -> dict[str, Any]:
    """How peak memory grows with the steps under checkpointing, against the states it stores."""
    context = multiprocessing.get_context("spawn")
    peaks = []
    # Large blocks straight from the kernel, so that the peak counts what is held, and not the holes
    # that the C allocator keeps between blocks.
    held = os.environ.get(_THRESHOLD)
    os.environ[_THRESHOLD] = "65536"
    try:
        for steps in _MEMORY_STEPS:
            # A process of its own for each, since a process's peak never falls.
            with context.Pool(1) as pool:
                peaks.append(pool.apply(_peak, (steps,)))
    finally:
        del os.environ[_THRESHOLD]
        if held is not None:
            os.environ[_THRESHOLD] = held
    states = (_MEMORY_STEPS[1] - _MEMORY_STEPS[0]) * _MEMORY_IMAGES * 64 * 4
    growth = peaks[1] - peaks[0]
    return {
        "steps": _MEMORY_STEPS,
        "peak_bytes": peaks,
        "growth_bytes": growth,
        "states_bytes": states,
        "ratio": growth / states,
        "bound": BOUNDS["memory"],
    }


def _peak(steps: int) -> int:
    """Peak resident bytes of a process that takes one checkpointed gradient of `steps` steps."""
    denoiser, classifier = _networks("cpu")
    image, label, _ = _batch("cpu", 1)
    target = defense(denoiser, classifier, "step", steps)
    x = image.repeat(_MEMORY_IMAGES, 1, 1, 1).requires_grad_()
    logits = target.logits(x, Tape.make(0, ATTACKER, range(_MEMORY_IMAGES)))
    loss = F.cross_entropy(logits, label.repeat(_MEMORY_IMAGES), reduction="sum")
    torch.autograd.grad(loss, x)
    # Not getrusage: its peak is inherited from the parent process.
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])
