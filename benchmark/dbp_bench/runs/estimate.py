"""What a job would cost: network calls counted, time and memory measured on small pieces of it.

A published defense calls a large network hundreds of times, and a plan must not. So the sampler is
run once with networks that answer at once, which counts the calls and times all that isn't network;
and each network is called by itself, on as many images as fit in a moment. What is planned is the
sum. Weights that aren't in the cache are made up: they change no count, and hardly a time.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dbp_bench import memory
from dbp_bench.checks import gradients
from dbp_bench.data import stand_in
from dbp_bench.defense import Defense
from dbp_bench.entries.registry import Registry
from dbp_bench.memory import Policy
from dbp_bench.noise import ATTACKER, Tape
from dbp_bench.runs.execute import FRESH_DRAWS, is_complete, missing_gradients
from dbp_bench.runs.job import Job

MOMENT = 0.25
"""Seconds that a timed pass should take: long enough to be typical of long ones."""


@dataclass(frozen=True, slots=True)
class Cost:
    """An estimate."""

    calls: int
    """Network calls, each image of a batch counted, forward only. Those of the source of a transfer
    attack count, too."""
    at_most: bool
    """Whether images may finish early, so that `calls` and `seconds` are bounds."""
    seconds: float
    """Of what is still to be done, on this device."""
    bytes: int
    """Activations and states kept for one backward pass."""
    by_step: bool
    """Whether gradients are checkpointed by step."""
    free_bytes: int
    """Memory that is free on the device."""
    made_up: tuple[str, ...] = ()
    """Checkpoints that aren't in the cache: timed with made-up weights."""

    @property
    def fits(self) -> bool:
        """Whether one backward pass does."""
        return self.bytes <= self.free_bytes

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "made_up": list(self.made_up)}


def estimate(job: Job, registry: Registry, out: Path, policy: Policy) -> Cost:
    """The cost of `job`.

    Raises:
        BadExtra: A network is another package's, which is missing.
        BadEntry, BadWeights: As when the job runs, except that checkpoints may be missing.
    """
    probe = _probe(job, registry, policy)
    images = sum(map(len, job.groups))
    verdicts = images * job.draws * (2 + (FRESH_DRAWS if job.knows else 0))
    passes = job.passes
    looks = images * job.attacks * passes.looks
    # Nothing of a job can be done whose weights aren't there.
    missing = None in job.identity(planned=True)["weights"].values()
    todo = job.gradients if missing else missing_gradients(job, out)
    undone = float(missing or not is_complete(job, out))
    share = todo / job.gradients if job.gradients else undone
    searched, judged = probe.searched, probe.judged
    return Cost(
        calls=(job.gradients + looks) * searched.calls + verdicts * judged.calls,
        at_most=not passes.exact,
        seconds=todo * searched.per_gradient
        + share * (looks * searched.per_look + verdicts * judged.per_look),
        bytes=searched.bytes,
        by_step=searched.by_step,
        free_bytes=probe.free,
        made_up=probe.made_up,
    )


@dataclass(frozen=True, slots=True)
class _Passes:
    """What passes of one image through a defense cost."""

    calls: int
    per_gradient: float
    per_look: float
    bytes: int
    """Of a gradient, for all rows of a pass."""
    by_step: bool


@dataclass(frozen=True, slots=True)
class _Probe:
    searched: _Passes
    """Of what the attack differentiates: the defense, a surrogate of it, or another defense."""
    judged: _Passes
    made_up: tuple[str, ...]
    free: int


_PROBES: dict[tuple[object, ...], _Probe] = {}


def _probe(job: Job, registry: Registry, policy: Policy) -> _Probe:
    rows = min(job.rows, job.batch_size * job.copies)
    mode = (job.effort.get("gradient"), job.effort.get("surrogate_steps"), job.effort.get("source"))
    key = (job.track.name, job.defense.name, job.device, job.batch_size, rows, policy, mode)
    if key in _PROBES:
        return _PROBES[key]
    device = torch.device(job.device)
    registry = registry.for_plans()
    common: dict[str, Any] = {"device": device, "policy": policy}
    judged = registry.build_defense(job.defense, job.track, **common)
    if job.source is not None:
        searched = registry.build_defense(job.source, job.track, **common)
    else:
        searched = gradients.differentiated(
            registry, job.defense, job.track, judged, job.effort, **common
        )
    image = stand_in(job.track.entry.data, 1)[0].to(device)
    free = memory.free_bytes(device)
    networks = searched.networks or judged.networks
    found = _passes(searched, networks, image, rows, job.batch_size, policy, free)
    if searched is judged:
        passes = found
    else:
        passes = _passes(judged, judged.networks, image, rows, job.batch_size, policy, free)
    _PROBES[key] = _Probe(found, passes, tuple(dict.fromkeys(registry.made_up or ())), free)
    return _PROBES[key]


def _passes(
    defense: Defense,
    networks: list[nn.Module],
    image: Tensor,
    rows: int,
    group: int,
    policy: Policy,
    free: int,
) -> _Passes:
    """Of a `defense`, for an `image` ``(1, c, h, w)``; all votes are alike, so one is run."""
    votes, defense.votes = defense.votes, 1
    try:
        used = [call for network in networks if (call := _Call.seen(defense, network, image))]
        calls = votes * sum(call.count for call in used)
        ends = _classifier_bytes(defense, image)
        each = [(call.count, call.bytes()) for call in used]
        full = rows * votes * (ends + sum(count * size for count, size in each))
        if policy == "none" or full <= free // 2:
            # What the sampler keeps beside its networks, which can be much too.
            with _instant(used):
                full += rows * votes * (_kept(defense, image) - ends)
        states = calls * max((call.image.nbytes for call in used), default=0)
        steps = rows * (max((size for _, size in each), default=0) + states + votes * ends)
        by_step = policy == "step" or (policy == "auto" and full > free // 2)
        how: Policy = "step" if by_step else "none"
        with _instant(used):
            gradient = _timed(rows, lambda n: _gradient(defense, _copies(image, n), how))
            look = _timed(group, lambda n: _look(defense, _copies(image, n)))
        room = max(1, free // 2 // max((size for _, size in each), default=1))
        for call in used:
            there = _timed(group, lambda n, call=call: call.forward(n))  # type: ignore[misc]
            back = _timed(min(rows, room), lambda n, call=call: call.back(n))  # type: ignore[misc]
            look += call.count * there
            gradient += call.count * (back + (there if by_step else 0.0))
    finally:
        defense.votes = votes
    return _Passes(calls, votes * gradient, votes * look, steps if by_step else full, by_step)


@dataclass(frozen=True, slots=True)
class _Call:
    """The calls of a network in one purification of an image."""

    network: nn.Module
    count: int
    image: Tensor
    """``(1, c, h, w)``: the first argument."""
    others: tuple[Tensor, ...]
    """The other arguments ``(1, ...)``."""
    channels: int
    """Of the answer."""

    @classmethod
    def seen(cls, defense: Defense, network: nn.Module, image: Tensor) -> "_Call | None":
        """By a purification in which the first call alone is made; None if there is none."""
        calls: list[tuple[Any, ...]] = []
        answers: list[Tensor] = []
        forward = network.forward

        def once(*args: Any) -> Tensor:
            calls.append(args)
            if not answers:
                answers.append(forward(*args))
            return torch.zeros_like(answers[0])

        with _answering({network: once}), torch.no_grad():
            defense.purifier(image, Tape.make(0, ATTACKER, [0]))
        if not calls:
            return None
        first, *others = calls[0]
        return cls(network, len(calls), first, tuple(others), answers[0].shape[1])

    def forward(self, rows: int) -> None:
        """One call, without a gradient."""
        with torch.no_grad():
            self._answer(_copies(self.image, rows))

    def back(self, rows: int) -> None:
        """One call, and its backward pass."""
        z = _copies(self.image, rows).requires_grad_()
        with torch.enable_grad():
            torch.autograd.grad(self._answer(z).sum(), z)

    def bytes(self) -> int:
        """Kept for the backward pass of one image."""
        z = self.image.clone().requires_grad_()
        with torch.enable_grad():
            return memory.activation_bytes(lambda: self._answer(z))

    def _answer(self, z: Tensor) -> Tensor:
        others = [_copies(other, len(z)) for other in self.others]
        out: Tensor = self.network.forward(z, *others)
        return out


@contextmanager
def _answering(answers: "dict[nn.Module, Callable[..., Tensor]]") -> Iterator[None]:
    """Networks answer by these functions."""
    for network, answer in answers.items():
        network.forward = answer
    try:
        yield
    finally:
        for network in answers:
            del network.forward


@contextmanager
def _instant(calls: list[_Call]) -> Iterator[None]:
    """Networks answer 0 at once, and their answers carry a gradient."""

    def answer(z: Tensor, *others: Tensor, channels: int) -> Tensor:  # noqa: ARG001
        return (z[:, :1] * 0).expand(-1, channels, -1, -1)

    with _answering({call.network: partial(answer, channels=call.channels) for call in calls}):
        yield


@contextmanager
def _under(defense: Defense, policy: Policy) -> Iterator[None]:
    held, defense.policy = defense.policy, policy
    try:
        yield
    finally:
        defense.policy = held


def _logits(defense: Defense, images: Tensor) -> Tensor:
    return defense.logits(images, Tape.make(0, ATTACKER, [0] * len(images)))


def _gradient(defense: Defense, images: Tensor, policy: Policy) -> None:
    x = images.requires_grad_()
    with _under(defense, policy), torch.enable_grad():
        torch.autograd.grad(_logits(defense, x).sum(), x, materialize_grads=True)


def _look(defense: Defense, images: Tensor) -> None:
    with torch.no_grad():
        _logits(defense, images)


def _kept(defense: Defense, image: Tensor) -> int:
    x = image.clone().requires_grad_()
    with _under(defense, "none"), torch.enable_grad():
        return memory.activation_bytes(lambda: _logits(defense, x))


def _classifier_bytes(defense: Defense, image: Tensor) -> int:
    x = image.detach().requires_grad_()
    with torch.enable_grad():
        return memory.activation_bytes(lambda: defense.classifier(x))


def _copies(one: Tensor, count: int) -> Tensor:
    return one.detach().expand(count, *one.shape[1:]).clone()


def _timed(rows: int, run: Callable[[int], None]) -> float:
    """Seconds for each row of ``run(n)``, with the largest n up to `rows` that takes a moment.

    The shorter of two timings, since other work on the machine can only add.
    """
    n = 1
    while True:
        seconds = min(_seconds(run, n), _seconds(run, n))
        if n >= rows or seconds > MOMENT:
            return seconds / n
        n = min(rows, n * (8 if seconds < MOMENT / 32 else 2))


def _seconds(run: Callable[[int], None], rows: int) -> float:
    start = time.perf_counter()
    run(rows)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
