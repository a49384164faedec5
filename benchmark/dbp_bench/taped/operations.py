"""The operations of torch that draw, and what each gives when its numbers come from the noise."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from math import log1p, pi
from typing import Any

import torch
from torch import Tensor

Arguments = Mapping[str, Any]
"""The arguments of an operation by name, defaults included."""

Normals = Callable[[tuple[int, ...], torch.dtype], Tensor]
"""Standard normals of a shape and type."""

Law = Callable[[Normals], Tensor]
"""Makes the numbers of an operation out of normals."""

_CELLS = 1 << 23
"""Values of a uniform number, so as many integers at most are told apart."""


@lru_cache(maxsize=4096)
def may_draw(func: Any) -> bool:
    """Return whether torch says that the operation may consume a generator."""
    return torch.Tag.nondeterministic_seeded in func.tags


@lru_cache(maxsize=1024)
def name_of(func: Any) -> str:
    """The operation's name, such as ``randn_like`` or ``normal_``."""
    return str(func.overloadpacket.__name__)


@lru_cache(maxsize=1024)
def _signature(func: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    declared = func._schema.arguments
    defaults = {a.name: a.default_value for a in declared if a.has_default_value()}
    return tuple(a.name for a in declared), defaults


def arguments(func: Any, args: tuple[Any, ...], kwargs: Arguments) -> Arguments:
    """The arguments of a call by name."""
    names, defaults = _signature(func)
    return {**defaults, **dict(zip(names, args, strict=False)), **kwargs}


def draws_nothing(name: str, given: Arguments) -> bool:
    """Return whether a call of an operation that may draw draws nothing (dropout of 0)."""
    if "attention" in name or "sdp" in name:
        return not given.get("dropout_p")
    if "dropout" in name and name != "_cudnn_init_dropout_state":
        return given.get("train") is False or given.get("p") == 0
    if name.startswith(("lstm", "gru", "rnn_", "_cudnn_rnn", "miopen_rnn", "_lstm_mps")):
        return not (given.get("dropout") and given.get("train"))
    return "rrelu" in name and not given.get("training")


def uniform(normals: Tensor) -> Tensor:
    """Uniform numbers ``(...)`` in (0, 1) from pairs of standard normals ``(..., 2)``, in float32.

    The angle of a pair of normals is uniform, whatever made them. It is computed with operations
    that IEEE 754 rounds exactly, so that it is the same on every device, bit for bit.
    """
    x, y = normals.float().unbind(-1)
    turned = y.abs() > x.abs()
    ratio = (torch.where(turned, x, y) / torch.where(turned, y, x)).nan_to_num()  # 0 / 0
    # atan(r) for |r| <= 1: atan(r) = 2 atan(r / (1 + sqrt(1 + r^2))), then its series.
    half = ratio / (1 + (1 + ratio * ratio).sqrt())
    square = half * half
    series = torch.full_like(half, 1 / 17)
    for n in range(15, 0, -2):
        series = 1 / n - square * series
    angle = half * series * (2 / pi)  # in (-1/4, 1/4], in half turns
    angle = torch.where(turned, 0.5 - angle, angle)  # in (-1/4, 3/4): the line's direction
    cells = ((angle + 0.25) * _CELLS).floor().clamp(0, _CELLS - 1)
    return (cells + 0.5) / _CELLS


def law_of(name: str, given: Arguments, like: Tensor) -> Law | None:
    """The maker of an operation's numbers, shaped like `like`; None where none is known.

    Args:
        name: The operation's name.
        given: Its arguments.
        like: What it gave.
    """
    if like.is_complex():
        return None
    shape = tuple(like.shape)
    dtype = like.dtype if like.is_floating_point() else torch.float32

    def normal(normals: Normals) -> Tensor:
        return normals(shape, dtype)

    def even(normals: Normals) -> Tensor:
        return uniform(normals((*shape, 2), torch.float32))

    base = name.rstrip("_").removesuffix("_functional").removesuffix("_like")
    match base:
        case "randn":
            return normal
        case "normal":
            return lambda normals: given["mean"] + given["std"] * normal(normals)
        case "log_normal":
            return lambda normals: (given["mean"] + given["std"] * normal(normals)).exp()
        case "rand":
            return even
        case "uniform":
            low, high = given["from"], given["to"]
            return lambda normals: low + (high - low) * even(normals).to(dtype)
        case "exponential":
            return lambda normals: -even(normals).log() / given["lambd"]
        case "cauchy":
            return lambda normals: (
                given["median"] + given["sigma"] * (pi * (even(normals) - 0.5)).tan()
            )
        case "geometric" if given["p"] < 1:
            return lambda normals: (even(normals).log() / log1p(-given["p"])).ceil()
        case "bernoulli":
            share = given["p"] if given.get("p") is not None else given["self"]
            return lambda normals: even(normals) < share
        case "native_dropout":
            return lambda normals: even(normals) >= given["p"]
        case "randint" | "random":
            low, high = given.get("low", given.get("from")) or 0, given.get("high", given.get("to"))
            if isinstance(high, int) and high - low <= _CELLS:
                return lambda normals: low + (even(normals).double() * (high - low)).floor()
    return None


def write(name: str, given: Arguments, real: Any, made: Tensor) -> None:
    """Put `made` into what the operation gave, which keeps its type, strides and identity."""
    if name == "native_dropout":
        out, kept = real
        kept.copy_(made)
        out.copy_(given["input"] * made / (1 - given["p"]))
    else:
        real.copy_(made)


def tensor_of(name: str, real: Any) -> Tensor | None:
    """The tensor that an operation drew; None where it gives several, or none."""
    if name == "native_dropout":
        real = real[0]
    return real if isinstance(real, Tensor) else None
