"""The short conformance record that every run makes of its defense and stores in its result.

It is made on two images of the track, at the precision of the run, so that what was attacked and
what was evaluated are known to be the same program. ``dbp-bench check`` tests more.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dbp_bench.checks.gradients import quick
from dbp_bench.defense import Defense
from dbp_bench.errors import DbpError
from dbp_bench.noise import Tape
from dbp_bench.result import Conformance
from dbp_bench.runs.job import Job

IMAGES = 2
"""Images of the track that the record is made on."""

TOLERANCE = 1e-4
"""By which share of the largest logit an image alone may differ from the image in a batch."""

_OWNER = "conformance"


def record(job: Job) -> Conformance:
    """The conformance record of the defense of `job`: a function of the request alone."""
    images, _ = job.data().select(job.track_ids[:IMAGES])
    defense = job.defense()
    checks: dict[str, Callable[[Defense, Tensor], str | None]] = {
        "replays exactly": _replays,
        "does not mix images in a batch": _does_not_mix,
        "is the same program with and without a gradient": _same_with_gradient,
        "leaves its input alone": _leaves_input,
    }
    found = {
        name: _outcome(check, defense, images.to(job.device)) for name, check in checks.items()
    }
    return Conformance(checks=found, gradient=quick(job))


def _outcome(check: Callable[[Defense, Tensor], str | None], defense: Defense, x: Tensor) -> str:
    try:
        return check(defense, x) or "pass"
    except DbpError as error:
        return str(error)
    except Exception as error:  # Whatever an author's code raises is a finding, not a crash.
        first = next(iter(str(error).splitlines()), "")
        return f"it stopped with {type(error).__name__}: {first}"


def _logits(defense: Defense, images: Tensor, first: int = 0) -> Tensor:
    tape = Tape.make(0, _OWNER, range(first, first + len(images)))
    return defense.logits(images, tape).detach()


@torch.no_grad()
def _replays(defense: Defense, images: Tensor) -> str | None:
    once, again = (_logits(defense, images.clone()) for _ in range(2))
    return None if torch.equal(once, again) else "two evaluations with the same draws differ"


@torch.no_grad()
def _does_not_mix(defense: Defense, images: Tensor) -> str | None:
    together = _logits(defense, images.clone())
    for i in range(len(images)):
        alone = _logits(defense, images[i : i + 1].clone(), i)
        gap = float((alone[0] - together[i]).abs().max())
        if not gap <= TOLERANCE * float(together.abs().max()):
            return f"an image's logits move by {gap:.2g} when it is evaluated alone"
    return None


def _same_with_gradient(defense: Defense, images: Tensor) -> str | None:
    with torch.no_grad():
        evaluated = _logits(defense, images.clone())
    with torch.enable_grad():
        attacked = _logits(defense, images.clone().requires_grad_())
    gap = float((evaluated - attacked).abs().max())
    if not gap <= TOLERANCE * float(evaluated.abs().max()):
        return f"logits move by {gap:.2g} when a gradient is asked for: a surrogate is attacked"
    return None


@torch.no_grad()
def _leaves_input(defense: Defense, images: Tensor) -> str | None:
    given = images.clone()
    _logits(defense, given)
    return None if torch.equal(given, images) else "the purifier changes its input in place"
