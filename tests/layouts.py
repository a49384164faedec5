"""Published layouts of weights: every name and shape, and weights drawn for them."""

import os
from ast import literal_eval
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import yaml
from torch import Tensor, nn

from dbp_bench.networks import adm, ho, songunet, wrn
from dbp_bench.weights import catalog
from toys import normal, uniform


def of_version_20(archive: bytes) -> bytes:
    """A zip file whose last file needs a version of the format that zipfile doesn't know."""
    head, mark, listed = archive.rpartition(b"PK\x01\x02")
    return head + mark + listed[:2] + (200).to_bytes(2, "little") + listed[4:]


class Malicious:
    """Makes the folder `trace` when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.trace),))


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


NARROW = 16
"""By how much the published widths are divided, ADM's by half of it, improved DDPM's by a quarter;
names and depths stay."""


def narrow_shapes(wanted: Mapping[str, tuple[int, ...]], by: int = NARROW) -> Shapes:
    """These shapes with the channels of a network that is `by` times narrower."""
    return {name: tuple(n // by if n >= 64 else n for n in shape) for name, shape in wanted.items()}


def narrow_networks(patch: pytest.MonkeyPatch) -> None:
    """The factories of the catalog build networks of the same depth, much narrower."""
    song, wide = songunet.SongUNet, wrn.WideResNet

    def of_robustbench(depth: int, width: int, classes: int, **options: Any) -> wrn.WideResNet:
        return wide(10, 1, classes, **options)

    patch.setattr(ho, "cifar10", lambda: ho.HoUNet(channels=8, groups=8))
    patch.setattr(
        songunet,
        "ddpmpp_deep_cifar10",
        lambda: songunet.DDPMpp(song(channels=8, multipliers=(1, 2, 2, 2), blocks=8)),
    )
    patch.setattr(
        songunet,
        "edm_cifar10",
        lambda: songunet.EDMPrecond(song(channels=8, dropout=0.13, augmentations=9)),
    )
    patch.setattr(
        songunet,
        "edm_cifar10_conditional",
        lambda: songunet.EDMPrecond(song(channels=8, dropout=0.13, augmentations=9, classes=10)),
    )
    patch.setattr(
        adm,
        "imagenet256",
        lambda: adm.ADM(32, (1, 1, 2, 2, 4, 4), 2, (8, 16, 32), residual_resampling=True),
    )
    patch.setattr(
        adm,
        "iddpm_cifar10",
        lambda: adm.ADM(32, (1, 2, 2, 2), 3, (2, 4), residual_resampling=False, steps=4000),
    )
    patch.setattr(wrn, "wrn_28_10", lambda: wide(10, 1))
    patch.setattr(
        wrn,
        "meliketoy_28_10",
        lambda: wide(10, 1, layout="meliketoy", normalise=wrn.CIFAR10, dropout=0.3),
    )
    patch.setattr(
        wrn,
        "meliketoy_28_10_cifar100",
        lambda: wide(10, 1, 100, layout="meliketoy", normalise=wrn.CIFAR100, dropout=0.3),
    )
    patch.setattr(wrn, "WideResNet", of_robustbench)


@contextmanager
def own_catalog(path: Path, **usual: Any) -> Iterator[Callable[..., None]]:
    """A catalog at `path` of one checkpoint, `tiny`; called, with other values of its entry."""
    entry = {
        "title": "For tests",
        "network": "dbp_bench.networks.ho:small32",
        "layout": "diffusers",
        "source": {"kind": "by-hand", "what": "a file"},
        "licence": {"name": "MIT", "restriction": "none"},
        **usual,
    }

    def write(**values: Any) -> None:
        path.write_text(yaml.safe_dump({"checkpoints": {"tiny": entry | values}}))
        catalog.entries.cache_clear()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalog, "PATH", path)
        write()
        yield write
    catalog.entries.cache_clear()


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
