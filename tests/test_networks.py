"""What every network keeps: gradients, determinism, sizes; shared pieces."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradgradcheck

from dbp_bench.errors import BadEntry
from dbp_bench.networks.adm import ADM
from dbp_bench.networks.ho import HoUNet
from dbp_bench.networks.parts import attend, sinusoids
from dbp_bench.networks.songunet import DDPMpp, EDMPrecond, SongUNet
from dbp_bench.networks.wrn import CIFAR10, WideResNet
from dbp_bench.noise import seeded
from layouts import filled
from toys import normal, uniform


def song(dropout: float) -> SongUNet:
    return SongUNet(16, 8, (1, 2), 1, (8,), dropout, augmentations=9)


def guided(dropout: float, residual: bool) -> ADM:
    return ADM(32, (1, 2), 1, (2,), 16, residual_resampling=residual, dropout=dropout)


DENOISERS: dict[str, Callable[[float], nn.Module]] = {
    "ho": lambda dropout: HoUNet(8, (1, 2), 1, (1,), 4, dropout),
    "ddpmpp": lambda dropout: DDPMpp(song(dropout)),
    "edm": lambda dropout: EDMPrecond(song(dropout)),
    "adm": lambda dropout: guided(dropout, True),
    "iddpm": lambda dropout: guided(dropout, False),
}
CLASSIFIERS: dict[str, Callable[[float], nn.Module]] = {
    "robustbench": lambda dropout: WideResNet(10, 1, dropout=dropout),
    "meliketoy": lambda dropout: WideResNet(
        10, 1, layout="meliketoy", normalise=CIFAR10, dropout=dropout
    ),
}
every = pytest.mark.parametrize("name", [*DENOISERS, *CLASSIFIERS])
denoiser = pytest.mark.parametrize("name", DENOISERS)

X = uniform(3, 3, 8, 8, seed=2)
LEVELS = torch.tensor([0.5, 3.0, 40.0])


def build(name: str, dropout: float = 0.0) -> nn.Module:
    return filled((DENOISERS | CLASSIFIERS)[name](dropout))


def call(name: str, network: nn.Module, x: Tensor, rows: slice = slice(None)) -> Tensor:
    levels = [LEVELS[rows].to(x.dtype)] if name in DENOISERS else []
    return network(x, *levels)  # type: ignore[no-any-return]


@every
def test_gradients_reach_every_pixel_and_weight(name: str) -> None:
    network, x = build(name), X.clone().requires_grad_()
    torch.autograd.backward(call(name, network, x).square().sum())
    assert x.grad is not None
    assert bool((x.grad != 0).all())
    without = {n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == ({"model.map_augment.weight"} if name in ("ddpmpp", "edm") else set())


@every
def test_the_gradient_is_that_of_finite_differences(name: str) -> None:
    network = build(name).double()
    x = X.double().requires_grad_()
    out = call(name, network, x)
    weights = normal(*out.shape, seed=3, dtype=torch.float64)
    direction = normal(*x.shape, seed=4, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((out * weights).sum(), x)
    h = 1e-6
    with torch.no_grad():
        up, down = (call(name, network, x + s * h * direction) for s in (1, -1))
        measured = ((up - down) * weights).sum() / (2 * h)
    torch.testing.assert_close((gradient * direction).sum(), measured, rtol=1e-6, atol=1e-7)


@every
def test_dropout_is_for_training_alone(name: str) -> None:
    network, plain = build(name, 0.5), build(name)
    with torch.no_grad():
        assert torch.equal(call(name, network, X), call(name, network, X))
        assert torch.equal(call(name, network, X), call(name, plain, X))
        with seeded(0):
            assert not torch.equal(call(name, network.train(), X), call(name, network, X))


@every
def test_single_precision_agrees_with_double(name: str) -> None:
    network = build(name)
    with torch.no_grad():
        single = call(name, network, X)
        double = call(name, network.double(), X.double())
    assert single.dtype == torch.float32
    assert double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-4)


@every
def test_neither_memory_format_nor_batch_counts(name: str) -> None:
    network = build(name)
    with torch.no_grad():
        out = call(name, network, X)
        last = call(name, network, X.to(memory_format=torch.channels_last))
        alone = torch.cat(
            [call(name, network, X[i : i + 1], slice(i, i + 1)) for i in range(len(X))]
        )
    torch.testing.assert_close(last, out, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(alone, out, rtol=1e-4, atol=1e-4)


@denoiser
def test_the_level_counts(name: str) -> None:
    network = build(name)
    with torch.no_grad():
        one, other = (network(X, torch.full((3,), t)) for t in (3.0, 4.0))
    assert (one - other).abs().max() > 1e-3


@denoiser
def test_other_sizes_are_taken_or_refused_in_one_line(name: str) -> None:
    network = build(name)
    assert network(uniform(3, 3, 12, 6), LEVELS).shape[2:] == (12, 6)
    for size in ((7, 8), (8, 7), (0, 8)):
        with pytest.raises(BadEntry, match=rf"multiples of 2, not {size[0]} x {size[1]}\. Res"):
            network(torch.zeros(3, 3, *size), LEVELS)


def test_sinusoids() -> None:
    t = torch.tensor([2.0], dtype=torch.float64)
    ends = sinusoids(t, 4)[0]
    torch.testing.assert_close(
        ends.tolist(), [math.sin(2), math.sin(2e-4), math.cos(2), math.cos(2e-4)]
    )
    above = sinusoids(t, 4, endpoint=False)[0]
    torch.testing.assert_close(
        above.tolist(), [math.sin(2), math.sin(2e-2), math.cos(2), math.cos(2e-2)]
    )


def test_attention_looks_up_what_is_like_the_query() -> None:
    """Two places with opposite keys: softmax of +-1 / sqrt(2), by hand."""
    query = torch.tensor([[[1.0, -1.0], [0.0, 0.0]]], dtype=torch.float64)
    value = torch.tensor([[[10.0, 20.0], [1.0, 2.0]]], dtype=torch.float64)
    share = 1 / (1 + math.exp(-2 / 2**0.5))
    first = [10 * share + 20 * (1 - share), 1 * share + 2 * (1 - share)]
    second = [10 * (1 - share) + 20 * share, 1 * (1 - share) + 2 * share]
    expected = torch.tensor([first, second], dtype=torch.float64).T[None]
    torch.testing.assert_close(attend(query, query, value), expected)


def test_attention_has_a_second_derivative() -> None:
    q, k, v = (normal(1, 2, 3, seed=i, dtype=torch.float64).requires_grad_() for i in range(3))
    assert gradgradcheck(attend, (q, k, v))
