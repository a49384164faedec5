"""Dropout whose masks are draws of the tape: the same for an image in any part of a batch."""

import torch
from torch import Tensor, nn

from dbp_bench.noise import Site, Tape


class TapedDropout(nn.Module):
    """Dropout with probability `p`, when training, by masks of the tape given to `begin`."""

    def __init__(self, p: float, name: str) -> None:
        super().__init__()
        self.p, self.site = p, Site(f"dropout/{name}")
        self.tape: Tape | None = None
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        """`x` ``(b, ...)`` with one row for each row of the tape."""
        return x * self._factor(x) if self.training else x

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _factor(self, x: Tensor) -> Tensor:
        if self.tape is None:
            raise RuntimeError("dropout was given no tape: call begin() before the network.")
        self.calls += 1
        return self.tape.kept(self.site, self.calls, x, 1 - self.p) / (1 - self.p)


def install(network: nn.Module) -> None:
    """Replace every dropout of `network` by one that takes its masks from a tape."""
    for name, module in list(network.named_modules()):
        for leaf, child in module.named_children():
            if isinstance(child, nn.Dropout) and child.p:
                path = f"{name}.{leaf}" if name else leaf
                setattr(module, leaf, TapedDropout(child.p, path))


def begin(network: nn.Module, tape: Tape) -> None:
    """Take the masks of an update from `tape`; each call of the network has masks of its own."""
    for module in network.modules():
        if isinstance(module, TapedDropout):
            module.tape, module.calls = tape, 0
