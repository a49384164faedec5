"""Everything that `dbp-bench bench` measures, and how it was measured."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dbp_bench.bench import digits, effects, network
from dbp_bench.bench.arithmetic import arithmetic
from dbp_bench.bench.network import Say, Setting
from dbp_bench.data.places import VARIABLE
from dbp_bench.errors import BadRequest, did_you_mean
from dbp_bench.runs.provenance import device_name

SUBJECTS = ("digits", "cifar10")

PROTOCOL = (
    "times: contenders in turn, round by round, after calls that warm up, the device synchronised",
    "ratios: within a round; of times and ratios, medians",
    "peak: the best of products of square matrices of normal numbers in the same precision",
    "share of it: operations that torch counts, repeated ones too, over the time",
    "memory: the most that tensors take on a GPU, weights included",
    "fp32: as every attack is run, without tf32 in products or convolutions",
    "bf16: autocast of the networks on float32 weights; sampler, noise and loss in float32",
    "gradients and outcomes: against fp32, not compiled, at the same draws",
)


def subjects(names: str | None, device: str) -> list[str]:
    """What is asked for by `names`, separated by commas; None for what the device has time for.

    Raises:
        BadRequest: A name is none of :data:`SUBJECTS`.
    """
    if names is None:
        return [SUBJECTS[0]] if device == "cpu" else list(SUBJECTS)
    asked = [name.strip() for name in names.split(",")]
    for name in asked:
        if name not in SUBJECTS:
            raise BadRequest(f"--network {name!r}: not one.{did_you_mean(name, SUBJECTS)}")
    return asked


def measure(
    subjects: Sequence[str],
    device: str,
    setting: Setting,
    data: Path | None = None,
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """What is asked for, as JSON values; what precisions change on the digits in any case.

    Args:
        subjects: What is timed.
        device: ``cpu`` or ``cuda``.
        setting: How to measure; of the digits, the number of rounds alone.
        data: Where images of data sets are: what precisions change is also measured on those that
            the trial's weights are of.
        say: Told a line for each part that is done.

    Raises:
        BadData: There are no such images at `data`.
        BadRequest: A number is out of range.
    """
    setting.check()
    found: dict[str, Any] = {
        "device": device_name(device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "protocol": list(PROTOCOL),
    }
    tracks = [effects.DIGITS]
    if data is not None or os.environ.get(VARIABLE):
        tracks.append(effects.TRIAL)
    found["precision"] = []
    for track in tracks:
        found["precision"].append(effects.measure(track, device, data))
        say(f"{track}: gradients and outcomes by precision")
    if "digits" in subjects:
        with arithmetic("fp32"):
            found["digits"] = digits.measure(device, setting.repeats)
        say("digits: ratios")
    if "cifar10" in subjects:
        found["cifar10"] = network.measure(network.published(), device, setting, say)
    return found
