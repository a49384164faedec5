"""The short conformance record that every run makes of its defense and stores in its result.

It is made with the arithmetic of the run: on the track's first group of images, in float32, at the
batch sizes of the evaluation and of the attack, through the attacker's own view. So what was
attacked and what was evaluated are known to be the same program. ``dbp-bench check`` tests more.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dbp_bench.checks.conformance import fault
from dbp_bench.checks.gradients import FLOOR, cosines, quick_cosines, quick_errors
from dbp_bench.defense import Defense
from dbp_bench.errors import NotConforming
from dbp_bench.evaluation import Group
from dbp_bench.noise import OpaqueNoise, Site, Tape
from dbp_bench.provenance import full_float32
from dbp_bench.result import Conformance, GradientCheck
from dbp_bench.taped import Record
from dbp_bench.threat import AttackerView, Gradient, Revealed

TOLERANCE: Final = 1e-4
"""The share of the largest logit by which a logit may move in a batch of another size.

Libraries of linear algebra add in an order that depends on it; on the digits that moves logits by
5e-7. In one batch, nothing may move."""

PRECISION_TOLERANCE: Final = 0.05
"""The share of the largest logit by which a logit in float32 may differ from the one in float64."""

COSINE: Final = 0.9
"""The least cosine of the gradient in float32 with the one in float64."""

WRONG: Final = 1e-2
"""The relative distance to finite differences above which kinks no longer explain the error."""

_FEW = 2
"""The number of images that are also evaluated alone, and in float64."""

_OWNER = "conformance"


Build = Callable[[torch.dtype], tuple[Defense, Defense]]
"""Builds, at a precision, the defense that is evaluated and what the attack differentiates."""


@dataclass(frozen=True, slots=True)
class Approach:
    """The way in which a run attacks a defense: everything that a conformance record depends on."""

    defense: tuple[Path, Path, str]
    """The entries of the track and of the defense, and the device."""
    knows: frozenset[Site]
    """The sites whose draws the attacker is shown."""
    gradient: str | None
    """The kind of gradient that the attack follows; None where it follows none."""
    loss: str
    """The attack's loss; cross-entropy where it names none."""
    samples: int
    """EoT samples of one step."""
    batch_size: int
    """Images evaluated together."""
    max_batch: int
    """Images x samples in one pass."""
    seed: int


@dataclass(frozen=True, slots=True)
class Memo:
    """The records and gradient errors that the runs of one command share."""

    records: dict[Approach, Conformance] = field(default_factory=dict)
    errors: dict[tuple[Path, Path, str], list[float | None] | None] = field(default_factory=dict)
    """The errors of each defense's exact gradient; None where it has none that can be tested."""


def record(build: Build, group: Group, approach: Approach, memo: Memo | None = None) -> Conformance:
    """The conformance record of a defense: a function of the request alone.

    Args:
        build: Builds the defense.
        group: The first images of its track, on its device: as many as are evaluated together, or
            two if that is more.
        approach: The way in which the run attacks it.
        memo: The records that the runs of this command share.
    """
    memo = memo or Memo()
    if approach not in memo.records:
        full_float32()
        try:
            exact = build(torch.float64)
        except Exception:  # A purifier may not know float64; what it computes then isn't compared.
            exact = None
        few = Group(group.images[:_FEW].double(), group.labels[:_FEW], group.ids[:_FEW])
        small = Case(exact, few, replace(approach, max_batch=1)) if exact else None
        run = Case(build(torch.float32), group, approach)
        memo.records[approach] = Conformance(
            checks=examine(run, small),
            gradient=_gradient(exact, few, approach, memo),
            taped=_taped(run.defense),
        )
    return memo.records[approach]


def _taped(defense: Defense) -> dict[str, Any] | None:
    """The probe's record of a module under a tape; None of another purifier."""
    purifier = getattr(defense.purifier, "purifier", defense.purifier)  # resized
    found = getattr(purifier, "record", None)
    return json.loads(found.to_json()) if isinstance(found, Record) else None


def _gradient(
    exact: tuple[Defense, Defense] | None, few: Group, approach: Approach, memo: Memo
) -> GradientCheck | None:
    """The gradient of a `few` images at one draw, in float64; None where the attack follows none.

    A defense that cannot run in float64, or that has no gradient, leaves blanks: whether that
    matters, the attack decides. An author's code may raise anything; it has run in float32.
    """
    if approach.gradient is None:
        return None
    blank: list[float | None] = [None] * len(few.ids)
    errors = cosine = None
    if exact is not None:
        if approach.defense not in memo.errors:
            with suppress(Exception):
                errors = quick_errors(exact[0], few.images)
            memo.errors[approach.defense] = errors
        errors = memo.errors[approach.defense]
    if exact is not None and errors is not None:
        with suppress(Exception):
            cosine = quick_cosines(*exact, few, approach.loss, approach.seed, approach.max_batch)
    return GradientCheck(
        ids=list(few.ids), difference_errors=errors or blank, cosine=cosine or blank
    )


def faults(found: Conformance) -> list[str]:
    """The faults in a record that no honest defense is found to have."""
    said = [f"{name}: {reason}" for name, reason in found.checks.items() if reason != "pass"]
    errors = found.gradient.difference_errors if found.gradient else []
    wrong = [error for error in errors if error is not None and error > WRONG]
    if errors and len(wrong) == len(errors):
        said.append(f"the exact gradient is off from finite differences by {min(wrong):.2g}")
    return said


def differences(stated: Conformance, found: Conformance) -> list[str]:
    """The points in which a record that was made again isn't as stated.

    A check that the stated one lacks is none: an older version made it.
    """
    said = [
        f"{name!r} is stated as {verdict!r}, and isn't tested here"
        if name not in found.checks
        else f"{name!r} is stated as {verdict!r}, and found as {found.checks[name]!r}"
        for name, verdict in stated.checks.items()
        if found.checks.get(name) != verdict
    ]
    mine, theirs = found.gradient, stated.gradient
    if mine is None or theirs is None or mine.ids != theirs.ids:
        return said if mine == theirs else [*said, "the gradient is stated of other images"]
    # Rounding differs between machines: what it leaves of an error is known to its size.
    for name, scale, within in (("difference_errors", _size, 1.0), ("cosine", np.asarray, 0.01)):
        here, there = (
            scale(np.array(getattr(each, name), dtype=np.float64)) for each in (mine, theirs)
        )
        if len(here) != len(there) or not np.allclose(here, there, 0, within, equal_nan=True):
            said.append(f"{name} of the gradient are stated as {getattr(theirs, name)}")
    return said


def _size(errors: NDArray[np.float64]) -> NDArray[np.float64]:
    """The order of magnitude of `errors`."""
    sizes: NDArray[np.float64] = np.log10(errors.clip(FLOOR))
    return sizes


@dataclass(frozen=True)
class Case:
    """A defense and the attacker's way to it, as a run has them, and images to compare them on."""

    built: tuple[Defense, Defense]
    """The defense that is evaluated, and the one that the attack evaluates and differentiates."""
    group: Group
    """The images, of which as many are taken as are evaluated together."""
    approach: Approach

    @property
    def defense(self) -> Defense:
        """The defense that is evaluated."""
        return self.built[0]

    @property
    def images(self) -> Tensor:
        """The images ``(b, c, h, w)`` in [0, 1]."""
        return self.group.images[: self.approach.batch_size]

    @property
    def gradient(self) -> bool:
        """True where the attack follows a gradient of the defense, not of a surrogate for it."""
        return self.approach.gradient in ("exact", "bpda")

    def evaluated(self, rows: slice = slice(None), draw: int = 0) -> Tensor:
        """Logits ``(rows, k)`` as an evaluation computes them, at one draw."""
        victim, guess = self._tapes
        at = torch.arange(len(self.images))[rows]
        noise = Revealed(victim[at], guess[at].copies([draw]), self._knows)
        with torch.no_grad():
            return self.defense.logits(self.images[rows], noise)

    @cached_property
    def together(self) -> Tensor:
        """Logits ``(b, k)`` of the whole batch at draw 0."""
        return self.evaluated()

    @cached_property
    def unattacked(self) -> Tensor:
        """Logits ``(b, draws, k)`` in the same batch, without a gradient."""
        return self.view().logits(self.images, range(self._count))

    @cached_property
    def attacked(self) -> Gradient:
        """Logits ``(b, draws, k)`` as one pass of the attack computes them.

        With them comes the gradient ``(b, c, h, w)`` of a weighted sum of the logits at draw 0.
        """
        view = self.view()
        if not self.gradient:
            zeros = torch.zeros_like(self.images)
            return Gradient(zeros, self.unattacked.sum(2), self.unattacked)
        labels = self.group.labels[: len(self.images)]
        return view.gradient(self.images, labels, self._weighted, range(self._count))

    def view(self) -> AttackerView:
        """The attacker's view; what a surrogate computes may differ, and isn't compared."""
        searched = self.built[1] if self.gradient else self.defense
        return AttackerView(searched, self._knows, *self._tapes, self.approach.max_batch)

    def alone(self, row: int) -> tuple[Tensor, Tensor]:
        """Logits ``(1, k)`` and gradient ``(1, c, h, w)`` of an image, attacked alone at draw 0."""
        image, label = self.images[row : row + 1], self.group.labels[row : row + 1]
        view = self.view()[torch.tensor([row])]
        if not self.gradient:
            return view.logits(image, [0])[:, 0], torch.zeros_like(image)
        found = view.gradient(image, label, self._weighted, [0])
        return found.logits[:, 0], found.mean

    def _weighted(self, logits: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG002
        """A weighted sum of logits at each image's first draw, which no confidence saturates."""
        weights = Tape.make(0, _OWNER, [0]).normal(Site("logits"), 0, logits[:1])
        first = (torch.arange(len(logits), device=logits.device) % self._count == 0).to(logits)
        return (logits * weights).sum(1) * first

    @property
    def _count(self) -> int:
        """EoT samples in one pass of the attack."""
        approach = self.approach
        return max(1, min(approach.samples, approach.max_batch // len(self.images)))

    @property
    def _knows(self) -> frozenset[Site]:
        return self.approach.knows & self.defense.sites

    @property
    def _tapes(self) -> tuple[Tape, Tape]:
        ids = range(len(self.images))
        return Tape.make(0, _OWNER, ids), Tape.make(0, f"{_OWNER}/guess", ids)


def examine(case: Case, exact: Case | None = None) -> dict[str, str]:
    """The verdict of each check, by its name: "pass", or why the defense fails it.

    Args:
        case: At the precision and the batch sizes of the run.
        exact: The same in float64, on some of the images; None where it can't be.
    """
    found = {name: _said(check, case) for name, check in CHECKS.items()}
    if exact is not None:
        try:
            each = [exact.alone(row) for row in range(len(exact.images))]
        except Exception:  # An author's code may raise anything; it has run in float32.
            return found
        found[PRECISION] = _said(lambda case: _check_precision(case, each), case)
    return found


def _said(check: Callable[[Case], None], case: Case) -> str:
    return fault(lambda _, __: check(case), case.defense, case.images) or "pass"


def _check_replay(case: Case) -> None:
    """One tape gives the same logits twice, bit for bit."""
    if not torch.equal(case.together, case.evaluated()):
        raise NotConforming("two evaluations with the same draws differ")


def _check_batch(case: Case) -> None:
    """Each image has the same logits alone, or in a part of the batch, up to rounding."""
    cuts = [*range(min(_FEW, len(case.images))), len(case.images)]
    for start, end in zip(cuts, [*cuts[1:], len(case.images)], strict=True):
        if start < end:
            apart = case.evaluated(slice(start, end))
            when = "an image is evaluated alone" if end - start == 1 else "the batch is split"
            _check_gap(apart - case.together[start:end], case.together, when)


def _check_program(case: Case) -> None:
    """The logits that the attack meets are those that are evaluated, on identical draws.

    In one batch they are equal bit for bit, with and without a gradient, since torch takes the same
    arithmetic for both, and recomputation in the backward pass repeats it. Only where several
    samples of each image pass together is the batch larger than that of an evaluation: libraries
    of linear algebra then add in another order, and rounding may differ.
    """
    met = case.attacked.logits
    _check_gap(met - case.unattacked, met, "a gradient is asked for", 0.0)
    tolerance = TOLERANCE if met.shape[1] > 1 else 0.0
    for draw in sorted({0, met.shape[1] - 1}):
        evaluated = case.evaluated(draw=draw) if draw else case.together
        _check_gap(met[:, draw] - evaluated, evaluated, "the attack evaluates it", tolerance)


@torch.no_grad()
def _check_input(case: Case) -> None:
    """The images that are passed in are as before."""
    images = case.images[:_FEW]
    given = images.clone()
    case.defense.purifier(given, OpaqueNoise(Tape.make(0, _OWNER, range(len(images)))))
    if not torch.equal(given, images):
        raise NotConforming("the purifier changes its input in place")


def _check_precision(case: Case, exact: list[tuple[Tensor, Tensor]]) -> None:
    """The attack meets in float32, in its batch, what it would meet in float64, alone."""
    found, wanted = case.attacked.logits[: len(exact), 0], torch.cat([each for each, _ in exact])
    _check_gap(found - wanted, wanted, "float64 is taken", PRECISION_TOLERANCE)
    slope = case.attacked.mean[: len(exact)].double().flatten(1)
    other = torch.cat([each for _, each in exact]).flatten(1)
    some = slope.any(1) | other.any(1)
    cosine = cosines(slope, other).nan_to_num(0.0)[some]
    if len(cosine) and float(cosine.max()) < COSINE:
        raise NotConforming(
            f"the gradient turns when float64 is taken: its cosine is {float(cosine.max()):.2g}"
        )


CHECKS: Mapping[str, Callable[[Case], None]] = {
    "replays exactly": _check_replay,
    "does not mix images in a batch": _check_batch,
    "is the same program with and without a gradient": _check_program,
    "leaves its input alone": _check_input,
}
"""The short checks, by name."""

PRECISION: Final = "is the same program in float64"
"""The name of one more check, made where the defense runs in float64."""


def _check_gap(difference: Tensor, logits: Tensor, when: str, tolerance: float = TOLERANCE) -> None:
    gap, scale = float(difference.abs().max()), float(logits.abs().max())
    if not gap <= tolerance * scale:
        raise NotConforming(f"logits move by {gap:.2g} (largest {scale:.2g}) when {when}")
