"""The training loop that all recipes share."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from math import isfinite
from typing import Literal

import torch
from torch import Tensor, nn

from dbp_bench.errors import AttackFailed
from dbp_bench.noise import Tape
from dbp_bench.training import dropout
from dbp_bench.training.batches import Batch, draw
from dbp_bench.training.distributed import ALONE, Group
from dbp_bench.training.state import Checkpoint, Settings, State

Precision = Literal["fp32", "bf16"]
"""`bf16`: the networks' matrix products in bfloat16; weights, losses and averages in float32."""

Report = Callable[[int, float, float], None]
"""Called after each update with its number, its loss and its learning rate."""


@dataclass(frozen=True, slots=True)
class Options:
    """Options say how a recipe is run; those not in the log's request change rounding at most."""

    seed: int = 0
    device: torch.device = torch.device("cpu")  # noqa: RUF009
    precision: Precision = "fp32"
    compile: bool = False
    channels_last: bool = False
    resume: bool = True
    checkpoint_every: int = 200
    group: Group = ALONE


def train(
    network: nn.Module,
    loss: Callable[[Batch], Tensor],
    images: Tensor,
    labels: Tensor,
    settings: Settings,
    *,
    owner: str,
    options: Options,
    report: Report,
    checkpoint: Checkpoint | None = None,
) -> dict[str, Tensor]:
    """The averaged weights after `settings.iterations` updates; gradients are clipped to norm 1.

    Every random number comes from a tape that knows the update and the row of the joint batch. So a
    run that was interrupted continues as if it hadn't been, and several processes do what one does,
    up to the rounding of their sums.

    Args:
        network: Trained in place.
        loss: Mean loss of a batch, from `network`.
        images: ``(n, c, h, w)`` in [0, 1], or uint8 in 0 ... 255.
        labels: ``(n,)``.
        settings: The optimiser's and the batches'.
        owner: Name of the recipe; with the seed, it decides every batch and every noise.
        options: Those of the run; the network and the images are on its device.
        report: See :data:`Report`.
        checkpoint: Keeps the state that a run continues from; None to keep none.

    Raises:
        AttackFailed: The loss or a gradient became NaN or infinite; no weight has seen it.
        BadRequest: The checkpoint belongs to another request.
        BadWeights: The checkpoint is damaged.
    """
    dropout.install(network)
    state = State.start(network, settings)
    done = checkpoint.restore(state) if checkpoint else 0
    options.group.agree(done, images.device)
    rows = options.group.rows(settings.batch_size)
    device, kept, low = images.device.type, done, options.precision == "bf16"
    for update in range(done + 1, settings.iterations + 1):
        tape = Tape.make(options.seed, owner, rows, update - 1)
        dropout.begin(network, tape)
        with torch.autocast(device, torch.bfloat16) if low else nullcontext():
            batch = draw(images, labels, tape, flip=settings.flip, crop=settings.crop)
            value = loss(batch)
        state.optimizer.zero_grad()
        joint = float(options.group.backward(network, value, settings.batch_size))
        norm = float(nn.utils.clip_grad_norm_(network.parameters(), 1.0))
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


def _stop(owner: str, update: int, loss: float, kept: int, checkpoint: Checkpoint | None) -> None:
    what = "a gradient" if isfinite(loss) else "the loss"
    where = (
        f"The state after update {kept} is in {checkpoint.path}. " if checkpoint and kept else ""
    )
    raise AttackFailed(
        f"{what} of {owner} became NaN or infinite at update {update}; no weight has seen it. "
        f"{where}A lower --learning-rate may do."
    )
