"""The memory of a purification: what it keeps for a gradient, and a record of its states.

Nothing here changes what a purification computes.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dbp_bench.errors import words_of

Policy = Literal["auto", "none", "step"]
"""`none` stores every activation; `step` stores the state at each step and recomputes the rest;
`auto` takes `none` where it fits. Results are the same, bit for bit."""


@dataclass(slots=True)
class CallCounter:
    """The number of images that passed through a defense's denoising networks."""

    images: int = 0
    paused: bool = False

    def add(self, images: int) -> None:
        """Count one call on a batch of `images`, unless it is a recomputation."""
        if not self.paused:
            self.images += images

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """Within this context, calls repeat earlier ones and do not count."""
        self.paused = True
        try:
            yield
        finally:
            self.paused = False


class StateBuffer:
    """Keeps copies of states side by side in a few large buffers.

    States that stayed where they were computed, among temporaries of all sizes, would leave holes
    that the C allocator cannot use again: the peak would grow many times as fast as the states.
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(0)
        self._used = 0

    def keep(self, state: Tensor) -> Tensor:
        """A copy of `state`, in a buffer."""
        buffer = self._buffer
        fits = buffer.shape[1:] == state.shape and buffer.dtype == state.dtype
        if not fits or buffer.device != state.device or self._used == len(buffer):
            self._buffer, self._used = state.new_empty(STATES_PER_BUFFER, *state.shape), 0
        # .data: a version counter of its own, or the next state would seem to overwrite this one.
        kept = self._buffer[self._used].data
        self._used += 1
        return kept.copy_(state)


STATES_PER_BUFFER = 8


class State(NamedTuple):
    """The end of a reverse step, and the forward process at the same noise level."""

    level: int
    """The integer noise level; 0 is the clean image. Where levels aren't integers, steps left."""
    forward: Tensor
    """The state ``(b, c, h, w)`` of the forward process at that level, in diffusion space."""
    reverse: Tensor
    """The state ``(b, c, h, w)`` that the step returned, in diffusion space."""


_buffer: ContextVar[StateBuffer | None] = ContextVar("buffer of the running defense", default=None)
_counter: ContextVar[CallCounter | None] = ContextVar(
    "counter of the running defense", default=None
)
_states: ContextVar[list[State] | None] = ContextVar("record of the running defense", default=None)


@contextmanager
def checkpointing(by_step: bool, counter: CallCounter) -> Iterator[None]:
    """Run the steps of :func:`step` under this policy, counting calls in `counter`."""
    tokens = _buffer.set(StateBuffer() if by_step else None), _counter.set(counter)
    try:
        yield
    finally:
        _buffer.reset(tokens[0])
        _counter.reset(tokens[1])


def running_counter() -> CallCounter | None:
    """The call counter of the defense that is running."""
    return _counter.get()


@contextmanager
def recording() -> Iterator[list[State]]:
    """The states after the reverse steps that run inside, in order, with their graphs.

    Only steps of :func:`descend` that is told the forward process are recorded. What is computed
    stays the same.
    """
    states: list[State] = []
    token = _states.set(states)
    try:
        yield states
    finally:
        _states.reset(token)


S = TypeVar("S", Tensor, tuple[Tensor, ...])
"""The state of a sampler: an image, or an image first and then what a multistep method keeps."""


def descend(
    reverse: Callable[..., S],
    state: S,
    grid: Iterable[tuple[int, int]],
    *others: Tensor,
    forward: Callable[[int], Tensor] | None = None,
    first: int = 0,
) -> S:
    """The last state of a sampler that takes `state` down the noise levels of `grid`.

    The loop of every sampler: each step runs under the policy of the defense, and is recorded.

    Args:
        reverse: One step: ``reverse(i, t, s, state, *others)`` is the state at level `s` for
            `state` at level `t`. It draws its noise inside, at the step number `i`, from a tape: a
            recomputation then replays it. A tensor that carries a gradient comes as an argument.
        state: The state before the first step: ``(b, c, h, w)`` in diffusion space; for a multistep
            method a tuple of tensors, that image first.
        grid: The levels (t, s) of each step. Integers; steps left where levels are none.
        others: Tensors from outside the sampler through which a gradient may flow.
        forward: The forward process that is undone: its state ``(b, c, h, w)`` at a level. Called
            only while :func:`recording`.
        first: The number of the first step.

    Raises:
        ValueError: `reverse` captured a tensor that carries a gradient, which would be lost.
    """
    for i, (t, s) in enumerate(grid, first):
        state = _recorded(step(partial(reverse, i, t, s), state, *others), s, forward)
    return state


def _recorded(state: S, level: int, forward: Callable[[int], Tensor] | None) -> S:
    """The `state` itself, after it was recorded if :func:`recording` is active."""
    states = _states.get()
    if states is None or forward is None:
        return state
    image = state[0] if isinstance(state, tuple) else state
    states.append(State(level, forward(level), image))
    # An alias: its gradient adds up what comes through later steps before that of the record is
    # added, whatever the policy, so that policies round alike.
    alias = image.view_as(image)
    return (alias, *state[1:]) if isinstance(state, tuple) else alias


def step(function: Callable[..., S], state: S, *others: Tensor) -> S:
    """``function(state, *others)``, of which the policy `step` keeps only the arguments.

    For what is no descent along a grid; see :func:`descend` for the arguments.

    Raises:
        ValueError: `function` captured a tensor that carries a gradient, which would be lost.
    """
    parts: tuple[Tensor, ...] = state if isinstance(state, tuple) else (state,)
    inputs = (*parts, *others)
    buffer, counter = _buffer.get(), _counter.get()
    if buffer is None or not (torch.is_grad_enabled() and any(t.requires_grad for t in inputs)):
        # Aliases: what a step gives to the gradient of a shared tensor is summed up within the step
        # first, as it is where the step is recomputed, so that policies round alike.
        return function(state, *(other.view_as(other) for other in others))
    for name, value in _captured(function):
        if isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(
                f"{name!r} carries a gradient, which a step loses that captures it: give it to "
                "memory.descend or memory.step as an argument."
            )

    # Numbers, since `flat` lives as long as the graph, and would keep the state itself beside its
    # copy in the buffer.
    several, count = isinstance(state, tuple), len(parts)

    def flat(*tensors: Tensor) -> S:
        """`function` of tensors alone, as autograd takes them."""
        first: Any = tensors[:count] if several else tensors[0]
        return function(first, *tensors[count:])

    out: S = _Checkpointed.apply(flat, buffer, counter, count, *inputs)  # type: ignore[no-untyped-call]
    return out


class _Checkpointed(torch.autograd.Function):
    """A step without a graph, which is run again, with one, in the backward pass.

    torch's own checkpoint builds the graph in the forward pass too; its nodes, small and
    long-lived among the large temporaries, tear the heap to pieces.
    """

    @staticmethod
    def forward(
        ctx: Any,
        function: Callable[..., Tensor | tuple[Tensor, ...]],
        buffer: StateBuffer,
        counter: CallCounter | None,
        parts: int,
        *inputs: Tensor,
    ) -> Tensor | tuple[Tensor, ...]:
        ctx.function, ctx.counter = function, counter
        ctx.set_materialize_grads(False)
        # The first `parts` are the state, which only this step needs; the others are shared.
        ctx.save_for_backward(*(buffer.keep(part) for part in inputs[:parts]), *inputs[parts:])
        return function(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[4:]
        inputs = [
            tensor.detach().requires_grad_(want)
            for tensor, want in zip(ctx.saved_tensors, wanted, strict=True)
        ]
        with torch.enable_grad(), ctx.counter.recomputing() if ctx.counter else nullcontext():
            out = ctx.function(*inputs)
        # What no later step uses has no gradient, and gives none.
        outs = out if isinstance(out, tuple) else (out,)
        used = [(o, g) for o, g in zip(outs, gradients, strict=True) if g is not None]
        found = torch.autograd.grad(
            [o for o, _ in used],
            [tensor for tensor in inputs if tensor.requires_grad],
            [g for _, g in used],
            allow_unused=True,
        )
        given = iter(found)
        return (None, None, None, None, *(next(given) if want else None for want in wanted))


def _captured(function: Callable[..., object]) -> Iterator[tuple[str, object]]:
    """Names and values that a function holds beside its arguments."""
    while isinstance(function, partial):
        function = function.func
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    if code is not None and cells is not None:
        yield from zip(code.co_freevars, (cell.cell_contents for cell in cells), strict=True)


class _LimitReached(Exception):
    """A function keeps more bytes than the bound that was asked about."""


def activation_bytes(function: Callable[[], Tensor], limit: int | None = None) -> int:
    """Bytes that autograd keeps for the backward pass of ``function()``.

    Where they are more than `limit`, the result is some number above it: the call is left when it
    gets there, because all steps of a large network fit in no memory.
    """
    seen: dict[int, int] = {}
    saved: list[list[Tensor]] = []
    total = 0

    def keep(tensor: Tensor) -> list[Tensor]:
        nonlocal total
        storage = tensor.untyped_storage()
        if not isinstance(tensor if tensor._base is None else tensor._base, torch.nn.Parameter):
            total += storage.nbytes() - seen.get(storage.data_ptr(), 0)
            seen[storage.data_ptr()] = storage.nbytes()
        if limit is not None and total > limit:
            raise _LimitReached
        held = [tensor]
        saved.append(held)
        return held

    unrecorded = _states.set(None)
    out = None
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda held: held[0]):
            out = function()
    except _LimitReached:
        pass
    finally:
        _states.reset(unrecorded)
        # What its own node saves holds that node: the graph would never be freed.
        for held in saved:
            held.clear()
    del out
    return total


def free_bytes(device: torch.device) -> int:
    """Memory that can still be allocated on `device`."""
    if device.type == "cuda":
        # torch keeps what tensors gave back, and the driver counts it as taken.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 4 << 30


def is_exhausted(error: BaseException) -> bool:
    """Tell whether `error` is an allocation that failed, on a GPU or on the processor."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # torch has no class for a failure on the processor, or inside a library of the GPU.
    return isinstance(error, RuntimeError) and any(w in words_of(error) for w in _EXHAUSTED)


_EXHAUSTED = ("DefaultCPUAllocator", "CUDA error: out of memory", "STATUS_ALLOC_FAILED")
