"""The short conformance record that every run makes of its defense and stores in its result.

It is made on two images of the track, at the precision of the run, so that what was attacked and
what was evaluated are known to be the same program. ``dbp-bench check`` tests more.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from dbp_bench.checks.conformance import Check, fault
from dbp_bench.checks.gradients import quick
from dbp_bench.defense import Defense
from dbp_bench.errors import NotConforming
from dbp_bench.noise import Tape
from dbp_bench.result import Conformance
from dbp_bench.runs.job import Job

IMAGES = 2
"""Images of the track that the record is made on."""

TOLERANCE = 1e-4
"""The share of the largest logit by which rounding in float32 may move a logit."""

_OWNER = "conformance"


def record(job: Job) -> Conformance:
    """The conformance record of the defense of `job`: a function of the request alone."""
    images, _ = job.data().select(job.track_ids[:IMAGES])
    checks = examine(job.defense(), images.to(job.device))
    return Conformance(checks=checks, gradient=quick(job))


def examine(defense: Defense, images: Tensor) -> dict[str, str]:
    """By the name of each check, "pass" or why `defense` fails it on `images` ``(b, c, h, w)``."""
    return {name: fault(check, defense, images) or "pass" for name, check in CHECKS.items()}


@torch.no_grad()
def check_replay(defense: Defense, images: Tensor) -> None:
    """One tape gives the same logits twice, bit for bit."""
    once, again = (_logits(defense, images) for _ in range(2))
    if not torch.equal(once, again):
        raise NotConforming("two evaluations with the same draws differ")


@torch.no_grad()
def check_batch(defense: Defense, images: Tensor) -> None:
    """Each image has the same logits alone as in the batch, up to rounding."""
    together = _logits(defense, images)
    for i in range(len(images)):
        alone = _logits(defense, images[i : i + 1], first=i)[0]
        _check_gap(alone - together[i], together, "an image is evaluated alone")


def check_program(defense: Defense, images: Tensor) -> None:
    """Where a gradient is asked for, the logits are those that are evaluated."""
    with torch.no_grad():
        evaluated = _logits(defense, images)
    with torch.enable_grad():
        attacked = _logits(defense, images.clone().requires_grad_())
    _check_gap(attacked - evaluated, evaluated, "a gradient is asked for")


@torch.no_grad()
def check_input(defense: Defense, images: Tensor) -> None:
    """The images that are passed in are as before."""
    given = images.clone()
    defense.logits(given, Tape.make(0, _OWNER, range(len(images))))
    if not torch.equal(given, images):
        raise NotConforming("the purifier changes its input in place")


CHECKS: Mapping[str, Check] = {
    "replays exactly": check_replay,
    "does not mix images in a batch": check_batch,
    "is the same program with and without a gradient": check_program,
    "leaves its input alone": check_input,
}
"""The short checks, by name."""


def _logits(defense: Defense, images: Tensor, first: int = 0) -> Tensor:
    """Logits of a copy of `images`, whose rows have the noise of rows `first`, `first` + 1, ..."""
    tape = Tape.make(0, _OWNER, range(first, first + len(images)))
    return defense.logits(images.clone(), tape).detach()


def _check_gap(difference: Tensor, logits: Tensor, when: str) -> None:
    gap, scale = float(difference.abs().max()), float(logits.abs().max())
    if not gap <= TOLERANCE * scale:
        raise NotConforming(f"logits move by {gap:.2g} (largest {scale:.2g}) when {when}")
