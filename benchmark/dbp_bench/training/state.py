"""All that an update of a training run changes, and the settings that it is started from."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler


@dataclass(frozen=True, slots=True)
class Settings:
    """Of the optimiser and the batches."""

    iterations: int
    """Number of updates."""
    batch_size: int
    """Images per update, drawn with replacement; of all processes together."""
    learning_rate: float
    weight_decay: float
    betas: tuple[float, float]
    """Of AdamW."""
    average: float
    """Limit of the decay of the weights' moving average; 0 for no average."""
    anneal: bool
    """The learning rate falls to 0 along a cosine; else it is constant."""
    ramp: int = 0
    """Updates over which a learning rate that isn't annealed first rises."""
    momentum: float = 0.0
    """Above 0: stochastic gradient descent with Nesterov's momentum in place of AdamW."""
    flip: bool = False
    """Mirror every other image."""
    crop: int = 0
    """Shift images by up to so many pixels, mirrored at the border."""


class WeightAverage:
    """Exponential moving average of a network's weights, with the warm-up of diffusers' EMA.

    After n updates the decay is ``min(limit, 1 - (1 + n) ** -0.75)``. Counts are copied.
    """

    def __init__(self, network: nn.Module, limit: float) -> None:
        self.limit = limit
        self.updates = 0
        self.values = {k: v.detach().clone() for k, v in network.state_dict().items()}

    def update(self, network: nn.Module) -> None:
        """Move the average towards the network's weights."""
        self.updates += 1
        decay = min(self.limit, 1 - (1 + self.updates) ** -0.75)
        for name, value in network.state_dict().items():
            if value.is_floating_point():
                self.values[name].lerp_(value, 1 - decay)
            else:
                self.values[name].copy_(value)


@dataclass(frozen=True, slots=True)
class State:
    """All that an update changes."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler | None
    average: WeightAverage

    @classmethod
    def start(cls, network: nn.Module, settings: Settings) -> "State":
        """Before the first update."""
        optimizer: torch.optim.Optimizer
        if settings.momentum:
            optimizer = torch.optim.SGD(
                network.parameters(),
                lr=settings.learning_rate,
                momentum=settings.momentum,
                weight_decay=settings.weight_decay,
                nesterov=True,
            )
        else:
            optimizer = torch.optim.AdamW(
                network.parameters(),
                lr=settings.learning_rate,
                weight_decay=settings.weight_decay,
                betas=settings.betas,
            )
        return cls(
            network,
            optimizer,
            _scheduler(optimizer, settings),
            WeightAverage(network, settings.average),
        )


def _scheduler(optimizer: torch.optim.Optimizer, settings: Settings) -> LRScheduler | None:
    if settings.anneal:
        return CosineAnnealingLR(optimizer, settings.iterations)
    if settings.ramp:
        return LambdaLR(optimizer, lambda done: min(1.0, (done + 1) / settings.ramp))
    return None
