"""The network of a checkpoint: with its weights from the cache, or without them."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from dbp_bench.weights import catalog, files, store
from dbp_bench.weights.convert import network_of


def build(name: str) -> nn.Module:
    """The network of the checkpoint `name`, with the weights that are in the cache.

    Raises:
        BadExtra: The package that loads it is missing.
        BadWeights: It isn't in the cache, or is damaged there.
        UnknownName: There is no such checkpoint.
    """
    entry = catalog.find(name)
    if isinstance(entry.source, catalog.Zoo):
        from dbp_bench.weights import zoo

        return zoo.build(name)
    path = store.verified(name)
    with _NoInitialisation():
        network = network_of(entry)
    files.fill(network, files.load(path), path)
    return network


def blank(name: str) -> nn.Module:
    """The network of the checkpoint `name` with all weights 0: enough to count, time and measure.

    Raises:
        BadExtra: The package that has the network is missing.
        UnknownName: There is no such checkpoint.
    """
    entry = catalog.find(name)
    if isinstance(entry.source, catalog.Zoo):
        from dbp_bench.weights import zoo

        return zoo.blank(name)
    # Drawing initial weights takes longer than all that is asked of them.
    with torch.device("meta"):
        network = network_of(entry)
    network = network.to_empty(device="cpu")
    with torch.no_grad():
        for weight in network.parameters():
            weight.fill_(0)
        for value in network.buffers():
            value.fill_(1)
    return network


class _NoInitialisation(TorchFunctionMode):
    """While it lasts, layers don't draw the weights that a file replaces: it takes seconds."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Leave the tensor as it is where `func` initialises it."""
        given = dict(kwargs or {})
        if getattr(func, "__module__", None) == nn.init.__name__:
            return given["tensor"] if "tensor" in given else args[0]
        return func(*args, **given)
