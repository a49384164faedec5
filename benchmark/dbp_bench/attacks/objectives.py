"""Losses that attacks maximise. All take logits ``(n, k)`` and labels ``(n,)``, and give ``(n,)``."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from dbp_bench.threat import Objective


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy."""
    return F.cross_entropy(logits, labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Largest other logit minus the label's (Carlini and Wagner 2017, f6, without the clip)."""
    right = logits.gather(1, labels[:, None])[:, 0]
    return _others(logits, labels).amax(1) - right


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio (Croce and Hein 2020, equation 6); at least 3 classes."""
    ordered = logits.sort(dim=1, descending=True).values
    return margin(logits, labels) / (ordered[:, 0] - ordered[:, 2] + 1e-12)


def _others(logits: Tensor, labels: Tensor) -> Tensor:
    """`logits` with the label's at minus infinity."""
    own = torch.zeros_like(logits, dtype=torch.bool).scatter(1, labels[:, None], True)
    return logits.masked_fill(own, -torch.inf)


OBJECTIVES: Mapping[str, Objective] = {"ce": cross_entropy, "margin": margin, "dlr": dlr}
