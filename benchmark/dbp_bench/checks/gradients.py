"""Compares gradients: each mode with the exact one, and the exact one with itself.

A mode (exact, BPDA, surrogate) is compared with the exact gradient at common draws, so that only
the mode differs. Two means of the exact gradient over different draws tell how much of it is noise:
no two attacks with so few draws can agree better. Everything is in float64.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dbp_bench.attacks.common.objectives import OBJECTIVES
from dbp_bench.checks.conformance import DIRECTIONS, TOLERANCE, difference_errors
from dbp_bench.defense import Defense
from dbp_bench.entries.subject import Subject
from dbp_bench.errors import BadRequest
from dbp_bench.evaluation import Group
from dbp_bench.noise import Tape
from dbp_bench.reporting.statistics import Bootstrap, Estimate
from dbp_bench.threat import AttackerView, Objective

COUNTS = (1, 10, 64)
"""Draws that a mean gradient is taken over."""

FLOOR = 1e-6
"""The smallest error that a quick check writes down: below, rounding decides."""

_OWNER = "gradients"
_QUICK_DIRECTIONS = 3


# --------------------------------------------------------------------------------- what is measured


@dataclass(frozen=True, slots=True)
class Agreement:
    """The agreement of two mean gradients over images; one with a zero gradient is left out."""

    mode: str
    draws: int
    """Number of draws of each mean."""
    cosine: Estimate | None
    """Null where no image is left."""
    sign: Estimate | None
    """Share of the pixels whose signs are equal; all that an l-infinity step follows."""
    images: int
    """The number of images that are not left out."""


@dataclass(frozen=True, slots=True)
class Findings:
    """The findings of :func:`measure`."""

    modes: list[Agreement]
    """Each mode with the exact gradient, at the same draws."""
    noise_floor: list[Agreement]
    """Two means of the exact gradient with each other, over as many draws each, none in common."""
    difference_errors: list[float | None]
    """The error of each exact gradient, relative to central differences; None where it is zero."""

    @property
    def exact(self) -> bool:
        """True where the gradient that is called exact is, as far as there is one."""
        found = [error for error in self.difference_errors if error is not None]
        return all(error <= TOLERANCE for error in found)


def measure(
    exact: Defense,
    modes: Mapping[str, Defense],
    group: Group,
    *,
    seed: int,
    max_batch: int,
    loss: str = "ce",
    counts: Sequence[int] = COUNTS,
    tiny: int = 3,
) -> Findings:
    """Compare the gradients of `modes` with that of `exact` on a `group` of float64 images.

    Args:
        exact: The defense.
        modes: The defenses that attacks differentiate in its place, by name.
        group: Images ``(b, c, h, w)`` in [0, 1], float64; nothing is added to them.
        seed: The seed of the draws: 0 ... N-1 for a mean of N, as many others for its other half.
        max_batch: Images x EoT samples in one pass through the networks, at most.
        loss: One of :data:`dbp_bench.attacks.common.objectives.OBJECTIVES`.
        counts: Draws per mean.
        tiny: Images on which finite differences are taken.

    Raises:
        AttackFailed: A loss or a gradient is not finite, or no gradient reaches the images.
    """
    counts = sorted(counts)
    objective = OBJECTIVES[loss]
    first = _means(exact, group, objective, counts, 0, seed, max_batch)
    second = _means(exact, group, objective, counts, counts[-1], seed, max_batch)
    compared = []
    for name, searched in modes.items():
        means = _means(searched, group, objective, counts, 0, seed, max_batch)
        compared += [
            _agreement(name, n, a, b) for n, a, b in zip(counts, means, first, strict=True)
        ]
    floor = [_agreement("exact", n, a, b) for n, a, b in zip(counts, first, second, strict=True)]
    return Findings(compared, floor, difference_errors(exact, group.images[:tiny], DIRECTIONS))


def _means(
    defense: Defense,
    group: Group,
    objective: Objective,
    counts: Sequence[int],
    start: int,
    seed: int,
    max_batch: int,
) -> list[Tensor]:
    """The mean gradients ``(b, d)``, one for each of the rising `counts` of draws from `start`."""
    view = AttackerView(
        defense,
        frozenset(),
        Tape.make(seed, f"{_OWNER}/unused", group.ids),
        Tape.make(seed, _OWNER, group.ids),
        max_batch,
    )
    total, means, taken = torch.zeros_like(group.images), [], 0
    for count in counts:
        draws = range(start + taken, start + count)
        found = view.gradient(group.images, group.labels, objective, draws).mean
        total, taken = total + len(draws) * found, count
        means.append((total / count).flatten(1))
    return means


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosine ``(b,)`` of the rows of `a` and `b` ``(b, d)``; NaN where one of them is zero."""
    # Scaled first: the gradient of an image that is classified without doubt is tiny.
    a, b = (x / x.abs().amax(1, keepdim=True) for x in (a, b))
    cosine: Tensor = (a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt()
    return cosine


def _agreement(mode: str, draws: int, a: Tensor, b: Tensor) -> Agreement:
    cosine, sign = cosines(a, b), (a.sign() == b.sign()).double().mean(1)
    kept = ~cosine.isnan()
    return Agreement(mode, draws, _mean(cosine[kept]), _mean(sign[kept]), int(kept.sum()))


def _mean(values: Tensor) -> Estimate | None:
    """Mean over images and its interval."""
    if len(values) == 0:
        return None
    bootstrap = Bootstrap(len(values))
    return bootstrap.estimate(bootstrap.average(values.tolist()))


# ------------------------------------------------------------------------------------- of an entry


def check(
    subject: Subject,
    *,
    images: int = 16,
    seed: int = 0,
    loss: str = "ce",
    surrogate_steps: int | None = None,
    device: str = "cpu",
) -> tuple[Findings, int | None]:
    """Measure every kind of gradient of a defense, on the first `images` of its track.

    Returns:
        What was found, and the steps of the surrogate: half of the defense's if not given, None
        where it has no steps, or only one.

    Raises:
        BadRequest: An option can't be right.
        AttackFailed: A loss or a gradient is not finite, or no gradient reaches the images.
    """
    if loss not in OBJECTIVES:
        raise BadRequest(f"--loss {loss!r}: one of {', '.join(OBJECTIVES)}.")
    known = len(subject.ids())
    if not 1 <= images <= known:
        raise BadRequest(f"--images {images}: this track has 1 to {known}.")
    steps = subject.setting.replaceable.get("steps")
    if not isinstance(steps, int):
        if surrogate_steps is not None:
            raise BadRequest(f"--surrogate-steps: {subject.name} has no option `steps` to shorten.")
    elif surrogate_steps is None:
        surrogate_steps = steps // 2 or None
    elif not 1 <= surrogate_steps < steps:
        raise BadRequest(
            f"--surrogate-steps {surrogate_steps}: must be in 1 ... {steps - 1}, since "
            f"{subject.name} has {steps}."
        )
    exact = subject.defense(device=device, dtype=torch.float64)
    kinds = {"exact": "exact"}
    if subject.setting.classifies is None:
        kinds["bpda"] = "bpda"
    if surrogate_steps is not None:
        kinds["surrogate"] = f"surrogate:{surrogate_steps}"
    if subject.setting.surrogate:
        kinds["declared-surrogate"] = "declared-surrogate"
    modes = {
        name: subject.searched(exact, kind, device=device, dtype=torch.float64)
        for name, kind in kinds.items()
    }
    ids = subject.ids()[:images]
    first, labels = subject.data().select(ids)
    found = measure(
        exact,
        modes,
        Group(first.to(device, torch.float64), labels.to(device), ids),
        seed=seed,
        max_batch=subject.track.entry.max_batch,
        loss=loss,
        counts=COUNTS,
    )
    return found, surrogate_steps


# --------------------------------------------------------------------------------------- of a run


def quick_errors(exact: Defense, images: Tensor) -> list[float | None]:
    """The error of each exact gradient, as a run stores it, for float64 `images`."""
    errors = difference_errors(exact, images, _QUICK_DIRECTIONS)
    return [None if e is None else float(f"{max(e, FLOOR):.2g}") for e in errors]


def quick_cosines(
    exact: Defense, searched: Defense, group: Group, loss: str, seed: int, max_batch: int
) -> list[float | None]:
    """The cosine of the gradient that an attack follows with the exact one, at one draw.

    It is None where one of them is zero. `loss` is cross-entropy where there is none of that name.
    """
    objective = OBJECTIVES.get(loss, OBJECTIVES["ce"])
    (a,) = _means(exact, group, objective, [1], 0, seed, max_batch)
    b = a
    if searched is not exact:
        (b,) = _means(searched, group, objective, [1], 0, seed, max_batch)
    return [None if c != c else round(c, 4) for c in cosines(a, b).tolist()]
