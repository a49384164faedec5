"""What the recipes share: minibatches, and the training loop."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import isfinite
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dbp_bench.errors import AttackFailed
from dbp_bench.noise import Site, Tape
from dbp_bench.training import dropout
from dbp_bench.training.checkpoint import Checkpoint
from dbp_bench.training.distributed import Group
from dbp_bench.training.state import Settings, State

_IMAGE, _LEVEL, _FLIP = Site("image"), Site("level"), Site("flip")
_ROW, _COLUMN = Site("row"), Site("column")

Precision = Literal["fp32", "bf16"]
"""`bf16`: the networks' matrix products in bfloat16; weights, losses and averages in float32."""

Report = Callable[[int, float, float], None]
"""Called after each update with its number, its loss and its learning rate."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Images with labels, drawn with replacement, and the tape that belongs to this iteration."""

    images: Tensor
    labels: Tensor
    tape: Tape

    def levels(self, count: int) -> Tensor:
        """0-based diffusion steps ``(b,)``, uniform in 0 ... count - 1."""
        return (self.uniform(_LEVEL) * count).floor()

    def uniform(self, site: Site) -> Tensor:
        """One number in (0, 1) for each image ``(b,)``."""
        return self.tape.uniform(site, 0, self._one())[:, 0]

    def normal(self, site: Site) -> Tensor:
        """One standard normal number for each image ``(b,)``."""
        return self.tape.normal(site, 0, self._one())[:, 0]

    def _one(self) -> Tensor:
        return self.images.new_empty(len(self.images), 1)


def train(
    network: nn.Module,
    loss: Callable[[Batch], Tensor],
    images: Tensor,
    labels: Tensor,
    settings: Settings,
    *,
    seed: int,
    owner: str,
    report: Report,
    group: Group = Group(),  # noqa: B008
    checkpoint: Checkpoint | None = None,
    precision: Precision = "fp32",
) -> dict[str, Tensor]:
    """The averaged weights after `settings.iterations` updates; gradients are clipped to norm 1.

    Every random number is of a tape that knows the update and the row of the joint batch. So a run
    that was interrupted continues as if it hadn't been, and several processes do what one does, up
    to the rounding of their sums.

    Args:
        network: Trained in place.
        loss: Mean loss of a batch, from `network`.
        images: ``(n, c, h, w)`` in [0, 1], or uint8 in 0 ... 255.
        labels: ``(n,)``.
        settings: Of the optimiser and the batches.
        seed: With `owner`, decides every batch and every noise.
        owner: Name of the recipe.
        report: See :data:`Report`.
        group: The processes that train together.
        checkpoint: Where the state is kept, and what it continues from; None to keep none.
        precision: See :data:`Precision`.

    Raises:
        AttackFailed: The loss or a gradient became NaN or infinite; no weight has seen it.
        BadRequest: The checkpoint is of another request.
        BadWeights: The checkpoint is damaged.
    """
    dropout.install(network)
    state = State.start(network, settings)
    done = checkpoint.restore(state) if checkpoint else 0
    group.agree(done, images.device)
    rows = group.rows(settings.batch_size)
    kept = done
    for iteration in range(done, settings.iterations):
        tape = Tape.make(seed, owner, rows, iteration)
        dropout.begin(network, tape)
        with _arithmetic(precision, images.device):
            value = loss(_draw(images, labels, tape, settings))
        state.optimizer.zero_grad()
        joint = float(group.backward(network, value, settings.batch_size))
        norm = float(nn.utils.clip_grad_norm_(network.parameters(), 1.0))
        update = iteration + 1
        if not (isfinite(joint) and isfinite(norm)):
            _stop(owner, update, joint, kept, checkpoint)
        rate = float(state.optimizer.param_groups[0]["lr"])
        state.optimizer.step()
        if state.scheduler:
            state.scheduler.step()
        state.average.update(network)
        if checkpoint and update % checkpoint.every == 0:
            checkpoint.save(update, state)
            kept = update
        report(update, joint, rate)
    return state.average.values


def _draw(images: Tensor, labels: Tensor, tape: Tape, settings: Settings) -> Batch:
    """The tape's rows of a batch, as the settings have them changed."""
    rows = torch.empty(len(tape.ids), 1)
    index = (tape.uniform(_IMAGE, 0, rows)[:, 0] * len(images)).long().to(images.device)
    chosen = images[index]
    if chosen.dtype == torch.uint8:
        chosen = chosen.float() / 255
    if settings.crop:
        chosen = _shifted(chosen, tape, settings.crop)
    if settings.flip:
        mirrored = tape.uniform(_FLIP, 0, rows).to(chosen.device).view(-1, 1, 1, 1) < 0.5
        chosen = torch.where(mirrored, chosen.flip(3), chosen)
    return Batch(chosen, labels[index], tape)


def _shifted(images: Tensor, tape: Tape, most: int) -> Tensor:
    """Images ``(b, c, h, w)``, each moved by up to `most` pixels along both axes."""
    count, _, height, width = images.shape
    like = torch.empty(count, 1)
    start = [
        (tape.uniform(site, 0, like) * (2 * most + 1)).long().to(images.device)
        for site in (_ROW, _COLUMN)
    ]
    y = start[0] + torch.arange(height, device=images.device)
    x = start[1] + torch.arange(width, device=images.device)
    padded = F.pad(images, (most,) * 4, mode="reflect").permute(0, 2, 3, 1)
    image = torch.arange(count, device=images.device).view(-1, 1, 1)
    return padded[image, y[:, :, None], x[:, None]].permute(0, 3, 1, 2).contiguous()


def _arithmetic(precision: Precision, device: torch.device) -> AbstractContextManager[None]:
    if precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def _stop(owner: str, update: int, loss: float, kept: int, checkpoint: Checkpoint | None) -> None:
    what = "the loss" if not isfinite(loss) else "a gradient"
    where = (
        f"The state after update {kept} is in {checkpoint.path}. " if checkpoint and kept else ""
    )
    raise AttackFailed(
        f"{what} of {owner} became NaN or infinite at update {update}; no weight has seen it. "
        f"{where}A lower --learning-rate may do."
    )
