"""Guards around a module that is probed: they refuse what it must not do, and name errors."""

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn
from unittest.mock import patch

import torch
from torch import Tensor, nn

from dbp_bench.errors import DbpError, NotConforming, place_of
from dbp_bench.noise import Tape
from dbp_bench.taped.mode import Log
from dbp_bench.taped.purifier import Module, freeze, run


def modules_called(module: Module, images: Tensor) -> list[nn.Module]:
    """The torch modules that a call runs, whose weights are frozen; two first calls are compared.

    Raises:
        NotConforming: One normalises by its batch, or the first call draws what no later one does.
    """
    called: dict[nn.Module, None] = {}

    def note(one: nn.Module, _: Any) -> None:
        called.setdefault(one)

    handle = nn.modules.module.register_module_forward_pre_hook(note)
    logs: list[Log] = []
    try:
        for _ in range(2):
            with named(), torch.no_grad(), warnings.catch_warnings():
                # A compiled module is noted twice, which doesn't matter.
                warnings.filterwarnings("ignore", "Using `torch.compile")
                run(
                    module,
                    images,
                    Tape.make(0, "probe", range(len(images))),
                    None,
                    alone=False,
                    logs=logs,
                )
    finally:
        handle.remove()
    for one in called:
        freeze(one)
        if isinstance(one, nn.modules.batchnorm._BatchNorm) and one.training:
            raise NotConforming(
                f"{type(one).__name__} in training mode mixes the images of a batch and keeps "
                "their statistics: call .eval(), and then .train() on dropout layers alone, where "
                "these are the defense."
            )
    first, later = (dict.fromkeys(met.where for met in log.met) for log in logs)
    only = [where for where in first if where not in later]
    if only:
        raise NotConforming(
            f"{only[0]} draws in the first call and not in later ones: it imports something that "
            "draws, or keeps what it made at random. Call it once before the probe, after "
            "torch.manual_seed, or keep nothing."
        )
    return list(called)


@contextmanager
def no_processes() -> Iterator[None]:
    """Inside, processes can't be started: what they draw can't be seen."""

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise NotConforming(
            "the module starts a process, whose draws can't be seen: run it in this process "
            "(num_workers=0)."
        )

    with patch.object(os, "fork", refuse, create=True), patch.object(BaseProcess, "start", refuse):
        yield


_DEVICE = re.compile(r"cuda|device|NVIDIA", re.IGNORECASE)
_DTYPE = re.compile(r"dtype|scalar type|bias type|Half|BFloat16|Float but found", re.IGNORECASE)


@contextmanager
def named() -> Iterator[None]:
    """Whatever the module raises is said on one line, with its place."""
    try:
        yield
    except DbpError:
        raise
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")
        at = f" ({place})" if (place := place_of(error)) else ""
        hint = ""
        if _DTYPE.search(first):
            hint = " Take the type of the images (images.dtype) in place of a fixed one."
        elif _DEVICE.search(first):
            hint = " Take the device of the images (images.device) in place of a fixed one."
        raise NotConforming(
            f"the module stopped with {type(error).__name__}: {first}{at}.{hint}"
        ) from error
