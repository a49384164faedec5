"""Ratios on the digits: an attack step to a loop written by hand, retirement, growth of memory.

The reference is what one would write in a notebook: ancestral sampling with ``torch.randn``, every
activation stored, one gradient, one sign step; the same networks, batch and number of steps.
"""

import multiprocessing
import os
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

from dbp_bench import attacks
from dbp_bench.attacks.apgd import APGD
from dbp_bench.errors import AttackFailed
from dbp_bench.evaluation import Attacked, attack
from dbp_bench.noise import ATTACKER, Tape
from dbp_bench.threat import Attack, Linf
from speed.contenders import (
    BY_HAND,
    POLICIES,
    TITLES,
    as_run,
    by_hand,
    defense,
    digits_images,
    digits_networks,
    right_at,
)
from speed.timing import Row, in_turn, ratio

STEPS, IMAGES, COPIES, EPS = 20, 60, 10, 0.2
BOUNDS = {"none": 1.10, "step": 1.75, "memory": 1.10, "retirement": 0.80}
"""The bounds that the ratios are expected to stay below."""
_ATTACK, _ATTACK_STEPS = APGD(steps=40, eot=1), 10
_THRESHOLD = "MALLOC_MMAP_THRESHOLD_"
_MEMORY_IMAGES, _MEMORY_STEPS = 3000, (20, 100)


def measure(device: str, rounds: int) -> list[Row]:
    """All rows: medians over `rounds` rounds in which the contenders are timed in turn."""
    rows = [*attack_step(device, rounds), retirement(device, rounds)]
    if device == "cpu" and Path("/proc/self/status").exists():
        rows.append(memory_growth())
    return rows


def attack_step(device: str, rounds: int) -> list[Row]:
    """One attack step of `ddpm`, with all activations stored and checkpointed, to the loop."""
    networks, group = digits_networks(device), digits_images(device, IMAGES)
    x, y = (tensor.repeat_interleave(COPIES, 0) for tensor in (group.images, group.labels))
    contenders: dict[str, Callable[[], object]] = {
        BY_HAND: lambda: by_hand(*networks, x, y, steps=STEPS, copies=COPIES, eps=EPS)
    }
    for policy in POLICIES:
        target = defense(*networks, policy, STEPS)
        contenders[TITLES[policy]] = as_run(
            target, group.images, group.labels, group.ids, copies=COPIES, eps=EPS
        )
    in_turn(contenders, device, 1)  # warms up
    times = in_turn(contenders, device, rounds)
    rows: list[Row] = [
        {"measured": f"attack step, {BY_HAND}", "seconds": statistics.median(times[BY_HAND])}
    ]
    for policy in POLICIES:
        own = times[TITLES[policy]]
        rows.append(
            {
                "measured": f"attack step, {TITLES[policy]}",
                "seconds": statistics.median(own),
                **ratio(own, times[BY_HAND]),
                "bound": BOUNDS[policy],
            }
        )
    return rows


def _patient(method: APGD) -> APGD:
    """The same attack, which takes every image to the last step."""
    kind = type("Patient", (type(method),), {"retire": False})
    return kind(**attacks.described("apgd", method))  # type: ignore[no-any-return]


def retirement(device: str, rounds: int, count: int = IMAGES) -> Row:
    """APGD-40 with every draw known, to itself where every image stays to the last step.

    Raises:
        AttackFailed: The outcomes differ, so that what is saved isn't the same work.
    """
    target = defense(*digits_networks(device), "auto", _ATTACK_STEPS)
    group = digits_images(device, count)

    def search(method: Attack) -> Attacked:
        ball, known = Linf(EPS), target.sites
        return attack(target, method, group, ball, known, seed=0, victim_draw=0, max_batch=count)

    patient = _patient(_ATTACK)
    own, whole = search(_ATTACK), search(patient)
    right, same = (right_at(target, each.images, group) for each in (own, whole))
    if not torch.equal(right, same):
        raise AttackFailed(
            f"retirement: {int((right != same).sum())} outcomes of the attack change if every "
            "image stays to the last step."
        )
    both = {"own": lambda: search(_ATTACK), "whole": lambda: search(patient)}
    times = in_turn(both, device, rounds)
    done, most = (int((each.gradient + each.forward).sum()) for each in (own, whole))
    return {
        "measured": f"APGD-{_ATTACK.steps}, finished images retire ({done / most:.2f} x the "
        f"evaluations; {int(right.sum())} of {count} stay right)",
        "seconds": statistics.median(times["own"]),
        **ratio(times["own"], times["whole"]),
        "bound": BOUNDS["retirement"],
    }


def memory_growth() -> Row:
    """The growth of peak memory with the steps, checkpointed, to the states that it stores."""
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
    few, many = _MEMORY_STEPS
    return {
        "measured": f"growth of peak memory from {few} to {many} steps, checkpointed, to the "
        "stored states",
        "ratio": (peaks[1] - peaks[0]) / states,
        "bound": BOUNDS["memory"],
    }


def _peak(steps: int) -> int:
    """Peak resident bytes of a process that takes one checkpointed gradient of `steps` steps."""
    target = defense(*digits_networks("cpu"), "step", steps)
    one = digits_images("cpu", 1)
    x = one.images.repeat(_MEMORY_IMAGES, 1, 1, 1).requires_grad_()
    logits = target.logits(x, Tape.make(0, ATTACKER, range(_MEMORY_IMAGES)))
    loss = F.cross_entropy(logits, one.labels.repeat(_MEMORY_IMAGES), reduction="sum")
    torch.autograd.grad(loss, x)
    # Not getrusage: its peak is inherited from the parent process.
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])
