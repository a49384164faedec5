"""Precisions that networks can be run in, each of which ends with the block that it is asked in."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dbp_bench.checks.gradients import cosines

Precision = Literal["fp32", "tf32", "bf16"]
"""`fp32`: as every attack is run. `tf32`: products of float32 numbers are of their first 10 bits.
`bf16`: the networks under autocast, on float32 weights; the sampler, the noise, the loss and the
search stay in float32."""


def precisions(device: str) -> tuple[Precision, ...]:
    """Those that the device has; tf32 is a GPU's."""
    return ("fp32", "bf16") if device == "cpu" else ("fp32", "tf32", "bf16")


@contextmanager
def arithmetic(precision: Precision) -> Iterator[None]:
    """Products of float32 numbers as `precision` has them: whole, unless it is tf32.

    Also in matrix products and convolutions that were compiled or recorded outside. What was set
    before is set again after, whatever happens.
    """
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    short = precision == "tf32"
    torch.set_float32_matmul_precision("high" if short else "highest")
    torch.backends.cudnn.allow_tf32 = short
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


class Lowered(nn.Module):
    """`network` in bf16, or kept out of it: autocast begins and ends inside.

    So it is the same when a checkpointed step is run again in the backward pass, in a thread that
    knows of no autocast. Takes and gives float32.
    """

    def __init__(self, network: nn.Module, precision: Precision, *, compiled: bool = False) -> None:
        super().__init__()
        self.low = precision == "bf16"
        # Shapes are fixed here; and graphs of changing shapes would be another measurement.
        self.network = torch.compile(network, dynamic=False) if compiled else network

    def forward(self, images: Tensor, *others: Tensor) -> Tensor:
        """What the network says of `images` ``(b, ...)``, in float32."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.low):
            out: Tensor = self.network(images, *others)
        return out.float()


def agreement(gradients: Tensor, reference: Tensor) -> dict[str, Any]:
    """How the gradients ``(b, c, h, w)`` of images agree; one that is zero is left out.

    The mean and the lowest cosine, and the share of the pixels whose signs are equal, which are all
    that an l-infinity step follows; blank where no image is left.
    """
    a, b = gradients.flatten(1).double(), reference.flatten(1).double()
    cosine = cosines(a, b)
    kept = ~cosine.isnan()
    if not bool(kept.any()):
        return {"images": 0, "cosine": None, "cosine_low": None, "sign": None}
    return {
        "images": int(kept.sum()),
        "cosine": float(cosine[kept].mean()),
        "cosine_low": float(cosine[kept].min()),
        "sign": float((a.sign() == b.sign())[kept].double().mean()),
    }
