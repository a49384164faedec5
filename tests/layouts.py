"""Published layouts of weights: every name and shape, and weights drawn for them."""

from ast import literal_eval
from collections.abc import Callable, Mapping
from functools import cache
from math import prod
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from toys import normal, uniform

KEYS = Path(__file__).parent / "data" / "keys"
Shapes = dict[str, tuple[int, ...]]
N = TypeVar("N", bound=nn.Module)


def published(layout: str) -> Shapes:
    """The shape of every tensor of a published file, in its order."""
    lines = (KEYS / f"{layout}.txt").read_text().splitlines()
    return {name: literal_eval(shape) for name, shape in (line.split(" ", 1) for line in lines)}


def shapes(weights: Mapping[str, Tensor]) -> Shapes:
    """The shape of every tensor."""
    return {name: tuple(value.shape) for name, value in weights.items()}


def hollow(wanted: Mapping[str, tuple[int, ...]], value: float = 0.0) -> dict[str, Tensor]:
    """Tensors of these shapes that take no memory, all of one value."""
    return {name: torch.tensor(value).expand(shape) for name, shape in wanted.items()}


def drawn(
    wanted: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Weights of these shapes, which depend on the sorted names alone.

    Large enough that attention prefers some places to others.
    """
    weights = {}
    for seed, name in enumerate(sorted(wanted)):
        shape = wanted[name]
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(0)
            continue
        value = _numbers(prod(shape), seed, dtype).view(shape)
        if name.endswith("running_var"):
            value = 1 + value**2
        elif len(shape) > 1:
            value = value * (1.3 / (prod(shape[1:])) ** 0.5)
        else:
            value = 0.3 * value + (1 if name.endswith("weight") else 0)
        weights[name] = value
    return weights


@cache
def _numbers(count: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Standard normal numbers ``(1, count)``, drawn once."""
    return normal(1, count, seed=seed, dtype=dtype)


def filled(network: N) -> N:
    """`network` with drawn weights, as a defense has it."""
    network.load_state_dict(drawn(shapes(network.state_dict())))
    return network.eval()


def on_meta(build: Callable[[], N]) -> N:
    """What `build` builds, without its numbers."""
    with torch.device("meta"):
        return build()


def parameters(network: nn.Module) -> int:
    """How many numbers are learned."""
    return sum(value.numel() for value in network.parameters())


Z = 2 * uniform(2, 3, 16, 16, seed=5) - 1
T = torch.tensor([7.0, 430.0])


def assert_published(out: Tensor, expected: list[float]) -> None:
    """Four numbers of `out`, spread over it, are those that the published code computed.

    It did in single precision; here double is used, which is the same on every machine.
    """
    assert out.dtype == torch.float64
    found = out.detach().flatten()[:: out.numel() // 4]
    torch.testing.assert_close(found.tolist(), expected, atol=1e-5, rtol=0)
