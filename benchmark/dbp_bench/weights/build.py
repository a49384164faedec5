"""The network of a checkpoint: with its weights from the cache, or without them."""

import torch
from torch import nn

from dbp_bench.errors import BadWeights
from dbp_bench.weights import catalog, files, store
from dbp_bench.weights.convert import network_of


def build(name: str) -> nn.Module:
    """The network of the checkpoint `name`, with the weights that are in the cache.

    Raises:
        BadExtra: The package that loads it is missing.
        BadWeights: It isn't in the cache, or is damaged there, or its package loads others now.
        UnknownName: There is no such checkpoint.
    """
    entry = catalog.find(name)
    if isinstance(entry.source, catalog.Zoo):
        from dbp_bench.weights import zoo

        recorded = store.read(name).sha256
        network = zoo.load(entry.source)
        actual = zoo.digest(network)
        if actual != recorded:
            raise BadWeights(
                f"{name}: sha256 of its weights is {actual[:16]}..., recorded is "
                f"{recorded[:16]}...: the package loads others now. {store.how_to_get(name)}."
            )
        return network
    path = store.verified(name)
    # Drawing initial weights, which the file replaces, takes seconds.
    with torch.device("meta"):
        network = network_of(entry)
    tensors = files.load(path)
    files.check_fit(network, tensors, path)
    wanted = network.state_dict()
    held = {key: value.to(wanted[key].dtype, copy=True) for key, value in tensors.items()}
    network.load_state_dict(held, assign=True)
    return network


def blank(name: str) -> nn.Module:
    """The network of the checkpoint `name` with all weights 0: enough to count, time and measure.

    That of another package has the weights that it is initialised with.

    Raises:
        BadExtra: The package that has the network is missing.
        UnknownName: There is no such checkpoint.
    """
    entry = catalog.find(name)
    if isinstance(entry.source, catalog.Zoo):
        from dbp_bench.weights import zoo

        return zoo.load(entry.source, pretrained=False)
    with torch.device("meta"):
        network = network_of(entry)
    network = network.to_empty(device="cpu")
    with torch.no_grad():
        for weight in network.parameters():
            weight.fill_(0)
        for value in network.buffers():
            value.fill_(1)
    return network
