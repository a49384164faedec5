"""Time and memory of contenders that are run in turn, so that a drift of the machine cancels."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Row = dict[str, Any]
"""One line of a table of measurements: a value by the name of its column, None where none is."""


def in_turn(
    contenders: Mapping[str, Callable[[], object]], device: str, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each contender in each round."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            times[name].append(seconds(contender, device))
    return times


def seconds(function: Callable[[], object], device: str) -> float:
    """Seconds of one call; the device is idle before it and has finished after it."""
    _settle(device)
    start = time.perf_counter()
    function()
    _settle(device)
    return time.perf_counter() - start


def ratio(times: Sequence[float], others: Sequence[float]) -> Row:
    """Median, lowest and highest ratio of `times` to `others`, round by round."""
    values = [mine / other for mine, other in zip(times, others, strict=True)]
    return {"ratio": statistics.median(values), "lowest": min(values), "highest": max(values)}


def peak_bytes(function: Callable[[], object], device: str) -> int | None:
    """The most that tensors take on the device during one call; None on a CPU, which can't say."""
    if device == "cpu":
        return None
    release(device)
    torch.cuda.reset_peak_memory_stats()
    function()
    _settle(device)
    return torch.cuda.max_memory_allocated()


def release(device: str) -> None:
    """Give back the memory that no tensor needs any more."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _settle(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
