"""What the recipes share: minibatches, an average of the weights, and the training loop."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dbp_bench.noise import Site, Tape

_IMAGE, _LEVEL = Site("image"), Site("level")


@dataclass(frozen=True, slots=True)
class Batch:
    """Images with labels, drawn with replacement, and the tape that belongs to this iteration."""

    images: Tensor
    labels: Tensor
    tape: Tape

    def levels(self, count: int) -> Tensor:
        """0-based diffusion steps ``(b,)``, uniform in 0 ... count - 1."""
        shape = torch.empty(len(self.images), 1, device=self.images.device)
        return (self.tape.uniform(_LEVEL, 0, shape)[:, 0] * count).floor()


class WeightAverage:
    """Exponential moving average of a network's weights, with the warm-up of diffusers' EMA.

    After n updates the decay is ``min(limit, 1 - (1 + n) ** -0.75)``.
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
            self.values[name].lerp_(value, 1 - decay)


def train(
    network: nn.Module,
    loss: Callable[[Batch], Tensor],
    images: Tensor,
    labels: Tensor,
    *,
    iterations: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    average: float,
    anneal: bool,
    seed: int,
    owner: str,
    report: Callable[[int, float], None],
) -> dict[str, Tensor]:
    """The averaged weights after AdamW on `loss`; gradients are clipped to norm 1.

    Args:
        network: Trained in place.
        loss: Mean loss of a batch.
        images: ``(n, c, h, w)`` in [0, 1].
        labels: ``(n,)``.
        iterations: Number of updates.
        batch_size: Images per update, drawn with replacement.
        learning_rate: Of AdamW; falls to 0 along a cosine where `anneal`, else constant.
        weight_decay: Of AdamW.
        betas: Of AdamW.
        average: Limit of the decay of the weights' moving average.
        anneal: See `learning_rate`.
        seed: With `owner`, decides every batch and every noise.
        owner: Name of the recipe.
        report: Called after each update with its number and its loss.
    """
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=learning_rate, weight_decay=weight_decay, betas=betas
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations) if anneal else None
    ema = WeightAverage(network, average)
    rows = torch.empty(batch_size, 1)
    for iteration in range(iterations):
        tape = Tape.make(seed, owner, range(batch_size), iteration)
        index = (tape.uniform(_IMAGE, 0, rows)[:, 0] * len(images)).long().to(images.device)
        value = loss(Batch(images[index], labels[index], tape))
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        if schedule:
            schedule.step()
        ema.update(network)
        report(iteration + 1, float(value.detach()))
    return ema.values
