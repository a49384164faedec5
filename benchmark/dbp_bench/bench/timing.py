"""Time and memory of contenders that are run in turn, so that a drift of the machine cancels."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch


def in_turn(
    contenders: Mapping[str, Callable[[], object]], device: str, repeats: int
) -> dict[str, list[float]]:
    """Seconds of each contender in each round."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, contender in contenders.items():
            times[name].append(seconds(contender, device))
    return times


def seconds(function: Callable[[], object], device: str) -> float:
    """Of one call; the device has nothing to do before it, and has done all of it after."""
    _settle(device)
    start = time.perf_counter()
    function()
    _settle(device)
    return time.perf_counter() - start


def ratio(times: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """Of `times` to `others`, round by round."""
    values = [mine / other for mine, other in zip(times, others, strict=True)]
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def peak_bytes(function: Callable[[], object], device: str) -> int | None:
    """The most that tensors take on the device during one call; None on a CPU, which can't say."""
    if device == "cpu":
        function()
        return None
    release(device)
    torch.cuda.reset_peak_memory_stats()
    function()
    _settle(device)
    return torch.cuda.max_memory_allocated()


def release(device: str) -> None:
    """Give back what no tensor needs any more."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _settle(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
