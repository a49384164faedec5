"""The training loop that all recipes share."""

from collections.abc import Callable
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
    group: Group = ALONE,
    checkpoint: Checkpoint | None = None,
    precision: Precision = "fp32",
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
        seed: With `owner`, decides every batch and every noise.
        owner: Name of the recipe.
        report: See :data:`Report`.
        group: The processes that train together.
        checkpoint: Where the state is kept, and what it continues from; None to keep none.
        precision: See :data:`Precision`.

    Raises:
        AttackFailed: The loss or a gradient became NaN or infinite; no weight has seen it.
        BadRequest: The checkpoint belongs to another request.
        BadWeights: The checkpoint is damaged.
    """
    dropout.install(network)
    state = State.start(network, settings)
    done = checkpoint.restore(state) if checkpoint else 0
    group.agree(done, images.device)
    rows = group.rows(settings.batch_size)
    kept = done
    for update in range(done + 1, settings.iterations + 1):
        tape = Tape.make(seed, owner, rows, update - 1)
        dropout.begin(network, tape)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
            batch = draw(images, labels, tape, flip=settings.flip, crop=settings.crop)
            value = loss(batch)
        state.optimizer.zero_grad()
        joint = float(group.backward(network, value, settings.batch_size))
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
