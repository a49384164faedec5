"""What a purification keeps for a gradient, and shows of its way; never what it computes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Policy = Literal["auto", "none", "step"]
"""`none` stores every activation; `step` stores the state at each step and recomputes the rest;
`auto` takes `none` where it fits. Results are the same, bit for bit."""


@dataclass(slots=True)
class CallCounter:
    """How many images passed through a defense's denoising networks."""

    images: int = 0
    paused: bool = False

    def add(self, images: int) -> None:
        """Count one call on a batch of `images`, unless it is a recomputation."""
        if not self.paused:
            self.images += images

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """Calls made inside repeat earlier ones, and do not count."""
        self.paused = True
        try:
            yield
        finally:
            self.paused = False


class _Shelf:
    """Keeps states side by side in a few large buffers.

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
            self._buffer, self._used = state.new_empty(SHELF, *state.shape), 0
        # .data: a version counter of its own, or the next state would seem to overwrite this one.
        kept = self._buffer[self._used].data
        self._used += 1
        return kept.copy_(state)


class State(NamedTuple):
    """Where a reverse step ended, and where the forward process was at the same noise level."""

    level: int
    """The integer noise level; 0 is the clean image. Where levels aren't integers, steps left."""
    forward: Tensor
    """``(b, c, h, w)`` in diffusion space."""
    reverse: Tensor
    """``(b, c, h, w)`` in diffusion space: what the step returned."""


SHELF = 8
"""States in one buffer."""

_shelf: ContextVar[_Shelf | None] = ContextVar("shelf of the running defense", default=None)
_counter: ContextVar[CallCounter | None] = ContextVar(
    "counter of the running defense", default=None
)
_states: ContextVar[list[State] | None] = ContextVar("record of the running defense", default=None)


@contextmanager
def checkpointing(by_step: bool, counter: CallCounter) -> Iterator[None]:
    """Run the steps of :func:`step` under this policy, counting calls in `counter`."""
    tokens = _shelf.set(_Shelf() if by_step else None), _counter.set(counter)
    try:
        yield
    finally:
        _shelf.reset(tokens[0])
        _counter.reset(tokens[1])


@contextmanager
def recording() -> Iterator[list[State]]:
    """The states of the reverse steps that run inside, in order, with their graphs.

    Only steps that say their level are among them. What is computed stays the same.
    """
    states: list[State] = []
    token = _states.set(states)
    try:
        yield states
    finally:
        _states.reset(token)


def step(
    function: Callable[..., Tensor],
    state: Tensor,
    *others: Tensor,
    level: int | None = None,
    forward: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """``function(state, *others)``, of which the policy `step` keeps only the arguments.

    `function` must draw its noise from a tape inside: the recomputation then replays it.

    Args:
        function: One step of a sampler.
        state: What the step changes.
        others: Tensors from outside the step through which a gradient may flow.
        level: The noise level of what the step returns; None where it has none.
        forward: The forward process that is undone, by level: its state like `state`. Called only
            while :func:`recording`.

    Raises:
        ValueError: `function` captured a tensor that carries a gradient, which would be lost; or
            one of `level` and `forward` is given without the other.
    """
    if (level is None) != (forward is None):
        raise ValueError("memory.step: level and forward go together; give both or neither.")
    out = _step(function, state, *others)
    states = _states.get()
    if states is None or level is None or forward is None:
        return out
    states.append(State(level, forward(level), out))
    # An alias: its gradient adds up what comes through later steps before that of the record is
    # added, whatever the policy, so that policies round alike.
    return out.view_as(out)


def _step(function: Callable[..., Tensor], state: Tensor, *others: Tensor) -> Tensor:
    shelf, counter = _shelf.get(), _counter.get()
    inputs = (state, *others)
    if shelf is None or not (torch.is_grad_enabled() and any(t.requires_grad for t in inputs)):
        return function(*inputs)
    for name, value in _captured(function):
        if isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(f"pass {name!r} to memory.step: it carries a gradient.")
    out: Tensor = _Checkpointed.apply(function, shelf, counter, *inputs)  # type: ignore[no-untyped-call]
    return out


class _Checkpointed(torch.autograd.Function):
    """A step without a graph, which is run again, with one, in the backward pass.

    torch's own checkpoint builds the graph in the forward pass too; its nodes, small and
    long-lived among the large temporaries, tear the heap to pieces.
    """

    @staticmethod
    def forward(
        ctx: Any,
        function: Callable[..., Tensor],
        shelf: _Shelf,
        counter: CallCounter | None,
        state: Tensor,
        *others: Tensor,
    ) -> Tensor:
        ctx.function, ctx.counter = function, counter
        ctx.save_for_backward(shelf.keep(state), *others)
        return function(state, *others)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[3:]
        inputs = [
            tensor.detach().requires_grad_(want)
            for tensor, want in zip(ctx.saved_tensors, wanted, strict=True)
        ]
        with torch.enable_grad(), ctx.counter.recomputing() if ctx.counter else nullcontext():
            out = ctx.function(*inputs)
        found = iter(
            torch.autograd.grad(
                out, [t for t in inputs if t.requires_grad], gradient, materialize_grads=True
            )
        )
        return (None, None, None, *(next(found) if want else None for want in wanted))


def _captured(function: Callable[..., Tensor]) -> Iterator[tuple[str, object]]:
    """Names and values that a function holds beside its arguments."""
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    if code is not None and cells is not None:
        yield from zip(code.co_freevars, (cell.cell_contents for cell in cells), strict=True)


class _Enough(Exception):
    """More is kept than was asked about."""


def activation_bytes(function: Callable[[], Tensor], limit: int | None = None) -> int:
    """Bytes that autograd keeps for the backward pass of ``function()``.

    Of one that keeps more than `limit`, some number above: it is left when it gets there, for all
    of a large network's steps fit in no memory.
    """
    seen: dict[int, int] = {}
    total = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if not isinstance(tensor if tensor._base is None else tensor._base, torch.nn.Parameter):
            total += storage.nbytes() - seen.get(storage.data_ptr(), 0)
            seen[storage.data_ptr()] = storage.nbytes()
        if limit is not None and total > limit:
            raise _Enough
        return tensor

    unrecorded = _states.set(None)
    out = None
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = function()
    except _Enough:
        pass
    finally:
        _states.reset(unrecorded)
    del out
    return total


def free_bytes(device: torch.device) -> int:
    """Memory that can still be allocated on `device`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 4 << 30


def is_exhausted(error: BaseException) -> bool:
    """Whether `error` is an allocation that failed, on a GPU or on the processor."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # Of the processor, torch has no class.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
