"""Attack a group of images, then evaluate what the defense does. Pure: no files, no clock."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dbp_bench.defense import Defense
from dbp_bench.errors import AttackFailed, ZeroGradient
from dbp_bench.noise import ATTACKER, VICTIM, Site, Tape
from dbp_bench.perceptual import Perceptual
from dbp_bench.threat import AttackerView, Budget, Method, Tick, ignore, own_bound

FRESH = 1 << 32
"""The number of the first victim draw that evaluates images made for known draws.

No attacker is shown it or a later one."""


@dataclass(frozen=True, slots=True)
class Group:
    """A fixed group of images, evaluated together: their number shapes the arithmetic."""

    images: Tensor
    """``(b, c, h, w)`` in [0, 1]; held row by row in memory, as the attack's own images are."""
    labels: Tensor
    """``(b,)``, int64."""
    ids: Sequence[int]
    """Index of each image in its data set."""

    def __post_init__(self) -> None:
        """Lay out the images anew: convolutions of another layout round in another way.

        An image of one channel counts as contiguous in either, so it is always copied.
        """
        plain = self.images.clone(memory_format=torch.contiguous_format)
        object.__setattr__(self, "images", plain)


@dataclass(frozen=True, slots=True)
class Attacked:
    """The images that an attack found, and how many evaluations it took."""

    images: Tensor
    """``(b, c, h, w)``, inside the budget, or the attack's own bound, and [0, 1]."""
    gradient: Tensor
    """``(b,)``: gradient evaluations of each image."""
    forward: Tensor
    """``(b,)``: forward evaluations of each image."""
    nonzero: Tensor
    """``(b,)``: true where any gradient was not zero."""
    verdict: Tensor | None = None
    """``(b,)``: true where the attack itself calls the image robust; it decides nothing."""


def attack(
    defense: Defense,
    method: Method,
    group: Group,
    budget: Budget,
    knows: frozenset[Site],
    *,
    seed: int,
    victim_draw: int,
    max_batch: int,
    tick: Tick = ignore,
    sources: Mapping[str, Defense] | None = None,
) -> Attacked:
    """Adversarial images, inside `budget` and [0, 1] whatever `method` returned.

    If `method` declares a bound of its own, the images are inside that one instead.

    The attacker is shown victim draw `victim_draw` at the sites it `knows`, and guesses elsewhere
    from a tape of its own.

    Raises:
        AttackFailed: `method` returned images of another shape or values that are not finite.
        ZeroGradient: It took gradients, the gradient of every image was always zero, and it has no
            search without gradients.
    """
    victim = Tape.make(seed, VICTIM, group.ids, victim_draw)
    guess = Tape.make(seed, f"{ATTACKER}/{victim_draw}", group.ids)
    view = AttackerView(defense, knows, victim, guess, max_batch, tick, sources)
    # Copies: an attack from outside may change in place what it was given.
    found = method(view, group.images.clone(), group.labels.clone(), budget)
    if found.shape != group.images.shape:
        raise AttackFailed(
            f"the attack returned images of shape {tuple(found.shape)}, not "
            f"{tuple(group.images.shape)}."
        )
    if not bool(found.isfinite().all()):
        raise AttackFailed(
            "the attack returned images that are not finite (NaN or infinite): where its search "
            "fails, it must return the clean image."
        )
    searches_on = getattr(method, "without_gradient", False)
    if view.log.gradient.any() and not view.log.nonzero.any() and not searches_on:
        raise ZeroGradient(
            "the gradient of every image is zero at every step: the defense masks its gradient, "
            "and this accuracy would mean nothing; `dbp-bench check` tells more."
        )
    own = own_bound(method)
    held = view.measured(own) if isinstance(own, Perceptual) else own or budget
    images = held.project(found.detach(), group.images)
    log = view.log
    return Attacked(images, log.gradient, log.forward, log.nonzero, log.verdict)


def predict(
    defense: Defense, images: Tensor, ids: Sequence[int], *, seed: int, draw: int
) -> Tensor:
    """The predicted class ``(b,)`` of each of `images` ``(b, c, h, w)`` at victim draw `draw`.

    A defense that votes gives :data:`dbp_bench.defense.NO_MAJORITY` where several classes have the
    most votes.

    Raises:
        AttackFailed: The defense returned logits that are not finite.
    """
    with torch.no_grad():
        return defense.classes(images, Tape.make(seed, VICTIM, ids, draw))
