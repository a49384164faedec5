"""Several processes that share one joint batch, as a launcher such as torchrun starts them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch import distributed as dist

from dbp_bench.errors import BadRequest


@dataclass(frozen=True, slots=True)
class Group:
    """This process among those that train together."""

    rank: int = 0
    size: int = 1

    def rows(self, batch_size: int) -> range:
        """The rows of the joint batch that are this process's."""
        return range(self.rank * batch_size // self.size, (self.rank + 1) * batch_size // self.size)

    def backward(self, network: nn.Module, value: Tensor, batch_size: int) -> Tensor:
        """Leave the joint batch's gradients on the weights; the joint mean of `value`.

        Args:
            network: Holds the weights.
            value: Mean loss of this process's rows.
            batch_size: Number of rows of the joint batch.
        """
        if self.size == 1:
            value.backward()  # type: ignore[no-untyped-call]
            return value.detach()
        value = value * (len(self.rows(batch_size)) / batch_size)
        value.backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        joint = torch.cat([*(g.flatten() for g in gradients), value.detach().view(1)])
        dist.all_reduce(joint)
        sums = torch.split(joint[:-1], [g.numel() for g in gradients])
        for gradient, total in zip(gradients, sums, strict=True):
            gradient.copy_(total.view(gradient.shape))
        return joint[-1]

    def agree(self, number: int, device: torch.device) -> None:
        """Refuse to start where the processes would continue from different updates.

        Raises:
            BadRequest: They would.
        """
        if self.size == 1:
            return
        ends = torch.tensor([number, -number], device=device)
        dist.all_reduce(ends, dist.ReduceOp.MAX)
        if ends[0] != -ends[1]:
            raise BadRequest(
                f"the processes found checkpoints of different updates ({-int(ends[1])} and "
                f"{int(ends[0])}): --out must be one folder that all of them see."
            )

    def joined(self, network: nn.Module) -> nn.Module:
        """`network`, its batch norms made to see the joint batch.

        Raises:
            BadRequest: They can't.
        """
        norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules())
        if self.size == 1 or not norms:
            return network
        if next(network.parameters()).device.type == "cpu":
            raise BadRequest(
                "batch norm sees the joint batch on GPUs alone: train this network in one process, "
                "or with --device cuda."
            )
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-any-return,no-untyped-call]


ALONE = Group()
"""The one process of a run that no launcher started."""


@contextmanager
def launched(device: str) -> Iterator[tuple[Group, torch.device]]:
    """The group that the launcher's environment variables say, and this process's device.

    Raises:
        BadRequest: There are fewer GPUs than processes.
    """
    place = torch.device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE, place
        return
    if device == "cuda":
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if place.index >= torch.cuda.device_count():
            raise BadRequest(
                f"process {place.index + 1} of this machine has no GPU of its own: torch sees "
                f"{torch.cuda.device_count()}. Start as many processes, or give --device cpu."
            )
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield Group(dist.get_rank(), dist.get_world_size()), place
    finally:
        dist.destroy_process_group()
