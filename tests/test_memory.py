"""Checkpointing and recording change what is kept, never what is computed, drawn or counted."""

import gc
from collections.abc import Callable
from contextlib import suppress
from itertools import groupby
from typing import Any, cast
from weakref import ref

import pytest
import torch
from torch import Tensor, nn

from dbp_bench import memory
from dbp_bench.defense import Defense
from dbp_bench.memory import CallCounter, Policy
from dbp_bench.noise import FORWARD, GUIDANCE, Noise, Site, Tape
from dbp_bench.purifiers.schedule import Schedule
from toys import SAMPLERS, LoggedNoise, Recorder, Small, SmallDenoiser, sampler, uniform

N = 3
KEPT: Policy = "none"
REDONE: Policy = "step"


def build(name: str, policy: Policy, steps: int = 4, **options: Any) -> tuple[Defense, Recorder]:
    network = Recorder(SmallDenoiser())
    purifier = sampler(name, network, steps=steps, clamp_output=False, **options)
    return Defense(purifier, Small(), [network], policy), network


def tape() -> Tape:
    return Tape.make(0, "test", range(N))


def run(defense: Defense, noise: Noise | None = None) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of a sum of them."""
    x = uniform(N, 1, 4, 4).requires_grad_()
    logits = defense.logits(x, noise or tape())
    (gradient,) = torch.autograd.grad(logits.square().sum(), x)
    return logits.detach(), gradient


@pytest.mark.parametrize("name", SAMPLERS)
def test_step_checkpointing_is_plain_autograd_bit_for_bit(name: str) -> None:
    kept, redone = run(build(name, KEPT)[0]), run(build(name, REDONE)[0])
    assert float(kept[1].abs().min()) > 0
    for a, b in zip(kept, redone, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", SAMPLERS)
def test_recomputation_replays_states_steps_and_noise(name: str) -> None:
    rounds = 2 if name == "gdmp" else 1
    calls = 4 * rounds
    noise = LoggedNoise(tape())
    defense, network = build(name, REDONE)
    run(defense, noise)

    assert len(network.seen) == 2 * calls
    forward, backward = network.seen[:calls], network.seen[: calls - 1 : -1]
    for (z, t), (again, t_again) in zip(forward, backward, strict=True):
        assert torch.equal(z, again)
        assert t == t_again

    drawn: dict[tuple[Site, int], list[Tensor]] = {}
    for site, step, value in noise.log:
        drawn.setdefault((site, step), []).append(value)
    assert all(torch.equal(value, same[0]) for same in drawn.values() for value in same)


class Forgetful:
    """Noise that is never the same twice: what a generator's state would do."""

    def __init__(self) -> None:
        self.asked = 0

    def normal(self, site: Site, step: int, like: Tensor) -> Tensor:
        self.asked += 1
        return tape().normal(site, self.asked, like)


def test_a_gradient_that_needs_the_noise_again_gets_the_same() -> None:
    """The control: with noise that can't be replayed, the same gradient comes out wrong."""

    def gradient(policy: Policy, noise: Noise) -> Tensor:
        defense, _ = build("gdmp", policy, distance="ssim", window=3, scale=30.0)
        return run(defense, noise)[1]

    logged = LoggedNoise(tape())
    assert torch.equal(gradient(REDONE, logged), gradient(KEPT, tape()))
    guides = [step for site, step, _ in logged.log if site == GUIDANCE]
    assert sorted(guides) == [i for i in (0, 1, 2, 4, 5, 6) for _ in range(2)]
    assert not torch.equal(gradient(REDONE, Forgetful()), gradient(KEPT, Forgetful()))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("policy", [KEPT, REDONE, "auto"])
def test_recomputation_is_not_counted(name: str, policy: Policy) -> None:
    defense, _ = build(name, policy)
    want = N * 4 * (2 if name == "gdmp" else 1)
    run(defense)
    assert defense.counter.images == want
    run(defense)
    assert defense.counter.images == 2 * want
    with torch.no_grad():
        defense.logits(uniform(N, 1, 4, 4), tape())
    assert defense.counter.images == 3 * want


def test_a_failed_recomputation_does_not_stop_the_count() -> None:
    counter = CallCounter()
    with suppress(RuntimeError), counter.recomputing():
        counter.add(3)
        raise RuntimeError
    counter.add(2)
    assert counter.images == 2


def redoes(defense: Defense, network: Recorder) -> bool:
    """Whether a gradient takes each network call twice."""
    defense.activation_bytes(uniform(N, 1, 4, 4))
    network.seen.clear()
    run(defense)
    assert len(network.seen) in (4, 8)
    return len(network.seen) == 8


def test_auto_keeps_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """All is kept where it takes up to half of the memory that is free."""
    defense, network = build("ddpm", "auto")
    needed = N * defense.activation_bytes(uniform(N, 1, 4, 4))
    for free, want in ((2 * needed, False), (2 * needed - 2, True), (0, True), (1 << 60, False)):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        assert redoes(defense, network) == want, f"{free} bytes free"


@pytest.mark.parametrize(("policy", "want"), [(KEPT, False), (REDONE, True)])
def test_a_stated_policy_is_kept(
    monkeypatch: pytest.MonkeyPatch, policy: Policy, want: bool
) -> None:
    for free in (0, 1 << 60):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        assert redoes(*build("ddpm", policy)) == want


def test_nothing_is_redone_without_a_gradient() -> None:
    defense, network = build("ddpm", REDONE)
    with torch.no_grad():
        defense.logits(uniform(N, 1, 4, 4).requires_grad_(), tape())
    defense.logits(uniform(N, 1, 4, 4), tape())
    assert len(network.seen) == 8


@pytest.mark.parametrize("name", SAMPLERS)
def test_without_checkpointing_memory_grows_by_the_same_at_every_step(name: str) -> None:
    image = uniform(1, 1, 4, 4)
    sizes = {k: build(name, KEPT, k)[0].activation_bytes(image) for k in (5, 10, 20, 40)}
    per_step = (sizes[10] - sizes[5]) / 5
    rounds = 2 if name == "gdmp" else 1
    hidden = 4 * 4 * 4 * 4  # what one activation of the toy's four channels takes
    assert per_step > rounds * 2 * hidden
    assert sizes[20] - sizes[10] == 10 * per_step
    assert sizes[40] - sizes[20] == 20 * per_step


@pytest.mark.parametrize(("name", "states"), [("ddpm", [1, 5, 20]), ("dpm-solver", [1, 9, 39])])
def test_with_checkpointing_memory_grows_by_the_stored_states_alone(
    name: str, states: list[int]
) -> None:
    """One state a step; a multistep method keeps the prediction of the step before, too."""
    x = uniform(N, 1, 4, 4).requires_grad_()

    def kept(steps: int) -> int:
        defense, _ = build(name, KEPT, steps)

        def once() -> Tensor:
            with memory.checkpointing(True, defense.counter):
                return defense.purifier(x, tape())

        return memory.activation_bytes(once)

    state = x.numel() * x.element_size()
    whole = memory.STATES_PER_BUFFER
    held = [-(-k // whole) * whole for k in states]
    assert [kept(k) for k in (1, 5, 20)] == [count * state for count in held]


def test_what_was_measured_is_freed() -> None:
    """A plan of every defense holds no network once it is measured."""

    def measured() -> "ref[Tensor]":
        linear = nn.Linear(10, 100)
        memory.activation_bytes(lambda: linear(torch.ones(10, 10)).exp())
        return ref(linear.weight)

    weight = measured()
    gc.collect()
    assert weight() is None


def test_activation_bytes_of_a_known_graph() -> None:
    x = uniform(1, 1000).requires_grad_()
    linear = nn.Linear(1000, 1000).requires_grad_(False)
    assert memory.activation_bytes(lambda: x + 1) == 0
    assert memory.activation_bytes(x.exp) == 4000, "the result"
    assert memory.activation_bytes(lambda: x * x) == 4000, "one storage, though it is saved twice"
    assert memory.activation_bytes(lambda: x * linear.bias) == 0, "a weight is no activation"
    assert memory.activation_bytes(lambda: linear(x).exp()) == 4000, "nor is a weight, transposed"

    def guidance() -> Tensor:
        return torch.autograd.grad(linear(x).exp().sum(), x, create_graph=True)[0]

    assert memory.activation_bytes(guidance) == 4004, "nor in a gradient's graph; a sum's is a 1"


def test_measuring_leaves_the_count_and_the_measure() -> None:
    defense, network = build("ddpm", "auto")
    image = uniform(N, 1, 4, 4)
    size = defense.activation_bytes(image)
    assert defense.counter.images == 0
    assert len(network.seen) == 4
    with torch.no_grad():
        assert defense.activation_bytes(image[:1]) == size
    assert len(network.seen) == 4, "measured once"


@pytest.mark.parametrize("policy", [KEPT, REDONE])
def test_no_gradient_of_a_weight_is_ever_computed(policy: Policy) -> None:
    defense, network = build("gdmp", policy)
    weights = [*network.parameters(), *defense.classifier.parameters()]
    assert len(weights) == 8
    x = uniform(N, 1, 4, 4).requires_grad_()
    logits = defense.logits(x, tape())
    assert not any(w.requires_grad for w in weights)
    reached = leaves(logits)
    assert len(reached) == 1
    assert reached[0] is x
    torch.autograd.backward(logits.sum())
    assert x.grad is not None
    assert all(w.grad is None for w in weights)
    assert not any(module.training for module in (network, defense.classifier))


def leaves(out: Tensor) -> list[Tensor]:
    """The leaf tensors whose gradient a backward pass from `out` computes."""
    found: list[Tensor] = []
    todo, seen = [out.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(cast(Tensor, node.variable))
        todo += [parent for parent, _ in node.next_functions]
    return [next(same) for _, same in groupby(found, key=id)]


# ------------------------------------------------------------------------------- what is recorded


def through_states(defense: Defense, noise: Noise | None = None) -> tuple[Tensor, list[Tensor]]:
    """The gradient of a loss of logits and of all states, and what there was to differentiate."""
    x = uniform(N, 1, 4, 4).requires_grad_()
    with memory.recording() as states:
        logits = defense.logits(x, noise or tape())
    apart = [(state.reverse - state.forward).square().sum() for state in states]
    loss = logits.square().sum() + torch.stack(apart).sum()
    (gradient,) = torch.autograd.grad(loss, x)
    return gradient, [logits, *(t for s in states for t in (s.forward, s.reverse))]


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_a_sampler_shows_of_its_way(name: str) -> None:
    """The input of every network call but the first, the output, and the forward process."""
    defense, network = build(name, KEPT)
    x, noise = uniform(N, 1, 4, 4), tape()
    with memory.recording() as states:
        purified = defense.purifier(x, noise)
    rounds = 2 if name == "gdmp" else 1
    assert [s.level for s in states] == [45, 30, 15, 0] * rounds

    source = 2 * x - 1
    for k in range(rounds):
        own, fresh = states[4 * k : 4 * k + 4], noise.normal(FORWARD, k, x)
        for state in own:
            a = Schedule().signal()[state.level]
            want = a**0.5 * source + (1 - a) ** 0.5 * fresh
            torch.testing.assert_close(state.forward, want)
        called = [z for z, _ in network.seen[4 * k + 1 : 4 * k + 4]]
        assert all(torch.equal(s.reverse, z) for s, z in zip(own, called, strict=False))
        source = own[-1].reverse
    torch.testing.assert_close((source + 1) / 2, purified)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("policy", [KEPT, REDONE, "auto"])
def test_recording_changes_nothing_that_is_computed_drawn_or_counted(
    name: str, policy: Policy
) -> None:
    (quiet, _), (told, _) = build(name, policy), build(name, policy)
    want, drawn, again = run(quiet, first := LoggedNoise(tape())), first.log, LoggedNoise(tape())
    with memory.recording() as states:
        found = run(told, again)
    assert len(states) == (8 if name == "gdmp" else 4), "none of a measurement, nor of a repetition"
    assert all(len(s.forward) == len(s.reverse) == N for s in states)
    assert all(torch.equal(a, b) for a, b in zip(want, found, strict=True))
    assert [entry[:2] for entry in drawn] == [entry[:2] for entry in again.log]
    assert quiet.counter.images == told.counter.images
    run(told)
    assert len(states) == (8 if name == "gdmp" else 4), "nor of what comes later"


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_gradient_through_recorded_states_is_plain_autograd_bit_for_bit(name: str) -> None:
    kept, redone = through_states(build(name, KEPT)[0]), through_states(build(name, REDONE)[0])
    alone = run(build(name, KEPT)[0])[1]
    assert float((kept[0] - alone).abs().min()) > 0, "the states add to the gradient of the logits"
    assert torch.equal(kept[0], redone[0])
    assert all(torch.equal(a, b) for a, b in zip(kept[1], redone[1], strict=True))


def test_the_forward_process_is_asked_for_only_while_recording() -> None:
    asked: list[int] = []

    def forward(level: int) -> Tensor:
        asked.append(level)
        return torch.zeros(1)

    def halve(i: int, t: int, s: int, z: Tensor) -> Tensor:
        return z / 2

    one, grid = torch.ones(1), [(9, 5), (5, 3)]
    assert float(memory.descend(halve, one, grid, forward=forward)) == 0.25
    assert asked == []
    with memory.recording() as states:
        memory.descend(halve, one, grid, forward=forward)
        memory.descend(halve, one, grid)
    assert asked == [5, 3]
    assert [(s.level, float(s.reverse)) for s in states] == [(5, 0.5), (3, 0.25)]


# ------------------------------------------------------------------------------------- the descent


def test_steps_are_numbered_and_given_their_levels() -> None:
    seen: list[tuple[int, ...]] = []

    def reverse(i: int, t: int, s: int, z: Tensor, other: Tensor) -> Tensor:
        seen.append((i, t, s))
        return z + other

    end = memory.descend(reverse, torch.zeros(1), [(7, 4), (4, 0)], torch.ones(1), first=10)
    assert float(end) == 2
    assert seen == [(10, 7, 4), (11, 4, 0)]


def gradient_of_a_descent(
    by_step: bool, reverse: Callable[..., Any], begin: Callable[[Tensor], Any]
) -> Tensor:
    """The gradient in x of what `reverse` makes of ``begin(x)`` in four steps, beside a sum."""
    x = uniform(N, 1, 4, 4).requires_grad_()
    with memory.checkpointing(by_step, CallCounter()):
        end = memory.descend(reverse, begin(x), [(4, 3), (3, 2), (2, 1), (1, 0)], x.sin())
    (image, *_) = end if isinstance(end, tuple) else (end,)
    (gradient,) = torch.autograd.grad(image.square().sum() + x.cos().sum(), x)
    return gradient


def two_states(i: int, t: int, s: int, state: tuple[Tensor, ...], guide: Tensor) -> Any:
    """A two-step method: its state is what it was given, too, and nothing follows its last."""
    z, *before = state
    return (z * guide).sin() - sum(0.3 * old.cos() for old in before), z


def often_guided(i: int, t: int, s: int, z: Tensor, guide: Tensor) -> Tensor:
    """Takes the tensor that steps share three times."""
    return 0.5 * z.sin() + guide * guide.exp() - (guide * z).cos()


@pytest.mark.parametrize(
    ("reverse", "begin"),
    [
        (two_states, lambda x: (0.7 * x,)),
        (two_states, lambda x: (0.7 * x, x.exp())),
        (often_guided, lambda x: 0.7 * x),
    ],
)
def test_the_policies_agree_on_several_states_and_on_shared_tensors(
    reverse: Callable[..., Any], begin: Callable[[Tensor], Any]
) -> None:
    kept, redone = (gradient_of_a_descent(by_step, reverse, begin) for by_step in (False, True))
    assert torch.equal(kept, redone)
    x = uniform(N, 1, 4, 4, dtype=torch.float64).requires_grad_()

    def value(x: Tensor) -> Tensor:
        state, guide = begin(x), x.sin()
        for i in range(4):
            state = reverse(i, 0, 0, state, guide)
        image = state[0] if isinstance(state, tuple) else state
        total: Tensor = image.square().sum() + x.cos().sum()
        return total

    (want,) = torch.autograd.grad(value(x), x)
    torch.testing.assert_close(kept.double(), want, rtol=1e-4, atol=1e-5)


def test_a_step_keeps_a_copy_of_its_state_and_not_the_state() -> None:
    leaf = uniform(N, 1, 4, 4).requires_grad_()
    state = 2 * leaf
    alive = ref(state)
    with memory.checkpointing(True, CallCounter()):
        out = memory.step(lambda z: z * z.sin(), state)
    del state
    gc.collect()
    assert alive() is None
    assert out.requires_grad


def test_a_state_that_no_step_uses_is_no_obstacle() -> None:
    """The gradient comes through one state alone, and the other has none."""

    def reverse(i: int, t: int, s: int, state: tuple[Tensor, ...], guide: Tensor) -> Any:
        return state[0] * guide, torch.ones_like(state[0])

    for by_step in (False, True):
        gradient = gradient_of_a_descent(by_step, reverse, lambda x: (x, x))
        assert bool(gradient.isfinite().all())


def test_a_step_that_captures_a_gradient_is_refused() -> None:
    x = uniform(N, 1, 4, 4).requires_grad_()
    guide = x.sin()

    def reverse(i: int, t: int, s: int, z: Tensor) -> Tensor:
        return z + guide

    memory.descend(reverse, x, [(1, 0)])
    with (
        memory.checkpointing(True, CallCounter()),
        pytest.raises(ValueError, match="'guide' carries a gradient, which a step loses"),
    ):
        memory.descend(reverse, x, [(1, 0)])


def test_free_memory_is_a_positive_number_of_bytes() -> None:
    assert memory.free_bytes(torch.device("cpu")) > 1 << 20
