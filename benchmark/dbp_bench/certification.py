"""Counts the votes that certify a defense by randomised smoothing. Pure: no files, no clock.

The smoothed classifier names the class that the defense names most often when Gaussian noise is
added to the image (Cohen et al. 2019). Each vote has a number, which is the draw of its noise: the
Gaussian noise and the defense's own draws are those of that number, so that no two votes share any.
Selection and estimation have numbers of their own. The Gaussian noise is in pixel units, and is not
clipped. :mod:`dbp_bench.certificate` says what the votes certify.

Of many purifiers the forward noise is the Gaussian noise: all that they take of an image x is
``x + size * noise``. Then a vote is one draw of the defense as it is, and no more noise is added
(:func:`is_smoothing` tells). Otherwise it is added to the image that the defense is given.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import comb, log
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dbp_bench.certificate import MOST_NOISE, MOST_VOTES
from dbp_bench.defense import NO_MAJORITY, Defense
from dbp_bench.errors import AttackFailed, BadRequest, NotConforming
from dbp_bench.noise import FORWARD, Noise, Site, Tape
from dbp_bench.threat import Tick, ignore

SMOOTHING: Final = Site("smoothing")
"""The site of the Gaussian noise."""
_SMOOTHING: Final = "smoothing"
_VOTER: Final = "voter"
"""The owners of the Gaussian noise and of the defense's own draws. No attack and no evaluation
draws from their tapes."""
ESTIMATION: Final = MOST_VOTES
"""The number of the first vote of the estimation; those of the selection start at 0."""

Phase = Literal["selection", "estimation"]
Classify = Callable[[Tensor, Tape], Tensor]
"""The classes ``(b,)`` of images ``(b, c, h, w)``, with the draws of a tape of as many rows; or
:data:`dbp_bench.defense.NO_MAJORITY`. :meth:`Defense.classes` is one."""


@dataclass(frozen=True, slots=True)
class Smoothing:
    """The noise, and the number of votes."""

    sigma: float
    """Standard deviation of the Gaussian noise, in [0, 1] pixel units."""
    n0: int
    """Votes that choose the class of an image."""
    n: int
    """Fresh votes that bound the probability of that class."""

    def __post_init__(self) -> None:
        """Refuse numbers that certify nothing."""
        if not 0 < self.sigma <= MOST_NOISE:
            raise BadRequest(
                f"--sigma {self.sigma:g}: noise has a size above 0, in pixel units, and up to "
                f"{MOST_NOISE:g}."
            )
        if self.n0 < 1:
            raise BadRequest(f"--n0 {self.n0}: at least one vote chooses a class.")
        if self.n0 >= self.n:
            raise BadRequest(
                f"--n0 {self.n0} --n {self.n}: fewer votes choose a class than bound its "
                "probability; the usual numbers are 100 and 100000."
            )
        if self.n > MOST_VOTES:
            raise BadRequest(f"--n {self.n}: more votes than {MOST_VOTES} have no numbers.")

    def votes(self, phase: Phase) -> int:
        """Votes of an image in this phase."""
        return self.n0 if phase == "selection" else self.n


class Pass(NamedTuple):
    """The votes of each image of a group that are taken together."""

    phase: Phase
    votes: range
    """Their numbers within the phase."""


@dataclass(slots=True)
class Counts:
    """The votes of a group of images so far."""

    selection: Tensor
    """Votes ``(b, classes)``, int64."""
    estimation: Tensor
    done: dict[Phase, int]
    """Votes that each image has had, by phase."""

    @classmethod
    def none(cls, images: int, classes: int) -> "Counts":
        """Nothing counted yet."""
        empty = torch.zeros(images, classes, dtype=torch.int64)
        return cls(empty, empty.clone(), {"selection": 0, "estimation": 0})


def group_size(smoothing: Smoothing, max_batch: int) -> int:
    """Images whose votes are counted together, so that a pass is as full as it may be."""
    return max(1, max_batch // smoothing.n0)


def passes(smoothing: Smoothing, images: int, max_batch: int) -> Iterator[Pass]:
    """All passes for a group of `images`, of at most `max_batch` votes of all of them together."""
    step = max(1, max_batch // images)
    for phase in ("selection", "estimation"):
        last = smoothing.votes(phase)
        for first in range(0, last, step):
            yield Pass(phase, range(first, min(first + step, last)))


def largest_pass(smoothing: Smoothing, images: int, max_batch: int) -> int:
    """Votes in one pass, at most, where `images` are certified in groups."""
    group = min(images, group_size(smoothing, max_batch))
    return group * max(len(each.votes) for each in passes(smoothing, group, max_batch))


def count(
    classify: Classify,
    images: Tensor,
    ids: Sequence[int],
    smoothing: Smoothing,
    *,
    classes: int,
    seed: int,
    max_batch: int,
    added: bool = True,
    counts: Counts | None = None,
    tick: Tick = ignore,
) -> Iterator[Counts]:
    """Count the votes of a group of images; the counts are given after every pass.

    Args:
        classify: The defense that votes.
        images: ``(b, c, h, w)`` in [0, 1].
        ids: The id of each image: it decides the noise, whatever the batch.
        smoothing: The noise, and the number of votes.
        classes: The number of classes.
        seed: The seed of all draws.
        max_batch: Votes in one pass, at most. It shapes the arithmetic, so a run that goes on needs
            the same.
        added: True where the Gaussian noise is added to what the classifier is given; false where
            the classifier adds it, as one of its draws.
        counts: What was counted before.
        tick: Called after each pass with the number of its votes.

    Raises:
        AttackFailed: The classifier gives something else than a class for each image, or logits
            that are not finite.
    """
    counts = counts or Counts.none(len(images), classes)
    for phase, votes in passes(smoothing, len(images), max_batch):
        if votes.stop <= counts.done[phase]:
            continue
        sigma = smoothing.sigma if added else 0.0
        found = _votes(classify, images, ids, sigma, phase, votes, classes, seed)
        getattr(counts, phase).add_(found)
        counts.done[phase] = votes.stop
        tick(found.shape[0] * len(votes))
        yield counts


def _votes(
    classify: Classify,
    images: Tensor,
    ids: Sequence[int],
    sigma: float,
    phase: Phase,
    votes: range,
    classes: int,
    seed: int,
) -> Tensor:
    """The votes ``(b, classes)`` of these numbers; a vote for no class is in no column."""
    first = 0 if phase == "selection" else ESTIMATION
    numbers = range(first + votes.start, first + votes.stop)
    with torch.no_grad():
        noisy = images.repeat_interleave(len(votes), 0)
        if sigma:
            # In pixel units, and not clipped: the theorem is about a Gaussian.
            smooth = Tape.make(seed, _SMOOTHING, ids).copies(numbers)
            noisy += sigma * smooth.normal(SMOOTHING, 0, noisy)
        named = classify(noisy, Tape.make(seed, _VOTER, ids).copies(numbers))
    if named.shape != noisy.shape[:1] or named.is_floating_point() or named.is_complex():
        raise AttackFailed(
            f"the classifier gives {tuple(named.shape)} {named.dtype} for {len(noisy)} images, not "
            "the number of a class for each."
        )
    named = named.long()
    if bool(((named < NO_MAJORITY) | (named >= classes)).any()):
        raise AttackFailed(f"the classifier names a class that is not in 0 ... {classes - 1}.")
    # The first column takes the votes that name no class.
    counted = F.one_hot(named - NO_MAJORITY, classes + 1)[:, 1:]
    return counted.view(len(images), len(votes), classes).sum(1).cpu()


# ------------------------------------------------------------------------- what a vote may be


def is_smoothing(defense: Defense, images: Tensor, size: float) -> bool:
    """Tell whether all that a defense takes of an image is ``image + size * its forward noise``.

    That is seen from outside: an image is moved, and its forward noise (of step 0) against it, and
    the logits stay. A guide that sees the clean image, a resize before the noise, or votes with
    forward noise of their own make them move.

    Args:
        defense: The defense.
        images: ``(b, c, h, w)`` in [0, 1].
        size: The standard deviation of the forward noise, in pixel units.
    """
    if FORWARD not in defense.sites:
        return False
    tape = Tape.make(0, _VOTER, range(len(images)))
    away = tape.normal(Site("shift"), 0, images)
    with torch.no_grad():
        here = defense.logits(images, tape)
        there = defense.logits(images + size * away, tape)
        back = defense.logits(images + size * away, _Moved(tape, -away))
    moved = float((there - here).abs().max())
    gap = _EXACT if images.dtype == torch.float64 else _GAP
    return moved > 0 and float((back - here).abs().max()) <= gap * moved


def check_votes(defense: Defense, image: Tensor, copies: int) -> None:
    """Refuse a defense whose votes share noise, or see each other.

    Then they are neither independent nor votes of one classifier, and the bound says nothing.

    Args:
        defense: The defense.
        image: ``(1, c, h, w)`` in [0, 1].
        copies: How many copies of the image are compared, 2 at least; as many as a pass of the run
            holds, for noise may be shared by rows that lie far apart.

    Raises:
        NotConforming: Copies of the image, each with draws of its own, have other logits in another
            order, or each has others alone.
    """
    copies = max(2, copies)
    tape = Tape.make(0, _VOTER, [0]).copies(range(copies))

    def logits(rows: Tensor) -> Tensor:
        batch = image.expand(len(rows), *image.shape[1:]).clone()
        return defense.logits(batch, _Rows(tape[rows], len(rows)))

    order = torch.arange(copies)
    few = sorted({0, 1, copies // 2, copies - 1})
    with torch.no_grad():
        together, reverse = logits(order), logits(order.flip(0)).flip(0)
        alone = torch.cat([logits(order[i : i + 1]) for i in few])
    gap = _GAP * alone.abs().max().clamp(min=1)
    if bool(((together - reverse).abs() > gap).any() | ((together[few] - alone).abs() > gap).any()):
        raise NotConforming(
            "its votes are not independent: an image beside other draws of itself has other logits "
            "than alone. Noise that is shared in a batch, statistics over the batch or draws from "
            "elsewhere certify nothing. Draw with noise.normal(site, step, like), one row for each "
            "image."
        )


_GAP: Final = 1e-3
"""Largest relative distance that rounding may bring in; noise that is shared, or of another size,
makes one of 0.01 and more."""
_EXACT: Final = 1e-5
"""The same for the size of noise in float64. Two schedules can differ by 0.0003 at one level, and a
size below sigma certifies nothing."""


@dataclass(frozen=True, slots=True)
class _Moved:
    """Noise whose first forward draw is moved."""

    source: Noise
    by: Tensor

    def normal(self, site: Site, step: int, like: Tensor) -> Tensor:
        drawn = self.source.normal(site, step, like)
        # Noise of another size than the image's is no noise in pixels.
        return drawn + self.by if (site, step, like.shape) == (FORWARD, 0, self.by.shape) else drawn


@dataclass(frozen=True, slots=True)
class _Rows:
    """Noise that refuses to be drawn for another number of images than there are."""

    source: Noise
    images: int

    def normal(self, site: Site, step: int, like: Tensor) -> Tensor:
        if len(like) != self.images:
            raise NotConforming(
                f"it draws {len(like)} rows at [{site}] for {self.images} images: votes that share "
                "noise certify nothing. Draw one row for each image."
            )
        return self.source.normal(site, step, like)


def check_classes(labels: Sequence[int], of: Sequence[int]) -> None:
    """Refuse images that are the first of a list which is sorted by class.

    Certified accuracy on them is that of a few classes. Images that are drawn at random from `of`
    have so few different labels with a chance of less than one in a million: at most the number of
    sets of so many classes, times the chance that all are in the most frequent such set.

    Args:
        labels: The labels of the images that are certified.
        of: The labels of all images of the track, among them these.

    Raises:
        BadRequest: They are.
    """
    sizes = sorted(Counter(of).values(), reverse=True)
    met = len(set(labels))
    chance = log(comb(len(sizes), met)) + len(labels) * log(sum(sizes[:met]) / len(of))
    if chance < log(1e-6):
        raise BadRequest(
            f"--examples {len(labels)}: these images are of {met} of {len(sizes)} classes: the "
            "track's list is sorted by class. Take all of its images, or a track whose split "
            "is stratified."
        )
