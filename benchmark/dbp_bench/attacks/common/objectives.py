"""Losses that attacks maximise, ``(n,)``, of logits ``(n, k)`` and labels ``(n,)``."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from dbp_bench.errors import AttackFailed
from dbp_bench.threat import AttackerView, Objective, Setup

SELECTION = 1 << 31
"""The number of the first guess that compares candidates; no gradient is taken from it on."""

_ROUNDING = 1e-4
"""A margin below this share of the spread of the logits may be a matter of batch size."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy, as softplus(logsumexp(other logits - the label's)).

    The textbook form has the gradient softmax - 1 at the label's logit, which cancels in float32
    where the classifier is sure: beyond a margin of 17 or so it is exactly 0, and that part of the
    attack is blind. This form is equal in value and keeps the gradient's relative precision.
    """
    return F.softplus(log_odds(logits, labels))


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Largest other logit minus the label's (Carlini and Wagner 2017, f6, without the clip)."""
    right = logits.gather(1, labels[:, None])[:, 0]
    return _others(logits, labels).amax(1) - right


def log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-odds of being wrong: logsumexp of the other logits minus the label's."""
    own = logits.gather(1, labels[:, None])
    return torch.logsumexp(_others(logits, labels) - own, dim=1)


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio (Croce and Hein 2020, equation 6).

    Raises:
        AttackFailed: There are fewer than 3 classes.
    """
    _enough_classes("dlr", logits, 3)
    ordered = logits.sort(dim=1, descending=True).values
    return margin(logits, labels) / (ordered[:, 0] - ordered[:, 2] + 1e-12)


def cross_entropy_targeted(logits: Tensor, _: Tensor, targets: Tensor) -> Tensor:
    """Minus the cross-entropy of the targets ``(n,)``; the labels play no part."""
    return -cross_entropy(logits, targets)


def margin_targeted(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """The logit of the target minus the label's."""
    return (logits.gather(1, targets[:, None]) - logits.gather(1, labels[:, None]))[:, 0]


def dlr_targeted(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Targeted difference of logits ratio (Croce and Hein 2020, equation 7).

    Raises:
        AttackFailed: There are fewer than 4 classes.
    """
    _enough_classes("dlr-targeted", logits, 4)
    ordered = logits.sort(dim=1, descending=True).values
    spread = ordered[:, 0] - 0.5 * (ordered[:, 2] + ordered[:, 3]) + 1e-12
    return margin_targeted(logits, labels, targets) / spread


def surely_wrong(logits: Tensor, labels: Tensor) -> Tensor:
    """True ``(b,)`` where the logits ``(b, k)`` are wrong by more than rounding could undo.

    An image retires on this: its last verdict is computed in a batch of another size, which may
    round a tie to the other side.
    """
    spread = logits.amax(1) - logits.amin(1)
    return margin(logits, labels) > _ROUNDING * spread


def mean_over_draws(objective: Objective, logits: Tensor, labels: Tensor) -> Tensor:
    """The mean ``(b,)`` of `objective` over the draws of `logits` ``(b, draws, k)``."""
    draws = logits.shape[1]
    return objective(logits.flatten(0, 1), labels.repeat_interleave(draws)).view(-1, draws).mean(1)


def compared(
    view: AttackerView, images: Tensor, labels: Tensor, objective: Objective, eot: int
) -> Tensor:
    """The mean ``(b,)`` of `objective` over `eot` guesses that are common to all candidates."""
    logits = view.logits(images, range(SELECTION, SELECTION + eot))
    return mean_over_draws(objective, logits, labels)


def likely_targets(view: AttackerView, images: Tensor, labels: Tensor, eot: int) -> Tensor:
    """All wrong classes ``(b, k - 1)``, the most likely first, by mean logits over guesses.

    Args:
        view: The view of a defense that tells `k` classes apart.
        images: Clean, ``(b, c, h, w)`` in [0, 1].
        labels: ``(b,)``.
        eot: The number of guesses, which no gradient is taken on and no candidate is compared on;
            where every draw is known, one is enough.
    """
    first = SELECTION + eot
    draws = range(first, first + (1 if view.deterministic else eot))
    logits = view.logits(images, draws).mean(1)
    return ordered_targets(logits, labels)


def ordered_targets(logits: Tensor, labels: Tensor) -> Tensor:
    """All wrong classes ``(b, k - 1)``, that of the largest logit first."""
    logits = logits.scatter(1, labels[:, None], -torch.inf)
    order = logits.sort(dim=1, descending=True, stable=True).indices
    return order[:, :-1]


def too_many_targets(option: str, targets: int, setup: Setup) -> str | None:
    """The reason why a targeted loss cannot aim at so many `targets`; None where it can.

    Args:
        option: The option that says how many, for the message.
        targets: Number of wrong classes to aim at.
        setup: It has the number of classes.
    """
    wrong = setup.classes - 1
    if targets <= wrong:
        return None
    return (
        f"{option}: {targets} wrong classes to aim at, but there are {wrong}; give {wrong} at most"
    )


def _others(logits: Tensor, labels: Tensor) -> Tensor:
    """The `logits`, with that of the label at minus infinity."""
    own = torch.zeros_like(logits, dtype=torch.bool).scatter(1, labels[:, None], True)
    return logits.masked_fill(own, -torch.inf)


def _enough_classes(loss: str, logits: Tensor, least: int) -> None:
    if logits.shape[1] < least:
        raise AttackFailed(
            f"loss {loss}: needs at least {least} classes, and the classifier has "
            f"{logits.shape[1]}; use ce or margin."
        )


OBJECTIVES: Mapping[str, Objective] = {"ce": cross_entropy, "margin": margin, "dlr": dlr}

TARGETED: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "ce-targeted": cross_entropy_targeted,
    "margin-targeted": margin_targeted,
    "dlr-targeted": dlr_targeted,
}
"""Losses that also take targets ``(n,)``."""


def objective_of(loss: str, targets: Tensor) -> Objective:
    """The loss called `loss`; a targeted one aims at `targets` ``(b,)``, a class for each image.

    The logits that it is given may hold several draws of each image, one after the other.
    """
    if loss in OBJECTIVES:
        return OBJECTIVES[loss]

    def toward(logits: Tensor, labels: Tensor) -> Tensor:
        aims = targets.repeat_interleave(len(logits) // len(targets))
        return TARGETED[loss](logits, labels, aims)

    return toward
