"""Networks of checkpoints that aren't there: the architecture, with weights that mean nothing."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dbp_bench.extras import load_extra
from dbp_bench.weights import catalog
from dbp_bench.weights.convert import network_of


def blank(name: str) -> nn.Module:
    """The network of the checkpoint `name`, weights all 0: enough to count, time and measure.

    Raises:
        BadExtra: The package that has the network is missing.
        UnknownName: There is no such checkpoint.
    """
    entry = catalog.find(name)
    if isinstance(entry.source, catalog.Zoo):
        return _of_a_zoo(entry.source.model)
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


def _of_a_zoo(model: str) -> nn.Module:
    package, _, name = model.partition(":")
    built: nn.Module
    if package == "timm":
        built = load_extra("timm")["timm"].create_model(name, pretrained=False)
        return built
    modules: Mapping[str, Any] = load_extra("robustbench")
    data, norm, key = name.split("/")
    zoo = modules["model_zoo"].model_dicts
    models = {getattr(d, "value", d): norms for d, norms in zoo.items()}[data]
    built = {getattr(n, "value", n): found for n, found in models.items()}[norm][key]["model"]()
    return built
