"""Gradient checkpointing as a policy: what a purification keeps in memory, never what it computes."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Policy = Literal["auto", "none", "step"]
"""`none` stores every activation; `step` stores the state at each step and recomputes the rest;
`auto` takes `none` where it fits. Results are the same, bit for bit."""

_by_step: ContextVar[bool] = ContextVar("checkpoint by step", default=False)


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


_counter: ContextVar[CallCounter | None] = ContextVar("counter of the running defense", default=None)


@contextmanager
def checkpointing(by_step: bool, counter: CallCounter) -> Iterator[None]:
    """Run the steps of :func:`step` under this policy, counting calls in `counter`."""
    tokens = _by_step.set(by_step), _counter.set(counter)
    try:
        yield
    finally:
        _by_step.reset(tokens[0])
        _counter.reset(tokens[1])


def step(function: Callable[[Tensor], Tensor], state: Tensor) -> Tensor:
    """``function(state)``; under the policy `step`, only `state` is kept for the backward pass.

    `function` must draw its noise from a tape inside: the recomputation then replays it.
    """
    if not (_by_step.get() and torch.is_grad_enabled() and state.requires_grad):
        return function(state)
    counter = _counter.get()

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), counter.recomputing() if counter else nullcontext()

    out = checkpoint(
        function, state, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
    )
    assert isinstance(out, Tensor)
    return out


def activation_bytes(function: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass of ``function()``."""
    seen: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor if tensor._base is None else tensor._base, torch.nn.Parameter):
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = function()
    del out
    return sum(seen.values())


def free_bytes(device: torch.device) -> int:
    """Memory that can still be allocated on `device`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as info:
            fields = dict(line.split(":", 1) for line in info)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 4 << 30
