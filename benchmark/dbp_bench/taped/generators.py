"""The generators of the process: their states, and how they are put into one and restored."""

import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from types import FrameType
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from dbp_bench.taped.lines import file_of


def device_of(given: Mapping[str, Any]) -> torch.device:
    """The device on which an operation with these arguments draws."""
    device = given.get("device")
    if device is None:
        tensors = (value for value in given.values() if isinstance(value, Tensor))
        device = next((tensor.device for tensor in tensors), "cpu")
    return torch.device(device)


def generator_of(given: Mapping[str, Any]) -> tuple[torch.Generator, bool]:
    """The generator that an operation draws from, and whether it is its device's default."""
    device = device_of(given)
    default = torch.default_generator
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        default = torch.cuda.default_generators[index]
    generator = given.get("generator")
    return (default, True) if generator is None else (generator, generator is default)


def digest(state: Tensor) -> bytes:
    """A short name of a generator's state; on CUDA that is its seed and its offset."""
    return blake2b(state.numpy().tobytes(), digest_size=16).digest()


def just_seeded(generator: torch.Generator, state: Tensor) -> bool:
    """Return whether `state` is the one in which its seed puts it."""
    fresh = torch.Generator(generator.device)
    return torch.equal(state, fresh.manual_seed(generator.initial_seed()).get_state())


def as_elsewhere(draw: Callable[[], Any], generator: torch.Generator, state: Tensor) -> Any:
    """The result of `draw` in another state than `state`; the generator stays where it is."""
    after = generator.get_state()
    generator.manual_seed(int.from_bytes(digest(state)[:7], "little"))
    try:
        return draw()
    finally:
        generator.set_state(after)


@contextmanager
def generators(seed: int, device: torch.device) -> Iterator[Callable[[], set[str]]]:
    """The global generators of the process in a state of `seed` inside, restored after.

    Args:
        seed: In 0 ... 2^32 - 1.
        device: Beside that of the processor, torch's generator of this device is set.

    Yields:
        What tells which generators beside torch's have moved.
    """
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    default, _ = generator_of({"device": device})
    states = {each: each.get_state() for each in (torch.default_generator, default)}
    for each in states:
        each.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    before = _others()
    try:
        yield lambda: {name for name, state in _others().items() if state != before[name]}
    finally:
        for each, state in states.items():
            each.set_state(state)
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002


def moved_at(call: Callable[[], object]) -> dict[str, str]:
    """By generator beside torch's, the first line of the author's code that moves it in `call`."""
    found: dict[str, str] = {}
    before, last = _others(), ""

    def follow(frame: FrameType, _event: str, _: Any) -> Any:
        nonlocal before, last
        now = _others()
        for name, state in now.items():
            if state != before[name] and last:
                found.setdefault(name, last)
        before, last = now, f"{file_of(frame.f_code.co_filename)[1]}:{frame.f_lineno}"
        return follow

    def enter(frame: FrameType, event: str, _: Any) -> Any:
        own = file_of(frame.f_code.co_filename)[0] == "own"
        return follow(frame, event, None) if own else None

    tracing = sys.gettrace()
    sys.settrace(enter)
    try:
        call()
    finally:
        sys.settrace(tracing)
    return found


def entropy_at(call: Callable[[], object]) -> str | None:
    """The first line of the author's code that asks the system for random bytes in `call`."""
    found: list[str] = []
    bytes_of = os.urandom

    def urandom(size: int) -> bytes:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and not found:
            whose, name = file_of(frame.f_code.co_filename)
            found.extend([f"{name}:{frame.f_lineno}"] if whose == "own" else [])
            frame = frame.f_back
        return bytes_of(size)

    # NumPy and the standard library ask through the module `random`.
    with patch.object(os, "urandom", urandom), patch.object(random, "_urandom", urandom):
        call()
    return found[0] if found else None


def _others() -> dict[str, Any]:
    legacy = np.random.get_state(legacy=False)["state"]  # noqa: NPY002
    return {
        "Python's random": random.getstate(),
        "NumPy's global generator": (legacy["key"].tobytes(), legacy["pos"]),
    }
