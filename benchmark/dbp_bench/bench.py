"""Speed and memory of an attack step, as ratios to a loop written by hand, within one run.

The reference is what one would write in a notebook: ancestral sampling with ``torch.randn``, every
activation stored, one gradient, one sign step. Same network, batch and number of steps. The two are
timed in turn, so that a drift of the machine's speed cancels in each pair.
"""

import itertools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dbp_bench.attacks.objectives import cross_entropy
from dbp_bench.data import digits
from dbp_bench.defense import Defense
from dbp_bench.memory import Policy
from dbp_bench.networks.digits import DigitsCNN, ResidualMLP
from dbp_bench.noise import ATTACKER, VICTIM, Tape
from dbp_bench.purifiers.ddpm import DDPM
from dbp_bench.registry import Registry
from dbp_bench.run import device_name
from dbp_bench.threat import AttackerView, Linf

STEPS, IMAGES, COPIES, EPS = 20, 60, 10, 0.2
BOUNDS = {"none": 1.10, "step": 1.75, "memory": 1.10}
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
        "by hand": lambda: _by_hand(denoiser, classifier, *rows),
        **{
            policy: _ours(denoiser, classifier, images, labels, ids, policy)
            for policy in ("none", "step")
        },
    }
    for contender in contenders.values():
        contender()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, contender in contenders.items():
            seconds[name].append(_seconds(contender, device))
    ratios = {
        name: [ours / hand for ours, hand in zip(times, seconds["by hand"], strict=True)]
        for name, times in seconds.items()
        if name != "by hand"
    }
    table: dict[str, Any] = {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "setting": {"defense": "ddpm", "steps": STEPS, "images": IMAGES, "copies": COPIES},
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "ratio": {
            name: {
                "median": statistics.median(values),
                "low": min(values),
                "high": max(values),
                "bound": BOUNDS[name],
            }
            for name, values in ratios.items()
        },
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
            f"{setting['images']} images x {setting['copies']} draws; {table['device']}, "
            f"{table['threads']} threads"
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


def _by_hand(denoiser: ResidualMLP, classifier: DigitsCNN, x: Tensor, y: Tensor) -> Tensor:
    """One sign step through strided ancestral sampling, as one would write it in a notebook."""
    betas = torch.linspace(1e-4, 2e-2, 1000, device=x.device)
    signal = torch.cat([torch.ones(1, device=x.device), torch.cumprod(1 - betas, 0)])
    delta = x.clone().requires_grad_()
    z = 2 * delta - 1
    z = signal[100].sqrt() * z + (1 - signal[100]).sqrt() * torch.randn_like(z)  # noqa: TID251
    levels = [100 * k // STEPS for k in range(STEPS, -1, -1)]
    for t, s in itertools.pairwise(levels):
        a, b = signal[t], signal[s]
        eps = denoiser(z, torch.full((len(z),), t - 1.0, device=x.device))
        x0 = ((z - (1 - a).sqrt() * eps) / a.sqrt()).clamp(-1, 1)
        beta = 1 - a / b
        z = (b.sqrt() * beta * x0 + (a / b).sqrt() * (1 - b) * z) / (1 - a)
        if s > 0:
            z = z + beta.sqrt() * torch.randn_like(z)  # noqa: TID251
    loss = F.cross_entropy(classifier(((z + 1) / 2).clamp(0, 1)), y, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, delta)
    mean = gradient.view(-1, COPIES, *x.shape[1:]).mean(1)
    return (x[::COPIES] + 0.25 * EPS * mean.sign()).clamp(0, 1)


def _defense(
    denoiser: ResidualMLP, classifier: DigitsCNN, policy: Policy, steps: int = STEPS
) -> Defense:
    purifier = DDPM(denoiser, 100, steps, "large", clip_x0=True, clamp_output=True)
    return Defense(purifier, classifier, [denoiser], policy)


def _ours(
    denoiser: ResidualMLP,
    classifier: DigitsCNN,
    images: Tensor,
    labels: Tensor,
    ids: list[int],
    policy: Policy,
) -> Callable[[], Tensor]:
    view = AttackerView(
        _defense(denoiser, classifier, policy),
        frozenset(),
        Tape.make(0, VICTIM, ids),
        Tape.make(0, ATTACKER, ids),
        IMAGES * COPIES,
    )
    ball, steps_taken = Linf(EPS), iter(range(10**9))

    def step() -> Tensor:
        first = COPIES * next(steps_taken)
        gradient = view.gradient(images, labels, cross_entropy, range(first, first + COPIES))
        return ball.project(images + 0.25 * EPS * ball.ascent(gradient.mean), images)

    return step


def _seconds(function: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


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
    defense = _defense(denoiser, classifier, "step", steps)
    x = image.repeat(_MEMORY_IMAGES, 1, 1, 1).requires_grad_()
    logits = defense.logits(x, Tape.make(0, ATTACKER, range(_MEMORY_IMAGES)))
    loss = F.cross_entropy(logits, label.repeat(_MEMORY_IMAGES), reduction="sum")
    torch.autograd.grad(loss, x)
    # Not getrusage: its peak is inherited from the parent process.
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


if __name__ == "__main__":
    print(render(measure("cpu", 7)))  # noqa: T201
