"""Estimates what a job would cost: NFE are counted, time and memory measured on small pieces.

A published defense calls a large network hundreds of times, and a plan must not. So the sampler is
run once with networks that answer at once, which counts the calls and times all that isn't network;
and each network is called by itself, on as many images as fit in a moment. What is planned is the
sum. Weights that aren't in the cache are random: they change no count, and hardly a time.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dbp_bench import memory
from dbp_bench.data import stand_in
from dbp_bench.defense import Defense
from dbp_bench.entries.subject import Subject
from dbp_bench.memory import Policy
from dbp_bench.noise import ATTACKER, Tape
from dbp_bench.runs.execute import FRESH_DRAWS, is_complete, missing_gradients
from dbp_bench.runs.job import Job

_Function = Callable[[Tensor], Tensor]

MOMENT = 0.25
"""Seconds that a timed pass should take: long enough to be typical of long ones."""


@dataclass(frozen=True, slots=True)
class Cost:
    """An estimate."""

    nfe: int
    """NFE of all images and evaluations, forward only. Those of other defenses in which the attack
    searches count, too."""
    at_most: bool
    """True where images may finish early, so that `nfe` and `seconds` are bounds."""
    seconds: float
    """Time of what is still to be done, on this device."""
    bytes: int
    """Activations and states kept for one backward pass."""
    by_step: bool
    """True where gradients are checkpointed by step."""
    free_bytes: int
    """Memory that is free on the device."""
    random_weights: tuple[str, ...] = ()
    """Checkpoints that aren't in the cache: timed with random weights."""

    @property
    def fits(self) -> bool:
        """True where one backward pass fits into the memory that is free."""
        return self.bytes <= self.free_bytes


def estimate(job: Job, out: Path, policy: Policy) -> Cost:
    """The cost of `job`.

    Raises:
        BadExtra: A network is another package's, which is missing.
        BadEntry, BadWeights: As when the job runs, except that checkpoints may be missing.
    """
    probe = _probe(job, policy)
    images = sum(map(len, job.groups))
    evaluated = images * job.draws * (2 + (FRESH_DRAWS if job.knows else 0))
    needed = job.evaluations
    forward = images * job.attacks * needed.forward
    # Nothing of a job can be done whose weights aren't there.
    missing = None in job.identity(planned=True)["weights"].values()
    todo = job.gradient_evaluations if missing else missing_gradients(job, out)
    undone = float(missing or not is_complete(job, out))
    share = todo / job.gradient_evaluations if job.gradient_evaluations else undone
    searched, defended = probe.searched, probe.defended
    return Cost(
        nfe=(job.gradient_evaluations + forward) * searched.nfe + evaluated * defended.nfe,
        at_most=not needed.exact,
        seconds=todo * searched.per_gradient
        + share * (forward * searched.per_forward + evaluated * defended.per_forward),
        bytes=searched.bytes,
        by_step=searched.by_step,
        free_bytes=probe.free,
        random_weights=probe.random_weights,
    )


@dataclass(frozen=True, slots=True)
class ForwardCost:
    """The cost of one evaluation of a defense without a gradient, votes and all."""

    nfe: int
    seconds: float
    """Per image, in batches that take a moment."""
    random_weights: tuple[str, ...]
    """Checkpoints that aren't in the cache: timed with random weights."""


def forward_cost(subject: Subject, device: str) -> ForwardCost:
    """The cost of one evaluation of `subject`, without a gradient, on `device`."""
    defense = subject.with_random_weights().defense(device=device)
    image = stand_in(subject.facts, 1)[0].to(device)
    used = _used(defense, image)
    with _instant(used):
        seconds = _timed(_MOST, _forward, partial(_logits, defense), image)
    for call in used:
        each = _forward_bytes(call.answer, call.image)
        room = max(1, memory.free_bytes(image.device) // 4 // max(1, each))
        seconds += call.count * _timed(min(_MOST, room), _forward, call.answer, call.image)
    return ForwardCost(sum(call.count for call in used), seconds, tuple(subject.uncached()))


def forward_bytes(subject: Subject, device: str) -> int:
    """Memory of one image in the largest network of `subject`, without a gradient, at most."""
    defense = subject.with_random_weights().defense(device=device)
    image = stand_in(subject.facts, 1)[0].to(device)
    each = [_forward_bytes(call.answer, call.image) for call in _used(defense, image)]
    return max(_forward_bytes(defense.classifier, image), *each, 1)


def _used(defense: Defense, image: Tensor) -> "list[_Call]":
    """The calls of each network in all votes of `defense`."""
    seen = (_Call.seen(defense, network, image, defense.votes) for network in defense.networks)
    return [call for call in seen if call]


def _forward_bytes(function: _Function, image: Tensor) -> int:
    """Memory of one image in a pass without a gradient, at most."""
    if image.device.type != "cuda":
        return _bytes(function, image)
    copies = 4
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _forward(function, image, copies)
    return max(1, (torch.cuda.max_memory_allocated() - before) // copies)


_MOST = 4096
"""Most images of a timed pass without a gradient."""


@dataclass(frozen=True, slots=True)
class _Pass:
    """The cost of one evaluation of a defense."""

    nfe: int
    per_gradient: float
    """Seconds of a gradient evaluation."""
    per_forward: float
    """Seconds of a forward evaluation."""
    bytes: int
    """Memory of a gradient, for all evaluations of one pass."""
    by_step: bool


@dataclass(frozen=True, slots=True)
class _Probe:
    searched: _Pass
    """The cost of what the attack differentiates: the defense, a surrogate, or another defense."""
    defended: _Pass
    random_weights: tuple[str, ...]
    free: int


_PROBES: dict[tuple[object, ...], _Probe] = {}


def _probe(job: Job, policy: Policy) -> _Probe:
    track = job.subject.track
    max_batch = min(job.max_batch, job.batch_size * job.samples)
    sources = tuple(job.sources)
    subject = (track.name, job.subject.name, job.search.gradient, sources)
    key = (*subject, job.device, job.batch_size, max_batch, policy)
    if key in _PROBES:
        return _PROBES[key]
    device = torch.device(job.device)
    job = replace(
        job,
        subject=job.subject.with_random_weights(),
        sources={name: source.with_random_weights() for name, source in job.sources.items()},
    )
    defended, searched = job.built(policy=policy)
    if job.search.gradient is None:  # it searches elsewhere, if in any other defense
        searched = next(iter(job.other_defenses(policy=policy).values()), searched)
    image = stand_in(track.entry.facts(track.name), 1)[0].to(device)
    free = memory.free_bytes(device)
    networks = searched.networks or defended.networks
    measure = partial(
        _pass, image=image, max_batch=max_batch, group=job.batch_size, policy=policy, free=free
    )
    found = measure(searched, networks)
    own = found if searched is defended else measure(defended, defended.networks)
    subjects = (job.subject, *job.sources.values())
    random = [name for subject in subjects for name in subject.uncached()]
    _PROBES[key] = _Probe(found, own, tuple(dict.fromkeys(random)), free)
    return _PROBES[key]


def _pass(
    defense: Defense,
    networks: list[nn.Module],
    image: Tensor,
    max_batch: int,
    group: int,
    policy: Policy,
    free: int,
) -> _Pass:
    """The cost of a `defense`, of this probe alone, for an `image` ``(1, c, h, w)``."""
    # Votes are alike, so one is run.
    votes, defense.votes = defense.votes, 1
    whole = partial(_logits, defense)
    seen = (_Call.seen(defense, network, image, votes) for network in networks)
    used = [call for call in seen if call]
    nfe = sum(call.count for call in used)
    ends = _bytes(defense.classifier, image)
    each = [(call.count, _bytes(call.answer, call.image)) for call in used]
    full = max_batch * (votes * ends + sum(count * size for count, size in each))
    with _instant(used):
        if policy == "none" or full <= free // 2:
            # What the sampler keeps beside its networks, which can be much too.
            defense.policy = "none"
            full += max_batch * votes * (_bytes(whole, image) - ends)
        states = nfe * max((call.image.nbytes for call in used), default=0)
        steps = max_batch * (max((size for _, size in each), default=0) + states + votes * ends)
        by_step = policy == "step" or (policy == "auto" and full > free // 2)
        defense.policy = policy
        forward = _timed(group, _forward, whole, image)
        defense.policy = "step" if by_step else "none"
        gradient = _timed(max_batch, _backward, whole, image)
    forward, gradient = votes * forward, votes * gradient
    room = max(1, free // 2 // max((size for _, size in each), default=1))
    for call in used:
        there = _timed(group, _forward, call.answer, call.image)
        back = _timed(min(max_batch, room), _backward, call.answer, call.image)
        forward += call.count * there
        gradient += call.count * (back + (there if by_step else 0.0))
    return _Pass(nfe, gradient, forward, steps if by_step else full, by_step)


@dataclass(frozen=True, slots=True)
class _Call:
    """The calls of a network in all votes on an image."""

    network: nn.Module
    count: int
    image: Tensor
    """``(1, c, h, w)``: the first argument."""
    others: tuple[Tensor, ...]
    """The other arguments ``(1, ...)``."""
    channels: int
    """Channels of the answer."""

    @classmethod
    def seen(
        cls, defense: Defense, network: nn.Module, image: Tensor, votes: int = 1
    ) -> "_Call | None":
        """The calls in a purification in which the first one alone is made; None if none is.

        Those of the part that `votes` share count once, the others as often as there are votes.
        """
        calls: list[tuple[Any, ...]] = []
        answers: list[Tensor] = []
        forward = network.forward

        def once(*args: Any) -> Tensor:
            calls.append(args)
            if not answers:
                answers.append(forward(*args))
            # Zeros that hang on the image: a purifier may ask for their gradient.
            zero: Tensor = 0 * args[0].sum()
            return torch.zeros_like(answers[0]) + zero

        tape = Tape.make(0, ATTACKER, [0])
        with _answering({network: once}), torch.no_grad():
            state = defense.begin(image, tape)
            shared = len(calls)
            defense.finish(state, tape)
        if not calls:
            return None
        first, *others = calls[0]
        count = shared + votes * (len(calls) - shared)
        return cls(network, count, first, tuple(others), answers[0].shape[1])

    def answer(self, z: Tensor) -> Tensor:
        """The network's answer for `z` ``(n, c, h, w)``."""
        out: Tensor = self.network.forward(z, *(_copies(other, len(z)) for other in self.others))
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


# ---------------------------------------------------------- a function of images, on `n` copies


def _logits(defense: Defense, images: Tensor) -> Tensor:
    return defense.logits(images, Tape.make(0, ATTACKER, [0] * len(images)))


def _forward(function: _Function, image: Tensor, n: int) -> None:
    with torch.no_grad():
        function(_copies(image, n))


def _backward(function: _Function, image: Tensor, n: int) -> None:
    x = _copies(image, n).requires_grad_()
    with torch.enable_grad():
        torch.autograd.grad(function(x).sum(), x, materialize_grads=True)


def _bytes(function: _Function, image: Tensor) -> int:
    """Bytes kept for the backward pass of one image."""
    x = image.clone().requires_grad_()
    with torch.enable_grad():
        return memory.activation_bytes(lambda: function(x))


def _copies(one: Tensor, n: int) -> Tensor:
    return one.detach().expand(n, *one.shape[1:]).clone()


def _timed(
    most: int, run: Callable[[_Function, Tensor, int], None], function: _Function, image: Tensor
) -> float:
    """Seconds of a `run` for each copy, with the largest number up to `most` that takes a moment.

    The shorter of two timings, since other work on the machine can only add.
    """
    n = 1
    while True:
        seconds = min(_seconds(partial(run, function, image, n)) for _ in range(2))
        if n >= most or seconds > MOMENT:
            return seconds / n
        n = min(most, n * (8 if seconds < MOMENT / 32 else 2))


def _seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
