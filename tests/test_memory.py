"""Checkpointing and recording change what is kept, never what is computed, drawn or counted."""

from contextlib import suppress
from itertools import groupby
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from dbp_bench import memory
from dbp_bench.defense import Defense
from dbp_bench.memory import CallCounter, Policy
from dbp_bench.noise import FORWARD, GUIDANCE, Noise, Site, Tape
from dbp_bench.purifiers.schedule import Schedule
from toys import SAMPLERS, Recorder, CachedTape, Small, SmallDenoiser, sampler, ssim, uniform

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
    noise = CachedTape(tape())
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
        defense, _ = build("gdmp", policy, distance_gradient=ssim, scale=30.0)
        return run(defense, noise)[1]

    remembered = CachedTape(tape())
    assert torch.equal(gradient(REDONE, remembered), gradient(KEPT, tape()))
    guides = [step for site, step, _ in remembered.log if site == GUIDANCE]
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


def test_with_checkpointing_memory_grows_by_the_stored_states_alone() -> None:
    x = uniform(N, 1, 4, 4).requires_grad_()

    def kept(steps: int) -> int:
        defense, _ = build("ddpm", KEPT, steps)

        def once() -> Tensor:
            with memory.checkpointing(True, defense.counter):
                return defense.purifier(x, tape())

        return memory.activation_bytes(once)

    state = x.numel() * x.element_size()
    shelves = [-(-k // memory.SHELF) * memory.SHELF for k in (1, 5, 20)]
    assert [kept(k) for k in (1, 5, 20)] == [count * state for count in shelves]


def test_activation_bytes_of_a_known_graph() -> None:
    x = uniform(1, 1000).requires_grad_()
    linear = nn.Linear(1000, 1000).requires_grad_(False)
    assert memory.activation_bytes(lambda: x + 1) == 0
    assert memory.activation_bytes(x.exp) == 4000, "the result"
    assert memory.activation_bytes(lambda: x * x) == 4000, "one storage, though it is saved twice"
    assert memory.activation_bytes(lambda: x * linear.bias) == 0, "a weight is no activation"
    assert memory.activation_bytes(lambda: linear(x).exp()) == 4000, "nor is a weight, transposed"


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
    want, drawn, again = run(quiet, first := CachedTape(tape())), first.log, CachedTape(tape())
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

    one = torch.ones(1)
    assert torch.equal(memory.step(torch.neg, one, level=3, forward=forward), -one)
    assert asked == []
    with memory.recording() as states:
        memory.step(torch.neg, one, level=3, forward=forward)
        memory.step(torch.neg, one)
    assert asked == [3]
    assert [(s.level, float(s.reverse)) for s in states] == [(3, -1.0)]


def test_a_level_and_its_forward_process_go_together() -> None:
    with pytest.raises(ValueError, match="level and forward go together"):
        memory.step(torch.neg, torch.ones(1), level=3)


def test_free_memory_is_a_positive_number_of_bytes() -> None:
    assert memory.free_bytes(torch.device("cpu")) > 1 << 20
